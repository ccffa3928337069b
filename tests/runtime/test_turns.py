"""Background work takes turns with requests."""

import asyncio
import threading
from types import SimpleNamespace

import pytest

from app.runtime import turns as module
from app.runtime.turns import QUIET_S, SHARE, TURN_S, Turns, give_way, in_background, is_in_background, taking_turns

pytestmark = pytest.mark.usefixtures("clock")


@pytest.fixture
def clock(monkeypatch):
    """Replace the clocks of the module by one that only ``sleep`` and the tests advance."""
    clock = SimpleNamespace(now=100.0, core=0.0, slept=0.0)

    def sleep(seconds):
        clock.now += seconds
        clock.slept += seconds

    fake = SimpleNamespace(perf_counter=lambda: clock.now, thread_time=lambda: clock.core, sleep=sleep)
    monkeypatch.setattr(module, "time", fake)
    monkeypatch.setattr(module, "usable_cores", lambda: 2)
    return clock


def take_turn(turns, clock, took_s, work="work"):
    """Take a turn if it may begin, and return its seconds; otherwise wait."""
    wait_s, counts = turns.begin(work)
    if wait_s:
        clock.now += wait_s
        return 0.0
    clock.now += took_s
    if counts:
        turns.end(took_s)
    return took_s


@pytest.mark.parametrize("took_s", [TURN_S / 4, TURN_S, 10 * TURN_S])
def test_work_gets_its_share_of_the_time_while_requests_never_pause(clock, took_s):
    turns, began = Turns(lambda: clock.now), clock.now
    used_s = sum(take_turn(turns, clock, took_s) for _ in range(20_000))
    assert used_s / (clock.now - began) == pytest.approx(SHARE, rel=0.05)


def test_all_kinds_of_work_share_the_turns(clock):
    turns, began = Turns(lambda: clock.now), clock.now
    used_s = sum(take_turn(turns, clock, took_s) for _ in range(10_000) for took_s in (TURN_S, 3 * TURN_S))
    assert used_s / (clock.now - began) == pytest.approx(SHARE, rel=0.05)


def test_no_turn_begins_during_another_one_while_there_are_requests(clock):
    turns = Turns(lambda: clock.now)
    assert turns.begin("one") == (0, True)
    assert turns.begin("other")[0] > 0


def test_work_that_asks_less_often_gets_as_many_turns(clock):
    turns = Turns(lambda: clock.now)
    begun = {"often": 0, "seldom": 0}
    for _ in range(10_000):
        for work in ("often", "often", "often", "seldom"):
            wait_s, _ = turns.begin(work)
            clock.now += 0.01
            if not wait_s:
                begun[work] += 1
                turns.end(TURN_S)
    assert begun["often"] == pytest.approx(begun["seldom"], abs=1)
    assert begun["seldom"] > 100


def test_work_that_stopped_asking_loses_its_place(clock):
    turns = Turns(lambda: clock.now)
    turns.begin("first")
    assert turns.begin("cancelled")[0]
    assert turns.begin("next")[0]
    for _ in range(1000):
        if not turns.begin("next")[0]:
            return
        clock.now += QUIET_S
    pytest.fail("the next in line never had a turn")


def test_work_runs_without_pauses_while_there_are_no_requests(clock):
    turns, began = Turns(lambda: 0.0), clock.now
    assert sum(take_turn(turns, clock, 1.0) for _ in range(10)) == 10
    assert clock.now - began == 10


def test_work_begins_when_no_request_has_had_a_place_for_a_moment(clock):
    turns, last = Turns(lambda: last), clock.now
    turns.begin("work")
    turns.end(10.0)
    while wait_s := turns.begin("work")[0]:
        clock.now += wait_s
    assert clock.now - last == pytest.approx(QUIET_S)


def test_a_long_turn_that_began_in_a_pause_does_not_delay_the_next_one(clock):
    last = 0.0
    turns = Turns(lambda: last)
    assert take_turn(turns, clock, 10.0) == 10
    last = clock.now
    assert turns.begin("work") == (0, True)


def test_work_of_a_thread_counts_by_its_time_on_the_cores(clock):
    with in_background(Turns(lambda: clock.now)), taking_turns():
        began, steps = clock.now, 10_000
        for _ in range(steps):
            clock.core += 0.005
            clock.now += 0.01  # requests had the core half of the time
            give_way()
    assert steps * 0.005 / 2 / (clock.now - began) == pytest.approx(SHARE, rel=0.1)


@pytest.mark.parametrize("took_s", [0.002, 0.5])
def test_work_of_a_thread_that_ends_without_giving_way_counts_too(clock, took_s):
    with in_background(Turns(lambda: clock.now)):
        began, count = clock.now, 3_000
        for _ in range(count):
            with taking_turns():
                clock.core += took_s
                clock.now += took_s
    assert count * took_s / 2 / (clock.now - began) == pytest.approx(SHARE, rel=0.1)


def test_work_that_a_request_waits_for_takes_no_turns(clock):
    with in_background(Turns(lambda: clock.now)), taking_turns(lambda: True):
        for _ in range(100):
            clock.core += 0.1
            give_way()
    assert not clock.slept


def work_for_ten_seconds(clock):
    for _ in range(100):
        clock.core += 0.1
        give_way()


@pytest.mark.parametrize("is_awaited", [False, True])
@pytest.mark.parametrize("turns", [None, Turns(), Turns(lambda: 1e9)])
def test_work_that_is_stopped_ends_where_it_would_give_way(clock, turns, is_awaited):
    stopped = taking_turns(lambda: is_awaited, lambda: clock.core > 0.95)
    with in_background(turns), stopped, pytest.raises(asyncio.CancelledError):
        work_for_ten_seconds(clock)
    assert clock.core == pytest.approx(1)


def test_work_that_waits_for_its_turn_can_be_stopped(clock):
    stopped = taking_turns(is_stopped=lambda: clock.slept > 0)
    with in_background(Turns(lambda: clock.now)), stopped, pytest.raises(asyncio.CancelledError):
        work_for_ten_seconds(clock)
    assert 0 < clock.slept <= QUIET_S


@pytest.mark.parametrize("turns", [None, Turns(lambda: 1e9)])
def test_only_marked_work_that_takes_turns_gives_way(clock, turns):
    with in_background(turns):
        clock.core += 1
        give_way()
        assert is_in_background() == (turns is not None)
    with taking_turns():
        clock.core += 1
        give_way()
    assert not is_in_background()
    assert not clock.slept


def test_the_mark_does_not_reach_other_threads():
    with in_background(Turns()):
        found = []
        thread = threading.Thread(target=lambda: found.append(is_in_background()))
        thread.start()
        thread.join(10)
    assert found == [False]
