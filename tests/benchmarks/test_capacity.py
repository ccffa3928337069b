"""The simulator of ``benchmarks/capacity.py`` agrees with what is known of queues, and with the service's own."""

import asyncio
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from app.models.queue import EncodeQueue
from benchmarks.capacity import (
    Goal,
    Load,
    NoPlanError,
    Plan,
    Prices,
    Stages,
    StagesError,
    by_size,
    find,
    least_shards,
    main,
    percentile,
    simulate,
)
from benchmarks.capacity_check import again, compared, medians, saturation, single_process, table, verdict
from benchmarks.capacity_stages import Used, from_processor_time, searches
from benchmarks.events import Caller, Clock, Encoder, Host, Station, process, together

STAGES = Stages(
    http_s=[0.001],
    decode_s=[0.002],
    adapt_s=[0.0005],
    alone_s={1: 0.005, 32: 0.02},
    ahead_s={1: 0.004, 32: 0.018},
    hop_core_s=0.0004,
    call_core_s=0.0002,
    hop_wire_s=0.0001,
    search_core_s={100_000: 0.0006, 1_000_000: 0.0045},
)


def nothing():
    pass


def process_of(steps):
    return lambda: process(steps)(nothing)


def mean_sojourn_s(servers, rate, draw, count, seed=5):
    """Return the mean time in a station of ``servers`` with Poisson arrivals, each for a time that ``draw`` returns."""
    clock, chance = Clock(), random.Random(seed)
    station = Station(Host(clock, servers), servers)
    spent = []

    def visit(seconds):
        began = clock.now
        yield station.use(seconds)
        spent.append(clock.now - began)

    when = 0.0
    for _ in range(count):
        when += chance.expovariate(rate)
        clock.at(when, process_of(visit(draw(chance))))
    clock.run()
    assert len(spent) == count
    return sum(spent) / count


@pytest.mark.parametrize("busy", [0.3, 0.6, 0.8])
def test_m_m_1_takes_as_long_as_is_known(busy):
    """One server, exponential service of mean 1: 1 / (1 - rho) in the mean."""
    taken = mean_sojourn_s(1, busy, lambda chance: chance.expovariate(1), 50_000)
    assert taken == pytest.approx(1 / (1 - busy), rel=0.05)


@pytest.mark.parametrize("busy", [0.3, 0.6, 0.8])
def test_m_d_1_waits_as_pollaczek_and_khinchine_say(busy):
    """Constant service of 1: 1 + rho / (2 (1 - rho)), half the wait of M/M/1."""
    taken = mean_sojourn_s(1, busy, lambda chance: 1.0, 50_000)
    assert taken == pytest.approx(1 + busy / (2 * (1 - busy)), rel=0.04)


def test_m_m_4_waits_as_erlang_says():
    servers, offered = 4, 3.0
    terms = [1.0]
    for number in range(1, servers + 1):
        terms.append(terms[-1] * offered / number)
    last = terms[-1] * servers / (servers - offered)
    wait = last / (sum(terms[:-1]) + last) / (servers - offered)
    taken = mean_sojourn_s(servers, offered, lambda chance: chance.expovariate(1), 50_000)
    assert taken == pytest.approx(1 + wait, rel=0.04)


def ended_at(host_cores, *works):
    """Return when each (begin, seconds, threads) ends on a host of so many cores."""
    clock, ends = Clock(), {}
    host = Host(clock, host_cores)
    for number, (begin, seconds, threads) in enumerate(works):
        start = host.run(seconds, threads)
        clock.at(begin, lambda start=start, number=number: start(lambda: ends.update({number: clock.now})))
    clock.run()
    return [pytest.approx(ends[number]) for number in range(len(works))]


def test_threads_share_cores_only_when_there_are_more_of_them():
    assert ended_at(2, (0, 1, 1), (0, 1, 1)) == [1.0, 1.0]
    assert ended_at(2, (0, 1, 1), (0, 1, 1), (0, 1, 1)) == [1.5, 1.5, 1.5]
    # At half the speed from 0.5 to 1.5, and then alone.
    assert ended_at(1, (0, 1, 1), (0.5, 1, 1)) == [1.5, 2.0]


