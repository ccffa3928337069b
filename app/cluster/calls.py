"""Calls of Ray Serve's deployments, with what goes wrong in our own terms."""

import asyncio
from collections.abc import Mapping
from typing import Any

import ray.exceptions
from opentelemetry import propagate
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

from app.cluster.messages import ReplicaUnavailableError
from app.errors import NotReadyError, OverloadedError


async def ask(method: Any, *arguments: Any) -> Any:
    """Call a method of a deployment's handle; cancelling also cancels the call where it runs.

    Raises:
        ReplicaUnavailableError: the replica went away before it answered.
        OverloadedError: too many calls wait for the deployment.
        NotReadyError: the deployment cannot be started.
        Exception: what the method raised.
    """
    response = method.remote(*arguments)
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise
    except BackPressureError as error:
        raise OverloadedError(f"{error}; try again later", retry_after_s=1) from error
    except DeploymentUnavailableError as error:
        raise NotReadyError(f"a part of the service cannot be started: {error}") from error
    except ray.exceptions.RayTaskError:
        raise  # the method's own
    except (ray.exceptions.RayError, RayServeException) as error:
        raise ReplicaUnavailableError(type(error).__name__) from error


def carried_trace() -> Mapping[str, str]:
    """Return the trace that the caller is in, to be gone on with elsewhere."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return carrier
