"""The command ``deixis``: the command line of the service, if the service is installed."""

import sys

from deixis.extras import needs_extra


def main() -> None:
    """Run the command line, or exit with the command that installs it."""
    try:
        from app.cli import main as run  # noqa: PLC0415 - an optional dependency

        run()  # imports the command
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in {"app", "deixis"}:
            raise
        sys.exit(needs_extra("the command line", "all"))


if __name__ == "__main__":
    main()
