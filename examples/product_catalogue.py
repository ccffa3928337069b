"""A product catalogue: which shelf does each picture belong on, and which answers should a person look at?

    python examples/product_catalogue.py [FOLDER] [--url URL] > catalogue.csv

The shelves are a label set of the service, so that every program of a company asks for the same ones, and a result can
be traced to a version of them. Synonyms stand for what is sold there. Where the best shelf is not far ahead of the
second, the row says `yes` under `review`.
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
SURE = 0.2  # ahead of the second, as a difference of probabilities
PICTURES = {".jpg", ".jpeg", ".png", ".webp"}


def put_shelves(client: deixis.Client) -> deixis.answers.LabelSet:
    """Return the label set; it has a new version only where the shelves have changed."""
    version = 0  # there must be none yet
    try:
        found = client.label_sets.get("shelves")
    except deixis.ProblemError as error:
        if error.kind != "unknown-name":
            raise
    else:
        if [(each.name, each.synonyms) for each in found.classes] == [tuple(each.values()) for each in SHELVES]:
            return found
        version = found.version
    # Refused if another program was faster, so that neither undoes the other's change.
    return client.label_sets.put("shelves", SHELVES, merge_synonyms="max", version=version)


def main() -> None:
    """Write a row for each picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent / "photos")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    arguments = parser.parse_args()
    files = sorted(each for each in arguments.folder.rglob("*") if each.suffix.lower() in PICTURES)

    with deixis.Client(arguments.url) as client:
        shelves = put_shelves(client)
        out = csv.writer(sys.stdout)
        out.writerow(["file", "shelf", "score", "review", "label_set"])
        for each in client.stream(files, label_set=f"{shelves.name}@{shelves.version}", top_k=2, progress=True):
            name = each.image.relative_to(arguments.folder)
            if each.result.error is not None:
                out.writerow([name, "", "", "yes", each.result.error.detail])
                continue
            best, second = each.result.predictions
            review = "yes" if best.score - second.score < SURE else "no"
            out.writerow([name, best.label, f"{best.score:.3f}", review, f"{shelves.name}@{shelves.version}"])


if __name__ == "__main__":
    main()
