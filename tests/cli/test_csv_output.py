import csv
import io
from pathlib import Path

import pytest

from app.cli.csv_output import read_rows, write_rows


@pytest.mark.parametrize(
    ("cell", "written"),
    [
        ("=1+1", "'=1+1"),
        ("+A1", "'+A1"),
        ("-cmd|' /C calc'!A0", "'-cmd|' /C calc'!A0"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\t=1", "'\t=1"),
        ("\r=1", "'\r=1"),
        ("\uff1d1", "'\uff1d1"),
        ("'=1", "''=1"),
        ("-0.0123", "-0.0123"),
        ("-1e-05", "-1e-05"),
        ("+5", "+5"),
        ("o'clock", "o'clock"),
        ("cat", "cat"),
        (Path("=1.jpg"), "./=1.jpg"),
        (Path("-n/a.jpg"), "./-n/a.jpg"),
        (Path("@eaDir/a.jpg"), "./@eaDir/a.jpg"),
        (Path("/=1.jpg"), "/=1.jpg"),
        (Path("caf\udce9.jpg"), r"caf\xe9.jpg"),
    ],
)
def test_no_cell_begins_like_a_formula_and_programs_read_the_same_text_or_file(cell, written):
    file = io.StringIO(newline="")
    write_rows(file, [["a", cell]])
    file.seek(0)
    assert next(csv.reader(file)) == ["a", written]
    file.seek(0)
    (read,) = read_rows(file)
    assert read[1] == cell if isinstance(cell, str) else Path(read[1]) == Path(written)
