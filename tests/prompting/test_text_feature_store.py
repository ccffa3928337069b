import asyncio
import multiprocessing
import sqlite3
from contextlib import closing

import numpy as np
import pytest
import structlog

from app.prompting.text_feature_store import StoredTextEncoder, TextFeatureStore

pytestmark = pytest.mark.anyio

DIMS = 16
MIB = 2**20


def row_of(text):
    return np.random.default_rng(len(text) + sum(map(ord, text))).standard_normal(DIMS).astype(np.float32)


class Encoder:
    """Records what it encodes."""

    def __init__(self):
        self.texts = []

    async def __call__(self, prompts):
        self.texts += prompts
        return np.stack([row_of(text) for text in prompts])


@pytest.fixture
def file(tmp_path):
    return tmp_path / "folder" / "features.sqlite3"


@pytest.fixture
def open_store(file):
    opened = []

    def make(max_bytes=100 * MIB, path=file):
        store = TextFeatureStore(path, max_bytes)
        opened.append(store)
        return store

    yield make
    for store in opened:
        store.close()


def encoder_of(store, encode, fingerprint="weights"):
    async def read_fingerprint() -> str:
        return fingerprint

    return StoredTextEncoder(encode, read_fingerprint, store)


async def test_stored_features_are_read_after_a_restart_bit_for_bit(open_store):
    first, again = Encoder(), Encoder()
    store = open_store()
    before = await encoder_of(store, first)(["owl", "lynx"])
    store.close()
    after = await encoder_of(open_store(), again)(["lynx", "puma", "owl"])
    assert again.texts == ["puma"]
    np.testing.assert_array_equal(after[[2, 0]], before)
    assert after.dtype == np.float32


async def test_a_repeated_text_is_encoded_once(open_store):
    encode = Encoder()
    features = await encoder_of(open_store(), encode)(["owl", "lynx", "owl"])
    assert encode.texts == ["owl", "lynx"]
    np.testing.assert_array_equal(features[0], features[2])


async def test_features_of_other_weights_are_not_returned(open_store):
    encode = Encoder()
    store = open_store()
    await encoder_of(store, encode, "weights")(["owl"])
    await encoder_of(store, encode, "other weights")(["owl"])
    assert encode.texts == ["owl", "owl"]


async def test_without_a_store_texts_are_always_encoded():
    encode = Encoder()

    async def fingerprint() -> str:
        return "weights"

    encoder = StoredTextEncoder(encode, fingerprint, None)
    for _ in range(2):
        await encoder(["owl"])
    assert encode.texts == ["owl", "owl"]


@pytest.mark.blocks_event_loop("the test itself makes fifty thousand rows")
async def test_fifty_thousand_texts_are_read_back(open_store):
    """More than SQLite accepts as variables of one statement."""
    store = open_store()
    rows = {f"text {number}": row_of(str(number)) for number in range(50_000)}
    await store.write("weights", rows)
    found = await store.read("weights", [*rows, "another"])
    assert found.keys() == rows.keys()
    np.testing.assert_array_equal(found["text 49999"], rows["text 49999"])


async def test_texts_in_any_script_and_with_lone_surrogates_have_different_rows(open_store):
    store = open_store()
    texts = ["猫", "кошка", "\ud800", "\ud801", "a\0b", ""]
    await store.write("weights", {text: np.full(DIMS, number, np.float32) for number, text in enumerate(texts)})
    found = await store.read("weights", texts)
    assert [found[text][0] for text in texts] == list(range(len(texts)))


# --- bounded -------------------------------------------------------------------------------------------------------


async def test_the_file_stays_within_its_limit_and_the_least_recently_used_rows_are_deleted(
    open_store, file, monkeypatch
):
    store = open_store(max_bytes=MIB)
    now = 1_000_000_000
    monkeypatch.setattr("app.prompting.text_feature_store.time.time", lambda: now)
    wide = np.ones(512, np.float32)
    for number in range(60):
        now += 86_400 * 2
        await store.write("weights", {f"{number} {item}": wide for item in range(20)})
        assert await store.read("weights", ["0 0"])
    found = await store.read("weights", [f"{number} 1" for number in range(60)])
    assert "59 1" in found
    assert "1 1" not in found
    with closing(sqlite3.connect(file)) as connection:
        pages, size = (connection.execute(f"PRAGMA {item}").fetchone()[0] for item in ("page_count", "page_size"))
    assert pages * size < 1.2 * MIB


