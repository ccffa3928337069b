"""Every method that callers may name."""

from collections.abc import Mapping
from types import MappingProxyType

from app.adapters._base import Adapter
from app.adapters.zero_shot import ZeroShot

METHODS: Mapping[str, type[Adapter]] = MappingProxyType({adapter.name: adapter for adapter in (ZeroShot,)})
