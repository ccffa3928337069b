"""What endpoint functions are given; asynchronous, because FastAPI runs others in a thread."""

from typing import Annotated

from fastapi import Depends, Request

from app.classification.service import Service
from app.jobs.queue import Jobs


async def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceDependency = Annotated[Service, Depends(_service)]


async def _jobs(request: Request) -> Jobs:
    jobs: Jobs = request.app.state.jobs
    return jobs


JobsDependency = Annotated[Jobs, Depends(_jobs)]