# --- failures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"no database at all" * 100, b"SQLite format 3\0" + b"\xff" * 5000])
async def test_a_damaged_file_is_recreated_and_results_are_correct(open_store, file, content):
    file.parent.mkdir()
    file.write_bytes(content)
    encode = Encoder()
    encoder = encoder_of(open_store(), encode)
    with structlog.testing.capture_logs() as logs:
        for _ in range(3):
            np.testing.assert_array_equal(await encoder(["owl"]), row_of("owl")[None])
    assert [log["event"] for log in logs] == ["text_features_not_kept"]
    assert len(encode.texts) <= 2
    with closing(sqlite3.connect(file)) as connection:
        assert connection.execute("SELECT count(*) FROM checked_features").fetchone() == (1,)


@pytest.mark.parametrize(
    "damage",
    [
        "row = substr(row, 1, 20)",
        "row = substr(row, 1, 21)",
        "row = x''",
        "row = 'text'",
        "row = 5",
        "row = row || x'00000000'",
        "row = zeroblob(length(row))",
        "row = substr(row, 1, 7) || x'7f' || substr(row, 9)",
        "row = (SELECT other.row FROM checked_features AS other WHERE other.key != checked_features.key)",
    ],
)
async def test_a_damaged_row_is_encoded_again_and_replaced(open_store, file, damage):
    store = open_store()
    await store.write("weights", {text: row_of(text) for text in ("owl", "lynx")})
    store.close()
    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        (key,) = connection.execute("SELECT min(key) FROM checked_features").fetchone()
        connection.execute(f"UPDATE checked_features SET {damage} WHERE key = ?", [key])
    encode = Encoder()
    encoder = encoder_of(open_store(), encode)
    with structlog.testing.capture_logs() as logs:
        for _ in range(2):
            features = await encoder(["owl", "lynx"])
            np.testing.assert_array_equal(features, np.stack([row_of("owl"), row_of("lynx")]))
    assert len(encode.texts) == 1
    assert [(entry["event"], entry["rows"]) for entry in logs] == [("text_features_damaged", 1)]


async def test_without_write_permission_features_are_encoded_but_not_stored(open_store, tmp_path):
    """A file has the path of the folder."""
    (tmp_path / "blocked").write_text("")
    encode = Encoder()
    encoder = encoder_of(open_store(path=tmp_path / "blocked" / "features.sqlite3"), encode)
    with structlog.testing.capture_logs() as logs:
        for _ in range(2):
            np.testing.assert_array_equal(await encoder(["owl"]), row_of("owl")[None])
    assert encode.texts == ["owl", "owl"]
    assert len(logs) == 1


async def test_a_database_of_another_format_is_not_read(open_store, file):
    store = open_store()
    await store.write("weights", {"owl": row_of("owl")})
    store.close()
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("PRAGMA user_version=99")
    assert await open_store().read("weights", ["owl"]) == {}


def write_many(file, name, count):
    async def work():
        store = TextFeatureStore(file, 100 * MIB)
        for number in range(count):
            await store.write("weights", {f"{name} {number}": row_of(name), f"shared {number}": row_of("shared")})
        store.close()

    asyncio.run(work())


async def test_several_processes_can_write_concurrently(open_store, file):
    spawn = multiprocessing.get_context("spawn")
    writers = [spawn.Process(target=write_many, args=(file, name, 30)) for name in "abc"]
    for writer in writers:
        writer.start()
    for writer in writers:
        await asyncio.to_thread(writer.join, 60)
        assert writer.exitcode == 0
    wanted = [f"{name} {number}" for name in "abc" for number in range(30)]
    assert len(await open_store().read("weights", wanted)) == 90


async def test_a_reader_concurrent_with_a_writer_reads_complete_rows_only(open_store):
    writer, reader = open_store(), open_store()
    rows = {str(number): row_of(str(number)) for number in range(500)}

    async def write():
        for text, row in rows.items():
            await writer.write("weights", {text: row})

    writing = asyncio.create_task(write())
    seen = {}
    while not writing.done():
        seen = await reader.read("weights", list(rows))
        assert all(len(row) == DIMS for row in seen.values())
    await writing
    assert len(await reader.read("weights", list(rows))) == 500
