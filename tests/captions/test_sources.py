import csv
import gzip
import io
import json
import sys
import time
import tracemalloc
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.captions import cleaning, json_array
from app.captions.cleaning import CaptionRules, Counts, clean_captions
from app.captions.sources import captions_of, read_captions
from app.errors import InvalidFieldError

CAPTIONS = ["a dog on grass", "two cats, asleep", 'a "quoted" word', "Café au lait", "犬が走る"]


@pytest.fixture
def written(tmp_path):
    def write(name, content):
        file = tmp_path / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return file

    return write


def read(file, **options):
    counts = Counts()
    return list(read_captions(file, counts=counts, **options)), counts


def as_csv(rows, **dialect):
    text = io.StringIO(newline="")
    csv.writer(text, **dialect).writerows(rows)
    return text.getvalue()


def url(number):
    return f"https://example.org/{number}.jpg"


# Text


@pytest.mark.parametrize("name", ["captions.txt", "captions", "captions.captions"])
def test_text_has_one_caption_per_line(written, name):
    captions, counts = read(written(name, "\ufeff" + "\r\n".join(CAPTIONS) + "\n\n"))
    assert captions == CAPTIONS
    assert counts == Counts(read=5)


def test_invalid_and_endless_lines_are_counted_and_skipped(written):
    captions, counts = read(written("a.txt", b"first\n\xff\xfe\n" + b"x" * (3 * 2**20) + b"\nlast"))
    assert captions == ["first", "last"]
    assert (counts.read, counts.bad) == (2, 2)


def test_standard_input_is_text_by_default():
    assert list(read_captions("-", stdin=io.BytesIO(b"one\ntwo\n"))) == ["one", "two"]
    packed = io.BytesIO(gzip.compress(b'{"caption": "one"}\n'))
    assert list(read_captions("-", suffix=".jsonl.gz", stdin=packed)) == ["one"]


def test_standard_input_stays_open():
    stdin = io.BytesIO(b"caption\none\ntwo\n")
    captions = read_captions("-", suffix=".csv", stdin=stdin)
    assert next(captions) == "one"
    captions.close()
    assert not stdin.closed


# CSV and TSV


@pytest.mark.parametrize("header", [["url", "Caption"], ["TEXT ", "url"], ["id", "title", "url"]])
@pytest.mark.parametrize(("name", "dialect"), [("a.csv", {}), ("a.tsv", {"dialect": "excel-tab"})])
def test_a_common_header_determines_the_column(written, header, name, dialect):
    place = next(place for place, cell in enumerate(header) if cell not in {"id", "url"})
    rows = [["7"] * place + [caption] + [url(1)] * (len(header) - place - 1) for caption in CAPTIONS]
    captions, counts = read(written(name, as_csv([header, *rows], **dialect)))
    assert captions == CAPTIONS
    assert counts == Counts(read=5)


@pytest.mark.parametrize("order", [1, -1])
def test_without_a_header_the_column_without_urls_and_numbers_is_used(written, order):
    lines = ["\t".join(["17", url(1), caption][::order]) for caption in CAPTIONS]
    assert read(written("cc12m.tsv", "\n".join(lines)))[0] == CAPTIONS


@pytest.mark.parametrize("column", ["1", "-2"])
def test_a_column_can_be_selected_by_position(written, column):
    rows = [["left", caption, "right"] for caption in CAPTIONS]
    assert read(written("a.csv", as_csv(rows)), column=column)[0] == CAPTIONS
    with_header = [["left", "text", "right"], *rows]
    assert read(written("a.csv", as_csv(with_header)), column=column)[0] == CAPTIONS


def test_a_column_can_be_selected_by_name_despite_common_ones(written):
    rows = [["caption", "Better"], *(["worse", caption] for caption in CAPTIONS)]
    assert read(written("a.csv", as_csv(rows)), column="better")[0] == CAPTIONS


