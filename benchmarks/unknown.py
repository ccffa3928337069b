"""Measures how well scores separate images of the labels from images of none of them, without labelled images.

    python -m benchmarks.unknown KNOWN UNKNOWN... [--name outwear=jacket]

KNOWN is a folder with a subfolder of images for each label, and each UNKNOWN a folder of images that show none. For
each score it prints the area under the ROC curve, and the share of unknown images that are accepted if 5 % of the known
ones are rejected (FPR95). ``score`` also has the shares of both that are rejected at its threshold of 0.5, and its
milliseconds per image, one image at a time on one core. Everything uses the embedded model.
"""

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from sklearn.metrics import roc_auc_score

from app.captions.everyday import everyday_groups, everyday_names
from app.encoders._base import Encoder, LoadOptions
from app.encoders.loading import load_encoder
from app.images.decode import decode_image
from app.images.discovery import find_images, find_labelled_images
from app.names.kinds import WordKinds
from app.scoring.calibration import energy, max_concept_matching
from app.scoring.negative_labels import KNOWN_ABOVE, NegativeLabels

_BATCH = 16
_MAX_BYTES, _MAX_PIXELS = 100_000_000, 100_000_000
_TIMED = 200


def _encoded(encoder: Encoder, files: Sequence[Path]) -> np.ndarray:
    rows = []
    for first in range(0, len(files), _BATCH):
        images = [
            decode_image(
                file.read_bytes(), max_bytes=_MAX_BYTES, max_pixels=_MAX_PIXELS, target_px=encoder.image_size_px
            )
            for file in files[first : first + _BATCH]
        ]
        rows.append(encoder.encode_images([encoder.transform(image) for image in images]))
    return np.concatenate(rows)


def _texts(encoder: Encoder, names: Sequence[str]) -> np.ndarray:
    prompts = [f"a photo of a {name}." for name in names]
    return np.concatenate([encoder.encode_texts(prompts[first : first + 256]) for first in range(0, len(prompts), 256)])


def _scores(
    encoder: Encoder, images: np.ndarray, labels: np.ndarray, negatives: NegativeLabels
) -> Mapping[str, np.ndarray]:
    """Return scores that are high for images of the labels."""
    similarities = (images @ labels.T).clip(-1, 1)
    return {
        "score": 1 - negatives.compete(images, similarities, encoder.logit_scale).scores,
        "mcm": max_concept_matching(similarities),
        "energy": -energy(encoder.logit_scale * similarities),
        "best similarity": similarities.max(axis=1),
    }


def _ms_per_image(encoder: Encoder, images: np.ndarray, labels: np.ndarray, negatives: NegativeLabels) -> float:
    similarities = images @ labels.T
    times = []
    for number in range(_TIMED):
        one = slice(number % len(images), number % len(images) + 1)
        started = time.perf_counter()
        negatives.compete(images[one], similarities[one], encoder.logit_scale)
        times.append(time.perf_counter() - started)
    return float(np.median(times)) * 1000


def main() -> None:
    """Encode the images and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("known", type=Path)
    parser.add_argument("unknown", type=Path, nargs="+")
    parser.add_argument("--name", action="append", default=[], help="FOLDER=LABEL, for folders that are no labels")
    arguments = parser.parse_args()
    encoder = load_encoder("embedded", LoadOptions())
    labelled = find_labelled_images(arguments.known)
    names = dict(name.split("=", 1) for name in arguments.name)
    labels = sorted({names.get(folder, folder) for _, folder in labelled})
    words = everyday_names()[::2]  # as the service
    used = np.array(WordKinds(words, everyday_groups()).unrelated(labels))
    negatives = NegativeLabels(words, _texts(encoder, words), used)
    text = _texts(encoder, labels)
    known = _encoded(encoder, [file for file, _ in labelled])
    sys.stdout.write(f"{len(labels)} labels, {len(known)} known images, {len(used)} of {len(words)} words\n")
    sys.stdout.write(f"score: {_ms_per_image(encoder, known, text, negatives):.3f} ms per image\n")
    for folder in arguments.unknown:
        unknown = _encoded(encoder, find_images([folder]))
        sys.stdout.write(f"\n{folder.name}: {len(unknown)} images\n")
        inside, outside = (_scores(encoder, images, text, negatives) for images in (known, unknown))
        for name, values in inside.items():
            truth = np.repeat([1, 0], [len(known), len(unknown)])
            area = roc_auc_score(truth, np.concatenate([values, outside[name]]))
            accepted = np.mean(outside[name] >= np.quantile(values, 0.05))
            rejected = [100 * np.mean(each < KNOWN_ABOVE) for each in (values, outside[name])]
            shares = f"  rejected: known {rejected[0]:.1f} %, unknown {rejected[1]:.1f} %" if name == "score" else ""
            sys.stdout.write(f"  {name:16} AUROC {area:.3f}  FPR95 {accepted:.3f}{shares}\n")


if __name__ == "__main__":
    main()
