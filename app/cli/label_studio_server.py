"""Runs the machine learning backend of `deixis label-studio`."""

import os
import socket
from collections.abc import Sequence
from functools import partial
from ipaddress import ip_address

import typer
import uvicorn

from app.api.connections import ConnectionLimits, bounded
from app.api.hosts import HostCheck, HostRules
from app.classification.request import ClassifyRequest
from app.cli.backends.over_http import client_options
from app.cli.common import NOTHING_DONE, report_errors
from app.errors import ConfigurationError
from app.integrations.label_studio import Preannotation, create_app
from app.integrations.label_studio_images import TaskImages
from app.observability.logs import configure_logs
from app.settings import load_settings
from deixis import AsyncClient

_IMAGE_TIMEOUT_S = 20.0


class _Server(uvicorn.Server):
    """Prints the address for Label Studio once it listens."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.started:
            return
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        print(  # noqa: T201 - the only text on standard output
            f"listens on {address}\nIn Label Studio, connect a model with this address (Settings, Model).", flush=True
        )


def run_label_studio(
    request: ClassifyRequest,
    *,
    server: str,
    host: str,
    port: int,
    multiple_above: float,
    label_studio_url: str | None,
    trust_host: Sequence[str],
) -> None:
    """Run the backend until a signal ends it; the arguments are the options of the command."""
    with report_errors():
        settings = load_settings()
        configure_logs(settings.log_format, settings.log_level)
        login = _login()
        _check_access(host, login)
        images = TaskImages(
            label_studio=label_studio_url or os.environ.get("LABEL_STUDIO_URL") or None,
            token=os.environ.get("LABEL_STUDIO_API_KEY"),
            trusted_hosts=trust_host,
            max_bytes=settings.max_image_bytes,
            timeout_s=_IMAGE_TIMEOUT_S,
        )
        preannotation = Preannotation(client_options(request), multiple_above)
        try:
            client = AsyncClient(server)
        except ValueError as error:
            raise ConfigurationError(str(error)) from error
        with _listener(host, port) as listener:
            running = _Server(
                uvicorn.Config(
                    HostCheck(
                        create_app(client, images, preannotation, login=login),
                        rules=HostRules(host, settings.allowed_hosts),
                        needs_key=partial(_needs_login, login),
                    ),
                    http=bounded(
                        ConnectionLimits(settings.max_connections, settings.head_timeout_s, settings.body_timeout_s)
                    ),
                    ws="none",
                    log_config=None,
                    access_log=False,
                    lifespan="on",
                    timeout_graceful_shutdown=30,
                    server_header=False,
                )
            )
            running.run(sockets=[listener])
    if not running.started:
        raise typer.Exit(NOTHING_DONE)


def _login() -> tuple[str, str] | None:
    user, password = os.environ.get("BASIC_AUTH_USER"), os.environ.get("BASIC_AUTH_PASS")
    if bool(user) != bool(password):
        raise ConfigurationError("only one of BASIC_AUTH_USER and BASIC_AUTH_PASS is set; set both or neither")
    return (user, password) if user and password else None


async def _needs_login(login: tuple[str, str] | None) -> bool:
    return login is not None


def _check_access(host: str, login: tuple[str, str] | None) -> None:
    """Refuse an address that other machines can reach without a login."""
    try:
        is_local = ip_address(host).is_loopback
    except ValueError:
        is_local = host == "localhost"
    if not (is_local or login):
        raise ConfigurationError(
            f"other machines can reach {host}, and clients need no login; set BASIC_AUTH_USER and BASIC_AUTH_PASS, and"
            " enter the same values in Label Studio"
        )


def _listener(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _cannot_listen(host, port, error) from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _cannot_listen(host, port, error) from error
    return listener


def _cannot_listen(host: str, port: int, error: OSError) -> ConfigurationError:
    return ConfigurationError(
        f"cannot listen on {host}, port {port}: {error.strerror}; set --host and --port to others"
    )
