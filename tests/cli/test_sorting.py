"""`deixis classify --to-folder`: where files go, and that no file is lost."""

import csv
import os

import pytest

from app.cli.sorting import FileAction, Sorter, folder_name
from deixis import ImageResult, Prediction
from deixis.answers import PathStep
from tests.conftest import picture

COLOURS = ("red", "green", "blue")


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "trip").mkdir(parents=True)
    for colour in COLOURS:
        (folder / f"{colour}.png").write_bytes(picture(colour))
        (folder / "trip" / f"{colour}.png").write_bytes(picture(colour, (9, 9)))
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


def tree(folder):
    return {str(each.relative_to(folder)): each.read_bytes() for each in folder.rglob("*") if each.is_file()}


def sort(run, photos, target, *more, status=1):
    done = run("classify", photos, "-l", "red,green,blue", "--to-folder", target, *more)
    assert done.exit_code == status, done.output
    return done


def test_files_are_copied_into_a_folder_per_label(run, where, photos, tmp_path):
    before, target = tree(photos), tmp_path / "sorted"
    done = sort(run, photos, target, *where)
    assert "6 of 7 copied" in done.stderr
    assert "broken.png" in done.stderr
    assert tree(photos) == before
    found = tree(target)
    rows = list(csv.DictReader(found.pop("deixis.csv").decode().splitlines()))
    names = [name for colour in COLOURS for name in (f"{colour}/{colour}.png", f"{colour}/{colour} (2).png")]
    assert set(found) == set(names)
    assert {found["red/red.png"], found["red/red (2).png"]} == {before["red.png"], before["trip/red.png"]}
    assert {row["sorted to"] for row in rows} == set(names)
    assert {row["label"] for row in rows} == set(COLOURS)
    assert all(0.3 < float(row["score"]) <= 1 for row in rows)


def test_a_second_run_copies_nothing(run, photos, tmp_path):
    target = photos / "sorted"  # in the folder itself: what is in it is not sorted again
    sort(run, photos, target)
    first = tree(target)
    done = sort(run, photos, target)
    assert "0 of 7 copied" in done.stderr
    assert tree(target) == first


def test_files_are_moved_and_nothing_is_overwritten(run, photos, tmp_path):
    target = tmp_path / "sorted"
    (target / "red").mkdir(parents=True)
    (target / "red" / "red.png").write_bytes(b"somebody else's")
    before = tree(photos)
    sort(run, photos, target, "--move")
    assert tree(photos) == {"broken.png": b"no picture"}
    found = tree(target)
    assert found["red/red.png"] == b"somebody else's"
    assert {found["red/red (2).png"], found["red/red (3).png"]} == {before["red.png"], before["trip/red.png"]}


def test_files_are_linked(run, photos, tmp_path):
    sort(run, photos, tmp_path / "sorted", "--link")
    assert (tmp_path / "sorted/green/green.png").stat().st_nlink == 2
    assert (photos / "green.png").exists()


def test_a_dry_run_changes_nothing(run, photos, tmp_path):
    done = sort(run, photos, tmp_path / "sorted", "--dry-run", "--move")
    assert "6 of 7 would be moved" in done.stderr
    assert f"{photos / 'red.png'} -> {tmp_path / 'sorted' / 'red' / 'red.png'}" in done.stderr.replace("\n", "")
    assert not (tmp_path / "sorted").exists()
    assert len(tree(photos)) == 7


def test_rejected_images_go_to_a_folder_of_their_own(run, photos, tmp_path):
    sort(run, photos, tmp_path / "sorted", "--reject-below", "1")
    assert {each.name for each in (tmp_path / "sorted").iterdir()} == {"_none of these", "deixis.csv"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--move",), "--to-folder"),
        (("--dry-run",), "--to-folder"),
        (("--to-folder", "x", "--move", "--link"), "pass one"),
        (("--to-folder", __file__), "is not a folder"),
    ],
)
def test_invalid_combinations_of_options_are_refused_before_any_work(run, photos, flags, message):
    before = tree(photos)
    done = run("classify", photos, "-l", "red,green", *flags)
    assert done.exit_code == 2
    assert message in done.stderr
    assert tree(photos) == before


def result(label):
    return ImageResult(predictions=[Prediction(label=label, score=0.5, similarity=0.1)])


def test_a_file_without_a_discovered_label_is_none_of_these(tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(b"content")
    sorter = Sorter(tmp_path / "sorted", FileAction.COPY, dry_run=False)
    sorter.validate()
    assert sorter.sort(file, ImageResult(predictions=[])) == tmp_path / "sorted/_none of these/a.png"
    assert "a.png,_none of these" in (tmp_path / "sorted/deixis.csv").read_text()


def test_a_file_that_cannot_be_sorted_is_unchanged_and_not_counted(tmp_path, monkeypatch):
    file, target = tmp_path / "a.png", tmp_path / "sorted"
    file.write_bytes(b"content")
    sorter = Sorter(target, FileAction.MOVE, dry_run=False)
    sorter.validate()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr("pathlib.Path.rename", full)
    with pytest.raises(OSError, match="No space"):
        sorter.sort(file, result("cat"))
    assert sorter.done == 0
    assert tree(tmp_path) == {"a.png": b"content"}
    monkeypatch.undo()
    monkeypatch.setattr("shutil.copy2", full)
    with pytest.raises(OSError, match="No space"):
        Sorter(target, FileAction.COPY, dry_run=False).sort(file, result("cat"))
    assert tree(tmp_path) == {"a.png": b"content"}


def test_without_hard_links_files_are_renamed(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", none)
    file = tmp_path / "a.png"
    file.write_bytes(b"content")
    sorter = Sorter(tmp_path / "sorted", FileAction.MOVE, dry_run=False)
    sorter.validate()
    assert sorter.sort(file, result("cat")).read_bytes() == b"content"
    assert not file.exists()


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("cat", "cat"),
        ("coffee cup", "coffee cup"),
        ("a/b\\c:d", "a-b-c-d"),
        ("../../etc", "-..-etc"),
        ("..", "-"),
        ("con", "-con"),
        ("LPT1.txt", "-LPT1.txt"),
        ("_none of these", "-_none of these"),
        ("what? *", "what- -"),
        ("ends with. ", "ends with"),
        ("e\u0301", "é"),
        ("tab\there", "tab-here"),
    ],
)
def test_a_label_becomes_a_folder_name_that_every_system_allows(label, name):
    assert folder_name(label) == name


