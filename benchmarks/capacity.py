"""How many GPUs, edges and shards a load needs: a simulation of the service, fed with measured stage times.

    python -m benchmarks.capacity --stages STAGES.json --rate 500 --edges 8 --encoders 1
    python -m benchmarks.capacity --stages STAGES.json --rate 10000 --p99 0.2 --find --price-gpu 4 --price-edge 0.4
        --price-proxy 0.1

An image takes the way of the service: it arrives (Poisson, with bursts if asked for), is read by an edge's event loop,
decoded by one of its threads, sent to an encoder, waits there for a batch as in ``app/models/queue.py``, comes back to
be adapted and answered. With captions its features then go to every shard, and the slowest answers last. A request
that finds its edge or its encoder full is answered 503. On Ray proxies stand before the edges, and images that come
while eight calls of an edge are under way leave together. ``benchmarks/capacity_stages.py`` measures the times,
``benchmarks/capacity_check.py`` compares what is simulated with a running service.

What is not simulated: clients that give up or come again, failures, texts to be encoded, memory, and a network that is
busy. With ``--find`` the cheapest plan is printed that keeps within ``--p99`` and ``--refused``.
"""

import argparse
import heapq
import itertools
import json
import math
import random
import sys
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from benchmarks.events import Caller, Clock, Encoder, Host, RemoteSteps, Resume, Station, process, together

# --- what is simulated --------------------------------------------------------------------------------------------

# As in app/cluster/towers.py.
_CALLS_AT_ONCE = 8
_BESIDE_EVERY_S = 0.05
_OPTIONAL = ("encoder_threads", "hop_core_s", "call_core_s", "encoder_call_s", "proxy_s", "beside_s", "hop_wire_s")
_OPTIONAL += ("idle_s", "idle_cores", "search_fixed_share")
_OPTIONAL += ("proxy_wake_s", "edge_wake_s", "encoder_wake_s", "beside_wake_s")


class StagesError(ValueError):
    """Stage times that cannot be used, with what to do about it."""


