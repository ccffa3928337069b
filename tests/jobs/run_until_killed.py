"""Runs the jobs of a database with the fake encoder until they are finished. test_killed.py runs and kills it."""

import asyncio
import os
import signal
import sys
from pathlib import Path

from app.encoders.fake import FakeEncoder
from app.jobs.handlers import ImportJobs
from app.jobs.queue import JobQueue
from app.main import open_service
from app.settings import Settings
from app.store.jobs import JobRepository


class HaltsAfterOneBatch(ImportJobs):
    async def run(self, job, attachment, advance):
        async def halt(done, total):
            await advance(done, total)
            print(done, flush=True)  # noqa: T201 - the parent reads it
            await asyncio.Event().wait()

        return await super().run(job, attachment, halt)


class EndsItsProcess(ImportJobs):
    async def run(self, *_):
        print("started", flush=True)  # noqa: T201 - the parent reads it
        os.kill(os.getpid(), signal.SIGKILL)


async def main(folder: Path, handler: type[ImportJobs]) -> None:
    settings = Settings(data_dir=folder, models=("embedded",), build_default_database=False, import_dir=folder)
    async with open_service(settings, [FakeEncoder()], runs_jobs=True) as service:
        repository = JobRepository(service.engine)
        queue = JobQueue(repository, lease_s=0.3, poll_s=0.02)
        jobs = handler(
            repository, service.label_sets, service.examples, service.models, service.jobs.select_method, folder
        )
        queue.register(jobs)
        queue.start()
        (job,) = await repository.list(1)
        while (job := await repository.get(job.id)).finished_at is None:  # noqa: ASYNC110 - it is in the database
            await asyncio.sleep(0.01)
        print(job.status, flush=True)  # noqa: T201
        await queue.close()


if __name__ == "__main__":
    handlers = {"halt": HaltsAfterOneBatch, "kill": EndsItsProcess, "finish": ImportJobs}
    asyncio.run(main(Path(sys.argv[1]), handlers[sys.argv[2]]))
