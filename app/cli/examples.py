"""`deixis examples ...`: images that teach a label set, and what they are evidence for."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from app.api.schemas.examples import ExampleCountsBody
from app.api.schemas.selection import SelectionResponse
from app.cli.backends import Backend, read_image
from app.cli.common import (
    NOTHING_DONE,
    SOME_FAILED,
    ModelOption,
    ServerOption,
    err,
    out,
    progress_bar,
    read_subfolder_names,
    table_of,
    told_plainly,
    with_backend,
    write_json,
)
from app.errors import InvalidFieldError
from app.images.discovery import find_images, find_labelled_images

examples_cli = typer.Typer(help="Example images that teach a label set, with or without labels.", no_args_is_help=True)

_ADDED_AT_ONCE = 32

LabelSetArgument = Annotated[str, typer.Argument(help="Its name.")]


@examples_cli.command("add")
def add_examples(
    label_set: LabelSetArgument,
    paths: Annotated[list[Path], typer.Argument(help="Image files, folders (searched whole) and globs.")],
    classname: Annotated[str | None, typer.Option("--class", "-c", help="The class of all of them.")] = None,
    by_subfolder: Annotated[  # noqa: FBT002 - a flag
        bool,
        typer.Option("--by-subfolder", "-b", help="One folder, each subfolder called like the class of its images."),
    ] = False,
    name: Annotated[
        list[str] | None,
        typer.Option("--name", "-n", metavar="SUBFOLDER=CLASS", help="What a subfolder's class is called. Repeatable."),
    ] = None,
    server: ServerOption = None,
) -> None:
    """Add example images: of one class, of the classes that their subfolders name, or else unlabelled.

    What is kept are features and hashes; an image that is there already is not added again. Then every method is tried
    on the examples, and the best one is used from now on if it is better than zero-shot beyond chance.
    """
    with told_plainly():
        images = _labelled(paths, classname, name or [], by_subfolder=by_subfolder)

    async def work(backend: Backend) -> _Tally:
        tally = _Tally(await backend.example_counts(label_set))
        with progress_bar() as bar:
            line = bar.add_task("Adding", total=len(images))
            for first in range(0, len(images), _ADDED_AT_ONCE):
                some = images[first : first + _ADDED_AT_ONCE]
                await tally.add(backend, label_set, some)
                bar.advance(line, len(some))
            if tally.added or tally.relabelled:
                line = bar.add_task("Trying the methods", total=None)

                async def advance(done: int, total: int) -> None:
                    bar.update(line, completed=done, total=total or None)

                await backend.try_methods(label_set, tally.job, advance)
        return tally

    tally = with_backend(server, work, encoders=True)
    out.print(
        f"{tally.added} added, {tally.relabelled} relabelled, {tally.duplicates} there already,"
        f" {tally.skipped} skipped",
        highlight=False,
    )
    _print_counts(tally.counts)
    if tally.skipped:
        raise typer.Exit(NOTHING_DONE if tally.skipped == len(images) else SOME_FAILED)


class _Tally:
    """What became of the images so far."""

    def __init__(self, counts: ExampleCountsBody) -> None:
        self.counts = counts
        self.added = self.relabelled = self.duplicates = self.skipped = 0
        self.job: str | None = None

    async def add(self, backend: Backend, label_set: str, some: Sequence[tuple[Path, str | None]]) -> None:
        """Add some images, and tell which cannot be."""
        read = [await asyncio.to_thread(read_image, file) for file, _ in some]
        there = [index for index, each in enumerate(read) if isinstance(each, bytes)]
        for (file, _), each in zip(some, read, strict=True):
            if not isinstance(each, bytes):
                assert each.error is not None
                self._skip(file, each.error.detail)
        if not there:
            return
        told = await backend.add_examples(
            label_set, [each for each in read if isinstance(each, bytes)], [some[index][1] for index in there]
        )
        for skipped in told.skipped:
            self._skip(some[there[skipped.image]][0], skipped.problem)
        self.added += told.added
        self.relabelled += told.relabelled
        self.duplicates += told.duplicates
        self.counts, self.job = told.counts, told.job or self.job

    def _skip(self, file: Path, problem: str) -> None:
        self.skipped += 1
        err.print(f"[yellow]skipped[/yellow] {escape(str(file))}: {escape(problem)}", highlight=False, soft_wrap=True)


def _labelled(
    paths: Sequence[Path], classname: str | None, names: Sequence[str], *, by_subfolder: bool
) -> list[tuple[Path, str | None]]:
    if not by_subfolder:
        if names:
            raise InvalidFieldError.of("--name", "goes with --by-subfolder")
        return [(file, classname) for file in find_images(paths)]
    if classname is not None:
        raise InvalidFieldError.of("--class", "give either --class or --by-subfolder, not both")
    if len(paths) != 1:
        raise InvalidFieldError.of("paths", f"--by-subfolder takes one folder, and {len(paths)} paths are given")
    found = find_labelled_images(paths[0])
    renamed = read_subfolder_names(names, {subfolder for _, subfolder in found})
    return [(file, renamed[subfolder]) for file, subfolder in found]


@examples_cli.command("count")
def count_examples(label_set: LabelSetArgument, server: ServerOption = None) -> None:
    """Count the example images of a label set by class."""
    _print_counts(with_backend(server, lambda backend: backend.example_counts(label_set)))


def _print_counts(counts: ExampleCountsBody) -> None:
    rows = [(name, str(number)) for name, number in sorted(counts.labelled.items())]
    rows.append(("(unlabelled)", str(counts.unlabelled)))
    out.print(table_of(("class", "images"), rows, right=("images",)))
    if counts.without_features:
        err.print(
            f"[yellow]warning:[/yellow] {counts.without_features} have no features of the default model, and are of no"
            " use to it; add them again, or keep files with DEIXIS_KEEP_IMAGES",
            highlight=False,
            soft_wrap=True,
        )


@examples_cli.command("delete")
def delete_examples(
    label_set: LabelSetArgument,
    classname: Annotated[str | None, typer.Option("--class", "-c", help="All of this class.")] = None,
    unlabelled: Annotated[  # noqa: FBT002 - a flag
        bool, typer.Option("--unlabelled", "-u", help="All without a class.")
    ] = False,
    everything: Annotated[bool, typer.Option("--all", help="All there are.")] = False,  # noqa: FBT002 - a flag
    server: ServerOption = None,
) -> None:
    """Delete example images for good, with what was learned from them."""
    with told_plainly():
        if [classname is not None, unlabelled, everything].count(True) != 1:
            raise InvalidFieldError.of("--class", "give one of --class, --unlabelled and --all")
    told = with_backend(
        server,
        lambda backend: backend.delete_examples(
            label_set, classname=classname, unlabelled=unlabelled, everything=everything
        ),
    )
    out.print(f"{told.deleted} deleted", highlight=False)
    _print_counts(told.counts)


@examples_cli.command("selection")
def show_selection(
    label_set: LabelSetArgument,
    model: ModelOption = None,
    json_output: Annotated[  # noqa: FBT002 - a flag
        bool, typer.Option("--json", help="Everything that is known, as JSON.")
    ] = False,
    server: ServerOption = None,
) -> None:
    """Show which method the example images are evidence for, and how each did on those that it had not seen."""
    told = with_backend(server, lambda backend: backend.selection(label_set, model), encoders=True)
    if json_output:
        write_json(told.model_dump(mode="json"))
    else:
        _print_selection(told)


def _print_selection(told: SelectionResponse) -> None:
    state = "" if told.current else "   (examples or classes have changed since)"
    out.print(f"[bold]{escape(told.method)}[/bold]{state}", highlight=False)
    out.print(escape(told.reason), highlight=False, soft_wrap=True)
    if told.leaderboard:
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
            for row in told.leaderboard
        ]
        out.print(table_of(columns, rows, right=columns[1:]))
    for method in told.not_run:
        out.print(f"[yellow]not run:[/yellow] {escape(method)}", highlight=False, soft_wrap=True)
