"""`deixis ...`: serve, and the same pipeline without HTTP, or with `--server` through it."""

import asyncio
import csv
import inspect
import json
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from enum import StrEnum
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import numpy as np
import typer
import uvicorn
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from app import __version__
from app.api.schemas import DecisionBody, DescribeBody, GenerateBody, LabelSetBody, ResultBody
from app.backends import Backend, InProcess, over_http, read_image
from app.comparison import Comparison
from app.describer import Questions
from app.describing.questions import load_question_sets
from app.encoders._base import Encoder, LoadOptions
from app.encoders.catalogue import ModelCard, load_catalogue
from app.encoders.loading import load_encoder
from app.errors import ConfigurationError, DeixisError, InvalidFieldError, UnknownNameError
from app.evaluation import Difference, Evaluation, evaluate
from app.files import find_images, find_labelled_images
from app.logs import configure_logs
from app.main import create_app, load_encoders, load_options, open_service
from app.naming import clean_classnames
from app.resources import resources
from app.service import Question, split_labels
from app.settings import Settings, load_settings
from app.store.database import migrate, open_engine
from app.store.drafts import DraftStatus

Result = TypeVar("Result")

SOME_FAILED = 1
NOTHING_DONE = 2

# Images in one request of a command, and requests under way at once: one is decoded while another is encoded.
_CHUNK = 8
_IN_FLIGHT = 3
_MAX_CONFUSION_CLASSES = 20
ALL_METHODS = "all"
_SHOWN_PROMPTS = 5
_BAR_WIDTH = 16

