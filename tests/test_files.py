"""Paths, folders and patterns become lists of images."""

import os
import unicodedata
from pathlib import Path

import pytest

from app.errors import InvalidFieldError
from app.files import find_images, find_labelled_images


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


def test_a_folder_is_searched_to_the_bottom_in_order_without_hidden_and_other_files(folder):
    assert relative(find_images([folder]), folder) == ["loose.tiff", "a/deep/er/3.webp", "b/1.png", "b/2.JPG"]


def test_a_file_is_taken_as_given_whatever_its_suffix(folder):
    given = [folder / "no-suffix", folder / "a/.hidden.png", folder / "a/notes.txt"]
    assert find_images(given) == given


def test_paths_keep_the_order_given_and_repeats_are_dropped(folder):
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
def test_patterns_are_expanded_for_shells_that_do_not(folder, pattern, expected):
    assert relative(find_images([folder / pattern]), folder) == expected


def test_a_relative_pattern_starts_at_the_working_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert find_images([Path("b/*.png")]) == [Path("b/1.png")]


def test_a_file_whose_name_looks_like_a_pattern_is_found(tmp_path):
    odd = tmp_path / "holiday [1].jpg"
    odd.touch()
    assert find_images([odd]) == [odd]


def test_a_path_that_does_not_exist_is_named(folder):
    with pytest.raises(InvalidFieldError, match=r"nowhere\.jpg' is neither a file nor a folder"):
        find_images([folder / "b/1.png", folder / "nowhere.jpg"])


def test_a_folder_without_images_is_named_with_the_suffixes_looked_for(folder):
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
    assert found == ["loose.tiff", "a/deep/er/3.webp", "b/1.png", "b/2.JPG", "linked/5.gif"]


def test_each_subfolder_is_a_class_and_its_images_are_sorted(folder):
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


def test_a_folder_that_holds_its_images_directly_is_told_to_sort_them(tmp_path):
    (tmp_path / "1.jpg").touch()
    with pytest.raises(InvalidFieldError, match="holds its images directly; put them into one subfolder per class"):
        find_labelled_images(tmp_path)


def test_a_folder_without_labelled_images_and_a_missing_one_are_refused(tmp_path):
    with pytest.raises(InvalidFieldError, match="has no subfolder with images"):
        find_labelled_images(tmp_path)
    with pytest.raises(InvalidFieldError, match="is not a folder"):
        find_labelled_images(tmp_path / "missing")
