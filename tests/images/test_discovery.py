"""Paths, folders and patterns become lists of images."""

import os
import unicodedata
from pathlib import Path

import pytest

from app.errors import InvalidFieldError, UnknownNameError
from app.images.discovery import find_images, find_labelled_images, folder_within, import_images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (
        "b/2.JPG",
        "b/1.png",
        "a/deep/er/3.webp",
        "a/notes.txt",
        "a/.hidden.png",
        ".cache/4.png",
        "loose.tiff",
        "no-suffix",
    ):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return tmp_path / "pictures"


def relative(paths: list[Path], folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in paths]


def test_a_folder_is_searched_recursively_without_hidden_and_other_files(folder):
    assert relative(find_images([folder]), folder) == ["loose.tiff", "a/deep/er/3.webp", "b/1.png", "b/2.JPG"]


def test_a_file_is_returned_with_any_suffix(folder):
    given = [folder / "no-suffix", folder / "a/.hidden.png", folder / "a/notes.txt"]
    assert find_images(given) == given


def test_paths_keep_their_order_without_duplicates(folder):
    found = find_images([folder / "b/2.JPG", folder / "b", folder / "loose.tiff"])
    assert relative(found, folder) == ["b/2.JPG", "b/1.png", "loose.tiff"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("b/*.png", ["b/1.png"]),
        ("**/*.webp", ["a/deep/er/3.webp"]),
        ("b/[12].*", ["b/1.png", "b/2.JPG"]),
        ("?", ["a/deep/er/3.webp", "b/1.png", "b/2.JPG"]),
    ],
)
def test_patterns_are_expanded(folder, pattern, expected):
    assert relative(find_images([folder / pattern]), folder) == expected


def test_a_relative_pattern_starts_at_the_working_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert find_images([Path("b/*.png")]) == [Path("b/1.png")]


def test_a_file_whose_name_looks_like_a_pattern_is_found(tmp_path):
    odd = tmp_path / "holiday [1].jpg"
    odd.touch()
    assert find_images([odd]) == [odd]


def test_the_error_for_a_missing_path_names_it(folder):
    with pytest.raises(InvalidFieldError, match=r"nowhere\.jpg' is neither a file nor a folder"):
        find_images([folder / "b/1.png", folder / "nowhere.jpg"])


def test_the_error_for_a_folder_without_images_lists_the_suffixes(folder):
    (folder / "empty").mkdir()
    with pytest.raises(InvalidFieldError, match=r"no image in '.*empty'; looked for .*\.jpg.*\.png"):
        find_images([folder / "empty"])
    with pytest.raises(InvalidFieldError, match="an empty list"):
        find_images([])


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_links_are_followed_and_loops_of_links_end(folder, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "5.gif").touch()
    (folder / "linked").symlink_to(elsewhere)
    (folder / "a/up").symlink_to(folder)
    (folder / "a/self").symlink_to("self")
    (folder / "a/broken.png").symlink_to("missing.png")
    found = relative(find_images([folder]), folder)
    # A broken link is found, so that it is reported.
    assert found == ["loose.tiff", "a/broken.png", "a/deep/er/3.webp", "b/1.png", "b/2.JPG", "linked/5.gif"]


def test_each_subfolder_is_a_class_with_sorted_images(folder):
    found = find_labelled_images(folder)
    assert [(path.relative_to(folder).as_posix(), name) for path, name in found] == [
        ("a/deep/er/3.webp", "a"),
        ("b/1.png", "b"),
        ("b/2.JPG", "b"),
    ]


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_two_classes_may_be_links_to_one_folder(folder):
    (folder / "c").symlink_to(folder / "b")
    assert [name for _, name in find_labelled_images(folder)] == ["a", "b", "b", "c", "c"]


def test_class_names_are_composed_unicode(tmp_path):
    name = unicodedata.normalize("NFD", "café")
    (tmp_path / name).mkdir()
    (tmp_path / name / "1.jpg").touch()
    assert [label for _, label in find_labelled_images(tmp_path)] == [unicodedata.normalize("NFC", "café")]


def test_the_error_for_images_outside_subfolders_says_what_to_do(tmp_path):
    (tmp_path / "1.jpg").touch()
    with pytest.raises(InvalidFieldError, match="contains its images directly; put them into one subfolder per class"):
        find_labelled_images(tmp_path)


def test_a_folder_without_labelled_images_and_a_missing_one_are_rejected(tmp_path):
    with pytest.raises(InvalidFieldError, match="has no subfolder with images"):
        find_labelled_images(tmp_path)
    with pytest.raises(InvalidFieldError, match="is not a folder"):
        find_labelled_images(tmp_path / "missing")


# --- folders to import from ----------------------------------------------------------------------------------------


def test_a_folder_is_found_by_its_path_below_the_root(folder):
    root = folder.parent
    assert folder_within(root, "pictures") == folder.resolve()
    assert folder_within(root, "pictures/a/deep") == (folder / "a/deep").resolve()
    assert folder_within(root, "pictures/a/..") == folder.resolve()
    assert folder_within(root, ".") == root.resolve()


@pytest.mark.parametrize(
    "name", ["..", "../", "b/../..", "/", "/tmp", "nowhere", "loose.tiff", "a\0b", "\0", "x" * 5000, "y/" * 3000]
)
def test_a_path_outside_the_root_is_rejected_and_shortened_in_the_error(folder, name):
    with pytest.raises(InvalidFieldError, match="is not a folder below DEIXIS_IMPORT_DIR") as caught:
        folder_within(folder, name)
    assert len(caught.value.message) < 300
    assert str(folder) not in caught.value.message


