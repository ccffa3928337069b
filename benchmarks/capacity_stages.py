"""The times that ``benchmarks/capacity.py`` simulates with, measured on this machine.

    python -m benchmarks.capacity_stages embedded --output stages.json [--search benchmarks/results/DATE-captions.json]
    python -m benchmarks.capacity_stages embedded --engine ray --output stages.json

A server of its own is asked by one connection, one photograph after the other: what its answers tell as decode and
adapt, and what the client waits beyond all that they tell, which is HTTP. The same with pauses, which tells how much
longer a machine takes that was idle. The image tower alone, by images in a batch. A hop over loopback between two
processes: pickled pixels, and a pickled feature, there and back; whatever carries them in a cluster takes longer.
With ``--engine ray`` the server is one on a Ray of its own, and instead of the hop over loopback it is measured which
processor time each kind of its processes has for a request when sixteen callers ask, and what a lone one takes more,
which wakes every process anew. Requests about files that are no images, of which no encoder hears, tell the edge's part
of it. What a lone client waits beyond all of that is the messages' way; where it waits less, for some of it nobody
waited. A batch takes longer by what it does in its replica beyond the tower alone. ``call_core_s`` is that of loopback.

Searches are read from a result of ``benchmarks.captions``; what of one does not shrink with the parts is measured with
``--parts-of``.

Everything is measured in up to ``--rounds`` rounds, each of which waits until others leave the cores alone, and the
round that they disturbed least counts; ``others_cpu`` tells which share of the cores they had even then. With one round
nothing waits.
"""

import argparse
import http.client
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from benchmarks.capacity import by_size
from benchmarks.load import LABELS, classify_requests, form_request, photographs
from benchmarks.models import write_open_clip
from benchmarks.service import CORES, Server, about_this_run, run_json, say, serving, tune

SIZES = (1, 2, 4, 8, 16, 32, 64)
_ASKED = 100
_ASKED_OF_RAY = 320
_WARMING = 50
_CALLERS = 16
_STAGES = ("text", "decode", "queue", "encode", "adapt")
ROUNDS = 8
QUIET_ENOUGH = 0.03
_PAUSE_S = 0.03
_HOPS = 500
_PARTS = (1, 2, 4, 8, 16, 32)
_IDLE_S = 5.0
_TUNED_FOR_S = 20.0
_QUIET = 0.1
_PATIENCE_S = 30.0

_Figures = TypeVar("_Figures")


