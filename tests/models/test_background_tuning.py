"""Models with a provisional tuning are measured again while the service is idle."""

import asyncio
import multiprocessing
import os
import time
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
from structlog.testing import capture_logs

from app.encoders._base import Candidate, ImagePath, LoadOptions, Trial, Tuning
from app.errors import ModelUnavailableError
from app.models import background_tuning
from app.models.background_tuning import measure_in_process, tune_when_idle
from app.models.registry import ModelRegistry

OPENVINO = Candidate("openvino", "fp32", 2)
LIMIT_S = 20


def make_tuning(*, provisional):
    return Tuning(
        device="cpu",
        trials=(Trial(candidate=OPENVINO, min_cosine=1.0, rates={1: (200.0,)}),),
        chosen=OPENVINO,
        batch_size=1,
        provisional=provisional,
    )


class Served:
    """What the registry needs of a model in service: when a request last had a place."""

    def __init__(self, name, tuning):
        self.name = name
        self.encoder = SimpleNamespace(tuning=tuning, image_path=ImagePath("openvino", "cpu", "fp32", 4, 2))
        self.images = self
        self.users, self.ended_at = 0, 0.0

    @property
    def last_request_at(self):
        return time.perf_counter() if self.users else self.ended_at

    @contextmanager
    def admit(self, count, within_s, *, is_request):
        self.users += 1
        try:
            yield
        finally:
            self.users -= 1
            self.ended_at = time.perf_counter()


def make_registry(**tunings):
    served = {name: Served(name, tuning) for name, tuning in tunings.items()}
    return ModelRegistry(served, decoders=None, decoders_per_request=1, request_timeout_s=None)


def tune(registry, measure, **others):
    """Run to the end; only what a test changes is not idle."""
    return asyncio.wait_for(
        tune_when_idle(
            registry,
            measure,
            **{"cpu_in_use": lambda: 0.0, "idle_s": 0.0, "every_s": 0.001, "watch_every_s": 0.001, **others},
        ),
        LIMIT_S,
    )


PROVISIONAL, FINAL = make_tuning(provisional=True), make_tuning(provisional=False)


def test_only_models_with_a_provisional_tuning_are_measured_until_it_is_final():
    measured, results = [], {"a": [FINAL], "b": [PROVISIONAL, FINAL]}

    async def measure(name):
        measured.append(name)
        return results[name].pop(0)

    with capture_logs() as logs:
        asyncio.run(tune(make_registry(a=PROVISIONAL, b=PROVISIONAL, c=FINAL, d=None), measure))
    assert measured == ["a", "b", "b"]
    assert [(entry["event"], entry["model"]) for entry in logs] == [
        ("tuned", "a"),
        ("tuning_postponed", "b"),
        ("tuned", "b"),
    ]


def test_a_request_ends_the_measurement_which_is_made_later():
    registry, attempts = make_registry(a=PROVISIONAL), []

    async def measure(name):
        attempts.append("began")
        if len(attempts) > 2:
            return FINAL
        try:
            with registry.admitted(registry.get(), 1, within_s=None):
                await asyncio.Event().wait()
        finally:
            attempts.append("cancelled")

    with capture_logs() as logs:
        asyncio.run(tune(registry, measure))
    assert attempts == ["began", "cancelled", "began"]
    assert [entry.get("reason") for entry in logs] == ["request", None]


@pytest.mark.parametrize("reason", ["a request", "a busy machine", "too little memory", "a request a moment ago"])
def test_nothing_is_measured_while_the_service_is_not_idle(monkeypatch, reason):
    registry, checks, enough = make_registry(a=PROVISIONAL), [], asyncio.Event()

    def check(answer):
        checks.append(answer)
        if len(checks) == 20:
            enough.set()
        return answer

    async def measure(name):
        raise AssertionError(name)

    async def run():
        use = registry.admitted(registry.get(), 1, within_s=None) if reason == "a request" else nullcontext()
        with use:
            tuning = asyncio.create_task(
                tune(
                    registry,
                    measure,
                    cpu_in_use=lambda: check(0.5 if reason == "a busy machine" else 0.0),
                    idle_s=LIMIT_S * 10 if reason == "a request a moment ago" else 0.0,
                )
            )
            await enough.wait()
            assert not tuning.done()
            tuning.cancel()

    if reason == "too little memory":
        monkeypatch.setattr(background_tuning, "fits_twice", lambda: False)
    with capture_logs() as logs:
        asyncio.run(run())
    assert logs == []


def test_each_attempt_without_a_result_doubles_the_wait(monkeypatch):
    """Otherwise a service with a request every two minutes would spend half of its time on measuring."""
    registry, waits = make_registry(a=PROVISIONAL), []
    began = time.perf_counter()
    clock = {"now": began}

    async def measure(name):
        waits.append(clock["now"] - registry.last_used_at)
        registry.get().ended_at = clock["now"]
        return PROVISIONAL if len(waits) < 3 else FINAL

    def cpu_in_use():
        clock["now"] += 10.0
        return 0.0

    monkeypatch.setattr(background_tuning.time, "perf_counter", lambda: clock["now"])
    asyncio.run(tune(registry, measure, idle_s=60.0, cpu_in_use=cpu_in_use))
    assert waits == [pytest.approx(wait, abs=15) for wait in (60, 120, 240)]


def test_a_model_that_cannot_be_measured_does_not_keep_others_from_it():
    async def measure(name):
        if name == "a":
            raise ModelUnavailableError("its folder was removed")
        return FINAL

    with capture_logs() as logs:
        asyncio.run(tune(make_registry(a=PROVISIONAL, b=PROVISIONAL), measure))
    assert [entry["event"] for entry in logs] == ["tuning_failed", "tuned"]


def test_a_model_is_measured_in_a_process_which_ends_with_its_caller(monkeypatch, tmp_path):
    options = LoadOptions(device="cpu", data_dir=tmp_path, tuning_seconds=1)

    async def run():
        with pytest.raises(ModelUnavailableError, match="no-such-folder"):
            await measure_in_process("local-dir:no-such-folder", options=options, log_format="console")
        task = asyncio.create_task(measure_in_process("embedded", options=options, log_format="console"))
        while not multiprocessing.active_children():  # noqa: ASYNC110 - a process has no event for its start
            await asyncio.sleep(0.01)
        (child,) = multiprocessing.active_children()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert not child.is_alive()

    asyncio.run(asyncio.wait_for(run(), 60))
    assert os.getpriority(os.PRIO_PROCESS, 0) < 19
