"""A camera trap: learn from a few frames of each animal, and recognise empty frames.

    python examples/camera_trap.py [EXAMPLES NEW] [--url URL]

EXAMPLES has one subfolder of frames per class, and NEW the frames to classify. With about ten frames of each class, the
service cross-validates its methods and uses the best one if its gain is significant; otherwise it uses zero-shot.
Without folders, the program creates frames from the photographs beside this file by random crops, flips and brightness.
They show the steps, not a realistic accuracy.
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
EXAMPLE_FRAMES, NEW_FRAMES = 12, 4
# Probability that the prediction set of a frame contains its true class.
COVERAGE = 0.9


def make_frames(examples: Path, new: Path) -> None:
    """Create frames from photographs: most of them as examples, the others to classify."""
    rng = random.Random(0)
    new.mkdir()
    for label, photograph in STAND_INS.items():
        (examples / label).mkdir(parents=True)
        photo = Image.open(Path(__file__).parent / "photos" / f"{photograph}.jpg").convert("RGB")
        for number in range(EXAMPLE_FRAMES + NEW_FRAMES):
            width, height = (round(side * rng.uniform(0.6, 0.95)) for side in photo.size)
            left, top = rng.randint(0, photo.width - width), rng.randint(0, photo.height - height)
            frame = photo.crop((left, top, left + width, top + height))
            frame = ImageOps.mirror(frame) if rng.random() < 0.5 else frame
            frame = ImageEnhance.Brightness(frame).enhance(rng.uniform(0.4, 1.1))
            is_example = number < EXAMPLE_FRAMES
            frame.save(examples / label / f"{number}.jpg" if is_example else new / f"{label}-{number}.jpg")


def frames_in(folder: Path) -> Iterator[Path]:
    """Yield the images of a folder."""
    yield from sorted(file for file in folder.rglob("*") if file.suffix.lower() in {".jpg", ".jpeg", ".png"})


def main() -> None:
    """Learn from the example frames, and classify the new ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("examples", nargs="?", type=Path)
    parser.add_argument("new", nargs="?", type=Path)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    arguments = parser.parse_args()
    if (arguments.examples is None) != (arguments.new is None):
        parser.error("give both folders, or none")
    with tempfile.TemporaryDirectory() as temporary, deixis.Client(arguments.url) as client:
        if arguments.examples is None:
            arguments.examples, arguments.new = Path(temporary) / "examples", Path(temporary) / "new"
            make_frames(arguments.examples, arguments.new)
        learn_and_classify(client, arguments.examples, arguments.new)


def learn_and_classify(client: deixis.Client, examples: Path, new: Path) -> None:
    """Store the label set and its example frames, and print the prediction set of each new frame."""
    folders = sorted(folder for folder in examples.iterdir() if folder.is_dir())
    client.label_sets.put(NAME, [folder.name for folder in folders])
    for folder in folders:
        frames = list(frames_in(folder))
        for start in range(0, len(frames), 32):
            added = client.examples.add(NAME, frames[start : start + 32], label=folder.name)
            if added.job is not None:
                client.jobs.get(added.job).wait(timeout_s=600, progress=True)
    selection = client.label_sets.selection(NAME)
    print(f"selected method: {selection.method} ({selection.reason})")
    for item in client.stream(frames_in(new), label_set=NAME, coverage=COVERAGE, top_k=1):
        result = item.result
        text = result.error.detail if result.error else ", ".join(result.prediction_set or [result.label or "?"])
        print(f"{item.image.name}: {text}")


if __name__ == "__main__":
    main()