@dataclass(frozen=True, slots=True)
class Stages:
    """Times of the stages, in seconds, each when nothing else runs.

    Args:
        http_s: of the event loop for one request, reading and answering together; drawn from these at random.
        decode_s: of a thread for one image.
        adapt_s: of a thread for one request.
        hop_core_s: of the edge's event loop for one call of an encoder, there and back.
        call_core_s: the same for asking a shard, whose messages are small.
        encoder_call_s: of the encoder's event loop for one call, beside the batches.
        proxy_s: of a proxy's event loop for one request, there and back.
        beside_s: of cores for one request, by processes that no request waits for.
        hop_wire_s: that one message is under way.
        proxy_wake_s: of cores beside that, each time that a proxy is idle before its work; there and back are two.
        edge_wake_s: the same of an edge's event loop.
        encoder_wake_s: the same of an encoder's event loop.
        beside_wake_s: the same of the processes that no request waits for.
        idle_cores: of one machine that has everything on it, those that are busy when nobody asks.
        idle_s: that a request takes longer which finds the cores of its edge idle, since they have to be woken.
        alone_s: by images, of a batch that finds the device idle; missing sizes are interpolated.
        ahead_s: the same of a batch begun ahead of the end of the one before.
        encoder_threads: of the host's cores that a batch uses, where the encoder runs on the edge.
        search_core_s: by captions of a database, of a core for one search of all of it.
        search_fixed_share: of that, what every shard takes however few of the captions are its own: the ids in the
            lists that are read.
    """

    http_s: Sequence[float]
    decode_s: Sequence[float]
    adapt_s: Sequence[float]
    alone_s: Mapping[int, float]
    ahead_s: Mapping[int, float]
    encoder_threads: int = 1
    hop_core_s: float = 0.0
    call_core_s: float = 0.0
    encoder_call_s: float = 0.0
    proxy_s: float = 0.0
    beside_s: float = 0.0
    hop_wire_s: float = 0.0
    proxy_wake_s: float = 0.0
    edge_wake_s: float = 0.0
    encoder_wake_s: float = 0.0
    beside_wake_s: float = 0.0
    idle_s: float = 0.0
    idle_cores: float = 0.0
    search_core_s: Mapping[int, float] = field(default_factory=dict)
    search_fixed_share: float = 0.0

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Read what ``benchmarks/capacity_stages.py`` wrote; keys that are no stage are passed over.

        Raises:
            StagesError: a stage is missing or has no times.
        """
        try:
            given = {name: content[name] for name in ("http_s", "decode_s", "adapt_s", "alone_s", "ahead_s")}
        except KeyError as error:
            raise StagesError(
                f"no {error} among the stage times; measure with benchmarks/capacity_stages.py"
            ) from error
        for name, value in given.items():
            if not value:
                raise StagesError(f"{name} is empty; give at least one time in seconds")
        for name in ("alone_s", "ahead_s", "search_core_s"):
            given[name] = {int(size): float(seconds) for size, seconds in content.get(name, {}).items()}
        given |= {name: content[name] for name in _OPTIONAL if name in content}
        return cls(**given)

    def search_s(self, captions: int, shards: int) -> float:
        """Return a core's time for one search in one of the shards of a database.

        Raises:
            StagesError: no size was measured.
        """
        fixed = self.search_fixed_share
        return self.whole_search_s(captions) * (fixed + (1 - fixed) / shards)

    def whole_search_s(self, captions: int) -> float:
        """Return a core's time for one search of a whole database.

        Between two measured sizes it follows a power of the captions, and beyond them that of the nearest two, above
        never less than in proportion. Raises as ``search_s``.
        """
        known = sorted(self.search_core_s.items())
        if not known:
            raise StagesError("no search_core_s among the stage times; add seconds by captions, or ask for no captions")
        if len(known) == 1:
            return known[0][1] * captions / known[0][0]
        above = next((place for place, (size, _) in enumerate(known) if size >= captions), len(known) - 1)
        (small, small_s), (large, large_s) = known[max(0, above - 1)], known[max(1, above)]
        power: float = math.log(large_s / small_s) / math.log(large / small)
        if captions > large:
            return large_s * math.exp(max(1.0, power) * math.log(captions / large))
        return small_s * math.exp(power * math.log(captions / small))


def by_size(seconds: Mapping[int, float], batch_size: int) -> list[float]:
    """Return the seconds of batches of 1, 2, ... ``batch_size``, on lines between those that were measured.

    Above the largest measured size a batch takes as long per image as one of that size.
    """
    known = sorted(seconds.items())
    found = []
    for size in range(1, batch_size + 1):
        above = next((place for place, (each, _) in enumerate(known) if each >= size), None)
        if above is None:
            found.append(known[-1][1] * size / known[-1][0])
        elif above == 0:
            found.append(known[0][1])
        else:
            (small, small_s), (large, large_s) = known[above - 1], known[above]
            found.append(small_s + (large_s - small_s) * (size - small) / (large - small))
    return found


def best_s_per_image(seconds: Sequence[float]) -> float:
    """Return the seconds of an image in the batch that is quickest per image, of batches of 1, 2, ... images."""
    return min(each / size for size, each in enumerate(seconds, 1))


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to bear the load.

    Args:
        edges: processes that speak HTTP and decode.
        edge_cores: of each, on which as many threads decode.
        max_queued: images that an edge admits at once (``DEIXIS_MAX_QUEUED_IMAGES``).
        encoders: replicas, each with a device of its own.
        proxies: before the edges, a process and a core each; 0 is none that takes time.
        on_edge: the encoder runs in the edge's process and on its cores, as in a single process; then there is one for
            each edge, and nothing hops.
        shared_cores: of one machine that has everything on it but captions; None is a machine for each.
        batch_size: most images in a batch.
        max_ongoing: images that an encoder takes before it is full; None sets no bound.
        captions: in the database; 0 is no search.
        shards: that the captions are spread over.
        copies: of each shard; a search asks one of each.
        shard_cores: that search in one copy of a shard.
    """

    edges: int = 1
    edge_cores: int = 4
    max_queued: int = 256
    encoders: int = 1
    proxies: int = 0
    on_edge: bool = False
    shared_cores: int | None = None
    batch_size: int = 32
    max_ongoing: int | None = 256
    captions: int = 0
    shards: int = 0
    copies: int = 1
    shard_cores: int = 8


