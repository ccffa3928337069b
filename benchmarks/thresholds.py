"""Measures thresholds and calibration per label on composites of labelled photographs.

    python -m benchmarks.thresholds FOLDER --support FOLDER [--images 400] [--draws 20] [--name SUBFOLDER=CLASS]...

Folders have one subfolder per class. A composite has one photograph, two tiled or overlaid ones, or four tiled ones, of
different classes; it has the labels of all of them. Composites of --support fit the thresholds, and composites of
FOLDER are the test images.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from app.captions.everyday import everyday_names
from app.cli.common import read_subfolder_names
from app.encoders._base import Encoder, LoadOptions
from app.encoders.loading import load_encoder
from app.images.decode import decode_image
from app.images.discovery import find_labelled_images
from app.scoring.multi_label import independent_logits
from app.scoring.multi_label_measures import MultiLabelEvaluation, evaluate_labels
from app.scoring.numerics import softmax
from app.scoring.thresholds import PlattScaling, Thresholds, fit_platt, fit_scalings, fit_thresholds

_SIZE_PX = 224
_WORD_STEP = 6  # as in app/main.py
_BATCH = 32
_SIZES = (20, 50, 100, 200, 400)


def composite(photographs: Sequence[Image.Image], *, overlaid: bool) -> Image.Image:
    """Return one, two or four photographs in one picture."""
    if overlaid:
        whole = [photograph.resize((_SIZE_PX, _SIZE_PX)) for photograph in photographs]
        return Image.blend(whole[0], whole[1], 0.5)
    columns, rows = {1: (1, 1), 2: (2, 1), 4: (2, 2)}[len(photographs)]
    width, height = _SIZE_PX // columns, _SIZE_PX // rows
    picture = Image.new("RGB", (_SIZE_PX, _SIZE_PX))
    for number, photograph in enumerate(photographs):
        side = min(photograph.size[0] / width, photograph.size[1] / height)
        left = int((photograph.size[0] - side * width) / 2)
        top = int((photograph.size[1] - side * height) / 2)
        box = (left, top, left + int(side * width), top + int(side * height))
        tile = photograph.resize((width, height), box=box)
        picture.paste(tile, (number % columns * width, number // columns * height))
    return picture


def composites(
    images: Sequence[tuple[Path, int]], classes: int, count: int, rng: np.random.Generator
) -> tuple[list[bytes], np.ndarray]:
    """Return ``count`` composites as PNG files, and whether each has each label (count, classes)."""
    by_class = [[file for file, label in images if label == index] for index in range(classes)]
    files, is_label = [], np.zeros((count, classes), bool)
    for number in range(count):
        kind = number % 4  # one, two tiled, two overlaid, four tiled
        labels = rng.permutation(classes)[: (1, 2, 2, 4)[kind]]
        is_label[number, labels] = True
        chosen = [Image.open(by_class[label][rng.integers(len(by_class[label]))]).convert("RGB") for label in labels]
        file = BytesIO()
        composite(chosen, overlaid=kind == 2).save(file, "PNG")
        files.append(file.getvalue())
    return files, is_label


def encode(encoder: Encoder, files: Sequence[bytes]) -> np.ndarray:
    """Return the features (n, d) of image files."""
    rows = []
    for first in range(0, len(files), _BATCH):
        pixels = [
            encoder.transform(decode_image(file, max_bytes=2**26, max_pixels=10**8, target_px=encoder.image_size_px))
            for file in files[first : first + _BATCH]
        ]
        rows.append(encoder.begin_images(pixels)())
    return np.concatenate(rows)


def main() -> None:
    """Measure, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--support", type=Path, required=True)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--name", action="append", default=[])
    parser.add_argument("--features", type=Path, help="File to keep the features in between runs.")
    arguments = parser.parse_args()
    test_images, support = find_labelled_images(arguments.folder), find_labelled_images(arguments.support)
    renamed = read_subfolder_names(arguments.name, {subfolder for _, subfolder in [*test_images, *support]})
    names = sorted(set(renamed.values()))
    encoder = load_encoder(arguments.model, LoadOptions())
    if arguments.features is not None and arguments.features.exists():
        kept = np.load(arguments.features)
    else:
        rng = np.random.default_rng(0)
        kept = {}
        for split, images in (("fit", support), ("test", test_images)):
            indexed = [(file, names.index(renamed[subfolder])) for file, subfolder in images]
            files, kept[f"{split}_labels"] = composites(indexed, len(names), arguments.images, rng)
            kept[f"{split}_features"] = encode(encoder, files)
        if arguments.features is not None:
            np.savez(arguments.features, **kept)
    text = encoder.encode_texts([f"a photo of a {name}." for name in names])
    words = encoder.encode_texts([f"a photo of a {word}." for word in everyday_names()[::_WORD_STEP]])
    truth = {split: kept[f"{split}_labels"] for split in ("fit", "test")}
    logits = {split: encoder.logit_scale * kept[f"{split}_features"] @ text.T for split in ("fit", "test")}
    word_logits = {split: encoder.logit_scale * kept[f"{split}_features"] @ words.T for split in ("fit", "test")}
    for title, score in _SCORES.items():
        sys.stdout.write(f"\n{title}\n\n")
        fit, test = (score(logits[split], word_logits[split]) for split in ("fit", "test"))
        _compare(names, fit, truth["fit"], test, truth["test"], arguments.draws)


