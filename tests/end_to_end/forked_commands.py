"""Runs `deixis` many times and imports it once: `python -m tests.end_to_end.forked_commands SOCKET`.

Each connection sends the arguments, folder, environment and streams of a command. A fork of this process, which has
imported the whole command line and runs nothing else, becomes that command.
The connection receives its process id and, when it has ended, its status, each in a line. With COMMANDS_SERVER in their
environment, commands that accept --server and do not set it use that server, so that they load no model.
"""

import atexit
import contextlib
import importlib
import json
import os
import pkgutil
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

from tests.end_to_end.commands import environment, run_command

ROOT = Path(__file__).parents[2]


# --- the requesting side ---------------------------------------------------------------------------------------------


class ForkServer:
    """A process that forks into commands; `end` stops it, and leaves the commands running."""

    def __init__(self, folder: Path) -> None:
        place = folder / "socket"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.end_to_end.forked_commands", place],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout.readline() == "listening\n"
        self.program = folder / "deixis"
        self.program.write_text(PROGRAM.format(python=sys.executable, path=str(place)))
        self.program.chmod(0o755)

    def end(self) -> None:
        self._process.communicate()


@cache
def fork_server() -> ForkServer:
    """Return the server of this process."""
    folder = tempfile.TemporaryDirectory()
    server = ForkServer(Path(folder.name))
    atexit.register(folder.cleanup)
    atexit.register(server.end)
    return server


def deixis(
    *arguments: object, data_dir: Path, stdin: str | None = None, **settings: str
) -> subprocess.CompletedProcess[str]:
    """Run one command as `tests.end_to_end.commands.deixis` does, without the seconds of its imports."""
    return run_command(fork_server().program, *arguments, data_dir=data_dir, stdin=stdin, **settings)


class ForkedCommand(subprocess.Popen):
    """A running command; signals reach the fork, and its status is that of the program that requested it."""

    def __init__(self, *arguments: object, **options: Any) -> None:
        reading, writing = os.pipe()
        command = [fork_server().program, *map(str, arguments)]
        super().__init__(
            command, **{**options, "env": {**options["env"], "PID_FILE": str(writing)}}, pass_fds=[writing]
        )
        os.close(writing)
        with os.fdopen(reading) as stream:
            self.command_pid = int(stream.readline())

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.command_pid, sig)


# --- the forking process ---------------------------------------------------------------------------------------------


def takes_server(arguments: list[str]) -> bool:
    from app.cli import command_tree

    command: Any = command_tree()
    for word in arguments:
        found = getattr(command, "commands", {}).get(word)
        if found is None:
            break
        command = found
    return any("--server" in parameter.opts for parameter in command.params)


def run(request: dict[str, Any], streams: list[int]) -> int:
    """Become the command that a connection requests, and return its exit status."""
    from app.cli import cli

    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdout.reconfigure(line_buffering=True)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    arguments, url = request["arguments"], os.environ.pop("COMMANDS_SERVER", None)
    # These commands run in process only.
    in_process = {"--server", "--local", "--support", "--pool", "cased", "--help"}
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
    return status


class Forks:
    """The running commands, each with the connection that waits for its status."""

    def __init__(self) -> None:
        self._connections: dict[int, socket.socket] = {}

    def start(self, connection: socket.socket, others: list[socket.socket]) -> None:
        """Fork, and send the process id."""
        message, streams, _, _ = socket.recv_fds(connection, 1_000_000, 3)
        pid = os.fork()
        if pid:
            for stream in streams:
                os.close(stream)
            self._connections[pid] = connection
            connection.sendall(f"{pid}\n".encode())
            return
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for opened in (connection, *others, *self._connections.values()):
                opened.close()
            status = run(json.loads(message), streams)
        finally:
            os._exit(status)

    def report_ended(self) -> None:
        """Send the status of each command that has ended: its exit code, or minus the signal that ended it."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                with self._connections.pop(pid) as connection, contextlib.suppress(OSError):
                    connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def main() -> None:
    """Listen until the parent closes standard input."""
    # Imports that commands make when they need them; none of them starts a thread.
    import app.cli
    import app.main

    for module in pkgutil.walk_packages(app.cli.__path__, "app.cli."):
        importlib.import_module(module.name)

    path = sys.argv[1]
    forks = Forks()
    ended, wakeup = socket.socketpair()
    with socket.socket(socket.AF_UNIX) as listening, ended, wakeup:
        for end in (ended, wakeup):
            end.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wakeup.fileno())
        listening.bind(path)
        listening.listen()
        sys.stdout.write("listening\n")
        sys.stdout.flush()
        while True:
            ready, _, _ = select.select([listening, ended, sys.stdin], [], [])
            if ended in ready:
                ended.recv(1000)
                forks.report_ended()
            if listening in ready:
                connection, _ = listening.accept()
                forks.start(connection, [listening, ended, wakeup])
            elif sys.stdin in ready:
                return


PROGRAM = """#!{python} -SE
import json, os, signal, socket, sys
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect({path!r})
    pid_file = os.environ.pop("PID_FILE", None)
    request = dict(arguments=sys.argv[1:], folder=os.getcwd(), environment=dict(os.environ))
    socket.send_fds(connection, [json.dumps(request).encode()], [0, 1, 2])
    lines = connection.makefile()
    pid = int(lines.readline())
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os.kill(pid, number))
    if pid_file is not None:
        os.write(int(pid_file), b"%d\\n" % pid)
        os.close(int(pid_file))
    for stream in range(3):  # only the command holds them
        os.close(stream)
    status = int(lines.readline() or 1)
if status < 0:
    if -status != signal.SIGKILL:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""

if __name__ == "__main__":
    main()
