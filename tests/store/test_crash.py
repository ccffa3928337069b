import os
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import text

from app.store.database import migrate
from app.store.label_sets import LabelSetRepository
from app.types import ClassEntry

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[2]


def write_until_killed(url, lines):
    """Return the versions that a writer had acknowledged before it was killed."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    script = Path(__file__).with_name("write_burst.py")
    with subprocess.Popen(
        [sys.executable, script, url], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}
    ) as writer:
        first = [writer.stdout.readline() for _ in range(lines)]
        writer.kill()
        rest = [line for line in writer.stdout if line.endswith("\n")]
    return [(name, int(version)) for name, version in (line.split() for line in first + rest)]


@pytest.mark.parametrize("lines", [1, 25, 60])
async def test_acknowledged_versions_survive_the_kill_of_the_writer(url, opened, lines):
    acknowledged = write_until_killed(url, lines)
    assert len(acknowledged) >= lines

    engine = opened(url)
    await migrate(engine)
    repository = LabelSetRepository(engine)
    for name, version in acknowledged:
        entries = tuple(ClassEntry(f"class {n} of version {version}") for n in range(100))
        assert (await repository.get(name, version)).classes == entries
    for summary in await repository.list(10):
        unacknowledged = summary.version - max((v for name, v in acknowledged if name == summary.name), default=0)
        assert unacknowledged in {0, 1}  # the last transaction is complete or missing
        assert summary.class_count == 100
        assert (await repository.put(summary.name, [ClassEntry("lynx")], "photo"))[0].version == summary.version + 1
    if engine.dialect.name == "sqlite":
        async with engine.connect() as connection:
            assert await connection.scalar(text("PRAGMA integrity_check")) == "ok"
