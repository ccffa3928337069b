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
def test_captions_are_read_as_they_were_written(stored, captions):
    texts = CaptionTexts.open(stored(captions))
    assert len(texts) == len(captions)
    assert [texts[index] for index in range(len(captions))] == captions
    backwards = np.arange(len(captions))[::-1]
    assert texts.many(backwards) == captions[::-1]


def test_texts_lie_on_the_disk_and_not_in_memory(stored):
    texts = CaptionTexts.open(stored(CAPTIONS))
    assert isinstance(texts._texts.base, np.memmap)
    assert isinstance(texts._offsets.base, np.memmap)


@pytest.mark.parametrize("index", [-1, len(CAPTIONS)])
def test_there_is_no_caption_before_the_first_or_after_the_last(stored, index):
    with pytest.raises(IndexError, match="of 6"):
        CaptionTexts.open(stored(CAPTIONS))[index]


def test_half_a_surrogate_pair_becomes_a_question_mark(stored):
    assert CaptionTexts.open(stored(["a \ud83d b", "next"]))[0] == "a ? b"


@pytest.mark.parametrize("name", [TEXTS, OFFSETS])
def test_a_missing_file_is_told_by_its_name(stored, name):
    folder = stored(CAPTIONS)
    (folder / name).unlink()
    with pytest.raises(StoreError, match=name):
        CaptionTexts.open(folder)


def test_lengths_that_do_not_agree_are_refused(stored):
    folder = stored(CAPTIONS)
    (folder / TEXTS).write_bytes((folder / TEXTS).read_bytes()[:-1])
    with pytest.raises(StoreError, match=r"from 0 to \d+, but the captions have \d+ bytes; build the database again"):
        CaptionTexts.open(folder)


@pytest.mark.parametrize(
    "offsets", [np.zeros(7), np.zeros((2, 2), np.uint64), np.zeros(0, np.uint64), np.ones(7, np.uint64)]
)
def test_what_is_no_list_of_offsets_is_refused(stored, offsets):
    folder = stored(CAPTIONS)
    np.save(folder / OFFSETS, offsets)
    with pytest.raises(StoreError, match="build the database again"):
        CaptionTexts.open(folder)


@pytest.mark.parametrize("content", [b"", b"no array", b"\x93NUMPY"])
def test_offsets_that_are_no_array_are_refused(stored, content):
    folder = stored(CAPTIONS)
    (folder / OFFSETS).write_bytes(content)
    with pytest.raises(StoreError, match="build the database again"):
        CaptionTexts.open(folder)