cli = typer.Typer(
    name="deixis",
    help="Zero-shot image classification: images and your own words in, the word that fits out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
label_sets_cli = typer.Typer(help="Lists of class names that are kept under a name.", no_args_is_help=True)
models_cli = typer.Typer(help="Models that are known to be good, and their weights.", no_args_is_help=True)
drafts_cli = typer.Typer(help="What a language model wrote about classes, to be reviewed.", no_args_is_help=True)
cli.add_typer(label_sets_cli, name="label-sets")
cli.add_typer(drafts_cli, name="drafts")
cli.add_typer(models_cli, name="models")

# Into a file or a pipe, long lines are better than folded cells.
out = Console(width=None if sys.stdout.isatty() else 240)
err = Console(stderr=True)

ServerOption = Annotated[
    str | None,
    typer.Option("--server", metavar="URL", help="Ask a running server; else work in process."),
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
MethodOption = Annotated[str | None, typer.Option("--method", help="The classifier; zero-shot by default.")]
OptionsOption = Annotated[
    list[str] | None,
    typer.Option("--option", "-o", metavar="NAME=NUMBER", help="An option of the method, as beta=0.7. Repeatable."),
]
TemplateOption = Annotated[
    str | None, typer.Option("--template", "-t", help="A template set, or one template with {} for the class name.")
]


class Format(StrEnum):
    """How results are written to standard output."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"


@contextmanager
def _told_plainly() -> Iterator[None]:
    """End the command with the error's own words; a stack trace is for our own bugs."""
    try:
        yield
    except DeixisError as error:
        err.print(f"[red]error:[/red] {escape(error.message)}", highlight=False, soft_wrap=True)
        raise typer.Exit(NOTHING_DONE) from error


@asynccontextmanager
async def _backend(server: str | None, *, encoders: bool) -> AsyncIterator[Backend]:
    """Open the server, or a service in this process; models are loaded only if they will be used."""
    if server is not None:
        async with over_http(server) as remote:
            yield remote
        return
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


def _run(server: str | None, work: Callable[[Backend], Awaitable[Result]], *, encoders: bool = False) -> Result:
    async def opened() -> Result:
        async with _backend(server, encoders=encoders) as backend:
            return await work(backend)

    configure_logs("console", "warning")
    with _told_plainly():
        return asyncio.run(opened())


def _version(wanted: bool) -> None:  # noqa: FBT001 - the signature that typer calls
    if wanted:
        out.print(f"deixis {__version__}", highlight=False)
        raise typer.Exit


@cli.callback()
def _main(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Hold the options that stand before a command; each acts in its own callback."""
    del version


# --- serve ---------------------------------------------------------------------------------------------------------


class _AnnouncedServer(uvicorn.Server):
    """Tells where it listens, and a line to try, once it does."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.started:
            return
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{'127.0.0.1' if shown in {'0.0.0.0', '[::]'} else shown}:{port}"  # noqa: S104 - compared only
        print(  # noqa: T201 - the one thing that serve says on standard output
            f"\nDeixis {__version__} listens on {address}   (documentation: {address}/docs)\n"
            f"Try:  curl -F image=@photo.jpg -F labels='cat, dog, coffee cup' {address}/classify\n",
            flush=True,
        )


def serve(**flags: Any) -> None:
    """Start the HTTP service. Every flag is also an environment variable: --data-dir is DEIXIS_DATA_DIR."""
    with _told_plainly():
        settings = load_settings(**flags)
        configure_logs(settings.log_format, settings.log_level)
        # All that can fail comes first, so that it ends the command with one line; the port costs the least.
        listeners = _bind(settings)
        encoders = load_encoders(settings)
        asyncio.run(_migrate(settings))
    server = _AnnouncedServer(
        uvicorn.Config(
            create_app(settings, lambda _: encoders),
            host=settings.host,
            port=settings.port,
            log_config=None,
            access_log=False,
            lifespan="on",
            timeout_keep_alive=settings.keep_alive_s,
            timeout_graceful_shutdown=settings.shutdown_timeout_s,
            server_header=False,
        )
    )
    with _told_plainly(), ExitStack() as closing:
        for listener in listeners:
            closing.enter_context(listener)
        try:
            server.run(sockets=listeners)
        except OSError as error:  # another process took the port between binding and listening
            raise _cannot_listen(settings, error) from error
    if not server.started:
        raise typer.Exit(NOTHING_DONE)


def _bind(settings: Settings) -> list[socket.socket]:
    """Take the port on every address of the host, without answering on it yet."""
    listeners: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            listener = socket.socket(family, kind, protocol)
            listeners.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                # Else it would take the IPv4 port as well, which has its own listener.
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind(address)
            if settings.port == 0:
                break  # a second address would get another free port
    except OSError as error:
        for listener in listeners:
            listener.close()
        raise _cannot_listen(settings, error) from error
    return listeners


def _cannot_listen(settings: Settings, error: OSError) -> ConfigurationError:
    return ConfigurationError(
        f"cannot listen on {settings.host}, port {settings.port}: {error.strerror}; choose others by DEIXIS_HOST and"
        " DEIXIS_PORT"
    )


async def _migrate(settings: Settings) -> None:
    engine = open_engine(settings.effective_database_url)
    try:
        await migrate(engine)
    finally:
        await engine.dispose()


def _flags_of_settings() -> inspect.Signature:
    """Return a flag for each setting, whose value None leaves it to the environment."""
    return inspect.Signature(
        [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[
                    str | None,
                    typer.Option(f"--{name.replace('_', '-')}", help=field.description, show_default=False),
                ],
            )
            for name, field in Settings.model_fields.items()
        ]
    )


serve.__signature__ = _flags_of_settings()  # type: ignore[attr-defined]
serve.__annotations__ = {
    name: parameter.annotation for name, parameter in inspect.signature(serve).parameters.items()
} | {"return": None}
cli.command("serve")(serve)


# --- classify ------------------------------------------------------------------------------------------------------


@cli.command("classify")
def classify_command(
    paths: Annotated[list[Path], typer.Argument(help="Image files, folders (searched whole) and globs.")],
    labels: LabelsOption = None,
    label_set: LabelSetOption = None,
    model: ModelOption = None,
    method: MethodOption = None,
    template: TemplateOption = None,
    option: OptionsOption = None,
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, help="Predictions per image.")] = 1,
    explain: Annotated[  # noqa: FBT002 - a flag
        bool, typer.Option("--explain", "-x", help="Also show which prompts spoke for each label, and which against.")
    ] = False,
    output: Annotated[Format, typer.Option("--format", "-f", help="Of what goes to standard output.")] = Format.TABLE,
    server: ServerOption = None,
) -> None:
    """Classify image files.

    Bad files are reported on standard error and skipped. Exit status: 0 if every file was classified, 1 if some were
    not, 2 if nothing could be done.
    """
    with _told_plainly():
        question = Question(
            labels=_read_labels(labels),
            label_set=label_set,
            method=method,
            model=model,
            template=template,
            top_k=top_k,
            explain=explain,
            options=_read_options(option),
        )
        files = find_images(paths)

    async def work(backend: Backend) -> list[ResultBody]:
        return [result async for _, result in _classify_files(backend, files, question)]

    results = _run(server, work, encoders=True)
    _write_predictions(files, results, output)
    if explain and output is Format.TABLE:
        _write_explanations(files, results)
    _report_warnings(results)
    bad = _report_bad_files(files, results)
    if bad:
        raise typer.Exit(NOTHING_DONE if bad == len(files) else SOME_FAILED)


