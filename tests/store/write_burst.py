"""Writes versions as fast as possible and prints each acknowledged one. test_crash.py runs and kills it."""

import asyncio
import sys

from app.store.database import migrate, open_engine
from app.store.label_sets import LabelSetRepository
from app.types import ClassEntry


async def write_for_ever(repository: LabelSetRepository, name: str) -> None:
    version = 0
    while True:
        entries = [ClassEntry(f"class {n} of version {version + 1}") for n in range(100)]
        label_set, _ = await repository.put(name, entries, "photo")
        version = label_set.version
        print(name, version, flush=True)  # noqa: T201 - the parent reads it


async def main(url: str) -> None:
    engine = open_engine(url)
    await migrate(engine)
    repository = LabelSetRepository(engine)
    await asyncio.gather(*(write_for_ever(repository, name) for name in ("one", "two", "three")))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
