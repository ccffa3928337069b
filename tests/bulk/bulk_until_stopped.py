"""Runs `deixis bulk` with a fake encoder, and sends it a signal after a part; started by test_run.py.

python -m tests.bulk.bulk_until_stopped SIGNAL ARGUMENTS...
"""

import os
import signal
import sys

import app.cli.bulk_run
from app.bulk.parts import PartStore
from app.cli import cli
from tests.captions_made import CaptionEncoder


def main() -> None:
    number = int(sys.argv[1])
    write = PartStore.write

    def write_and_signal(self, unit, part, rows, *, ends_unit):
        write(self, unit, part, rows, ends_unit=ends_unit)
        if unit == 2:
            os.kill(os.getpid(), number)

    PartStore.write = write_and_signal
    app.cli.bulk_run.load_encoders = lambda _: [CaptionEncoder()]
    # Processes that a shell starts in the background ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    cli(sys.argv[2:])


if __name__ == "__main__":
    main()
