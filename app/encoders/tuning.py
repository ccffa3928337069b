"""Measures how an image tower runs fastest on this machine, and stores the result.

The fastest options cannot be predicted from the model and the processor: on one CPU, a batch of eight takes twice as
long per image as a batch of one, and a backend that doubles the speed of one model halves that of another. Therefore
each candidate is measured once. Its features must also agree with those in single precision.

Other programs disturb such measurements. Therefore a candidate and the best one before it are measured in turns, and
their rates are compared within each turn. A candidate replaces one that is listed earlier only if it is clearly faster.
While other processes use the CPU, the result is provisional: it is measured again later.
"""

import hashlib
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import structlog
from pydantic import ValidationError

from app import __version__
from app.encoders._base import Candidate, ImagePath, ImageTower, LoadOptions, Trial, Tuning
from app.errors import ModelUnavailableError, one_line
from app.runtime.atomic_files import write_atomically
from app.runtime.cpu import OtherProcesses, usable_cores
from app.types import ImageFeatures, Pixels
from deixis.extras import needs_extra

log = structlog.get_logger()

MIN_COSINE = 0.999
"""Lowest allowed cosine between the features of a probe image and its features in single precision.

For EfficientNet-lite0 on 372 photographs of clothing, the lowest cosine of bfloat16 was 0.993 and 2 predictions in 100
changed; for a ViT-B-32 it is 0.9999.
"""

# The back ends of a CPU, in the order in which they are likely to be fast. Each is an extra of the same name.
_BACKENDS = ("openvino", "torch")

_MAX_WARM_UP_BATCH = 8
_CPU_BATCHES = (1, 2, 4, 8, 16)
_GPU_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# Two candidates are compared at these sizes, each at the one where it is faster.
_DUEL_BATCHES = (1, 4)
# The smallest batch with this share of the best rate is used, since small batches have a lower latency.
_MIN_SHARE_OF_BEST_RATE = 0.95

# In one round, each tower runs each batch size for this time, or once.
_VISIT_S = 0.05
_MIN_ROUNDS, _QUIET_ROUNDS, _MAX_ROUNDS = 3, 7, 15
# Ratios of the rates of two towers: a clear win, the same on a busy machine, and one with which a duel ends early.
_CLEARLY_FASTER, _CLEARLY_FASTER_WHEN_BUSY, _HOPELESS = 1.1, 1.5, 0.7
# The share of the rounds that a clear win needs as well.
_MOST_ROUNDS = 0.75

MAX_CPU_BY_OTHERS = 0.1
"""Share of the usable cores above which the use by other processes disturbs a measurement."""

# Above this share, a measurement would take minutes without a result.
_TOO_BUSY_TO_MEASURE = 0.5


def list_candidates(device: str, options: LoadOptions) -> list[Candidate]:
    """Return the candidates that device and options allow, in the order in which they are likely to be fast.

    Raises:
        ModelUnavailableError: they allow none.
    """
    if not device.startswith("cpu"):
        if options.backend == "openvino":
            raise ModelUnavailableError(
                f"DEIXIS_IMAGE_BACKEND=openvino only runs on the CPU, and the device is {device}; set DEIXIS_DEVICE=cpu"
            )
        if options.precision == "int8":
            raise ModelUnavailableError(
                f"DEIXIS_PRECISION=int8 only runs on the CPU, and the device is {device}; set DEIXIS_DEVICE=cpu"
            )
        return [Candidate("torch", model_precision(device, options), 0)]
    cores = usable_cores()
    if options.backend in _BACKENDS and not is_installed(options.backend):
        raise ModelUnavailableError(needs_extra(f"DEIXIS_IMAGE_BACKEND={options.backend}", options.backend))
    backends = [backend for backend in _BACKENDS if options.backend in {"auto", backend} and is_installed(backend)]
    found: list[Candidate] = []
    if "openvino" in backends:
        found += [Candidate("openvino", precision, cores) for precision in ("fp32", "bf16", "int8")]
    if "torch" in backends:
        found += [Candidate("torch", precision, cores) for precision in ("fp32", "bf16", "fp16")]
        if cores > 1:
            found.append(Candidate("torch", "fp32", 1))
    if options.precision == "auto":
        # fp16 is slower than fp32 on every CPU measured so far, and so is bf16 without instructions for it. int8 needs
        # images that show whether predictions change.
        precisions = {"fp32", "bf16"} if has_bf16_instructions() else {"fp32"}
    else:
        precisions = {options.precision}
    found = [candidate for candidate in found if candidate.precision in precisions]
    if not found:
        missing = [needs_extra(f"the back end {name}", name) for name in _BACKENDS if not is_installed(name)]
        problem = (
            f"no installed back end runs DEIXIS_IMAGE_BACKEND={options.backend} with DEIXIS_PRECISION="
            f"{options.precision} on a CPU; set them to auto"
        )
        raise ModelUnavailableError("; ".join([problem, *missing]))
    return found