@pytest.mark.parametrize("column", ["speech", "9", "-3", "²"])
def test_the_error_for_an_unknown_column_lists_the_columns(written, column):
    file = written("a.csv", "url,caption\nx,y\n")
    with pytest.raises(InvalidFieldError, match=f"no column '{column}'; name one of: 'url', 'caption'"):
        read(file, column=column)


@pytest.mark.parametrize("cell", [" " * 500_000 + "x", "1" * 500_000 + " x", "http://" + "x" * 500_000 + " y"])
def test_a_first_row_of_any_length_is_read_in_linear_time(written, cell):
    began = time.thread_time()
    with pytest.raises(InvalidFieldError, match="ambiguous"):
        list(read_captions(written("captions.tsv", f"{cell}\ta dog\n")))
    assert time.thread_time() - began < 2


@pytest.mark.parametrize(
    ("caption", "kept"),
    [
        ("a" + "\u0301" * 300_000 + "\u0316" * 300_000, "\u00e1" + "\u0301" * 39),
        ("x" * 1_000_000, "x" * 500),
        ("a dog" + " " * 1_000_000 + "on grass", "a dog"),
    ],
    ids=["marks", "letters", "spaces"],
)
def test_a_caption_of_any_length_is_cleaned_in_linear_time_and_cut(caption, kept):
    began = time.thread_time()
    counts = Counts()
    assert list(clean_captions([caption], counts=counts)) == [kept]
    assert counts.cut == 1
    assert time.thread_time() - began < 2


def test_an_ambiguous_column_is_an_error(written):
    with pytest.raises(InvalidFieldError, match="0: 'picture', 1: 'comment'; name one by its header or its index"):
        read(written("a.csv", "picture,comment\nx,y\n"))


def test_fields_may_contain_commas_quotation_marks_and_line_breaks(written):
    rows = [["url", "caption"], [url(1), 'a "b", c'], [url(2), "two\nlines"], [url(3), ""]]
    assert read(written("a.csv", as_csv(rows)))[0] == ['a "b", c', "two\nlines", ""]


def test_quotation_marks_of_unquoted_tsv_are_kept(written):
    lines = [
        f'{url(1)}\tthe "big" one',
        f'{url(1)}\t"starts',
        f'{url(1)}\t"a" and "b"',
        f'{url(1)}\t"it ""is"" quoted"',
    ]
    assert read(written("a.tsv", "\n".join(lines)))[0] == ['the "big" one', '"starts', '"a" and "b"', 'it "is" quoted']


def test_rows_without_the_column_or_with_invalid_bytes_are_counted(written):
    content = b"url,caption\nx,first\nonly one\n\nx,caf\xe9\nx,last\n"
    captions, counts = read(written("a.csv", content))
    assert captions == ["first", "last"]
    assert counts == Counts(read=2, bad=2)


def test_an_unclosed_quotation_mark_is_counted_with_the_lines_that_it_contains(written):
    content = "url,caption\nx,first\n" + 'x,"open\n' + "x,lost\n" * 30_000 + "x,found\n" * 30
    captions, counts = read(written("a.csv", content))
    assert captions[0] == "first"
    assert captions[-1] == "found"
    assert counts.bad > 0


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.txt", "a.jsonl", "a.json"])
@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_has_no_captions(written, name, content):
    assert read(written(name, content)) == ([], Counts())


# JSON