async def _classify_files(
    backend: Backend, files: Sequence[Path], question: Question
) -> AsyncIterator[tuple[Path, ResultBody]]:
    """Yield each file's result in order, a few requests being under way at once, behind a progress bar."""
    chunks = [files[start : start + _CHUNK] for start in range(0, len(files), _CHUNK)]
    with _progress_bar() as bar:
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


async def _classify_chunk(backend: Backend, files: Sequence[Path], question: Question) -> list[ResultBody]:
    images = [await asyncio.to_thread(read_image, file) for file in files]
    readable = [image for image in images if isinstance(image, bytes)]
    answers = iter(await backend.classify(readable, question) if readable else [])
    return [next(answers) if isinstance(image, bytes) else image for image in images]


def _progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
    )


def _read_labels(given: Sequence[str] | None) -> list[str] | None:
    """Return the labels of every ``--labels``, files read; None if there was none."""
    if given is None:
        return None
    labels: list[str] = []
    for value in given:
        if value.startswith("@"):
            labels += _read_lines(Path(value[1:]))
        else:
            labels += split_labels(value)
    return labels


def _read_lines(file: Path) -> list[str]:
    try:
        text = file.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidFieldError.of(str(file), f"cannot be read: {error}") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _write_predictions(files: Sequence[Path], results: Sequence[ResultBody], output: Format) -> None:
    found = [(file, result) for file, result in zip(files, results, strict=True)]
    if output is Format.JSON:
        _write_json([{"path": str(file), **result.model_dump(exclude_none=True)} for file, result in found])
        return
    rows = [
        (str(file), str(rank), each.label, f"{each.score:.4f}", f"{each.similarity:.4f}")
        for file, result in found
        for rank, each in enumerate(result.predictions, start=1)
    ]
    columns = ("path", "rank", "label", "score", "similarity")
    if output is Format.CSV:
        writer = csv.writer(sys.stdout)
        writer.writerow(columns)
        writer.writerows(rows)
    elif rows:
        out.print(_table(columns, rows, right=("rank", "score", "similarity")))


def _write_explanations(files: Sequence[Path], results: Sequence[ResultBody]) -> None:
    """Show for each label its prompts with the most effect, a bar for how much."""
    for file, result in zip(files, results, strict=True):
        if result.explanation is None:
            continue
        out.print(f"\n[bold]{escape(str(file))}[/bold]", highlight=False)
        for label in result.explanation.labels:
            rival = "" if label.rival is None else f"   against {label.rival} {label.rival_similarity:.3f}"
            out.print(f"  [bold]{escape(label.label)}[/bold] {label.similarity:.3f}{escape(rival)}", highlight=False)
            level = label.similarity if label.rival_similarity is None else label.rival_similarity
            shown = [
                *(("+", "green", each) for each in label.supporting[:_SHOWN_PROMPTS]),
                *(("-", "red", each) for each in label.opposing[:_SHOWN_PROMPTS]),
            ]
            effects = [each.weight * abs(each.cosine - level) for _, _, each in shown]
            largest = max(effects, default=0.0) or 1.0
            for (sign, colour, each), effect in zip(shown, effects, strict=True):
                bar = "\u2588" * max(1, round(_BAR_WIDTH * effect / largest))
                out.print(
                    f"    {sign} [{colour}]{bar:<{_BAR_WIDTH}}[/{colour}] {each.cosine:6.3f}  {escape(each.prompt)}",
                    highlight=False,
                )


def _report_warnings(results: Sequence[ResultBody]) -> None:
    for warning in dict.fromkeys(warning for result in results for warning in result.warnings):
        err.print(f"[yellow]warning:[/yellow] {escape(warning)}", highlight=False, soft_wrap=True)


def _read_options(pairs: Sequence[str] | None) -> dict[str, float]:
    options = {}
    for pair in pairs or ():
        name, _, number = pair.partition("=")
        try:
            options[name.strip()] = float(number)
        except ValueError as error:
            raise InvalidFieldError.of("--option", f"'{pair}' is not of the form NAME=NUMBER") from error
    return options


def _report_bad_files(files: Sequence[Path], results: Sequence[ResultBody]) -> int:
    bad = [(file, result.error) for file, result in zip(files, results, strict=True) if result.error is not None]
    for file, problem in bad:
        err.print(
            f"[yellow]skipped[/yellow] {escape(str(file))}: {escape(problem.detail)}", highlight=False, soft_wrap=True
        )
    return len(bad)


