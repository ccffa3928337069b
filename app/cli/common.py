"""What every command shares: where its work is done, how errors are told, and how things are read and written."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from app.api.schemas.classification import ResultBody
from app.classification.resolve import ClassifyRequest
from app.cli.backends import Backend, InProcess, over_http, read_image
from app.errors import ConfigurationError, DeixisError, InvalidFieldError, UnknownNameError
from app.main import load_encoders, open_service
from app.names.class_names import clean_classnames
from app.names.labels import split_labels
from app.observability.logs import configure_logs
from app.settings import load_settings

Result = TypeVar("Result")


class Engine(StrEnum):
    """What encodes: this process, or replicas on Ray."""

    PROCESS = "process"
    RAY = "ray"


EngineOption = Annotated[
    Engine,
    typer.Option(
        "--engine",
        help="Where images are encoded: in this process, or by replicas on Ray (DEIXIS_RAY_LAYOUT, RAY_ADDRESS).",
    ),
]

SOME_FAILED = 1
NOTHING_DONE = 2

# Images in one request of a command, and requests under way at once: one is decoded while another is encoded.
_CHUNK = 8
_IN_FLIGHT = 3

# Into a file or a pipe, long lines are better than folded cells.
out = Console(width=None if sys.stdout.isatty() else 240)
err = Console(stderr=True)

ServerOption = Annotated[
    str | None,
    typer.Option(
        "--server",
        metavar="URL",
        help="Ask a running server, with the key in DEIXIS_API_KEY if it wants one; else work in process.",
    ),
]
LabelsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--labels",
        "-l",
        help="Words to choose from: comma separated, a JSON array, or @FILE with one a line. Repeatable.",
    ),
]
LabelSetOption = Annotated[
    str | None, typer.Option("--label-set", "-s", help="A stored label set: NAME or NAME@VERSION.")
]
ModelOption = Annotated[str | None, typer.Option("--model", "-m", help="A model that is served; the first by default.")]
MethodOption = Annotated[
    str | None,
    typer.Option(
        "--method",
        help="The classifier; by default `auto` where the label set has example images, `cased` without labels, else"
        " zero-shot.",
    ),
]
OptionsOption = Annotated[
    list[str] | None,
    typer.Option("--option", "-o", metavar="NAME=NUMBER", help="An option of the method, as beta=0.7. Repeatable."),
]
DatabaseOption = Annotated[
    str | None, typer.Option("--database", "-d", help="Without labels: the caption database that names are found in.")
]
GroupOption = Annotated[
    bool, typer.Option("--group", "-g", help="Without labels: find few names that the images share.")
]
FalseRejectionRateOption = Annotated[
    float | None,
    typer.Option(
        "--false-rejection-rate",
        help="Or: as many as keeps the share of images wrongly rejected at most at this; needs labelled examples.",
    ),
]
CoverageOption = Annotated[
    float | None,
    typer.Option("--coverage", help="Also tell the labels that the true one is among this often; as above."),
]
TemplateOption = Annotated[
    str | None, typer.Option("--template", "-t", help="A template set, or one template with {} for the class name.")
]


@contextmanager
def told_plainly() -> Iterator[None]:
    """End the command with the error's own words; a stack trace is for our own bugs."""
    try:
        yield
    except DeixisError as error:
        err.print(f"[red]error:[/red] {escape(error.message)}", highlight=False, soft_wrap=True)
        raise typer.Exit(NOTHING_DONE) from error


@asynccontextmanager
async def _backend(server: str | None, *, encoders: bool) -> AsyncIterator[Backend]:
    """Open the server, or a service in this process."""
    if server is not None:
        # Not settings: they are about this service, and these for another.
        key, namespace = os.environ.get("DEIXIS_API_KEY"), os.environ.get("DEIXIS_NAMESPACE")
        async with over_http(server, key=key, namespace=namespace) as remote:
            yield remote
        return
    async with _in_process(encoders=encoders) as local:
        yield local


