"""Fetches the images of Label Studio's tasks, with limits on size and time.

Images that Label Studio stores are fetched from it with its token, which is sent to no other host: uploads
(``/data/upload/...``), local storage (``/data/local-files/?d=...``), its proxy (``/storage-data/...``) and cloud
storage (``s3://...``, ``gs://...``, ``azure-blob://...``), for which it signs an address. Other addresses must be
public, unless their host is trusted.
"""

import asyncio
import base64
import json
import re
import time
from collections.abc import Mapping, Sequence
from urllib.parse import parse_qs, quote, unquote, urlencode

import httpx

from app.errors import ClientError, ImageTooLargeError, InvalidFieldError, UnreachableImageError
from app.images.data_urls import is_data_url, read_image_text
from app.images.fetch import Allowance, ImageFetcher, ImageUrl

_MAX_HOPS = 5
_MAX_SOURCE_CHARS = 4096
# An access token is renewed this long before it expires.
_MARGIN_S = 30.0
_MAX_TOKEN_ANSWER_BYTES = 64 * 1024
_CLOUD = re.compile(r"(s3|gs|azure-blob)://", re.IGNORECASE)
_OWN_PATHS = ("/data/", "/storage-data/", "/tasks/")


class TaskImages:
    """Fetches images.

    Args:
        label_studio: address of Label Studio, ``http://host:port``; None if it stores no images.
        token: a legacy token or a personal access token of an account that may read the images.
        trusted_hosts: ``host`` or ``host:port`` from which images are fetched although they are not public.
        max_bytes: limit of an image.
        timeout_s: limit of the time for an image, including redirects.
        public: fetches images from public addresses.
        transport: an httpx transport that replaces the network.
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
        self._trusted = {host.lower() for host in trusted_hosts}
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
        """Return the bytes of an image.

        Args:
            source: the location in the task.
            task: the id of the task, which Label Studio needs to sign addresses of cloud storage.

        Raises:
            ClientError: the image cannot be fetched, or is too large.
        """
        if is_data_url(source):
            return self._decoded(source)
        if len(source) > _MAX_SOURCE_CHARS:
            raise _refused(f"an address of {len(source):,} characters; at most {_MAX_SOURCE_CHARS:,} are allowed")
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._fetch_first(self._addresses(source, task))
        except TimeoutError:
            raise UnreachableImageError(f"'{_shown(source)}' was not received within {self._timeout_s:g} s") from None

    def _decoded(self, data_url: str) -> bytes:
        if len(data_url) > 2 * self._max_bytes + 1024:
            raise self._too_large("the task's data URL")
        content = read_image_text(data_url)
        if len(content) > self._max_bytes:
            raise self._too_large("the task's data URL")
        return content

    def _addresses(self, source: str, task: int | str | None) -> list[httpx.URL]:
        """Return the addresses to try in order."""
        if _CLOUD.match(source):
            if task is None:
                raise _refused(
                    f"'{_shown(source)}' is in cloud storage, and the id of the task that it needs is missing"
                )
            if str(task) in {"", ".", ".."}:  # a client would remove it from the path of the request
                raise _refused(f"'{task}' is not the id of a task; send the task as Label Studio does")
            signed = base64.urlsafe_b64encode(source.encode()).decode()
            return [
                self._of_label_studio(f"/tasks/{quote(str(task), safe='')}/presign/?{urlencode({'fileuri': signed})}")
            ]
        if source.lower().startswith(("http://", "https://")):
            try:
                return [httpx.URL(source)]
            except httpx.InvalidURL:
                raise _refused(f"'{_shown(source)}' is not a valid address") from None
        path = source if source.startswith("/") else f"/{source}"
        if path.startswith("/upload/"):
            path = f"/data{path}"
        if not path.startswith(_OWN_PATHS) or _leads_up(path):
            raise _refused(
                f"'{_shown(source)}' is not the location of an image; use an http(s) or data URL, cloud storage or a"
                " file of Label Studio"
            )
        addresses = [self._of_label_studio(path)]
        if path.startswith("/data/upload/"):
            # The proxy serves uploads in cloud storage, and the path those behind a web server.
            key = path.removeprefix("/data/")
            addresses.insert(0, self._of_label_studio(f"/storage-data/uploaded/?{urlencode({'filepath': key})}"))
        elif path.startswith("/storage-data/uploaded/"):
            keys = parse_qs(path.partition("?")[2]).get("filepath", [])
            addresses += [self._of_label_studio(f"/data/{quote(key)}") for key in keys[:1] if not _leads_up(key)]
        return addresses

    def _of_label_studio(self, path: str) -> httpx.URL:
        if self._own is None:
            raise _refused(f"'{_shown(path)}' is stored by Label Studio; set its address in LABEL_STUDIO_URL")
        try:
            return httpx.URL(str(self._own).rstrip("/") + path)
        except httpx.InvalidURL:
            raise _refused(f"'{_shown(path)}' is not a valid address") from None

    async def _fetch_first(self, addresses: Sequence[httpx.URL]) -> bytes:
        for address in addresses[:-1]:
            try:
                return await self._follow(address)
            except UnreachableImageError:
                continue
        return await self._follow(addresses[-1])

    async def _follow(self, url: httpx.URL) -> bytes:
        for _ in range(_MAX_HOPS):
            is_own = self._own is not None and _origin(url) == _origin(self._own)
            if not (is_own or self._is_trusted(url)):
                found = await self._public.fetch(ImageUrl(str(url)), Allowance(self._max_bytes))
                if isinstance(found, InvalidFieldError):
                    raise _refused(f"{found.problems[0].problem}; name a host of your own network by --trust-host")
                if isinstance(found, ClientError):
                    raise found
                return found
            headers = await self._authorization() if is_own else {}
            answer = await self._request(url, headers)
            if isinstance(answer, bytes):
                return answer
            if is_own and "/user/login" in answer.path:
                raise UnreachableImageError(
                    f"Label Studio requires a token for '{_shown(url.path)}'; set LABEL_STUDIO_API_KEY"
                )
            url = answer
        raise UnreachableImageError(f"'{url.host}' redirects more than {_MAX_HOPS} times")

    async def _request(self, url: httpx.URL, headers: Mapping[str, str]) -> bytes | httpx.URL:
        """Return the image, or the target of a redirect."""
        try:
            async with self._http.stream("GET", url, headers=dict(headers)) as answer:
                if answer.is_redirect and answer.next_request is not None:
                    return answer.next_request.url
                if answer.status_code in {401, 403}:
                    raise UnreachableImageError(
                        f"'{url.host}' refuses '{_shown(url.path)}' ({answer.status_code}); check that the token in"
                        " LABEL_STUDIO_API_KEY is valid and its account can read the project"
                    )
                if answer.status_code != httpx.codes.OK:
                    raise UnreachableImageError(
                        f"'{url.host}' answered {answer.status_code} instead of an image for '{_shown(url.path)}'"
                    )
                received = bytearray()
                async for chunk in answer.aiter_bytes():
                    received += chunk
                    if len(received) > self._max_bytes:
                        raise self._too_large(f"the image at '{url.host}'")
                return bytes(received)
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
            raise UnreachableImageError(f"'{url.host}' gave no valid response ({type(error).__name__})") from error

    def _is_trusted(self, url: httpx.URL) -> bool:
        return url.scheme in {"http", "https"} and not self._trusted.isdisjoint({url.host, url.netloc.decode("ascii")})

    async def _authorization(self) -> dict[str, str]:
        """Return the header with the token, in the form that its kind requires."""
        if self._token is None:
            return {}
        claims = _claims(self._token)
        if claims is None:
            return {"Authorization": f"Token {self._token}"}
        if claims.get("token_type") != "refresh":
            return {"Authorization": f"Bearer {self._token}"}
        async with self._refreshing:
            if self._access is None or self._access[1] - time.time() < _MARGIN_S:
                self._access = await self._refresh(self._token)
            return {"Authorization": f"Bearer {self._access[0]}"}

    async def _refresh(self, token: str) -> tuple[str, float]:
        """Return an access token for a personal access token, and the time at which it expires."""
        assert self._own is not None
        try:
            answer = await self._http.post(f"{str(self._own).rstrip('/')}/api/token/refresh/", json={"refresh": token})
            access = answer.json()["access"] if answer.is_success else None
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise UnreachableImageError(f"Label Studio returned no access token ({type(error).__name__})") from error
        if not isinstance(access, str) or len(access) > _MAX_TOKEN_ANSWER_BYTES:
            raise UnreachableImageError(
                f"Label Studio refuses the token in LABEL_STUDIO_API_KEY ({answer.status_code}); create a new one"
            )
        expires_at = (_claims(access) or {}).get("exp")
        return access, float(expires_at) if isinstance(expires_at, int | float) else time.time() + 2 * _MARGIN_S

    def _too_large(self, what: str) -> ImageTooLargeError:
        return ImageTooLargeError(f"{what} has more than {self._max_bytes:,} bytes; raise DEIXIS_MAX_IMAGE_BYTES")


def _checked(address: str) -> httpx.URL:
    """Return the address of Label Studio as a URL.

    Raises:
        InvalidFieldError: the address is invalid.
    """
    try:
        url = httpx.URL(address)
    except httpx.InvalidURL as error:
        raise InvalidFieldError.of("LABEL_STUDIO_URL", f"'{address[:200]}' is not a valid address: {error}") from error
    if url.scheme not in {"http", "https"} or not url.host:
        raise InvalidFieldError.of("LABEL_STUDIO_URL", f"'{address[:200]}' is not of the form http://host:port")
    return url


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port


def _claims(token: str) -> Mapping[str, object] | None:
    """Return the unverified claims of a JSON web token; None for a token of another kind."""
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
    """Return the beginning of a source without its query, which may be a signature."""
    return text.partition("?")[0][:200]


def _refused(problem: str) -> InvalidFieldError:
    return InvalidFieldError.of("image", problem)