def model_precision(device: str, options: LoadOptions) -> str:
    """Return the precision that a model is loaded in: of the text tower on a CPU, of both towers elsewhere."""
    if device.startswith("cpu"):
        return "fp32"
    default = "fp16" if device.startswith("cuda") else "fp32"
    return default if options.precision == "auto" else options.precision


def is_installed(package: str) -> bool:
    """Return whether a package is installed, without importing it."""
    return find_spec(package) is not None


def has_bf16_instructions() -> bool:
    """Return whether this CPU has instructions for bfloat16."""
    # The first two are of Intel and AMD, the last is of Arm.
    return _has_flag("avx512_bf16", "amx_bf16", " bf16")


def has_int8_instructions() -> bool:
    """Return whether this CPU has instructions that add products of bytes in 32 bits.

    Other x86 processors add pairs of them in 16 bits, which saturates: the same tower in int8 gives other features.
    """
    return _has_flag("avx512_vnni", "avx_vnni", "amx_int8", " asimd")


def _has_flag(*flags: str) -> bool:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return any(flag in text for flag in flags)


def select_tower(
    name: str,
    device: str,
    *,
    build: Callable[[Candidate], ImageTower],
    size_px: int,
    fingerprint: str,
    options: LoadOptions,
) -> tuple[ImageTower, ImagePath, Tuning | None]:
    """Return the fastest tower, by a stored measurement or a new one; without measurements, the first that works.

    Nothing is measured while other processes use most of the CPU. A provisional result is stored as such, and measured
    again at the next start on an idle machine.

    Args:
        name: of the model.
        device: as returned by ``select_device``.
        build: builds the tower of a candidate.
        size_px: side of an image.
        fingerprint: of the weights.
        options: ``data_dir`` is the folder of measurements, ``tuning_seconds`` the time for a new one.

    Raises:
        ModelUnavailableError: the options allow no candidate, or none of them works.
    """
    candidates = list_candidates(device, options)
    file = (
        None
        if options.data_dir is None
        else options.data_dir / "tuning" / f"{_key(name, device, fingerprint, candidates)}.json"
    )
    stored = _read(file)
    tuning = None if options.measure_again else stored
    if options.tuning_seconds > 0 and (tuning is None or tuning.provisional):
        by_others = None if options.measure_again or not device.startswith("cpu") else current_cpu_by_others()
        if by_others is not None and by_others > (_TOO_BUSY_TO_MEASURE if tuning is None else MAX_CPU_BY_OTHERS):
            tuning = tuning or _unmeasured(device, by_others)
        else:
            tuning = measure(device, candidates, build, probe_images(size_px), seconds=options.tuning_seconds)
            # A provisional result does not replace a final one.
            replaces = not (tuning.provisional and stored and not stored.provisional)
            if tuning.chosen is not None and file is not None and replaces:
                _write(file, tuning)
        if tuning.provisional:
            log.info("tuning_provisional", model=name, cpu_by_others=tuning.cpu_by_others)
    path = tuning.image_path() if tuning else None
    paths = [
        ImagePath(each.backend, device, each.precision, _default_batch_size(device), each.threads)
        for each in candidates
    ]
    failure: Exception | None = None
    for each in paths if path is None else [path, *paths]:
        candidate = Candidate(each.backend, each.precision, each.threads)
        try:
            tower = build(candidate)
            warm_up(tower, size_px, each, compiles=options.torch_compile)
        except Exception as error:  # noqa: BLE001 - backends raise errors of any type
            log.warning("image_tower_failed", model=name, **_log_fields(candidate), reason=one_line(error))
            failure = error
            continue
        return tower, each, tuning
    raise ModelUnavailableError(
        f"model '{name}' cannot be used: a test ended with {type(failure).__name__}: {one_line(failure)}; check that"
        " its configuration and its weights belong together, and try DEIXIS_PRECISION=fp32"
    ) from failure