# --- evaluate ------------------------------------------------------------------------------------------------------


@cli.command("evaluate")
def evaluate_command(
    folder: Annotated[Path, typer.Argument(help="One subfolder per class, named after it.")],
    labels: LabelsOption = None,
    label_set: LabelSetOption = None,
    name: Annotated[
        list[str] | None,
        typer.Option("--name", "-n", metavar="SUBFOLDER=CLASS", help="What a subfolder's class is called. Repeatable."),
    ] = None,
    model: ModelOption = None,
    method: Annotated[
        str | None, typer.Option("--method", help="The classifier, zero-shot by default; `all` compares every one.")
    ] = None,
    option: OptionsOption = None,
    template: TemplateOption = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Also write every figure as JSON; - for standard output."),
    ] = None,
    server: ServerOption = None,
) -> None:
    """Measure accuracy on a folder with one subfolder per class.

    The classes to choose from are the subfolders' names (underscores read as spaces, `--name` gives better ones) unless
    `--labels` or `--label-set` say otherwise; then every subfolder must be called like one of those.

    With `--method all`, every method is run on the same images, and it is said whether descriptions help: each is
    compared with zero-shot and with random words of the same number.
    """
    with _told_plainly():
        options = _read_options(option)
        if json_file is not None and json_file != Path("-") and not json_file.absolute().parent.is_dir():
            raise InvalidFieldError.of("--json", f"there is no folder {json_file.absolute().parent}")
        images = find_labelled_images(folder)
        renamed = _read_names(name or [], {subfolder for _, subfolder in images})
        true_names = [renamed.get(subfolder) or _class_name(subfolder.replace("_", " ")) for _, subfolder in images]
        given = _read_labels(labels)
        if given is None and label_set is None:
            given = list(dict.fromkeys(true_names))
    files = [file for file, _ in images]

    async def read_question(backend: Backend) -> tuple[list[str], Question]:
        classnames = (
            [_class_name(each) for each in given]
            if label_set is None and given is not None
            else [each.name for each in (await backend.label_set(label_set or "")).classes]
        )
        for true_name in set(true_names) - set(classnames):
            raise UnknownNameError("class", true_name, classnames, "--name SUBFOLDER=CLASS tells what a subfolder is")
        question = Question(labels=given, label_set=label_set, model=model, template=template, top_k=len(classnames))
        return classnames, question

    async def compared(backend: Backend) -> _Measured:
        _, question = await read_question(backend)
        with _progress_bar() as bar:
            line = bar.add_task("Encoding", total=len(files))
            comparison, results = await backend.compare(question, files, true_names, lambda: bar.advance(line))
        return _Measured(results, comparison.to_json(), lambda _: _print_comparison(comparison))

    async def evaluated(backend: Backend) -> _Measured:
        classnames, question = await read_question(backend)
        question = replace(question, method=method, options=options)
        # The texts are encoded once and for all: no part of the rate at which images are classified.
        await backend.classify([_grey_square()], question)
        began = time.perf_counter()
        results = [result async for _, result in _classify_files(backend, files, question)]
        evaluation = _evaluated(classnames, true_names, results)
        rate = round(evaluation.images / (time.perf_counter() - began), 2)
        report = {**evaluation.to_json(), "images_per_s": rate}
        return _Measured(results, report, partial(_print_evaluation, evaluation))

    measured = _run(server, compared if method == ALL_METHODS else evaluated, encoders=True)
    _report_warnings(measured.results)
    bad = _report_bad_files(files, measured.results)
    report = {**measured.report, "skipped": bad}
    if json_file == Path("-"):
        _write_json(report)
    else:
        measured.show(report)
        if json_file is not None:
            _write_file(json_file, report)
    if bad:
        raise typer.Exit(SOME_FAILED)


class _Measured(NamedTuple):
    """What came of a folder: each file's result, the report, and what prints it."""

    results: list[ResultBody]
    report: Mapping[str, Any]
    show: Callable[[Mapping[str, Any]], None]


def _read_names(pairs: Sequence[str], subfolders: set[str]) -> dict[str, str]:
    names = {}
    for pair in pairs:
        subfolder, equals, classname = pair.partition("=")
        if not (equals and classname.strip()):
            raise InvalidFieldError.of("--name", f"'{pair}' is not of the form SUBFOLDER=CLASS")
        if subfolder not in subfolders:
            raise UnknownNameError("subfolder", subfolder, subfolders)
        names[subfolder] = _class_name(classname)
    return names