@asynccontextmanager
async def _in_process(*, encoders: bool) -> AsyncIterator[InProcess]:
    """Open a service in this process; models are loaded only if they will be used."""
    settings = load_settings()
    with err.status("Loading the model") if encoders else err.status("Opening the database"):
        # A measurement that there is, is used; a new one would take longer than most commands.
        loaded = load_encoders(settings.model_copy(update={"tuning_seconds": 0})) if encoders else []
    # Limits on requests protect a server from its callers; here there is one caller, who waits for as long as it takes.
    alone = settings.model_copy(
        update={"request_timeout_s": None, "max_queued_images": max(settings.max_queued_images, _CHUNK * _IN_FLIGHT)}
    )
    async with open_service(alone, loaded) as service:
        yield InProcess(service)


def with_backend(server: str | None, work: Callable[[Backend], Awaitable[Result]], *, encoders: bool = False) -> Result:
    """Do some work with a server or a service in this process, and end the command where it fails."""

    async def opened() -> Result:
        async with _backend(server, encoders=encoders) as backend:
            return await work(backend)

    return run(opened())


def with_service(work: Callable[[InProcess], Awaitable[Result]], engine: Engine = Engine.PROCESS) -> Result:
    """Do some work with a service in this process, its models loaded here or on Ray, as ``with_backend``."""

    async def opened() -> Result:
        async with _in_process(encoders=True) as local:
            return await work(local)

    return run(opened()) if engine is Engine.PROCESS else _with_encoders_on_ray(work)


def _with_encoders_on_ray(work: Callable[[InProcess], Awaitable[Result]]) -> Result:
    """Do some work with a service in this process whose models are encoder replicas on Ray."""
    with told_plainly():
        with needs_ray():
            from app.cluster.temporary_encoders import encoders_on_ray  # noqa: PLC0415 - an extra, whose import takes a second
        alone = load_settings().model_copy(update={"request_timeout_s": None})
        with encoders_on_ray(alone, cluster_address()) as (cards, steps):

            async def opened() -> Result:
                async with open_service(alone, cards, steps=steps) as service:
                    return await work(InProcess(service))

            return run(opened())


def cluster_address() -> str | None:
    """Return the address of the Ray cluster from Ray's own variable; None stands for a Ray on this machine."""
    return os.environ.get("RAY_ADDRESS") or None


@contextmanager
def needs_ray() -> Iterator[None]:
    """Tell which extra is missing where Ray cannot be imported."""
    try:
        yield
    except ImportError as error:
        raise ConfigurationError(
            f"the engine ray needs the extra ray ({error}); run: pip install 'deixis[server,ray]'"
        ) from error


def run(work: Coroutine[Any, Any, Result]) -> Result:
    """Run a command's work, and end the command where it fails."""
    configure_logs("console", "warning")
    with told_plainly():
        return asyncio.run(work)


def progress_bar() -> Progress:
    """Return a bar on standard error that goes when it is full."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
    )


def read_labels(given: Sequence[str] | None) -> list[str] | None:
    """Return the labels of every ``--labels``, files read; None if there was none."""
    if given is None:
        return None
    labels: list[str] = []
    for value in given:
        if value.startswith("@"):
            labels += read_lines(Path(value[1:]))
        else:
            labels += split_labels(value)
    return labels


def read_lines(file: Path) -> list[str]:
    """Return the lines of a text file that are not blank, trimmed."""
    try:
        text = file.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidFieldError.of(str(file), f"cannot be read: {error}") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def report_warnings(results: Sequence[ResultBody]) -> None:
    """Tell each warning once on standard error."""
    for warning in dict.fromkeys(warning for result in results for warning in result.warnings):
        err.print(f"[yellow]warning:[/yellow] {escape(warning)}", highlight=False, soft_wrap=True)


def read_options(pairs: Sequence[str] | None) -> dict[str, float]:
    """Return the method's options of every ``--option NAME=NUMBER``."""
    options = {}
    for pair in pairs or ():
        name, _, number = pair.partition("=")
        try:
            options[name.strip()] = float(number)
        except ValueError as error:
            raise InvalidFieldError.of("--option", f"'{pair}' is not of the form NAME=NUMBER") from error
    return options


def share_of(given: float | None, option: str) -> float | None:
    """Return a share that is neither none nor all."""
    if given is not None and not 0 < given < 1:
        raise InvalidFieldError.of(option, f"{given:g} is not between 0 and 1")
    return given