def warm_up(tower: ImageTower, size_px: int, path: ImagePath, *, compiles: bool = False) -> None:
    """Run a tower; one of OpenVINO with each small batch, which takes up to ten times as long the first time.

    One that torch compiles runs with the sizes that it may be compiled for: the first request would wait for minutes.
    """
    largest = min(path.batch_size, _MAX_WARM_UP_BATCH) if path.backend == "openvino" else 1
    with _passes(tower) as run:
        for size in sorted({1, 2, path.batch_size}) if compiles else range(1, largest + 1):
            batch = [np.zeros((size_px, size_px, 3), np.uint8)] * size
            tower.begin(batch)()
            if tower.streams > 1:
                run(batch)


def measure(
    device: str,
    candidates: Sequence[Candidate],
    build: Callable[[Candidate], ImageTower],
    probes: Sequence[Pixels],
    *,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
    cpu_by_others: Callable[[], float | None] | None = None,
) -> Tuning:
    """Measure every candidate in at least three rounds, for about ``seconds`` in total; fewer on a busy machine.

    First the candidates are compared, each with the best one before it; two towers are in memory at a time. Then the
    batch size of the best one is measured. On a CPU, a candidate is refused if its features differ from those in single
    precision: of torch, or of OpenVINO if torch is not installed; not so one in int8, whose predictions have been
    compared. On other devices there is only one candidate, whose precision is not checked, and the use of the CPU does
    not matter.

    Args:
        device: as returned by ``select_device``.
        candidates: the first is kept unless another one is clearly faster.
        build: builds the tower of a candidate.
        probes: images to encode.
        seconds: time for all candidates.
        clock: returns the time in seconds.
        cpu_by_others: returns the share of the CPU that other processes used since the last call; None if not known.
    """
    is_cpu = device.startswith("cpu")
    read_share = (cpu_by_others or OtherProcesses().share) if is_cpu else lambda: None
    shares: list[float] = []

    def others() -> float | None:
        share = read_share()
        if share is not None:
            shares.append(share)
        return share

    rounds = _Rounds(probes, clock, others)
    ends = clock() + seconds
    reference_backend = "torch" if is_installed("torch") else "openvino"
    is_checked = is_cpu and any(candidate.precision != "int8" for candidate in candidates)
    reference = build(Candidate(reference_backend, "fp32", usable_cores())).begin(probes)() if is_checked else None
    trials: dict[Candidate, Trial] = {}
    best: tuple[Candidate, ImageTower] | None = None
    is_provisional = False
    for number, candidate in enumerate(candidates):
        if best is not None and clock() >= ends and (is_provisional or _is_busy(others())):
            is_provisional = True
            trials[candidate] = Trial(candidate=candidate, min_cosine=None)
            continue
        log.info("measuring", **_log_fields(candidate))
        # The last share is that of the batch sizes.
        share_s = (ends - clock()) / (len(candidates) - number + 1)
        trial, tower = _check(candidate, build, probes, reference)
        if tower is not None and best is not None:
            try:
                duel = rounds.run([best[1], tower], _DUEL_BATCHES, seconds=share_s, is_over=_is_hopeless)
            except Exception as error:  # noqa: BLE001 - backends raise errors of any type
                trial, tower = _refused(candidate, trial.min_cosine, error), None
            else:
                is_provisional |= duel.is_busy
                trial = trial.model_copy(update={"ratios": duel.ratios, **duel.evidence(1)})
                trials[best[0]] = trials[best[0]].model_copy(update=duel.evidence(0))
                if not duel.is_won(by_fewer_threads=candidate.threads < best[0].threads):
                    tower = None
        trials[candidate] = trial
        if tower is not None:
            best = candidate, tower
    batch_size = _default_batch_size(device)
    if best is not None and not is_provisional:
        sizes = rounds.run([best[1]], _CPU_BATCHES if is_cpu else _GPU_BATCHES, seconds=ends - clock())
        trials[best[0]] = trials[best[0]].model_copy(update=sizes.evidence(0))
        is_provisional = sizes.is_busy
        if not is_provisional:
            batch_size = sizes.smallest_fast_batch()
    return Tuning(
        device=device,
        trials=tuple(trials.values()),
        chosen=None if best is None else best[0],
        batch_size=batch_size,
        cpu_by_others=round(median(shares), 3) if shares else None,
        provisional=is_provisional,
    )