def test_work_of_several_threads_goes_at_the_pace_of_the_slowest():
    assert ended_at(2, (0, 1, 2)) == [1.0]
    assert ended_at(2, (0, 1, 2), (0, 0.2, 1)) == [1.2, 0.4]


def test_a_busy_core_is_counted_once():
    clock = Clock()
    host = Host(clock, 2)
    process(iter([together([host.run(1.0), host.run(1.0), host.run(1.0)])]))(nothing)
    clock.run()
    assert host.busy_core_s == pytest.approx(3.0)


def encoder(clock, batch_size, alone_s=1.0, ahead_s=1.0):
    return Encoder(Host(clock, 1), 1, batch_size, [alone_s] * batch_size, [ahead_s] * batch_size)


def test_an_idle_encoder_takes_images_one_at_a_time_as_they_come():
    clock = Clock()
    device = encoder(clock, 8)
    for number in range(10):
        clock.at(2.0 * number, lambda: device.encode(Caller())(nothing))
    clock.run()
    assert device.batches == {1: 10}
    assert clock.now == 19.0


def test_what_came_while_it_was_busy_is_the_next_batch_at_most_a_full_one():
    clock, ends = Clock(), Counter()
    device = encoder(clock, 4)
    clock.at(0.0, lambda: device.encode(Caller())(nothing))
    for _ in range(6):
        clock.at(0.5, lambda: device.encode(Caller())(lambda: ends.update([clock.now])))
    clock.run()
    assert device.batches == {1: 1, 4: 1, 2: 1}
    assert ends == {2.0: 4, 3.0: 2}


def test_images_of_one_call_are_encoded_together_by_an_encoder_that_was_idle():
    clock = Clock()
    one = encoder(clock, 4)
    together([one.encode(Caller()) for _ in range(3)])(lambda: None)
    clock.run()
    assert one.batches == {3: 1}


def test_batches_are_full_when_there_is_more_than_enough():
    outcome = simulate(STAGES, Plan(edges=20, max_queued=200), Load(4000, 2))
    assert outcome.mean_batch > 31
    assert outcome.images_per_s == pytest.approx(32 / 0.018, rel=0.02)


def test_a_batch_is_begun_ahead_only_if_it_is_full():
    clock = Clock()
    device = encoder(clock, 2, alone_s=1.0, ahead_s=0.25)
    for _ in range(7):
        clock.at(0.0, lambda: device.encode(Caller())(nothing))
    clock.run()
    # One by itself; two, and another two ahead; the same again would be full and is not: two are left.
    assert device.batches == {1: 1, 2: 3}
    assert clock.now == 1.0 + 1.0 + 0.25 + 0.25


def test_callers_take_turns_by_image():
    clock, order = Clock(), []
    device = encoder(clock, 2)
    many, few = Caller(), Caller()
    clock.at(0.0, lambda: device.encode(Caller())(nothing))
    for _ in range(4):
        clock.at(0.1, lambda: device.encode(many)(lambda: order.append("many")))
    clock.at(0.2, lambda: device.encode(few)(lambda: order.append("few")))
    clock.run()
    assert order == ["many", "few", "many", "many", "many"]


class Sizes:
    """The metrics of a queue, of which only the sizes of its batches are kept."""

    def __init__(self):
        self.sizes = []

    def batch(self, size, seconds):
        self.sizes.append(size)

    def __getattr__(self, name):
        return lambda *args: None


