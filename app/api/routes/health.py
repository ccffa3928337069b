"""Probes, and metrics."""

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from app.api.auth.access import GuardedRoute
from app.api.dependencies import HealthDependency
from app.api.schemas.health import Health

router = APIRouter(tags=["probes"], route_class=GuardedRoute)


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz")
async def healthz(health: HealthDependency) -> Health:
    """Answer that the event loop turns and every model's workers do; 503 when one died or hangs."""
    health.check_alive()
    return Health(status="ok")


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz")
async def readyz(health: HealthDependency) -> Health:
    """Answer whether requests can be served: as /healthz, and the database answers.

    Models are loaded before the port opens.
    """
    await health.check_ready()
    return Health(status="ready")


@router.get(
    "/metrics",
    response_class=Response,
    responses={
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "In Prometheus's text."}
    },
)
async def metrics(request: Request) -> Response:
    """Tell what has been counted and timed since the start, for Prometheus."""
    return Response(await request.app.state.exposition(), media_type=CONTENT_TYPE_PLAIN_0_0_4)
