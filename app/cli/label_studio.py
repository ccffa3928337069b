"""`deixis label-studio`: predictions for the tasks of Label Studio."""

import os
import socket
from ipaddress import ip_address
from typing import Annotated

import typer
import uvicorn

from app.cli.common import (
    NOTHING_DONE,
    LabelSetOption,
    MethodOption,
    ModelOption,
    OptionsOption,
    TemplateOption,
    read_options,
    told_plainly,
)
from app.errors import ConfigurationError
from app.integrations.label_studio import Preannotation, create_app
from app.integrations.label_studio_images import TaskImages
from app.observability.logs import configure_logs
from app.settings import load_settings
from deixis import AsyncClient

_IMAGE_TIMEOUT_S = 20.0


class _Server(uvicorn.Server):
    """Tells what Label Studio is to be given, once it listens."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.started:
            return
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        print(  # noqa: T201 - the one thing that it says on standard output
            f"listens on {address}\nIn Label Studio, connect a model with this address (Settings, Model).", flush=True
        )


def label_studio_command(
    server: Annotated[
        str,
        typer.Option("--server", metavar="URL", help="The service, with the key in DEIXIS_API_KEY if it wants one."),
    ] = "http://127.0.0.1:8000",
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0 for a free one.")] = 9090,
    label_set: LabelSetOption = None,
    model: ModelOption = None,
    method: MethodOption = None,
    template: TemplateOption = None,
    option: OptionsOption = None,
    reject_below: Annotated[
        float | None,
        typer.Option("--reject-below", min=0, max=1, help="Predict nothing where the best score is lower."),
    ] = None,
    multiple_above: Annotated[
        float,
        typer.Option(
            "--multiple-above", min=0, max=1, help="Where several may be chosen: all with this score or more."
        ),
    ] = 0.25,
    label_studio_url: Annotated[
        str | None,
        typer.Option(
            "--label-studio-url", metavar="URL", help="Of Label Studio; by default what LABEL_STUDIO_URL holds."
        ),
    ] = None,
    trust_host: Annotated[
        list[str] | None,
        typer.Option(
            "--trust-host",
            metavar="HOST[:PORT]",
            help="Fetch images from it although it is not public, such as a storage on your own network. Repeatable.",
        ),
    ] = None,
) -> None:
    """Answer as a machine learning backend of Label Studio, for its projects with choices about an image.

    Images that Label Studio keeps are fetched with the token in LABEL_STUDIO_API_KEY. With BASIC_AUTH_USER and
    BASIC_AUTH_PASS callers must show these; without, it listens to this machine alone.
    """
    with told_plainly():
        settings = load_settings()
        configure_logs(settings.log_format, settings.log_level)
        login = _login()
        _check_reach(host, login)
        images = TaskImages(
            label_studio=label_studio_url or os.environ.get("LABEL_STUDIO_URL") or None,
            token=os.environ.get("LABEL_STUDIO_API_KEY"),
            trusted_hosts=trust_host or (),
            max_bytes=settings.max_image_bytes,
            timeout_s=_IMAGE_TIMEOUT_S,
        )
        asked = Preannotation(
            label_set=label_set,
            model=model,
            method=method,
            template=template,
            options=read_options(option),
            reject_below=reject_below,
            multiple_above=multiple_above,
        )
        try:
            client = AsyncClient(server)
        except ValueError as error:
            raise ConfigurationError(str(error)) from error
        with _listener(host, port) as listener:
            running = _Server(
                uvicorn.Config(
                    create_app(client, images, asked, login=login),
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
        raise ConfigurationError("BASIC_AUTH_USER and BASIC_AUTH_PASS go together; set both, or neither")
    return (user, password) if user and password else None


def _check_reach(host: str, login: tuple[str, str] | None) -> None:
    """See that nobody is let in by oversight."""
    try:
        is_local = ip_address(host).is_loopback
    except ValueError:
        is_local = host == "localhost"
    if not (is_local or login):
        raise ConfigurationError(
            f"{host} can be reached from other machines, and callers need no password: set BASIC_AUTH_USER and"
            " BASIC_AUTH_PASS here, and give Label Studio the same ones"
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
        f"cannot listen on {host}, port {port}: {error.strerror}; choose others by --host, --port"
    )
