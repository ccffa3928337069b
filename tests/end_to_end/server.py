"""Starts and ends the real server as its users do: the console script, in a process of its own."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

DEIXIS = Path(sys.executable).with_name("deixis")
_START_TIMEOUT_S = 300


class Server:
    """A running `deixis serve` on a port of its own."""

    def __init__(self, *flags: str, data_dir: Path) -> None:
        self.process = subprocess.Popen(
            [DEIXIS, "serve", "--port", "0", "--data-dir", data_dir, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(PYTHONUNBUFFERED="1"),
        )
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
def serving(*flags: str, data_dir: Path) -> Iterator[Server]:
    """Start a server and end it gracefully, unless the test has ended it already."""
    server = Server(*flags, data_dir=data_dir)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.signal(signal.SIGTERM)
            server.wait()


def environment(**settings: str) -> dict[str, str]:
    """Return the environment of a process of ours: none of this machine's settings, and these."""
    others = {name: value for name, value in os.environ.items() if not name.startswith(("DEIXIS_", "RAY_ADDRESS"))}
    # Weights that are not on this machine must be an error at once, and not a wait for a network.
    quick = {"HF_HUB_OFFLINE": "1", "DEIXIS_TUNING_SECONDS": "0", "DEIXIS_BUILD_WORDNET": "false"}
    return {**others, **quick, "no_proxy": "*", **settings}


def deixis(
    *arguments: object, data_dir: Path, stdin: str | None = None, **settings: str
) -> subprocess.CompletedProcess[str]:
    """Run one command to its end; ``settings`` are those of the environment, by their whole names."""
    return run_command(DEIXIS, *arguments, data_dir=data_dir, stdin=stdin, **settings)


def run_command(
    program: Path, *arguments: object, data_dir: Path, stdin: str | None, **settings: str
) -> subprocess.CompletedProcess[str]:
    """Run one command of ``program`` as `deixis` does."""
    return subprocess.run(
        [program, *map(str, arguments)],
        capture_output=True,
        text=True,
        input=stdin,
        timeout=300,
        env=environment(DEIXIS_DATA_DIR=str(data_dir), **settings),
        check=False,
    )
