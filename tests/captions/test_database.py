import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import pytest

from app.captions.build import BuildOptions, build
from app.captions.database import CaptionDatabase, merge_parts
from app.captions.generations import CURRENT, current_generation, prune
from app.captions.index import CaptionIndex, Part
from app.captions.manifest import DATA_FILES, FEATURES, INDEX, MANIFEST, Manifest
from app.errors import ConfigurationError, StoreError
from tests.captions.build_until_killed import DIMS, features_of

MODEL = "of these rows"
KINDS = {"flat": 3000, "ivf-pq": 500}
CAPTIONS = [f"kind{number % 40} in scene {number}" for number in range(2000)]


def made(folder, captions=CAPTIONS, exact_up_to=3000, **options):
    build(captions, folder, encode=features_of, fingerprint=MODEL, name="scenes", model="rows by hash", licence="CC0",
          options=BuildOptions(shard_size=512, exact_up_to=exact_up_to, **options))  # fmt: skip
    return folder


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory) -> Path:
    """Return a database that tests do not modify."""
    return made(tmp_path_factory.mktemp("captions") / "scenes", exact_up_to=KINDS[request.param])


@pytest.fixture(scope="module")
def database(folder):
    return CaptionDatabase.open(folder, fingerprint=MODEL, verify=True)


@pytest.fixture
def own(tmp_path) -> Path:
    """Return a small database that a test may damage."""
    return made(tmp_path / "own", CAPTIONS[:50])


def queries_of(count, seed=0):
    rows = features_of(CAPTIONS[:count]) + 0.05 * np.random.default_rng(seed).standard_normal((count, DIMS))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def generation_of(folder):
    return folder / current_generation(folder)


def test_the_nearest_captions_come_first_with_their_cosines(database):
    queries = queries_of(50)
    indices, cosines = database.search(queries, 10)
    every = queries @ features_of(database.captions(range(2000))).T
    nearest = -np.sort(-every, axis=1)[:, :10]
    np.testing.assert_allclose(cosines, np.take_along_axis(every, indices, axis=1), atol=2e-3)  # of half precision
    assert (np.diff(cosines, axis=1) <= 0).all()
    assert (cosines >= nearest[:, -1:] - 2e-3).mean() >= 0.95
    assert all(len(set(row)) == 10 for row in indices.tolist())
    assert (indices.dtype, cosines.dtype) == (np.int64, np.float32)


def test_cosines_are_those_of_the_stored_features(database):
    queries = queries_of(20)
    indices, cosines = database.search(queries, 7)
    for query, found, result in zip(queries, indices, cosines, strict=True):
        np.testing.assert_allclose(result, database.features(found) @ query, atol=1e-6)


def test_captions_and_features_are_read_by_index(database):
    indices = np.array([1999, 0, 7, 7])
    every = database.captions(range(2000))
    assert sorted(every) == sorted(CAPTIONS)
    # An inverted file stores them in the order of its lists.
    assert (every == CAPTIONS) is not bool(database.manifest.index.probes)
    assert database.captions(indices) == [every[index] for index in indices]
    features = database.features(indices)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, features_of(database.captions(indices)), atol=1e-3)
    assert len(database) == 2000


@pytest.mark.parametrize("k", [1999, 2000, 5000])
def test_all_captions_are_returned_on_request(database, k):
    indices, cosines = database.search(queries_of(3), k)
    assert indices.shape == cosines.shape == (3, min(k, 2000))
    for row in indices.tolist():
        assert len(set(row)) == min(k, 2000)
        assert min(row) >= 0
    assert np.isfinite(cosines).all()


