"""`deixis evaluate`: measure accuracy on labelled images."""

from pathlib import Path
from typing import Annotated

import typer

from app.classification.request import ClassifyRequest
from app.cli.options import ImageLabelsOption, ServerOption, takes_request


@takes_request("labels", "label_set", "model", "template", "option", "database", "group")
def evaluate_command(
    folder: Annotated[
        Path,
        typer.Argument(help="A folder with one subfolder per class, named after the class; or see `--image-labels`."),
    ],
    request: ClassifyRequest,
    name: Annotated[
        list[str] | None,
        typer.Option("--name", "-n", metavar="SUBFOLDER=CLASS", help="The class name of a subfolder. Repeatable."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            help="The method, by default zero-shot; `all` compares all methods, `cased` discovers labels.",
        ),
    ] = None,
    support: Annotated[
        Path | None,
        typer.Option(
            "--support",
            help="With `--method all`: a folder of labelled images, one subfolder per class; measures accuracy against"
            " the number of images that methods are fitted on.",
        ),
    ] = None,
    pool: Annotated[
        Path | None,
        typer.Option("--pool", help="With `--method all`: a folder of unlabelled images that methods are fitted on."),
    ] = None,
    shots: Annotated[
        str, typer.Option("--shots", help="Labelled images per class in a draw, comma separated.")
    ] = "1,2,4,8,16",
    draws: Annotated[int, typer.Option("--draws", min=1, max=1000, help="Random draws for each number of images.")] = 5,
    picture: Annotated[
        Path | None,
        typer.Option(
            "--picture", metavar="FILE", help="Also write a chart of the curve: .svg, .png or .pdf; needs matplotlib."
        ),
    ] = None,
    image_labels: ImageLabelsOption = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Also write the report as JSON; - for standard output."),
    ] = None,
    server: ServerOption = None,
) -> None:
    """Measure accuracy on a folder with one subfolder per class.

    The classes are the names of the subfolders, with underscores as spaces; `--name` changes a name. With `--labels` or
    `--label-set`, the classes are those, and each subfolder must be named after one of them.

    `--method all` runs all methods on the same images and reports whether descriptions help: it compares each method
    with zero-shot and with the same number of random words. With `--support` or `--pool`, methods are also fitted on
    those images, and the report has the accuracy for each number of labelled images per class.

    With `--image-labels`, images may have several labels, and the report has the average precision of their scores, and
    F1 at the default thresholds and at thresholds that are fitted to the other images. COCO annotations are read too.

    `--method cased` discovers labels without the classes, and compares them with the classes.
    """
    from app.cli.evaluation import run_evaluation  # noqa: PLC0415 - imports numpy

    run_evaluation(
        folder,
        request,
        names=name or (),
        method=method,
        support=support,
        pool=pool,
        shots=shots,
        draws=draws,
        picture=picture,
        image_labels=image_labels,
        json_file=json_file,
        server=server,
    )
