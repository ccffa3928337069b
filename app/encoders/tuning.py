"""Measures how an image tower runs fastest on this machine, and stores the result.

The fastest options cannot be predicted from the model and the processor: on one CPU, a batch of eight takes twice as
long per image as a batch of one, and a backend that doubles the speed of one model halves that of another. Therefore
each candidate is measured once. Its features must also agree with those in single precision.
"""

import hashlib
import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import structlog
from pydantic import ValidationError

from app import __version__
from app.encoders._base import Candidate, ImagePath, ImageTower, LoadOptions, Trial, Tuning
from app.errors import ModelUnavailableError
from app.runtime.atomic_files import write_atomically
from app.runtime.cpu import usable_cores
from app.types import ImageFeatures, Pixels

log = structlog.get_logger()

MIN_COSINE = 0.999
"""Lowest allowed cosine between the features of a probe image and its features in single precision.

For EfficientNet-lite0 on 372 photographs of clothing, the lowest cosine of bfloat16 was 0.993 and 2 predictions in 100
changed; for a ViT-B-32 it is 0.9999.
"""

# What to install for each back end of a CPU, in the order in which they are likely to be fast.
_PACKAGES = {"openvino": "deixis[openvino]", "torch": "deixis[torch]"}

_CPU_BATCHES = (1, 2, 4, 8, 16, 32)
_GPU_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# A candidate below this share of the best rate so far is not measured with larger batches.
_MIN_RELATIVE_RATE = 0.6
_SECONDS_PER_BATCH_SIZE = 0.4


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
        return [Candidate("torch", model_precision(device, options), 0)]
    cores = usable_cores()
    if options.backend in _PACKAGES and not is_installed(options.backend):
        raise ModelUnavailableError(
            f"DEIXIS_IMAGE_BACKEND={options.backend} needs the package {options.backend}; run: pip install"
            f" '{_PACKAGES[options.backend]}'"
        )
    backends = [backend for backend in _PACKAGES if options.backend in {"auto", backend} and is_installed(backend)]
    found: list[Candidate] = []
    if "openvino" in backends:
        found += [Candidate("openvino", precision, cores) for precision in ("fp32", "bf16")]
    if "torch" in backends:
        found += [Candidate("torch", precision, cores) for precision in ("fp32", "bf16", "fp16")]
        if cores > 1:
            found.append(Candidate("torch", "fp32", 1))
    if options.precision == "auto":
        # fp16 is slower than fp32 on every CPU measured so far, and so is bf16 without instructions for it.
        precisions = {"fp32", "bf16"} if has_bf16_instructions() else {"fp32"}
    else:
        precisions = {options.precision}
    found = [candidate for candidate in found if candidate.precision in precisions]
    if not found:
        raise ModelUnavailableError(
            f"no installed package runs DEIXIS_IMAGE_BACKEND={options.backend} with DEIXIS_PRECISION="
            f"{options.precision} on a CPU; set them to auto, or run: pip install '{_PACKAGES['openvino']}'"
        )
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
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    # The first two are of Intel and AMD, the last is of Arm.
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16"))


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
    tuning = None if options.measure_again else _read(file)
    if tuning is None and options.tuning_seconds > 0:
        tuning = measure(device, candidates, build, probe_images(size_px), seconds=options.tuning_seconds)
        if tuning.best is not None and file is not None:
            _write(file, tuning)
    path = tuning.image_path() if tuning else None
    if path is not None:
        candidates.insert(0, Candidate(path.backend, path.precision, path.threads))
    failure: Exception | None = None
    for candidate in candidates:
        try:
            tower = build(candidate)
            tower.begin(probe_images(size_px, count=1))()
        except Exception as error:  # noqa: BLE001 - backends raise errors of any type
            log.warning("image_tower_failed", model=name, **_log_fields(candidate), reason=_one_line(error))
            failure, path = error, None
            continue
        if path is None:
            path = ImagePath(
                candidate.backend, device, candidate.precision, _default_batch_size(device), candidate.threads, None
            )
        return tower, path, tuning
    raise ModelUnavailableError(
        f"model '{name}' cannot be used: a test ended with {type(failure).__name__}: {_one_line(failure)}; check that"
        " its configuration and its weights belong together, and try DEIXIS_PRECISION=fp32"
    ) from failure


