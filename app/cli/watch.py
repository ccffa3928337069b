"""`deixis watch`: classify the images of a folder as they appear, and write the labels beside them."""

import asyncio
import errno
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, TypeVar

import typer
import watchfiles
from rich.markup import escape
from watchfiles._rust_notify import WatchfilesRustInternalError

from app import __version__
from app.classification.request import ClassifyRequest
from app.cli.backends import Backend
from app.cli.common import (
    err,
    message_of,
    out,
    prepare_database,
    report_bad_folders,
    report_errors,
    warn,
    with_backend,
)
from app.cli.options import ServerOption, takes_request
from app.errors import InvalidFieldError, NotReadyError
from app.images.discovery import images_below
from app.images.reading import UnreadableFileError, read_image_file
from app.images.sidecars import ForeignSidecarError, JsonSidecar, LabelRecord, XmpSidecar, question_key, sha256_of
from app.runtime.file_names import printable
from deixis import ProblemError, UnreachableError

if TYPE_CHECKING:
    from deixis import ImageResult

Result = TypeVar("Result")

_BATCH = 8
# Between two attempts to reach a server that does not respond.
_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 60.0
_PASSING_STATUSES = frozenset({429, 502, 503, 504})
# The folder is scanned at this interval as well, because some file systems report no changes.
_SCAN_INTERVAL_S = 30.0

# The errors that concern every file, and not only the one that is written.
_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})

Stamp: TypeAlias = tuple[int, int]
"""Size in bytes and modification time in ns; a file is complete when its stamp stops changing."""


class Sidecar(StrEnum):
    """The format of the file that is written beside an image."""

    JSON = "json"
    XMP = "xmp"


@takes_request(
    *("labels", "label_set", "model", "method", "template", "database", "option", "priors", "reject_below"),
    *("false_rejection_rate", "reject", "coverage", "multi_label", "top_k"),
    top_k=5,
)
def watch_command(
    folder: Annotated[Path, typer.Argument(help="The folder to watch, with its subfolders.")],
    request: ClassifyRequest,
    write: Annotated[
        Sidecar,
        typer.Option("--write", "-w", help="Write NAME.EXT.json with all predictions, or NAME.EXT.xmp with keywords."),
    ] = Sidecar.JSON,
    min_score: Annotated[
        float, typer.Option("--min-score", min=0, max=1, help="Minimum score of the labels that become XMP keywords.")
    ] = 0.5,
    subject_prefix: Annotated[
        str | None,
        typer.Option(
            "--subject-prefix",
            metavar="KEYWORD",
            help="With --write xmp: place the keywords below this one, such as 'Deixis' or 'Automatic|Deixis'.",
        ),
    ] = None,
    existing: Annotated[  # noqa: FBT002 - a flag
        bool, typer.Option("--existing", help="Also classify the images that are in the folder already.")
    ] = False,
    settle: Annotated[
        float,
        typer.Option("--settle", min=0.1, help="Seconds without a change after which a file is considered complete."),
    ] = 1.0,
    poll: Annotated[  # noqa: FBT002 - a flag
        bool, typer.Option("--poll", help="Detect changes by polling: for network folders, which report no changes.")
    ] = False,
    once: Annotated[  # noqa: FBT002 - a flag
        bool, typer.Option("--once", help="Exit when all images in the folder are classified; implies --existing.")
    ] = False,
    server: ServerOption = None,
) -> None:
    """Classify the images of a folder as they appear, and write the labels beside them. Stop with Ctrl-C or SIGTERM.

    An image is not classified again while its sidecar matches the file, the request, the model and the version of the
    label set. To resume, start the command again. A file that cannot be read is reported once. If a server does not
    respond, the command waits for it.
    """
    with report_errors():
        if not folder.is_dir():
            raise InvalidFieldError.of("folder", f"'{folder}' is not a folder")
        if subject_prefix is not None and write is not Sidecar.XMP:
            raise InvalidFieldError.of("--subject-prefix", "needs --write xmp; JSON has no keywords")
    sidecar = JsonSidecar() if write is Sidecar.JSON else XmpSidecar(subject_prefix)

    async def work(backend: Backend) -> None:
        await prepare_database(backend, request)
        watcher = Watcher(backend, request, sidecar, min_score)
        if not (existing or once):
            watcher.skip_existing(folder)
        stopped, loop = asyncio.Event(), asyncio.get_running_loop()
        with suppress(NotImplementedError):  # on Windows, Ctrl-C interrupts the command between two writes
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, stopped.set)
        await watcher.run(folder, stopped, settle_s=settle, poll=poll, once=once)

    with_backend(server, work, encoders=True)


