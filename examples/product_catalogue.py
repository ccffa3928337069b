"""Assign product photographs to shelves, and mark uncertain results for review.

    python examples/product_catalogue.py [FOLDER] [--url URL] > catalogue.csv

The shelves are a label set of the service: all programs use the same shelves, and each result names their version. The
synonyms of a shelf are products on it. If the score of the best shelf is close to that of the second, the column
`review` says `yes`.
"""

import argparse
import csv
import sys
from pathlib import Path

import deixis

SHELVES = [
    {"name": "kitchen", "synonyms": ["cup of coffee", "plate", "cooking pot", "spoon"]},
    {"name": "pets", "synonyms": ["cat", "dog", "aquarium"]},
    {"name": "space and science", "synonyms": ["rocket", "astronaut", "galaxies", "telescope"]},
    {"name": "cameras", "synonyms": ["photographer with a camera", "camera", "tripod"]},
]
MIN_MARGIN = 0.2  # between the scores of the best and the second label
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def put_shelves(client: deixis.Client) -> deixis.answers.LabelSet:
    """Return the label set. Create a new version only if the shelves have changed."""
    version = 0  # the label set must not exist
    try:
        existing = client.label_sets.get("shelves")
    except deixis.ProblemError as error:
        if error.kind != "unknown-name":
            raise
    else:
        if [(shelf.name, shelf.synonyms) for shelf in existing.classes] == [tuple(shelf.values()) for shelf in SHELVES]:
            return existing
        version = existing.version
    # The service refuses the change if another program has changed the label set in the meantime.
    return client.label_sets.put("shelves", SHELVES, merge_synonyms="max", version=version)


def main() -> None:
    """Write one CSV row per image."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent / "photos")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    arguments = parser.parse_args()
    files = sorted(file for file in arguments.folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)

    with deixis.Client(arguments.url) as client:
        shelves = put_shelves(client)
        out = csv.writer(sys.stdout)
        out.writerow(["file", "shelf", "score", "review", "label_set"])
        for item in client.stream(files, label_set=f"{shelves.name}@{shelves.version}", top_k=2, progress=True):
            name = item.image.relative_to(arguments.folder)
            if item.result.error is not None:
                out.writerow([name, "", "", "yes", item.result.error.detail])
                continue
            best, second = item.result.predictions
            review = "yes" if best.score - second.score < MIN_MARGIN else "no"
            out.writerow([name, best.label, f"{best.score:.3f}", review, f"{shelves.name}@{shelves.version}"])


if __name__ == "__main__":
    main()
