"""`deixis watch`: label the images of a folder as they come, and write it beside them."""

import asyncio
import signal
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar

import typer
import watchfiles
from rich.markup import escape

from app import __version__
from app.api.schemas.classification import ResultBody
from app.classification.resolve import ClassifyRequest
from app.cli.backends import Backend, RefusedError
from app.cli.common import (
    CoverageOption,
    DatabaseOption,
    FalseRejectionRateOption,
    LabelSetOption,
    LabelsOption,
    MethodOption,
    ModelOption,
    OptionsOption,
    ServerOption,
    TemplateOption,
    err,
    out,
    prepare_names,
    read_labels,
    read_options,
    share_of,
    told_plainly,
    with_backend,
)
from app.errors import InvalidFieldError, NotReadyError
from app.images.discovery import images_below
from app.images.sidecars import ForeignSidecarError, JsonSidecar, LabelRecord, XmpSidecar, question_key, sha256_of

Answer = TypeVar("Answer")

_BATCH = 8
# Between two attempts to reach a server that is away.
_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 60.0
_PASSING = frozenset({429, 502, 503, 504})
# A folder is looked through so often even where nothing is told of it, since some file systems tell nothing.
_LOOK_EVERY_S = 30.0

Stamp: TypeAlias = tuple[int, int]
"""Size in bytes and time of the last change in ns, by which a file that is being written is told from a whole one."""


class Sidecar(StrEnum):
    """What is written beside an image."""

    JSON = "json"
    XMP = "xmp"


def watch_command(
    folder: Annotated[Path, typer.Argument(help="The folder; those in it are watched too.")],
    labels: LabelsOption = None,
    label_set: LabelSetOption = None,
    model: ModelOption = None,
    method: MethodOption = None,
    template: TemplateOption = None,
    database: DatabaseOption = None,
    option: OptionsOption = None,
    reject_below: Annotated[
        float | None,
        typer.Option("--reject-below", min=0, max=1, help="An image whose best score is lower has none of the labels."),
    ] = None,
    false_rejection_rate: FalseRejectionRateOption = None,
    coverage: CoverageOption = None,
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, help="Predictions per image.")] = 5,
    write: Annotated[
        Sidecar,
        typer.Option("--write", "-w", help="NAME.EXT.json with all predictions, or NAME.EXT.xmp with keywords."),
    ] = Sidecar.JSON,
    min_score: Annotated[
        float, typer.Option("--min-score", min=0, max=1, help="Of a label that becomes a keyword of XMP.")
    ] = 0.5,
    existing: Annotated[  # noqa: FBT002 - a flag
        bool, typer.Option("--existing", help="Also label the images that are there already.")
    ] = False,
    settle: Annotated[
        float, typer.Option("--settle", min=0.1, help="Seconds for which a file must not change to be taken as whole.")
    ] = 1.0,
    poll: Annotated[  # noqa: FBT002 - a flag
        bool, typer.Option("--poll", help="Look at the files themselves: for network folders, which tell of nothing.")
    ] = False,
    once: Annotated[  # noqa: FBT002 - a flag
        bool, typer.Option("--once", help="End when every image that is there is labelled; implies --existing.")
    ] = False,
    server: ServerOption = None,
) -> None:
    """Label images of a folder as they come, and write the labels beside them; ends by Ctrl-C or SIGTERM.

    An image whose sidecar is of the same file and the same question, with the same model and version of the label set,
    is not labelled again, so that it goes on where it was. A file that cannot be read is told once. A server that is
    away is waited for.
    """
    with told_plainly():
        if not folder.is_dir():
            raise InvalidFieldError.of("folder", f"'{folder}' is not a folder")
        question = ClassifyRequest(
            labels=read_labels(labels),
            label_set=label_set,
            method=method,
            model=model,
            template=template,
            top_k=top_k,
            options=read_options(option),
            reject_below=reject_below,
            false_rejection_rate=share_of(false_rejection_rate, "--false-rejection-rate"),
            coverage=share_of(coverage, "--coverage"),
            database=database,
        )
    sidecar = JsonSidecar() if write is Sidecar.JSON else XmpSidecar()

    async def work(backend: Backend) -> None:
        await prepare_names(backend, question)
        watcher = Watcher(backend, question, sidecar, min_score)
        if not (existing or once):
            watcher.leave(folder)
        stopped, loop = asyncio.Event(), asyncio.get_running_loop()
        with suppress(NotImplementedError):  # on Windows Ctrl-C interrupts, between two writes
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, stopped.set)
        await watcher.run(folder, stopped, settle_s=settle, poll=poll, once=once)

    with_backend(server, work, encoders=True)


