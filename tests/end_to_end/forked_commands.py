"""Runs `deixis` many times and imports it once: `python -m tests.end_to_end.forked_commands SOCKET [URL]`.

Each connection sends the arguments, folder, environment and streams of a command. A fork of this process, which has
imported the whole command line and runs nothing else, becomes that command. If URL is given, commands that accept
--server and do not set it use the server at URL, so that they load no model.
"""

import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from functools import cache
from pathlib import Path
from typing import Any

from tests.end_to_end.server import environment, run_command

ROOT = Path(__file__).parents[2]


# --- the requesting side ---------------------------------------------------------------------------------------------


class Forking:
    """A process that forks into commands, and a program `deixis` in ``folder`` that requests one; `end` stops it."""

    def __init__(self, folder: Path, *, url: str | None = None) -> None:
        place = folder / "socket"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.end_to_end.forked_commands", place, *([] if url is None else [url])],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout.readline() == "listening\n"
        self.program = folder / "deixis"
        self.program.write_text(SHIM.format(python=sys.executable, path=str(place)))
        self.program.chmod(0o755)

    def end(self) -> None:
        self._process.communicate()


@cache
def _program() -> Path:
    folder = tempfile.TemporaryDirectory()
    forking = Forking(Path(folder.name))
    atexit.register(folder.cleanup)
    atexit.register(forking.end)
    return forking.program


def deixis(
    *arguments: object, data_dir: Path, stdin: str | None = None, **settings: str
) -> subprocess.CompletedProcess[str]:
    """Run one command as `tests.end_to_end.server.deixis` does, without the seconds of its imports."""
    return run_command(_program(), *arguments, data_dir=data_dir, stdin=stdin, **settings)


# --- the forking process ---------------------------------------------------------------------------------------------


def takes_server(arguments: list[str]) -> bool:
    from typer.main import get_command

    from app.cli import cli

    command: Any = get_command(cli)
    for word in arguments:
        found = getattr(command, "commands", {}).get(word)
        if found is None:
            break
        command = found
    return any("--server" in parameter.opts for parameter in command.params)


def run(connection: socket.socket, url: str | None) -> None:
    """Become the command that a connection requests."""
    from app.cli import cli

    message, streams, _, _ = socket.recv_fds(connection, 1_000_000, 3)
    request = json.loads(message)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    arguments = request["arguments"]
    # These commands run in process only.
    in_process = {"--server", "--support", "--pool", "cased", "--help"}
    if url is not None and takes_server(arguments) and not in_process & set(arguments):
        arguments += ["--server", url]
    sys.argv = ["deixis", *arguments]
    status = 0
    try:
        cli()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - printed as Python does
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    connection.sendall(str(status).encode())


def main() -> None:
    """Listen until the parent closes standard input."""
    # Imports that commands make when they need them; none of them starts a thread.
    import open_clip  # noqa: F401
    import torch  # noqa: F401

    import app.cli
    import app.main  # noqa: F401

    path, url = sys.argv[1], (sys.argv[2] if len(sys.argv) > 2 else None)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # only the requesting program waits for a command
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        sys.stdout.write("listening\n")
        sys.stdout.flush()
        while listening in select.select([listening, sys.stdin], [], [])[0]:
            connection, _ = listening.accept()
            if os.fork() == 0:
                try:
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    listening.close()
                    run(connection, url)
                finally:
                    os._exit(0)
            connection.close()


SHIM = """#!{python} -SE
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect({path!r})
    request = dict(arguments=sys.argv[1:], folder=os.getcwd(), environment=dict(os.environ))
    socket.send_fds(connection, [json.dumps(request).encode()], [0, 1, 2])
    sys.exit(int(connection.recv(16) or b"1"))
"""

if __name__ == "__main__":
    main()