def machine_cpu_s() -> float:
    """Return the processor time that the whole machine used so far, its host's included (Linux only)."""
    ticks = [int(each) for each in Path("/proc/stat").read_text("ascii").split(maxsplit=9)[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # without idle and waiting for a disk


def wait_for_quiet() -> None:
    """Wait until others have left the cores alone for a second, and give up after ``_PATIENCE_S``."""
    ends = time.perf_counter() + _PATIENCE_S
    while time.perf_counter() < ends:
        used_s = machine_cpu_s()
        time.sleep(1.0)
        if machine_cpu_s() - used_s < _QUIET * CORES:
            return
    say("others keep the cores busy; the figures are of little worth")


class OthersCpu:
    """The share of the cores that others have while something is measured."""

    def __init__(self, *own_cpu_s: Callable[[], float]) -> None:
        self._own = own_cpu_s
        self._began = time.perf_counter()
        self._used_s = self._others_s()

    def share(self, more_own_s: float = 0.0) -> float:
        """Return it since the beginning, without ``more_own_s`` of processes that have ended meanwhile."""
        used_s = self._others_s() - self._used_s - more_own_s
        return round(max(0.0, used_s) / (time.perf_counter() - self._began) / CORES, 3)

    def _others_s(self) -> float:
        return machine_cpu_s() - sum(each() for each in self._own)


def quietest(rounds: int, measured: Callable[[], _Figures], *own_cpu_s: Callable[[], float]) -> tuple[_Figures, float]:
    """Measure a few times, and return the figures that others disturbed least, with the share of the cores they had."""
    found: list[tuple[float, int, _Figures]] = []
    for number in range(rounds):
        if rounds > 1:
            wait_for_quiet()
        others = OthersCpu(*own_cpu_s)
        figures = measured()
        found.append((others.share(), number, figures))
        if found[-1][0] <= QUIET_ENOUGH:
            break
    share, _, figures = min(found)
    return figures, share


def asked(
    server: Server, pause_s: float, requests: Sequence[bytes] | None = None, count: int = _ASKED
) -> list[dict[str, float]]:
    """Ask for one photograph after the other; return the milliseconds of each stage, and of the whole as ``total``."""
    host, _, port = server.url.rpartition("//")[2].partition(":")
    connection = http.client.HTTPConnection(host, int(port))
    forms = []
    for request in requests or classify_requests(1):
        head, _, body = request.partition(b"\r\n\r\n")
        forms.append((body, head.partition(b"Content-Type: ")[2].partition(b"\r\n")[0].decode()))
    rows, chance = [], random.Random(1)
    for number in range(count + _WARMING):
        body, content_type = forms[number % len(forms)]
        began = time.perf_counter()
        connection.request("POST", "/v1/classify", body, {"Content-Type": content_type})
        answer = connection.getresponse().read()
        total_ms = 1000 * (time.perf_counter() - began)
        rows.append(json.loads(answer).get("timing_ms", {}) | {"total": total_ms})
        if pause_s:
            time.sleep(chance.expovariate(1 / pause_s))
    connection.close()
    return rows[_WARMING:]


def edge_times(server: Server, rounds: int) -> dict[str, Any]:
    """Return the seconds of HTTP, decoding and adapting of lone requests, and what an idle machine adds."""
    rows, others = quietest(rounds, lambda: asked(server, 0.0), server.cpu_s, time.process_time)
    spaced, others_with_pauses = quietest(rounds, lambda: asked(server, _PAUSE_S), server.cpu_s, time.process_time)
    http_ms = [row["total"] - sum(row[stage] for stage in _STAGES) for row in rows]
    typical = [statistics.median(row["total"] for row in some) for some in (rows, spaced)]
    return {
        "http_s": _seconds(http_ms),
        "decode_s": _seconds([row["decode"] for row in rows]),
        "adapt_s": _seconds([row["text"] + row["queue"] + row["adapt"] for row in rows]),
        "idle_s": round(max(0.0, typical[1] - typical[0]) / 1000, 6),
        "lone": {
            **{stage: round(statistics.median(row[stage] for row in rows), 3) for stage in (*_STAGES, "total")},
            "total_with_pauses": round(typical[1], 3),
            "others_cpu": [others, others_with_pauses],
        },
    }


@dataclass(frozen=True, slots=True)
class Used:
    """What requests of several callers took.

    Args:
        core_s: of a request by kind of process, without what each kind has when nobody asks.
        batch: the mean batch of the encoder, in images.
        call: images in a call of the edge, in the mean.
    """

    core_s: Mapping[str, float]
    batch: float = 1.0
    call: float = 1.0

    def of(self, word: str) -> float:
        """Return the core seconds of all kinds with this in their names."""
        return sum(each for kind, each in self.core_s.items() if word in kind)

    @property
    def beside(self) -> float:
        """The core seconds of processes that no request goes through."""
        return sum(self.core_s.values()) - sum(self.of(word) for word in ("edge", "encoder", "proxies"))


def used_by(server: Server, requests: Sequence[bytes], idle: Mapping[str, float], count_of_callers: int) -> Used:
    """Ask as so many callers; ``idle`` are the cores that each kind of process has when nobody asks."""
    towers = ("images", "images from here")
    batches, before, began = [server.batches(each) for each in towers], server.cpu_s_by_kind(), time.perf_counter()
    with ThreadPoolExecutor(count_of_callers) as callers:
        each = _ASKED_OF_RAY // count_of_callers
        rows = list(callers.map(lambda _: asked(server, 0.0, requests, each), range(count_of_callers)))
    # Those that only warm it up are not among the rows.
    count = sum(_WARMING + len(each) for each in rows)
    seconds = time.perf_counter() - began
    used = {
        kind: max(0.0, now - before.get(kind, 0.0) - idle.get(kind, 0.0) * seconds) / count
        for kind, now in server.cpu_s_by_kind().items()
    }
    sizes = [
        max(1.0, (images - images_before) / max(1.0, number - number_before))
        for (images, number), (images_before, number_before) in zip(
            [server.batches(each) for each in towers], batches, strict=True
        )
    ]
    return Used(used, *sizes)


def ray_times(server: Server, rounds: int, tower: dict[str, Any]) -> dict[str, Any]:
    """Return the seconds of edges and of what Ray adds, of lone requests to one edge with one encoder.

    Args:
        server: on a Ray of this machine alone.
        rounds: of each measurement, at most.
        tower: what ``tower_times`` returned.
    """
    fields = {"labels": json.dumps(LABELS)}
    nothing = [form_request("/v1/classify", [b"this is no image" * 1000], fields)]
    own = (server.cpu_s, time.process_time)
    idle, _ = quietest(rounds, lambda: _idle(server), *own)
    without, others_without = quietest(rounds, lambda: used_by(server, nothing, idle, _CALLERS), *own)
    used, others = quietest(rounds, lambda: used_by(server, classify_requests(1), idle, _CALLERS), *own)
    alone, others_alone = quietest(rounds, lambda: used_by(server, classify_requests(1), idle, 1), *own)
    rows, others_lone = quietest(rounds, lambda: asked(server, 0.0, count=_ASKED), *own)
    spaced, others_with_pauses = quietest(rounds, lambda: asked(server, _PAUSE_S, count=_ASKED), *own)
    lone_s, spaced_s = (statistics.median(row["total"] for row in some) / 1000 for some in (rows, spaced))
    decode_s, adapt_s = (
        statistics.mean(sum(row[stage] for stage in stages) for row in rows) / 1000
        for stages in (("decode",), ("text", "adapt"))
    )
    encode_s = statistics.median(row["encode"] for row in rows) / 1000
    return from_processor_time(
        used, without, alone, lone_s=lone_s, decode_s=decode_s, adapt_s=adapt_s, encode_s=encode_s, tower=tower
    ) | {
        "idle_cores": round(sum(idle.values()), 4),
        "decode_s": _seconds([row["decode"] for row in rows]),
        "adapt_s": _seconds([row["text"] + row["adapt"] for row in rows]),
        "idle_s": round(max(0.0, spaced_s - lone_s), 6),
        "lone": {
            **{stage: round(statistics.median(row[stage] for row in rows), 3) for stage in (*_STAGES, "total")},
            "total_with_pauses": round(1000 * spaced_s, 3),
            "mean_batch": round(used.batch, 3),
            "mean_call": round(used.call, 3),
            "core_ms": {kind: round(1000 * each, 3) for kind, each in used.core_s.items()},
            "core_ms_alone": {kind: round(1000 * each, 3) for kind, each in alone.core_s.items()},
            "core_ms_without_image": {kind: round(1000 * each, 3) for kind, each in without.core_s.items()},
            "cores_when_idle": {kind: round(each, 4) for kind, each in idle.items()},
            "others_cpu": [others_without, others, others_alone, others_lone, others_with_pauses],
        },
    }


def _idle(server: Server) -> dict[str, float]:
    """Return the cores that each kind of process has while nobody asks."""
    before, began = server.cpu_s_by_kind(), time.perf_counter()
    time.sleep(_IDLE_S)
    seconds = time.perf_counter() - began
    return {kind: (now - before.get(kind, 0.0)) / seconds for kind, now in server.cpu_s_by_kind().items()}


def from_processor_time(
    used: Used,
    without: Used,
    alone: Used,
    *,
    lone_s: float,
    decode_s: float,
    adapt_s: float,
    encode_s: float,
    tower: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the stages of Ray that processor times tell.

    Args:
        used: by requests with an image.
        without: by requests with what is none.
        alone: by requests with an image, one after the other.
        lone_s: that a client waits who is alone.
        decode_s: of the edge, for the image of a lone request.
        adapt_s: of the edge, for that request.
        encode_s: of the batch of that image, in its replica.
        tower: what ``tower_times`` returned.
    """
    alone_s, ahead_s = ({int(size): each for size, each in tower[name].items()} for name in ("alone_s", "ahead_s"))
    # Of each batch, however large it is.
    more_s = max(0.0, encode_s - by_size(alone_s, 1)[0])
    alone_s, ahead_s = ({size: each + more_s for size, each in some.items()} for some in (alone_s, ahead_s))
    by_images = by_size(alone_s, int(used.batch) + 1)
    few, many = by_images[-2:]
    tower_core_s = tower["encoder_threads"] * (few + (many - few) * (used.batch - int(used.batch))) / used.batch
    http_s = without.of("edge")
    waited_for = {
        "http_s": http_s,
        "hop_core_s": used.call * max(0.0, used.of("edge") - http_s - decode_s - adapt_s),
        "encoder_call_s": used.call * max(0.0, used.of("encoder") - tower_core_s),
        "proxy_s": used.of("proxies"),
    }
    left_s = lone_s - decode_s - adapt_s - by_images[0] - sum(waited_for.values())
    beside_s = used.beside
    if left_s < 0:
        share = max(0.0, 1 + left_s / sum(waited_for.values()))
        beside_s += (1 - share) * sum(waited_for.values())
        waited_for = {name: share * each for name, each in waited_for.items()}
    # Whom nobody waits for, since it is not on a lone client's way: each use of a process that was idle.
    woken = {
        "proxy_wake_s": (alone.of("proxies") - used.of("proxies")) / 2,
        "edge_wake_s": (alone.of("edge") - http_s - decode_s - adapt_s - waited_for["hop_core_s"]) / 4,
        "encoder_wake_s": (alone.of("encoder") - tower["encoder_threads"] * by_images[0] - waited_for["encoder_call_s"])
        / 2,
        "beside_wake_s": alone.beside - used.beside,
    }
    found = {name: round(max(0.0, each), 6) for name, each in (*waited_for.items(), *woken.items())}
    return found | {
        "http_s": [found["http_s"]],
        "beside_s": round(beside_s, 6),
        "hop_wire_s": round(max(0.0, left_s) / 2, 6),
        "alone_s": {size: round(each, 6) for size, each in alone_s.items()},
        "ahead_s": {size: round(each, 6) for size, each in ahead_s.items()},
    }


def _seconds(milliseconds: Sequence[float]) -> list[float]:
    return [round(max(0.0, each) / 1000, 6) for each in milliseconds]


def tower_times(model: str, data_dir: Path, sizes: Sequence[int], seconds: float, rounds: int) -> dict[str, Any]:
    """Return the seconds of batches by size, alone and begun ahead, and the cores that they use."""
    from app.images.decode import decode_image  # noqa: PLC0415 - as below
    from benchmarks.encoder import load  # noqa: PLC0415 - imports torch

    encoder = load(model, data_dir, "auto", "auto")
    pixels = [
        encoder.transform(decode_image(file, max_bytes=10**8, max_pixels=10**8, target_px=encoder.image_size_px))
        for file in photographs()
    ]
    alone_s, ahead_s, cores, shares = {}, {}, [], []
    for size in sizes:
        batch = [pixels[index % len(pixels)] for index in range(size)]
        encoder.encode_images(batch)
        alone_s[size], others = quietest(
            rounds, lambda batch=batch: _alone_s(encoder, batch, seconds), time.process_time
        )
        shares.append(others)
        found, others = quietest(rounds, lambda batch=batch: _ahead_s(encoder, batch, seconds), time.process_time)
        ahead_s[size] = found[0]
        shares.append(others)
        cores.append(found[1])
    path = encoder.image_path
    return {
        "alone_s": alone_s,
        "ahead_s": ahead_s,
        "encoder_threads": max(1, round(max(cores))),
        "encoder": {
            "backend": path.backend,
            "device": path.device,
            "precision": path.precision,
            "batch": path.batch_size,
            "pixels": list(np.shape(pixels[0])),
            "others_cpu": shares,
        },
    }


def _alone_s(encoder: Any, batch: Sequence[Any], seconds: float) -> float:
    """Return the median seconds of a batch that finds the device idle."""
    times, ends = [], time.perf_counter() + seconds
    while time.perf_counter() < ends or len(times) < 3:
        began = time.perf_counter()
        encoder.encode_images(batch)
        times.append(time.perf_counter() - began)
    return round(statistics.median(times), 6)


def _ahead_s(encoder: Any, batch: Sequence[Any], seconds: float) -> tuple[float, float]:
    """Return the median seconds from batch to batch, each begun ahead of the end of the last, and the cores used."""
    waiting, times, used_s = encoder.begin_images(batch), [], time.process_time()
    ended = began = time.perf_counter()
    while ended - began < seconds or len(times) < 3:
        ahead = encoder.begin_images(batch)
        waiting()
        waiting = ahead
        times.append(time.perf_counter() - ended)
        ended += times[-1]
    used_s = time.process_time() - used_s
    waiting()
    return round(statistics.median(times), 6), used_s / (ended - began)


def _echo(address: tuple[str, int], key: bytes) -> None:
    """Answer each message with a feature, until the other side leaves; a process of its own."""
    answer = np.zeros(512, np.float32)
    with Client(address, authkey=key) as other:
        try:
            while True:
                other.recv()
                other.send(answer)
        except EOFError:
            return


def hop_times(shape: Sequence[int]) -> dict[str, float]:
    """Return the seconds of a hop over loopback: of this side's core there and back, and of the rest one way."""
    key = os.urandom(16)
    with Listener(("127.0.0.1", 0), authkey=key) as listener:
        other = multiprocessing.get_context("spawn").Process(target=_echo, args=(listener.address, key))
        other.start()
        with listener.accept() as connection:
            core_s, whole_s = _round_trip_s(connection, np.zeros(tuple(shape), np.uint8))
            call_core_s, _ = _round_trip_s(connection, np.zeros(512, np.float32))
    other.join()
    return {
        "hop_core_s": round(core_s, 6),
        "call_core_s": round(call_core_s, 6),
        "hop_wire_s": round(max(0.0, whole_s - core_s) / 2, 6),
    }


def _round_trip_s(connection: "Connection[Any, Any]", message: object) -> tuple[float, float]:
    """Return the core's time of this process, and the whole time, of one message and its answer, in the mean."""
    used_s, began = time.process_time(), time.perf_counter()
    for _ in range(_HOPS):
        connection.send(message)
        connection.recv()
    return (time.process_time() - used_s) / _HOPS, (time.perf_counter() - began) / _HOPS


def searches(file: Path) -> dict[str, float]:
    """Return the seconds of one search by captions, from a result of ``benchmarks.captions``."""
    figures = json.loads(file.read_text("utf-8"))["figures"]
    return {str(each["captions"]): each["one_caller"]["p50_ms"] / 1000 for each in figures}


def part_searches(captions: int, dims: int = 512) -> dict[str, float]:
    """Return what of a search does not shrink with the parts of a database, and the seconds of a caption that is read.

    A synthetic database is built of which every list is read, so that reading is nearly all there is.
    """
    from app.captions.build import BuildOptions, build  # noqa: PLC0415 - with FAISS, which the rest does without
    from app.captions.database import CaptionDatabase, Part  # noqa: PLC0415
    from benchmarks.captions import FINGERPRINT, NEAREST, Scenes  # noqa: PLC0415

    scenes = Scenes(captions, dims)
    images = scenes.images(_ASKED)[:, None]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "scenes"
        build(
            scenes.texts(),
            folder,
            encode=scenes.encode,
            fingerprint=FINGERPRINT,
            name="scenes",
            options=BuildOptions(recall=1.0),
            queries=images[:, 0],
        )
        database = CaptionDatabase.open(folder, fingerprint=FINGERPRINT)
        seconds = {}
        for parts in _PARTS:
            part, times = Part(0, parts), []
            for image in images:
                began = time.perf_counter()
                database.search(image, NEAREST, part)
                times.append(time.perf_counter() - began)
            # The work is the same each time; whatever is longer was disturbed.
            seconds[parts] = min(times)
        read = captions * database.manifest.index.probes / database.manifest.index.lists
    # Of a part it is fixed + divided / parts.
    # Relative to each: what is divided is most of the large ones, and memory near the cores makes that less than even.
    shares, weights = [1 / parts for parts in _PARTS], [1 / each for each in seconds.values()]
    divided, fixed = np.polyfit(shares, list(seconds.values()), 1, w=weights)
    return {
        "search_fixed_share": round(float(fixed / (fixed + divided)), 3),
        "search_s_per_caption_read": float(f"{seconds[1] / read:.3g}"),
        **{f"search_ms_of_1_in_{parts}": round(1000 * each, 3) for parts, each in seconds.items()},
    }


def measure(
    model: str, data_dir: Path, sizes: Sequence[int], seconds: float, rounds: int, engine: str = "process"
) -> dict[str, Any]:
    """Return all of them but searches."""
    tune(model, data_dir, _TUNED_FOR_S)
    if engine == "process":
        say(f"{model}: lone requests")
        with serving(model, data_dir) as server:
            edge = edge_times(server, rounds)
        return edge | measure_tower(model, data_dir, sizes, seconds, rounds)
    tower = measure_tower(model, data_dir, sizes, seconds, rounds)
    say(f"{model}: lone requests on Ray")
    with serving(model, data_dir, "--engine", engine) as server:
        return tower | ray_times(server, rounds, tower)


def measure_tower(model: str, data_dir: Path, sizes: Sequence[int], seconds: float, rounds: int) -> dict[str, Any]:
    """Return those of the image tower, measured in a process of its own, and of hops."""
    say(f"{model}: the image tower by size of batch")
    words = ("--data-dir", data_dir, "--seconds", seconds, "--rounds", rounds, "--sizes", *sizes)
    tower = run_json("benchmarks.capacity_stages", model, "--tower", *words)
    say("hops over loopback")
    return tower | hop_times(tower["encoder"]["pixels"])


def main() -> None:
    """Measure, and write the times as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="as in DEIXIS_MODELS; vit-b-32 is one with random weights")
    parser.add_argument("--data-dir", type=Path, help="with what was measured of the model; else a new one")
    parser.add_argument("--engine", choices=["process", "ray"], default="process", help="of the server (%(default)s)")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="of batches")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each size (%(default)s)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="at most, of each measurement (%(default)s)")
    parser.add_argument("--search", type=Path, help="a result of benchmarks.captions")
    parser.add_argument("--parts-of", type=int, help="captions of a database that is built and searched in parts")
    parser.add_argument("--output", type=Path, help="a file; else they are printed")
    parser.add_argument("--tower", action="store_true", help=argparse.SUPPRESS)  # the part in a process of its own
    given = parser.parse_args()
    if given.tower:
        json.dump(tower_times(given.model, given.data_dir, given.sizes, given.seconds, given.rounds), sys.stdout)
        return
    os.environ["DEIXIS_BUILD_WORDNET"] = "false"  # which takes the cores for minutes
    with tempfile.TemporaryDirectory() as temporary:
        data_dir = (given.data_dir or Path(temporary) / "data").absolute()
        model = write_open_clip(Path(temporary) / "vit-b-32") if given.model == "vit-b-32" else given.model
        told = (
            about_this_run()
            | measure(model, data_dir, given.sizes, given.seconds, given.rounds, given.engine)
            | {"model": given.model}
        )
    if given.search:
        told["search_core_s"] = searches(given.search)
    if given.parts_of:
        say(f"a search of {given.parts_of} captions in parts")
        told |= part_searches(given.parts_of)
    text = json.dumps(told, indent=1) + "\n"
    if given.output:
        given.output.write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