@pytest.mark.anyio
@pytest.mark.parametrize("first", [1, 3])
async def test_batches_are_those_of_the_queue_of_the_service(first):
    """Ten images that wait, behind ``first`` that run: the same sizes in the same order."""
    began, release, metrics = asyncio.Event(), asyncio.Event(), Sizes()
    loop = asyncio.get_running_loop()

    def begin(items):
        def wait():
            loop.call_soon_threadsafe(began.set)
            asyncio.run_coroutine_threadsafe(release.wait(), loop).result(10)
            return list(items)

        return wait

    queue = EncodeQueue("images", begin, batch_size=4, metrics=metrics)
    running = [asyncio.create_task(queue.run(range(first)))]
    await began.wait()
    running += [asyncio.create_task(queue.run([number])) for number in range(10)]
    await asyncio.sleep(0)
    assert queue.waiting == 10
    release.set()
    await asyncio.gather(*running)
    await asyncio.to_thread(queue.close)

    clock, order = Clock(), []
    device = encoder(clock, 4)
    begun = device._begin
    device._begin = lambda batch, seconds: (order.append(len(batch)), begun(batch, seconds))
    caller = Caller()
    # The queue is handed a whole request at once, the simulation image by image: begin it by hand.
    caller.waiting.extend([nothing] * first)
    device._turns.append(caller)
    device._waiting = device.ongoing = first
    clock.at(0.0, lambda: device._begin(device._take(), device._alone_s))
    for _ in range(10):
        clock.at(0.5, lambda: device.encode(Caller())(nothing))
    clock.run()
    assert order == metrics.sizes == [first, 4, 4, 2]


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("plan", [Plan(max_queued=16), Plan(edges=4, max_ongoing=5), Plan(on_edge=True, edge_cores=2)])
def test_what_arrives_is_answered_or_refused(plan, images):
    outcome = simulate(STAGES, plan, Load(1000, 2, images=images))
    assert outcome.arrived == outcome.answered + outcome.refused > 1500
    assert 0 < outcome.refused_share < 1


def test_nothing_is_refused_and_nobody_waits_where_there_is_room():
    outcome = simulate(STAGES, Plan(edges=50, encoders=50), Load(50, 20))
    assert outcome.refused == 0
    assert outcome.p50_s == pytest.approx(0.001 + 0.002 + 0.0004 + 2 * 0.0001 + 0.005 + 0.0005)
    assert outcome.mean_batch < 1.02


def test_on_ray_a_request_goes_through_a_proxy_and_an_encoder_has_a_loop_of_its_own():
    stages = replace(STAGES, proxy_s=0.002, encoder_call_s=0.0015)
    outcome = simulate(stages, Plan(edges=50, encoders=50, proxies=50), Load(50, 20))
    assert outcome.p50_s == pytest.approx(0.002 + 0.001 + 0.002 + 0.0004 + 2 * 0.0001 + 0.0015 + 0.005 + 0.0005)
    busy = simulate(stages, Plan(edges=50, encoders=2, proxies=4), Load(400, 10)).utilisation
    assert busy["proxies"] == pytest.approx(400 * 0.002 / 4, rel=0.1)
    assert busy["encoder loops"] == pytest.approx(400 * 0.0015 / 2, rel=0.1)


def test_images_that_come_while_calls_are_under_way_go_together():
    """Else an edge with 1 ms of HTTP and 9 ms for a call would do a hundred a second."""
    stages = replace(STAGES, hop_core_s=0.009)
    assert simulate(stages, Plan(max_queued=400), Load(500, 10)).images_per_s > 300


def test_on_one_machine_everything_shares_its_cores_with_what_nobody_waits_for():
    stages = replace(STAGES, proxy_s=0.002, encoder_call_s=0.001, beside_s=0.0015, ahead_s={1: 0.005})
    plan = Plan(edge_cores=2, proxies=1, shared_cores=2, batch_size=1, max_ongoing=None)
    core_s = 0.001 + 0.002 + 0.0005 + 0.0004 + 0.002 + 0.001 + 0.0015 + 0.005
    # At 1.6 times what it can, three of eight are refused, which a proxy and an edge have read all the same.
    refused_s = 0.6 * (0.001 + 0.002)
    assert saturation(stages, plan) == pytest.approx(2 / (core_s + refused_s), rel=0.08)
    disturbed = saturation(replace(stages, idle_cores=0.5), plan)
    # A quarter of the cores, of which it gets less while much else wants them.
    assert 0.7 < disturbed / saturation(stages, plan) < 0.9