def test_without_a_root_nothing_can_be_imported():
    with pytest.raises(InvalidFieldError, match="set DEIXIS_IMPORT_DIR"):
        folder_within(None, "pictures")


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_links_are_resolved_before_the_root_is_checked(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (folder / "out").symlink_to(tmp_path / "elsewhere")
    (folder / "in").symlink_to(folder / "a")
    (tmp_path / "root").symlink_to(folder)
    for name in ("out", "in/../../elsewhere", "out/."):
        with pytest.raises(InvalidFieldError):
            folder_within(folder, name)
    assert folder_within(folder, "in") == (folder / "a").resolve()
    assert folder_within(tmp_path / "root", "a") == (folder / "a").resolve()


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_a_loop_of_links_is_rejected(folder):
    (folder / "loop").symlink_to(folder / "loop")
    with pytest.raises(InvalidFieldError):
        folder_within(folder, "loop")


def test_images_are_imported_with_one_class_without_a_class_or_by_subfolder(folder):
    everything = ["loose.tiff", "a/deep/er/3.webp", "b/1.png", "b/2.JPG"]
    for classes in ((), ("b",), ("a", "b")):
        found = import_images(folder, ["a", "b"], by_subfolder=False, classes=classes)
        assert relative([file for file, _ in found], folder) == everything
        assert {given for _, given in found} == {classes}
    found = import_images(folder, ["b", "a"], by_subfolder=True, classes=())
    assert [(file.relative_to(folder).as_posix(), given) for file, given in found] == [
        ("a/deep/er/3.webp", ("a",)),
        ("b/1.png", ("b",)),
        ("b/2.JPG", ("b",)),
    ]


def test_underscores_of_a_subfolder_are_spaces_unless_the_class_has_underscores(tmp_path):
    (tmp_path / "coffee_cup").mkdir()
    (tmp_path / "coffee_cup" / "1.jpg").touch()
    for classnames, expected in [
        (["coffee cup"], "coffee cup"),
        (["coffee_cup"], "coffee_cup"),
        (["coffee cup", "coffee_cup"], "coffee_cup"),
    ]:
        assert [name for _, name in import_images(tmp_path, classnames, by_subfolder=True, classes=())] == [(expected,)]


def test_the_error_for_a_subfolder_without_a_class_lists_the_classes(folder):
    with pytest.raises(
        UnknownNameError, match="unknown class 'b'; known: a, c; subfolders must have the names of classes"
    ):
        import_images(folder, ["a", "c"], by_subfolder=True, classes=())


def test_a_folder_without_images_cannot_be_imported(tmp_path):
    with pytest.raises(InvalidFieldError, match="no image"):
        import_images(tmp_path, ["a"], by_subfolder=False, classes=("a",))
    with pytest.raises(InvalidFieldError, match="no subfolder with images"):
        import_images(tmp_path, ["a"], by_subfolder=True, classes=())


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
@pytest.mark.parametrize("by_subfolder", [False, True])
def test_links_that_point_out_of_an_imported_folder_are_skipped(folder, tmp_path, by_subfolder):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "5.gif").touch()
    (folder / "a" / "all").symlink_to(elsewhere)
    (folder / "a" / "one.gif").symlink_to(elsewhere / "5.gif")
    (folder / "a" / "same.png").symlink_to(folder / "b" / "1.png")
    found = import_images(folder, ["a", "b"], by_subfolder=by_subfolder, classes=())
    assert {file.name for file, _ in found} == {"3.webp", "same.png", "1.png", "2.JPG"} | (
        set() if by_subfolder else {"loose.tiff"}
    )


def test_housekeeping_of_other_systems_is_neither_a_class_nor_an_image(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.png").touch()
    for name in (
        "@eaDir",
        "#recycle",
        "$Recycle.Bin",
        "System Volume Information",
        "lost+found",
        ".Trashes",
        "FOUND.000",
    ):
        for place in (tmp_path / name, tmp_path / "cat" / name):
            place.mkdir()
            (place / "1.png").touch()
    assert find_labelled_images(tmp_path) == [(tmp_path / "cat" / "1.png", "cat")]
    for pattern in ("*", "**/*.png", "*/1.png"):
        assert find_images([tmp_path / pattern]) == [tmp_path / "cat" / "1.png"]
    # A folder that somebody has named is searched.
    assert find_images([tmp_path / "@eaDir"]) == [tmp_path / "@eaDir" / "1.png"]
    assert find_images([tmp_path / "@eaDir" / "*"]) == [tmp_path / "@eaDir" / "1.png"]


def test_folders_that_cannot_be_searched_are_reported(tmp_path, monkeypatch):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").touch()
    scandir = os.scandir

    def denied(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    for find in (lambda errors: find_images([tmp_path], errors), lambda errors: find_labelled_images(tmp_path, errors)):
        errors = []
        assert len(find(errors.append)) == 1
        assert [error.filename for error in errors] == [str(tmp_path / "dog")]
    with pytest.raises(InvalidFieldError, match="dog' cannot be read: Permission denied"):
        find_images([tmp_path / "dog"])


def test_a_file_behind_a_loop_of_links_or_with_a_name_that_is_too_long_is_an_error_of_its_own(tmp_path):
    (tmp_path / "loop.png").symlink_to("loop.png")
    assert find_images([tmp_path / "loop.png"]) == [tmp_path / "loop.png"]
    with pytest.raises(InvalidFieldError, match="neither a file nor a folder"):
        find_images([tmp_path / ("n" * 300)])
