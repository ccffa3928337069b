import json
import logging
import sqlite3

import pytest
import structlog
from sqlalchemy import create_engine, event

from app.observability.logs import configure_logs


def lines_of(capsys):
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


def fail(secret):
    raise ZeroDivisionError("it broke")


def test_json_logs_have_one_object_per_line_for_every_logger(capsys):
    configure_logs("json", "info")
    with structlog.contextvars.bound_contextvars(request_id="r1"):
        structlog.get_logger().info("ours", label="犬\n")
        logging.getLogger("elsewhere").warning("theirs %d", 3)
    ours, theirs = (json.loads(line) for line in lines_of(capsys))
    assert (ours["event"], ours["label"], ours["level"], ours["request_id"]) == ("ours", "犬\n", "info", "r1")
    assert (theirs["event"], theirs["level"], theirs["request_id"]) == ("theirs 3", "warning", "r1")


@pytest.mark.parametrize("log_format", ["json", "console"])
@pytest.mark.parametrize("control", ["\x00", "\x07", "\x1b[31m", "\x9b", "\u2028", "\u202e", "\u2066", "\n", "\ud800"])
def test_control_characters_are_escaped(capsys, log_format, control):
    configure_logs(log_format, "info")
    structlog.get_logger().info("request", path=f"/犬{control}é")
    logging.getLogger("elsewhere").warning("read %s", f"a{control}b")
    captured = capsys.readouterr().err
    assert all(item.isprintable() for item in captured.split("\n"))
    assert len(captured.splitlines()) == 2
    assert control.encode("unicode_escape").decode().replace("\\x", "").lstrip("\\") in captured


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_events_below_the_level_are_not_logged(capsys, log_format):
    configure_logs(log_format, "warning")
    structlog.get_logger().info("no")
    structlog.get_logger().warning("yes")
    (line,) = lines_of(capsys)
    assert "yes" in line


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_traceback_is_logged_without_the_values_of_variables(capsys, log_format):
    """Values contain images, labels and keys of clients, and printing them takes seconds."""
    configure_logs(log_format, "info")
    try:
        fail(secret="hunter" + "2")
    except ZeroDivisionError as error:
        structlog.get_logger().error("broken", exc_info=error)
    logged = "\n".join(lines_of(capsys))
    assert "it broke" in logged
    assert "fail" in logged
    assert "hunter2" not in logged


def test_a_connection_that_the_pool_cannot_reset_is_logged_in_one_line(capsys):
    def lose(*_):
        raise sqlite3.OperationalError("the connection is lost\nmore")

    configure_logs("console", "info")
    engine = create_engine("sqlite://")
    event.listen(engine, "reset", lose)
    engine.raw_connection().close()
    (line,) = lines_of(capsys)
    assert "Exception during reset or similar: OperationalError: the connection is lost" in line
