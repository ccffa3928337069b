"""Brings the images of Label Studio's tasks, from wherever a task says they are, within bounds.

What Label Studio keeps is asked of it, with its token, which nobody else is shown: uploads (``/data/upload/...``),
local storage (``/data/local-files/?d=...``), its proxy (``/storage-data/...``) and cloud storage (``s3://...``,
``gs://...``, ``azure-blob://...``), for which it signs an address. Other addresses must be public, unless a host is
trusted.
"""

import asyncio
import base64
import binascii
import json
import re
import time
from collections.abc import Mapping, Sequence
from urllib.parse import parse_qs, quote, unquote, unquote_to_bytes, urlencode

import httpx

from app.errors import ClientError, ImageTooLargeError, InvalidFieldError, UnreachableImageError
from app.images.fetch import Allowance, ImageFetcher, ImageUrl

_MAX_HOPS = 5
_MAX_SOURCE_CHARS = 4096
# An access token is asked for anew when it has so little time left.
_MARGIN_S = 30.0
_MAX_TOKEN_ANSWER_BYTES = 64 * 1024
_CLOUD = re.compile(r"(s3|gs|azure-blob)://", re.IGNORECASE)
_OWN_PATHS = ("/data/", "/storage-data/", "/tasks/")
_DATA_URL = re.compile(r"data:([^,]*),", re.IGNORECASE)


