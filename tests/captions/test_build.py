import os
import resource
import signal
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from app.captions.build import BuildOptions, build
from app.captions.cleaning import Counts, clean_captions
from app.captions.database import CaptionDatabase
from app.captions.generations import CURRENT, building_folder, current_generation, disk_errors, prune
from app.captions.manifest import FEATURES, INDEX, MANIFEST
from app.captions.texts import TEXTS
from app.errors import ConflictError, InvalidFieldError, StoreError
from app.runtime.atomic_files import temporary_for
from tests.captions.build_until_killed import COUNT, DIMS, OPTIONS, build_all, captions, features_of

ROOT = Path(__file__).parents[2]
MODEL = "of these rows"


def made(captions, folder, *, encode=features_of, fingerprint=MODEL, **options):
    known = {"counts", "advance", "queries"} & options.keys()
    passed = {name: options.pop(name) for name in known}
    return build(
        captions,
        folder,
        encode=encode,
        fingerprint=fingerprint,
        name="scenes",
        options=BuildOptions(**options),
        **passed,
    )


def opened(folder):
    return CaptionDatabase.open(folder, fingerprint=MODEL, verify=True)


def checksums(folder):
    """Return the checksum of every file of the current generation except the manifest, which has the time."""
    place = folder / current_generation(folder)
    return {file.name: sha256(file.read_bytes()).hexdigest() for file in place.iterdir() if file.name != MANIFEST}


class Encoder:
    """Counts the captions that it encodes, and raises an error after ``fails_after`` of them."""

    def __init__(self, fails_after=None):
        self.encoded = 0
        self.fails_after = fails_after

    def __call__(self, texts):
        if self.fails_after is not None and self.encoded >= self.fails_after:
            raise RuntimeError("the encoder has gone")
        self.encoded += len(texts)
        return features_of(texts)


# Content


@pytest.mark.parametrize("count", [1, 2, 127, 128, 129])
def test_a_database_has_every_caption_in_order(tmp_path, count):
    every = [f"caption {number}" for number in range(count)]
    manifest = made(every, tmp_path / "db", shard_size=64, batch_size=10)
    database = opened(tmp_path / "db")
    assert database.captions(range(len(database))) == every
    assert database.manifest == manifest
    indices, cosines = database.search(features_of(every), 1)
    np.testing.assert_array_equal(indices[:, 0], np.arange(count))
    np.testing.assert_allclose(cosines, 1, atol=2e-3)
    assert (manifest.recall_at, set(manifest.recall.values())) == (min(10, count), {1.0})


@pytest.mark.parametrize("every", [[], ["a", "b"]])
def test_a_source_without_captions_is_rejected_and_nothing_is_written(tmp_path, every):
    counts = Counts()
    with pytest.raises(InvalidFieldError, match=r"no captions are left; \d were read, and 0 could not be read"):
        made(clean_captions(every, counts=counts), tmp_path / "db", counts=counts)
    with pytest.raises(StoreError, match="contains no caption database"):
        opened(tmp_path / "db")


def test_identical_captions_are_stored_once(tmp_path):
    counts = Counts()
    manifest = made(clean_captions(["a dog"] * 500, counts=counts), tmp_path / "db", counts=counts)
    assert manifest.captions == 1
    assert (manifest.counts["duplicates"], manifest.counts["kept"]) == (499, 1)


def test_a_large_database_is_searched_in_part_with_the_target_recall(tmp_path):
    manifest = made(captions(), tmp_path / "db", exact_up_to=500)
    assert manifest.index.kind == "ivf-pq"
    assert manifest.index.lists == int(2 * COUNT**0.5)
    assert manifest.index.code_bytes == DIMS // 8
    assert 0 < manifest.index.probes <= manifest.index.lists
    assert min(manifest.recall.values()) >= 0.95
    assert (tmp_path / "db" / manifest.generation / INDEX).stat().st_size < COUNT * 2 * DIMS


def test_probes_are_the_smallest_number_that_reaches_the_target(tmp_path):
    every = list(captions())[:1000]
    strict, lax = (made(every, tmp_path / f"{recall}", exact_up_to=500, recall=recall) for recall in (0.99, 0.05))
    assert lax.index.probes == 1
    assert strict.index.probes > 1
    assert strict.index.probes == strict.index.lists or strict.index.probes.bit_count() == 1


def test_recall_can_be_measured_with_images(tmp_path):
    rows = np.random.default_rng(0).standard_normal((20, DIMS)).astype(np.float32)
    images = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert set(made(captions(), tmp_path / "db", exact_up_to=500, queries=images).recall) == {"images"}


