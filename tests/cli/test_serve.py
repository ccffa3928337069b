"""The limit on open files that `deixis serve` sets for itself."""

import resource

import pytest

from app.cli.serve import _raise_descriptor_limit
from app.errors import ConfigurationError

INFINITE = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("limits", "raised", "available"),
    [
        ((1024, 4096), (4096, 4096), 4096),
        ((4096, 4096), (4096, 4096), 4096),
        ((256, INFINITE), (10_240, INFINITE), 10_240),
        ((20_000, INFINITE), (20_000, INFINITE), 20_000),
        ((INFINITE, INFINITE), None, None),
    ],
)
def test_the_soft_limit_on_open_files_is_raised(monkeypatch, limits, raised, available):
    was_set = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, wanted: was_set.append(wanted))
    assert _raise_descriptor_limit(1000) == available
    assert was_set == ([] if raised is None else [raised])


def test_a_hard_limit_below_the_connections_is_an_error(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1024))
    with pytest.raises(ConfigurationError, match="needs 1,512 file descriptors, and the system allows 1,024"):
        _raise_descriptor_limit(1000)
