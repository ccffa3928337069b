"""Bulk classification on a real Ray: the rows of one process, crashes of replicas, and replicas that differ."""

import gc
import importlib.util
import os
import shutil
import sys
import tempfile
import warnings
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import app.bulk.ray_engine as module
from app.bulk.classifier import BulkClassifier
from app.bulk.ray_engine import Replica, ReplicaPool, ray_engine
from app.bulk.request import BulkRequest
from app.bulk.run import prepare_run, process_engine, run_bulk, service_in_loop
from app.classification.request import ClassifyRequest
from app.encoders.fake import FakeEncoder
from app.errors import InvalidFieldError, NotReadyError, ServerError, StoreError
from app.types import ClassEntry
from tests.bulk import replica_encoders
from tests.conftest import picture

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra ray"),
    # Ray Data sets fields of its own that it calls deprecated.
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\."),
]

CLASSES = (
    ClassEntry("rose", features=("red petals", "green thorns"), descriptions=("A rose is often red.",)),
    ClassEntry("meadow", features=("green grass",), synonyms=("lawn",)),
    ClassEntry("sky", prompt="the blue {}"),
)
QUERIES = {
    "labels": ClassifyRequest(labels=["red", "green", "blue"], reject_below=0.5),
    "a label set with descriptions": ClassifyRequest(label_set="nature", method="cupl-ensemble"),
}