def test_what_is_idle_takes_more_of_the_cores_and_what_is_busy_does_not():
    woken = replace(STAGES, proxy_wake_s=0.002, edge_wake_s=0.001, encoder_wake_s=0.0015, beside_wake_s=0.003)
    woken = replace(woken, proxy_s=0.001, encoder_call_s=0.001, beside_s=0.001)
    calm = replace(woken, proxy_wake_s=0.0, edge_wake_s=0.0, encoder_wake_s=0.0, beside_wake_s=0.0)
    plan = Plan(edge_cores=2, proxies=1, shared_cores=8, max_ongoing=None)
    few = [simulate(stages, plan, Load(5, 20)) for stages in (calm, woken)]
    # Each 2 + 4 + 2 + 1 times, which nobody waits for.
    more = 5 * (2 * 0.002 + 4 * 0.001 + 2 * 0.0015 + 0.003) / 8
    assert few[1].utilisation["cores"] - few[0].utilisation["cores"] == pytest.approx(more, rel=0.1)
    assert few[1].p50_s == few[0].p50_s
    many = [simulate(stages, replace(plan, shared_cores=2), Load(500, 10)).images_per_s for stages in (calm, woken)]
    # Were they always idle, 14 ms more of 8 would leave a third.
    assert many[1] > 0.7 * many[0]


def test_what_nobody_asked_for_ends_with_the_arrivals():
    stages = replace(STAGES, idle_cores=0.5)
    outcome = simulate(stages, Plan(edge_cores=2, proxies=1, shared_cores=2), Load(10, 10))
    assert outcome.utilisation["cores"] == pytest.approx(0.25 + 10 * 0.009 / 2, rel=0.1)


def test_a_full_queue_bounds_the_wait_of_those_that_are_in_it():
    """More than it can do: the last of 64 waits for those before it, at one image in 0.001 s of the event loop."""
    outcome = simulate(STAGES, Plan(max_queued=64, edge_cores=2), Load(3000, 5))
    assert outcome.refused_share > 0.1
    assert outcome.p99_s < simulate(STAGES, Plan(max_queued=256, edge_cores=2), Load(3000, 5)).p99_s


def test_the_slowest_shard_decides_and_every_shard_does_its_share():
    few = Plan(edges=8, captions=1_000_000, shards=2, shard_cores=4)
    many = replace(few, shards=10)
    load = Load(20, 20)
    assert simulate(STAGES, many, load).p50_s < simulate(STAGES, few, load).p50_s
    one, two = (simulate(STAGES, replace(many, copies=copies), load) for copies in (1, 2))
    assert one.utilisation["shards"] == pytest.approx(20 * STAGES.search_s(1_000_000, 10) / 4, rel=0.15)
    assert two.utilisation["shards"] == pytest.approx(one.utilisation["shards"] / 2, rel=0.15)


def test_bursts_lengthen_the_tail_and_come_on_top():
    steady = simulate(STAGES, Plan(edges=4), Load(300, 40))
    bursts = simulate(STAGES, Plan(edges=4), Load(300, 40, burst=5.0, burst_s=1.0, burst_every_s=10.0))
    assert bursts.arrived == pytest.approx(1.4 * steady.arrived, rel=0.05)
    assert bursts.p99_s > steady.p99_s


def test_the_same_seed_gives_the_same_figures():
    plan, load = Plan(edges=3), Load(500, 5)
    assert simulate(STAGES, plan, load, seed=2) == simulate(STAGES, plan, load, seed=2)
    assert simulate(STAGES, plan, load, seed=2) != simulate(STAGES, plan, load, seed=3)


def test_batches_between_the_sizes_that_were_measured_lie_on_lines():
    assert by_size({2: 2.0, 4: 6.0}, 6) == [2.0, 2.0, 4.0, 6.0, 7.5, 9.0]


def test_searches_between_and_beyond_the_sizes_follow_powers():
    assert STAGES.whole_search_s(1_000_000) == pytest.approx(0.0045)
    assert STAGES.whole_search_s(100_000) == pytest.approx(0.0006)
    assert 0.0006 < STAGES.whole_search_s(300_000) < 0.0045
    # The power is below one, and beyond what was measured no search is taken to become cheaper per caption.
    assert STAGES.whole_search_s(4_000_000) == pytest.approx(4 * 0.0045)
    with pytest.raises(StagesError, match="search_core_s"):
        replace(STAGES, search_core_s={}).search_s(10, 1)


