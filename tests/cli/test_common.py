from pathlib import Path

from app.cli.common import report_warnings
from deixis.answers import ImageResult, Problem


def _result(*warnings):
    return ImageResult(predictions=[], warnings=list(warnings))


def test_a_warning_is_printed_once_with_the_files_it_concerns(capsys):
    files = [Path(name) for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg", "bad.jpg")]
    problem = Problem(type="x", title="x", status=415, detail="not an image")
    bad = ImageResult(predictions=[], error=problem)
    results = [_result("all"), _result("all", "weak"), *[_result("all", "weak", "few")] * 3, bad]
    report_warnings(files, results)
    assert capsys.readouterr().err.splitlines() == [
        "warning: all",
        "warning: b.jpg, c.jpg, d.jpg and 1 more: weak",
        "warning: c.jpg, d.jpg, e.jpg: few",
    ]
