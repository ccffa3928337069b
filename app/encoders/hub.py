"""Fetches files of model repositories from the Hugging Face hub, logs the progress, and checks what is cached.

The hub library retries for a minute and reports every failure in the same words. Here, each file is requested once
without retries before it is downloaded, and each cause of a failure has a message of its own.
"""

import errno
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import structlog
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from tqdm import tqdm

from app.errors import ModelUnavailableError
from app.runtime.atomic_files import write_atomically
from app.runtime.checksums import sha256

log = structlog.get_logger()

COPY_THE_CACHE = (
    "without a network, copy the hub cache of a machine that has the files (HF_HOME or DEIXIS_MODEL_CACHE_DIR);"
    " DEIXIS_MODELS=embedded needs no download"
)

# For the whole answer about a file: a time limit of the HTTP library begins again with each byte.
_ANSWER_TIMEOUT_S = 10.0
_PROGRESS_EVERY_S = 3.0
# Of the hub library; its own 10 MB would report nothing for minutes on a slow connection.
_CHUNK_BYTES = 2**18
# A server that cannot resume a download starts it again after each cut, without end.
_MAX_RESTARTS = 5
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FORBIDDEN = (401, 403)
_MB = 1e6


class HubFiles:
    """The files that one model reads from the hub or its cache.

    After a failed request, only cached files are used, so that a start without a network takes one timeout.

    Args:
        spec: the model's name, for messages.
        cache_dir: of the hub; None is the default of the hub library.
        data_dir: where checked files are remembered; None checks them each time.
    """

    def __init__(self, spec: str, cache_dir: Path | None, data_dir: Path | None) -> None:
        self._spec = spec
        self._cache_dir = Path(constants.HF_HUB_CACHE) if cache_dir is None else cache_dir
        self._checked_dir = None if data_dir is None else data_dir / "checked-weights"
        self._failure: str | None = None
        """Why the hub is not used; None while it is."""
        if constants.is_offline_mode():
            self._failure = "HF_HUB_OFFLINE is set; unset it to download the file"

    def fetch(self, repository: str, name: str) -> Path | None:
        """Return the path of a file in the cache, after downloading it if needed; None if the repository lacks it.

        Raises:
            ModelUnavailableError: the file is not cached and cannot be downloaded, or it is damaged.
        """
        try:
            cached = try_to_load_from_cache(repository, name, cache_dir=self._cache_dir)
        except HFValidationError as error:
            raise ModelUnavailableError(
                f"model '{self._spec}' cannot be loaded: '{repository}' is not the name of a repository; write org/repo"
            ) from error
        path = Path(cached) if isinstance(cached, str) else None
        if self._failure is None:
            try:
                path = self._download(repository, name)
            except RemoteEntryNotFoundError:
                return None
            except Exception as error:
                self._failure = self._reason(repository, name, error)
                if path is None:
                    raise ModelUnavailableError(f"model '{self._spec}' cannot be loaded: {self._failure}") from error
                log.warning("cached_model_used", model=self._spec, reason=self._failure)
        if path is not None:
            self._check(path)
        return path

    def check_reachable(self) -> None:
        """Raise an error if nothing is cached and the hub does not answer; a model then cannot be loaded.

        Raises:
            ModelUnavailableError: the hub cannot be reached, or must not be used.
        """
        if any(self._cache_dir.glob("models--*")):
            return
        if self._failure is None:
            try:
                _ask(constants.ENDPOINT)
            except HfHubHTTPError:
                return  # it answers
            except Exception as error:  # noqa: BLE001 - of the HTTP library, which depends on the version
                self._failure = self._reason("", "", error)
        if self._failure is not None:
            way_out = "" if COPY_THE_CACHE in self._failure else f"; {COPY_THE_CACHE}"
            raise ModelUnavailableError(
                f"model '{self._spec}' cannot be loaded: the cache {self._cache_dir} is empty, and {self._failure}"
                f"{way_out}"
            )

    def missing(self, repository: str, names: str) -> ModelUnavailableError:
        """Return the error for files that a model needs and ``fetch`` did not find."""
        if self._failure is None:
            return ModelUnavailableError(
                f"model '{self._spec}' cannot be loaded: the repository {repository} has no {names}; choose one that"
                " was published for OpenCLIP (`deixis models list` shows recommended models)"
            )
        return ModelUnavailableError(
            f"model '{self._spec}' cannot be loaded: the cache {self._cache_dir} has no {names} of {repository}:"
            f" {self._failure}; {COPY_THE_CACHE}"
        )

    def _download(self, repository: str, name: str) -> Path:
        # Fails at once where ``hf_hub_download`` would retry.
        _ask(hf_hub_url(repository, name))
        with _logged_progress(self._spec, name) as counter:
            return Path(hf_hub_download(repository, name, cache_dir=self._cache_dir, tqdm_class=counter))

    def _reason(self, repository: str, name: str, error: Exception) -> str:
        """Return why a file could not be downloaded, and the way out, in one line."""
        hub = constants.ENDPOINT
        if isinstance(error, HfHubHTTPError):
            return _refusal(repository, name, error)
        number = error.errno if isinstance(error, OSError) else None
        if number in {errno.ENOSPC, errno.EDQUOT}:
            return (
                f"the disk of the cache {self._cache_dir} is full: free space, or set DEIXIS_MODEL_CACHE_DIR to a"
                " folder on another disk"
            )
        if number in {errno.EACCES, errno.EPERM, errno.EROFS}:
            return (
                f"the cache {self._cache_dir} cannot be written ({os.strerror(number)}): set DEIXIS_MODEL_CACHE_DIR to"
                " a folder that can"
            )
        # The hub library has changed the HTTP library whose errors it raises.
        kind, detail = type(error).__name__, " ".join(str(error).split())[:200]
        if kind in {"ConnectError", "ConnectTimeout", "ProxyError", "TimeoutError"}:
            return (
                f"{hub} cannot be reached ({detail or kind}): check the network, HTTPS_PROXY and HF_ENDPOINT;"
                f" {COPY_THE_CACHE}"
            )
        if kind == "FileMetadataError":
            return f"{hub} is not a Hugging Face hub: check HF_ENDPOINT, and proxies that answer in its place"
        return (
            f"the download of {name} of {repository} from {hub} was cut off ({kind}: {detail}): check the network and"
            f" proxies; {COPY_THE_CACHE}"
        )

    def _check(self, path: Path) -> None:
        """Compare a cached file with the SHA-256 that the name of its blob states, once per content.

        Raises:
            ModelUnavailableError: they differ.
        """
        try:
            expected = path.readlink().name
        except OSError:
            return  # a cache without symbolic links does not record the hash
        if _SHA256.fullmatch(expected) is None:
            return  # small files are named by another hash
        blob = path.resolve()
        status = blob.stat()
        state = f"{blob} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
        remembered = None if self._checked_dir is None else self._checked_dir / expected
        with suppress(OSError, UnicodeDecodeError):
            if remembered is not None and remembered.read_text(encoding="utf-8") == state:
                return
        began = time.perf_counter()
        actual = sha256(blob)
        log.info(
            "weights_checked",
            model=self._spec,
            file=path.name,
            mb=round(status.st_size / _MB, 1),
            seconds=round(time.perf_counter() - began, 2),
        )
        if actual != expected:
            raise ModelUnavailableError(
                f"model '{self._spec}' cannot be loaded: {blob} is damaged: its SHA-256 is {actual[:12]}..., and its"
                f" name says {expected[:12]}...; delete this file, and the next start with a network downloads it"
            )
        if remembered is not None:
            with suppress(OSError):  # the next start checks it again
                remembered.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(remembered, state)


