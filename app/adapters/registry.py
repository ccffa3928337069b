"""Every adapter, for the tests that hold for each."""

from app.adapters._base import Adapter
from app.adapters.auto_clip import AutoCLIP
from app.adapters.cosine import Cosine

ADAPTERS: tuple[type[Adapter], ...] = (AutoCLIP, Cosine)