FORMS = {
    "coco": {"info": {"a": [1]}, "images": [{"id": 1}] * 3, "annotations": [{"caption": c, "id": 1} for c in CAPTIONS]},
    "strings": CAPTIONS,
    "objects": [{"url": "x", "caption": caption} for caption in CAPTIONS],
    "lists": [{"captions": CAPTIONS[:2]}, {"captions": CAPTIONS[2:]}],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk", [1, 7, 2**18])
@pytest.mark.parametrize("indent", [None, 2])
def test_json_is_read_in_each_form_with_any_chunk_size(written, monkeypatch, form, chunk, indent):
    monkeypatch.setattr(json_array, "_CHUNK", chunk)
    file = written("a.json", json.dumps(FORMS[form], indent=indent, ensure_ascii=chunk == 7))
    assert read(file) == (CAPTIONS, Counts(read=5))


def test_json_may_have_captions_under_another_key(written):
    file = written("a.json", json.dumps([{"caption": "x", "comment": caption} for caption in CAPTIONS]))
    assert read(file, column="comment")[0] == CAPTIONS


def test_elements_that_are_not_captions_are_counted(written):
    captions, counts = read(written("a.json", '["one", 2, null, {"url": "x"}, ["two"], {"caption": 3}, 12]'))
    assert captions == ["one", "two"]
    assert counts == Counts(read=2, bad=5)


@pytest.mark.parametrize(
    "content", ['["one", "two", "thr', '["one", "two" "three"]', '["one", "two", }', '["one", "two"']
)
def test_truncated_json_gives_the_captions_before_the_end(written, content):
    assert read(written("a.json", content)) == (["one", "two"], Counts(read=2, bad=1))


@pytest.mark.parametrize(
    "content", ["captions", "{", '{"images": []}', '{"annotations": 3}', "[}", '{"annotations": [1, 2]}', "[" * 100_000]
)
def test_the_error_for_json_without_captions_lists_the_supported_forms(written, content):
    with pytest.raises(InvalidFieldError, match=r"as JSON.*(annotations|name the column)"):
        read(written("a.json", content))


def test_a_second_file_without_captions_is_rejected_too(written):
    good, bad = written("good.txt", "one caption\n"), written("bad.json", "captions")
    with pytest.raises(InvalidFieldError, match=r"bad\.json"):
        list(captions_of([good, bad]))


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson"])
def test_json_lines_may_be_captions_or_objects(written, name):
    lines = ['"one"', '{"text": "two"}', "", "no json", '{"text": 3}', "[" * 100_000, '{"text": "three"}']
    captions, counts = read(written(name, "\n".join(lines)))
    assert captions == ["one", "two", "three"]
    assert counts == Counts(read=3, bad=3)


def test_the_error_for_unreadable_files_lists_the_attempts(written):
    with pytest.raises(InvalidFieldError, match="can be read as JSONL: 2 lines or elements are bad; name the column"):
        read(written("a.jsonl", "one\ntwo\n"))


# Compression


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.tsv", "a.json", "a.jsonl"])
@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_every_format_may_be_compressed(written, name, compression):
    content = {
        "a.txt": "\n".join(CAPTIONS),
        "a.csv": as_csv([["caption"], *([caption] for caption in CAPTIONS)]),
        "a.tsv": "\n".join(f"{url(1)}\t{caption}" for caption in CAPTIONS),
        "a.json": json.dumps(CAPTIONS),
        "a.jsonl": "\n".join(map(json.dumps, CAPTIONS)),
    }[name]
    assert read(written(name + compression, packed(content.encode(), compression))) == (CAPTIONS, Counts(read=5))


def packed(content, compression):
    if compression == ".gz":
        return gzip.compress(content)
    return pytest.importorskip("zstandard", reason="the extra 'captions' is not installed").compress(content)


@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_concatenated_compressed_files_are_read(written, compression):
    parts = b"".join(packed(f"part {number}\n".encode(), compression) for number in range(5))
    assert read(written("a.txt" + compression, parts))[0] == [f"part {number}" for number in range(5)]


@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_a_truncated_compressed_file_gives_its_captions_and_is_counted(written, compression):
    lines = [f"{number} {number**7}" for number in range(50_000)]
    whole = packed("\n".join(lines).encode(), compression)
    captions, counts = read(written("a.txt" + compression, whole[: len(whole) // 2]))
    assert captions == lines[: len(captions)]
    assert len(captions) > 100
    assert counts.bad == 1


@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_a_file_with_a_wrong_compression_suffix_is_rejected(written, compression):
    packed(b"", compression)  # skips formats that cannot be read here
    with pytest.raises(InvalidFieldError, match="cannot be read as text"):
        read(written("a.txt" + compression, "plain text"))


# Parquet


@pytest.fixture
def parquet(tmp_path):
    reason = "the extra 'captions' is not installed"
    pa = pytest.importorskip("pyarrow", reason=reason)
    pq = pytest.importorskip("pyarrow.parquet", reason=reason)

    def write(columns, **options):
        pq.write_table(pa.table(columns), tmp_path / "a.parquet", **options)
        return tmp_path / "a.parquet"

    return write


@pytest.mark.parametrize("name", ["TEXT", "caption"])
def test_parquet_is_read_by_a_common_column_across_row_groups(parquet, name):
    every = [f"caption {number}" for number in range(1000)]
    file = parquet({"url": ["x"] * 1000, name: every}, row_group_size=64)
    assert read(file) == (every, Counts(read=1000))


def test_parquet_is_read_by_the_selected_column_and_nulls_are_counted(parquet):
    file = parquet({"caption": ["x"] * 3, "better": ["one", None, "two"], "many": [["a", "b"], [], ["c"]]})
    assert read(file, column="better") == (["one", "two"], Counts(read=2, bad=1))
    assert read(file, column="many")[0] == ["a", "b", "c"]
    with pytest.raises(InvalidFieldError, match="no column 'best'; name one of: 'caption', 'better', 'many'"):
        read(file, column="best")


def test_damaged_parquet_is_rejected(parquet):
    file = parquet({"caption": CAPTIONS})
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(InvalidFieldError, match="cannot be read as PARQUET"):
        read(file)


def test_parquet_requires_a_file(written):
    for source, options in [("-", {"suffix": ".parquet", "stdin": io.BytesIO()}), (written("a.parquet.gz", ""), {})]:
        with pytest.raises(InvalidFieldError, match="save and decompress it first"):
            read(source, **options)


@pytest.mark.parametrize(("name", "module"), [("a.parquet", "pyarrow"), ("a.txt.zst", "zstandard")])
def test_the_error_for_a_missing_extra_names_it(written, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InvalidFieldError, match="needs the extra 'captions'"):
        read(written(name, ""))


# Files


def test_the_error_for_a_missing_file_names_it(tmp_path):
    with pytest.raises(InvalidFieldError, match=r"nowhere\.csv' cannot be read as CSV: No such file"):
        read(tmp_path / "nowhere.csv")
    with pytest.raises(InvalidFieldError, match="not a regular file, but a folder"):
        read(tmp_path)


def test_a_file_is_closed_when_reading_stops_early(written):
    for name, content in [("a.csv", "caption\none\ntwo"), ("a.json", '["one", "two"]'), ("a.txt", "one\ntwo")]:
        captions = read_captions(written(name, content))
        assert next(captions) == "one"
        captions.close()  # an open file would warn


def test_captions_of_several_files_are_unique_and_counted_together(written):
    files = [written("a.txt", "a dog\na  cat\n\xe9\n"), written("b.csv", "caption\na cat\na fox\n")]
    counts = Counts()
    assert list(captions_of(files, counts=counts)) == ["a dog", "a cat", "a fox"]
    assert counts == Counts(read=5, kept=3, duplicates=1, too_short=1)


def test_memory_does_not_grow_with_the_source(tmp_path, monkeypatch):
    monkeypatch.setattr(json_array, "_CHUNK", 2**12)

    def peak(count):
        file = tmp_path / f"{count}.json"
        with file.open("w") as content:
            content.write('{"images": [' + ",".join(['{"id": 1}'] * count) + '], "annotations": [')
            content.write(",".join(f'{{"caption": "picture {number}"}}' for number in range(count)) + "]}")
        list(zip(range(10), read_captions(file), strict=False))  # memory that is allocated once does not count
        tracemalloc.start()
        try:
            assert sum(1 for _ in read_captions(file)) == count
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(30_000) < 1.2 * peak(10_000)


# Cleaning


def clean(captions, **rules):
    counts = Counts()
    return list(clean_captions(captions, rules=CaptionRules(**rules), counts=counts)), counts


@pytest.mark.parametrize(
    ("dirty", "tidy"),
    [
        ("  a\tdog \n on\u00a0grass ", "a dog on grass"),
        ("Cafe\u0301", "Café"),
        ("Cafe\x00\u0301", "Café"),
        ("a\x00b\x1b[1mc\x9f", "ab[1mc"),
        ("\ufeffdog \ud83d", "dog"),
        ("a\x85line", "a line"),
        ("👩\u200d🚀 in space", "👩\u200d🚀 in space"),
    ],
)
def test_captions_are_cleaned(dirty, tidy):
    assert clean([dirty])[0] == [tidy]


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(), max_size=40))
def test_a_clean_caption_is_composed_has_single_spaces_and_can_be_encoded(dirty):
    for caption in clean([dirty], min_chars=1)[0]:
        assert unicodedata.is_normalized("NFC", caption)
        assert caption == " ".join(caption.split())
        assert not any(unicodedata.category(character) in {"Cc", "Cs"} for character in caption)
        caption.encode()
        assert clean([caption], min_chars=1)[0] == [caption]


def test_short_captions_are_dropped_and_long_ones_truncated():
    captions, counts = clean(["ab", "abc", "x" * 501, "y" * 499 + " z"])
    assert captions == ["abc", "x" * 500, "y" * 499]
    assert (counts.too_short, counts.cut, counts.kept) == (1, 2, 3)


def test_other_scripts_are_kept_unless_latin_is_requested():
    captions = [
        "a dog",
        "Žluťoučký kůň",
        "собака бежит",
        "犬が走る",
        "犬 dog on the grass",
        "12345",
        "\uff21\uff22\uff23",
    ]
    assert clean(captions)[0] == captions
    latin, counts = clean(captions, latin_only=True)
    assert latin == ["a dog", "Žluťoučký kůň", "犬 dog on the grass", "\uff21\uff22\uff23"]
    assert counts.other_script == 3


def test_duplicates_are_detected_after_cleaning_at_any_distance():
    numbers = np.random.default_rng(0).integers(0, 9000, 30_000).tolist()
    captions, counts = clean(f"  caption   {number}" for number in numbers)
    assert captions == [f"caption {number}" for number in dict.fromkeys(numbers)]
    assert counts.duplicates == 30_000 - len(captions)
    assert clean(["one", "one"], distinct=False)[0] == ["one", "one"]


def test_captions_that_are_equal_after_truncation_are_duplicates():
    assert len(clean(["x" * 600, "x" * 700])[0]) == 1


def test_the_memory_per_caption_is_eight_bytes():
    known = cleaning._HashSet()
    for first in range(0, 40_000, 1000):
        known.add([f"caption {number}" for number in range(first, first + 1000)])
    assert sum(array.nbytes for array in known._arrays) == 8 * 40_000
    assert len(known._arrays) < 8


def test_every_caption_is_counted():
    captions = [["a dog", "no", "собака", "word " * 200][number % 4] + " " * (number % 3) for number in range(500)]
    counts = clean((f"{caption}{index // 8}" if index % 4 == 0 else caption for index, caption in enumerate(captions)))[
        1
    ]
    assert counts.kept + counts.duplicates + counts.too_short + counts.other_script == 500


@pytest.mark.parametrize(("least", "most"), [(0, 5), (6, 5)])
def test_rules_that_exclude_every_caption_are_rejected(least, most):
    with pytest.raises(InvalidFieldError, match="1 <= min <= max"):
        clean([], min_chars=least, max_chars=most)


def test_a_source_is_read_only_as_far_as_requested():
    taken = []
    captions = clean_captions(f"caption {taken.append(number) or number}" for number in range(100_000))
    assert next(captions) == "caption 0"
    assert len(taken) < 10_000


def test_suffixes_are_case_insensitive(written):
    assert read(written("A.CSV", "caption\none"))[0] == ["one"]
    assert isinstance(written("A.CSV", ""), Path)