def measure(
    device: str,
    candidates: Sequence[Candidate],
    build: Callable[[Candidate], ImageTower],
    probes: Sequence[Pixels],
    *,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Tuning:
    """Measure every candidate with at least one batch, for about ``seconds`` in total.

    On a CPU, a candidate is refused if its features differ from those in single precision: of torch, or of OpenVINO if
    torch is not installed. On other devices there is only one candidate, and its precision is not checked.
    """
    ends = clock() + seconds
    cpu = device.startswith("cpu")
    reference_backend = "torch" if is_installed("torch") else "openvino"
    reference = build(Candidate(reference_backend, "fp32", usable_cores())).begin(probes)() if cpu else None
    trials: list[Trial] = []
    best = 0.0
    for number, candidate in enumerate(candidates):
        log.info("measuring", **_log_fields(candidate))
        share = (ends - clock()) / (len(candidates) - number)
        trial = _measure_candidate(
            candidate, build, probes, reference, _CPU_BATCHES if cpu else _GPU_BATCHES, best, share, clock
        )
        best = max(best, trial.best_rate)
        trials.append(trial)
    return Tuning(device=device, trials=tuple(trials))


def _measure_candidate(
    candidate: Candidate,
    build: Callable[[Candidate], ImageTower],
    probes: Sequence[Pixels],
    reference: ImageFeatures | None,
    sizes: Sequence[int],
    best: float,
    seconds: float,
    clock: Callable[[], float],
) -> Trial:
    rates: dict[int, float] = {}
    try:
        tower = build(candidate)
        features = tower.begin(probes)()
        cosine = None if reference is None else float((features * reference).sum(axis=1).min())
        if cosine is not None and not cosine >= MIN_COSINE:  # also true for NaN
            reason = f"features differ from single precision: cosine {cosine:.4f}, minimum {MIN_COSINE}"
            return Trial(candidate=candidate, min_cosine=cosine, images_per_s={}, refused=reason)
        ends = clock() + seconds
        for size in sizes:
            if rates and (
                clock() >= ends or (max(rates.values()) < _MIN_RELATIVE_RATE * best and size > 2) or _has_peaked(rates)
            ):
                break
            rates[size] = _rate(tower, [probes[index % len(probes)] for index in range(size)], clock)
    except Exception as error:  # noqa: BLE001 - backends raise errors of any type
        if rates:  # the larger batch does not fit into the memory
            return Trial(candidate=candidate, min_cosine=cosine, images_per_s=rates)
        return Trial(
            candidate=candidate, min_cosine=None, images_per_s={}, refused=f"{type(error).__name__}: {_one_line(error)}"
        )
    return Trial(candidate=candidate, min_cosine=cosine, images_per_s=rates)


def _has_peaked(rates: dict[int, float]) -> bool:
    """Return whether the two largest batches so far were at most 2 % faster than a smaller one."""
    *smaller, second, largest = rates.values() if len(rates) > 2 else (0.0, 1.0, 1.0)
    return max(second, largest) < 1.02 * max(smaller)


def _rate(tower: ImageTower, batch: Sequence[Pixels], clock: Callable[[], float]) -> float:
    """Return the images per second of the fastest run, since disturbances only slow a run down."""
    tower.begin(batch)()
    began = clock()
    fastest_s, runs = float("inf"), 0
    while runs < 2 or (clock() - began < _SECONDS_PER_BATCH_SIZE and runs < 20):
        started = clock()
        tower.begin(batch)()
        fastest_s = min(fastest_s, clock() - started)
        runs += 1
    return round(len(batch) / max(fastest_s, 1e-9), 2)


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
        log.warning("tuning_not_readable", file=str(file), reason=_one_line(error))
        return None


def _write(file: Path, tuning: Tuning) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, tuning.model_dump_json(indent=2) + "\n")
    except OSError as error:  # the next start measures again
        log.warning("tuning_not_written", file=str(file), reason=_one_line(error))


def _default_batch_size(device: str) -> int:
    return 4 if device.startswith("cpu") else 32


def _log_fields(candidate: Candidate) -> dict[str, Any]:
    return {"backend": candidate.backend, "precision": candidate.precision, "threads": candidate.threads}


def _one_line(error: BaseException | None) -> str:
    return " ".join(str(error).split())[:300]
