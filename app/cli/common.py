"""Code that all commands share: opening a backend, reporting errors and progress, reading and writing files."""

import asyncio
import json
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, contextmanager, nullcontext
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from app.classification.request import ClassifyRequest
from app.cli.backends import Backend, OnProgress, read_image
from app.errors import ConfigurationError, DeixisError, InvalidFieldError, UnknownNameError
from app.names.class_names import clean_classnames
from app.runtime.file_names import printable
from app.runtime.garbage import collections_paused
from deixis import ClientError as RemoteError
from deixis import ProblemError
from deixis.extras import needs_extra

if TYPE_CHECKING:
    from app.cli.backends.in_process import InProcessBackend
    from deixis import ImageResult

Result = TypeVar("Result")


class Engine(StrEnum):
    """Where images are encoded: in this process, or by replicas on Ray."""

    PROCESS = "process"
    RAY = "ray"


SOME_FAILED = 1
NOTHING_DONE = 2

# Images per request of a command, and simultaneous requests: one batch is decoded while another is encoded.
_BATCH = 8
_CONCURRENCY = 3
# Of a warning that does not concern all files.
_SHOWN_FILES = 3
MAX_IMAGES_AT_ONCE = _BATCH * _CONCURRENCY

SILENT_S = 5.0
"""Seconds after which a command says what it does, where standard error is no terminal."""

_LINE_INTERVAL_S = 30.0

# In a file or a pipe, no line is wrapped, whatever the width of a terminal.
out = Console(width=None if sys.stdout.isatty() else 100_000)
err = Console(stderr=True)


@contextmanager
def report_errors() -> Iterator[None]:
    """Print expected errors in one line and exit with status 2; other errors are bugs and keep their traceback."""
    try:
        yield
    except (DeixisError, RemoteError) as error:
        _print_error(message_of(error))
        raise typer.Exit(NOTHING_DONE) from error
    except UnicodeEncodeError as error:
        if error.reason != "surrogates not allowed":
            raise
        _print_error(f"'{error.object[:200]}' is not text in UTF-8; only paths may contain other bytes")
        raise typer.Exit(NOTHING_DONE) from error


def _print_error(message: str) -> None:
    err.print(f"[red]error:[/red] {escape(printable(message))}", highlight=False, soft_wrap=True)


def message_of(error: DeixisError | RemoteError) -> str:
    """Return the message of an error; for a refusal of a server, without the title of the problem."""
    if isinstance(error, ProblemError):
        return error.problem.detail
    return str(error)


def note(text: str) -> None:
    """Print what a command does on standard error."""
    err.print(escape(printable(text)), highlight=False, soft_wrap=True)


def warn(label: str, text: str) -> None:
    """Print a warning on standard error, after a label such as ``skipped``."""
    err.print(f"[yellow]{label}[/yellow] {escape(printable(text))}", highlight=False, soft_wrap=True)


@contextmanager
def announced(text: str) -> Iterator[None]:
    """Print in a line on standard error what takes longer than 5 s; not on a terminal, which shows it in motion."""
    timer = threading.Timer(SILENT_S, note, [f"{text} ..."])
    timer.daemon = True
    if not err.is_terminal:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def status(text: str) -> Iterator[None]:
    """Show what takes long: beside a spinner on a terminal, and elsewhere in a line once it has taken 5 s."""
    # Without a terminal, a spinner would print an empty line.
    with announced(text), err.status(text) if err.is_terminal else nullcontext():
        yield


def loading_models(image_backend: str) -> AbstractContextManager[None]:
    """Show that models are loaded with a value of ``DEIXIS_IMAGE_BACKEND``."""
    if image_backend == "torch-compile":
        return status("Loading the model, and compiling its image tower with torch, which takes minutes")
    return status("Loading the model")


def line_printer() -> Callable[[str], None]:
    """Return a function that prints progress on standard error every half minute; not on a terminal."""
    printed_at = time.monotonic()

    def print_line(text: str) -> None:
        nonlocal printed_at
        if not err.is_terminal and time.monotonic() - printed_at >= _LINE_INTERVAL_S:
            printed_at = time.monotonic()
            note(text)

    return print_line


