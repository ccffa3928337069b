"""What the benchmark of background work refuses, and how it marks a missed goal."""

import os
import subprocess
import sys
from io import BytesIO
from types import SimpleNamespace

import pytest
from PIL import Image

from benchmarks.background import Work, beside, distinct, report
from benchmarks.load import photographs
from benchmarks.processes import Server
from benchmarks.rounds import Spread


class Counting(Work):
    """Work whose state the test decides."""

    kind = title = "counting"

    def __init__(self, server, advances, *, runs=True, encodes_images=False):
        self.server, self.at, self.advances, self.runs = server, 0, advances, runs
        self.encodes_images = encodes_images

    def keep(self):
        pass

    def is_running(self):
        return self.runs

    def done(self):
        self.at += self.advances
        return self.at


@pytest.fixture
def server():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, text=True) as process:
        yield Server(process, "http://127.0.0.1:1")
        process.kill()


def load(statuses):
    return SimpleNamespace(ask=lambda *_: {"statuses": statuses, "images_per_s": 5.0, "p50_ms": 1.0, "p99_ms": 2.0})


def test_work_that_advances_is_measured_and_its_server_is_stopped_afterwards(server):
    figures = beside(Counting(server, 3), load({"200": 5}), 1, 0.1)
    assert figures["work_done"] == 3
    assert os.WIFSTOPPED(os.waitpid(server.process.pid, os.WUNTRACED)[1])


@pytest.mark.parametrize(
    ("advances", "options"),
    [(0, {}), (3, {"runs": False}), (5, {"encodes_images": True}), (4, {"encodes_images": True})],
)
def test_work_that_did_not_go_on_ends_the_program(server, advances, options):
    with pytest.raises(SystemExit, match="counting: the work did not go on"):
        beside(Counting(server, advances, **options), load({"200": 5}), 1, 0.1)


def test_other_statuses_than_200_end_the_program(server):
    with pytest.raises(SystemExit, match="503"):
        beside(Counting(server, 3), load({"200": 5, "503": 1}), 1, 0.1)


def test_ratios_that_miss_a_goal_are_bold():
    def kind(p50, rate):
        one, many = (
            {"of_idle": {"p50_ms": Spread(p50, 1, 2), "p99_ms": Spread(2, 1, 3), "images_per_s": Spread(rate, 0.5, 1)}}
            for _ in range(2)
        )
        return {"title": "work", "shapes": {"1": one, "32": many}}

    good, bad = report([kind(1.3, 0.9), kind(1.31, 0.89)]).splitlines()[2:]
    assert "**" not in good
    assert bad.count("**") == 4


def test_distinct_photographs_are_valid_files_with_the_same_pixels():

    photo = photographs()[0]
    files = [distinct(photo, number) for number in (1, 2)]
    assert len({*files, photo}) == 3
    assert len({Image.open(BytesIO(file)).tobytes() for file in (*files, photo)}) == 1
