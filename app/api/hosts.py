"""Rules for the headers Host, Origin and Sec-Fetch-Site, so that a web page cannot drive a service without keys.

A page of any site can send requests to a server that only its visitor can reach. Browsers do not let it read the
responses of another origin, but the requests have their effect. If the page's own name is made to resolve to the
server (DNS rebinding), the browser takes both for one origin, and the page can read everything. A page has no API key,
so a service that requires keys does not need these rules.
"""

import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address

from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.errors import problem_response
from app.errors import CrossSiteError, DeixisError, MalformedRequestError, MisdirectedRequestError

_AUTHORITY = r"(\[[0-9a-f:.]+(?:%[^\]\s]*)?\]|[^\s:/@\[\]\\?#,]*)(?::(\d*))?"
_HOST = re.compile(_AUTHORITY, re.IGNORECASE)
_ORIGIN = re.compile(rf"(https?)://{_AUTHORITY}", re.IGNORECASE)
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_DEFAULT_PORTS = {"http": "80", "https": "443"}

# Names that nobody can register: those of cluster services and of the host of a container.
_PRIVATE_SUFFIXES = (".svc", ".cluster.local", ".internal")
# The names by which containers reach a service on the loopback address of their host.
_FROM_CONTAINERS = frozenset({"host.docker.internal", "host.containers.internal"})
_MAX_SHOWN_CHARS = 200
# Values of Host whose answer is kept; a service has one or two names.
_CACHED_HOSTS = 64


class HostRules:
    """Decides which hosts a service without keys answers for, and which pages may change its state.

    Args:
        listens_on: the address or name that the service listens on.
        allowed_hosts: further host names, as ``deixis.example.com`` or ``*.example.com``; ``*`` allows every host.
        cors_origins: origins whose pages may call the service; ``*`` allows every origin.
    """

    def __init__(self, listens_on: str, allowed_hosts: Sequence[str] = (), cors_origins: Sequence[str] = ()) -> None:
        own = _normalised(listens_on)
        address = _address(own)
        self._is_local = own == "localhost" if address is None else address.is_loopback
        self._allowed = frozenset(_normalised(host) for host in allowed_hosts)
        self._allowed_suffixes = tuple(host[1:] for host in self._allowed if host.startswith("*."))
        self._own = {"localhost", own, *_FROM_CONTAINERS, *(() if self._is_local else _machine_names())}
        self._origins = frozenset(origin.lower() for origin in cors_origins)
        self._answers_for = lru_cache(_CACHED_HOSTS)(self._find_answer_for)

    def problem(self, scope: Scope) -> DeixisError | None:
        """Return why a request is refused; None if it is not."""
        headers = scope["headers"]
        # Only programs send no Host; a browser always does.
        host = next((value.decode("latin-1") for name, value in headers if name == b"host"), "")
        if host and not self._answers_for(host):
            return MisdirectedRequestError(
                f"this service does not answer for the host '{host[:_MAX_SHOWN_CHARS]}', because it needs no API key"
                " and a web page could reach it under that name; add the name to DEIXIS_ALLOWED_HOSTS, or require keys"
            )
        if scope["method"] in _SAFE_METHODS:
            return None
        sites = [value for name, value in headers if name == b"sec-fetch-site"]
        if sites in ([b"same-origin"], [b"none"]):
            return None
        origins = [value.decode("latin-1").lower() for name, value in headers if name == b"origin"]
        if not sites and not origins:
            return None  # no browser
        if len(origins) == 1 and self._is_allowed(origins[0], host, knows_site=bool(sites)):
            return None
        origin = f"of the origin '{origins[0][:_MAX_SHOWN_CHARS]}'" if origins else "of another origin"
        return CrossSiteError(
            f"a page {origin} may not send {scope['method']} requests to this service, which needs no API key; add its"
            " origin to DEIXIS_CORS_ORIGINS, or the service's public host name to DEIXIS_ALLOWED_HOSTS"
        )

    def _find_answer_for(self, host: str) -> bool:
        match = _HOST.fullmatch(host)
        return match is not None and self._is_served(_normalised(match[1]))

    def _is_served(self, name: str) -> bool:
        if "*" in self._allowed or name in self._own or self._is_listed(name):
            return True
        address = _address(name)
        if address is not None:
            # Nobody can make an address resolve to another one.
            return not self._is_local or address.is_loopback
        return not self._is_local and ("." not in name or name.endswith(_PRIVATE_SUFFIXES))

    def _is_listed(self, name: str) -> bool:
        return name in self._allowed or name.endswith(self._allowed_suffixes)

    def _is_allowed(self, origin: str, host: str, *, knows_site: bool) -> bool:
        if origin in self._origins or "*" in self._origins:
            return True
        match = _ORIGIN.fullmatch(origin)
        if knows_site or match is None:
            return False
        # The browser sent no Sec-Fetch-Site, as over plain HTTP. A proxy may have changed Host.
        scheme, name, port = match.groups()
        name = _normalised(name)
        own = _HOST.fullmatch(host)
        default_port = _DEFAULT_PORTS[scheme]
        return self._is_listed(name) or (
            own is not None and _normalised(own[1]) == name and (own[2] or default_port) == (port or default_port)
        )


class HostCheck:
    """Refuses what ``HostRules`` refuses, while requests need no key.

    Args:
        app: the wrapped application.
        rules: the rules.
        needs_key: whether requests need an API key at this time.
    """

    def __init__(self, app: ASGIApp, *, rules: HostRules, needs_key: Callable[[], Awaitable[bool]]) -> None:
        self._app = app
        self._rules = rules
        self._needs_key = needs_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle the request with the wrapped application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal: DeixisError | None = None
        hosts = sum(name == b"host" for name, _ in scope["headers"])
        if hosts > 1:
            refusal = MalformedRequestError(f"the request has {hosts} Host headers; send one")
        elif (problem := self._rules.problem(scope)) is not None and not await self._needs_key():
            refusal = problem
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            # The body is not read.
            await problem_response(refusal, {"Connection": "close"})(scope, receive, send)


def _normalised(host: str) -> str:
    """Return a host name or address in lower case, without brackets, zone and final dot, and names in ASCII."""
    name = host.lower().removeprefix("[").removesuffix("]").partition("%")[0].removesuffix(".")
    try:
        return name if name.isascii() else name.encode("idna").decode()
    except UnicodeError:
        return name


def _address(name: str) -> IPv4Address | IPv6Address | None:
    try:
        address = ip_address(name)
    except ValueError:
        return None
    return (isinstance(address, IPv6Address) and address.ipv4_mapped) or address


def _machine_names() -> set[str]:
    name = socket.gethostname().lower()
    return {name, f"{name.partition('.')[0]}.local"}