def test_a_shard_takes_its_share_and_what_every_shard_takes():
    parts = replace(STAGES, search_fixed_share=0.2)
    assert parts.search_s(1_000_000, 1) == pytest.approx(0.0045)
    assert parts.search_s(1_000_000, 8) == pytest.approx(0.0045 * (0.2 + 0.8 / 8))


def test_a_percentile_is_that_of_the_nearest_rank():
    assert [percentile([1.0, 2.0, 3.0, 4.0], percent) for percent in (50, 75, 99)] == [2.0, 3.0, 4.0]


PRICES = Prices(encoder=4.0, edge=0.2, shard=0.5)


def test_the_plan_that_is_found_meets_its_goal_and_one_less_of_anything_does_not():
    goal, load = Goal(0.05), Load(4000, 1)
    plan, outcome = find(STAGES, Plan(), load, goal, PRICES)
    assert goal.met(outcome)
    for name in ("encoders", "edges"):
        assert not goal.met(simulate(STAGES, replace(plan, **{name: getattr(plan, name) - 1}), load)), name


def test_proxies_are_looked_for_where_they_take_time():
    stages, goal, load = replace(STAGES, proxy_s=0.004), Goal(0.06), Load(2000, 1)
    prices = replace(PRICES, proxy=0.2)
    plan, outcome = find(stages, Plan(), load, goal, prices)
    assert 10 <= plan.proxies <= 15  # ten are busy for 0.8 of the time
    assert goal.met(outcome)
    assert not goal.met(simulate(stages, replace(plan, proxies=9), load))
    assert prices.of(plan) == pytest.approx(PRICES.of(plan) + 0.2 * plan.proxies)


def test_shards_have_memory_for_their_captions_and_are_cheaper_than_copies_where_both_do():
    load, base = Load(50, 5), Plan(captions=4_000_000, shard_cores=4)
    plan, outcome = find(STAGES, base, load, Goal(0.1), PRICES, least_shards(4_000_000, 1175, 1))
    assert plan.shards >= 5
    assert Goal(0.1).met(outcome)


def test_a_goal_that_no_number_of_machines_meets_is_told():
    with pytest.raises(NoPlanError, match="however many machines"):
        find(STAGES, Plan(), Load(100, 2), Goal(0.005), PRICES)


def test_the_command_prints_a_plan_with_its_price(tmp_path, capsys):
    file = tmp_path / "stages.json"
    times = {"http_s": [0.001], "decode_s": [0.002], "adapt_s": [0.0005], "alone_s": {"1": 0.005, "32": 0.02}}
    file.write_text(json.dumps({**times, "ahead_s": times["alone_s"], "machine": "any"}))
    main(["--stages", str(file), "--rate", "200", "--seconds", "2", "--find", "--p99", "0.1", "--price-gpu", "3"])
    told = json.loads(capsys.readouterr().out)
    assert told["price_per_hour"] == 3 * told["plan"]["encoders"] + told["plan"]["edges"]
    assert told["p99_ms"] <= 100


def test_arrivals_that_are_given_are_replayed():
    arrivals = tuple(float(number) for number in range(10))
    outcome = simulate(STAGES, Plan(edge_cores=2, on_edge=True), Load(1, 10, arrivals_s=arrivals))
    assert (outcome.arrived, outcome.answered) == (10, 10)
    assert [outcome.p50_s, outcome.p99_s] == [pytest.approx(0.001 + 0.002 + 0.005 + 0.0005)] * 2


def test_a_request_that_finds_an_idle_edge_takes_longer_by_what_was_measured():
    load = Load(1, 10, arrivals_s=(0.0, 0.5, 5.0))
    plan = Plan(edge_cores=2, on_edge=True)
    calm, woken = (simulate(replace(STAGES, idle_s=idle_s), plan, load) for idle_s in (0.0, 0.003))
    assert woken.p99_s == pytest.approx(calm.p99_s + 0.003)
    busy = Load(1, 10, arrivals_s=(0.0, *(0.0001 + 0.001 * number for number in range(50))))
    calm, woken = (simulate(replace(STAGES, idle_s=idle_s), plan, busy) for idle_s in (0.0, 0.003))
    assert calm.p99_s < woken.p99_s < calm.p99_s + 0.004


