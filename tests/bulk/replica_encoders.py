"""Encoders for replicas, which find them here by name: one that works, and some that do not."""

import os
from pathlib import Path

from app.encoders.fake import FakeEncoder
from app.settings import Settings


def fake(settings: Settings) -> list[FakeEncoder]:
    return [FakeEncoder()]


def other_weights(settings: Settings) -> list[FakeEncoder]:
    class Retrained(FakeEncoder):
        def image_fingerprint(self) -> str:
            return "retrained"

    return [Retrained()]


class Dying(FakeEncoder):
    """Kills its process at the third batch, once among all processes that share a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._mark = folder / "died"

    def encode_images(self, pixels):
        if len(self.image_batches) == 2:
            try:
                self._mark.touch(exist_ok=False)
            except FileExistsError:
                pass
            else:
                os._exit(9)
        return super().encode_images(pixels)


def dying(settings: Settings) -> list[FakeEncoder]:
    return [Dying(settings.data_dir)]


def broken(settings: Settings) -> list[FakeEncoder]:
    from app.errors import ModelUnavailableError

    raise ModelUnavailableError("the weights are on another machine")


def crashing(settings: Settings) -> list[FakeEncoder]:
    raise RuntimeError("no kernel image is available")
