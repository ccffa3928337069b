"""What ``benchmarks/capacity.py`` simulates with: time, cores that are shared, queues, and batches.

A simulation of discrete events, in seconds. What takes time is a function that begins it and is given what to call when
it is over; a generator of such steps is one itself (``process``). ``tests/benchmarks/test_capacity.py`` compares with
what is known of such queues.
"""

import heapq
import itertools
import math
from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

Resume = Callable[[], None]
Start = Callable[[Resume], None]
"""Begins something that takes time, and calls what it was given when that is over."""
RemoteSteps = Generator[Start, None, None]


class Clock:
    """Runs what was planned, in the order of its time in seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self._order = itertools.count()
        self._planned: list[tuple[float, int, Resume]] = []

    def at(self, when: float, work: Resume) -> None:
        """Plan some work."""
        heapq.heappush(self._planned, (when, next(self._order), work))

    def after(self, seconds: float) -> Start:
        """Return what only takes time."""
        return lambda resume: self.at(self.now + seconds, resume)

    def run(self) -> None:
        """Do everything that is planned, and what that plans, until nothing is left."""
        while self._planned:
            self.now, _, work = heapq.heappop(self._planned)
            work()


def process(steps: RemoteSteps) -> Start:
    """Return a generator as something that takes time: it goes on when what it yields is over."""

    def start(resume: Resume) -> None:
        def go_on() -> None:
            step = next(steps, None)
            if step is None:
                resume()
            else:
                step(go_on)

        go_on()

    return start


def together(starts: Sequence[Start]) -> Start:
    """Return what begins all of them at once, and is over with the last; at least one."""

    def start(resume: Resume) -> None:
        left = len(starts)

        def one_is_over() -> None:
            nonlocal left
            left -= 1
            if not left:
                resume()

        for each in starts:
            each(one_is_over)

    return start


class Host:
    """Cores that the threads on it share: all run at one speed, which is 1 as long as each has a core.

    Work of several threads goes at the pace of the slowest of them: three threads on two cores run at half the speed
    as soon as two of them belong together, and at two thirds otherwise.

    Args:
        clock: of the simulation.
        cores: of the host.
    """

    def __init__(self, clock: Clock, cores: int) -> None:
        self.clock = clock
        self._cores = cores
        self.busy_core_s = 0.0
        self._order = itertools.count()
        # By the time that the host would show had it always run at full speed.
        self._running: list[tuple[float, int, int, Resume]] = []
        self._shown = 0.0
        self._since = 0.0
        self._threads = 0
        self._wide = 0
        self._speed = 1.0
        self._version = 0

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs on it."""
        return not self._running

    def run(self, seconds: float, threads: int = 1) -> Start:
        """Return work that takes so long when it has its cores to itself."""

        def start(resume: Resume) -> None:
            self._advance()
            heapq.heappush(self._running, (self._shown + seconds, next(self._order), threads, resume))
            self._threads += threads
            self._wide += threads > 1
            self._plan()

        return start

    def _advance(self) -> None:
        elapsed = self.clock.now - self._since
        self._since = self.clock.now
        self._shown += elapsed * self._speed
        self.busy_core_s += elapsed * min(self._threads, self._cores)

    def _plan(self) -> None:
        """Set the speed, and plan the end of what ends first."""
        self._version += 1
        if not self._running:
            return
        share = self._threads / self._cores
        self._speed = 1 / max(1.0, math.ceil(share) if self._wide else share)
        self.clock.at(
            self.clock.now + max(0.0, self._running[0][0] - self._shown) / self._speed,
            lambda version=self._version: self._end(version),  # type: ignore[misc]
        )

    def _end(self, version: int) -> None:
        if version != self._version:
            return  # the speed has changed since this was planned
        self._advance()
        ended, _, threads, resume = heapq.heappop(self._running)
        self._shown = max(self._shown, ended)
        self._threads -= threads
        self._wide -= threads > 1
        self._plan()
        resume()


class Station:
    """Servers with one queue: so many threads of a host that do one kind of work, first come, first served.

    Args:
        host: whose cores they use.
        servers: at a time.
        wake_s: of a core, beside the work that is waited for, each time that work finds all servers free.
    """

    def __init__(self, host: Host, servers: int, wake_s: float = 0.0) -> None:
        self._host = host
        self._wake_s = wake_s
        self.servers = servers
        self._free = servers
        self._waiting: deque[tuple[float, Resume]] = deque()
        self.worked_s = 0.0

    def use(self, seconds: float) -> Start:
        """Return work that waits for a server and then takes so long."""

        def start(resume: Resume) -> None:
            if self._wake_s and self._free == self.servers:
                self._host.run(self._wake_s)(lambda: None)
            self._waiting.append((seconds, resume))
            self._next()

        return start

    def _next(self) -> None:
        if not self._free or not self._waiting:
            return
        self._free -= 1
        seconds, resume = self._waiting.popleft()
        self.worked_s += seconds

        def is_over() -> None:
            self._free += 1
            self._next()
            resume()

        self._host.run(seconds)(is_over)


@dataclass(eq=False, slots=True)
class Caller:
    """One request's images that wait at an encoder."""

    waiting: deque[Resume] = field(default_factory=deque)


class Encoder:
    """Encodes in batches, as ``app.models.queue.EncodeQueue`` does.

    There is no timer. What waits when the device is free is the next batch; when a batch begins and a full one waits,
    that one is begun ahead. Callers take turns by image.

    Args:
        host: the device, or the cores that it shares.
        threads: of the host that a batch uses.
        batch_size: most images in a batch.
        alone_s: seconds of a batch of 1, 2, ... images that finds the device idle.
        ahead_s: the same of one that was begun ahead, from the end of the one before.
    """

    def __init__(
        self, host: Host, threads: int, batch_size: int, alone_s: Sequence[float], ahead_s: Sequence[float]
    ) -> None:
        self._clock = host.clock
        self._host = host
        self._threads = threads
        self._batch_size = batch_size
        self._alone_s = alone_s
        self._ahead_s = ahead_s
        self._turns: deque[Caller] = deque()
        self._waiting = 0
        self._is_busy = False
        self.ongoing = 0
        self.batches: Counter[int] = Counter()

    def encode(self, caller: Caller) -> Start:
        """Return the encoding of one image of a caller."""

        def start(resume: Resume) -> None:
            if not caller.waiting:
                self._turns.append(caller)
            caller.waiting.append(resume)
            self._waiting += 1
            self.ongoing += 1
            if not self._is_busy:
                self._is_busy = True
                # Its thread wakes after what else comes at this time, of the same call.
                self._clock.at(self._clock.now, lambda: self._begin(self._take(), self._alone_s))

        return start

    def _take(self) -> list[Resume]:
        taken: list[Resume] = []
        while self._turns and len(taken) < self._batch_size:
            caller = self._turns.popleft()
            taken.append(caller.waiting.popleft())
            if caller.waiting:
                self._turns.append(caller)
        self._waiting -= len(taken)
        return taken

    def _begin(self, batch: list[Resume], seconds: Sequence[float]) -> None:
        self._is_busy = True
        self.batches[len(batch)] += 1
        ahead = self._take() if self._waiting >= self._batch_size else []

        def is_over() -> None:
            self._is_busy = False
            self.ongoing -= len(batch)
            if ahead:
                self._begin(ahead, self._ahead_s)
            elif self._waiting:
                self._begin(self._take(), self._alone_s)
            for resume in batch:
                resume()

        self._host.run(seconds[len(batch) - 1], self._threads)(is_over)