def _class_name(text: str) -> str:
    """Return a class name as answers will spell it, so that both can be compared."""
    return clean_classnames([text], max_classes=1, setting="", field="class")[0]


def _grey_square() -> bytes:
    file = BytesIO()
    Image.new("L", (8, 8), 128).save(file, "PNG")
    return file.getvalue()


def _evaluated(classnames: Sequence[str], true_names: Sequence[str], results: Sequence[ResultBody]) -> Evaluation:
    """Score the images that could be read."""
    index = {classname: number for number, classname in enumerate(classnames)}
    read = [(true, result) for true, result in zip(true_names, results, strict=True) if result.error is None]
    if not read:
        raise InvalidFieldError.of("folder", "not one of its images could be read")
    return evaluate(
        classnames,
        np.array([index[true] for true, _ in read]),
        np.array([[index[each.label] for each in result.predictions] for _, result in read]),
    )


def _print_comparison(comparison: Comparison) -> None:
    def told(difference: Difference | None) -> tuple[str, str]:
        return ("", "") if difference is None else (f"{100 * difference.mean:+.1f}", f"{difference.p:.2g}")

    columns = ("method", "prompts", "top-1", "95 % interval", "to zero-shot", "p", "to random", "p ")
    rows = [
        (
            each.method,
            f"{each.prompts_per_class:g}",
            f"{each.evaluation.top1:.4f}",
            f"{each.interval[0]:.3f} to {each.interval[1]:.3f}",
            *told(each.to_baseline),
            *told(each.to_control),
        )
        for each in comparison.methods
    ]
    out.print(f"{comparison.images} images, model {escape(comparison.model)}", highlight=False)
    out.print(_table(columns, rows, right=columns[1:]))
    for method in comparison.not_run:
        out.print(f"[yellow]not run:[/yellow] {escape(method)}", highlight=False, soft_wrap=True)
    for sentence in comparison.verdict:
        out.print(escape(sentence), highlight=False, soft_wrap=True)


def _print_evaluation(evaluation: Evaluation, report: Mapping[str, Any]) -> None:
    low, high = evaluation.top1_interval
    out.print(
        f"[bold]top-1 {evaluation.top1:.4f}[/bold] (95 % interval {low:.3f} to {high:.3f})"
        f"   top-5 {evaluation.top5:.4f}   mean recall {evaluation.mean_recall:.4f}   {evaluation.images} images"
        f"   {report['images_per_s']} images/s   {report['skipped']} skipped",
        highlight=False,
    )
    out.print(
        _table(
            ("class", "images", "recall", "precision", "F1", "most confused with"),
            [
                (
                    row.name,
                    str(row.support),
                    _share(row.recall),
                    _share(row.precision),
                    _share(row.f1),
                    row.confused_with or "",
                )
                for row in evaluation.classes
            ],
            right=("images", "recall", "precision", "F1"),
        )
    )
    if len(evaluation.classes) <= _MAX_CONFUSION_CLASSES:
        names = [row.name for row in evaluation.classes]
        out.print(
            _table(
                ("true \\ predicted", *names),
                [
                    (name, *(str(count or "") for count in row))
                    for name, row in zip(names, evaluation.confusion, strict=True)
                ],
                right=names,
            )
        )


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


# --- label sets ----------------------------------------------------------------------------------------------------


@label_sets_cli.command("list")
def list_label_sets(server: ServerOption = None) -> None:
    """List every label set with its latest version."""
    found = _run(server, lambda backend: backend.label_sets())
    rows = [(each.name, str(each.version), str(each.classes), f"{each.created_at:%Y-%m-%d %H:%M:%S}") for each in found]
    out.print(_table(("name", "version", "classes", "created (UTC)"), rows, right=("version", "classes")))


@label_sets_cli.command("show")
def show_label_set(
    name: Annotated[str, typer.Argument(help="NAME or NAME@VERSION.")], server: ServerOption = None
) -> None:
    """Show a label set's classes."""
    label_set = _run(server, lambda backend: backend.label_set(name))
    out.print(
        f"[bold]{escape(label_set.name)}@{label_set.version}[/bold]   templates: {escape(label_set.templates)}"
        f"   created {label_set.created_at:%Y-%m-%d %H:%M:%S} UTC",
        highlight=False,
    )
    rows = [
        (
            each.name,
            str(len(each.descriptions) or ""),
            str(len(each.features) or ""),
            ", ".join(each.synonyms),
            each.prompt or "",
        )
        for each in label_set.classes
    ]
    columns = ("class", "descriptions", "features", "synonyms", "prompt")
    out.print(_table(columns, rows, right=("descriptions", "features")))