@dataclass(frozen=True, slots=True)
class Load:
    """What arrives.

    Args:
        rate: requests a second, in the mean without bursts.
        seconds: for which they arrive.
        images: in each request.
        burst: by how much the rate is multiplied in a burst; 1 is none.
        burst_s: that one lasts.
        burst_every_s: from the beginning of one to that of the next.
        arrivals_s: the times themselves, instead of chance; ``rate`` and ``seconds`` are then only told.
    """

    rate: float
    seconds: float
    images: int = 1
    burst: float = 1.0
    burst_s: float = 1.0
    burst_every_s: float = 10.0
    arrivals_s: tuple[float, ...] = ()

    def times(self, chance: random.Random) -> Iterator[float]:
        """Yield the times of arrivals: a Poisson process, thinned outside of bursts."""
        if self.arrivals_s:
            yield from self.arrivals_s
            return
        highest, now = self.rate * max(1.0, self.burst), 0.0
        while (now := now + chance.expovariate(highest)) < self.seconds:
            rate = self.rate * (self.burst if now % self.burst_every_s < self.burst_s else 1.0)
            if chance.random() * highest < rate:
                yield now


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a simulation; latencies in seconds, of the requests that were answered with 200."""

    arrived: int
    answered: int
    refused: int
    images_per_s: float
    p50_s: float
    p95_s: float
    p99_s: float
    mean_s: float
    mean_batch: float
    utilisation: Mapping[str, float]

    @property
    def refused_share(self) -> float:
        """The share of requests that were answered 503."""
        return self.refused / max(1, self.arrived)


class _Edge:
    """One edge: an event loop, threads that decode, and cores under both."""

    def __init__(self, host: Host, cores: int, stages: Stages) -> None:
        self.host = host
        self.loop = Station(host, 1, stages.edge_wake_s)
        self.decoders = Station(host, cores)
        self.beside = Station(host, 1, stages.beside_wake_s)
        self.admitted = 0
        # Images that wait for a call, each with what is told when its encoder is full.
        self.waiting: deque[tuple[Resume, list[bool]]] = deque()
        self.calls = 0


class Simulation:
    """A plan under a load; ``run`` once.

    Args:
        stages: how long everything takes.
        plan: what there is.
        load: what comes.
        seed: of all chance.
    """

    def __init__(self, stages: Stages, plan: Plan, load: Load, seed: int = 1) -> None:
        self._stages, self._plan, self._load = stages, plan, load
        self._chance = random.Random(seed)
        self._clock = Clock()
        shared = None if plan.shared_cores is None else Host(self._clock, plan.shared_cores)
        self._edges = [
            _Edge(shared or Host(self._clock, plan.edge_cores), plan.edge_cores, stages) for _ in range(plan.edges)
        ]
        self._proxies = [Station(shared or Host(self._clock, 1), 1, stages.proxy_wake_s) for _ in range(plan.proxies)]
        alone, ahead = (by_size(each, plan.batch_size) for each in (stages.alone_s, stages.ahead_s))
        self._per_image_s = best_s_per_image(ahead)
        threads = 1
        if plan.on_edge:
            devices = [edge.host for edge in self._edges]
            threads = min(stages.encoder_threads, plan.edge_cores)
        else:
            devices = [shared or Host(self._clock, 1) for _ in range(plan.encoders)]
            if plan.shared_cores is not None:
                threads = min(stages.encoder_threads, plan.shared_cores)
        self._encoders = [Encoder(device, threads, plan.batch_size, alone, ahead) for device in devices]
        # Their event loops, on a core beside the device.
        self._called = {
            each: Station(shared or Host(self._clock, 1), 1, stages.encoder_wake_s) for each in self._encoders
        }
        self._shards: list[list[Station]] = []
        if plan.captions:
            self._search_s = stages.search_s(plan.captions, plan.shards)
            self._shards = [
                [Station(Host(self._clock, plan.shard_cores), plan.shard_cores) for _ in range(plan.copies)]
                for _ in range(plan.shards)
            ]
        self._beside = shared if stages.idle_cores else None
        self._is_over = False
        self._latencies: list[float] = []
        self._arrived = self._refused = 0
        # Until then queues fill, and latencies do not count. Times that are given are those of a run that was measured.
        self._warm_at = 0.0 if load.arrivals_s else 0.1 * load.seconds

    def run(self) -> Outcome:
        """Let everything arrive and be answered."""
        arrivals = self._load.times(self._chance)

        def arrive() -> None:
            self._arrived += 1
            process(self._request(self._chance.randrange(len(self._edges))))(lambda: None)
            plan_next()

        def plan_next() -> None:
            when = next(arrivals, None)
            if when is None:
                self._is_over = True
            else:
                self._clock.at(when, arrive)

        plan_next()
        self._work_beside()
        self._clock.run()
        return self._outcome()

    def _work_beside(self) -> None:
        """Have cores busy with what belongs to no request, for as long as requests arrive."""
        if self._beside is not None and not self._is_over:
            self._beside.run(self._stages.idle_cores * _BESIDE_EVERY_S)(lambda: None)
            self._clock.at(self._clock.now + _BESIDE_EVERY_S, self._work_beside)

    def _request(self, number: int) -> RemoteSteps:
        """The way of one request."""
        edge, draw, images = self._edges[number], self._chance.choice, self._load.images
        began = self._clock.now
        http_s = draw(self._stages.http_s)
        if edge.host.is_idle:
            yield edge.loop.use(self._stages.idle_s)
        proxy = self._chance.choice(self._proxies) if self._proxies else None
        if proxy is not None:
            yield proxy.use(self._stages.proxy_s / 2)
        # Who is refused is read and answered all the same.
        yield edge.loop.use(http_s / 2)
        if edge.admitted + images > self._plan.max_queued:
            yield edge.loop.use(http_s / 2)
            if proxy is not None:
                yield proxy.use(self._stages.proxy_s / 2)
            self._refused += 1
            return
        edge.admitted += images
        edge.beside.use(self._stages.beside_s)(lambda: None)
        caller, full = Caller(), list[bool]()
        yield together([process(self._image(number, caller, full)) for _ in range(images)])
        if full:
            yield edge.loop.use(http_s / 2)
            edge.admitted -= images
            if proxy is not None:
                yield proxy.use(self._stages.proxy_s / 2)
            self._refused += 1
            return
        if self._shards:
            yield from self._search(edge)
        yield edge.host.run(draw(self._stages.adapt_s))
        yield edge.loop.use(http_s / 2)
        edge.admitted -= images
        if proxy is not None:
            yield proxy.use(self._stages.proxy_s / 2)
        if began >= self._warm_at:
            self._latencies.append(self._clock.now - began)

    def _image(self, number: int, caller: Caller, full: list[bool]) -> RemoteSteps:
        """The way of one image of a request; ``full`` gets an item if its encoder had no room."""
        edge = self._edges[number]
        yield edge.decoders.use(self._chance.choice(self._stages.decode_s))
        if self._plan.on_edge:
            yield self._encoders[number].encode(caller)
            return

        def wait(resume: Resume) -> None:
            edge.waiting.append((resume, full))
            # After what else becomes ready at this time, so that it goes along.
            self._clock.at(self._clock.now, lambda: self._send(edge))

        yield wait

    def _send(self, edge: _Edge) -> None:
        """Begin as many calls as an edge may have under way, of all images that wait."""
        while edge.waiting and edge.calls < _CALLS_AT_ONCE:
            taken = [edge.waiting.popleft() for _ in range(min(len(edge.waiting), self._plan.batch_size))]
            edge.calls += 1

            def ended(taken: list[tuple[Resume, list[bool]]] = taken) -> None:
                edge.calls -= 1
                for resume, _ in taken:
                    resume()
                self._send(edge)

            process(self._call(edge, [full for _, full in taken]))(ended)

    def _call(self, edge: _Edge, images: Sequence[list[bool]]) -> RemoteSteps:
        """The way of images to an encoder and back."""
        stages, wire = self._stages, self._clock.after(self._stages.hop_wire_s)
        yield edge.loop.use(stages.hop_core_s / 2)
        yield wire
        # The less busy of two, as Ray's router chooses.
        encoder = min((self._chance.choice(self._encoders) for _ in range(2)), key=lambda each: each.ongoing)
        called, bound = self._called[encoder], self._plan.max_ongoing
        yield called.use(stages.encoder_call_s / 2)
        if bound is not None and encoder.ongoing + len(images) > bound:
            for full in images:
                full.append(True)
        else:
            caller = Caller()
            yield together([encoder.encode(caller) for _ in images])
        yield called.use(stages.encoder_call_s / 2)
        yield wire
        yield edge.loop.use(stages.hop_core_s / 2)

    def _search(self, edge: _Edge) -> RemoteSteps:
        """Ask every shard, for each image of the request, and wait for the slowest."""
        asked = [self._chance.choice(copies) for _ in range(self._load.images) for copies in self._shards]
        call_s, wire = self._stages.call_core_s * len(asked), self._clock.after(self._stages.hop_wire_s)
        yield edge.host.run(call_s / 2)
        yield wire
        yield together([shard.use(self._search_s) for shard in asked])
        yield wire
        yield edge.host.run(call_s / 2)

    def _outcome(self) -> Outcome:
        ordered = sorted(self._latencies)
        seconds = max(self._clock.now, 1e-9)
        batches: Counter[int] = sum((each.batches for each in self._encoders), Counter())
        encoded = sum(size * count for size, count in batches.items())
        stations = {
            "proxies": self._proxies,
            "encoder loops": [] if self._plan.on_edge else list(self._called.values()),
            "edge loop": [edge.loop for edge in self._edges],
            "edge decoders": [edge.decoders for edge in self._edges],
            "shards": [copy for copies in self._shards for copy in copies],
        }
        used = {
            name: sum(each.worked_s for each in some) / (len(some) * some[0].servers * seconds)
            for name, some in stations.items()
            if some
        }
        if self._plan.shared_cores is None:
            cores = self._plan.edge_cores * len(self._edges)
            used["edge cores"] = sum(edge.host.busy_core_s for edge in self._edges) / (cores * seconds)
        else:
            used["cores"] = self._edges[0].host.busy_core_s / (self._plan.shared_cores * seconds)
        if not self._plan.on_edge:
            # Of what they could encode: with small batches a device is never idle, and has room all the same.
            used["encoders"] = encoded * self._per_image_s / (len(self._encoders) * seconds)
        answered = self._arrived - self._refused
        return Outcome(
            arrived=self._arrived,
            answered=answered,
            refused=self._refused,
            images_per_s=answered * self._load.images / seconds,
            p50_s=percentile(ordered, 50),
            p95_s=percentile(ordered, 95),
            p99_s=percentile(ordered, 99),
            mean_s=sum(ordered) / max(1, len(ordered)),
            mean_batch=encoded / max(1, batches.total()),
            utilisation=used,
        )


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Return the nearest-rank percentile of values in order; NaN of none."""
    if not ordered:
        return math.nan
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def simulate(stages: Stages, plan: Plan, load: Load, seed: int = 1) -> Outcome:
    """Return what comes of a load.

    Raises:
        StagesError: a time is missing that the plan needs.
    """
    return Simulation(stages, plan, load, seed).run()


