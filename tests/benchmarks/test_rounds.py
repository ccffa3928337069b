"""Alternating rounds, their ratios, and what is refused."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from app.runtime.cpu import usable_cores
from benchmarks.peers.__main__ import compared
from benchmarks.peers.__main__ import report as report_on_peers
from benchmarks.processes import cpu_s, cpu_s_by_thread
from benchmarks.rounds import Part, Rounds, alternate, cell, end_if_busy, watch_others
from benchmarks.service import closed_loop, report


def parts_of(order, **rates):
    """Return parts that append their name to ``order`` and take their next rate; each has its index as process."""

    def part(number, name, values):
        left = iter(values)

        def measure():
            order.append(name)
            return {"images_per_s": next(left)}

        return Part(measure, [number])

    return {name: part(number, name, values) for number, (name, values) in enumerate(rates.items())}


def shares(*values):
    """Return a watch that sees these shares of other processes, one for each measurement."""
    left = iter(values)
    return lambda processes: lambda: next(left)


def test_a_ratio_is_the_median_of_the_ratios_of_each_round():
    order = []
    parts = parts_of(order, limit=[100, 50, 200], service=[50, 40, 180])
    rounds = alternate(parts, 3, watch=shares(*[0.0] * 6))
    assert order == ["limit", "service"] * 3
    # The medians of the rates, 100 and 50, would give 0.5.
    assert cell(rounds.spread("service", "images_per_s", over=("limit", "images_per_s"))) == "0.80 (0.50-0.90)"


def test_a_round_under_load_by_others_is_repeated_from_its_start():
    order = []
    parts = parts_of(order, limit=[100, 70, 100, 200], service=[30, 50, 100])
    rounds = alternate(parts, 2, watch=shares(0.0, 0.11, 0.3, 0.1, 0.1, 0.0, 0.0), pause_s=0)
    assert order == ["limit", "service", "limit", "limit", "service", "limit", "service"]
    assert rounds.refused == 2
    assert cell(rounds.spread("service", "images_per_s", over=("limit", "images_per_s"))) == "0.50 (0.50-0.50)"
    assert rounds.accepted[0]["service"]["cpu_by_others"] == 0.1


def test_a_busy_machine_gets_no_ratio():
    order = []
    parts = parts_of(order, limit=[100] * 9, service=[50] * 9)
    rounds = alternate(parts, 2, watch=shares(0.0, 0.0, *[0.5] * 9), pause_s=0)
    assert rounds.is_busy
    assert rounds.refused == 4
    assert cell(rounds.spread("service", "images_per_s")) == "busy"


def test_a_system_that_does_not_say_who_uses_the_cores_is_not_busy():
    rounds = alternate(parts_of([], limit=[100]), 1, watch=shares(None))
    assert not rounds.is_busy


def test_the_limit_is_that_of_the_fastest_way_in_all_rounds():
    ways = [(90, 100), (95, 60), (99, 98)]
    rounds = Rounds(
        3, [{"limit": {"ways": {way: {"images_per_s": r} for way, r in zip("ab", w, strict=True)}}} for w in ways], 0
    )
    best = rounds.with_best_way("limit")
    assert best.accepted[1]["limit"]["way"] == "b"
    assert best.spread("limit", "images_per_s").low == 60


def of_service(rate, p50_ms):
    threads = dict.fromkeys(("all", "event loop", "decode", "libraries", "rest"), 20.0)
    others = dict.fromkeys(("p95_ms", "p99_ms", "mean_batch", "server_share", "rss_mib"), 1.0)
    rates = {"images_per_s": rate, "without_generator": rate / 0.9, "generator_share": 0.1}
    return {**rates, **others, "p50_ms": p50_ms, "cpu_ms": threads, "statuses": {"200": 5}}


def of_encoder(rate):
    return {"ways": {"batches of 8": {"images_per_s": rate, "cpu_ms": 10.0}}}


def test_the_report_compares_the_service_with_the_encoder_and_with_the_parts_alone():
    lone = {"p50_ms": 8.0, "parts_ms": {"decode": 1.0, "transform": 1.0, "forward": 6.0}, "cpu_ms": 10.0}
    one = Rounds(1, [{"lone": lone, "service": of_service(100.0, 10.0)}], 0)
    many = Rounds(
        1, [{"limit": of_encoder(200.0), "reading": of_encoder(125.0), "service": of_service(90.0, 300.0)}], 1
    )
    closed = {"1x1": closed_loop(one, ["lone"]), "32x1": closed_loop(many, ["limit", "reading"])}
    path = {"backend": "openvino", "precision": "fp32", "batch": 8}
    text = report({"model": "embedded", "path": path, "closed": closed, "open": {}})
    assert "**1.25 (1.25-1.25)** of 8.0 (8.0-8.0) ms" in text
    # 90 / (1 - 0.1) images/s without the load generator.
    assert "**0.50 (0.50-0.50)**" in text
    assert "**0.80 (0.80-0.80)**" in text
    assert text.count("**2.00 (2.00-2.00)**") == 2  # the time of the cores


def test_the_report_of_a_busy_machine_has_no_ratio():
    closed = {
        "1x1": closed_loop(Rounds(3, [], 6), ["lone"]),
        "32x1": closed_loop(Rounds(3, [], 6), ["limit", "reading"]),
    }
    path = {"backend": "openvino", "precision": "fp32", "batch": 8}
    text = report({"model": "embedded", "path": path, "closed": closed, "open": {}})
    assert text.count("**busy**") == 5
    assert all(found["is_busy"] for found in closed.values())


def test_the_report_on_other_servers_has_ratios_the_busy_machine_and_servers_that_do_not_start():
    ours, theirs = ({"images_per_s": rate, "p50_ms": ms, "p99_ms": ms} for rate, ms in ((80.0, 10.0), (20.0, 40.0)))
    runs = [compared(Rounds(1, [{"deixis": ours, "peer": theirs}], 0), 1), compared(Rounds(1, [], 2), 8)]
    text = report_on_peers({"plain": runs, "infinity": "could not be run: no memory"})
    first, busy, failed = text.splitlines()[2:]
    assert "**4.00 (4.00-4.00)** | **0.25 (0.25-0.25)**" in first
    assert busy.count("busy") == 8
    assert "could not be run: no memory" in failed
    with pytest.raises(SystemExit):
        end_if_busy(runs)
    end_if_busy(runs[:1])


_USES_A_CORE = """
import threading, time
from benchmarks.named_threads import name_threads
def use():
    while time.thread_time() < 0.1:
        pass
    print("used", flush=True)
    input()
name_threads()
threading.Thread(target=use, name="decode_0").start()
"""


@contextmanager
def process_that_has_used_a_core():
    command = [sys.executable, "-c", _USES_A_CORE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "used\n"
            yield process.pid
        finally:
            process.kill()


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="CPU times of other processes are those of Linux")
@pytest.mark.skipif(usable_cores() != os.cpu_count(), reason="with a quota, other processes may use the other cores")
def test_the_processes_of_a_part_are_not_others():
    own = []
    all_others, others = watch_others([]), watch_others(own)
    with process_that_has_used_a_core() as process:
        own.append(process)
        assert cpu_s(own) >= 0.08  # in ticks of 0.01 s
        assert others() < all_others()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="CPU times of threads are those of Linux")
def test_the_time_of_the_cores_is_split_by_the_names_of_threads():
    with process_that_has_used_a_core() as process:
        used_s = cpu_s_by_thread(process)
        assert used_s["decode"] >= 0.08  # in ticks of 0.01 s
        assert set(used_s) == {"event loop", "decode"}
