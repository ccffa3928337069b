"""`--image-labels`: the images of a folder with the labels that a file gives them."""

from pathlib import Path

from app.cli.common import clean_classname, warn
from app.errors import InvalidFieldError
from app.images.discovery import OnUnreadable, images_below
from app.images.label_files import read_label_file
from app.names.text import nfc
from app.runtime.file_names import file_text


def find_images_of_file(folder: Path, label_file: Path, unreadable: OnUnreadable) -> list[tuple[Path, tuple[str, ...]]]:
    """Return the images of a folder that ``--image-labels`` names, with their labels, sorted by path.

    Prints the numbers of images that the file does not name, and of those that the folder does not have.

    Raises:
        InvalidFieldError: the file has no labels of images, or none of its images is in the folder.
    """
    labels_of = read_label_file(label_file)
    found = {
        nfc(file_text(file.relative_to(folder).as_posix())): file for file in sorted(images_below(folder, unreadable))
    }
    named = [(file, tuple(map(clean_classname, labels_of[path]))) for path, file in found.items() if path in labels_of]
    if not named:
        first = next(iter(labels_of))
        problem = f"names {len(labels_of):,} images, the first is '{first}', and none of them is in '{folder}'"
        raise InvalidFieldError.of("--image-labels", f"{problem}; paths must be relative to that folder")
    if missing := len(labels_of) - len(named):
        warn("missing", f"{missing:,} of the {len(labels_of):,} images of {label_file} are not in {folder}")
    if unnamed := len(found) - len(named):
        warn("ignored", f"{unnamed:,} images of {folder} are not in {label_file}")
    return named
