"""A camera trap: a few frames of each animal teach the service, and empty frames are told apart.

    python examples/camera_trap.py [EXAMPLES NEW] [--url URL]

EXAMPLES has a folder of frames for each class, NEW the frames to be classified. Some ten frames of a class are enough
for the service to try its methods on them, by cross-validation, and to answer by the best; with a few it stays with
words. Without folders, frames are made from the photographs beside this file, cut, turned and darkened at random: a
stand-in for a camera in the wood, to see the steps and not an accuracy.
"""

import argparse
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageEnhance, ImageOps

import deixis

NAME = "camera-trap"
STAND_INS = {"cat": "cat", "person": "photographer", "empty": "galaxies"}
FRAMES, HELD_BACK = 12, 4
# The true class is in the set of labels that is told in nine of ten frames.
COVERAGE = 0.9


def make_frames(examples: Path, new: Path) -> None:
    """Write frames that are made from photographs: most of them as examples, the others to be classified."""
    chance = random.Random(0)
    new.mkdir()
    for label, photograph in STAND_INS.items():
        (examples / label).mkdir(parents=True)
        whole = Image.open(Path(__file__).parent / "photos" / f"{photograph}.jpg").convert("RGB")
        for number in range(FRAMES + HELD_BACK):
            width, height = (round(side * chance.uniform(0.6, 0.95)) for side in whole.size)
            left, top = chance.randint(0, whole.width - width), chance.randint(0, whole.height - height)
            frame = whole.crop((left, top, left + width, top + height))
            frame = ImageOps.mirror(frame) if chance.random() < 0.5 else frame
            frame = ImageEnhance.Brightness(frame).enhance(chance.uniform(0.4, 1.1))
            is_example = number < FRAMES
            frame.save(examples / label / f"{number}.jpg" if is_example else new / f"{label}-{number}.jpg")


def frames_in(folder: Path) -> Iterator[Path]:
    """Yield the pictures of a folder."""
    yield from sorted(each for each in folder.rglob("*") if each.suffix.lower() in {".jpg", ".jpeg", ".png"})


def main() -> None:
    """Teach, and classify."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("examples", nargs="?", type=Path)
    parser.add_argument("new", nargs="?", type=Path)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    arguments = parser.parse_args()
    if (arguments.examples is None) != (arguments.new is None):
        parser.error("give both folders, or none")
    with tempfile.TemporaryDirectory() as made, deixis.Client(arguments.url) as client:
        if arguments.examples is None:
            arguments.examples, arguments.new = Path(made) / "examples", Path(made) / "new"
            make_frames(arguments.examples, arguments.new)
        teach_and_classify(client, arguments.examples, arguments.new)


def teach_and_classify(client: deixis.Client, examples: Path, new: Path) -> None:
    """Put the classes and their frames, and tell what the new frames show."""
    folders = sorted(each for each in examples.iterdir() if each.is_dir())
    client.label_sets.put(NAME, [each.name for each in folders])
    for folder in folders:
        frames = list(frames_in(folder))
        for start in range(0, len(frames), 32):
            added = client.examples.add(NAME, frames[start : start + 32], label=folder.name)
            if added.job is not None:
                client.jobs.get(added.job).wait(timeout_s=600, progress=True)
    chosen = client.label_sets.selection(NAME)
    print(f"answered by {chosen.method}: {chosen.reason}")
    for each in client.stream(frames_in(new), label_set=NAME, coverage=COVERAGE, top_k=1):
        result = each.result
        told = result.error.detail if result.error else ", ".join(result.prediction_set or [result.label or "?"])
        print(f"{each.image.name}: {told}")


if __name__ == "__main__":
    main()