@pytest.mark.parametrize("dims", [3, 17, 20])
def test_features_of_any_number_of_dimensions_can_be_indexed(tmp_path, dims):
    def encode(texts):
        rows = features_of(texts)[:, :dims]
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    manifest = made(captions(), tmp_path / "db", encode=encode, exact_up_to=500)
    assert manifest.dims == dims
    assert dims % manifest.index.code_bytes == 0
    database = opened(tmp_path / "db")
    assert database.captions(database.search(encode(["kind1 in scene 1"]), 1)[0][0]) == ["kind1 in scene 1"]


def test_near_duplicates_are_removed_on_request(tmp_path):
    def encode(texts):  # texts with the same first words are near duplicates
        rows = features_of([text.split()[0] for text in texts]) + 1e-3 * features_of(texts)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    every = [f"kind{number % 40} in scene {number}" for number in range(400)]
    assert made(every, tmp_path / "all", encode=encode).captions == 400
    manifest = made(every, tmp_path / "few", encode=encode, near_duplicates=0.97)
    assert opened(tmp_path / "few").captions(range(40)) == every[:40]
    assert (manifest.captions, manifest.counts["near_duplicates"], manifest.counts["kept"]) == (40, 360, 40)


def test_near_duplicates_are_compared_with_kept_captions_only(tmp_path):
    angles = np.deg2rad([0, 10, 20, 30])  # the second resembles the first, the third only the second

    def encode(texts):
        return np.array([[np.cos(angles[int(text)]), np.sin(angles[int(text)])] for text in texts], np.float32)

    made("0123", tmp_path / "db", encode=encode, near_duplicates=0.97)
    assert opened(tmp_path / "db").captions(range(2)) == ["0", "2"]


def test_each_step_is_reported(tmp_path):
    reported = []
    made(captions(), tmp_path / "db", shard_size=512, advance=lambda *step: reported.append(step))
    assert reported == [
        *(("encode", done) for done in (512, 1024, 1536, 2000)),
        *((stage, 2000) for stage in ("assemble", "index", "measure")),
    ]


@pytest.mark.parametrize(
    "rows",
    [np.ones((1, 4)), np.full((2, 4), np.nan), np.zeros((2, 4)), np.ones(4), np.ones((2, 4))],
)
def test_rows_that_are_not_unit_or_of_the_wrong_number_are_an_internal_error(tmp_path, rows):
    with pytest.raises(ValueError, match="the encoder returned"):
        made(["one", "two"], tmp_path / "db", encode=lambda _: rows)


def test_rows_of_different_lengths_are_an_internal_error(tmp_path):
    with pytest.raises(ValueError, match="the encoder returned 2 dimensions, and 3 before"):
        made(["abc", "ab"], tmp_path / "db", encode=lambda texts: np.eye(len(texts[0]))[:1], shard_size=1)


@pytest.mark.parametrize("options", [{"shard_size": 0}, {"batch_size": 0}, {"recall": 0}, {"recall": 1.1}])
def test_invalid_options_are_rejected(tmp_path, options):
    with pytest.raises(ValueError, match="BuildOptions"):
        made(["one"], tmp_path / "db", **options)


# Interruption


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "db"
    build_all(folder)
    return folder