def compare_towers(
    best: ImageTower, challenger: ImageTower, probes: Sequence[Pixels], *, seconds: float
) -> tuple[float, str | None]:
    """Return how many times as fast the challenger is, and why it is not used; None if it is clearly faster."""
    rounds = _Rounds(probes, time.perf_counter, OtherProcesses().share)
    duel = rounds.run([best, challenger], _DUEL_BATCHES, seconds=seconds, is_over=_is_hopeless)
    refused = None
    if duel.is_busy:
        refused = "other processes used the CPU during the comparison; run the command again while the machine is idle"
    elif not duel.is_won(by_fewer_threads=False):
        refused = f"not clearly faster: a ratio of {_CLEARLY_FASTER} is needed"
    return median(duel.ratios), refused


def _check(
    candidate: Candidate,
    build: Callable[[Candidate], ImageTower],
    probes: Sequence[Pixels],
    reference: ImageFeatures | None,
) -> tuple[Trial, ImageTower | None]:
    """Build the tower of a candidate, and compare its features with the reference; None if the candidate is refused."""
    try:
        tower = build(candidate)
        features = tower.begin(probes)()
    except Exception as error:  # noqa: BLE001 - backends raise errors of any type
        return _refused(candidate, None, error), None
    cosine = None if reference is None else float((features * reference).sum(axis=1).min())
    if cosine is not None and not cosine >= MIN_COSINE:  # also true for NaN
        reason = f"features differ from single precision: cosine {cosine:.4f}, minimum {MIN_COSINE}"
        return Trial(candidate=candidate, min_cosine=cosine, refused=reason), None
    return Trial(candidate=candidate, min_cosine=cosine), tower


def _refused(candidate: Candidate, min_cosine: float | None, error: Exception) -> Trial:
    reason = f"{type(error).__name__}: {one_line(error)}"
    return Trial(candidate=candidate, min_cosine=min_cosine, refused=reason)


def current_cpu_by_others(seconds: float = 0.25) -> float | None:
    """Return the share of the usable cores that other processes use in the next ``seconds``; None if not known."""
    others = OtherProcesses()
    time.sleep(seconds)
    return others.share()


def _unmeasured(device: str, cpu_by_others: float) -> Tuning:
    return Tuning(
        device=device,
        trials=(),
        chosen=None,
        batch_size=_default_batch_size(device),
        cpu_by_others=round(cpu_by_others, 3),
        provisional=True,
    )


def _is_busy(cpu_by_others: float | None) -> bool:
    return cpu_by_others is not None and cpu_by_others > MAX_CPU_BY_OTHERS


@dataclass(frozen=True, slots=True)
class _Round:
    """Images per second of each tower at each batch size, and the share of the CPU that other processes used."""

    rates: Sequence[Mapping[int, float]]
    cpu_by_others: float | None


