"""Probes."""

from fastapi import APIRouter

from app.api.dependencies import ServiceDependency
from app.api.schemas import Health

router = APIRouter(tags=["probes"])


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz")
async def healthz() -> Health:
    """Answer that the process lives and its event loop turns."""
    return Health(status="ok")


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz")
async def readyz(service: ServiceDependency) -> Health:
    """Answer whether requests can be served: models are loaded before the port opens, so that the database decides."""
    await service.check_ready()
    return Health(status="ready")