@label_sets_cli.command("import")
def import_label_set(
    name: Annotated[str, typer.Argument(help="To write; a name that exists gets a new version.")],
    file: Annotated[
        Path | None,
        typer.Argument(
            help="What `export` writes, a JSON array, or text with a class name a line; without it, the label set of"
            " that name that comes with Deixis, described: `deixis label-sets shipped` lists them.",
            show_default=False,
        ),
    ] = None,
    templates: Annotated[str | None, typer.Option(help="A template set or one template; `photo` by default.")] = None,
    server: ServerOption = None,
) -> None:
    """Write a label set from a file."""
    with _told_plainly():
        body = _read_label_set(_shipped(name) if file is None else file)
    if templates is not None:
        body = body.model_copy(update={"templates": templates})
    written = _run(server, lambda backend: backend.put_label_set(name, body))
    out.print(f"wrote {escape(written.name)}@{written.version} with {len(written.classes)} classes", highlight=False)


@label_sets_cli.command("shipped")
def list_shipped_label_sets() -> None:
    """List the label sets that come with Deixis, their classes described; `import NAME` takes one over."""
    rows = []
    for file in sorted((resources("prompts") / "descriptions").glob("*.json")):
        classes = _read_label_set(file).entries()
        texts = sum(len(entry.descriptions) + len(entry.features) for entry in classes)
        rows.append((file.stem, str(len(classes)), str(texts), ", ".join(entry.name for entry in classes)))
    out.print(_table(("name", "classes", "descriptions", "of"), rows, right=("classes", "descriptions")))


def _shipped(name: str) -> Path:
    files = {file.stem: file for file in (resources("prompts") / "descriptions").glob("*.json")}
    if name not in files:
        raise UnknownNameError("shipped label set", name, files, "or name a file to read")
    return files[name]


@label_sets_cli.command("export")
def export_label_set(
    name: Annotated[str, typer.Argument(help="NAME or NAME@VERSION.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A file; standard output by default.")] = None,
    server: ServerOption = None,
) -> None:
    """Write a label set as JSON that `import` reads, and PUT takes as its body."""
    label_set = _run(server, lambda backend: backend.label_set(name))
    exported = label_set.model_dump(
        mode="json", include={"classes", "templates", "merge_synonyms"}, exclude_defaults=True
    )
    if output is None:
        _write_json(exported)
    else:
        _write_file(output, exported)


def _read_label_set(file: Path) -> LabelSetBody:
    lines = _read_lines(file)
    text = "\n".join(lines)
    if not lines:
        raise InvalidFieldError.of(str(file), "is empty; write a class name a line, or what `export` writes")
    if not text.startswith(("{", "[")):
        return LabelSetBody(classes=list(lines))
    try:
        found = json.loads(text)
        return LabelSetBody.model_validate({"classes": found} if isinstance(found, list) else found)
    except ValueError as error:
        raise InvalidFieldError.of(str(file), f"is no label set: {error}") from error


# --- descriptions by a language model ------------------------------------------------------------------------------