class Watcher:
    """Classifies the images of a folder, and writes their sidecars.

    Args:
        backend: classifies the images.
        request: how images are classified.
        sidecar: the format that is written.
        min_score: minimum score of a keyword.
    """

    def __init__(
        self, backend: Backend, request: ClassifyRequest, sidecar: JsonSidecar | XmpSidecar, min_score: float
    ) -> None:
        self._backend = backend
        self._request = request
        self._sidecar = sidecar
        self._min_score = min_score
        self._done: dict[Path, Stamp] = {}
        self._bad_folders: set[str] = set()
        self._changing: dict[Path, tuple[Stamp, float]] = {}

    def skip_existing(self, folder: Path) -> None:
        """Skip the images that are in the folder now, until they change."""
        self._done = {file: stamp for file in images_below(folder) if (stamp := _stamp(file)) is not None}

    async def run(self, folder: Path, stopped: asyncio.Event, *, settle_s: float, poll: bool, once: bool) -> None:
        """Classify images until ``stopped`` is set or, with ``once``, until all images are classified."""
        # Created before the first scan, so that changes during the scan are reported.
        changes = _changes(folder, stopped, settle_s=settle_s, poll=poll)
        last_scan = -_SCAN_INTERVAL_S
        err.print(f"watching {escape(printable(str(folder)))}", highlight=False)
        async for changed in changes:
            now = time.monotonic()
            if changed or self._changing or now - last_scan >= _SCAN_INTERVAL_S:
                last_scan = now
                await self._classify(await asyncio.to_thread(self._scan, folder, settle_s), stopped)
                if once and not self._changing:
                    stopped.set()
        err.print("ended", highlight=False)

    def _scan(self, folder: Path, settle_s: float) -> list[tuple[Path, Stamp]]:
        """Return the images to classify that have not changed for ``settle_s``."""
        now, complete, changing = time.monotonic(), [], {}
        files = set()
        if not folder.is_dir():
            raise InvalidFieldError.of("folder", f"'{folder}' has disappeared; restore it, and start again")
        for file in images_below(folder, self._report_once):
            files.add(file)
            stamp = _stamp(file)
            if stamp is None or self._done.get(file) == stamp:
                continue
            before, since = self._changing.get(file, (stamp, now))
            if before == stamp and now - since >= settle_s:
                complete.append((file, stamp))
            else:
                since = since if before == stamp else now
            changing[file] = (stamp, since)
        self._changing = changing
        self._done = {file: stamp for file, stamp in self._done.items() if file in files}
        return complete

    def _report_once(self, error: OSError) -> None:
        if error.filename not in self._bad_folders:
            self._bad_folders.add(error.filename)
            report_bad_folders([error])

    async def _classify(self, files: Sequence[tuple[Path, Stamp]], stopped: asyncio.Event) -> None:
        for start in range(0, len(files), _BATCH):
            if stopped.is_set():
                return
            batch = files[start : start + _BATCH]
            # Pinned for each batch, so that later images use a new version of the label set.
            request = await self._retry(lambda: self._backend.pin(self._request), stopped)
            if request is None:
                return
            fields = {**_sidecar_fields(request), **self._sidecar.options}
            read = await asyncio.to_thread(self._outdated, [file for file, _ in batch], fields)
            contents = [content for _, content in read]
            results = await self._retry(partial(self._backend.classify, contents, request), stopped) if read else []
            if results is None:
                return
            for (file, content), result in zip(read, results, strict=True):
                await asyncio.to_thread(self._write, file, content, fields, result)
            for file, stamp in batch:
                self._done[file] = stamp
                self._changing.pop(file, None)

    def _outdated(self, files: Sequence[Path], fields: Mapping[str, Any]) -> list[tuple[Path, bytes]]:
        """Return the contents of the files whose sidecar does not match the file and the request."""
        read = []
        for file in files:
            try:
                content = read_image_file(file, self._backend.max_image_bytes)
                if self._sidecar.read_key(self._sidecar_path(file)) != (sha256_of(content), question_key(fields)):
                    read.append((file, content))
            except (UnreadableFileError, ForeignSidecarError) as error:
                warn("skipped", f"{file}: {error}")
            except OSError as error:
                warn("skipped", f"{file}: {error.strerror or type(error).__name__}")
        return read

    async def _retry(self, send: Callable[[], Coroutine[Any, Any, Result]], stopped: asyncio.Event) -> Result | None:
        """Return the result of ``send``, retried while the backend is unavailable; None if the watcher is stopped."""
        wait_s = _FIRST_WAIT_S
        while True:
            try:
                return await send()
            except (NotReadyError, UnreachableError, ProblemError) as error:
                if isinstance(error, ProblemError) and error.status not in _PASSING_STATUSES:
                    raise
                if wait_s == _FIRST_WAIT_S:
                    warn("waiting:", message_of(error))
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await stopped.wait()
            if stopped.is_set():
                return None
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)

    def _write(self, file: Path, content: bytes, fields: Mapping[str, Any], result: "ImageResult") -> None:
        if result.error is not None:
            warn("skipped", f"{file}: {result.error.detail}")
            return
        record = LabelRecord(
            sha256=sha256_of(content),
            question=fields,
            predictions=[prediction.model_dump(exclude_none=True) for prediction in result.predictions],
            rejected=result.rejected,
            prediction_set=result.prediction_set,
            labelled_at=datetime.now(UTC).isoformat(timespec="seconds"),
            version=__version__,
            labels=result.labels,
            path=None if result.path is None else [step.model_dump() for step in result.path],
        )
        sidecar_path = self._sidecar_path(file)
        try:
            self._sidecar.write(sidecar_path, record, self._min_score)
        except ForeignSidecarError as error:
            warn("skipped", f"{file}: {error}")
            return
        except OSError as error:
            problem = f"cannot be written: {error.strerror}"
            if error.errno in _DISK_ERRORS:
                # The file stays unfinished, so that the next run classifies it.
                raise InvalidFieldError.of(str(sidecar_path), problem) from error
            warn("skipped", f"{file}: its sidecar {problem}")
            return
        best = next(iter(result.predictions), None)  # there may be no discovered label
        label = "none of these" if result.label is None or best is None else f"{best.label} {best.score:.2f}"
        if result.labels:
            label = ", ".join(result.labels)
        out.print(printable(f"{file}: {label}"), highlight=False, markup=False, soft_wrap=True)

    def _sidecar_path(self, file: Path) -> Path:
        return file.with_name(file.name + self._sidecar.suffix)


