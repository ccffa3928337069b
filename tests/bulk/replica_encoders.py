"""Encoder loaders that replicas import: one that works, and others that fail."""

import os
from pathlib import Path

from app.encoders.fake import FakeEncoder
from app.settings import Settings


def load_fake(settings: Settings) -> list[FakeEncoder]:
    return [FakeEncoder()]


def load_other_weights(settings: Settings) -> list[FakeEncoder]:
    class Retrained(FakeEncoder):
        def image_fingerprint(self) -> str:
            return "retrained"

    return [Retrained()]


class CrashingOnce(FakeEncoder):
    """Ends its process at the third batch, once among all processes that share a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._mark = folder / "crashed"

    def encode_images(self, pixels):
        if len(self.image_batches) == 2:
            try:
                self._mark.touch(exist_ok=False)
            except FileExistsError:
                pass
            else:
                os._exit(9)
        return super().encode_images(pixels)


def load_crashing_once(settings: Settings) -> list[FakeEncoder]:
    return [CrashingOnce(settings.data_dir)]


def load_unavailable(settings: Settings) -> list[FakeEncoder]:
    from app.errors import ModelUnavailableError

    raise ModelUnavailableError("the weights are on another machine")


def load_failing(settings: Settings) -> list[FakeEncoder]:
    raise RuntimeError("no kernel image is available")
