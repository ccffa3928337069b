"""Health probes and metrics."""

from fastapi import Request, Response
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from app.api.dependencies import HealthDependency
from app.api.routing import guarded_router
from app.api.schemas.health import Health

router = guarded_router(tags=["probes"])


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz")
async def healthz(health: HealthDependency) -> Health:
    """Liveness: 200 while the event loop and the workers of every model run, 503 if one hangs or none is left."""
    health.check_alive()
    return Health(status="ok")


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz")
async def readyz(health: HealthDependency) -> Health:
    """Readiness: as /healthz, the loops in the background work, and the database responds.

    Models are loaded before the port opens.
    """
    await health.check_ready()
    return Health(status="ready")


@router.get(
    "/metrics",
    response_class=Response,
    responses={
        200: {
            "content": {"text/plain": {"schema": {"type": "string"}}},
            "description": "Metrics in the Prometheus text format.",
        }
    },
)
async def metrics(request: Request) -> Response:
    """Return counters and timings since the start, for Prometheus."""
    return Response(await request.app.state.exposition(), media_type=CONTENT_TYPE_PLAIN_0_0_4)