async def _changes(folder: Path, stopped: asyncio.Event, *, settle_s: float, poll: bool) -> AsyncIterator[bool]:
    """Yield whether something in the folder has changed, at least every ``settle_s``, until ``stopped`` is set.

    Where the system cannot report changes, such as of a file whose name is not UTF-8, the folder counts as changed.
    """
    while not stopped.is_set():
        try:
            async for changed in watchfiles.awatch(
                folder,
                stop_event=stopped,
                step=50,
                force_polling=poll,
                poll_delay_ms=max(50, round(settle_s * 500)),
                rust_timeout=round(min(settle_s, _SCAN_INTERVAL_S) * 1000),
                yield_on_timeout=True,
                recursive=True,
                ignore_permission_denied=True,
            ):
                yield bool(changed)
        except* (WatchfilesRustInternalError, OSError, UnicodeError):
            with suppress(TimeoutError):
                async with asyncio.timeout(settle_s):
                    await stopped.wait()
        yield True


def _sidecar_fields(request: ClassifyRequest) -> dict[str, Any]:
    """Return the fields of a request that determine its results."""
    fields = {
        "labels": request.labels,
        "label_set": request.label_set,
        "model": request.model,
        "method": request.method,
        "template": request.template,
        "database": request.database,
        "options": dict(request.options) or None,
        "priors": request.priors,
        "reject_below": request.reject_below,
        "false_rejection_rate": request.false_rejection_rate,
        "reject": request.reject,
        "coverage": request.coverage,
        "multi_label": request.multi_label,
        "top_k": request.top_k,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _stamp(file: Path) -> Stamp | None:
    """Return the stamp of a file, or of a link whose target cannot be found; None for a file that has disappeared."""
    try:
        status = file.stat()
    except OSError:
        try:
            status = file.lstat()
        except OSError:
            return None
    return status.st_size, status.st_mtime_ns