# --- the cheapest plan --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Prices:
    """What one of each costs for an hour, in any currency."""

    encoder: float
    edge: float
    shard: float
    proxy: float = 0.0

    def of(self, plan: Plan) -> float:
        """Return what a plan costs for an hour."""
        shards = plan.shards * plan.copies if plan.captions else 0
        machines = plan.encoders * self.encoder + plan.edges * self.edge + plan.proxies * self.proxy
        return machines + shards * self.shard


@dataclass(frozen=True, slots=True)
class Goal:
    """What a plan must do.

    Args:
        p99_s: latency that 99 % of the answers keep within.
        refused: share of requests that may be answered 503.
        busy: utilisation that no stage may exceed, so that a machine may fail or a guess be off.
    """

    p99_s: float
    refused: float = 0.001
    busy: float = 0.8

    def met(self, outcome: Outcome) -> bool:
        """Return whether a plan did it."""
        in_time = outcome.p99_s <= self.p99_s and outcome.refused_share <= self.refused
        return in_time and max(outcome.utilisation.values()) <= self.busy


class NoPlanError(Exception):
    """There is no plan that meets the goal, and why."""


# Times the least counts that are tried of everything else, while one count is looked for.
_AMPLE = 4
_MOST_TRIED = 200


def find(
    stages: Stages, base: Plan, load: Load, goal: Goal, prices: Prices, least_shards: int = 1
) -> tuple[Plan, Outcome]:
    """Return the cheapest plan that meets a goal, and what comes of it, bursts included.

    First each count is looked for by halving while there is plenty of the others; then those counts, and from there
    on ever dearer ones, are tried together.

    Args:
        stages: how long everything takes.
        base: what is not looked for: cores, bounds, captions.
        load: that comes.
        goal: that is to be met.
        prices: by which plans are compared.
        least_shards: by what a shard has memory for.

    Raises:
        NoPlanError: none of those that were tried does.
    """
    tried = 0
    dearest = 0.0
    cheapest: tuple[float, Plan, Outcome] | None = None
    for start in _starts(stages, base, load, goal, least_shards):
        for plan in _by_price(start, prices):
            dearest = prices.of(plan)
            if (cheapest is not None and dearest >= cheapest[0]) or tried >= _MOST_TRIED:
                break
            tried += 1
            outcome = simulate(stages, plan, load)
            if goal.met(outcome):
                cheapest = (dearest, plan, outcome)
                break
    if cheapest is None:
        raise NoPlanError(
            f"no plan keeps p99 within {goal.p99_s:g} s at {load.rate:g} requests/s, however many machines it has;"
            " allow a longer p99, more 503 or busier stages, or make a stage faster: smaller images, a better device"
        )
    return cheapest[1:]


