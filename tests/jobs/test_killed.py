"""Jobs whose process is killed: nothing that was stored is lost or stored twice, and a job that kills is given up."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import text

from app.jobs.handlers import IMPORT_IMAGES
from app.store.database import migrate, open_engine, reading
from app.store.jobs import MAX_ATTEMPTS, JobRepository, JobStatus
from app.store.label_sets import LabelSetRepository
from app.types import ClassEntry
from tests.conftest import photograph

pytestmark = pytest.mark.anyio

SCRIPT = Path(__file__).with_name("run_until_killed.py")
ROOT = Path(__file__).parents[2]


@pytest.fixture
async def engine(tmp_path, empty_database):
    (tmp_path / "deixis.sqlite3").write_bytes(empty_database.read_bytes())
    engine = open_engine(f"sqlite:///{tmp_path / 'deixis.sqlite3'}")
    await migrate(engine)
    await LabelSetRepository(engine).put("pets", [ClassEntry("cat"), ClassEntry("owl")], "photo")
    yield engine
    await engine.dispose()


def running(folder, *arguments):
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, SCRIPT, str(folder), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path})


async def import_job(engine):
    request = {"folder": "photographs", "by_subfolder": False, "class": "cat"}
    return await JobRepository(engine).add(IMPORT_IMAGES, "pets", request)


async def test_an_import_that_was_killed_goes_on_and_stores_each_image_once(tmp_path, engine):
    (tmp_path / "photographs").mkdir()
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 255, (40, 8, 8, 3), np.uint8)):
        (tmp_path / "photographs" / f"{number}.png").write_bytes(photograph(pixels, "PNG"))
    job = await import_job(engine)
    with running(tmp_path, "halt") as first:
        done = next(int(line) for line in first.stdout if line.strip().isdigit())
        first.kill()
    async with reading(engine) as session:
        assert await session.scalar(text("SELECT count(*) FROM examples")) == done == 32
    with running(tmp_path, "finish") as second:
        assert second.stdout.readlines()[-1].strip() == JobStatus.SUCCEEDED
    result = (await JobRepository(engine).get(job.id)).result
    assert (result["added"], result["duplicates"]) == (8, 32)
    async with reading(engine) as session:
        counts = "SELECT count(*), count(DISTINCT digest), (SELECT count(*) FROM example_features) FROM examples"
        assert (await session.execute(text(counts))).one() == (40, 40, 40)


async def test_a_job_that_kills_its_process_is_given_up_after_three_processes(tmp_path, engine):
    job = await import_job(engine)
    for _ in range(MAX_ATTEMPTS):
        with running(tmp_path, "kill") as process:
            assert "started\n" in process.stdout.readlines()
    async with asyncio.timeout(20):
        while (claimed := await JobRepository(engine).claim(IMPORT_IMAGES, "next", 15)) is None:  # noqa: ASYNC110
            await asyncio.sleep(0.01)  # until the lease of the last process ends
    given_up, _ = claimed
    assert (given_up.id, given_up.status) == (job.id, JobStatus.FAILED)
    assert "3 processes of the service ended" in given_up.error