@dataclass(frozen=True, slots=True)
class _Comparison:
    """Rounds in which the same towers ran at the same batch sizes; of two towers, the second challenges the first."""

    rounds: Sequence[_Round]

    @property
    def quiet(self) -> Sequence[_Round]:
        """The rounds in which other processes hardly used the CPU."""
        return [each for each in self.rounds if not _is_busy(each.cpu_by_others)]

    @property
    def is_busy(self) -> bool:
        """Whether too few rounds are quiet."""
        return len(self.quiet) < _MIN_ROUNDS

    @property
    def used(self) -> Sequence[_Round]:
        """The rounds that count: the quiet ones, or all if these are too few."""
        return self.rounds if self.is_busy else self.quiet

    @property
    def ratios(self) -> tuple[float, ...]:
        """The rate of the second tower divided by that of the first, each at its better batch size."""
        first, second = (self._best_size(tower) for tower in (0, 1))
        return tuple(each.rates[1][second] / each.rates[0][first] for each in self.used)

    def is_won(self, *, by_fewer_threads: bool) -> bool:
        """Return whether the second tower is clearly faster.

        On a busy machine, threads wait for each other. There a tower with fewer threads than the other does not win.
        """
        if self.is_busy and (by_fewer_threads or len(self.rounds) < _MIN_ROUNDS):
            return False
        needed = _CLEARLY_FASTER_WHEN_BUSY if self.is_busy else _CLEARLY_FASTER
        won = sum(ratio > 1 for ratio in self.ratios)
        return median(self.ratios) >= needed and won >= _MOST_ROUNDS * len(self.ratios)

    def smallest_fast_batch(self) -> int:
        """Return the smallest batch that is almost as fast as the best one in the median of the rounds."""
        best = self._best_size(0)
        return next(
            size
            for size in sorted(self.rounds[0].rates[0])
            if median(each.rates[0][size] / each.rates[0][best] for each in self.used) >= _MIN_SHARE_OF_BEST_RATE
        )

    def evidence(self, tower: int) -> dict[str, Any]:
        """Return the fields of the trial of a tower."""
        shares = [each.cpu_by_others for each in self.rounds]
        return {
            "rates": {
                size: tuple(round(each.rates[tower][size], 2) for each in self.rounds)
                for size in self.rounds[0].rates[tower]
            },
            "cpu_by_others": tuple(round(share, 3) for share in shares if share is not None),
        }

    def _best_size(self, tower: int) -> int:
        sizes = self.rounds[0].rates[tower]
        return max(sizes, key=lambda size: median(each.rates[tower][size] for each in self.used))


def _is_hopeless(duel: _Comparison) -> bool:
    return not duel.is_busy and max(duel.ratios) < _HOPELESS


@dataclass(frozen=True, slots=True)
class _Rounds:
    """Measures towers in turns.

    Args:
        probes: images to encode.
        clock: returns the time in seconds.
        cpu_by_others: as for ``measure``.
    """

    probes: Sequence[Pixels]
    clock: Callable[[], float]
    cpu_by_others: Callable[[], float | None]

    def run(
        self,
        towers: Sequence[ImageTower],
        sizes: Sequence[int],
        *,
        seconds: float,
        is_over: Callable[[_Comparison], bool] = lambda _: False,
    ) -> _Comparison:
        """Run rounds until enough of them are quiet or the time is up; at least three, unless the machine is busy.

        Args:
            towers: run in turns at each batch size.
            sizes: batch sizes, ascending; those for which the time or the memory is too short are omitted.
            seconds: time for all rounds.
            is_over: returns whether fewer rounds are enough.
        """
        ends = self.clock() + seconds
        sizes = self._fitting(towers, sizes, seconds)
        rounds: list[_Round] = []
        found = _Comparison(rounds)
        self.cpu_by_others()
        while not (len(found.quiet) == _QUIET_ROUNDS or len(rounds) == _MAX_ROUNDS or is_over(found)):
            # A comparison that is disturbed will be repeated, so it needs no minimum.
            if self.clock() >= ends and (len(rounds) >= _MIN_ROUNDS or (rounds and not found.quiet)):
                break
            rates: list[dict[int, float]] = [{} for _ in towers]
            for size in sizes:
                for tower, its_rates in zip(towers, rates, strict=True):
                    its_rates[size] = tower.streams * size / self._fastest_pass(tower, size, _VISIT_S)
            rounds.append(_Round(rates, self.cpu_by_others()))
        return found

    def _fitting(self, towers: Sequence[ImageTower], sizes: Sequence[int], seconds: float) -> list[int]:
        """Prepare the towers for each batch size, and return the sizes for which time and memory suffice."""
        fitting: list[int] = []
        per_image_s = round_s = 0.0
        for size in sizes:
            if fitting and _MIN_ROUNDS * (round_s + size * per_image_s) > seconds:
                break
            try:
                for tower in towers:
                    self._fastest_pass(tower, size, 0)  # the first batch of a size takes longer
                per_image_s = sum(self._fastest_pass(tower, size, 0) for tower in towers) / size
            except Exception:
                if not fitting:
                    raise
                break  # the memory is too small
            fitting.append(size)
            round_s += max(size * per_image_s, len(towers) * _VISIT_S)
        return fitting

    def _fastest_pass(self, tower: ImageTower, size: int, seconds: float) -> float:
        """Return the seconds of the fastest pass of all streams, since disturbances only slow a pass down."""
        batch = self._batch(size)
        with _passes(tower) as run:
            began, fastest_s = self.clock(), float("inf")
            while True:
                started = self.clock()
                run(batch)
                ended = self.clock()
                fastest_s = min(fastest_s, ended - started)
                if ended - began >= seconds:
                    return max(fastest_s, 1e-9)

    def _batch(self, size: int) -> list[Pixels]:
        return [self.probes[index % len(self.probes)] for index in range(size)]


