"""Name a folder of pictures without labels: few names, so that what belongs together is called the same.

    python examples/name_my_folder.py [FOLDER] [--url URL] [--database NAME] [--rename]

Names come from a caption database of the service; by default WordNet, which it builds at its first start. Up to as many
pictures as a request may have are named together. Without --rename it only tells what it would do.
"""

import argparse
import re
import sys
from pathlib import Path

import deixis

PICTURES = {".jpg", ".jpeg", ".png", ".webp"}


def free_name(path: Path, label: str) -> Path:
    """Return a path beside a file that tells its label, and that no other file has."""
    stem = re.sub(r"[^\w-]+", "-", label).strip("-") or "picture"
    for number in range(1, 10_000):
        name = path.with_name(f"{stem}-{number}{path.suffix.lower()}")
        if name == path or not name.exists():
            return name
    raise FileExistsError(f"there are 10,000 files called {stem} already")


def main() -> None:
    """Tell the names, and give them to the files where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent / "photos")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--database", help="a caption database; by default the service's")
    parser.add_argument("--rename", action="store_true", help="rename the files")
    arguments = parser.parse_args()
    files = sorted(each for each in arguments.folder.iterdir() if each.suffix.lower() in PICTURES)
    if not files:
        sys.exit(f"there are no pictures in {arguments.folder}")
    with deixis.Client(arguments.url) as client:
        question = {} if arguments.database is None else {"database": arguments.database}
        try:
            answer = client.classify(*files, group=len(files) > 1, **question)
        except deixis.ProblemError as error:
            sys.exit(str(error))
    print("names:", ", ".join(f"{each.label} ({each.images})" for each in answer.vocabulary or []) or "one picture")
    for file, result in zip(files, answer.results, strict=True):
        if result.label is None:
            print(f"{file.name}: {result.error.detail if result.error else 'no name'}")
            continue
        target = free_name(file, result.label)
        print(f"{file.name} -> {target.name}")
        if arguments.rename and target != file:
            file.rename(target)


if __name__ == "__main__":
    main()
