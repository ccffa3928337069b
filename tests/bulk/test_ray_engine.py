"""Bulk work on a real Ray of this machine: the rows of one process, replicas that die, and what replicas refuse."""

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
from app.bulk.run import BulkRequest, prepare_run, process_engine, run_bulk, service_in_loop
from app.classification.resolve import ClassifyRequest
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
QUESTIONS = {
    "labels": ClassifyRequest(labels=["red", "green", "blue"], reject_below=0.5),
    "a label set with descriptions": ClassifyRequest(label_set="nature", method="cupl-ensemble"),
}


@pytest.fixture(scope="module")
def running_ray():
    """One Ray for the module, whose sockets need a short path."""
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
        # Ray does not wait for the processes that it ends.
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


class Told:
    """Adds up what a run tells."""

    def __init__(self):
        self.images = self.bad = 0
        self.before = None

    def tell(self, note):
        pass

    def begin(self, manifest, done):
        self.before = done.images

    def advance(self, images, bad):
        self.images += images
        self.bad += bad


@pytest.fixture
def bulk(settings, photos, tmp_path):
    """Run bulk work in process, or on Ray with the encoders that a function loads."""

    def work(question, out, load=None, least=1, most=1, told=None, work_settings=settings, engine=None):
        order = BulkRequest([photos], tmp_path / out, part_images=10)
        with service_in_loop(settings, [FakeEncoder()]) as (loop, service):
            loop.run(service.label_sets.put("nature", CLASSES, "photo"))
            job = loop.run(
                prepare_run(service, replace(question, label_set=question.label_set and "nature@1"), order, 10**6)
            )
            if load is not None:
                engine = ray_engine(work_settings, ReplicaPool(least, most), load)
            return run_bulk(order, job, engine or process_engine(loop, service), told or Told())

    return work


def rows_of(folder):
    return pq.read_table(folder).to_pylist()


@pytest.mark.parametrize("question", QUESTIONS.values(), ids=QUESTIONS)
def test_replicas_write_the_rows_of_one_process(running_ray, bulk, tmp_path, question):
    alone, told = bulk(question, "alone"), Told()

    together = bulk(question, "together", replica_encoders.fake, least=2, most=2, told=told)

    assert together == alone
    assert (together.images, together.bad) == (91, 1) == (told.images, told.bad)
    assert rows_of(tmp_path / "together") == rows_of(tmp_path / "alone")


def test_replicas_need_no_database_of_label_sets(running_ray, bulk, tmp_path, settings):
    """The question travels; where a replica runs there may be none of the label sets."""
    (tmp_path / "elsewhere").mkdir()
    elsewhere = settings.model_copy(update={"data_dir": tmp_path / "elsewhere"})
    question = QUESTIONS["a label set with descriptions"]
    bulk(question, "together", replica_encoders.fake, work_settings=elsewhere)
    bulk(question, "alone")
    assert rows_of(tmp_path / "together") == rows_of(tmp_path / "alone")


def test_replicas_that_learn_need_the_same_examples(running_ray, bulk, tmp_path, settings):
    question = ClassifyRequest(label_set="nature", method="gda")
    bulk(question, "alone")
    bulk(question, "together", replica_encoders.fake)
    assert rows_of(tmp_path / "together") == rows_of(tmp_path / "alone")
    (tmp_path / "elsewhere").mkdir()
    elsewhere = settings.model_copy(update={"data_dir": tmp_path / "elsewhere"})
    with pytest.raises(ServerError, match="unknown label set 'nature'"):
        bulk(question, "other", replica_encoders.fake, work_settings=elsewhere)


def test_a_run_of_one_engine_is_continued_by_the_other(running_ray, bulk, tmp_path):
    question = QUESTIONS["labels"]
    bulk(question, "alone")
    for out, load in (("ray first", replica_encoders.fake), ("ray second", None)):
        bulk(question, out, load)
        for part in sorted((tmp_path / out).glob("part-*"))[2:7]:
            part.unlink()
        told = Told()
        bulk(question, out, None if load else replica_encoders.fake, told=told)
        assert (told.before, told.images) == (41, 50)
        assert rows_of(tmp_path / out) == rows_of(tmp_path / "alone")


def test_what_a_replica_did_not_finish_when_it_died_is_done_by_another(running_ray, bulk, tmp_path, settings):
    question = QUESTIONS["labels"]
    bulk(question, "alone")
    totals = bulk(question, "out", replica_encoders.dying)
    assert (settings.data_dir / "died").exists()
    assert totals.images == 91
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "alone")


