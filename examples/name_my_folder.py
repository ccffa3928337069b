"""Find labels for a folder of images without labels: a few labels, so that similar images get the same one.

    python examples/name_my_folder.py [FOLDER] [--url URL] [--database NAME] [--rename]

The labels come from a caption database of the service, by default everyday names, which it builds at its first start.
All images are sent in one request, so there may be at most as many as the service accepts in one. Without --rename, the
program only prints the new file names.
"""

import argparse
import re
import sys
from pathlib import Path

import deixis

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def free_name(path: Path, label: str) -> Path:
    """Return an unused path in the folder of a file, made from its label."""
    stem = re.sub(r"[^\w-]+", "-", label).strip("-") or "image"
    for number in range(1, 10_000):
        name = path.with_name(f"{stem}-{number}{path.suffix.lower()}")
        if name == path or not name.exists():
            return name
    raise FileExistsError(f"all names from {stem}-1 to {stem}-9999 are in use")


def main() -> None:
    """Print the labels, and rename the files with --rename."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent / "photos")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--database", help="a caption database; the default is that of the service")
    parser.add_argument("--rename", action="store_true", help="rename the files")
    arguments = parser.parse_args()
    files = sorted(file for file in arguments.folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        sys.exit(f"there are no images in {arguments.folder}")
    with deixis.Client(arguments.url) as client:
        options = {} if arguments.database is None else {"database": arguments.database}
        try:
            response = client.classify(*files, group=len(files) > 1, **options)
        except deixis.ProblemError as error:
            sys.exit(str(error))
    labels = ", ".join(f"{word.label} ({word.images})" for word in response.vocabulary or [])
    print("labels:", labels or "a single image has no shared labels")
    for file, result in zip(files, response.results, strict=True):
        if result.label is None:
            print(f"{file.name}: {result.error.detail if result.error else 'no label'}")
            continue
        target = free_name(file, result.label)
        print(f"{file.name} -> {target.name}")
        if arguments.rename and target != file:
            file.rename(target)


if __name__ == "__main__":
    main()
