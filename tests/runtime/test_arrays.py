import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from app.runtime.arrays import map_array, read_arrays


def test_only_one_thread_at_a_time_parses_a_header(tmp_path, monkeypatch):
    rows = np.arange(12, dtype=np.float16).reshape(3, 4)
    np.save(tmp_path / "rows.npy", rows)
    np.savez(tmp_path / "rows.npz", rows=rows, lengths=rows[0])
    parse, parsing, most = np.load, 0, 0

    def load(*arguments, **options):
        nonlocal parsing, most
        parsing += 1
        most = max(most, parsing)
        time.sleep(0.001)
        array = parse(*arguments, **options)
        parsing -= 1
        return array

    def read(_):
        lengths, again = read_arrays(tmp_path / "rows.npz", ("lengths", "rows"))
        assert (again == rows).all()
        assert (lengths == rows[0]).all()
        assert (map_array(tmp_path / "rows.npy") == rows).all()

    monkeypatch.setattr(np, "load", load)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(read, range(20)))
    assert most == 1


def test_a_mapped_array_cannot_be_written(tmp_path):
    np.save(tmp_path / "rows.npy", np.zeros(3))
    with pytest.raises(ValueError, match="read-only"):
        map_array(tmp_path / "rows.npy")[0] = 1


def test_pickled_objects_are_refused(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    np.savez(tmp_path / "objects.npz", objects=np.array([{}]))
    with pytest.raises(ValueError, match=r"object|allow_pickle"):
        map_array(tmp_path / "objects.npy")
    with pytest.raises(ValueError, match="allow_pickle"):
        read_arrays(tmp_path / "objects.npz", ("objects",))