def start(folder, until):
    """Run a build and kill it when it prints a line, if one is given. Return its exit status and its output."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    script = Path(__file__).with_name("build_until_killed.py")
    environment = os.environ | {"PYTHONPATH": path}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, script, folder], env=environment, **pipes) as process:
        lines = []
        for line in process.stdout:
            lines.append(line.strip())
            if lines[-1] == until:
                process.kill()
            elif line.startswith(("assemble", "index", "measure")):
                process.stdin.write("\n")
                process.stdin.flush()
        process.wait()
    return process.returncode, lines


def test_a_build_killed_three_times_encodes_nothing_twice_and_writes_the_same_bytes(tmp_path, uninterrupted):
    folder = tmp_path / "db"
    encoded = 0
    for until in ("encode 384", "encode 1280", "index 2000"):
        status, lines = start(folder, until)
        assert status == -signal.SIGKILL
        encoded += sum(int(line.split()[1]) for line in lines if line.startswith("encoding"))
        assert not (folder / CURRENT).exists()
    status, lines = start(folder, None)
    assert status == 0
    assert not any(line.startswith("encoding") for line in lines)
    # At each kill, the unfinished shard may have been encoded in vain.
    assert COUNT <= encoded <= COUNT + 3 * OPTIONS.shard_size
    assert checksums(folder) == checksums(uninterrupted)
    assert current_generation(folder) == current_generation(uninterrupted)
    assert not building_folder(folder).exists()


def test_the_files_do_not_depend_on_the_number_of_threads(tmp_path):
    folders = [tmp_path / f"{threads}" for threads in (1, 2, 5)]
    for folder in folders:
        made(captions(), folder, exact_up_to=500, threads=int(folder.name))
    assert checksums(folders[0]) == checksums(folders[1]) == checksums(folders[2])
    assert len({current_generation(folder) for folder in folders}) == 1


def test_captions_with_identical_features_are_found(tmp_path):
    """All except one of the lists are empty."""
    every = [f"caption {number}" for number in range(300)]
    manifest = made(every, tmp_path / "db", encode=lambda texts: features_of(["one"] * len(texts)), exact_up_to=100)
    assert manifest.index.kind == "ivf-pq"
    indices, cosines = opened(tmp_path / "db").search(features_of(["one"]), 300)
    assert sorted(indices[0].tolist()) == list(range(300))
    np.testing.assert_allclose(cosines, 1, atol=2e-3)


def test_finished_shards_are_not_encoded_again(tmp_path, uninterrupted):
    failing, second = Encoder(fails_after=1000 // OPTIONS.shard_size * OPTIONS.shard_size + 1), Encoder()
    with pytest.raises(RuntimeError, match="has gone"):
        build_all(tmp_path / "db", encode=failing)
    build_all(tmp_path / "db", encode=second)
    assert second.encoded == COUNT - 1000 // OPTIONS.shard_size * OPTIONS.shard_size
    assert checksums(tmp_path / "db") == checksums(uninterrupted)


def failed_build(folder, every, fingerprint=MODEL):
    with pytest.raises(RuntimeError, match="has gone"):
        made(every, folder, encode=Encoder(fails_after=300), fingerprint=fingerprint, shard_size=100, batch_size=100)


def test_shards_of_other_captions_or_models_are_encoded_again_and_removed(tmp_path):
    every = [f"caption {number}" for number in range(400)]
    folder = tmp_path / "db"
    for other, fingerprint in [(["another", *every], MODEL), (every, "of other rows")]:
        failed_build(folder, other, fingerprint)
        shards = set((building_folder(folder) / "shards").iterdir())
        assert len(shards) == 3
        encoder = Encoder()
        made(every, folder, encode=encoder, shard_size=100)
        assert encoder.encoded == 400
        assert opened(folder).captions(range(400)) == every
        prune(folder)


@pytest.mark.parametrize(
    "damage", [lambda c: c[:-30], lambda c: b"", lambda c: c[:400] + bytes([c[400] ^ 1]) + c[401:]]
)
def test_a_damaged_shard_is_encoded_again(tmp_path, damage):
    every = [f"caption {number}" for number in range(400)]
    folder = tmp_path / "db"
    failed_build(folder, every)
    shard = sorted((building_folder(folder) / "shards").iterdir())[1]
    shard.write_bytes(damage(shard.read_bytes()))
    encoder = Encoder()
    made(every, folder, encode=encoder, shard_size=100)
    assert encoder.encoded == 200
    assert opened(folder).captions(range(400)) == every


def test_repeating_a_build_changes_nothing(tmp_path):
    first = made(captions(), tmp_path / "db")
    assert made(captions(), tmp_path / "db") == first
    assert prune(tmp_path / "db") == []


def test_repeating_a_build_repairs_damaged_files(tmp_path):
    manifest = made(["one", "two"], tmp_path / "db")
    file = tmp_path / "db" / manifest.generation / TEXTS
    file.write_bytes(b"twoone")
    with pytest.raises(StoreError, match="checksum"):
        opened(tmp_path / "db")
    made(["one", "two"], tmp_path / "db")
    assert opened(tmp_path / "db").captions([0, 1]) == ["one", "two"]


def test_the_files_do_not_depend_on_the_openmp_threads_of_the_process(tmp_path, uninterrupted):
    import faiss

    before = faiss.omp_get_max_threads()
    try:
        faiss.omp_set_num_threads(3)
        build_all(tmp_path / "db")
        assert faiss.omp_get_max_threads() == 3
    finally:
        faiss.omp_set_num_threads(before)
    assert checksums(tmp_path / "db") == checksums(uninterrupted)


# Concurrent builds and pruning


def test_concurrent_builds_in_one_folder_are_rejected(tmp_path):
    folder = tmp_path / "db"

    def encode(texts):
        with pytest.raises(ConflictError, match=r"another build for .* is running; wait for it, or stop it"):
            made(["other"], folder)
        return features_of(texts)

    made(["one"], folder, encode=encode)
    assert opened(folder).captions([0]) == ["one"]


def test_old_generations_are_kept_until_pruned(tmp_path):
    folder = tmp_path / "db"
    names = [made([f"caption {number}"], folder).generation for number in range(3)]
    assert current_generation(folder) == names[2]
    (folder / "notes").mkdir()
    assert prune(folder) == sorted(names[:2])
    assert opened(folder).captions([0]) == ["caption 2"]
    assert (folder / "notes").exists()


def test_the_next_build_removes_what_killed_processes_were_copying_or_removing(tmp_path):
    folder = tmp_path / "db"
    made(["one"], folder)
    for left in (tmp_path / "deleted.removed", folder / "0123456789abcdef.removed", folder / "0123456789abcdef.copied"):
        left.mkdir()
        (left / FEATURES).write_bytes(bytes(100))
    temporary_for(folder / CURRENT).write_bytes(b"half")
    current = made(["one", "two"], folder).generation
    prune(folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted([".lock", current, CURRENT])
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith("removed")] == []


def test_pruning_ignores_missing_databases_and_running_builds(tmp_path):
    with pytest.raises(StoreError, match="contains no caption database"):
        prune(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    made(["one"], tmp_path / "db")

    def encode(texts):
        with pytest.raises(ConflictError, match="is running"):
            prune(tmp_path / "db")
        return features_of(texts)

    made(["two"], tmp_path / "db", encode=encode)


# Disks

LARGE = 2**20


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(place)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except OSError:
        done = False
    if not done:
        pytest.skip("a small disk cannot be mounted here, which takes root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def wide(texts):
    """Return features of 512 dimensions, so that few captions fill a disk."""
    rows = np.repeat(features_of(texts), 16, axis=1)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


# The first number fills the disk with shards, the others during assembly and indexing.
@pytest.mark.parametrize("count", [2000, 900, 600])
def test_a_full_disk_is_an_error_and_keeps_the_old_database_and_the_shards(small_disk, count):
    folder = small_disk / "db"
    made(["the old one"], folder, encode=wide)
    before = checksums(folder)
    every = [f"caption {number}" for number in range(count)]
    with pytest.raises(StoreError, match=r"its disk is full; free some space, .* finished shards are kept"):
        made(every, folder, encode=wide, shard_size=100)
    assert checksums(folder) == before
    assert opened(folder).captions([0]) == ["the old one"]
    assert list((building_folder(folder) / "shards").iterdir())


def test_a_build_is_resumed_after_the_disk_has_free_space(small_disk):
    folder = small_disk / "db"
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(LARGE))
    every = [f"caption {number}" for number in range(300)]
    with pytest.raises(StoreError, match="is full"):
        made(every, folder, encode=wide, shard_size=100)
    kept = len(list((building_folder(folder) / "shards").iterdir()))
    ballast.unlink()
    encoded = []
    made(every, folder, encode=lambda texts: encoded.extend(texts) or wide(texts), shard_size=100)
    assert len(encoded) == 300 - 100 * kept
    assert opened(folder).captions(range(300)) == every


@pytest.fixture
def small_files():
    """Limit the size of files to 200,000 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("shard", [100, 300])