class TaskImages:
    """Brings images.

    Args:
        label_studio: its address, ``http://host:port``; None where images are elsewhere.
        token: of an account that may see them: a legacy token, or a personal access token.
        trusted_hosts: ``host`` or ``host:port`` that may be asked although they are not public.
        max_bytes: of an image.
        timeout_s: for an image, with all redirects.
        public: fetches from public addresses.
        transport: of httpx, in place of the network.
    """

    def __init__(
        self,
        *,
        label_studio: str | None,
        token: str | None,
        trusted_hosts: Sequence[str] = (),
        max_bytes: int,
        timeout_s: float,
        public: ImageFetcher | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._own = None if label_studio is None else _checked(label_studio)
        self._token = token or None
        self._trusted = {each.lower() for each in trusted_hosts}
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._public = public or ImageFetcher(max_bytes=max_bytes, timeout_s=timeout_s)
        self._http = httpx.AsyncClient(transport=transport, timeout=timeout_s, follow_redirects=False)
        self._access: tuple[str, float] | None = None
        self._refreshing = asyncio.Lock()

    async def aclose(self) -> None:
        """Close the connections."""
        self._public.close()
        await self._http.aclose()

    async def fetch(self, source: str, task: int | str | None = None) -> bytes:
        """Return an image's bytes.

        Args:
            source: as the task has it.
            task: its id, by which Label Studio signs addresses of cloud storage.

        Raises:
            ClientError: it cannot be had, or is too large.
        """
        if match := _DATA_URL.match(source):
            return self._decoded(match[1], source[match.end() :])
        if len(source) > _MAX_SOURCE_CHARS:
            raise _refused(f"an address of {len(source):,} characters; at most {_MAX_SOURCE_CHARS:,} are allowed")
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._first_of(self._places(source, task))
        except TimeoutError:
            raise UnreachableImageError(f"'{_shown(source)}' was not there within {self._timeout_s:g} s") from None

    def _decoded(self, head: str, body: str) -> bytes:
        if len(body) > 2 * self._max_bytes + 1024:
            raise self._too_large("the task's data URL")
        try:
            if head.lower().endswith(";base64"):
                content = base64.b64decode(unquote_to_bytes(body), validate=True)
            else:
                content = unquote_to_bytes(body)
        except (binascii.Error, ValueError):
            raise _refused("the data URL of the task is not base64") from None
        if len(content) > self._max_bytes:
            raise self._too_large("the task's data URL")
        return content

    def _places(self, source: str, task: int | str | None) -> list[httpx.URL]:
        """Return the addresses to try, one after the other."""
        if _CLOUD.match(source):
            if task is None:
                raise _refused(f"'{_shown(source)}' is in a storage that needs the id of the task, which is missing")
            signed = base64.urlsafe_b64encode(source.encode()).decode()
            return [
                self._of_label_studio(f"/tasks/{quote(str(task), safe='')}/presign/?{urlencode({'fileuri': signed})}")
            ]
        if source.lower().startswith(("http://", "https://")):
            try:
                return [httpx.URL(source)]
            except httpx.InvalidURL:
                raise _refused(f"'{_shown(source)}' is no address") from None
        path = source if source.startswith("/") else f"/{source}"
        if path.startswith("/upload/"):
            path = f"/data{path}"
        if not path.startswith(_OWN_PATHS) or _leads_up(path):
            raise _refused(
                f"'{_shown(source)}' is no address of an image; http(s), data URLs, cloud storage and Label Studio's"
                " own files are fetched"
            )
        places = [self._of_label_studio(path)]
        if path.startswith("/data/upload/"):
            # Where uploads are in a cloud, only the proxy has them; with a web server before it, only the path.
            key = path.removeprefix("/data/")
            places.insert(0, self._of_label_studio(f"/storage-data/uploaded/?{urlencode({'filepath': key})}"))
        elif path.startswith("/storage-data/uploaded/"):
            keys = parse_qs(path.partition("?")[2]).get("filepath", [])
            places += [self._of_label_studio(f"/data/{quote(key)}") for key in keys[:1] if not _leads_up(key)]
        return places

    def _of_label_studio(self, path: str) -> httpx.URL:
        if self._own is None:
            raise _refused(f"'{_shown(path)}' is kept by Label Studio; tell its address in LABEL_STUDIO_URL")
        try:
            return httpx.URL(str(self._own).rstrip("/") + path)
        except httpx.InvalidURL:
            raise _refused(f"'{_shown(path)}' is no address") from None

    async def _first_of(self, places: Sequence[httpx.URL]) -> bytes:
        for place in places[:-1]:
            try:
                return await self._followed(place)
            except UnreachableImageError:
                continue
        return await self._followed(places[-1])

    async def _followed(self, url: httpx.URL) -> bytes:
        for _ in range(_MAX_HOPS):
            is_own = self._own is not None and _origin(url) == _origin(self._own)
            if not (is_own or self._is_trusted(url)):
                found = await self._public.fetch(ImageUrl(str(url)), Allowance(self._max_bytes))
                if isinstance(found, InvalidFieldError):
                    raise _refused(f"{found.problems[0].problem}; a host of your own network is named by --trust-host")
                if isinstance(found, ClientError):
                    raise found
                return found
            headers = await self._authorization() if is_own else {}
            answer = await self._asked(url, headers)
            if isinstance(answer, bytes):
                return answer
            if is_own and "/user/login" in answer.path:
                raise UnreachableImageError(
                    f"Label Studio wants a token for '{_shown(url.path)}'; set LABEL_STUDIO_API_KEY"
                )
            url = answer
        raise UnreachableImageError(f"'{url.host}' redirects more than {_MAX_HOPS} times")

    async def _asked(self, url: httpx.URL, headers: Mapping[str, str]) -> bytes | httpx.URL:
        """Return the image, or where the answer leads to."""
        try:
            async with self._http.stream("GET", url, headers=dict(headers)) as answer:
                if answer.is_redirect and answer.next_request is not None:
                    return answer.next_request.url
                if answer.status_code in {401, 403}:
                    raise UnreachableImageError(
                        f"'{url.host}' refuses '{_shown(url.path)}' ({answer.status_code}); see whether the token in"
                        " LABEL_STUDIO_API_KEY is valid and its account may see the project"
                    )
                if answer.status_code != httpx.codes.OK:
                    raise UnreachableImageError(
                        f"'{url.host}' answered {answer.status_code} instead of an image for '{_shown(url.path)}'"
                    )
                received = bytearray()
                async for piece in answer.aiter_bytes():
                    received += piece
                    if len(received) > self._max_bytes:
                        raise self._too_large(f"the image at '{url.host}'")
                return bytes(received)
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
            raise UnreachableImageError(f"'{url.host}' gave no proper answer ({type(error).__name__})") from error

    def _is_trusted(self, url: httpx.URL) -> bool:
        return url.scheme in {"http", "https"} and not self._trusted.isdisjoint({url.host, url.netloc.decode("ascii")})

    async def _authorization(self) -> dict[str, str]:
        """Return the header that shows the token, in the form that its kind needs."""
        if self._token is None:
            return {}
        claims = _claims(self._token)
        if claims is None:
            return {"Authorization": f"Token {self._token}"}
        if claims.get("token_type") != "refresh":
            return {"Authorization": f"Bearer {self._token}"}
        async with self._refreshing:
            if self._access is None or self._access[1] - time.time() < _MARGIN_S:
                self._access = await self._refreshed(self._token)
            return {"Authorization": f"Bearer {self._access[0]}"}

    async def _refreshed(self, token: str) -> tuple[str, float]:
        """Return an access token for a personal access token, and when it ends."""
        assert self._own is not None
        try:
            answer = await self._http.post(f"{str(self._own).rstrip('/')}/api/token/refresh/", json={"refresh": token})
            access = answer.json()["access"] if answer.is_success else None
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise UnreachableImageError(
                f"Label Studio gave no access for its token ({type(error).__name__})"
            ) from error
        if not isinstance(access, str) or len(access) > _MAX_TOKEN_ANSWER_BYTES:
            raise UnreachableImageError(
                f"Label Studio does not take the token in LABEL_STUDIO_API_KEY ({answer.status_code}); make a new one"
            )
        ends_at = (_claims(access) or {}).get("exp")
        return access, float(ends_at) if isinstance(ends_at, int | float) else time.time() + 2 * _MARGIN_S

    def _too_large(self, what: str) -> ImageTooLargeError:
        return ImageTooLargeError(f"{what} has more than {self._max_bytes:,} bytes; raise DEIXIS_MAX_IMAGE_BYTES")


def _checked(address: str) -> httpx.URL:
    """Return an address of Label Studio.

    Raises:
        InvalidFieldError: it is none.
    """
    try:
        url = httpx.URL(address)
    except httpx.InvalidURL as error:
        raise InvalidFieldError.of("LABEL_STUDIO_URL", f"'{address[:200]}' is no address: {error}") from error
    if url.scheme not in {"http", "https"} or not url.host:
        raise InvalidFieldError.of("LABEL_STUDIO_URL", f"'{address[:200]}' is not of the form http://host:port")
    return url


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port


def _claims(token: str) -> Mapping[str, object] | None:
    """Return what a JSON web token says, unverified; None for a token of another kind."""
    parts = token.split(".")
    if len(parts) != 3:
        return None
    try:
        claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    except ValueError:
        return None
    return claims if isinstance(claims, dict) else None


def _leads_up(path: str) -> bool:
    return ".." in unquote(path.partition("?")[0]).split("/")


def _shown(text: str) -> str:
    """Return the beginning of a source, without a query, which may be a signature."""
    return text.partition("?")[0][:200]


def _refused(problem: str) -> InvalidFieldError:
    return InvalidFieldError.of("image", problem)
