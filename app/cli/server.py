"""Which server a command uses: that of its option or of the settings, or one that answers on this machine."""

import json
from collections.abc import Mapping
from http.client import HTTPConnection, HTTPException
from typing import Any

from app import __version__
from app.cli.common import note
from app.settings import ClientSettings, load_client_settings, load_settings

LOCAL = "local"
"""The value of the setting ``server`` for commands that run in their own process."""

# For a connection on this machine, and for each of two answers that take a few milliseconds.
_TIMEOUT_S = 0.2
_MAX_BYTES = 1024 * 1024
# Settings that say where a service listens, and nothing about a service in the process of a command.
_ADDRESS = frozenset({"host", "port"})


def find_server(*, search: bool) -> str | None:
    """Return the URL of the server that a command without ``--server`` uses; None if it runs in its own process.

    A command that is given settings of a service runs in its own process, because a server has settings of its own.

    Args:
        search: whether to use a server that answers, if the settings name none.

    Raises:
        ConfigurationError: the settings are invalid.
    """
    client = load_client_settings()
    if client.server:
        return None if client.server == LOCAL else client.server
    if not search:
        return None
    settings = load_settings()
    if settings.model_fields_set - _ADDRESS or not settings.port:
        return None
    url = f"http://127.0.0.1:{settings.port}"
    problem = _problem(settings.port, client)
    if problem is None:
        note(f"Using the service at {url}; --local runs this command in its own process.")
        return url
    if problem:
        note(f"The service at {url} is not used: {problem}.")
    return None


def _problem(port: int, client: ClientSettings) -> str | None:
    """Return why the service at this port is not used; an empty text if there is none, None if it is used."""
    connection = HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)
    try:
        status, body = _get(connection, "/healthz", {})
        name, _, version = str(body.get("service", "")).partition(" ")
        if status != 200 or name != "deixis":
            return ""
        if version != __version__:
            return f"it is version {version[:20]}, and this command is {__version__}; --server uses it"
        # Another user of this machine may listen here, and could read a key and use it elsewhere.
        if client.api_key:
            return "an API key is sent only to the server that --server or DEIXIS_SERVER names"
        space = (client.namespace or "").strip()
        status, body = _get(connection, "/v1/models", {"Deixis-Namespace": space} if space else {})
    except (OSError, HTTPException, ValueError):
        return ""
    finally:
        connection.close()
    if status in {401, 403}:
        return f"it needs an API key; set DEIXIS_API_KEY, and DEIXIS_SERVER to http://127.0.0.1:{port}"
    return None if status == 200 and body.get("models") else ""


def _get(connection: HTTPConnection, path: str, headers: Mapping[str, str]) -> tuple[int, dict[str, Any]]:
    connection.request("GET", path, headers=dict(headers))
    response = connection.getresponse()
    body = json.loads(response.read(_MAX_BYTES))
    return response.status, body if isinstance(body, dict) else {}
