"""Results as HTML for notebooks: thumbnails and bars, without scripts, and without anything that has to be loaded."""

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from deixis._images import ImageLike, Upload, read_image

if TYPE_CHECKING:
    from deixis.answers import ImageResult

SHOWN_DIGITS = 4
"""Digits of a score in displays; the scores themselves are not rounded."""

_MAX_SHOWN_IMAGES = 50
_MAX_SHOWN_LABELS = 5
_THUMBNAIL_PX = 96
_MAX_NAME_CHARS = 60

_CELL = "padding:4px 8px;text-align:left;vertical-align:middle"
_BAR = "display:inline-block;height:0.7em;background:#3b82f6;border-radius:2px"


def results_html(results: Sequence["ImageResult"], images: Sequence[ImageLike | None]) -> str:
    """Return a table with a row for each image."""
    shown = list(zip(results, images, strict=True))[:_MAX_SHOWN_IMAGES]
    rows = [_row(index, result, image) for index, (result, image) in enumerate(shown)]
    more = len(results) - len(rows)
    note = f"<p>and {more:,} more images</p>" if more else ""
    return f'<table style="border-collapse:collapse">{"".join(rows)}</table>{note}'


def name_of(image: ImageLike | None) -> str | None:
    """Return the path, the address or the name of the file; None if the image has none."""
    if isinstance(image, str):
        return "data: URL" if image.startswith("data:") else image
    if isinstance(image, Path):
        return str(image)
    name = getattr(image, "filename", None) or getattr(image, "name", None)  # of a Pillow image, of an open file
    return name if isinstance(name, str) else None


def _row(index: int, result: "ImageResult", image: ImageLike | None) -> str:
    name = name_of(image) or f"image {index}"
    shown = name if len(name) <= _MAX_NAME_CHARS else f"...{name[-_MAX_NAME_CHARS:]}"
    thumbnail = _thumbnail(image)
    picture = "" if thumbnail is None else f'<img src="data:image/png;base64,{thumbnail}" alt=""><br>'
    return (
        f'<tr><td style="{_CELL}">{picture}<small>{escape(shown)}</small></td>'
        f'<td style="{_CELL}">{_verdict(result)}</td></tr>'
    )


def _verdict(result: "ImageResult") -> str:
    if result.error is not None:
        return f"<em>{escape(result.error.detail)}</em>"
    lines = [
        _bar(f"✓ {prediction.label}" if prediction.above else prediction.label, prediction.score)
        for prediction in result.predictions[:_MAX_SHOWN_LABELS]
    ]
    if result.labels == []:
        lines.insert(0, "<em>none of the labels</em>")
    elif result.rejected:
        lines.insert(0, "<em>rejected</em>")
    lines += [f"<small>{escape(warning)}</small>" for warning in result.warnings]
    return "<br>".join(lines)


def _bar(label: str, score: float) -> str:
    width = max(0.0, min(score, 1.0)) * 120
    return f'<span style="{_BAR};width:{width:.0f}px"></span> {escape(label)} {score:.{SHOWN_DIGITS}f}'


def _thumbnail(image: ImageLike | None) -> str | None:
    """Return a small PNG in base64; None without Pillow, for a URL, and if the image cannot be read (again)."""
    try:
        from PIL import Image, ImageOps  # noqa: PLC0415 - an optional dependency

        read = None if image is None else read_image(image)
        if not isinstance(read, Upload):
            return None
        with Image.open(io.BytesIO(read.content)) as opened:
            opened.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
            file = io.BytesIO()
            ImageOps.exif_transpose(opened).convert("RGB").save(file, "PNG")  # upright, as the service sees it
    except Exception:  # noqa: BLE001 - a display shows what it can
        return None
    return base64.b64encode(file.getvalue()).decode()
