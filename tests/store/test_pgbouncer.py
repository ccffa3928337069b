"""The store works behind PgBouncer, whose clients share connections between transactions."""

import asyncio
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from app.store.backup import write_backup
from app.store.database import migrate, ping
from app.store.label_sets import LabelSetRepository
from app.types import ClassEntry
from tests.postgres import as_unprivileged_user, until_postgres_answers

pytestmark = [pytest.mark.anyio, pytest.mark.postgres]

SETTINGS = """
[databases]
* = user=deixis host={server}
[pgbouncer]
listen_addr=
unix_socket_dir={folder}
listen_port=6432
auth_type=trust
auth_file={folder}/users
pool_mode=transaction
default_pool_size=3
"""


@pytest.fixture
def pooled_url(postgres_url):
    """Yield the URL of an empty database behind PgBouncer in transaction mode."""
    program = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        assert os.environ.get("TEST_REQUIRE_PGBOUNCER") != "1", "pgbouncer is not on PATH or in /usr/sbin"
        pytest.skip("PgBouncer is not installed")
    with tempfile.TemporaryDirectory(prefix="deixis-pgb-") as created:
        folder = Path(created)
        (folder / "settings").write_text(SETTINGS.format(server=postgres_url.partition("host=")[2], folder=folder))
        (folder / "users").write_text('"deixis" ""\n')
        options = as_unprivileged_user(folder)
        with (folder / "log").open("w") as log:
            pooler = subprocess.Popen([program, folder / "settings"], stdout=log, stderr=log, **options)
            try:
                url = f"{postgres_url.partition('?')[0]}?host={folder}&port=6432"
                until_postgres_answers(url, pooler, folder / "log")
                yield url
            finally:
                pooler.terminate()
                pooler.wait(30)


async def test_the_store_works_behind_pgbouncer_in_transaction_mode(pooled_url, opened, tmp_path):
    engines = [opened(pooled_url), opened(pooled_url)]
    await migrate(engines[0])
    repositories = [LabelSetRepository(engine) for engine in engines]

    async def use(number):
        repository = repositories[number % 2]
        for version in range(1, 11):  # drivers prepare a statement when they have sent it a few times
            await repository.put(f"set {number}", [ClassEntry(f"class {version}")], "photo")
            assert (await repository.get(f"set {number}")).version == version

    await asyncio.gather(*(use(number) for number in range(6)))
    manifest = await write_backup(engines[0], tmp_path / "backup", version="")
    assert manifest.rows["label_set_versions"] == 60
    await ping(engines[1])
