"""Measuring, selecting and storing the configuration of an image tower, with a fake clock."""

import json

import numpy as np
import pytest
import torch

from app.encoders import tuning
from app.encoders._base import Candidate, LoadOptions, Trial, Tuning
from app.encoders.embedded_torch import load_embedded_with_torch
from app.encoders.torch_tower import fingerprint_of
from app.encoders.tuning import MIN_COSINE, list_candidates, measure, probe_images, select_tower
from app.errors import ModelUnavailableError

FP32, BF16, ONE = Candidate("torch", "fp32", 2), Candidate("torch", "bf16", 2), Candidate("torch", "fp32", 1)
OPENVINO, OPENVINO_BF16 = Candidate("openvino", "fp32", 2), Candidate("openvino", "bf16", 2)
DEFAULTS = LoadOptions(tuning_seconds=5)


@pytest.fixture(autouse=True)
def _fixed_machine(monkeypatch):
    monkeypatch.setattr(tuning, "usable_cores", lambda: 2)
    monkeypatch.setattr(tuning, "has_bf16_instructions", lambda: True)
    monkeypatch.setattr(tuning, "is_installed", lambda package: True)


class Clock:
    """Advances only while a tower computes."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Tower:
    """Takes ``seconds(batch size)``; ``angle`` rotates its features away from the correct ones."""

    def __init__(self, clock, seconds=lambda size: 0.01 * size, angle=0.0, max_batch=1000):
        self.clock, self.seconds, self.angle, self.max_batch = clock, seconds, angle, max_batch
        self.sizes = []

    def begin(self, pixels):
        self.sizes.append(len(pixels))
        if len(pixels) > self.max_batch:
            raise MemoryError("no room")

        def wait():
            self.clock.now += self.seconds(len(pixels))
            rows = np.zeros((len(pixels), 4), np.float32)
            rows[:, 0], rows[:, 1] = np.cos(self.angle), np.sin(self.angle)
            return rows

        return wait


def measure_towers(towers, *, seconds=60.0, device="cpu", clock=None):
    return measure(device, list(towers), towers.__getitem__, probe_images(8), seconds=seconds, clock=clock)


def make_tuning(*trials):
    return Tuning(device="cpu", trials=trials)


def make_trial(candidate, rates, **others):
    return Trial(candidate=candidate, min_cosine=1.0, images_per_s=rates, **others)


# --- selecting ----------------------------------------------------------------------------------------------------


def test_the_fastest_candidate_is_selected_with_the_smallest_batch_that_is_almost_as_fast():
    path = make_tuning(
        make_trial(FP32, {1: 10.0, 2: 12.0, 4: 13.0}), make_trial(BF16, {1: 20.0, 2: 39.0, 4: 40.0, 8: 41.0, 16: 30.0})
    ).image_path()
    assert (path.backend, path.precision, path.threads) == ("torch", "bf16", 2)
    assert (path.batch_size, path.images_per_s) == (2, 39.0)


def test_the_batch_size_is_one_if_larger_batches_are_slower():
    assert make_tuning(make_trial(FP32, {1: 95.0, 2: 60.0, 4: 25.0})).image_path().batch_size == 1


def test_a_rejected_candidate_is_not_selected():
    refused = make_trial(BF16, {1: 1000.0}, refused="wrong")
    assert make_tuning(refused, make_trial(FP32, {1: 1.0})).image_path().precision == "fp32"
    assert make_tuning(refused).image_path() is None


# --- measuring -----------------------------------------------------------------------------------------------------


def test_every_batch_size_is_measured():
    clock = Clock()
    found = measure_towers({FP32: Tower(clock, lambda size: 0.02 + 0.01 * size)}, clock=clock)
    rates = found.trials[0].images_per_s
    assert rates == {size: pytest.approx(size / (0.02 + 0.01 * size), rel=1e-3) for size in (1, 2, 4, 8, 16, 32)}
    assert found.trials[0].min_cosine == pytest.approx(1.0)


def test_larger_batches_are_not_measured_after_the_rate_has_peaked():
    clock = Clock()
    found = measure_towers({FP32: Tower(clock, lambda size: 0.01 * size**1.5)}, clock=clock)
    assert list(found.trials[0].images_per_s) == [1, 2, 4]


def test_a_slow_candidate_is_not_measured_with_large_batches():
    clock = Clock()
    slow = Tower(clock, lambda size: 0.05 * size**0.9)
    found = measure_towers({BF16: Tower(clock, lambda size: 0.01 * size), FP32: slow}, clock=clock)
    assert max(found.trials[1].images_per_s) <= 4
    assert found.best.candidate == BF16


@pytest.mark.parametrize("angle", [0.06, float("nan")])
def test_a_candidate_with_different_features_is_rejected_before_it_is_timed(angle):
    clock = Clock()
    wrong = Tower(clock, lambda size: 1e-6, angle=angle)
    found = measure_towers({FP32: Tower(clock), BF16: wrong}, clock=clock)
    assert "differ from single precision" in found.trials[1].refused
    assert wrong.sizes == [16]
    assert found.best.candidate == FP32


def test_a_candidate_with_slightly_different_features_is_accepted():
    clock = Clock()
    found = measure_towers({FP32: Tower(clock), BF16: Tower(clock, angle=0.04)}, clock=clock)
    assert MIN_COSINE < found.trials[1].min_cosine < 1
    assert found.trials[1].refused is None


def test_a_candidate_that_raises_is_rejected_with_the_reason_and_the_others_are_measured():
    clock = Clock()

    def build(candidate):
        if candidate == OPENVINO:
            raise RuntimeError("cannot\nconvert")
        return Tower(clock)

    found = measure("cpu", [OPENVINO, FP32], build, probe_images(8), seconds=60, clock=clock)
    assert found.trials[0].refused == "RuntimeError: cannot convert"
    assert found.best.candidate == FP32


def test_a_candidate_that_runs_out_of_memory_keeps_its_smaller_batches():
    clock = Clock()
    (trial,) = measure_towers({FP32: Tower(clock, lambda size: 0.02 + 0.01 * size, max_batch=16)}, clock=clock).trials
    assert (max(trial.images_per_s), trial.refused) == (16, None)


def test_every_candidate_is_measured_with_one_image_when_the_time_is_up():
    clock = Clock()
    found = measure_towers(
        {candidate: Tower(clock, lambda size: size) for candidate in (FP32, BF16, ONE)}, seconds=0.1, clock=clock
    )
    assert [list(trial.images_per_s) for trial in found.trials] == [[1], [1], [1]]


def test_on_a_gpu_the_precision_is_not_checked_and_batches_are_large():
    clock = Clock()
    found = measure_towers({Candidate("torch", "fp16", 0): Tower(clock, lambda size: 0.1)}, device="cuda", clock=clock)
    assert (found.trials[0].min_cosine, max(found.trials[0].images_per_s)) == (None, 256)
    assert found.image_path().device == "cuda"


# --- candidates ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [("openvino", "fp32"), ("openvino", "bf16"), ("torch", "fp32"), ("torch", "bf16"), ("torch", "fp32")]),
        ({"backend": "torch"}, [("torch", "fp32"), ("torch", "bf16"), ("torch", "fp32")]),
        ({"backend": "openvino", "precision": "fp32"}, [("openvino", "fp32")]),
        ({"precision": "bf16"}, [("openvino", "bf16"), ("torch", "bf16")]),
        ({"precision": "fp16"}, [("torch", "fp16")]),
    ],
)
def test_options_restrict_the_candidates_on_a_cpu(options, expected):
    assert [
        (candidate.backend, candidate.precision) for candidate in list_candidates("cpu", LoadOptions(**options))
    ] == expected


def test_without_the_instructions_half_precision_is_a_candidate_only_on_request(monkeypatch):
    monkeypatch.setattr(tuning, "has_bf16_instructions", lambda: False)
    assert {candidate.precision for candidate in list_candidates("cpu", LoadOptions())} == {"fp32"}
    assert {candidate.precision for candidate in list_candidates("cpu", LoadOptions(precision="bf16"))} == {"bf16"}


def test_without_openvino_torch_remains(monkeypatch):
    monkeypatch.setattr(tuning, "is_installed", lambda package: package != "openvino")
    assert {candidate.backend for candidate in list_candidates("cpu", LoadOptions())} == {"torch"}
    with pytest.raises(ModelUnavailableError, match=r"deixis\[openvino\]"):
        list_candidates("cpu", LoadOptions(backend="openvino"))


def test_without_torch_openvino_is_compared_with_openvino_in_single_precision(monkeypatch):
    monkeypatch.setattr(tuning, "is_installed", lambda package: package != "torch")
    candidates = list_candidates("cpu", LoadOptions())
    assert {candidate.backend for candidate in candidates} == {"openvino"}
    clock = Clock()
    found = measure_towers({OPENVINO: Tower(clock), OPENVINO_BF16: Tower(clock, angle=0.06)}, clock=clock)
    assert [trial.refused is None for trial in found.trials] == [True, False]
    with pytest.raises(ModelUnavailableError, match="DEIXIS_"):
        list_candidates("cpu", LoadOptions(backend="torch"))


@pytest.mark.parametrize(
    ("device", "precision", "expected"),
    [("cuda:1", "auto", "fp16"), ("cuda", "bf16", "bf16"), ("mps", "auto", "fp32"), ("mps", "fp16", "fp16")],
)
def test_an_accelerator_has_one_candidate(device, precision, expected):
    assert list_candidates(device, LoadOptions(precision=precision)) == [Candidate("torch", expected, 0)]


@pytest.mark.parametrize(
    ("device", "options"), [("cuda", {"backend": "openvino"}), ("cpu", {"backend": "openvino", "precision": "fp16"})]
)
def test_options_without_a_candidate_are_rejected(device, options):
    with pytest.raises(ModelUnavailableError, match="DEIXIS_"):
        list_candidates(device, LoadOptions(**options))


# --- storing ---------------------------------------------------------------------------------------------------


class TowerBuilder:
    """Builds towers and records their candidates."""

    def __init__(self, *, fails=()):
        self.fails = set(fails)
        self.built = []

    def __call__(self, candidate):
        self.built.append(candidate)
        if candidate.backend in self.fails:
            raise RuntimeError("does not work")
        return Tower(Clock())

    def select_tower(self, options, *, name="m", fingerprint="f"):
        tower, path, found = select_tower(name, "cpu", build=self, size_px=8, fingerprint=fingerprint, options=options)
        assert isinstance(tower, Tower)
        return path, found


def options_in(folder, **others):
    return LoadOptions(**{"backend": "torch", "tuning_seconds": 0.2, "data_dir": folder, **others})


def file_of(folder):
    (file,) = (folder / "tuning").iterdir()
    return file


def test_a_measurement_is_stored_and_reused(tmp_path):
    first, found = TowerBuilder().select_tower(options_in(tmp_path))
    again = TowerBuilder()
    path, kept = again.select_tower(options_in(tmp_path, tuning_seconds=0))
    assert path == first
    assert kept == found
    assert len(again.built) == 1


def test_measuring_again_replaces_the_stored_measurement(tmp_path):
    TowerBuilder().select_tower(options_in(tmp_path))
    before = file_of(tmp_path).stat().st_ino
    again = TowerBuilder()
    again.select_tower(options_in(tmp_path, measure_again=True))
    assert len(again.built) > 1
    assert file_of(tmp_path).stat().st_ino != before


@pytest.mark.parametrize("change", ["name", "fingerprint", "settings", "cores"])
def test_a_change_of_any_input_leads_to_a_new_measurement(tmp_path, monkeypatch, change):
    TowerBuilder().select_tower(options_in(tmp_path))
    again, options, others = TowerBuilder(), options_in(tmp_path), {}
    if change == "settings":
        options = options_in(tmp_path, precision="fp32")
    elif change == "cores":
        monkeypatch.setattr(tuning, "usable_cores", lambda: 4)
    else:
        others = {change: "another"}
    again.select_tower(options, **others)
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
def test_a_damaged_file_is_replaced_by_a_new_measurement(tmp_path, damage):
    TowerBuilder().select_tower(options_in(tmp_path))
    file = file_of(tmp_path)
    file.write_text(damage(file.read_text(encoding="utf-8")), encoding="utf-8")
    again = TowerBuilder()
    again.select_tower(options_in(tmp_path))
    assert len(again.built) > 1
    Tuning.model_validate_json(file.read_bytes())


def test_a_read_only_folder_does_not_prevent_serving(tmp_path):
    (tmp_path / "tuning").write_text("a file where the folder should be")
    path, found = TowerBuilder().select_tower(options_in(tmp_path))
    assert path.images_per_s is not None
    assert found is not None


def test_nothing_is_measured_with_zero_tuning_seconds(tmp_path):
    builder = TowerBuilder()
    path, found = builder.select_tower(options_in(tmp_path, tuning_seconds=0))
    assert (path.precision, path.batch_size, path.images_per_s, found) == ("fp32", 4, None, None)
    assert builder.built == [FP32]
    assert not (tmp_path / "tuning").exists()


def test_the_next_candidate_replaces_one_that_fails(tmp_path):
    builder = TowerBuilder(fails={"openvino"})
    path, _ = builder.select_tower(LoadOptions(tuning_seconds=0))
    assert (path.backend, path.precision) == ("torch", "fp32")


def test_the_next_candidate_replaces_a_stored_one_that_fails(tmp_path):
    everything = options_in(tmp_path, backend="auto")
    TowerBuilder().select_tower(everything)
    file = file_of(tmp_path)
    kept = json.loads(file.read_text(encoding="utf-8"))
    kept["trials"] = [trial for trial in kept["trials"] if trial["candidate"]["backend"] == "openvino"]
    file.write_text(json.dumps(kept), encoding="utf-8")
    path, _ = TowerBuilder(fails={"openvino"}).select_tower(everything)
    assert (path.backend, path.images_per_s) == ("torch", None)


def test_a_model_without_a_working_candidate_is_rejected(tmp_path):
    with pytest.raises(ModelUnavailableError, match="RuntimeError: does not work"):
        TowerBuilder(fails={"openvino", "torch"}).select_tower(LoadOptions(tuning_seconds=0))


# --- parts ---------------------------------------------------------------------------------------------------------


def test_probe_images_are_reproducible_and_all_different():
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
    prints = {fingerprint_of(item.items()) for item in (weights, *changed)} | {fingerprint_of(weights.items(), 224)}
    assert len(prints) == 6
    assert fingerprint_of(weights.items()) == fingerprint_of(
        {name: item.clone() for name, item in weights.items()}.items()
    )


def test_half_precision_is_rejected_for_the_embedded_model(tmp_path):
    """On photographs, 2 of 100 predictions change."""
    found = load_embedded_with_torch(
        LoadOptions(device="cpu", backend="openvino", precision="bf16", tuning_seconds=0.5, data_dir=tmp_path)
    ).tuning
    assert 0.98 < found.trials[0].min_cosine < MIN_COSINE
    assert found.best is None
