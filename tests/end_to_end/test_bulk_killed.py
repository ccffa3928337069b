"""`deixis bulk` as a process: killed, and started again, with the rows of a run that nobody killed."""

import io
import subprocess
import tarfile
import time

import pyarrow.parquet as pq
import pytest

from tests.end_to_end.server import DEIXIS, deixis, environment

TIMEOUT_S = 120
PART_IMAGES = 16
IMAGES = 144


@pytest.fixture(params=["a folder", "a tar"])
def source(request, photographs, tmp_path):
    """Photographs, each different, and in their middle one that is none."""
    names = list(photographs)
    contents = {f"{number:03}.jpg": photographs[names[number % 6]] + bytes(number) for number in range(IMAGES)}
    contents["070.jpg"] = b"no photograph"
    if request.param == "a folder":
        place = tmp_path / "photos"
        place.mkdir()
        for name, content in contents.items():
            (place / name).write_bytes(content)
        return place
    place = tmp_path / "photos.tar"
    with tarfile.open(place, "w") as archive:
        for name, content in contents.items():
            told = tarfile.TarInfo(name)
            told.size = len(content)
            archive.addfile(told, io.BytesIO(content))
    return place


def test_after_kill_9_it_goes_on_where_it_was(source, tmp_path):
    command = ("bulk", source, "-l", "cat, coffee cup, rocket, flower", "--part-images", PART_IMAGES)
    data_dir, out = tmp_path / "data", tmp_path / "out"
    whole = deixis(*command, "--out", tmp_path / "whole.parquet", data_dir=data_dir)
    assert whole.returncode == 1, whole.stderr  # of the one that is none
    assert f"{IMAGES} images, 1 bad" in whole.stdout

    process = subprocess.Popen(
        [DEIXIS, *map(str, command), "--out", out],
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
    assert {pq.read_metadata(file).num_rows for file in before} == {PART_IMAGES}  # whole, or not there

    again = deixis(*command, "--out", out, data_dir=data_dir)

    assert again.returncode == 1, again.stderr
    assert f"{len(before) * PART_IMAGES} images are done" in again.stderr
    assert f"{IMAGES} images, 1 bad" in again.stdout
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert not [file for file in out.iterdir() if file.name.endswith(".part")]
    rows, expected = pq.read_table(out).to_pylist(), pq.read_table(tmp_path / "whole.parquet").to_pylist()
    for row, other in zip(rows, expected, strict=True):
        # Batches are of other images, by which a float may differ in its last digits.
        for name in ("scores", "similarities", "score", "similarity"):
            told, wanted = row.pop(name), other.pop(name)
            assert told == (None if wanted is None else pytest.approx(wanted, abs=1e-5))
        assert row == other
