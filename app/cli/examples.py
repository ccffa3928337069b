"""`deixis examples ...`: example images of label sets, and the methods that they select."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from app.cli.backends import Backend, read_image
from app.cli.common import (
    exit_status,
    make_table,
    out,
    progress_bar,
    read_subfolder_names,
    report_bad_folders,
    report_errors,
    warn,
    with_backend,
    write_json,
)
from app.cli.image_labels import find_images_of_file
from app.cli.options import ImageLabelsOption, ModelOption, ServerOption
from app.errors import InvalidFieldError
from app.images.discovery import OnUnreadable, find_images, find_labelled_images

if TYPE_CHECKING:
    from deixis.answers import ExampleCounts, Selection

examples_cli = typer.Typer(no_args_is_help=True)

_BATCH = 32

LabelSetArgument = Annotated[str, typer.Argument(help="Name of the label set.")]


@examples_cli.command("add")
def add_examples(
    label_set: LabelSetArgument,
    paths: Annotated[list[Path], typer.Argument(help="Image files, folders (searched recursively) and globs.")],
    classname: Annotated[
        list[str] | None, typer.Option("--class", "-c", help="The class of all images. Repeatable for several classes.")
    ] = None,
    by_subfolder: Annotated[  # noqa: FBT002 - a flag
        bool,
        typer.Option(
            "--by-subfolder", "-b", help="Add one folder, whose subfolders are named after the classes of their images."
        ),
    ] = False,
    name: Annotated[
        list[str] | None,
        typer.Option("--name", "-n", metavar="SUBFOLDER=CLASS", help="The class name of a subfolder. Repeatable."),
    ] = None,
    image_labels: ImageLabelsOption = None,
    server: ServerOption = None,
) -> None:
    """Add example images: of given classes, of the classes of their subfolders or of a file, or unlabelled.

    Features and hashes are stored, and an image that is stored already is not added again. Then all methods are
    compared on the examples, and the best one becomes the default of the label set.
    """
    with report_errors():
        bad_folders: list[OSError] = []
        if image_labels is None:
            images = _labelled(paths, classname or [], name or [], bad_folders.append, by_subfolder=by_subfolder)
        else:
            if classname or by_subfolder or name or len(paths) != 1:
                problem = "needs one folder, and excludes --class, --by-subfolder and --name"
                raise InvalidFieldError.of("--image-labels", problem)
            images = find_images_of_file(paths[0], image_labels, bad_folders.append)

    async def work(backend: Backend) -> _Upload:
        upload = _Upload(await backend.example_counts(label_set))
        with progress_bar("Adding") as on_progress:
            for first in range(0, len(images), _BATCH):
                batch = images[first : first + _BATCH]
                await upload.add(backend, label_set, batch)
                await on_progress(first + len(batch), len(images))
        if upload.added or upload.relabelled:
            with progress_bar("Comparing the methods") as on_progress:
                await backend.select_methods(label_set, upload.job, on_progress)
        return upload

    upload = with_backend(server, work, encoders=True)
    out.print(
        f"{upload.added} added, {upload.relabelled} relabelled, {upload.duplicates} duplicates,"
        f" {upload.skipped} skipped",
        highlight=False,
    )
    _print_counts(upload.counts)
    report_bad_folders(bad_folders)
    raise typer.Exit(exit_status(upload.skipped, len(images), folders=len(bad_folders)))


class _Upload:
    """The summed result of several batches."""

    def __init__(self, counts: "ExampleCounts") -> None:
        self.counts = counts
        self.added = self.relabelled = self.duplicates = self.skipped = 0
        self.job: str | None = None

    async def add(self, backend: Backend, label_set: str, batch: Sequence[tuple[Path, tuple[str, ...]]]) -> None:
        """Add a batch of images, and report those that cannot be added."""
        sent: list[tuple[Path, bytes, tuple[str, ...]]] = []
        for file, given in batch:
            content = await asyncio.to_thread(read_image, file, backend.max_image_bytes)
            if isinstance(content, bytes):
                sent.append((file, content, given))
            else:
                assert content.error is not None
                self._skip(file, content.error.detail)
        if not sent:
            return
        result = await backend.add_examples(
            label_set, [content for _, content, _ in sent], [given for _, _, given in sent]
        )
        for skipped in result.skipped:
            self._skip(sent[skipped.image][0], skipped.problem)
        self.added += result.added
        self.relabelled += result.relabelled
        self.duplicates += result.duplicates
        self.counts, self.job = result.counts, result.job or self.job

    def _skip(self, file: Path, problem: str) -> None:
        self.skipped += 1
        warn("skipped", f"{file}: {problem}")


def _labelled(
    paths: Sequence[Path], given: Sequence[str], names: Sequence[str], unreadable: OnUnreadable, *, by_subfolder: bool
) -> list[tuple[Path, tuple[str, ...]]]:
    if not by_subfolder:
        if names:
            raise InvalidFieldError.of("--name", "needs --by-subfolder")
        return [(file, tuple(given)) for file in find_images(paths, unreadable)]
    if given:
        raise InvalidFieldError.of("--class", "excludes --by-subfolder; pass one of them")
    if len(paths) != 1:
        raise InvalidFieldError.of("paths", f"--by-subfolder needs one folder, and there are {len(paths)} paths")
    images = find_labelled_images(paths[0], unreadable)
    class_of = read_subfolder_names(names, {subfolder for _, subfolder in images})
    return [(file, (class_of[subfolder],)) for file, subfolder in images]


@examples_cli.command("count")
def count_examples(label_set: LabelSetArgument, server: ServerOption = None) -> None:
    """Count the example images of a label set by class."""
    _print_counts(with_backend(server, lambda backend: backend.example_counts(label_set)))


def _print_counts(counts: "ExampleCounts") -> None:
    rows = [(name, str(number)) for name, number in sorted(counts.labelled.items())]
    rows.append(("(unlabelled)", str(counts.unlabelled)))
    out.print(make_table(("class", "images"), rows, right=("images",)))
    if counts.several_classes:
        problem = "have several classes and count for each; methods for which an image has one class do not use them"
        out.print(f"{counts.several_classes} of {counts.labelled_images} labelled images {problem}", highlight=False)
    if counts.without_features:
        warn(
            "warning:",
            f"{counts.without_features} images have no features of the default model, which cannot use them; add them"
            " again, or store the files of new images with DEIXIS_KEEP_IMAGES",
        )


@examples_cli.command("delete")
def delete_examples(
    label_set: LabelSetArgument,
    classname: Annotated[str | None, typer.Option("--class", "-c", help="Delete the images of this class.")] = None,
    unlabelled: Annotated[  # noqa: FBT002 - a flag
        bool, typer.Option("--unlabelled", "-u", help="Delete the unlabelled images.")
    ] = False,
    everything: Annotated[bool, typer.Option("--all", help="Delete all images.")] = False,  # noqa: FBT002 - a flag
    server: ServerOption = None,
) -> None:
    """Delete example images permanently, with the classifiers that were fitted on them."""
    with report_errors():
        if [classname is not None, unlabelled, everything].count(True) != 1:
            raise InvalidFieldError.of("--class", "pass exactly one of --class, --unlabelled and --all")
    deleted = with_backend(
        server,
        lambda backend: backend.delete_examples(
            label_set, classname=classname, unlabelled=unlabelled, everything=everything
        ),
    )
    out.print(f"{deleted.deleted} deleted", highlight=False)
    _print_counts(deleted.counts)


@examples_cli.command("selection")
def show_selection(
    label_set: LabelSetArgument,
    model: ModelOption = None,
    json_output: Annotated[  # noqa: FBT002 - a flag
        bool, typer.Option("--json", help="Print all fields as JSON.")
    ] = False,
    server: ServerOption = None,
) -> None:
    """Show the selected method of a label set, and the measures of all methods on held-out example images."""
    selection = with_backend(server, lambda backend: backend.selection(label_set, model), encoders=True)
    if json_output:
        write_json(selection.model_dump(mode="json"))
    else:
        _print_selection(selection)


def _print_selection(selection: "Selection") -> None:
    state = "" if selection.current else "   (the examples or classes have changed since)"
    out.print(f"[bold]{escape(selection.method)}[/bold]{state}", highlight=False)
    out.print(escape(selection.reason), highlight=False, soft_wrap=True)
    if selection.leaderboard:
        columns = ("method", "accuracy", "95 % interval", "to zero-shot", "p", "macro F1", "NLL", "ECE", "ms/image")
        rows = [
            (
                row.method,
                f"{row.accuracy:.4f}",
                f"{row.interval[0]:.3f} to {row.interval[1]:.3f}",
                "" if row.to_zero_shot is None else f"{100 * row.to_zero_shot['mean']:+.1f}",
                "" if row.to_zero_shot is None else f"{row.to_zero_shot['p']:.2g}",
                f"{row.macro_f1:.3f}",
                f"{row.calibrated_nll:.3f}",
                f"{row.calibrated_ece:.3f}",
                f"{row.ms_per_image:.3f}",
            )
            for row in selection.leaderboard
        ]
        out.print(make_table(columns, rows, right=columns[1:]))
    for method in selection.not_run:
        out.print(f"[yellow]not run:[/yellow] {escape(method)}", highlight=False, soft_wrap=True)
