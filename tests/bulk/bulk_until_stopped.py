"""Run `deixis bulk` with an encoder of tests, and stop it by a signal after a part; run by test_bulk_command.py.

python -m tests.bulk.bulk_until_stopped SIGNAL ARGUMENTS...
"""

import os
import signal
import sys

import app.cli.bulk
from app.bulk.parts import PartStore
from app.cli import cli
from tests.captions_made import CaptionEncoder


def main() -> None:
    number = int(sys.argv[1])
    write = PartStore.write

    def stopping(self, unit, part, rows, *, ends_unit):
        write(self, unit, part, rows, ends_unit=ends_unit)
        if unit == 2:
            os.kill(os.getpid(), number)

    PartStore.write = stopping
    app.cli.bulk.load_encoders = lambda _: [CaptionEncoder()]
    # Ctrl-C is ignored by processes that a shell has started in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    cli(sys.argv[2:])


if __name__ == "__main__":
    main()