def test_who_is_refused_costs_the_event_loop_as_much_as_who_is_answered():
    outcome = simulate(replace(STAGES, http_s=[0.01]), Plan(max_queued=1), Load(90, 20))
    assert outcome.refused > 50
    assert outcome.utilisation["edge loop"] == pytest.approx(0.9, rel=0.1)


def test_the_stages_of_the_example_can_be_used():
    file = Path(__file__).parents[2] / "benchmarks" / "capacity_example.json"
    stages = Stages.from_json(json.loads(file.read_text("utf-8")))
    assert stages.search_s(1_000_000_000, 8) == pytest.approx(0.6425, abs=0.001)
    # A tenth of the plan that docs/scaling.md has.
    outcome = simulate(stages, Plan(edges=30, edge_cores=1, encoders=2, proxies=8, batch_size=64), Load(1000, 2))
    assert Goal(0.2).met(outcome)


def test_searches_are_read_from_what_the_captions_were_measured_with():
    results = Path(__file__).parents[2] / "benchmarks" / "results"
    found = searches(max(results.glob("*-captions.json")))
    assert list(found) == ["100000", "1000000", "5000000"]
    assert 0 < found["100000"] < found["5000000"] < 1


USED = {"proxies": 0.004, "replicas of edge": 0.012, "replicas of encoder-embedded": 0.0205, "controller": 0.001}
ALONE = {"proxies": 0.008, "replicas of edge": 0.019, "replicas of encoder-embedded": 0.029, "controller": 0.003}
WITHOUT = {"proxies": 0.003, "replicas of edge": 0.003, "replicas of encoder-embedded": 0.0}
TOWER = {"alone_s": {"1": 0.007, "2": 0.013}, "ahead_s": {"1": 0.006, "2": 0.011}, "encoder_threads": 2}
LONE = {"lone_s": 0.05, "decode_s": 0.002, "adapt_s": 0.001, "encode_s": 0.009}


def test_stages_on_ray_are_told_by_the_processor_time_of_its_processes():
    found = from_processor_time(Used(USED, 1.5, 2.0), Used(WITHOUT), Used(ALONE), **LONE, tower=TOWER)
    assert found == {
        "http_s": [0.003],
        # Of a call for two images.
        "hop_core_s": pytest.approx(2 * 0.006),
        # A batch of 1.5 images takes 2 ms more than the tower alone: 12 ms on two cores, 16 ms of a core an image.
        "encoder_call_s": pytest.approx(2 * 0.0045),
        "proxy_s": pytest.approx(0.004),
        "beside_s": 0.001,
        # 50 ms less 3 + 12 + 9 + 4 and the stages of the image itself, 2 + 1 + 9, there and back.
        "hop_wire_s": pytest.approx(0.005),
        # Alone they take more, each time that they are used: twice, four times, twice and once.
        "proxy_wake_s": pytest.approx((0.008 - 0.004) / 2),
        "edge_wake_s": pytest.approx((0.019 - 0.003 - 0.003 - 0.012) / 4),
        "encoder_wake_s": pytest.approx((0.029 - 2 * 0.009 - 0.009) / 2),
        "beside_wake_s": pytest.approx(0.003 - 0.001),
        "alone_s": {1: pytest.approx(0.009), 2: pytest.approx(0.015)},
        "ahead_s": {1: pytest.approx(0.008), 2: pytest.approx(0.013)},
    }


def test_processor_time_that_no_client_waited_for_is_beside_the_request():
    found = from_processor_time(Used(USED, 1.5), Used(WITHOUT), Used(USED), **{**LONE, "lone_s": 0.0208}, tower=TOWER)
    # 8.8 ms are left for what takes 17.5.
    waited_for = [found["http_s"][0], found["hop_core_s"], found["encoder_call_s"], found["proxy_s"]]
    assert sum(waited_for) == pytest.approx(0.0088, abs=1e-5)
    assert found["beside_s"] == pytest.approx(0.001 + 0.0175 - 0.0088, abs=1e-5)
    assert found["hop_wire_s"] == 0.0


