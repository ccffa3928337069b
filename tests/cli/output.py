"""Assertions on the output of commands."""


def assert_refused(done, message):
    """Assert that a command failed with one line; a progress bar may leave an empty line before it."""
    assert done.exit_code == 2
    assert done.stderr.lstrip("\n").startswith("error: ")
    assert done.stderr.strip("\n").count("\n") == 0
    assert message in done.stderr
    assert done.stdout == ""
    assert isinstance(done.exception, SystemExit)


def cells(done):
    """Return the words of each line of standard output."""
    assert done.exit_code == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]