@pytest.fixture
def alone(monkeypatch):
    """A replica can be made without Ray."""
    context = SimpleNamespace(get_actor_id=lambda: "0a1b")
    monkeypatch.setattr(module, "_ray", lambda: SimpleNamespace(get_runtime_context=lambda: context))
    monkeypatch.setattr(module, "configure_logs", lambda *_: None)


def test_images_at_which_replicas_die_again_and_again_end_the_run_and_are_named(bulk, settings, monkeypatch, alone):

    def engine(work, remaining, advance):
        first, second, *_ = (pa.Table.from_pylist([asdict(each)]) for each in remaining)
        replica = Replica(settings, work, replica_encoders.fake)
        with replica._opened:
            with monkeypatch.context() as dying:
                dying.setattr(BulkClassifier, "run", lambda *_: sys.exit("killed"))
                for _ in range(3):
                    with pytest.raises(SystemExit):
                        replica(second)
            told = [replica(block).to_pylist()[0] for block in (first, second)]
        assert told[0] == {"images": 10, "bad": 0, "failed": None}
        assert "3 replicas died, one after the other, at the 10 images from '10.png' on of" in told[1]["failed"]
        assert "the same command goes on" in told[1]["failed"]
        assert [file.name for file in work.folder.glob(".tried*")] == [".tried-00000001-000000"]

    with pytest.raises(StoreError):  # the rest is not done
        bulk(QUESTIONS["labels"], "out", engine=engine)
    assert bulk(QUESTIONS["labels"], "out").images == 91


def test_a_replica_that_dies_whenever_it_is_started_ends_the_run(bulk, settings, alone):

    def engine(work, remaining, advance):
        block = pa.Table.from_pylist([asdict(next(remaining))])
        for _ in range(3):
            with pytest.raises(SystemExit):
                Replica(settings, work, lambda _: sys.exit("killed"))
        assert [file.name for file in work.folder.glob(".tried*")] == [".tried-start-0a1b"]
        told = Replica(settings, work, replica_encoders.fake)(block).to_pylist()[0]
        assert "it died 3 times before it had started" in told["failed"]
        replica = Replica(settings, work, replica_encoders.fake)
        with replica._opened:
            assert replica(block).to_pylist()[0]["failed"] is None
        assert not list(work.folder.glob(".tried*"))

    with pytest.raises(StoreError):  # the rest is not done
        bulk(QUESTIONS["labels"], "out", engine=engine)


@pytest.mark.parametrize(
    ("load", "reason"),
    [
        (replica_encoders.broken, "the weights are on another machine"),
        (replica_encoders.crashing, "it does not start: no kernel image is available"),
        (replica_encoders.other_weights, "the model fingerprint is retrained here, and the run is about fake"),
    ],
)
def test_a_replica_that_would_answer_otherwise_ends_the_run(running_ray, bulk, tmp_path, load, reason):
    with pytest.raises(ServerError, match=reason):
        bulk(QUESTIONS["labels"], "out", load)
    assert not list((tmp_path / "out").glob("part-*"))


def test_parts_that_are_not_in_the_shared_folder_are_missed(running_ray, bulk, tmp_path, monkeypatch):
    """As where each node has an ``--out`` of its own."""
    monkeypatch.setattr(module, "_run", lambda *_: None)
    with pytest.raises(StoreError, match=r"10 of 10 pieces are not in .* on a disk that they share"):
        bulk(QUESTIONS["labels"], "out", replica_encoders.fake)


def test_more_than_there_is_and_clusters_that_are_not_there_are_told(tmp_path, bulk, monkeypatch):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)

    def unreachable(**_):
        raise ConnectionError("no such cluster")

    monkeypatch.setattr(ray, "init", unreachable)
    with pytest.raises(NotReadyError, match="Ray at 'local' cannot be reached: no such cluster"):
        bulk(QUESTIONS["labels"], "out", replica_encoders.fake)
    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 3.0})
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with pytest.raises(InvalidFieldError, match="1 times 1 GPUs are wanted, and there are 0"):
        on_ray_with_gpus(bulk)


def on_ray_with_gpus(bulk):
    with module._connected(ReplicaPool(gpus=1)):
        pytest.fail("it went on")