def test_a_tower_that_takes_more_of_lone_images_than_its_replica_leaves_nothing_for_calls():
    found = from_processor_time(Used(USED), Used(WITHOUT), Used(USED), **{**LONE, "encode_s": 0.02}, tower=TOWER)
    assert found["encoder_call_s"] == 0.0


def test_a_check_tells_what_is_off_by_more_than_a_fifth():
    measured = {"images_per_s": 100.0, "p50_ms": 10.0, "p95_ms": 20.0, "p99_ms": 30.0, "mean_batch": 1.0}
    measured |= {"others_cpu": 0.02}
    outcome = simulate(STAGES, Plan(edge_cores=2, on_edge=True), Load(50, 5))
    right = replace(outcome, images_per_s=81.0, p50_s=0.0119, p95_s=0.0161, p99_s=0.5)
    wrong = replace(right, images_per_s=79.0, p50_s=0.0121)
    points = [{"rate": 50, "share": 0.5, **compared(measured, each)} for each in (right, wrong)]
    points += [{"rate": 150, "share": 1.6, **compared(measured, wrong)}]
    assert verdict(points[:1]) == []
    assert verdict(points) == [
        "p50_ms at 50/s is 1.21 times what was measured",
        "images_per_s at 150/s is 0.79 times what was measured",
    ]
    assert "Off by more than 20%: nothing" in table({"points": points[:1]})


def test_the_medians_of_rounds_count_that_others_left_alone():
    rounds = [
        {"p95_ms": each, "others_cpu": others} for each, others in ((9.0, 0.0), (1.0, 0.3), (5.0, 0.03), (4.0, 0.02))
    ]
    assert medians(rounds) == {"p95_ms": 5.0, "others_cpu": 0.02}
    rounds = [
        {"p95_ms": 1.0, "others_cpu": 0.3, "statuses": {}},
        {"p95_ms": 2.0, "others_cpu": 0.2, "statuses": {"200": 1}},
    ]
    assert medians(rounds) == {"p95_ms": 2.0, "others_cpu": 0.2, "statuses": {"200": 1}}


@pytest.mark.parametrize("engine", ["", "-ray"])
def test_what_was_measured_is_simulated_anew_and_not_changed(engine):
    results = Path(__file__).parents[2] / "benchmarks" / "results"
    newest = max(results.glob(f"????-??-??-capacity{engine}.json"))
    kept = json.loads(newest.read_text("utf-8"))["models"][0]
    kept["points"] = [{**each, "simulated": {}, "ratios": {}} for each in kept["points"][:2]]
    told = again(kept, 20.0, 256)["points"]
    assert [each["measured"] for each in told] == [each["measured"] for each in kept["points"]]
    assert [each["ratios"]["images_per_s"] for each in told] == pytest.approx([1, 1], abs=0.01)


def test_a_single_process_saturates_where_its_cores_do():
    plan = replace(single_process({"encoder": {"batch": 1}}, 256), edge_cores=1)
    stages = replace(STAGES, alone_s={1: 0.005}, ahead_s={1: 0.004})
    # HTTP, decoding and adapting take 3.5 ms of the core, and the batch 4.
    assert saturation(stages, plan) == pytest.approx(1 / 0.0075, rel=0.1)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({}, "no 'http_s' among the stage times"),
        ({"http_s": [], "decode_s": [1], "adapt_s": [1], "alone_s": {"1": 1}, "ahead_s": {"1": 1}}, "http_s is empty"),
    ],
)
def test_stages_that_cannot_be_used_are_told(content, told, tmp_path):
    file = tmp_path / "stages.json"
    file.write_text(json.dumps(content))
    with pytest.raises(SystemExit, match=told):
        main(["--stages", str(file), "--rate", "1"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--rate", "0"], "--rate is 0"),
        (["--rate", "1", "--proxies", "-1"], "--proxies is -1; give 0 or more"),
        (["--rate", "1", "--shared-cores", "0"], "--shared-cores is 0; give more than 0"),
        (["--rate", "1", "--shared-cores", "2", "--find"], "--find looks for machines"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(words, told, capsys):
    with pytest.raises(SystemExit):
        main(["--stages", "any", *words])
    assert told in capsys.readouterr().err
