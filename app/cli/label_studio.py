"""`deixis label-studio`: run a machine learning backend of Label Studio."""

from typing import Annotated

import typer

from app.classification.request import ClassifyRequest
from app.cli.options import takes_request


@takes_request("label_set", "model", "method", "template", "option", "reject_below", "reject", "multi_label")
def label_studio_command(
    request: ClassifyRequest,
    server: Annotated[
        str,
        typer.Option("--server", metavar="URL", help="The service; its API key is in DEIXIS_API_KEY."),
    ] = "http://127.0.0.1:8000",
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0 for a free one.")] = 9090,
    multiple_above: Annotated[
        float,
        typer.Option(
            "--multiple-above",
            min=0,
            max=1,
            help="If several choices are allowed, predict all with at least this score. With --multi-label, the"
            " thresholds of the labels decide instead.",
        ),
    ] = 0.25,
    label_studio_url: Annotated[
        str | None,
        typer.Option("--label-studio-url", metavar="URL", help="Address of Label Studio; by default LABEL_STUDIO_URL."),
    ] = None,
    trust_host: Annotated[
        list[str] | None,
        typer.Option(
            "--trust-host",
            metavar="HOST[:PORT]",
            help="Allow images from this host although its address is not public, such as a storage on your network."
            " Repeatable.",
        ),
    ] = None,
) -> None:
    """Run a machine learning backend of Label Studio for projects with choices about an image.

    Images that Label Studio stores are fetched with the token in LABEL_STUDIO_API_KEY. BASIC_AUTH_USER and
    BASIC_AUTH_PASS set the login that clients must use; without them, the backend accepts only clients on this machine.
    """
    from app.cli.label_studio_server import run_label_studio  # noqa: PLC0415 - a web server

    run_label_studio(
        request,
        server=server,
        host=host,
        port=port,
        multiple_above=multiple_above,
        label_studio_url=label_studio_url,
        trust_host=trust_host or (),
    )
