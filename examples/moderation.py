"""Content moderation: block, pass or review each image.

    python examples/moderation.py [FOLDER] [--url URL]

The labels are two lists: unwanted and harmless content. The harmless labels are necessary: with unwanted labels only,
every image would get one of them. They include what resembles unwanted content, as a camera resembles a gun. An image
is blocked if the unwanted labels together have a high probability, and passes if they have a low one. A person reviews
the images between, and those that fit no label.
"""

import argparse
import sys
from pathlib import Path

import deixis

UNWANTED = ["a cigarette", "a glass of alcohol", "a gun", "a knife", "blood"]
HARMLESS = [
    "a cat",
    "a dog",
    "a person",
    "an astronaut",
    "a landscape",
    "food",
    "a cup of coffee",
    "a camera",
    "a building",
    "the night sky",
]
BLOCK_ABOVE, PASS_BELOW = 0.7, 0.3
# An image whose best score is lower fits no label.
REJECT_BELOW = 0.3
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def decide(result: deixis.ImageResult) -> tuple[str, str]:
    """Return the decision about an image, and the reason."""
    if result.error is not None:
        return "review", result.error.title
    if result.rejected:
        return "review", "none of the labels"
    unwanted = [prediction for prediction in result.predictions if prediction.label in UNWANTED]
    score = sum(prediction.score for prediction in unwanted)
    if score > BLOCK_ABOVE:
        return "block", f"{unwanted[0].label}, {score:.2f}"
    if score < PASS_BELOW:
        return "pass", f"{result.predictions[0].label}, unwanted {score:.2f}"
    return "review", f"perhaps {unwanted[0].label}, {score:.2f}"


def main() -> None:
    """Print the decision about each image. The exit status is 1 if an image is blocked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent / "photos")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    arguments = parser.parse_args()
    files = sorted(file for file in arguments.folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    labels = [*UNWANTED, *HARMLESS]
    blocked = 0
    with deixis.Client(arguments.url) as client:
        for item in client.stream(files, labels=labels, top_k=len(labels), reject_below=REJECT_BELOW, template="{}"):
            decision, reason = decide(item.result)
            blocked += decision == "block"
            print(f"{decision:7} {item.image.relative_to(arguments.folder)}  ({reason})")
    sys.exit(blocked > 0)


if __name__ == "__main__":
    main()