def _independent(logits: np.ndarray, word_logits: np.ndarray) -> np.ndarray:
    chances: np.ndarray = 1 / (1 + np.exp(-independent_logits(logits, word_logits).astype(np.float64)))
    return chances


_SCORES: Mapping[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "softmax": lambda logits, _: softmax(logits.astype(np.float64)),
    "independent, as in requests with multi_label": _independent,
}


def _compare(
    names: Sequence[str], fit: np.ndarray, fit_truth: np.ndarray, test: np.ndarray, truth: np.ndarray, draws: int
) -> None:
    halves = np.full(len(names), 0.5)
    whole = evaluate_labels(names, test, truth, halves)
    sys.stdout.write(
        f"mAP {whole.mean_average_precision:.3f}, micro AP {whole.micro_average_precision:.3f},"
        f" at 0.5: micro F1 {whole.micro_f1:.3f}, macro F1 {whole.macro_f1:.3f}\n\n"
        "| images | shared: micro F1 | macro F1 | per label: micro F1 | macro F1 | each alone: micro F1 | macro F1"
        " | log loss: none | one Platt | per label |\n|---|---|---|---|---|---|---|---|---|---|\n"
    )
    rng = np.random.default_rng(1)
    for size in _SIZES:
        figures = []
        for _ in range(draws):
            drawn = rng.permutation(len(fit))[:size]
            some, some_truth = fit[drawn], fit_truth[drawn]
            fitted = fit_thresholds(some, some_truth)
            alone = fit_thresholds(some, some_truth, shared_images=0)
            results = [
                evaluate_labels(names, test, truth, chosen.filled(0.5))
                for chosen in (Thresholds((None,) * len(names), fitted.reasons, fitted.shared), fitted, alone)
            ]
            figures.append(
                [value for result in results for value in _f1s(result)] + _losses(some, some_truth, test, truth)
            )
        means = np.mean(figures, axis=0)
        errors = np.std(figures, axis=0, ddof=1)
        cells = " | ".join(f"{mean:.3f} ± {error:.3f}" for mean, error in zip(means, errors, strict=True))
        sys.stdout.write(f"| {size} | {cells} |\n")


def _f1s(result: MultiLabelEvaluation) -> tuple[float, float]:
    return result.micro_f1, result.macro_f1


def _losses(fit: np.ndarray, fit_truth: np.ndarray, test: np.ndarray, truth: np.ndarray) -> list[float]:
    """Return the log loss per image and label without calibration, with one Platt scaling, and with one per label."""

    def loss(chances: np.ndarray) -> float:
        clipped = chances.clip(1e-6, 1 - 1e-6)
        return float(-np.where(truth, np.log(clipped), np.log(1 - clipped)).mean())

    def scaled(scalings: Sequence[PlattScaling]) -> np.ndarray:
        return np.stack([each.probabilities(column) for each, column in zip(scalings, logit(test).T, strict=True)], 1)

    def logit(scores: np.ndarray) -> np.ndarray:
        clipped = scores.clip(1e-9, 1 - 1e-9)
        odds: np.ndarray = np.log(clipped) - np.log1p(-clipped)
        return odds

    shared = fit_platt(logit(fit).reshape(-1), fit_truth.reshape(-1))
    return [loss(test), loss(scaled([shared] * test.shape[1])), loss(scaled(fit_scalings(logit(fit), fit_truth)))]


if __name__ == "__main__":
    main()
