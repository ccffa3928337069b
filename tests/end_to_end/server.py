"""Starts and ends the real server in a process of its own."""

import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.end_to_end.commands import DEIXIS, environment
from tests.end_to_end.forked_commands import ForkedCommand

_START_TIMEOUT_S = 300


class Server:
    """A running `deixis serve` on a port of its own: a fork, or with ``forked=False`` the console script."""

    def __init__(self, *flags: str, data_dir: Path, forked: bool = True) -> None:
        command = ["serve", "--port", "0", "--data-dir", str(data_dir), *flags]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        settings = environment(PYTHONUNBUFFERED="1")
        if forked:
            self.process = ForkedCommand(*command, env=settings, **streams)
        else:
            self.process = subprocess.Popen([DEIXIS, *command], env=settings, **streams)
        self.log: list[str] = []
        self._log_reader = threading.Thread(target=self._read_log, daemon=True)
        self._log_reader.start()
        watchdog = threading.Timer(_START_TIMEOUT_S, self.process.kill)
        watchdog.start()
        announced = iter(self.process.stdout.readline, "")
        line = next((line for line in announced if "listens on" in line), None)
        watchdog.cancel()
        if line is None:
            status = self.wait()
            raise RuntimeError(f"the server ended with status {status}: {''.join(self.log)}")
        self.url = line.split("listens on ")[1].split()[0]

    def _read_log(self) -> None:
        self.log.extend(self.process.stderr)

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, timeout_s: float = 60) -> int:
        status = self.process.wait(timeout_s)
        self._log_reader.join(timeout_s)
        self.process.stdout.close()
        self.process.stderr.close()
        return status


@contextmanager
def serving(*flags: str, data_dir: Path, forked: bool = True) -> Iterator[Server]:
    """Start a server and end it gracefully, unless the test has ended it already."""
    server = Server(*flags, data_dir=data_dir, forked=forked)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.signal(signal.SIGTERM)
            server.wait()
