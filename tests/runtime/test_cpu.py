import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np  # noqa: F401 - its library is limited
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from app.runtime import cpu
from app.runtime.cpu import OtherProcesses, one_blas_thread, usable_cores


@pytest.fixture
def cores(monkeypatch):
    """Simulate a number of cores that this process may use."""
    return lambda number: monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(number)), raising=False)


@pytest.mark.parametrize(
    ("quota", "affinity", "usable"),
    [
        ("200000 100000", 16, 2),
        ("150000 100000", 16, 2),
        ("1000 100000", 16, 1),
        ("100000 50000", 16, 2),
        ("800000 100000", 4, 4),
        ("max 100000", 4, 4),
        ("", 4, 4),
        ("nonsense", 4, 4),
        ("1 0", 4, 4),
        ("0 100000", 4, 1),
    ],
)
def test_the_smaller_of_quota_and_affinity_is_used_and_rounded_up(tmp_path, cores, quota, affinity, usable):
    cores(affinity)
    (tmp_path / "cpu.max").write_text(quota + "\n")
    assert usable_cores(tmp_path / "cpu.max") == usable


def test_without_a_quota_the_affinity_is_used(tmp_path, cores):
    cores(3)
    assert usable_cores(tmp_path / "cpu.max") == usable_cores(tmp_path) == 3


def test_all_cores_are_used_on_a_system_without_affinity(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    for counted, usable in ((6, 6), (None, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda counted=counted: counted)
        assert usable_cores(tmp_path / "cpu.max") == usable


def test_this_machine_has_at_least_one_core():
    assert 1 <= usable_cores() <= os.cpu_count()


def blas_threads():
    return {item["num_threads"] for item in threadpool_info() if item["user_api"] == "blas"}


def test_the_thread_limits_are_restored_by_the_last_user():
    with threadpool_limits(2, user_api="blas"):
        first, second = one_blas_thread(), one_blas_thread()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert blas_threads() == {1}
        second.__exit__(None, None, None)
        assert blas_threads() == {2}
        with pytest.raises(RuntimeError), one_blas_thread():
            raise RuntimeError
        assert blas_threads() == {2}


def test_any_thread_can_limit_blas_after_another_has_set_a_limit():
    def has_one(other_is_done=None):
        with one_blas_thread():
            if other_is_done is not None:
                other_is_done.result(10)
            return blas_threads()

    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second, threadpool_limits(2, user_api="blas"):
        pools = [first, second, first]
        assert [pool.submit(has_one).result(10) for pool in pools] == [{1}, {1}, {1}]
        came_later = first.submit(has_one)
        assert second.submit(has_one, came_later).result(10) == {1}
        assert blas_threads() == {2}
        for item in (first, second):
            assert item.submit(shared_threads).result(10) == {2}


def shared_threads():
    # OpenMP has a limit per thread, which this function does not return.
    found = [item for item in threadpool_info() if item["user_api"] == "blas" and item["threading_layer"] != "openmp"]
    return {item["num_threads"] for item in found}


def test_libraries_loaded_after_the_first_limit_are_limited_too():
    with threadpool_limits(2, user_api="blas"):
        with one_blas_thread():
            threadpool_limits(2, user_api="blas")  # like one that is loaded now
            with one_blas_thread():
                assert blas_threads() == {1}
        assert blas_threads() == {2}


STAT = """\
cpu  9 9 9 9 9 9 9 9 0 0
cpu0 {user} 10 20 1000 5 1 2 {steal} 0 0
cpu1 {user} 10 20 1000 5 1 2 0 0 0
cpu2 99999 10 20 1000 5 1 2 0 0 0
intr 5
"""


@pytest.mark.parametrize(
    ("user", "steal", "own_s", "usable", "share"),
    [
        (100, 0, 2.0, 2, 0.0),  # all of it is this process's own
        (100, 0, 0.0, 2, 1.0),
        (100, 0, 1.0, 2, 0.5),
        (0, 50, 0.0, 2, 0.25),  # used by other virtual machines
        (50, 0, 0.0, 1, 0.0),  # one of two cores is left for a quota of one
        (100, 0, 0.5, 1, 0.5),
    ],
)
def test_the_share_of_other_processes_is_that_of_the_cores_that_this_one_may_use(
    tmp_path, cores, monkeypatch, user, steal, own_s, usable, share
):
    cores(2)
    monkeypatch.setattr(cpu, "usable_cores", lambda: usable)
    file = tmp_path / "stat"
    now = {"wall": 0.0, "own": 0.0}
    monkeypatch.setattr(cpu.time, "perf_counter", lambda: now["wall"])
    monkeypatch.setattr(os, "sysconf", lambda _: 100)
    file.write_text(STAT.format(user=1000, steal=7))
    others = OtherProcesses(file, lambda: now["own"])
    file.write_text(STAT.format(user=1000 + user, steal=7 + steal))
    now.update(wall=1.0, own=own_s)
    assert others.share() == pytest.approx(share)
    now.update(wall=2.0)
    assert others.share() == 0.0


@pytest.mark.parametrize("content", ["", "cpu0 0 0 0 0 0 0 0 0 0 0\n", "cpu0 1 x\n", None])
def test_a_system_without_figures_of_its_processes_says_nothing(tmp_path, content):
    file = tmp_path / "stat"
    if content is not None:
        file.write_text(content)
    assert OtherProcesses(file).share() is None
