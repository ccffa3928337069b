import os
import tracemalloc

import pytest

from app.images.reading import UnreadableFileError, read_image_file
from app.runtime.regular_files import FileTooLargeError, NotRegularFileError, open_regular, read_regular


@pytest.mark.skipif(os.name == "nt", reason="there are no pipes")
def test_a_pipe_a_folder_and_a_device_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for file, kind in ((tmp_path / "pipe", "a named pipe"), (tmp_path, "a folder"), ("/dev/zero", "a device")):
        with pytest.raises(NotRegularFileError, match=f"not a regular file, but {kind}"):
            open_regular(tmp_path / file)


def test_the_size_limit_includes_its_bound_and_is_checked_before_the_content_is_read(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(b"x" * 100_000)
    assert read_regular(file, 100_000) == b"x" * 100_000
    with pytest.raises(FileTooLargeError, match="the file has 100,000 bytes and the limit is 99,999"):
        read_regular(file, 99_999)


@pytest.mark.parametrize(("head", "size"), [(b"", 19 * 2**20), (b"", 3 * 2**30), (b"\x89PNG\r\n\x1a\n", 3 * 2**30)])
def test_a_large_file_that_is_no_image_or_too_large_takes_no_memory(tmp_path, head, size):
    file = tmp_path / "film.png"
    file.write_bytes(head)
    os.truncate(file, size)
    tracemalloc.start()
    try:
        with pytest.raises(UnreadableFileError, match=r"begins with the bytes|bytes and the limit is"):
            read_image_file(file, 20 * 2**20)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
