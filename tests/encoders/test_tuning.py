"""How the way to run an image tower is chosen, and remembered; no time of this machine is asserted."""

import json

import numpy as np
import pytest
import torch

from app.encoders import tuning
from app.encoders._base import Candidate, LoadOptions, Trial, Tuning
from app.encoders.embedded import load_embedded
from app.encoders.tuning import MIN_COSINE, candidates, fingerprint_of, measure, probe_images, select
from app.errors import ModelUnavailableError

FP32, BF16, ONE = Candidate("torch", "fp32", 2), Candidate("torch", "bf16", 2), Candidate("torch", "fp32", 1)
OPENVINO = Candidate("openvino", "fp32", 2)
DEFAULTS = LoadOptions(tuning_seconds=5)


@pytest.fixture(autouse=True)
def _a_machine(monkeypatch):
    monkeypatch.setattr(tuning, "usable_cores", lambda: 2)
    monkeypatch.setattr(tuning, "has_bf16_instructions", lambda: True)
    monkeypatch.setattr(tuning, "openvino_is_installed", lambda: True)


class Clock:
    """Time passes only while a tower computes."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Tower:
    """Takes as long as it is told to, for each batch size; ``off`` turns its features away from the true ones."""

    def __init__(self, clock, seconds=lambda size: 0.01 * size, off=0.0, room=1000):
        self.clock, self.seconds, self.off, self.room = clock, seconds, off, room
        self.sizes = []

    def begin(self, pixels):
        self.sizes.append(len(pixels))
        if len(pixels) > self.room:
            raise MemoryError("no room")

        def wait():
            self.clock.now += self.seconds(len(pixels))
            rows = np.zeros((len(pixels), 4), np.float32)
            rows[:, 0], rows[:, 1] = np.cos(self.off), np.sin(self.off)
            return rows

        return wait


def measured(towers, *, seconds=60.0, device="cpu", clock=None):
    return measure(device, list(towers), towers.__getitem__, probe_images(8), seconds=seconds, clock=clock)


def a_tuning(*trials):
    return Tuning(device="cpu", trials=trials)


def a_trial(way, rates, **others):
    return Trial(candidate=way, min_cosine=1.0, images_per_s=rates, **others)


# --- the choice ----------------------------------------------------------------------------------------------------


def test_the_fastest_way_is_chosen_with_the_smallest_batch_that_is_nearly_as_fast():
    path = a_tuning(
        a_trial(FP32, {1: 10.0, 2: 12.0, 4: 13.0}), a_trial(BF16, {1: 20.0, 2: 39.0, 4: 40.0, 8: 41.0, 16: 30.0})
    ).image_path()
    assert (path.backend, path.precision, path.threads) == ("torch", "bf16", 2)
    assert (path.batch_size, path.images_per_s) == (2, 39.0)


def test_where_larger_batches_are_slower_the_batch_is_one():
    assert a_tuning(a_trial(FP32, {1: 95.0, 2: 60.0, 4: 25.0})).image_path().batch_size == 1


def test_what_was_refused_is_not_chosen_however_fast():
    refused = a_trial(BF16, {1: 1000.0}, refused="wrong")
    assert a_tuning(refused, a_trial(FP32, {1: 1.0})).image_path().precision == "fp32"
    assert a_tuning(refused).image_path() is None


# --- measuring -----------------------------------------------------------------------------------------------------


def test_the_rate_is_that_of_each_batch_size():
    clock = Clock()
    found = measured({FP32: Tower(clock, lambda size: 0.02 + 0.01 * size)}, clock=clock)
    rates = found.trials[0].images_per_s
    assert rates == {size: pytest.approx(size / (0.02 + 0.01 * size), rel=1e-3) for size in (1, 2, 4, 8, 16, 32)}
    assert found.trials[0].min_cosine == pytest.approx(1.0)


def test_larger_batches_are_not_tried_where_they_stopped_to_gain():
    clock = Clock()
    found = measured({FP32: Tower(clock, lambda size: 0.01 * size**1.5)}, clock=clock)
    assert list(found.trials[0].images_per_s) == [1, 2, 4]


def test_a_way_that_is_far_behind_is_not_tried_in_large_batches():
    clock = Clock()
    slow = Tower(clock, lambda size: 0.05 * size**0.9)
    found = measured({BF16: Tower(clock, lambda size: 0.01 * size), FP32: slow}, clock=clock)
    assert max(found.trials[1].images_per_s) <= 4
    assert found.best.candidate == BF16


@pytest.mark.parametrize("off", [0.06, float("nan")])
def test_a_way_whose_features_differ_is_refused_before_it_is_timed(off):
    clock = Clock()
    wrong = Tower(clock, lambda size: 1e-6, off=off)
    found = measured({FP32: Tower(clock), BF16: wrong}, clock=clock)
    assert "differ from single precision" in found.trials[1].refused
    assert wrong.sizes == [16]
    assert found.best.candidate == FP32


def test_features_that_differ_less_than_the_bound_are_no_reason():
    clock = Clock()
    found = measured({FP32: Tower(clock), BF16: Tower(clock, off=0.04)}, clock=clock)
    assert MIN_COSINE < found.trials[1].min_cosine < 1
    assert found.trials[1].refused is None


def test_a_way_that_raises_is_refused_with_its_reason_and_the_others_are_tried():
    clock = Clock()

    def build(way):
        if way == OPENVINO:
            raise RuntimeError("cannot\nconvert")
        return Tower(clock)

    found = measure("cpu", [OPENVINO, FP32], build, probe_images(8), seconds=60, clock=clock)
    assert found.trials[0].refused == "RuntimeError: cannot convert"
    assert found.best.candidate == FP32


def test_a_batch_that_the_memory_has_no_room_for_ends_the_curve_and_not_the_way():
    clock = Clock()
    (trial,) = measured({FP32: Tower(clock, lambda size: 0.02 + 0.01 * size, room=16)}, clock=clock).trials
    assert (max(trial.images_per_s), trial.refused) == (16, None)


def test_when_the_time_is_up_every_way_has_been_tried_with_one_image():
    clock = Clock()
    found = measured({way: Tower(clock, lambda size: size) for way in (FP32, BF16, ONE)}, seconds=0.1, clock=clock)
    assert [list(trial.images_per_s) for trial in found.trials] == [[1], [1], [1]]


def test_on_a_gpu_the_precision_is_not_questioned_and_batches_are_large():
    clock = Clock()
    found = measured({Candidate("torch", "fp16", 0): Tower(clock, lambda size: 0.1)}, device="cuda", clock=clock)
    assert (found.trials[0].min_cosine, max(found.trials[0].images_per_s)) == (None, 256)
    assert found.image_path().device == "cuda"


# --- what may be tried ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, [("openvino", "fp32"), ("openvino", "bf16"), ("torch", "fp32"), ("torch", "bf16"), ("torch", "fp32")]),
        ({"backend": "torch"}, [("torch", "fp32"), ("torch", "bf16"), ("torch", "fp32")]),
        ({"backend": "openvino", "precision": "fp32"}, [("openvino", "fp32")]),
        ({"precision": "bf16"}, [("openvino", "bf16"), ("torch", "bf16")]),
        ({"precision": "fp16"}, [("torch", "fp16")]),
    ],
)
def test_settings_restrict_what_is_tried_on_a_cpu(options, wanted):
    assert [(way.backend, way.precision) for way in candidates("cpu", LoadOptions(**options))] == wanted


def test_without_the_instructions_half_precision_is_tried_only_if_it_was_asked_for(monkeypatch):
    monkeypatch.setattr(tuning, "has_bf16_instructions", lambda: False)
    assert {way.precision for way in candidates("cpu", LoadOptions())} == {"fp32"}
    assert {way.precision for way in candidates("cpu", LoadOptions(precision="bf16"))} == {"bf16"}


def test_without_openvino_torch_remains(monkeypatch):
    monkeypatch.setattr(tuning, "openvino_is_installed", lambda: False)
    assert {way.backend for way in candidates("cpu", LoadOptions())} == {"torch"}
    with pytest.raises(ModelUnavailableError, match=r"deixis\[openvino\]"):
        candidates("cpu", LoadOptions(backend="openvino"))


@pytest.mark.parametrize(
    ("device", "precision", "wanted"),
    [("cuda:1", "auto", "fp16"), ("cuda", "bf16", "bf16"), ("mps", "auto", "fp32"), ("mps", "fp16", "fp16")],
)
def test_an_accelerator_has_one_way(device, precision, wanted):
    assert candidates(device, LoadOptions(precision=precision)) == [Candidate("torch", wanted, 0)]


@pytest.mark.parametrize(
    ("device", "options"), [("cuda", {"backend": "openvino"}), ("cpu", {"backend": "openvino", "precision": "fp16"})]
)
def test_settings_that_leave_no_way_are_refused(device, options):
    with pytest.raises(ModelUnavailableError, match="DEIXIS_"):
        candidates(device, LoadOptions(**options))


# --- remembering ---------------------------------------------------------------------------------------------------


class Workshop:
    """Builds towers, the quicker the later in the list of ways, and counts what was measured."""

    def __init__(self, *, fails=()):
        self.fails = set(fails)
        self.built = []

    def __call__(self, way):
        self.built.append(way)
        if way.backend in self.fails:
            raise RuntimeError("does not work")
        return Tower(Clock())

    def select(self, options, *, name="m", fingerprint="f"):
        tower, path, found = select(name, "cpu", build=self, size_px=8, fingerprint=fingerprint, options=options)
        assert isinstance(tower, Tower)
        return path, found


def options_in(folder, **others):
    return LoadOptions(**{"backend": "torch", "tuning_seconds": 0.2, "data_dir": folder, **others})


def file_of(folder):
    (file,) = (folder / "tuning").iterdir()
    return file


def test_what_was_measured_is_not_measured_again(tmp_path):
    first, found = Workshop().select(options_in(tmp_path))
    again = Workshop()
    path, kept = again.select(options_in(tmp_path, tuning_seconds=0))
    assert path == first
    assert kept == found
    assert len(again.built) == 1


def test_measuring_again_takes_the_place_of_what_was_measured(tmp_path):
    Workshop().select(options_in(tmp_path))
    before = file_of(tmp_path).stat().st_ino
    again = Workshop()
    again.select(options_in(tmp_path, measure_again=True))
    assert len(again.built) > 1
    assert file_of(tmp_path).stat().st_ino != before


@pytest.mark.parametrize("change", ["name", "fingerprint", "settings", "cores"])
def test_what_a_measurement_depends_on_makes_it_another(tmp_path, monkeypatch, change):
    Workshop().select(options_in(tmp_path))
    again, options, others = Workshop(), options_in(tmp_path), {}
    if change == "settings":
        options = options_in(tmp_path, precision="fp32")
    elif change == "cores":
        monkeypatch.setattr(tuning, "usable_cores", lambda: 4)
    else:
        others = {change: "another"}
    again.select(options, **others)
    assert len(again.built) > 1
    assert len(list((tmp_path / "tuning").iterdir())) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "{}",
        lambda text: json.dumps({**json.loads(text), "more": 1}),
        lambda text: text.replace('"images_per_s"', '"images"'),
    ],
)
def test_a_damaged_file_is_measured_again_and_mended(tmp_path, damage):
    Workshop().select(options_in(tmp_path))
    file = file_of(tmp_path)
    file.write_text(damage(file.read_text(encoding="utf-8")), encoding="utf-8")
    again = Workshop()
    again.select(options_in(tmp_path))
    assert len(again.built) > 1
    Tuning.model_validate_json(file.read_bytes())


def test_a_folder_that_cannot_be_written_is_no_reason_not_to_serve(tmp_path):
    (tmp_path / "tuning").write_text("a file where the folder should be")
    path, found = Workshop().select(options_in(tmp_path))
    assert path.images_per_s is not None
    assert found is not None


def test_nothing_is_measured_where_there_is_no_time_for_it(tmp_path):
    workshop = Workshop()
    path, found = workshop.select(options_in(tmp_path, tuning_seconds=0))
    assert (path.precision, path.batch_size, path.images_per_s, found) == ("fp32", 4, None, None)
    assert workshop.built == [FP32]
    assert not (tmp_path / "tuning").exists()


def test_a_way_that_does_not_work_gives_way_to_the_next(tmp_path):
    workshop = Workshop(fails={"openvino"})
    path, _ = workshop.select(LoadOptions(tuning_seconds=0))
    assert (path.backend, path.precision) == ("torch", "fp32")


def test_a_remembered_way_that_no_longer_works_gives_way_too(tmp_path):
    everything = options_in(tmp_path, backend="auto")
    Workshop().select(everything)
    file = file_of(tmp_path)
    kept = json.loads(file.read_text(encoding="utf-8"))
    kept["trials"] = [trial for trial in kept["trials"] if trial["candidate"]["backend"] == "openvino"]
    file.write_text(json.dumps(kept), encoding="utf-8")
    path, _ = Workshop(fails={"openvino"}).select(everything)
    assert (path.backend, path.images_per_s) == ("torch", None)


def test_where_nothing_works_the_model_is_not_usable(tmp_path):
    with pytest.raises(ModelUnavailableError, match="RuntimeError: does not work"):
        Workshop(fails={"openvino", "torch"}).select(LoadOptions(tuning_seconds=0))


# --- parts ---------------------------------------------------------------------------------------------------------


def test_probe_images_are_always_the_same_and_not_alike():
    first, again = probe_images(64), probe_images(64)
    assert [(image.shape, image.dtype) for image in first] == [((64, 64, 3), np.uint8)] * 16
    assert all((one == other).all() for one, other in zip(first, again, strict=True))
    assert len({image.tobytes() for image in first}) == 16
    assert min(image.std() for image in first) > 10


def test_a_fingerprint_changes_with_any_weight_name_or_shape():
    weights = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    changed = [
        {**weights, "a": torch.tensor([[0.0, 1, 2], [3, 4, 5.0000005]])},
        {**weights, "a": weights["a"].reshape(3, 2)},
        {"c": weights["a"], "b": weights["b"]},
        {"a": weights["a"]},
    ]
    prints = {fingerprint_of(each.items()) for each in (weights, *changed)} | {fingerprint_of(weights.items(), 224)}
    assert len(prints) == 6
    assert fingerprint_of(weights.items()) == fingerprint_of(
        {name: each.clone() for name, each in weights.items()}.items()
    )


def test_the_probes_tell_that_the_embedded_model_loses_too_much_in_half_precision(tmp_path):
    """On photographs it does: 2 in 100 answers change."""
    found = load_embedded(
        LoadOptions(device="cpu", backend="openvino", precision="bf16", tuning_seconds=0.5, data_dir=tmp_path)
    ).tuning
    assert 0.98 < found.trials[0].min_cosine < MIN_COSINE
    assert found.best is None
