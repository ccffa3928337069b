"""The command ``deixis``, which is the service's, where that is installed."""

import sys


def main() -> None:
    """Run the command line, or tell how to install it."""
    try:
        from app.cli import main as run  # noqa: PLC0415 - may not be there
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in {"app", "deixis"}:
            raise
        sys.exit(
            f"the command line and the service need {error.name}, which is missing: only the client is installed;"
            " run: pip install 'deixis[server,captions,embedded]'"
        )
    run()


if __name__ == "__main__":
    main()
