"""Compare methods on labelled pictures of your own: which one, and is it better than plain words beyond chance?

    python examples/compare_methods.py [FOLDER] [--url URL] [--label-set NAME] [--descriptions FILE]

FOLDER has a folder of pictures for each class, named after it; without one, frames are made as camera_trap.py makes
them. FILE is JSON with sentences for each class,
{"cat": ["a cat has whiskers", ...]}; methods that use descriptions are compared only where there are some. Some hundred
pictures are needed for differences of a few points to mean anything: look at the intervals.
"""

import argparse
import json
import tempfile
from pathlib import Path

from camera_trap import make_frames

import deixis

PICTURES = {".jpg", ".jpeg", ".png", ".webp"}


def main() -> None:
    """Print the leaderboard."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--label-set", default="compared")
    parser.add_argument("--descriptions", type=Path)
    arguments = parser.parse_args()
    sentences = json.loads(arguments.descriptions.read_text("utf-8")) if arguments.descriptions else {}
    with tempfile.TemporaryDirectory() as made:
        if arguments.folder is None:
            arguments.folder = Path(made) / "frames"
            make_frames(arguments.folder, Path(made) / "more")
        compare(arguments, sentences)


def compare(arguments: argparse.Namespace, sentences: dict[str, list[str]]) -> None:
    """Put the classes, have every method tried, and print what came of it."""
    images = {
        folder.name.replace("_", " "): [each for each in sorted(folder.iterdir()) if each.suffix.lower() in PICTURES]
        for folder in sorted(arguments.folder.iterdir())
        if folder.is_dir()
    }
    with deixis.Client(arguments.url, timeout_s=600) as client:
        classes = [{"name": name, "descriptions": sentences.get(name, [])} for name in images]
        made = client.label_sets.put(arguments.label_set, classes)
        job = client.label_sets.evaluate(made.name, images).wait(progress=True)
    print(f"{made.name}@{made.version}, {job.result['images']} pictures in {len(images)} classes")
    rows = sorted(job.result["methods"], key=lambda row: -row["evaluation"]["top1"])
    for row in rows:
        low, high = row["interval"]
        accuracy = row["evaluation"]["top1"]
        print(f"{row['method']:20} {accuracy:.3f}  ({low:.3f} to {high:.3f})  {row['ms_per_image']:.1f} ms")
    for sentence in job.result["verdict"]:
        print(sentence)


if __name__ == "__main__":
    main()
