"""`deixis bulk`: classify the images of folders and archives, and write Parquet."""

from pathlib import Path
from typing import Annotated

import typer

from app.bulk.request import PART_IMAGES, BulkRequest
from app.bulk.sources import ParquetColumns
from app.classification.request import ClassifyRequest
from app.cli.common import Engine, report_errors
from app.cli.options import takes_request
from app.errors import InvalidFieldError


@takes_request(
    *("labels", "label_set", "model", "method", "template", "database", "option", "priors", "reject_below"),
    *("false_rejection_rate", "reject", "coverage", "multi_label", "min_score", "top_k"),
    top_k=5,
)
def bulk_command(
    sources: Annotated[
        list[Path],
        typer.Argument(
            help="Folders (searched recursively), .tar, .tar.gz, .tgz, .tar.zst and .parquet files, image files, and"
            " patterns."
        ),
    ],
    to: Annotated[
        Path, typer.Option("--out", help="A folder for the parts, or a file NAME.parquet for all rows in one file.")
    ],
    request: ClassifyRequest,
    no_labels: Annotated[  # noqa: FBT002 - a flag
        bool, typer.Option("--no-labels", help="Discover the labels of each image in a caption database.")
    ] = False,
    column: Annotated[
        str | None,
        typer.Option(
            "--column", help="Parquet: the column of the images, as bytes or paths. By default selected by its name."
        ),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            "--key", help="Parquet: the column of the names of the images. By default the path or the row number."
        ),
    ] = None,
    part_images: Annotated[
        int,
        typer.Option(
            "--part-images", min=1, help="Maximum number of rows in a part. An interruption loses at most one part."
        ),
    ] = PART_IMAGES,
    retry_bad: Annotated[  # noqa: FBT002 - a flag
        bool,
        typer.Option("--retry-bad", help="Classify the images whose row has an error again."),
    ] = False,
    engine: Annotated[
        Engine, typer.Option("--engine", help="Classify in this process, or in several on Ray (the extra `ray`).")
    ] = Engine.PROCESS,
    ray_address: Annotated[
        str | None,
        typer.Option(
            "--ray-address",
            help="Address of the Ray cluster, by default RAY_ADDRESS; without either, a Ray is started for this run.",
        ),
    ] = None,
    replicas: Annotated[
        str, typer.Option("--replicas", metavar="N|MIN-MAX", help="Ray: number of processes, each with a model.")
    ] = "1",
    replica_cpus: Annotated[float, typer.Option("--replica-cpus", help="Ray: cores reserved for each process.")] = 2,
    replica_gpus: Annotated[float, typer.Option("--replica-gpus", help="Ray: GPUs reserved for each process.")] = 0,
) -> None:
    """Classify images in folders, tar files and Parquet files, and write the labels to Parquet.

    To resume an interrupted run, repeat the command; images that are classified are not classified again. Images that
    cannot be read have the reason in the column `error`. Exit status: 0 if all images were classified, 1 if some were
    not, 2 if none were or the command failed.
    """
    with report_errors():
        if sum((request.labels is not None, request.label_set is not None, no_labels)) != 1:
            raise InvalidFieldError.of("--labels", "pass exactly one of --labels, --label-set and --no-labels")
    from app.cli.bulk_run import run_bulk_command  # noqa: PLC0415 - the whole service

    run_bulk_command(
        request,
        BulkRequest(sources, to, ParquetColumns(column, key), part_images, retry_bad),
        engine=engine,
        ray_address=ray_address,
        replicas=replicas,
        replica_cpus=replica_cpus,
        replica_gpus=replica_gpus,
    )