def test_long_labels_are_cut_between_characters():
    name = folder_name("猫" * 500)
    assert len(name.encode()) <= 200
    assert set(name) == {"猫"}


def test_labels_with_the_same_folder_name_get_folders_of_their_own_also_in_later_runs(tmp_path):
    labels = ["a/b", "a-b", "A-B", "a:b"]
    for attempt in range(2):
        for number, label in enumerate(labels[:: 1 if attempt == 0 else -1]):
            file = tmp_path / f"{attempt}{number}.png"
            file.write_bytes(file.name.encode())
            sorter = Sorter(tmp_path / "sorted", FileAction.MOVE, dry_run=False)
            sorter.validate()
            sorter.sort(file, result(label))
    assert {each.name for each in (tmp_path / "sorted").iterdir()} == {
        *("a-b", "a-b (2)", "A-B (3)", "a-b (4)", "deixis.csv"),
    }
    assert all(len(list(each.iterdir())) == 2 for each in (tmp_path / "sorted").iterdir() if each.is_dir())


@pytest.mark.parametrize("action", FileAction)
@pytest.mark.parametrize("has_links", [True, False])
def test_a_file_that_cannot_be_recorded_is_not_sorted(tmp_path, monkeypatch, action, has_links):
    file, target = tmp_path / "a.png", tmp_path / "sorted"
    file.write_bytes(b"content")
    sorter = Sorter(target, action, dry_run=False)
    sorter.validate()
    (target / "deixis.csv").mkdir()
    if not has_links and action is not FileAction.LINK:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(95, "Operation not supported")))
    with pytest.raises(IsADirectoryError):
        sorter.sort(file, result("cat"))
    assert tree(tmp_path) == {"a.png": b"content"}


def test_a_link_is_moved_as_a_copy_of_its_file_and_its_file_stays(tmp_path):
    (tmp_path / "real").mkdir()
    file, link = tmp_path / "real" / "b.png", tmp_path / "a.png"
    file.write_bytes(b"content")
    link.symlink_to("real/b.png")
    sorter = Sorter(tmp_path / "sorted", FileAction.MOVE, dry_run=False)
    sorter.validate()
    assert sorter.sort(link, result("cat")).read_bytes() == b"content"
    assert not link.is_symlink()
    assert file.read_bytes() == b"content"


def test_a_name_of_the_maximum_length_is_numbered_and_a_broken_link_is_not_followed(tmp_path):
    sorter = Sorter(tmp_path / "sorted", FileAction.COPY, dry_run=False)
    sorter.validate()
    (tmp_path / "sorted/cat").mkdir()
    (tmp_path / "sorted/cat/b.png").symlink_to("nowhere")
    names = []
    for folder, name in (("1", "n" * 251 + ".png"), ("2", "n" * 251 + ".png"), ("1", "b.png")):
        file = tmp_path / folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(folder.encode())
        names.append(sorter.sort(file, result("cat")).name)
    assert names == ["n" * 251 + ".png", "n" * 247 + " (2).png", "b (2).png"]


def test_with_a_hierarchy_files_go_where_their_path_ends(tmp_path):
    predictions = [
        Prediction(label="poodle", score=0.5, similarity=0.3),
        Prediction(label="cat", score=0.3, similarity=0.1),
    ]
    ends = {
        "poodle": [PathStep(label="animal", score=0.9), PathStep(label="poodle", score=0.5)],
        "animal": [PathStep(label="animal", score=0.9)],
        "_not sure": [],
    }
    for number, (folder, path) in enumerate(ends.items()):
        sorter = Sorter(tmp_path / "sorted", FileAction.COPY, dry_run=False)
        sorter.validate()
        (tmp_path / f"{number}.png").write_bytes(picture((number, 0, 0)))
        result = ImageResult(predictions=predictions, path=path)
        assert sorter.sort(tmp_path / f"{number}.png", result).parent.name == folder
    rejected = ImageResult(predictions=predictions, path=[], rejected=True)
    assert sorter.sort(tmp_path / "0.png", rejected).parent.name == "_none of these"
    rows = list(csv.reader((tmp_path / "sorted" / "deixis.csv").read_text().splitlines()))[1:]
    assert [row[2:] for row in rows] == [
        ["poodle", "0.5000"],
        ["animal", "0.9000"],
        ["poodle", "0.5000"],
        ["poodle", "0.5000"],
    ]
