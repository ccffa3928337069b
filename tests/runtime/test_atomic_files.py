import os
from contextlib import suppress

import pytest

from app.runtime.atomic_files import atomic_file, is_temporary, publish, replace_content, sync, write_atomically


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize(("content", "written"), [(b"\0\xff", b"\0\xff"), ("caf\u00e9\n", "caf\u00e9\n".encode())])
def test_a_file_is_created_and_replaced(tmp_path, content, written):
    file = tmp_path / "a.json"
    write_atomically(file, b"an older and longer one")
    write_atomically(file, content)
    assert contents(tmp_path) == {"a.json": written}


def test_the_old_file_is_read_until_the_block_ends(tmp_path):
    file = tmp_path / "a.json"
    write_atomically(file, b"old")
    with atomic_file(file) as opened:
        opened.write(b"new")
        opened.flush()
        assert file.read_bytes() == b"old"
        (temporary,) = set(contents(tmp_path)) - {"a.json"}
        assert is_temporary(temporary, of="a.json")
        assert not is_temporary(temporary, of="b.json")
    assert contents(tmp_path) == {"a.json": b"new"}


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call):
    file = tmp_path / "a.json"
    write_atomically(file, b"old")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*(("os.fsync", full) if call == "fsync" else ("pathlib.Path.replace", full)))
    with pytest.raises(OSError, match="No space"):
        write_atomically(file, b"new")
    assert contents(tmp_path) == {"a.json": b"old"}


def test_an_exception_of_the_block_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "a.json"
    write_atomically(file, b"old")

    def interrupted():
        with atomic_file(file) as opened:
            opened.write(b"half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert contents(tmp_path) == {"a.json": b"old"}


def test_the_file_and_then_its_folder_are_synced(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync

    def recorded(opened):
        synced.append((os.fstat(opened).st_ino, sorted(contents(tmp_path))))
        fsync(opened)

    monkeypatch.setattr("os.fsync", recorded)
    file = tmp_path / "a.json"
    write_atomically(file, b"content")
    assert [inode for inode, _ in synced] == [file.stat().st_ino, tmp_path.stat().st_ino]
    assert "a.json" not in synced[0][1]
    assert synced[1][1] == ["a.json"]


def test_a_file_system_that_cannot_sync_folders_is_written_to(tmp_path, monkeypatch):
    fsync = os.fsync

    def files_only(opened):
        if os.fstat(opened).st_ino == tmp_path.stat().st_ino:
            raise OSError(22, "Invalid argument")
        fsync(opened)

    monkeypatch.setattr("os.fsync", files_only)
    write_atomically(tmp_path / "a.json", b"content")
    assert contents(tmp_path) == {"a.json": b"content"}


def test_a_folder_is_published_with_its_files(tmp_path):
    made = tmp_path / "made"
    made.mkdir()
    write_atomically(made / "a.json", b"content")
    publish(made, tmp_path / "kept")
    assert contents(tmp_path / "kept") == {"a.json": b"content"}
    assert not made.exists()


def test_a_read_only_file_can_be_synced(tmp_path):
    file = tmp_path / "a.json"
    file.write_bytes(b"content")
    file.chmod(0o400)
    sync(file)


@pytest.mark.parametrize("name", [".a.json.77.part", ".deixis-77.part", "a.json.part", f".deixis-{'0' * 32}.part.bak"])
def test_names_of_other_files_are_not_those_of_temporary_ones(name):
    assert not is_temporary(name)


def test_a_name_of_the_maximum_length_can_be_written(tmp_path):
    file = tmp_path / ("n" * 255)
    write_atomically(file, b"content")
    assert contents(tmp_path) == {file.name: b"content"}


def test_new_content_keeps_the_mode_the_owner_and_the_attributes_of_a_file_and_follows_links(tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    file, link = folder / "a.xmp", tmp_path / "link.xmp"
    file.write_bytes(b"old")
    file.chmod(0o664)
    link.symlink_to("other/a.xmp")
    owner = (1234, 2345) if os.geteuid() == 0 else (os.getuid(), os.getgid())
    os.chown(file, *owner)
    with suppress(OSError):  # not every file system has them
        os.setxattr(file, "user.colour", b"red")
    attributes = os.listxattr(file)
    replace_content(link, b"new")
    assert link.is_symlink()
    assert contents(folder) == {"a.xmp": b"new"}
    status = file.stat()
    assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (0o664, *owner)
    assert os.listxattr(file) == attributes
    replace_content(folder / "b.xmp", "new")
    assert (folder / "b.xmp").read_bytes() == b"new"
