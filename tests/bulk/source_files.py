"""Helpers for tests of sources: files, their plan and their images."""

import io
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq

from app.bulk.readers import UnreadableImage, read_unit
from app.bulk.sources import ParquetColumns, plan_units
from tests.conftest import picture

RED, BLUE = picture("red"), picture("blue")


def planned(*sources, unit_images=4, columns=None):
    return list(plan_units(sources, columns or ParquetColumns(), unit_images=unit_images))


def read(units, *, skip=0, max_image_bytes=10**6):
    return [image for unit in units for image in read_unit(unit, skip=skip, max_image_bytes=max_image_bytes)]


def keys(images):
    return [image.key for image in images]


def reason_of(image):
    assert isinstance(image.content, UnreadableImage), image
    return image.content.reason


def tar_of(members, *, end=True):
    """Return a tar file with these members."""
    file = io.BytesIO()
    archive = tarfile.open(fileobj=file, mode="w")  # noqa: SIM115 - closing writes the end
    for name, content in members.items():
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    if end:
        archive.close()
    return file.getvalue()


SAMPLES = {"000.jpg": RED, "000.json": b"{}", "001.jpg": BLUE, "001.cls": b"3", "002.png": RED}


def parquet_file(tmp_path, columns, **options):
    pq.write_table(pa.table(columns), tmp_path / "p.parquet", **options)
    return tmp_path / "p.parquet"