def _open_backend(server: str | None, *, encoders: bool, search: bool) -> AbstractAsyncContextManager[Backend]:
    """Connect to a server, or open a service in this process; import only what that needs."""
    if server is None:
        from app.cli.server import find_server  # noqa: PLC0415 - the settings, which the help of commands does not need

        server = find_server(search=search)
    if server is not None:
        from app.cli.backends.over_http import open_http_backend  # noqa: PLC0415

        return open_http_backend(server)
    with collections_paused():
        from app.cli.backends.in_process import open_in_process  # noqa: PLC0415

    return open_in_process(encoders=encoders)


def with_backend(
    server: str | None,
    work: Callable[[Backend], Awaitable[Result]],
    *,
    encoders: bool = False,
    search: bool = True,
) -> Result:
    """Run ``work`` with a server, or with a service in this process, and exit if it fails.

    Args:
        server: the option ``--server``.
        work: what to do.
        encoders: whether a service in this process loads its models.
        search: whether a server that answers on this machine is used if none is named; not for work that a server may
            refuse and this process does not.
    """
    with report_errors():
        opening = _open_backend(server, encoders=encoders, search=search)

    async def opened() -> Result:
        async with opening as backend:
            return await work(backend)

    return run(opened())


def with_service(work: "Callable[[InProcessBackend], Awaitable[Result]]", engine: Engine = Engine.PROCESS) -> Result:
    """Run ``work`` with a service in this process, whose models run here or on Ray, and exit if it fails."""
    with collections_paused():
        from app.cli.backends.in_process import open_in_process, with_encoders_on_ray  # noqa: PLC0415

    async def opened() -> Result:
        async with open_in_process(encoders=True) as local:
            return await work(local)

    return run(opened()) if engine is Engine.PROCESS else with_encoders_on_ray(work)


@contextmanager
def needs_ray() -> Iterator[None]:
    """Raise a ``ConfigurationError`` that names the missing extra if Ray cannot be imported."""
    try:
        yield
    except ImportError as error:
        raise ConfigurationError(needs_extra("the engine ray", "ray")) from error


def cluster_address() -> str | None:
    """Return the address of the Ray cluster from Ray's own variable; None stands for a Ray on this machine."""
    return os.environ.get("RAY_ADDRESS") or None


def run(work: Coroutine[Any, Any, Result]) -> Result:
    """Run the work of a command in an event loop, and exit if it fails."""
    with report_errors():
        return asyncio.run(work)


@contextmanager
def progress_bar(description: str) -> Iterator[OnProgress]:
    """Show progress on standard error, as a bar or in lines, and yield the function that moves it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with announced(description), Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        line = bar.add_task(description, total=None)
        print_line = line_printer()

        async def on_progress(done: int, total: int) -> None:
            bar.update(line, completed=done, total=total or None)
            print_line(f"{description}: {done:,}" + (f" of {total:,}" if total else ""))

        yield on_progress


@contextmanager
def captions_bar() -> Iterator[OnProgress]:
    """Show the progress of a caption database that is built; the bar appears at the first step."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} captions, {task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with (
        announced("Preparing the caption database"),
        Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar,
    ):
        line: TaskID | None = None
        print_line = line_printer()

        async def on_progress(done: int, total: int) -> None:
            nonlocal line
            if line is None:
                line = bar.add_task("Encoding", total=total or None, rate="")
                bar.update(line, completed=done)  # encoded by an earlier run, and not part of the rate
            speed = bar.tasks[line].speed
            bar.update(line, completed=done, total=total or None, rate=f"{speed:,.0f}/s" if speed else "")
            print_line(f"Encoding: {done:,}" + (f" of {total:,} captions" if total else " captions"))
            if total and done >= total:
                bar.update(line, description="Building the index")

        yield on_progress


async def prepare_database(backend: Backend, request: ClassifyRequest) -> None:
    """If labels are to be discovered, validate the request and build the default caption database if it is missing."""
    if request.labels is not None or request.label_set is not None:
        return
    with captions_bar() as on_progress:
        await backend.prepare_database(request, on_progress)


