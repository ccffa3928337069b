"""`deixis bulk` as a process that is killed and resumed."""

import io
import subprocess
import tarfile
import time

import pyarrow.parquet as pq
import pytest

from tests.end_to_end.commands import environment
from tests.end_to_end.forked_commands import ForkedCommand, deixis

TIMEOUT_S = 120
PART_IMAGES = 16
IMAGES = 144


@pytest.fixture
def source(photographs, tmp_path):
    """A tar file of different photographs, and one bad image among them."""
    names = list(photographs)
    contents = {f"{number:03}.jpg": photographs[names[number % 6]] + bytes(number) for number in range(IMAGES)}
    contents["070.jpg"] = b"not a photograph"
    place = tmp_path / "photos.tar"
    with tarfile.open(place, "w") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return place


def test_after_kill_9_a_run_resumes_and_writes_the_rows_of_an_uninterrupted_run(source, tmp_path):
    command = ("bulk", source, "-l", "cat, coffee cup, rocket, flower", "--part-images", PART_IMAGES)
    data_dir, out = tmp_path / "data", tmp_path / "out"
    uninterrupted = deixis(*command, "--out", tmp_path / "uninterrupted.parquet", data_dir=data_dir)
    assert uninterrupted.returncode == 1, uninterrupted.stderr  # one bad image
    assert f"{IMAGES} images, 1 bad" in uninterrupted.stdout

    process = ForkedCommand(
        *command,
        "--out",
        out,
        env=environment(DEIXIS_DATA_DIR=str(data_dir)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    give_up_at = time.monotonic() + TIMEOUT_S
    while len(list(out.glob("part-*"))) < 3:
        assert process.poll() is None
        assert time.monotonic() < give_up_at
        time.sleep(0.02)
    process.kill()
    process.wait()

    before = {file: file.stat().st_mtime_ns for file in out.glob("part-*")}
    assert 3 <= len(before) < IMAGES / PART_IMAGES
    assert {pq.read_metadata(file).num_rows for file in before} == {PART_IMAGES}  # only complete parts

    resumed = deixis(*command, "--out", out, data_dir=data_dir)

    assert resumed.returncode == 1, resumed.stderr
    assert f"{len(before) * PART_IMAGES} images are done" in resumed.stderr
    assert f"{IMAGES} images, 1 bad" in resumed.stdout
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert not [file for file in out.iterdir() if file.name.endswith(".part")]
    rows, expected = pq.read_table(out).to_pylist(), pq.read_table(tmp_path / "uninterrupted.parquet").to_pylist()
    for row, other in zip(rows, expected, strict=True):
        # The batches differ, so the last digits of a float may differ.
        for name in ("scores", "similarities", "score", "similarity"):
            actual, expected_value = row.pop(name), other.pop(name)
            assert actual == (None if expected_value is None else pytest.approx(expected_value, abs=1e-5))
        assert row == other
