"""Compares scores for images with several labels on composites of photographs, and measures their time.

    python -m benchmarks.multi_label FOLDER --pool FOLDER [--composites 400] [--name SUBFOLDER=CLASS]...

Folders have one subfolder per class. Two photographs of different classes are put side by side, or are overlaid, and
four are tiled; twelve photographs of anything stand for images of none of the labels. Composites of --pool serve as
unlabelled images. Each table has the average precision per label (mean over the labels, mAP) and over all pairs of
image and label, and the precision, recall and F1 of the labels at the threshold that is given.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import skimage.data
import sklearn.datasets
from PIL import Image, ImageOps

from app.captions.everyday import everyday_names
from app.cli.common import read_subfolder_names
from app.encoders._base import Encoder, LoadOptions
from app.encoders.loading import load_encoder
from app.images.discovery import find_labelled_images
from app.scoring.multi_label import RELATED_WORDS, independent_logits
from app.scoring.numerics import softmax

_SIDE = 288
_BATCH = 32
_WORD_STEP = 6
_ABSENT = (
    *("dog", "cat", "horse", "cow", "sheep", "elephant", "lion", "tiger"),
    *("bear", "rabbit", "mouse", "bird", "fish", "frog", "snake"),
)
_KINDS = ("two", "four", "overlay")


def composite(files: Sequence[Path], kind: str) -> Image.Image:
    """Return one image made of two or four photographs."""
    half = _SIDE // 2
    size = {"two": (half, _SIDE), "four": (half, half), "overlay": (_SIDE, _SIDE)}[kind]
    parts = [ImageOps.fit(Image.open(file).convert("RGB"), size) for file in files]
    if kind == "overlay":
        return Image.blend(*parts, 0.5)
    made = Image.new("RGB", (_SIDE, _SIDE))
    for number, part in enumerate(parts):
        made.paste(part, (number % 2 * half, number // 2 * half))
    return made


def encode(encoder: Encoder, images: Sequence[Image.Image]) -> np.ndarray:
    """Return the features (n, d)."""
    pixels = [encoder.transform(image) for image in images]
    return np.concatenate(
        [encoder.begin_images(pixels[first : first + _BATCH])() for first in range(0, len(pixels), _BATCH)]
    )


def composites(
    encoder: Encoder, files: Mapping[int, Sequence[Path]], count: int, draw: random.Random
) -> tuple[np.ndarray, np.ndarray]:
    """Return the features (n, d) and the labels (n, c) of ``count`` composites of each kind."""
    images, truth = [], []
    for kind in _KINDS:
        for _ in range(count):
            chosen = draw.sample(sorted(files), 4 if kind == "four" else 2)
            images.append(composite([draw.choice(files[index]) for index in chosen], kind))
            truth.append([index in chosen for index in sorted(files)])
    return encode(encoder, images), np.array(truth)


def average_precision(truth: np.ndarray, scores: np.ndarray) -> float:
    """Return the mean precision at the rank of each positive."""
    ordered = truth[np.argsort(-scores, kind="stable")]
    return float((np.cumsum(ordered) / np.arange(1, len(ordered) + 1))[ordered].mean())


def row(name: str, truth: np.ndarray, scores: np.ndarray, thresholds: float | np.ndarray | None = None) -> str:
    """Return a row of the table, with the measures of the labels at the thresholds if there are some."""
    used = [index for index in range(truth.shape[1]) if truth[:, index].any()]
    macro = statistics.mean(average_precision(truth[:, index], scores[:, index]) for index in used)
    cells = [f"{macro:.3f}", f"{average_precision(truth.ravel(), scores.ravel()):.3f}"]
    if thresholds is not None:
        above = scores >= thresholds
        hits = (truth & above).sum()
        precision, recall = hits / max(above.sum(), 1), hits / truth.sum()
        f1 = 2 * hits / (above.sum() + truth.sum())
        cells += [f"{value:.2f}" for value in (precision, recall, f1, above.sum(axis=1).mean())]
    return f"| {' | '.join([name, *cells, *[''] * (6 - len(cells))])} |"


def table(
    encoder: Encoder, names: Sequence[str], features: np.ndarray, truth: np.ndarray, pool: np.ndarray
) -> list[str]:
    """Return the rows of all variants."""

    def texts(template: str) -> np.ndarray:
        return encoder.encode_texts([template.format(name) for name in names])

    def standard(values: np.ndarray, axis: int) -> np.ndarray:
        means, deviations = values.mean(axis=axis, keepdims=True), values.std(axis=axis, keepdims=True)
        return (values - means) / deviations

    text, words = texts("a photo of a {}."), encode_words(encoder)
    cosines, of_pool, scale = features @ text.T, pool @ text.T, encoder.logit_scale
    with_pool = (cosines - of_pool.mean(axis=0)) / of_pool.std(axis=0)
    pool_scores = independent_logits(of_pool, pool @ words.T)
    against_words = independent_logits(cosines, features @ words.T)
    absence = features @ encoder.encode_texts(["a photo."]).T
    floor = np.maximum(np.quantile(pool_scores, 0.6, axis=0), 0)
    return [
        row("softmax over the labels; above 1/c", truth, softmax(scale * cosines), 1 / len(names)),
        row("cosine", truth, cosines),
        row("cosine less that of *a photo.*; above 0", truth, cosines - absence, 0),
        row("cosine less that of *a photo without a {}.*; above 0", truth,
            cosines - features @ texts("a photo without a {}.").T, 0),
        row("standardised over the labels of the image (SPARC)", truth, standard(cosines, 1)),
        row("standardised over unlabelled images; above their 0.7 quantile", truth, with_pool,
            np.quantile((of_pool - of_pool.mean(axis=0)) / of_pool.std(axis=0), 0.7, axis=0)),
        row("both, one after the other", truth, standard(with_pool, 1)),
        row("less the mean over unlabelled images", truth, cosines - of_pool.mean(axis=0)),
        row(f"**less the {1 - RELATED_WORDS:.2f} quantile of words; above 0**", truth, against_words, 0),
        row("the same; above 0 and the 0.6 quantile of unlabelled images", truth, against_words, floor),
    ]  # fmt: skip


def encode_words(encoder: Encoder) -> np.ndarray:
    """Return the features of the words that labels are compared with."""
    return encoder.encode_texts([f"a photo of a {word}." for word in everyday_names()[::_WORD_STEP]])


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="+")
    parser.add_argument("--pool", type=Path, required=True)
    parser.add_argument("--composites", type=int, default=400, help="of each kind")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--name", action="append", default=[])
    arguments = parser.parse_args()
    encoder, draw = load_encoder(arguments.model, LoadOptions()), random.Random(0)
    tests = [pair for folder in arguments.folder for pair in find_labelled_images(folder)]
    renamed = read_subfolder_names(arguments.name, {subfolder for _, subfolder in tests})
    names = sorted(set(renamed.values()))

    def by_class(pairs: Sequence[tuple[Path, str]]) -> dict[int, list[Path]]:
        return {
            index: [file for file, subfolder in pairs if renamed[subfolder] == name] for index, name in enumerate(names)
        }

    features, truth = composites(encoder, by_class(tests), arguments.composites, draw)
    pool, _ = composites(encoder, by_class(find_labelled_images(arguments.pool)), arguments.composites // 2, draw)
    neutral = [skimage.data.chelsea(), skimage.data.coffee(), skimage.data.rocket(), skimage.data.astronaut()]
    neutral += sklearn.datasets.load_sample_images().images
    none = encode(encoder, [Image.fromarray(pixels) for pixels in neutral] * 2)
    features = np.concatenate([features, none])
    truth = np.concatenate([truth, np.zeros((len(none), len(names)), bool)])
    lines = []
    for labels in (names, [*names, *_ABSENT]):
        lines += [f"\n{len(features)} images, {len(labels)} labels, {len(names)} of them in images\n"]
        lines += ["| scores | mAP | micro AP | precision | recall | F1 | labels per image |", f"|{'---|' * 7}"]
        wide = np.pad(truth, ((0, 0), (0, len(labels) - len(names))))
        lines += table(encoder, labels, features, wide, pool)
    words, one = encode_words(encoder), features[:1]
    logits = one @ encoder.encode_texts(names).T
    times = []
    for _ in range(1000):
        began = time.perf_counter()
        independent_logits(logits, one @ words.T)
        times.append(time.perf_counter() - began)
    lines.append(f"\n{statistics.median(times) * 1e6:.0f} microseconds for one image and {len(words)} words")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
