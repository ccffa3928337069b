"""Compare all methods on labelled images, and test whether one is significantly better than zero-shot.

    python examples/compare_methods.py [FOLDER] [--url URL] [--label-set NAME] [--descriptions FILE]

FOLDER has one subfolder of images per class, named after the class. Without it, the program creates frames like
camera_trap.py. FILE is JSON with sentences for each class: {"cat": ["a cat has whiskers", ...]}. Methods that use
descriptions are compared only with this file. Differences of a few points are meaningful only with several hundred
images: look at the intervals.
"""

import argparse
import json
import tempfile
from pathlib import Path

from camera_trap import make_frames

import deixis

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def main() -> None:
    """Print the accuracy of each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--label-set", default="compared")
    parser.add_argument("--descriptions", type=Path)
    arguments = parser.parse_args()
    sentences = json.loads(arguments.descriptions.read_text("utf-8")) if arguments.descriptions else {}
    with tempfile.TemporaryDirectory() as temporary:
        if arguments.folder is None:
            arguments.folder = Path(temporary) / "frames"
            make_frames(arguments.folder, Path(temporary) / "more")
        compare(arguments, sentences)


def compare(arguments: argparse.Namespace, sentences: dict[str, list[str]]) -> None:
    """Store the label set, evaluate all methods on the images, and print the results."""
    images = {
        folder.name.replace("_", " "): [
            file for file in sorted(folder.iterdir()) if file.suffix.lower() in IMAGE_SUFFIXES
        ]
        for folder in sorted(arguments.folder.iterdir())
        if folder.is_dir()
    }
    with deixis.Client(arguments.url, timeout_s=600) as client:
        classes = [{"name": name, "descriptions": sentences.get(name, [])} for name in images]
        label_set = client.label_sets.put(arguments.label_set, classes)
        job = client.label_sets.evaluate(label_set.name, images).wait(progress=True)
    print(f"{label_set.name}@{label_set.version}, {job.result['images']} images in {len(images)} classes")
    rows = sorted(job.result["methods"], key=lambda row: -row["evaluation"]["top1"])
    for row in rows:
        low, high = row["interval"]
        accuracy = row["evaluation"]["top1"]
        print(f"{row['method']:20} {accuracy:.3f}  ({low:.3f} to {high:.3f})  {row['ms_per_image']:.1f} ms")
    for sentence in job.result["verdict"]:
        print(sentence)


if __name__ == "__main__":
    main()
