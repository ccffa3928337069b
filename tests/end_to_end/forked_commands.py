"""Runs `deixis` many times and imports it once: `python -m tests.end_to_end.forked_commands SOCKET URL`.

Each connection brings a command's arguments, folder, environment and streams; a fork of this process, in which all of
the command line is imported and nothing is running yet, becomes that command. Commands that can ask a server ask that
at URL where they name none, so that no model is loaded.
"""

import json
import os
import socket
import sys
from typing import Any

from typer.main import get_command

from app.cli import cli


def takes_server(arguments: list[str]) -> bool:
    command: Any = get_command(cli)
    for word in arguments:
        found = getattr(command, "commands", {}).get(word)
        if found is None:
            break
        command = found
    return any("--server" in parameter.opts for parameter in command.params)


def run(connection: socket.socket, url: str) -> None:
    """Become the command that a connection asks for."""
    message, streams, _, _ = socket.recv_fds(connection, 1_000_000, 3)
    asked = json.loads(message)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    arguments = asked["arguments"]
    # Learning curves are drawn in process, and so is naming evaluated.
    alone = {"--server", "--support", "--pool", "cased", "--help"}
    if takes_server(arguments) and not alone & set(arguments):
        arguments += ["--server", url]
    sys.argv = ["deixis", *arguments]
    status = 0
    try:
        cli()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    connection.sendall(str(status).encode())


def main() -> None:
    """Listen until the parent closes standard input."""
    path, url = sys.argv[1:]
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        sys.stdout.write("listening\n")
        sys.stdout.flush()
        while True:
            connection, _ = listening.accept()
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    run(connection, url)
                    status = 0
                finally:
                    os._exit(status)
            connection.close()
            os.waitpid(child, 0)


SHIM = """#!{python} -SE
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect({path!r})
    asked = dict(arguments=sys.argv[1:], folder=os.getcwd(), environment=dict(os.environ))
    socket.send_fds(connection, [json.dumps(asked).encode()], [0, 1, 2])
    sys.exit(int(connection.recv(16) or b"1"))
"""

if __name__ == "__main__":
    main()