@contextmanager
def _passes(tower: ImageTower) -> Iterator[Callable[[Sequence[Pixels]], None]]:
    """Yield a function that encodes one batch with each stream of a tower at the same time, as a busy service does."""

    def run_one(batch: Sequence[Pixels]) -> None:
        tower.begin(batch)()

    if tower.streams == 1:
        yield run_one
        return
    with ThreadPoolExecutor(tower.streams) as threads:

        def run_all(batch: Sequence[Pixels]) -> None:
            for _ in threads.map(lambda _: tower.begin(batch, alone=False)(), range(tower.streams)):
                pass

        yield run_all


def probe_images(size_px: int, count: int = 16) -> list[Pixels]:
    """Return fixed synthetic images with the structure of photographs: shading, edges, texture and noise."""
    rng = np.random.default_rng(20)
    rows, columns = np.mgrid[0:size_px, 0:size_px] / size_px
    images = []
    for _ in range(count):
        picture = np.empty((size_px, size_px, 3))
        slope, waves, phase = rng.normal(size=(3, 2, 3)), rng.uniform(2, 40, (2, 3)), rng.uniform(0, 6, 3)
        for channel in range(3):
            shade = slope[0, 0, channel] * rows + slope[0, 1, channel] * columns
            texture = np.sin(waves[0, channel] * rows + waves[1, channel] * columns + phase[channel])
            picture[..., channel] = 128 + 60 * shade + 25 * texture
        for _ in range(rng.integers(1, 6)):  # discs as foreground objects
            middle, radius = rng.uniform(0, 1, 2), rng.uniform(0.05, 0.4)
            inside = (rows - middle[0]) ** 2 + (columns - middle[1]) ** 2 < radius**2
            picture[inside] = 0.3 * picture[inside] + 0.7 * rng.uniform(0, 255, 3)
        picture += rng.normal(0, rng.uniform(1, 12), picture.shape)
        images.append(picture.clip(0, 255).astype(np.uint8))
    return images


def stored_tuning(name: str, device: str, fingerprint: str, options: LoadOptions) -> Tuning | None:
    """Return the stored measurement that ``select_tower`` would use; None if there is none."""
    candidates = list_candidates(device, options)
    if options.data_dir is None:
        return None
    return _read(options.data_dir / "tuning" / f"{_key(name, device, fingerprint, candidates)}.json")


def _key(name: str, device: str, fingerprint: str, candidates: Sequence[Candidate]) -> str:
    """Return a hash of everything that a measurement depends on: model, machine, software and candidates."""
    hardware = [device, platform.machine(), _processor(device), usable_cores()]
    software = [__version__, *(_version(name) for name in ("torch", "openvino", "timm", "open_clip_torch"))]
    inputs = repr((name, fingerprint, hardware, software, list(candidates)))
    return hashlib.sha256(inputs.encode()).hexdigest()[:32]


def _processor(device: str) -> str:
    """Return the name of the CPU, or of the GPU that ``device`` is."""
    if device.startswith("cuda"):
        import torch  # noqa: PLC0415 - only torch uses a GPU, and an exported model is served without torch

        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _read(file: Path | None) -> Tuning | None:
    if file is None or not file.is_file():
        return None
    try:
        return Tuning.model_validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        log.warning("tuning_not_readable", file=str(file), reason=one_line(error))
        return None


def _write(file: Path, tuning: Tuning) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, tuning.model_dump_json(indent=2) + "\n")
    except OSError as error:  # the next start measures again
        log.warning("tuning_not_written", file=str(file), reason=one_line(error))


def _default_batch_size(device: str) -> int:
    return 4 if device.startswith("cpu") else 32


def _log_fields(candidate: Candidate) -> dict[str, Any]:
    return {"backend": candidate.backend, "precision": candidate.precision, "threads": candidate.threads}