class Watcher:
    """Labels the images of a folder.

    Args:
        backend: what classifies.
        question: what is asked about each image.
        sidecar: what is written.
        min_score: of a keyword.
    """

    def __init__(
        self, backend: Backend, question: ClassifyRequest, sidecar: JsonSidecar | XmpSidecar, min_score: float
    ) -> None:
        self._backend = backend
        self._question = question
        self._sidecar = sidecar
        self._min_score = min_score
        self._done: dict[Path, Stamp] = {}
        self._seen: dict[Path, tuple[Stamp, float]] = {}

    def leave(self, folder: Path) -> None:
        """Take the images that are there for done, until they change."""
        self._done = {file: stamp for file in images_below(folder) if (stamp := _stamp(file)) is not None}

    async def run(self, folder: Path, stopped: asyncio.Event, *, settle_s: float, poll: bool, once: bool) -> None:
        """Label until it is stopped; with ``once``, until there is nothing to label."""
        # Made before the first look, so that what comes in between is told.
        changes = watchfiles.awatch(
            folder,
            stop_event=stopped,
            step=50,
            force_polling=poll,
            poll_delay_ms=max(50, round(settle_s * 500)),
            rust_timeout=round(min(settle_s, _LOOK_EVERY_S) * 1000),
            yield_on_timeout=True,
            recursive=True,
        )
        last_look = -_LOOK_EVERY_S
        err.print(f"watching {escape(str(folder))}", highlight=False)
        async for told in changes:
            now = time.monotonic()
            if told or self._seen or now - last_look >= _LOOK_EVERY_S:
                last_look = now
                await self._label(await asyncio.to_thread(self._whole, folder, settle_s), stopped)
                if once and not self._seen:
                    stopped.set()
        err.print("ended", highlight=False)

    def _whole(self, folder: Path, settle_s: float) -> list[tuple[Path, Stamp]]:
        """Return the images to be labelled that have not changed for a while."""
        now, found, waiting = time.monotonic(), [], {}
        there = set()
        for file in images_below(folder):
            there.add(file)
            stamp = _stamp(file)
            if stamp is None or self._done.get(file) == stamp:
                continue
            before, since = self._seen.get(file, (stamp, now))
            if before == stamp and now - since >= settle_s:
                found.append((file, stamp))
            else:
                since = since if before == stamp else now
            waiting[file] = (stamp, since)
        self._seen = waiting
        self._done = {file: stamp for file, stamp in self._done.items() if file in there}
        return found

    async def _label(self, files: Sequence[tuple[Path, Stamp]], stopped: asyncio.Event) -> None:
        for start in range(0, len(files), _BATCH):
            if stopped.is_set():
                return
            batch = files[start : start + _BATCH]
            # Anew each time: a label set that changes while this runs counts for the images that come then.
            question = await self._patiently(lambda: self._backend.pinned(self._question), stopped)
            if question is None:
                return
            asked = _asked(question)
            read = await asyncio.to_thread(self._to_be_asked, [file for file, _ in batch], asked)
            contents = [content for _, content in read]
            answers = (
                await self._patiently(partial(self._backend.classify, contents, question), stopped) if read else []
            )
            if answers is None:
                return
            for (file, content), result in zip(read, answers, strict=True):
                await asyncio.to_thread(self._write, file, content, asked, result)
            for file, stamp in batch:
                self._done[file] = stamp
                self._seen.pop(file, None)

    def _to_be_asked(self, files: Sequence[Path], asked: Mapping[str, Any]) -> list[tuple[Path, bytes]]:
        """Return the contents of those that have no sidecar about them and about this question."""
        read = []
        for file in files:
            try:
                content = file.read_bytes()
                if self._sidecar.read_key(self._place(file)) != (sha256_of(content), question_key(asked)):
                    read.append((file, content))
            except ForeignSidecarError as error:
                _tell_bad(file, str(error))
            except OSError as error:
                _tell_bad(file, error.strerror or type(error).__name__)
        return read

    async def _patiently(self, ask: Callable[[], Coroutine[Any, Any, Answer]], stopped: asyncio.Event) -> Answer | None:
        """Return the answer of the backend; None if it was told to end while the server was away."""
        wait_s = _FIRST_WAIT_S
        while True:
            try:
                return await ask()
            except (NotReadyError, RefusedError) as error:
                if isinstance(error, RefusedError) and error.problem.status not in _PASSING:
                    raise
                if wait_s == _FIRST_WAIT_S:
                    err.print(f"[yellow]waiting:[/yellow] {escape(error.message)}", highlight=False, soft_wrap=True)
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await stopped.wait()
            if stopped.is_set():
                return None
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)

    def _write(self, file: Path, content: bytes, asked: Mapping[str, Any], result: ResultBody) -> None:
        if result.error is not None:
            _tell_bad(file, result.error.detail)
            return
        labelled = LabelRecord(
            sha256=sha256_of(content),
            question=asked,
            predictions=[each.model_dump() for each in result.predictions],
            rejected=result.rejected,
            prediction_set=result.prediction_set,
            labelled_at=datetime.now(UTC).isoformat(timespec="seconds"),
            version=__version__,
        )
        try:
            self._sidecar.write(self._place(file), labelled, self._min_score)
        except ForeignSidecarError as error:
            _tell_bad(file, str(error))
        except OSError as error:
            # Not done: the disk may have room again when the file is looked at the next time.
            raise InvalidFieldError.of(str(self._place(file)), f"cannot be written: {error.strerror}") from error
        best = next(iter(result.predictions), None)  # for some images no names are found
        told = "none of these" if result.rejected or best is None else f"{best.label} {best.score:.2f}"
        out.print(f"{file}: {told}", highlight=False, markup=False, soft_wrap=True)

    def _place(self, file: Path) -> Path:
        return file.with_name(file.name + self._sidecar.suffix)


def _asked(question: ClassifyRequest) -> dict[str, Any]:
    """Return what of a question makes its answers."""
    fields = {
        "labels": question.labels,
        "label_set": question.label_set,
        "model": question.model,
        "method": question.method,
        "template": question.template,
        "database": question.database,
        "options": dict(question.options) or None,
        "reject_below": question.reject_below,
        "false_rejection_rate": question.false_rejection_rate,
        "coverage": question.coverage,
        "top_k": question.top_k,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _stamp(file: Path) -> Stamp | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _tell_bad(file: Path, reason: str) -> None:
    err.print(f"[yellow]skipped[/yellow] {escape(str(file))}: {escape(reason)}", highlight=False, soft_wrap=True)
