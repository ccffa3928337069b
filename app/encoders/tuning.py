"""Finds out how an image tower runs best on this machine, and remembers it.

What is fastest cannot be known from the model's name or the processor's: on one CPU a batch of eight is half as fast an
image as a batch of one, and a back end that doubles one model's speed halves another's. So each way is tried for a
moment, once; what it says must also agree with single precision.
"""

import hashlib
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import structlog
import torch
from pydantic import ValidationError

from app import __version__
from app.encoders._base import Candidate, ImagePath, ImageTower, LoadOptions, Trial, Tuning
from app.encoders.openvino_tower import openvino_is_installed
from app.errors import ModelUnavailableError
from app.runtime.atomic_files import write_atomically
from app.runtime.cpu import usable_cores
from app.types import ImageFeatures, Pixels

log = structlog.get_logger()

MIN_COSINE = 0.999
"""Between the features of every probe image and those in single precision, for a way to be chosen.

For EfficientNet-lite0 on 372 photographs of clothing, bfloat16 gave a cosine of 0.993 at least and changed 2 answers in
100; for a ViT-B-32 it gives 0.9999.
"""

_CPU_BATCHES = (1, 2, 4, 8, 16, 32)
_GPU_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# A way that is this much slower than the best so far is not tried in larger batches.
_HOPELESS = 0.6
_SECONDS_PER_BATCH_SIZE = 0.4


def candidates(device: str, options: LoadOptions) -> list[Candidate]:
    """Return the ways that this device and the settings leave, the likely best first.

    Raises:
        ModelUnavailableError: the settings leave none.
    """
    wanted = options.precision
    if not device.startswith("cpu"):
        if options.backend == "openvino":
            raise ModelUnavailableError(f"DEIXIS_IMAGE_BACKEND=openvino runs on the CPU, and the device is {device}")
        return [Candidate("torch", model_precision(device, options), 0)]
    cores = usable_cores()
    found: list[Candidate] = []
    if options.backend in {"auto", "openvino"} and openvino_is_installed():
        found += [Candidate("openvino", precision, cores) for precision in ("fp32", "bf16")]
    elif options.backend == "openvino":
        raise ModelUnavailableError(
            "DEIXIS_IMAGE_BACKEND=openvino needs the package openvino; pip install 'deixis[openvino]' installs it"
        )
    if options.backend in {"auto", "torch"}:
        found += [Candidate("torch", precision, cores) for precision in ("fp32", "bf16", "fp16")]
        if cores > 1:
            found.append(Candidate("torch", "fp32", 1))
    if wanted == "auto":
        # fp16 is slower than fp32 on every CPU so far, and bf16 where there are no instructions for it.
        usual_ones = {"fp32", "bf16"} if has_bf16_instructions() else {"fp32"}
        return [each for each in found if each.precision in usual_ones]
    found = [each for each in found if each.precision == wanted]
    if not found:
        raise ModelUnavailableError(
            f"DEIXIS_PRECISION={wanted} is not possible with DEIXIS_IMAGE_BACKEND={options.backend} on a CPU"
        )
    return found


def model_precision(device: str, options: LoadOptions) -> str:
    """Return the precision in which a model is loaded: on a CPU that of the text tower, elsewhere that of both."""
    if device.startswith("cpu"):
        return "fp32"
    usual = "fp16" if device.startswith("cuda") else "fp32"
    return usual if options.precision == "auto" else options.precision