def _starts(stages: Stages, base: Plan, load: Load, goal: Goal, least_shards: int) -> Iterator[Plan]:
    """Yield plans of which each count is the least that does where there is plenty of everything else."""
    images = load.rate * load.images
    encoders = max(1, math.ceil(images * best_s_per_image(by_size(stages.ahead_s, base.batch_size)) / goal.busy))
    for shards in _shard_counts(base, least_shards):
        # Images that wait while calls are under way go together, which is not reckoned with.
        edge_core_s = (
            _mean(stages.http_s)
            + _mean(stages.adapt_s)
            + load.images * (_mean(stages.decode_s) + stages.hop_core_s + shards * stages.call_core_s)
        )
        edges = max(1, math.ceil(load.rate * edge_core_s / base.edge_cores / goal.busy))
        copies = 1
        if base.captions:
            search_core_s = images * stages.search_s(base.captions, shards)
            copies = math.ceil(search_core_s / base.shard_cores / goal.busy)
        proxies = math.ceil(load.rate * stages.proxy_s / goal.busy)
        least = replace(
            base,
            encoders=encoders,
            edges=edges,
            shards=shards,
            copies=max(1, copies),
            proxies=max(base.proxies, proxies),
        )
        ample = replace(least, **{name: _AMPLE * getattr(least, name) for name in _looked_for(least)})
        if not goal.met(simulate(stages, ample, load)):
            continue  # it is not for want of machines
        found = {}
        for name in _looked_for(least):
            low, high = getattr(least, name), getattr(ample, name)
            while low < high:
                middle = (low + high) // 2
                if goal.met(simulate(stages, replace(ample, **{name: middle}), load)):
                    high = middle
                else:
                    low = middle + 1
            found[name] = low
        yield replace(least, **found)