@cli.command("describe")
def describe_command(
    label_set: Annotated[str, typer.Argument(help="The label set whose classes are described.")],
    question_set: Annotated[
        str, typer.Option("--questions", "-q", help="A set of questions; `deixis drafts questions` lists them.")
    ] = "general",
    which: Annotated[
        Questions, typer.Option("--which", "-w", help="Those that suit every class, those of the domain, or both.")
    ] = Questions.BASE,
    sentences: Annotated[bool, typer.Option(help="Ask for sentences, for `cupl`.")] = True,  # noqa: FBT002 - a flag
    features: Annotated[bool, typer.Option(help="Ask for features, for `dclip`.")] = True,  # noqa: FBT002 - a flag
    answers: Annotated[int, typer.Option(min=1, max=50, help="To each question for sentences.")] = 10,
    classes: Annotated[
        list[str] | None, typer.Option("--class", "-c", help="Only this class of the label set. Repeatable.")
    ] = None,
    accept: Annotated[  # noqa: FBT002 - a flag
        bool, typer.Option("--accept", help="Put every draft into a new version, without a review.")
    ] = False,
    estimate: Annotated[  # noqa: FBT002 - a flag
        bool, typer.Option("--estimate", help="Only tell what it would take.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Begin without asking.")] = False,  # noqa: FBT002 - a flag
    server: ServerOption = None,
) -> None:
    """Ask a language model how the classes of a label set look.

    The endpoint is that of DEIXIS_LLM_BASE_URL, DEIXIS_LLM_MODEL and DEIXIS_LLM_API_KEY, or the server's with
    `--server`. What it writes is kept as drafts until `deixis drafts accept`. A command that was interrupted is gone on
    with by giving it again: what was answered is not asked again.
    """
    body = GenerateBody(
        question_set=question_set,
        questions=which,
        sentences=sentences,
        features=features,
        answers=answers,
        classes=classes,
        accept=accept,
    )
    expected = _run(
        server,
        lambda backend: backend.estimate_descriptions(
            label_set, DescribeBody.model_validate(body.model_dump(exclude={"accept"}))
        ),
    )
    told = (
        f"at most {expected.requests:,} requests, {expected.prompt_tokens:,} tokens of questions and"
        f" {expected.completion_tokens:,} tokens of answers"
    )
    err.print(told if expected.requests else "every question is answered already", highlight=False)
    if estimate:
        return
    if expected.requests and not yes and not typer.confirm("Begin?", err=True):
        raise typer.Exit(NOTHING_DONE)

    async def described(backend: Backend) -> Mapping[str, Any]:
        with _progress_bar() as bar:
            line = bar.add_task("Asking", total=None)

            async def advance(done: int, total: int) -> None:
                bar.update(line, completed=done, total=total)

            return await backend.describe(label_set, body, advance)

    result = _run(server, described)
    out.print(
        f"{result['questions']} questions, {result['answered_before']} of them answered before:"
        f" {result['new_drafts']} new drafts for {result['prompt_tokens']:,} + {result['completion_tokens']:,} tokens",
        highlight=False,
    )
    if "label_set" in result:
        out.print(f"accepted {result['accepted']} into {escape(result['label_set'])}", highlight=False)
    elif result["new_drafts"]:
        name = escape(label_set)
        out.print(f"review them: deixis drafts list {name}; then: deixis drafts accept {name}", highlight=False)


IdsOption = Annotated[
    list[int] | None, typer.Option("--id", "-i", help="One of `drafts list`; all that are undecided by default.")
]


@drafts_cli.command("list")
def list_drafts(
    label_set: Annotated[str, typer.Argument(help="Its name.")],
    every: Annotated[  # noqa: FBT002 - a flag
        bool, typer.Option("--all", "-a", help="Also those that were accepted or rejected.")
    ] = False,
    classname: Annotated[str | None, typer.Option("--class", "-c", help="Of this class only.")] = None,
    json_output: Annotated[  # noqa: FBT002 - a flag
        bool, typer.Option("--json", help="Everything that is known of each, as JSON.")
    ] = False,
    server: ServerOption = None,
) -> None:
    """List what a language model wrote about the classes of a label set."""
    found = _run(server, lambda backend: backend.drafts(label_set, None if every else DraftStatus.DRAFT, classname))
    if json_output:
        _write_json([each.model_dump(mode="json", by_alias=True) for each in found])
        return
    rows = [
        (str(each.id), each.class_, each.kind, each.status, each.text, each.model, f"{each.asked_at:%Y-%m-%d}")
        for each in found
    ]
    out.print(_table(("id", "class", "kind", "status", "text", "model", "asked"), rows, right=("id",)))


@drafts_cli.command("accept")
def accept_drafts(
    label_set: Annotated[str, typer.Argument(help="Its name.")], ids: IdsOption = None, server: ServerOption = None
) -> None:
    """Put drafts into a new version of the label set."""
    accepted = _run(server, lambda backend: backend.accept_drafts(label_set, DecisionBody(ids=ids)))
    written = accepted.label_set
    out.print(f"accepted {accepted.accepted} into {escape(written.name)}@{written.version}", highlight=False)


@drafts_cli.command("reject")
def reject_drafts(
    label_set: Annotated[str, typer.Argument(help="Its name.")], ids: IdsOption = None, server: ServerOption = None
) -> None:
    """Keep drafts from being used, and from being made again."""
    rejected = _run(server, lambda backend: backend.reject_drafts(label_set, DecisionBody(ids=ids)))
    out.print(f"rejected {rejected.rejected}", highlight=False)


