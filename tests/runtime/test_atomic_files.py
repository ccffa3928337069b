import os

import pytest

from app.runtime.atomic_files import atomic_file, publish, sync, temporary_names, write_atomically


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
        assert temporary_names(r"[a-z]\.json").fullmatch(temporary)
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


@pytest.mark.parametrize("name", [".b.json.77.part", ".a.json.new.part", "a.json.77.part", ".a.json.77.part.bak"])
def test_names_of_other_files_are_not_those_of_temporary_ones(name):
    assert temporary_names(r"a\.json").fullmatch(".a.json.77.part")
    assert not temporary_names(r"a\.json").fullmatch(name)
