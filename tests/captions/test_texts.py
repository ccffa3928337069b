import numpy as np
import pytest

from app.captions.texts import OFFSETS, TEXTS, CaptionTexts, offsets_of, pack
from app.errors import StoreError

CAPTIONS = ["a dog", "", "ein Bär im Café", "犬が走る", "🙂 a smile", "a dog"]


@pytest.fixture
def stored(tmp_path):
    def store(captions):
        texts, lengths = pack(captions)
        (tmp_path / TEXTS).write_bytes(texts)
        np.save(tmp_path / OFFSETS, offsets_of(lengths))
        return tmp_path

    return store


@pytest.mark.parametrize("captions", [CAPTIONS, ["one"], [], ["", ""]])
def test_stored_captions_are_read_unchanged(stored, captions):
    texts = CaptionTexts.open(stored(captions))
    assert len(texts) == len(captions)
    assert [texts[index] for index in range(len(captions))] == captions
    backwards = np.arange(len(captions))[::-1]
    assert texts.many(backwards) == captions[::-1]


def test_texts_are_on_disk_and_not_in_memory(stored):
    texts = CaptionTexts.open(stored(CAPTIONS))
    assert isinstance(texts._texts.base, np.memmap)
    assert isinstance(texts._offsets.base, np.memmap)


@pytest.mark.parametrize("index", [-1, len(CAPTIONS)])
def test_an_index_outside_the_captions_is_an_error(stored, index):
    with pytest.raises(IndexError, match="of 6"):
        CaptionTexts.open(stored(CAPTIONS))[index]


def test_a_lone_surrogate_is_stored_as_a_question_mark(stored):
    assert CaptionTexts.open(stored(["a \ud83d b", "next"]))[0] == "a ? b"


@pytest.mark.parametrize("name", [TEXTS, OFFSETS])
def test_a_missing_file_is_an_error_with_its_name(stored, name):
    folder = stored(CAPTIONS)
    (folder / name).unlink()
    with pytest.raises(StoreError, match=name):
        CaptionTexts.open(folder)


def test_lengths_that_differ_from_the_offsets_are_rejected(stored):
    folder = stored(CAPTIONS)
    (folder / TEXTS).write_bytes((folder / TEXTS).read_bytes()[:-1])
    with pytest.raises(StoreError, match=r"from 0 to \d+, but the captions have \d+ bytes; build the database again"):
        CaptionTexts.open(folder)


@pytest.mark.parametrize(
    "offsets", [np.zeros(7), np.zeros((2, 2), np.uint64), np.zeros(0, np.uint64), np.ones(7, np.uint64)]
)
def test_invalid_offsets_are_rejected(stored, offsets):
    folder = stored(CAPTIONS)
    np.save(folder / OFFSETS, offsets)
    with pytest.raises(StoreError, match="build the database again"):
        CaptionTexts.open(folder)


@pytest.mark.parametrize("content", [b"", b"no array", b"\x93NUMPY"])
def test_offsets_that_are_not_an_array_are_rejected(stored, content):
    folder = stored(CAPTIONS)
    (folder / OFFSETS).write_bytes(content)
    with pytest.raises(StoreError, match="build the database again"):
        CaptionTexts.open(folder)