def _ask(url: str) -> None:
    """Request the metadata of a file, which takes much less time than a download and its retries.

    Raises:
        TimeoutError: there is no answer in time; the thread that waits for it does not delay the end of the process.
    """
    answers: SimpleQueue[BaseException | None] = SimpleQueue()

    def wait() -> None:
        try:
            get_hf_file_metadata(url, timeout=2 * _ANSWER_TIMEOUT_S)
        except BaseException as error:  # noqa: BLE001 - raised by the thread that has asked
            answers.put(error)
        else:
            answers.put(None)

    threading.Thread(target=wait, name="hub-request", daemon=True).start()
    try:
        error = answers.get(timeout=_ANSWER_TIMEOUT_S)
    except Empty:
        msg = f"no answer within {_ANSWER_TIMEOUT_S:g} s"
        raise TimeoutError(msg) from None
    if error is not None:
        raise error


def _refusal(repository: str, name: str, error: HfHubHTTPError) -> str:
    hub, status = constants.ENDPOINT, error.response.status_code
    if isinstance(error, GatedRepoError):
        return (
            f"the repository {repository} is gated: request access at {hub}/{repository}, and set HF_TOKEN to a"
            " token of that account"
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{hub} has no repository {repository}, or it is private ({status}): check the name; a private"
            " repository needs HF_TOKEN"
        )
    if status in _FORBIDDEN:
        return (
            f"{hub} refused access to {repository} ({status}): set HF_TOKEN to a valid token of an account that may"
            f" read {hub}/{repository}"
        )
    return (
        f"{hub} answered {status} for {name} of {repository}: the fault is on that server; wait until it is repaired,"
        f" or set HF_ENDPOINT to another one; {COPY_THE_CACHE}"
    )


class _Counter(tqdm):  # type: ignore[misc]
    """Counts bytes in place of the hub library's progress bar."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "disable": True})
        self.restarts = 0

    def update(self, n: float | None = 1) -> bool | None:
        """Add ``n`` bytes; a negative number means that the download starts again."""
        self.n += n or 0
        if n is not None and n < 0:
            self.restarts += 1
            if self.restarts > _MAX_RESTARTS:
                msg = f"the server cannot resume it, and it was cut {self.restarts} times"
                raise ConnectionError(msg)
        return None


@contextmanager
def _logged_progress(model: str, file: str) -> Iterator[Any]:
    """Yield what makes the hub library's progress bars, and log their progress every few seconds and at the end."""
    bars: list[_Counter] = []
    began = time.perf_counter()
    done = threading.Event()

    def new_bar(**options: Any) -> _Counter:
        bars.append(_Counter(**options))
        return bars[-1]

    def report(event: str) -> None:
        bar, seconds = bars[0], time.perf_counter() - began
        log.info(
            event,
            model=model,
            file=file,
            mb=round(bar.n / _MB, 1),
            of_mb=None if bar.total is None else round(bar.total / _MB, 1),
            mb_per_s=round(bar.n / _MB / seconds, 2),
        )

    def report_until_done() -> None:
        while not done.wait(_PROGRESS_EVERY_S):
            if bars:
                report("model_downloading")

    reporter = threading.Thread(target=report_until_done, name="download-progress", daemon=True)
    chunk_bytes, constants.DOWNLOAD_CHUNK_SIZE = constants.DOWNLOAD_CHUNK_SIZE, _CHUNK_BYTES
    reporter.start()
    try:
        yield new_bar
        if bars:
            report("model_downloaded")
    finally:
        constants.DOWNLOAD_CHUNK_SIZE = chunk_bytes
        done.set()
        reporter.join()
