"""Moderation: does a picture show what a site does not want, something harmless, or none of these?

    python examples/moderation.py [FOLDER] [--url URL]

Two lists of words: what is not wanted, and what most pictures show. The harmless words matter: with the unwanted alone,
every picture would have to be one of them. A picture is blocked where the unwanted words together are likely, let
through where they are not, and shown to a person where nothing fits, or where it is a close thing.
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
    "a building",
    "the night sky",
]
BLOCK_ABOVE, PASS_BELOW = 0.7, 0.3
# Below this best score the picture is none of these.
NONE_OF_THESE = 0.3
PICTURES = {".jpg", ".jpeg", ".png", ".webp"}


def decide(result: deixis.ImageResult) -> tuple[str, str]:
    """Return what to do with a picture, and why."""
    if result.error is not None:
        return "review", result.error.title
    if result.rejected:
        return "review", "none of these"
    unwanted = [each for each in result.predictions if each.label in UNWANTED]
    likely = sum(each.score for each in unwanted)
    if likely > BLOCK_ABOVE:
        return "block", f"{unwanted[0].label}, {likely:.2f}"
    if likely < PASS_BELOW:
        return "pass", f"{result.predictions[0].label}, unwanted {likely:.2f}"
    return "review", f"perhaps {unwanted[0].label}, {likely:.2f}"


def main() -> None:
    """Tell the decision about each picture; ends with status 1 where one is blocked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent / "photos")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    arguments = parser.parse_args()
    files = sorted(each for each in arguments.folder.rglob("*") if each.suffix.lower() in PICTURES)
    labels = [*UNWANTED, *HARMLESS]
    blocked = 0
    with deixis.Client(arguments.url) as client:
        for each in client.stream(files, labels=labels, top_k=len(labels), reject_below=NONE_OF_THESE, template="{}"):
            decision, reason = decide(each.result)
            blocked += decision == "block"
            print(f"{decision:7} {each.image.relative_to(arguments.folder)}  ({reason})")
    sys.exit(blocked > 0)


if __name__ == "__main__":
    main()