@pytest.mark.parametrize("of", [1, 3, 7])
def test_the_merged_results_of_shards_equal_those_of_the_whole_database(database, of):
    queries = queries_of(30)
    parts = [Part(number, of) for number in range(of)]
    rows = [sorted(database.search(queries[:1], 2000, part)[0][0].tolist()) for part in parts]
    # Each caption is in one shard, and the captions of a shard are consecutive.
    assert [index for some in rows for index in some] == list(range(2000))
    found = [database.search(queries, 10, part) for part in parts]
    for own, (indices, cosines) in zip(rows, found, strict=True):
        assert set(indices.ravel().tolist()) <= {*own, -1}
        assert (cosines[indices == -1] == -1).all()
    for row in range(len(queries)):
        whole = database.nearest(*(item[row] for item in database.search(queries, 10)), features=True)
        result = [database.nearest(indices[row], cosines[row], features=True) for indices, cosines in found]
        together = merge_parts(result, 10, None)
        # An inexact index has more candidates in shards, so its results are equally near or nearer.
        assert (together.cosines >= whole.cosines - 1e-6).all()
        if not database._index.probes:
            assert together.captions == whole.captions
            np.testing.assert_array_equal(together.features, whole.features)
        assert merge_parts(result, 10, "a part is away").missing == "a part is away"


def test_a_shard_with_fewer_captions_than_requested_returns_all(database):
    indices, _ = database.search(queries_of(2), 2000, Part(0, 10))
    # Shards consist of whole lists, of which the smallest database has few.
    assert 150 < indices.shape[1] < 250
    assert all(sorted(row) == list(range(indices.shape[1])) for row in indices.tolist())


def test_shards_read_the_same_lists_as_the_whole_database(tmp_path):
    database = CaptionDatabase.open(made(tmp_path / "scenes", exact_up_to=500, recall=0.05), fingerprint=MODEL)
    assert database.manifest.index.probes == 1
    index, lists = (
        database._index._index,
        np.repeat(np.arange(len(database._index._list_sizes)), database._index._list_sizes),
    )
    for query in queries_of(30):
        nearest = index.quantizer.search(query[None], 1)[1][0, 0]
        found = [database.search(query[None], 5, Part(number, 9))[0][0] for number in range(9)]
        # All captions of a list are in one shard; the other shards read nothing and return nothing.
        assert sum((item >= 0).any() for item in found) == 1
        assert {lists[row] for item in found for row in item[item >= 0]} == {nearest}


def test_more_lists_are_read_if_the_nearest_ones_have_too_few_captions(tmp_path):
    """The requested number is found, also by several shards."""
    database = CaptionDatabase.open(made(tmp_path / "scenes", exact_up_to=500, recall=0.05), fingerprint=MODEL)
    assert database.manifest.index.probes == 1
    query, k = queries_of(1), int(database._index._list_sizes.max()) + 1
    assert (database.search(query, k)[0] >= 0).all()
    parts = [database.search(query, k, Part(number, 3)) for number in range(3)]
    found = [database.nearest(indices[0], cosines[0], features=False) for indices, cosines in parts]
    whole = database.nearest(*(item[0] for item in database.search(query, k)), features=False)
    together = merge_parts(found, k, None)
    assert len(together.captions) == len(set(together.captions)) == k
    assert (together.cosines >= whole.cosines - 1e-6).all()


def test_a_database_of_an_earlier_release_is_searched_in_shards(tmp_path):
    """Its captions are not in the order of the lists."""
    folder = made(tmp_path / "scenes", exact_up_to=500)
    place = generation_of(folder)
    shuffled = np.random.default_rng(0).permutation(len(CAPTIONS))
    index = faiss.read_index(str(place / INDEX))
    for number in range(index.nlist):
        count = index.invlists.list_size(number)
        if count:
            ids = faiss.rev_swig_ptr(index.invlists.get_ids(number), count)
            ids[:] = shuffled[ids]
    faiss.write_index(index, str(place / INDEX))
    features = np.load(place / FEATURES)
    moved = np.empty_like(features)
    moved[shuffled] = features
    found = CaptionIndex.open(place / INDEX, moved, CaptionDatabase.open(folder, fingerprint=MODEL).manifest.index)
    queries = queries_of(10)
    whole, parts = found.search(queries, 5), [found.search(queries, 5, Part(number, 4)) for number in range(4)]
    cosines = -np.sort(-np.concatenate([part[1] for part in parts], axis=1), axis=1)[:, :5]
    assert (cosines >= whole[1] - 1e-6).all()
    assert len(set(np.concatenate([part[0][0] for part in parts]).tolist()) - {-1}) > 5