def has_bf16_instructions() -> bool:
    """Return whether this CPU multiplies in bfloat16."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    # Of Intel and AMD, and of Arm.
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16"))


def select(
    name: str,
    device: str,
    *,
    build: Callable[[Candidate], ImageTower],
    size_px: int,
    fingerprint: str,
    options: LoadOptions,
) -> tuple[ImageTower, ImagePath, Tuning | None]:
    """Return the best tower: as measured before on this machine, or now, or where neither may be, as is usual.

    Args:
        name: of the model.
        device: as ``pick_device`` returns it.
        build: makes a candidate's tower.
        size_px: side of an image.
        fingerprint: of the weights.
        options: ``data_dir`` has the measurements; ``tuning_seconds`` bounds a new one, 0 makes none.

    Raises:
        ModelUnavailableError: the settings leave no way, or none of them works.
    """
    ways = candidates(device, options)
    file = (
        None
        if options.data_dir is None
        else options.data_dir / "tuning" / f"{_key(name, device, fingerprint, ways)}.json"
    )
    tuning = None if options.measure_again else _read(file)
    if tuning is None and options.tuning_seconds > 0:
        tuning = measure(device, ways, build, probe_images(size_px), seconds=options.tuning_seconds)
        if tuning.best is not None and file is not None:
            _write(file, tuning)
    path = tuning.image_path() if tuning else None
    if path is not None:
        ways.insert(0, Candidate(path.backend, path.precision, path.threads))
    failed: Exception | None = None
    for way in ways:
        try:
            tower = build(way)
            tower.begin(probe_images(size_px, count=1))()
        except Exception as error:  # noqa: BLE001 - whatever a back end raises
            log.warning("image_tower_does_not_work", model=name, **_as_fields(way), reason=_one_line(error))
            failed, path = error, None
            continue
        chosen = path or ImagePath(way.backend, device, way.precision, _usual_batch(device), way.threads, None)
        return tower, chosen, tuning
    raise ModelUnavailableError(
        f"model '{name}' is not usable: a trial ended in {type(failed).__name__}: {_one_line(failed)}; check that its"
        " configuration and its weights belong together, and try DEIXIS_PRECISION=fp32"
    ) from failed


def measure(
    device: str,
    ways: Sequence[Candidate],
    build: Callable[[Candidate], ImageTower],
    probes: Sequence[Pixels],
    *,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Tuning:
    """Try every candidate, for about ``seconds`` in all; the first batch of each comes in any case.

    On a CPU each must agree with torch in single precision; elsewhere the precision was chosen, and is not questioned.
    """
    ends = clock() + seconds
    cpu = device.startswith("cpu")
    reference = build(Candidate("torch", "fp32", usable_cores())).begin(probes)() if cpu else None
    trials: list[Trial] = []
    best = 0.0
    for number, way in enumerate(ways):
        log.info("measuring", **_as_fields(way))
        share = (ends - clock()) / (len(ways) - number)
        trial = _try(way, build, probes, reference, _CPU_BATCHES if cpu else _GPU_BATCHES, best, share, clock)
        best = max(best, trial.best_rate)
        trials.append(trial)
    return Tuning(device=device, trials=tuple(trials))


def _try(
    way: Candidate,
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
        tower = build(way)
        features = tower.begin(probes)()
        cosine = None if reference is None else float((features * reference).sum(axis=1).min())
        if cosine is not None and not cosine >= MIN_COSINE:  # NaN neither
            reason = f"features differ from single precision: cosine {cosine:.4f}, needed {MIN_COSINE}"
            return Trial(candidate=way, min_cosine=cosine, images_per_s={}, refused=reason)
        ends = clock() + seconds
        for size in sizes:
            if rates and (clock() >= ends or (max(rates.values()) < _HOPELESS * best and size > 2) or _declines(rates)):
                break
            rates[size] = _rate(tower, [probes[index % len(probes)] for index in range(size)], clock)
    except Exception as error:  # noqa: BLE001 - whatever a back end raises
        if rates:  # too large a batch for the memory
            return Trial(candidate=way, min_cosine=cosine, images_per_s=rates)
        return Trial(
            candidate=way, min_cosine=None, images_per_s={}, refused=f"{type(error).__name__}: {_one_line(error)}"
        )
    return Trial(candidate=way, min_cosine=cosine, images_per_s=rates)


def _declines(rates: dict[int, float]) -> bool:
    """Return whether the two largest batches so far were no better than a smaller one."""
    *before, one, two = rates.values() if len(rates) > 2 else (0.0, 1.0, 1.0)
    return max(one, two) < 1.02 * max(before)


def _rate(tower: ImageTower, batch: Sequence[Pixels], clock: Callable[[], float]) -> float:
    """Return images per second: of the quickest run, since all that disturbs a measurement makes it slower."""
    tower.begin(batch)()
    began = clock()
    quickest, runs = float("inf"), 0
    while runs < 2 or (clock() - began < _SECONDS_PER_BATCH_SIZE and runs < 20):
        started = clock()
        tower.begin(batch)()
        quickest = min(quickest, clock() - started)
        runs += 1
    return round(len(batch) / max(quickest, 1e-9), 2)


def probe_images(size_px: int, count: int = 16) -> list[Pixels]:
    """Return images with the structure of photographs, always the same ones: shading, edges, texture and noise."""
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
        for _ in range(rng.integers(1, 6)):  # things before a background
            middle, radius = rng.uniform(0, 1, 2), rng.uniform(0.05, 0.4)
            inside = (rows - middle[0]) ** 2 + (columns - middle[1]) ** 2 < radius**2
            picture[inside] = 0.3 * picture[inside] + 0.7 * rng.uniform(0, 255, 3)
        picture += rng.normal(0, rng.uniform(1, 12), picture.shape)
        images.append(picture.clip(0, 255).astype(np.uint8))
    return images


def fingerprint_of(weights: Iterable[tuple[str, torch.Tensor]], *others: object) -> str:
    """Return a hash of weights, their names and whatever else counts; about a second for each gigabyte."""
    digest = hashlib.sha256(repr(others).encode())
    for name, tensor in weights:
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype};".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def _key(name: str, device: str, fingerprint: str, ways: Sequence[Candidate]) -> str:
    """Return what a measurement depends on, hashed: the model, the machine, the software, and what was allowed."""
    hardware = [device, platform.machine(), _processor(), usable_cores()]
    if device.startswith("cuda"):
        hardware.append(torch.cuda.get_device_name(device))
    software = [__version__, torch.__version__, _version("openvino"), _version("timm"), _version("open_clip_torch")]
    told = repr((name, fingerprint, hardware, software, list(ways)))
    return hashlib.sha256(told.encode()).hexdigest()[:32]


def _processor() -> str:
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
    except OSError as error:  # it will be measured again
        log.warning("tuning_not_kept", file=str(file), reason=_one_line(error))


def _usual_batch(device: str) -> int:
    return 4 if device.startswith("cpu") else 32


def _as_fields(way: Candidate) -> dict[str, Any]:
    return {"backend": way.backend, "precision": way.precision, "threads": way.threads}


def _one_line(error: BaseException | None) -> str:
    return " ".join(str(error).split())[:300]
