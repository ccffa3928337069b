"""Measures conformal coverage and calibration error on random splits of labelled images.

    python -m benchmarks.coverage FOLDER --support FOLDER [--splits 20] [--shots 16] [--name SUBFOLDER=CLASS]...

Folders have one subfolder per class. In each split, half of the images of FOLDER calibrates zero-shot. Random images of
each class from --support train and calibrate the methods that learn from examples, by cross-validation as in the
service. The other half of FOLDER is the test set.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from app.adapters._base import Examples
from app.adapters._examples import Need
from app.classification.methods import METHODS
from app.cli.common import read_subfolder_names
from app.encoders._base import Encoder, LoadOptions
from app.encoders.loading import load_encoder
from app.fewshot.fitting import fit, predict, predict_held_out
from app.images.decode import decode_image
from app.images.discovery import find_labelled_images
from app.scoring.calibration import Calibration, calibrate, prediction_sets
from app.scoring.measures import expected_calibration_error
from app.scoring.numerics import stratified_folds, tempered_softmax

_COVERAGES = (0.9, 0.95)
_BATCH = 32


def encode(encoder: Encoder, files: Sequence[Path]) -> np.ndarray:
    """Return the features (n, d) of image files."""
    rows = []
    for first in range(0, len(files), _BATCH):
        pixels = [
            encoder.transform(
                decode_image(file.read_bytes(), max_bytes=2**26, max_pixels=10**8, target_px=encoder.image_size_px)
            )
            for file in files[first : first + _BATCH]
        ]
        rows.append(encoder.begin_images(pixels)())
    return np.concatenate(rows)


def measures(calibration: Calibration, logits: np.ndarray, truth: np.ndarray) -> list[float]:
    """Return the calibration errors before and after calibration, and the coverage and mean set size per target."""
    before, after = tempered_softmax(logits, 1.0), calibration.probabilities(logits)
    figures = [expected_calibration_error(before, truth), expected_calibration_error(after, truth)]
    for coverage in _COVERAGES:
        sets = prediction_sets(after, calibration.set_quantile(coverage))
        figures += [
            float(np.mean([label in labels for label, labels in zip(truth, sets, strict=True)])),
            float(np.mean([len(labels) for labels in sets])),
        ]
    return figures


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--support", type=Path, required=True)
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--name", action="append", default=[])
    arguments = parser.parse_args()
    test_images, support = find_labelled_images(arguments.folder), find_labelled_images(arguments.support)
    renamed = read_subfolder_names(arguments.name, {subfolder for _, subfolder in [*test_images, *support]})
    names = sorted(set(renamed.values()))
    encoder = load_encoder(arguments.model, LoadOptions())
    features = encode(encoder, [file for file, _ in test_images])
    truth = np.array([names.index(renamed[subfolder]) for _, subfolder in test_images])
    support_features = encode(encoder, [file for file, _ in support])
    support_truth = np.array([names.index(renamed[subfolder]) for _, subfolder in support])
    text = encoder.encode_texts([f"a photo of a {name}." for name in names])
    zero_shot = encoder.logit_scale * features @ text.T + (encoder.logit_bias or 0)
    rng = np.random.default_rng(0)
    found: dict[str, list[list[float]]] = {}
    for _ in range(arguments.splits):
        order = rng.permutation(len(truth))
        calibration_rows, test_rows = order[: len(order) // 2], order[len(order) // 2 :]
        found.setdefault("zero-shot", []).append(
            measures(
                calibrate(zero_shot[calibration_rows], truth[calibration_rows]), zero_shot[test_rows], truth[test_rows]
            )
        )
        drawn = np.concatenate(
            [rng.permutation(np.flatnonzero(support_truth == label))[: arguments.shots] for label in range(len(names))]
        )
        examples = Examples(support_features[drawn], support_truth[drawn])
        folds = stratified_folds(examples.support_labels, 5)
        for name, method in METHODS.items():
            if Need.SUPPORT not in method.learns:
                continue
            make = partial(method.example_adapter, dict(method.read_options({})))
            held_out = predict_held_out(make, text, examples, folds, encoder)
            calibration = calibrate(held_out.logits, examples.support_labels)
            logits = predict(fit(make(), text, examples, encoder), features[test_rows]).logits
            found.setdefault(name, []).append(measures(calibration, logits, truth[test_rows]))
    columns = [
        "ECE before",
        "after",
        *(f"{measure} at {target}" for target in _COVERAGES for measure in ("coverage", "labels in a set")),
    ]
    sys.stdout.write(f"| method | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}\n")
    for name, rows in found.items():
        means, deviations = np.mean(rows, axis=0), np.std(rows, axis=0, ddof=1)
        cells = [f"{mean:.3f} ± {deviation:.3f}" for mean, deviation in zip(means, deviations, strict=True)]
        sys.stdout.write(f"| {name} | {' | '.join(cells)} |\n")


if __name__ == "__main__":
    main()