def test_no_queries_give_no_results(database):
    indices, cosines = database.search(np.empty((0, DIMS), np.float32), 4)
    assert indices.shape == cosines.shape == (0, 4)


def test_queries_that_are_not_finite_or_not_unit_are_accepted(database):
    queries = np.array([[np.nan] * DIMS, [np.inf] * DIMS, [0] * DIMS, [1e30] * DIMS], np.float32)
    before = queries.copy()
    indices, _ = database.search(queries, 5)
    assert ((indices >= 0) & (indices < 2000)).all()
    np.testing.assert_array_equal(queries, before)


def test_a_query_has_the_same_result_alone_and_in_a_batch(database):
    queries = queries_of(30)
    together = database.search(queries, 10)
    for row, query in enumerate(queries):
        alone = database.search(query[None], 10)
        np.testing.assert_allclose(alone[1][0], together[1][row], atol=1e-6)


@pytest.mark.parametrize(("shape", "k"), [((2, DIMS + 1), 1), ((DIMS,), 1), ((2, DIMS), 0)])
def test_queries_of_other_dimensions_and_zero_captions_are_an_internal_error(database, shape, k):
    with pytest.raises(ValueError, match=r"dimensions|at least 1"):
        database.search(np.zeros(shape, np.float32), k)


def test_concurrent_reads_equal_sequential_ones(database):
    queries = queries_of(64)
    alone = [database.search(query[None], 10)[0].tolist() for query in queries]
    every = database.captions(range(2000))

    def read(row):
        found = database.search(queries[row : row + 1], 10)[0]
        assert database.captions(found[0]) == [every[index] for index in found[0]]
        return found.tolist()

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(read, list(range(64)) * 4)) == alone * 4


def test_only_centroids_are_kept_in_memory(database):
    assert database.nbytes_resident < 2 * DIMS * 2000


def test_the_manifest_describes_the_database(database):
    manifest = database.manifest
    assert (manifest.captions, manifest.dims, manifest.name) == (2000, DIMS, "scenes")
    assert (manifest.model, manifest.fingerprint, manifest.licence) == ("rows by hash", MODEL, "CC0")
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest
    assert manifest.generation == database.generation
    assert replace(manifest, created_at="another day").generation == database.generation
    assert replace(manifest, licence="MIT").generation != database.generation


def test_a_database_of_another_model_is_rejected_with_advice(folder):
    with pytest.raises(ConfigurationError, match="another model, 'rows by hash'; use that model, or build the"):
        CaptionDatabase.open(folder, fingerprint="of other rows")


def test_a_folder_without_a_database_is_an_error(tmp_path):
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(StoreError, match="contains no caption database; build one"):
            CaptionDatabase.open(place, fingerprint=MODEL)


@pytest.mark.parametrize("content", ["", "../../etc", "0123", "f" * 17])
def test_a_damaged_pointer_is_an_error_and_reads_no_other_folder(own, content):
    (own / CURRENT).write_text(content)
    with pytest.raises(StoreError, match="current' is damaged"):
        CaptionDatabase.open(own, fingerprint=MODEL)


@pytest.mark.parametrize("name", [*DATA_FILES, MANIFEST])
def test_a_missing_file_is_an_error_with_its_name(own, name):
    (generation_of(own) / name).unlink()
    with pytest.raises(StoreError, match=name):
        CaptionDatabase.open(own, fingerprint=MODEL)


@pytest.mark.parametrize("name", DATA_FILES)
@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_of_another_size_is_an_error_with_its_name(own, name, change):
    file = generation_of(own) / name
    content = file.read_bytes()
    file.write_bytes(content[:-1] if change < 0 else content + b"x")
    with pytest.raises(StoreError, match=rf"{name}' has \d+ bytes instead of \d+; build the database again"):
        CaptionDatabase.open(own, fingerprint=MODEL)


