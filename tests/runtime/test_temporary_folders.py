"""A temporary folder is removed with its process, or by the next one; never while its process lives."""

import stat
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from app.runtime.temporary_folders import temporary_folder

HOLD = """
import sys
from pathlib import Path
from pathlib import Path
from app.runtime.temporary_folders import temporary_folder
with temporary_folder(Path(sys.argv[1]), ".deixis-test-") as folder:
    (folder / "content").write_text("half")
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Run a process that holds a temporary folder until it is killed."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        yield process
        process.kill()


def names_in(folder):
    return [path.name for path in folder.iterdir()]


def test_the_folder_of_a_killed_process_is_removed_by_the_next_one_and_not_before(tmp_path, holder):
    left = names_in(tmp_path)
    with temporary_folder(tmp_path, ".deixis-test-"):
        assert len(names_in(tmp_path)) == 2
    assert names_in(tmp_path) == left
    holder.kill()
    holder.wait()
    with temporary_folder(tmp_path, ".deixis-test-") as folder:
        assert names_in(tmp_path) == [folder.parent.name]
    assert names_in(tmp_path) == []


def test_only_its_user_may_read_a_temporary_folder_also_after_it_was_renamed(tmp_path):
    with temporary_folder(tmp_path, ".deixis-test-") as folder:
        assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
        folder.rename(tmp_path / "done")
    assert stat.S_IMODE((tmp_path / "done").stat().st_mode) == 0o700
    assert names_in(tmp_path) == ["done"]


def test_links_and_other_folders_are_kept(tmp_path):
    (tmp_path / "photographs").mkdir()
    (tmp_path / ".deixis-test-link").symlink_to(tmp_path / "photographs")
    (tmp_path / ".deixis-other-1").mkdir()
    with temporary_folder(tmp_path, ".deixis-test-"):
        pass
    assert sorted(names_in(tmp_path)) == [".deixis-other-1", ".deixis-test-link", "photographs"]


def test_a_folder_that_another_process_removes_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    acquire = FileLock.acquire
    removed = []

    def acquire_late(lock, *args, **keywords):
        if not removed:
            removed.append(Path(lock.lock_file).parent)
            removed[0].rmdir()
        return acquire(lock, *args, **keywords)

    monkeypatch.setattr(FileLock, "acquire", acquire_late)
    with temporary_folder(tmp_path, ".deixis-test-") as folder:
        assert removed
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
