"""Measuring, selecting and storing the configuration of an image tower, with a fake clock."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch

from app.encoders import tuning
from app.encoders._base import Candidate, LoadOptions, Trial, Tuning
from app.encoders.embedded import load_embedded
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


class Machine:
    """Has a clock, which advances only while a tower computes, and other processes, which slow the towers down.

    Args:
        slower: returns the factor by which a pass takes longer, from the time and the tower.
        busy: returns whether other processes use the CPU, from the time; None if the system does not say.
    """

    def __init__(self, *, slower=lambda now, tower: 1.0, busy=lambda now: False):
        self.now = 0.0
        self.slower, self.busy = slower, busy
        self._busy_s = self._last = 0.0

    def clock(self):
        return self.now

    def compute(self, tower, seconds):
        seconds *= self.slower(self.now, tower)
        if self.busy is not None and self.busy(self.now):
            self._busy_s += seconds
        self.now += seconds

    def cpu_by_others(self):
        if self.busy is None:
            return None
        share = self._busy_s / max(self.now - self._last, 1e-9)
        self._busy_s, self._last = 0.0, self.now
        return share


class Tower:
    """Takes ``seconds(batch size)``; ``angle`` rotates its features away from the correct ones."""

    streams = 1

    def __init__(self, machine, seconds=lambda size: 0.01 * size, angle=0.0, max_batch=1000):
        self.machine, self.seconds, self.angle, self.max_batch = machine, seconds, angle, max_batch
        self.sizes = []

    def begin(self, pixels, *, alone=True):
        self.sizes.append(len(pixels))
        if len(pixels) > self.max_batch:
            raise MemoryError("no room")

        def wait():
            self.machine.compute(self, self.seconds(len(pixels)))
            rows = np.zeros((len(pixels), 4), np.float32)
            rows[:, 0], rows[:, 1] = np.cos(self.angle), np.sin(self.angle)
            return rows

        return wait


def measure_towers(machine, towers, *, seconds=20.0, device="cpu", **others):
    return measure(
        device,
        list(towers),
        towers.__getitem__,
        probe_images(8),
        seconds=seconds,
        clock=machine.clock,
        cpu_by_others=machine.cpu_by_others,
        **others,
    )


def tower_of(machine, images_per_s):
    """A tower that is a little faster with batches of four, and slower with larger ones."""
    gain = {1: 0.9, 2: 0.97, 4: 1.0, 8: 0.8, 16: 0.7}
    return Tower(machine, lambda size: size / (images_per_s * gain[size]))


def embedded_towers(machine):
    """The towers of the embedded model on two cores."""
    return {
        OPENVINO: tower_of(machine, 200.0),
        FP32: tower_of(machine, 90.0),
        ONE: tower_of(machine, 45.0),
    }


# --- choosing while the machine is disturbed ------------------------------------------------------------------------


def random_noise(seed, spread):
    rng = np.random.default_rng(seed)
    return lambda now, tower: float(rng.uniform(1, 1 + spread))


@pytest.mark.parametrize("seed", range(5))
def test_noise_that_no_process_causes_does_not_change_the_choice(seed):
    machine = Machine(slower=random_noise(seed, 0.5))
    found = measure_towers(machine, embedded_towers(machine))
    assert (found.chosen, found.provisional) == (OPENVINO, False)
    assert found.batch_size in {1, 2, 4}


@pytest.mark.parametrize("begins", np.arange(0, 4, 0.5))
def test_a_burst_of_other_processes_does_not_change_the_choice(begins):
    """Earlier, whichever candidate was measured during the burst lost."""

    def in_burst(now):
        return begins <= now < begins + 1.5

    machine = Machine(slower=lambda now, tower: 8.0 if in_burst(now) else 1.0, busy=in_burst)
    found = measure_towers(machine, embedded_towers(machine))
    assert (found.chosen, found.batch_size, found.provisional) == (OPENVINO, 2, False)


@pytest.mark.parametrize("length", [0.2, 1.0, 3.0])
def test_a_slow_start_does_not_change_the_choice(length):
    """Such as that of a processor that raises its frequency; no process causes it."""
    machine = Machine(slower=lambda now, tower: 4.0 if now < length else 1.0)
    found = measure_towers(machine, embedded_towers(machine))
    assert (found.chosen, found.batch_size, found.provisional) == (OPENVINO, 2, False)


def test_one_pass_that_is_too_fast_chooses_neither_a_candidate_nor_a_batch_size():
    for outlier in range(1, 300, 7):
        passes = iter(range(100_000))
        machine = Machine(
            slower=lambda now, tower, passes=passes, outlier=outlier: 1 / 6 if next(passes) == outlier else 1
        )
        found = measure_towers(machine, embedded_towers(machine))
        assert (found.chosen, found.batch_size) == (OPENVINO, 2)


def test_under_constant_load_the_first_candidate_is_kept_and_the_result_is_provisional():
    """Threads that wait for each other lose more than a single thread, which is then measured as the fastest."""

    machine = Machine(busy=lambda now: True)
    machine.slower = lambda now, tower: 1.2 if tower is towers[ONE] else 12.0
    towers = embedded_towers(machine)
    found = measure_towers(machine, towers)
    assert (found.chosen, found.batch_size, found.provisional) == (OPENVINO, 4, True)
    assert found.cpu_by_others == 1.0
    assert found.trials[2].ratio > 2
    assert found.image_path().images_per_s is None


def test_under_constant_load_a_candidate_replaces_an_earlier_one_only_if_it_is_much_faster():
    for factor, chosen in ((1.4, OPENVINO), (2.0, OPENVINO_BF16)):
        machine = Machine(busy=lambda now: True)
        found = measure_towers(
            machine,
            {
                OPENVINO: tower_of(machine, 20.0),
                OPENVINO_BF16: tower_of(machine, factor * 20.0),
                FP32: tower_of(machine, 10.0),
            },
        )
        assert (found.chosen, found.provisional) == (chosen, True)


def test_a_load_that_ends_in_time_leads_to_a_final_result_from_the_quiet_rounds():
    machine = Machine(slower=lambda now, tower: 5.0 if now < 2 else 1.0, busy=lambda now: now < 2)
    found = measure_towers(machine, {OPENVINO: tower_of(machine, 400.0), FP32: tower_of(machine, 320.0)})
    assert (found.chosen, found.provisional) == (OPENVINO, False)
    assert len(found.trials[1].ratios) < len(found.trials[1].cpu_by_others)
    assert found.trials[1].ratio == pytest.approx(0.8)


def test_without_figures_of_the_system_the_result_is_final():
    machine = Machine(busy=None)
    found = measure_towers(machine, embedded_towers(machine))
    assert (found.chosen, found.provisional, found.cpu_by_others) == (OPENVINO, False, None)


def test_a_busy_machine_does_not_exceed_the_time_for_the_sake_of_a_result_that_will_be_measured_again():
    machine = Machine(slower=lambda now, tower: 50.0, busy=lambda now: True)
    found = measure_towers(machine, embedded_towers(machine), seconds=5)
    assert (found.chosen, found.provisional) == (OPENVINO, True)
    assert found.trials[2].rates == {}
    assert machine.now < 30


# --- measuring -----------------------------------------------------------------------------------------------------


def test_a_candidate_that_is_clearly_faster_replaces_an_earlier_one():
    for factor, chosen in ((1.05, OPENVINO), (1.2, FP32)):
        machine = Machine()
        towers = {OPENVINO: tower_of(machine, 20.0), FP32: tower_of(machine, 20.0 * factor)}
        found = measure_towers(machine, towers)
        assert (found.chosen, found.image_path().backend) == (chosen, chosen.backend)
        assert found.trials[1].ratio == pytest.approx(factor)


@pytest.mark.parametrize(
    ("ratios", "cpu_by_others", "fewer_threads", "is_won"),
    [
        (7 * [1.2], 0.0, False, True),
        (7 * [1.2], 0.0, True, True),
        (7 * [1.05], 0.0, False, False),
        ([*6 * [1.2], 0.5], 0.0, False, True),
        ([*4 * [1.5], *3 * [0.9]], 0.0, False, False),
        (7 * [1.4], 0.5, False, False),
        (7 * [1.6], 0.5, False, True),
        (7 * [1.6], 0.5, True, False),
        (2 * [1.6], 0.5, False, False),
    ],
)
def test_a_clear_win_is_one_in_the_median_and_in_most_rounds(ratios, cpu_by_others, fewer_threads, is_won):
    rounds = [tuning._Round([{1: 10.0}, {1: 10.0 * ratio}], cpu_by_others) for ratio in ratios]
    assert tuning._Comparison(rounds).is_won(by_fewer_threads=fewer_threads) is is_won


def test_candidates_run_in_turns_at_each_batch_size():
    machine, order = Machine(), []
    machine.slower = lambda now, tower: order.append(tower) or 1.0
    towers = {OPENVINO: Tower(machine, lambda size: 0.06), FP32: Tower(machine, lambda size: 0.06)}
    measure_towers(machine, towers)
    names = "".join("A" if tower is towers[OPENVINO] else "B" for tower in order)
    assert 7 * "ABAB" in names


def test_a_candidate_that_is_far_slower_takes_three_rounds():
    machine = Machine()
    found = measure_towers(machine, embedded_towers(machine))
    assert [len(trial.ratios) for trial in found.trials] == [0, 3, 3]


def test_the_smallest_batch_that_is_almost_as_fast_is_chosen():
    machine = Machine()
    found = measure_towers(machine, {FP32: Tower(machine, lambda size: 0.02 + 0.01 * size)})
    rates = found.trials[0].images_per_s
    assert rates == {size: pytest.approx(size / (0.02 + 0.01 * size), rel=1e-3) for size in (1, 2, 4, 8, 16)}
    assert (found.image_path().batch_size, found.image_path().images_per_s) == (16, 88.9)
    machine = Machine()
    found = measure_towers(machine, {FP32: Tower(machine, lambda size: 0.01 * size**1.5)})
    assert found.image_path().batch_size == 1


@pytest.mark.parametrize("angle", [0.06, float("nan")])
def test_a_candidate_with_different_features_is_rejected_before_it_is_timed(angle):
    machine = Machine()
    wrong = Tower(machine, lambda size: 1e-6, angle=angle)
    found = measure_towers(machine, {FP32: Tower(machine), BF16: wrong})
    assert "differ from single precision" in found.trials[1].refused
    assert wrong.sizes == [16]
    assert found.chosen == FP32


def test_a_candidate_with_slightly_different_features_is_accepted():
    machine = Machine()
    found = measure_towers(machine, {FP32: Tower(machine), BF16: Tower(machine, angle=0.04)})
    assert MIN_COSINE < found.trials[1].min_cosine < 1
    assert found.trials[1].refused is None


def test_a_candidate_that_raises_is_rejected_with_the_reason_and_the_others_are_measured():
    machine = Machine()

    def build(candidate):
        if candidate == OPENVINO:
            raise RuntimeError("cannot\nconvert")
        return Tower(machine)

    found = measure("cpu", [OPENVINO, FP32], build, probe_images(8), seconds=60, clock=machine.clock)
    assert found.trials[0].refused == "RuntimeError: cannot convert"
    assert found.chosen == FP32


def test_a_candidate_that_fails_while_it_is_compared_is_rejected():
    machine = Machine()
    failing = Tower(machine)
    machine.slower = lambda now, tower: 1 if tower is not failing or now < 1 else 1 / 0
    found = measure_towers(machine, {OPENVINO: Tower(machine), FP32: failing})
    assert (found.chosen, found.trials[1].refused) == (OPENVINO, "ZeroDivisionError: division by zero")


def test_a_tower_that_runs_out_of_memory_is_run_with_smaller_batches():
    machine = Machine()
    tower = Tower(machine, lambda size: 0.02 + 0.01 * size, max_batch=32)
    found = measure_towers(machine, {Candidate("torch", "fp16", 0): tower}, device="cuda")
    assert (max(found.trials[0].rates), found.batch_size) == (32, 32)


def test_every_candidate_is_measured_with_one_image_when_the_time_is_up():
    machine = Machine()
    found = measure_towers(
        machine, {candidate: Tower(machine, lambda size: size) for candidate in (FP32, BF16, ONE)}, seconds=0.1
    )
    assert [list(trial.images_per_s) for trial in found.trials] == [[1], [1], [1]]
    assert not found.provisional


def test_on_a_gpu_neither_precision_nor_load_is_checked_and_batches_are_large():
    machine = Machine(busy=lambda now: True)
    found = measure_towers(machine, {Candidate("torch", "fp16", 0): Tower(machine, lambda size: 0.1)}, device="cuda")
    assert (found.trials[0].min_cosine, max(found.trials[0].images_per_s)) == (None, 256)
    assert (found.image_path().device, found.provisional) == ("cuda", False)


def test_a_result_without_a_candidate_has_no_path():
    machine = Machine()
    found = measure_towers(machine, {OPENVINO_BF16: Tower(machine, angle=1)} | {FP32: Tower(machine, angle=1)})
    assert found.image_path() is not None  # the reference
    refused = Trial(candidate=BF16, min_cosine=0.9, refused="wrong")
    assert Tuning(device="cpu", trials=(refused,), chosen=None, batch_size=4).image_path() is None


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
    with pytest.raises(ModelUnavailableError, match="needs the extra 'openvino'"):
        list_candidates("cpu", LoadOptions(backend="openvino"))


def test_without_torch_openvino_is_compared_with_openvino_in_single_precision(monkeypatch):
    monkeypatch.setattr(tuning, "is_installed", lambda package: package != "torch")
    candidates = list_candidates("cpu", LoadOptions())
    assert {candidate.backend for candidate in candidates} == {"openvino"}
    machine = Machine()
    found = measure_towers(machine, {OPENVINO: Tower(machine), OPENVINO_BF16: Tower(machine, angle=0.06)})
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


def test_measuring_needs_no_torch():
    program = "import sys; import app.encoders.tuning; sys.exit('torch' in sys.modules or 'openvino' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# --- storing ---------------------------------------------------------------------------------------------------


class TowerBuilder:
    """Builds towers and records their candidates."""

    def __init__(self, *, fails=(), busy=False, cpu_by_others=0.0):
        self.fails = set(fails)
        self.built = []
        self.machine = Machine(busy=lambda now: busy)
        self.cpu_by_others = cpu_by_others

    def __call__(self, candidate):
        self.built.append(candidate)
        if candidate.backend in self.fails:
            raise RuntimeError("does not work")
        return Tower(self.machine)

    def select_tower(self, options, *, name="m", fingerprint="f"):
        simulated = partial(measure, clock=self.machine.clock, cpu_by_others=self.machine.cpu_by_others)
        with mock.patch.multiple(tuning, measure=simulated, current_cpu_by_others=lambda: self.cpu_by_others):
            tower, path, found = select_tower(
                name, "cpu", build=self, size_px=8, fingerprint=fingerprint, options=options
            )
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
        lambda text: text.replace('"rates"', '"images"'),
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


def test_a_provisional_result_is_used_and_measured_again_at_the_next_start_on_an_idle_machine(tmp_path):
    options = options_in(tmp_path)
    path, found = TowerBuilder(busy=True).select_tower(options)
    assert found.provisional
    assert (path.precision, path.threads, path.batch_size, path.images_per_s) == ("fp32", 2, 4, None)
    assert json.loads(file_of(tmp_path).read_text(encoding="utf-8"))["provisional"] is True
    for cpu_by_others, seconds, provisional, built in ((0.0, 0, True, 1), (0.2, 5, True, 1), (0.0, 5, False, 5)):
        again = TowerBuilder(cpu_by_others=cpu_by_others)
        _, found = again.select_tower(options_in(tmp_path, tuning_seconds=seconds))
        assert (found.provisional, len(again.built)) == (provisional, built)
    assert json.loads(file_of(tmp_path).read_text(encoding="utf-8"))["provisional"] is False


def test_nothing_is_measured_and_stored_while_other_processes_use_most_of_the_cpu(tmp_path):
    busy = TowerBuilder(busy=True, cpu_by_others=0.8)
    path, found = busy.select_tower(options_in(tmp_path))
    assert (path.precision, path.threads, path.batch_size, path.images_per_s) == ("fp32", 2, 4, None)
    assert (found.provisional, found.cpu_by_others, len(busy.built)) == (True, 0.8, 1)
    assert not (tmp_path / "tuning").exists()
    # but on request
    busy.select_tower(options_in(tmp_path, measure_again=True))
    assert json.loads(file_of(tmp_path).read_text(encoding="utf-8"))["provisional"] is True
    # and without figures of the system
    _, found = TowerBuilder(cpu_by_others=None).select_tower(options_in(tmp_path))
    assert not found.provisional


def test_a_provisional_result_does_not_replace_a_final_one(tmp_path):
    _, final = TowerBuilder().select_tower(options_in(tmp_path))
    _, found = TowerBuilder(busy=True).select_tower(options_in(tmp_path, measure_again=True))
    assert found.provisional
    assert TowerBuilder().select_tower(options_in(tmp_path, tuning_seconds=0))[1] == final


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
    assert kept["chosen"]["backend"] == "openvino"
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
    options = LoadOptions(device="cpu", backend="openvino", precision="bf16", tuning_seconds=0.5, data_dir=tmp_path)
    found = load_embedded(replace(options, measure_again=True)).tuning
    assert 0.98 < found.trials[0].min_cosine < MIN_COSINE
    assert found.chosen is None