@pytest.mark.parametrize("name", DATA_FILES)
def test_modified_content_is_detected_by_the_checksum(own, name):
    file = generation_of(own) / name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(StoreError, match=f"{name}' is damaged, its checksum"):
        CaptionDatabase.open(own, fingerprint=MODEL, verify=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_index_is_an_error_even_with_the_expected_size(tmp_path, kind):
    folder = made(tmp_path / "own", exact_up_to=KINDS[kind])
    place = generation_of(folder)
    manifest = json.loads((place / MANIFEST).read_text())
    content = (place / INDEX).read_bytes()
    for size in (0, 3, 100, len(content) // 2, len(content) - 1):
        (place / INDEX).write_bytes(content[:size])
        manifest["files"][INDEX]["bytes"] = size
        (place / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(StoreError, match=r"the index '.*' cannot be read"):
            CaptionDatabase.open(folder, fingerprint=MODEL)


def test_an_index_of_other_rows_is_rejected(database, folder):
    features = np.load(generation_of(folder) / FEATURES)
    for other in (features[1:], features[:, 1:]):
        with pytest.raises(StoreError, match="build the database again"):
            CaptionIndex.open(generation_of(folder) / INDEX, other, database.manifest.index)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": 1}', '{"format": "one"}', "\x00", '{"format": 1e999}', "[" * 10**5]
)
def test_a_damaged_manifest_is_an_error(own, content):
    (generation_of(own) / MANIFEST).write_text(content)
    with pytest.raises(StoreError, match=r"manifest\.json' is damaged; build the database again"):
        CaptionDatabase.open(own, fingerprint=MODEL)


def test_a_newer_format_is_rejected(own):
    file = generation_of(own) / MANIFEST
    file.write_text(json.dumps({"format": 2, "no_progress": "of"}))
    with pytest.raises(StoreError, match="has format 2, and this release reads up to 1; use a newer release"):
        CaptionDatabase.open(own, fingerprint=MODEL)


@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
def test_features_of_another_type_are_rejected(own, dtype):
    file = generation_of(own) / FEATURES
    manifest = json.loads((generation_of(own) / MANIFEST).read_text())
    np.save(file, np.load(file).astype(dtype))
    manifest["files"][FEATURES]["bytes"] = file.stat().st_size
    (generation_of(own) / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match="has type"):
        CaptionDatabase.open(own, fingerprint=MODEL)


@pytest.mark.parametrize("kind", KINDS)
def test_an_open_database_can_be_read_after_it_was_replaced_and_pruned(tmp_path, kind):
    folder = made(tmp_path / "scenes", CAPTIONS[:1000], exact_up_to=KINDS[kind])
    reader = CaptionDatabase.open(folder, fingerprint=MODEL)
    queries = queries_of(20)
    before = reader.search(queries, 5)[0]
    every = reader.captions(range(1000))

    newer = [f"new {caption}" for caption in CAPTIONS[:1000]]
    made(folder, newer, exact_up_to=KINDS[kind])
    assert prune(folder) == [reader.generation]
    assert not (folder / reader.generation).exists()

    np.testing.assert_array_equal(reader.search(queries, 5)[0], before)
    assert reader.captions(before[0]) == [every[index] for index in before[0]]
    np.testing.assert_allclose(reader.features(before[0]), features_of(reader.captions(before[0])), atol=1e-3)
    again = CaptionDatabase.open(folder, fingerprint=MODEL)
    assert set(again.captions(range(1000))) == set(newer)


def test_a_database_can_be_opened_at_any_time_while_it_is_replaced_repeatedly(tmp_path):
    folder = made(tmp_path / "scenes", CAPTIONS[:20])
    done = False

    def read():
        seen = set()
        while not done:
            database = CaptionDatabase.open(folder, fingerprint=MODEL)
            assert len(database.captions(range(len(database)))) == len(database)
            seen.add(database.generation)
        return seen

    with ThreadPoolExecutor(2) as threads:
        reading = [threads.submit(read) for _ in range(2)]
        try:
            for count in range(21, 36):
                made(folder, CAPTIONS[:count])
                prune(folder)
        finally:
            done = True
    assert all(len(item.result()) > 1 for item in reading)