@drafts_cli.command("questions")
def list_questions() -> None:
    """List the sets of questions that `deixis describe` can ask."""
    with _told_plainly():
        sets = load_question_sets(resources("prompts") / "questions")
    rows = [(each.name, each.summary, f"{len(each.base)} + {len(each.full)}") for each in sets.values()]
    out.print(_table(("name", "for", "base + full"), rows, right=("base + full",)))


# --- models --------------------------------------------------------------------------------------------------------


@models_cli.command("list")
def list_models() -> None:
    """List models that are known to be good; any other that open_clip can load works as well."""
    rows = [
        (
            card.name,
            str(card.year),
            f"{card.params_millions:.0f}",
            str(card.image_size_px),
            str(card.embed_dim),
            "" if card.imagenet_zero_shot_top1 is None else f"{card.imagenet_zero_shot_top1:.1f}",
            card.licence,
        )
        for card in _catalogue().values()
    ]
    columns = ("DEIXIS_MODELS", "year", "M params", "px", "dim", "ImageNet top-1 %", "licence")
    out.print(_table(columns, rows, right=columns[1:6]))


@models_cli.command("show")
def show_model(name: Annotated[str, typer.Argument(help="As `models list` shows it.")]) -> None:
    """Show all that is known of one model, with sources."""
    with _told_plainly():
        catalogue = _catalogue()
        if name not in catalogue:
            raise UnknownNameError(
                "model", name, catalogue, "others that open_clip knows can be served but have no card"
            )
    rows = [(key, str(value)) for key, value in catalogue[name].model_dump(exclude_none=True).items()]
    out.print(_table(("", ""), rows))


@models_cli.command("download")
def download_model(
    name: Annotated[str, typer.Argument(help="architecture/tag or hf-hub:org/repo.")],
) -> None:
    """Fetch a model's weights into the cache and load them once, so that `serve` will start without a network."""
    configure_logs("console", "warning")
    with _told_plainly():
        settings = load_settings()
        encoder = load_encoder(name, LoadOptions(device="cpu", weights_dir=settings.model_cache_dir, backend="torch"))
    out.print(
        f"{escape(name)} is cached and loads: {encoder.embed_dim} dimensions, {encoder.image_size_px} px",
        highlight=False,
    )


@models_cli.command("tune")
def tune_model(
    name: Annotated[
        str | None, typer.Argument(help="As DEIXIS_MODELS has it; by default every model of the settings.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=1, help="For each model, about.")] = 60,
) -> None:
    """Measure how a model runs best on this machine, and keep that for `serve` and every other command.

    `serve` does the same, in less time, when it first loads a model.
    """
    configure_logs("console", "warning")
    with _told_plainly():
        settings = load_settings()
        options = replace(load_options(settings), tuning_seconds=seconds, measure_again=True)
        for model in settings.models if name is None else [name]:
            with err.status(f"Measuring {model}, about {seconds:g} s"):
                encoder = load_encoder(model, options)
            _write_tuning(encoder)


def _write_tuning(encoder: Encoder) -> None:
    path, tuning = encoder.image_path, encoder.tuning
    assert tuning is not None
    sizes = sorted({size for trial in tuning.trials for size in trial.images_per_s})
    rows = [
        (
            trial.candidate.backend,
            trial.candidate.precision,
            str(trial.candidate.threads or ""),
            "" if trial.min_cosine is None else f"{trial.min_cosine:.4f}",
            *(f"{trial.images_per_s[size]:.1f}" if size in trial.images_per_s else "" for size in sizes),
            trial.refused or "",
        )
        for trial in tuning.trials
    ]
    columns = ("back end", "precision", "threads", "cosine", *(f"images/s at {size}" for size in sizes), "refused")
    out.print(f"[bold]{escape(encoder.name)}[/bold] on {tuning.device}", highlight=False)
    out.print(_table(columns, rows, right=columns[2:-1]))
    out.print(
        f"best: {path.backend} {path.precision}, {path.batch_size} images in a batch, {path.images_per_s} images/s;"
        " kept for the next start\n",
        highlight=False,
    )


def _catalogue() -> dict[str, ModelCard]:
    with _told_plainly():
        return load_catalogue(resources("models"))


# --- output --------------------------------------------------------------------------------------------------------


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[str] = ()) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(escape(column), justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    return table


def _write_json(value: object) -> None:
    json.dump(value, sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")


def _write_file(file: Path, value: object) -> None:
    with _told_plainly():
        try:
            file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
        except OSError as error:
            raise InvalidFieldError.of(str(file), f"cannot be written: {error.strerror}") from error


def main() -> None:
    """Run the command line."""
    cli()