def test_a_file_size_limit_is_an_error_and_keeps_the_old_database(tmp_path, small_files, shard):
    folder = tmp_path / "db"
    made(["the old one"], folder, encode=wide)
    every = [f"caption {number}" for number in range(300)]
    with pytest.raises(StoreError, match=r"exceed the limit on file sizes; raise the limit \(ulimit -f\)"):
        made(every, folder, encode=wide, shard_size=shard)
    assert opened(folder).captions([0]) == ["the old one"]
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("blocked", ["db", "db.building"])
def test_a_folder_that_cannot_be_created_is_an_error(tmp_path, blocked):
    (tmp_path / blocked).write_text("a file")
    with pytest.raises(StoreError, match=rf"'.*{blocked}' cannot be built: .*or name another folder"):
        made(["one"], tmp_path / "db")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_an_error(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    with pytest.raises(StoreError, match="cannot be written; make it writable"):
        made(["one"], tmp_path / "locked" / "db")


def test_errors_of_writing_say_what_to_do():
    import errno

    for number, way_out in [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some space"),
        (errno.EFBIG, "ulimit"),
        (errno.EROFS, "make it writable"),
        (errno.EACCES, "make it writable"),
        (errno.EXDEV, "below the mounted one"),
        (errno.EIO, "check the disk"),
    ]:
        with pytest.raises(StoreError, match=way_out), disk_errors(Path("captions")):
            raise OSError(number, os.strerror(number))


def test_features_are_stored_once_in_half_precision(tmp_path):
    manifest = made(captions(), tmp_path / "db")
    assert manifest.files[FEATURES]["bytes"] == 128 + 2 * DIMS * COUNT