async def classify_files(
    backend: Backend, files: Sequence[Path], request: ClassifyRequest
) -> "AsyncIterator[tuple[Path, ImageResult]]":
    """Classify files in several simultaneous batches, and yield the results in order behind a progress bar."""
    batches = [files[start : start + _BATCH] for start in range(0, len(files), _BATCH)]
    done = 0
    with progress_bar("Classifying") as on_progress:
        running: list[asyncio.Task[list[ImageResult]]] = []
        try:
            for number, batch in enumerate(batches):
                while len(running) < min(number + _CONCURRENCY, len(batches)):
                    running.append(asyncio.create_task(_classify_batch(backend, batches[len(running)], request)))
                for file, result in zip(batch, await running[number], strict=True):
                    done += 1
                    await on_progress(done, len(files))
                    yield file, result
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)


async def _classify_batch(backend: Backend, files: Sequence[Path], request: ClassifyRequest) -> "list[ImageResult]":
    contents = [await asyncio.to_thread(read_image, file, backend.max_image_bytes) for file in files]
    readable = [content for content in contents if isinstance(content, bytes)]
    results = iter(await backend.classify(readable, request) if readable else [])
    return [next(results) if isinstance(content, bytes) else content for content in contents]


def report_warnings(files: Sequence[Path], results: "Sequence[ImageResult]") -> None:
    """Print each warning of the results once on standard error, with the files if it is not of all of them."""
    concerned: dict[str, list[Path]] = {}
    classified = 0
    for file, result in zip(files, results, strict=True):
        classified += result.error is None
        for warning in result.warnings:
            concerned.setdefault(warning, []).append(file)
    for warning, some in concerned.items():
        more = f" and {len(some) - _SHOWN_FILES} more" if len(some) > _SHOWN_FILES else ""
        of_files = ", ".join(str(file) for file in some[:_SHOWN_FILES]) + f"{more}: "
        warn("warning:", warning if len(some) >= classified else of_files + warning)


def report_bad_files(files: Sequence[Path], results: "Sequence[ImageResult]") -> int:
    """Print the files that could not be read with their errors on standard error, and return their number."""
    bad = [(file, result.error) for file, result in zip(files, results, strict=True) if result.error is not None]
    for file, problem in bad:
        warn("skipped", f"{file}: {problem.detail}")
    return len(bad)


def report_bad_folders(errors: Iterable[OSError]) -> None:
    """Print the folders that could not be searched on standard error."""
    for error in errors:
        warn("skipped", f"{error.filename}: the folder cannot be read: {error.strerror}")


def exit_status(bad: int, total: int, *, folders: int = 0) -> int:
    """Return the exit status of a command that has skipped ``bad`` of the files, and folders that it could not read."""
    return NOTHING_DONE if bad and bad == total else SOME_FAILED if bad or folders else 0


def read_subfolder_names(pairs: Sequence[str], subfolders: Iterable[str]) -> dict[str, str]:
    """Return the class name of each subfolder: that of ``--name SUBFOLDER=CLASS``, else the name of the subfolder."""
    names = {subfolder: clean_classname(subfolder.replace("_", " ")) for subfolder in subfolders}
    for pair in pairs:
        subfolder, equals, classname = pair.partition("=")
        if not (equals and classname.strip()):
            raise InvalidFieldError.of("--name", f"'{pair}' is not of the form SUBFOLDER=CLASS")
        if subfolder not in names:
            raise UnknownNameError("subfolder", subfolder, names)
        names[subfolder] = clean_classname(classname)
    return names


def clean_classname(text: str) -> str:
    """Return a class name in the spelling of results, so that the two can be compared."""
    return clean_classnames([text], max_classes=1, setting="", field="class")[0]


def read_lines(file: Path) -> list[str]:
    """Return the stripped lines of a text file, without blank ones."""
    try:
        text = file.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidFieldError.of(str(file), f"cannot be read: {error}") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def make_table(columns: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[str] = ()) -> Table:
    """Return a table without lines; the columns in ``right`` are right-aligned."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(escape(column), justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(printable(cell)) for cell in row))
    return table


def write_json(value: object) -> None:
    """Write JSON to standard output."""
    is_unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    json.dump(value, sys.stdout, indent=2, ensure_ascii=not is_unicode)
    sys.stdout.write("\n")


def write_file(file: Path, value: object) -> None:
    """Write JSON to a file."""
    with report_errors():
        try:
            file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
        except OSError as error:
            raise InvalidFieldError.of(str(file), f"cannot be written: {error.strerror}") from error