@pytest.fixture(scope="module")
def running_ray():
    """One Ray for the module; the paths of its sockets must be short."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    folder = tempfile.mkdtemp(prefix="ray-")
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 * 2**20,
        _temp_dir=folder,
    )
    yield ray
    with warnings.catch_warnings():
        # Ray does not wait for the processes that it stops.
        warnings.simplefilter("ignore", ResourceWarning)
        ray.shutdown()
        gc.collect()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for number in range(90):
        colour = tuple(rng.integers(0, 256, 3).tolist())
        (tmp_path / "photos" / f"{number:02}.png").write_bytes(picture(colour))
    (tmp_path / "photos" / "words.png").write_text("words")
    return tmp_path / "photos"


class ProgressSum:
    """Adds up the progress of a run."""

    def __init__(self):
        self.images = self.bad = 0
        self.done_before = None

    def warn(self, message):
        pass

    def start(self, manifest, done):
        self.done_before = done.images

    def advance(self, images, bad):
        self.images += images
        self.bad += bad


@pytest.fixture
def bulk(settings, photos, tmp_path):
    """Run a bulk classification in process, or on Ray with an encoder loader."""

    def run(query, out, load=None, replicas=1, progress=None, replica_settings=settings, engine=None):
        request = BulkRequest([photos], tmp_path / out, part_images=10)
        with service_in_loop(settings, [FakeEncoder()]) as (loop, service):
            loop.run(service.label_sets.put("nature", CLASSES, "photo"))
            spec = loop.run(
                prepare_run(service, replace(query, label_set=query.label_set and "nature@1"), request, 10**6)
            )
            if load is not None:
                engine = ray_engine(replica_settings, ReplicaPool(replicas, replicas), load)
            return run_bulk(request, spec, engine or process_engine(loop, service), progress or ProgressSum())

    return run


def rows_of(folder):
    return pq.read_table(folder).to_pylist()


@pytest.mark.parametrize("query", QUERIES.values(), ids=QUERIES)
def test_replicas_write_the_rows_of_one_process(running_ray, bulk, tmp_path, query):
    alone, progress = bulk(query, "alone"), ProgressSum()

    together = bulk(query, "together", replica_encoders.load_fake, replicas=2, progress=progress)

    assert together == alone
    assert (together.images, together.bad) == (91, 1) == (progress.images, progress.bad)
    assert rows_of(tmp_path / "together") == rows_of(tmp_path / "alone")


def test_replicas_need_no_database_of_label_sets(running_ray, bulk, tmp_path, settings):
    """Replicas get the classes with the task; their own database has no label sets."""
    (tmp_path / "elsewhere").mkdir()
    elsewhere = settings.model_copy(update={"data_dir": tmp_path / "elsewhere"})
    query = QUERIES["a label set with descriptions"]
    bulk(query, "together", replica_encoders.load_fake, replica_settings=elsewhere)
    bulk(query, "alone")
    assert rows_of(tmp_path / "together") == rows_of(tmp_path / "alone")


def test_replicas_of_a_method_that_learns_need_the_same_examples(running_ray, bulk, tmp_path, settings):
    query = ClassifyRequest(label_set="nature", method="gda")
    bulk(query, "alone")
    bulk(query, "together", replica_encoders.load_fake)
    assert rows_of(tmp_path / "together") == rows_of(tmp_path / "alone")
    (tmp_path / "elsewhere").mkdir()
    elsewhere = settings.model_copy(update={"data_dir": tmp_path / "elsewhere"})
    with pytest.raises(ServerError, match="unknown label set 'nature'"):
        bulk(query, "other", replica_encoders.load_fake, replica_settings=elsewhere)


def test_a_run_of_one_engine_is_resumed_by_the_other(running_ray, bulk, tmp_path):
    query = QUERIES["labels"]
    bulk(query, "alone")
    for out, load in (("ray first", replica_encoders.load_fake), ("ray second", None)):
        bulk(query, out, load)
        for part in sorted((tmp_path / out).glob("part-*"))[2:7]:
            part.unlink()
        progress = ProgressSum()
        bulk(query, out, None if load else replica_encoders.load_fake, progress=progress)
        assert (progress.done_before, progress.images) == (41, 50)
        assert rows_of(tmp_path / out) == rows_of(tmp_path / "alone")


def test_another_replica_finishes_the_unit_of_a_replica_that_crashed(running_ray, bulk, tmp_path, settings):
    query = QUERIES["labels"]
    bulk(query, "alone")
    counts = bulk(query, "out", replica_encoders.load_crashing_once)
    assert (settings.data_dir / "crashed").exists()
    assert counts.images == 91
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "alone")


@pytest.fixture
def without_ray(monkeypatch):
    """Allow to create a replica without Ray."""
    context = SimpleNamespace(get_actor_id=lambda: "0a1b")
    monkeypatch.setattr(module, "_import_ray", lambda: SimpleNamespace(get_runtime_context=lambda: context))
    monkeypatch.setattr(module, "configure_logs", lambda *_: None)


def test_images_at_which_replicas_crash_repeatedly_are_named_and_end_the_run(bulk, settings, monkeypatch, without_ray):

    def engine(spec, pending, advance):
        first, second, *_ = (pa.Table.from_pylist([asdict(each)]) for each in pending)
        replica = Replica(settings, spec, replica_encoders.load_fake)
        with replica._resources:
            with monkeypatch.context() as crashing:
                crashing.setattr(BulkClassifier, "run", lambda *_: sys.exit("killed"))
                for _ in range(3):
                    with pytest.raises(SystemExit):
                        replica(second)
            outcomes = [replica(block).to_pylist()[0] for block in (first, second)]
        assert outcomes[0] == {"images": 10, "bad": 0, "failure": None}
        assert "3 replicas crashed, one after the other, at the 10 images from '10.png' of" in outcomes[1]["failure"]
        assert "repeat the command to resume" in outcomes[1]["failure"]
        assert [file.name for file in spec.folder.glob(".attempts*")] == [".attempts-00000001-000000"]

    with pytest.raises(StoreError):  # the other units are missing
        bulk(QUERIES["labels"], "out", engine=engine)
    assert bulk(QUERIES["labels"], "out").images == 91


def test_a_replica_that_crashes_at_every_start_ends_the_run(bulk, settings, without_ray):

    def engine(spec, pending, advance):
        block = pa.Table.from_pylist([asdict(next(pending))])
        for _ in range(3):
            with pytest.raises(SystemExit):
                Replica(settings, spec, lambda _: sys.exit("killed"))
        assert [file.name for file in spec.folder.glob(".attempts*")] == [".attempts-start-0a1b"]
        outcome = Replica(settings, spec, replica_encoders.load_fake)(block).to_pylist()[0]
        assert "it crashed 3 times during its start" in outcome["failure"]
        replica = Replica(settings, spec, replica_encoders.load_fake)
        with replica._resources:
            assert replica(block).to_pylist()[0]["failure"] is None
        assert not list(spec.folder.glob(".attempts*"))

    with pytest.raises(StoreError):  # the other units are missing
        bulk(QUERIES["labels"], "out", engine=engine)


@pytest.mark.parametrize(
    ("load", "reason"),
    [
        (replica_encoders.load_unavailable, "the weights are on another machine"),
        (replica_encoders.load_failing, "it does not start: no kernel image is available"),
        (replica_encoders.load_other_weights, "the model fingerprint is retrained here, and the run uses fake"),
    ],
)
def test_a_replica_that_cannot_load_the_same_model_ends_the_run(running_ray, bulk, tmp_path, load, reason):
    with pytest.raises(ServerError, match=reason):
        bulk(QUERIES["labels"], "out", load)
    assert not list((tmp_path / "out").glob("part-*"))


def test_parts_that_are_missing_in_the_shared_folder_end_the_run(running_ray, bulk, tmp_path, monkeypatch):
    """This happens if each node has its own ``--out``."""
    monkeypatch.setattr(module, "_run", lambda *_: None)
    with pytest.raises(StoreError, match=r"10 of 10 work units are missing in .* on a disk that all workers share"):
        bulk(QUERIES["labels"], "out", replica_encoders.load_fake)


def test_missing_gpus_and_an_unreachable_cluster_are_reported(bulk, monkeypatch):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)

    def unreachable(**_):
        raise ConnectionError("no such cluster")

    monkeypatch.setattr(ray, "init", unreachable)
    with pytest.raises(NotReadyError, match="Ray at 'local' cannot be reached: no such cluster"):
        bulk(QUERIES["labels"], "out", replica_encoders.load_fake)
    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 3.0})
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with pytest.raises(InvalidFieldError, match="1 replicas with 1 GPUs are requested, and this machine has 0"):
        module._connected(ReplicaPool(gpus=1)).__enter__()