def _looked_for(plan: Plan) -> list[str]:
    """Return which counts of a plan matter."""
    found = ["encoders", "edges"]
    return [*found, *(["proxies"] if plan.proxies else []), *(["copies"] if plan.captions else [])]


def _shard_counts(base: Plan, least: int) -> list[int]:
    if not base.captions:
        return [0]
    return [least * factor for factor in (1, 2, 4, 8, 16)]


def _by_price(start: Plan, prices: Prices) -> Iterator[Plan]:
    """Yield a plan and then ever dearer ones, each count in steps of a twentieth."""
    names = _looked_for(start)
    steps = {name: max(1, getattr(start, name) // 20) for name in names}
    heap = [(prices.of(start), 0, start)]
    seen, order = {start}, itertools.count(1)
    while heap:
        _, _, plan = heapq.heappop(heap)
        yield plan
        for name in names:
            dearer = replace(plan, **{name: getattr(plan, name) + steps[name]})
            if dearer not in seen:
                seen.add(dearer)
                heapq.heappush(heap, (prices.of(dearer), next(order), dearer))


def _mean(seconds: Sequence[float]) -> float:
    return sum(seconds) / len(seconds)


# --- the command --------------------------------------------------------------------------------------------------


def report(plan: Plan, load: Load, outcome: Outcome, prices: Prices | None) -> dict[str, Any]:
    """Return plain numbers about a plan: times in milliseconds, shares rounded."""
    told = {
        "plan": asdict(plan),
        "load": {name: value for name, value in asdict(load).items() if name != "arrivals_s"},
        "arrived": outcome.arrived,
        "answered": outcome.answered,
        "refused_share": round(outcome.refused_share, 5),
        "images_per_s": round(outcome.images_per_s, 1),
        "p50_ms": round(1000 * outcome.p50_s, 2),
        "p95_ms": round(1000 * outcome.p95_s, 2),
        "p99_ms": round(1000 * outcome.p99_s, 2),
        "mean_batch": round(outcome.mean_batch, 2),
        "utilisation": {name: round(share, 3) for name, share in outcome.utilisation.items()},
    }
    return told if prices is None else told | {"price_per_hour": round(prices.of(plan), 2)}


def least_shards(captions: int, bytes_per_caption: float, shard_gib: float) -> int:
    """Return how many shards have memory for the captions; 0 for none."""
    return math.ceil(captions * bytes_per_caption / (shard_gib * 2**30))


def arguments_of(words: Sequence[str] | None) -> argparse.Namespace:
    """Return what a command line says; without one, what this process was started with."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=Path, required=True, help="times, by benchmarks/capacity_stages.py")
    load, plan = Load(1, 1), Plan()
    group = parser.add_argument_group("load")
    group.add_argument("--rate", type=float, required=True, help="requests a second")
    group.add_argument("--images", type=int, default=load.images, help="in each request (%(default)s)")
    group.add_argument("--seconds", type=float, default=20.0, help="that are simulated (%(default)s)")
    group.add_argument("--burst", type=float, default=load.burst, help="the rate is so many times as high in bursts")
    group.add_argument("--burst-s", type=float, default=load.burst_s, help="that a burst lasts (%(default)s)")
    group.add_argument("--burst-every-s", type=float, default=load.burst_every_s, help="(%(default)s)")
    group.add_argument("--captions", type=int, default=plan.captions, help="that images are searched among; 0 is none")
    group = parser.add_argument_group("plan")
    for name, text in (
        ("edges", "processes that speak HTTP and decode"),
        ("edge-cores", "of each"),
        ("max-queued", "images that an edge admits"),
        ("encoders", "replicas, each with a device"),
        ("proxies", "of Ray, before the edges; with --find as many as their time needs, at least so many"),
        ("batch-size", "most images in a batch"),
        ("max-ongoing", "images that an encoder takes"),
        ("copies", "of each shard"),
        ("shard-cores", "of each copy of a shard"),
    ):
        default = getattr(plan, name.replace("-", "_"))
        group.add_argument(f"--{name}", type=int, default=default, help=f"{text} (%(default)s)")
    group.add_argument("--shared-cores", type=int, help="of one machine that everything but captions is on")
    group.add_argument("--shards", type=int, help="by default as many as the captions need memory")
    group.add_argument("--on-edge", action="store_true", help="a single process: the encoder is on the edge's cores")
    group.add_argument("--shard-gib", type=float, default=32.0, help="memory of a shard (%(default)s)")
    group.add_argument(
        "--bytes-per-caption",
        type=float,
        default=1175.0,
        help="that a shard has in memory (%(default)s at 512 dimensions)",
    )
    group = parser.add_argument_group("the cheapest plan")
    goal = Goal(1.0)
    group.add_argument("--find", action="store_true", help="look for edges, encoders, proxies, shards and copies")
    group.add_argument("--p99", type=float, default=goal.p99_s, help="seconds in which 99 %% answer (%(default)s)")
    group.add_argument("--refused", type=float, default=goal.refused, help="share that may get 503 (%(default)s)")
    group.add_argument("--busy", type=float, default=goal.busy, help="most utilisation of a stage (%(default)s)")
    for name in ("gpu", "edge", "shard", "proxy"):
        group.add_argument(f"--price-{name}", type=float, default=1.0, help="an hour, in any currency (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of all chance (%(default)s)")
    arguments = parser.parse_args(words)
    counts = ("rate", "images", "seconds", "burst", "burst_s", "burst_every_s", "edges", "edge_cores", "max_queued")
    counts += (
        "encoders",
        "batch_size",
        "max_ongoing",
        "copies",
        "shard_cores",
        "shard_gib",
        "bytes_per_caption",
    )
    for name in (*counts, "p99"):
        if getattr(arguments, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; give more than 0")
    if arguments.proxies < 0:
        parser.error(f"--proxies is {arguments.proxies}; give 0 or more")
    if arguments.shared_cores is not None and arguments.shared_cores <= 0:
        parser.error(f"--shared-cores is {arguments.shared_cores}; give more than 0")
    if arguments.find and arguments.shared_cores is not None:
        parser.error("--find looks for machines, and --shared-cores is one; give one of them")
    return arguments


def main(words: Sequence[str] | None = None) -> None:
    """Simulate one plan, or look for the cheapest, and print it as JSON."""
    given = arguments_of(words)
    least = least_shards(given.captions, given.bytes_per_caption, given.shard_gib)
    names = ("edges", "edge_cores", "max_queued", "encoders", "on_edge", "batch_size", "max_ongoing", "captions")
    names += ("proxies", "shared_cores")
    plan = Plan(
        **{name: getattr(given, name) for name in (*names, "copies", "shard_cores")},
        shards=given.shards or least,
    )
    load = Load(given.rate, given.seconds, given.images, given.burst, given.burst_s, given.burst_every_s)
    prices = Prices(given.price_gpu, given.price_edge, given.price_shard, given.price_proxy)
    try:
        stages = Stages.from_json(json.loads(given.stages.read_text(encoding="utf-8")))
        if given.find:
            plan, outcome = find(stages, plan, load, Goal(given.p99, given.refused, given.busy), prices, max(1, least))
        else:
            outcome = simulate(stages, plan, load, given.seed)
    except (OSError, ValueError, NoPlanError) as error:
        sys.exit(f"{given.stages}: {error}" if isinstance(error, (OSError, ValueError)) else str(error))
    json.dump(report(plan, load, outcome, prices), sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