def read_subfolder_names(pairs: Sequence[str], subfolders: Iterable[str]) -> dict[str, str]:
    """Return what the class of each subfolder is called: as ``--name SUBFOLDER=CLASS`` says, else like it."""
    names = {subfolder: class_name(subfolder.replace("_", " ")) for subfolder in subfolders}
    for pair in pairs:
        subfolder, equals, classname = pair.partition("=")
        if not (equals and classname.strip()):
            raise InvalidFieldError.of("--name", f"'{pair}' is not of the form SUBFOLDER=CLASS")
        if subfolder not in names:
            raise UnknownNameError("subfolder", subfolder, names)
        names[subfolder] = class_name(classname)
    return names


def class_name(text: str) -> str:
    """Return a class name as answers will spell it, so that both can be compared."""
    return clean_classnames([text], max_classes=1, setting="", field="class")[0]


def report_bad_files(files: Sequence[Path], results: Sequence[ResultBody]) -> int:
    """Tell on standard error what could not be read and why, and return how many."""
    bad = [(file, result.error) for file, result in zip(files, results, strict=True) if result.error is not None]
    for file, problem in bad:
        err.print(
            f"[yellow]skipped[/yellow] {escape(str(file))}: {escape(problem.detail)}", highlight=False, soft_wrap=True
        )
    return len(bad)


async def prepare_names(backend: Backend, question: ClassifyRequest) -> None:
    """Where names are to be found, see to it that there is something to find them in; refuse nonsense before that."""
    if question.labels is not None or question.label_set is not None:
        return
    with captions_bar() as advance:
        await backend.prepare_names(question, advance)


@contextmanager
def captions_bar() -> Iterator[Callable[[int, int], Awaitable[None]]]:
    """Yield what is told how many captions are encoded, and shows that on standard error once it is told something."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} captions, {task.fields[rate]}"),
        TimeRemainingColumn(),
        console=err,
        transient=True,
    ) as bar:
        line: TaskID | None = None

        async def advance(done: int, total: int) -> None:
            nonlocal line
            if line is None:
                line = bar.add_task("Encoding", total=total or None, rate="")
                bar.update(line, completed=done)  # by an earlier run, and no part of the rate
            speed = bar.tasks[line].speed
            bar.update(line, completed=done, total=total or None, rate=f"{speed:,.0f}/s" if speed else "")
            if total and done >= total:
                bar.update(line, description="Making the index")

        yield advance


async def classify_files(
    backend: Backend, files: Sequence[Path], question: ClassifyRequest
) -> AsyncIterator[tuple[Path, ResultBody]]:
    """Yield each file's result in order, a few requests being under way at once, behind a progress bar."""
    chunks = [files[start : start + _CHUNK] for start in range(0, len(files), _CHUNK)]
    with progress_bar() as bar:
        line = bar.add_task("Classifying", total=len(files))
        running: list[asyncio.Task[list[ResultBody]]] = []
        try:
            for number, chunk in enumerate(chunks):
                while len(running) < min(number + _IN_FLIGHT, len(chunks)):
                    running.append(asyncio.create_task(_classify_chunk(backend, chunks[len(running)], question)))
                for file, result in zip(chunk, await running[number], strict=True):
                    bar.advance(line)
                    yield file, result
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)


async def _classify_chunk(backend: Backend, files: Sequence[Path], question: ClassifyRequest) -> list[ResultBody]:
    images = [await asyncio.to_thread(read_image, file) for file in files]
    readable = [image for image in images if isinstance(image, bytes)]
    answers = iter(await backend.classify(readable, question) if readable else [])
    return [next(answers) if isinstance(image, bytes) else image for image in images]


def table_of(columns: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[str] = ()) -> Table:
    """Return a table without lines; the columns named in ``right`` are aligned there."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(escape(column), justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    return table


def write_json(value: object) -> None:
    """Write to standard output."""
    json.dump(value, sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")


def write_file(file: Path, value: object) -> None:
    """Write JSON to a file."""
    with told_plainly():
        try:
            file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
        except OSError as error:
            raise InvalidFieldError.of(str(file), f"cannot be written: {error.strerror}") from error
