"""Calls of Ray Serve deployments; errors of Ray become errors of this package."""

import asyncio
from collections.abc import Mapping
from typing import Any

import ray.exceptions
from opentelemetry import propagate
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

from app.cluster.messages import ReplicaUnavailableError
from app.errors import NotReadyError, OverloadedError


async def call(method: Any, *arguments: Any) -> Any:
    """Call a method of a deployment handle; cancelling also cancels the call in the replica.

    Raises:
        ReplicaUnavailableError: the replica disappeared before it responded.
        OverloadedError: too many calls wait for the deployment.
        NotReadyError: the deployment cannot be started.
        Exception: the method raised it.
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
        raise NotReadyError(f"a deployment of the service cannot be started: {error}; try again later") from error
    except ray.exceptions.RayTaskError:
        raise  # the method raised it
    except (ray.exceptions.RayError, RayServeException) as error:
        raise ReplicaUnavailableError(type(error).__name__) from error


def trace_context() -> Mapping[str, str]:
    """Return the context of the current trace, for a process that continues it."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return carrier
