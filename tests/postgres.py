"""A real PostgreSQL server for the tests: created for the session, with a Unix socket, and deleted afterwards."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest

START_TIMEOUT_S = 60
STOP_TIMEOUT_S = 30
SUPERUSER = "deixis"


def postgres_binaries() -> Path | None:
    """Return the folder with ``initdb`` and ``postgres``; the newest one if there are several."""
    on_path = shutil.which("initdb")
    packaged = [*Path("/usr/lib/postgresql").glob("*/bin"), *Path("/opt/homebrew/opt").glob("postgresql@*/bin")]
    folders = [Path(on_path).resolve().parent] if on_path else []
    folders += sorted(packaged, key=lambda folder: (len(folder.parent.name), folder.parent.name), reverse=True)
    folders += [Path("/usr/local/pgsql/bin"), Path("/usr/pgsql/bin")]
    return next((folder for folder in folders if (folder / "initdb").exists() and (folder / "postgres").exists()), None)


@contextmanager
def running_postgres(binaries: Path) -> Iterator[str]:
    """Yield the URL of an empty database on a separate server, which stops at the end of the block."""
    # Not in the temporary folder of pytest: the path of a socket is limited to about 100 characters.
    with tempfile.TemporaryDirectory(prefix="deixis-pg-") as created:
        folder = Path(created)
        data = folder / "data"
        options = as_unprivileged_user(folder)
        with (folder / "log").open("w") as log:
            initdb: list[str | Path] = [binaries / "initdb", "-D", data, "-U", SUPERUSER, "-A", "trust"]
            initdb += ["-E", "UTF8", "--locale=C", "-N"]
            subprocess.run(initdb, cwd=folder, stdout=log, stderr=log, check=True, **options)
            # Durability is tested by SQLite and PostgreSQL; these tests kill clients, not the server.
            settings = ["listen_addresses=", f"unix_socket_directories={folder}", "fsync=off", "max_connections=100"]
            flags = [flag for setting in settings for flag in ("-c", setting)]
            server = subprocess.Popen(
                [binaries / "postgres", "-D", data, *flags], cwd=folder, stdout=log, stderr=log, **options
            )
            try:
                url = f"postgresql://{SUPERUSER}@/postgres?host={folder}"
                until_postgres_answers(url, server, folder / "log")
                yield url
            finally:
                server.send_signal(signal.SIGINT)  # "fast": without waiting for clients
                try:
                    server.wait(STOP_TIMEOUT_S)
                except subprocess.TimeoutExpired:
                    server.kill()
                    server.wait()


def as_unprivileged_user(folder: Path) -> dict[str, Any]:
    """Return options that run a child process as an ordinary user, because PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return {}
    known = {entry.pw_name: entry for entry in pwd.getpwall()}
    user = known.get("postgres") or known["nobody"]
    os.chown(folder, user.pw_uid, user.pw_gid)
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def until_postgres_answers(url: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    import psycopg

    give_up_at = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            psycopg.connect(url).close()
        except psycopg.OperationalError:
            if server.poll() is not None or time.monotonic() > give_up_at:
                pytest.fail(f"PostgreSQL did not start:\n{log.read_text()}")
            time.sleep(0.02)
        else:
            return


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """Yield the URL of a server; without PostgreSQL the test is skipped, unless PostgreSQL is required."""
    binaries = postgres_binaries()
    if binaries is None:
        reason = "no PostgreSQL binaries (initdb, postgres) on PATH or in /usr/lib/postgresql"
        if os.environ.get("TEST_REQUIRE_POSTGRES") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    pytest.importorskip("psycopg", reason="the extra postgres is not installed")
    with running_postgres(binaries) as url:
        yield url


_numbers = count(1)


@pytest.fixture
def postgres_url(postgres_server: str) -> Iterator[str]:
    """Yield the URL of an empty database for the test."""
    import psycopg

    name = f"test_{next(_numbers)}"
    with psycopg.connect(postgres_server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    yield postgres_server.replace("/postgres?", f"/{name}?")
    with psycopg.connect(postgres_server, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
