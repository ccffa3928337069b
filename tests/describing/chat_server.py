"""A scripted chat endpoint on a loopback socket: it responds, fails, delays or disconnects.

In a test: ``with ChatServer([failing(500)]) as server`` and ``server.url``. As a separate process, which outlives the
server under test: ``python -m tests.describing.chat_server --port 0 --log FILE``.
"""

import argparse
import hashlib
import json
import socket
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

MODEL = "scripted-1"


@dataclass(frozen=True)
class Step:
    """The response to one request: ``body``, or without it a chat completion with ``choices`` answers if it is set."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    choices: int | None = None
    waits: bool = False
    cut: bool = False


@dataclass(frozen=True)
class Received:
    """A received request; the names of headers are in lower case."""

    path: str
    headers: Mapping[str, str]
    body: Mapping

    @property
    def prompt(self) -> str:
        return self.body["messages"][-1]["content"]


def ok(**headers: str) -> Step:
    """Respond as requested, with these headers: ``x_name="1"`` is sent as ``x-name: 1``."""
    return Step(headers={name.replace("_", "-"): value for name, value in headers.items()})


def failing(status: int, message: str = "it went wrong", code: str | None = None, **headers: str) -> Step:
    """Respond with an error in the format of OpenAI."""
    error = {"message": message, "type": "scripted", "param": None, "code": code}
    return Step(status, ok(**headers).headers, json.dumps({"error": error}).encode())


def full(retry_after: str | None = None, **headers: str) -> Step:
    """Respond with status 429."""
    wait = {} if retry_after is None else {"retry_after": retry_after}
    return failing(429, "too many requests", "rate_limit_exceeded", **wait, **headers)


def slow() -> Step:
    """Respond when ``release`` of the server is set, or when it closes."""
    return Step(waits=True)


def cut() -> Step:
    """Close the connection in the middle of the response."""
    return Step(cut=True)


def giving(choices: int) -> Step:
    """Respond with at most this number of choices."""
    return Step(choices=choices)


def saying(body: bytes, status: int = 200, **headers: str) -> Step:
    """Respond with these bytes."""
    return Step(status, ok(**headers).headers, body)


def malformed() -> Step:
    """Respond with incomplete JSON."""
    return saying(b'{"choices": [{"mess')


def without_choices() -> Step:
    """Respond with an empty list of choices."""
    return saying(b'{"choices": [], "model": "scripted-1"}')


def without_text() -> Step:
    """Respond with a choice whose content is null."""
    return saying(b'{"choices": [{"finish_reason": "length", "message": {"content": null}}]}')


def answer_to(prompt: str, index: int) -> str:
    """Return the answer to a prompt; it depends only on the prompt and the index.

    A prompt that asks for a list gets a list.
    """
    digest = hashlib.sha256(f"{index} {prompt}".encode()).hexdigest()
    if "\n- " in prompt:
        return "\n".join(f"- mark {digest[at : at + 6]} on its side" for at in (0, 6, 12))
    return f"It has the mark {digest[:12]} on its side."


class ChatServer:
    """An endpoint that takes one step of its script per request, in order, and then ``afterwards``.

    ``key`` is the only accepted API key, if it is set. ``received`` has every request, and ``received_one`` is set by
    the first one. ``release`` ends the delay of slow responses, and ``log_file`` gets one JSON string per prompt before
    the response.
    """

    def __init__(
        self,
        script: Iterable[Step] = (),
        *,
        afterwards: Step | None = None,
        key: str | None = None,
        port: int = 0,
        log_file: Path | None = None,
        delay_s: float = 0,
    ) -> None:
        self.received: list[Received] = []
        self.received_one = threading.Event()
        self.release = threading.Event()
        self._script = iter(script)
        self._afterwards = afterwards or ok()
        self._key = key
        self._delay_s = delay_s
        self._lock = threading.Lock()
        self._log = None if log_file is None else log_file.open("a", encoding="utf-8")
        self._listener = _Listener(("127.0.0.1", port), _Handler)
        self._listener.chat = self
        self.url = f"http://127.0.0.1:{self._listener.server_port}/v1"

    def __enter__(self) -> "ChatServer":
        self._thread = threading.Thread(target=self.serve, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown()
        self._thread.join()
        self.close()

    def serve(self) -> None:
        """Serve until the process or the block ends."""
        self._listener.serve_forever(poll_interval=0.01)

    def close(self) -> None:
        """Close all connections."""
        self.release.set()
        self._listener.hang_up()
        self._listener.server_close()
        if self._log is not None:
            self._log.close()

    @property
    def prompts(self) -> list[str]:
        """The received prompts, in order."""
        return [item.prompt for item in self.received]

    def take(self, received: Received) -> Step:
        """Record a request and return its step."""
        if received.path != "/v1/chat/completions":
            return failing(404, f"no such path: {received.path}")
        given = received.headers.get("authorization", "").removeprefix("Bearer ")
        with self._lock:
            self.received.append(received)
            self.received_one.set()
            if self._log is not None:
                self._log.write(json.dumps(received.prompt) + "\n")
                self._log.flush()
            if self._key is not None and given != self._key:
                return failing(401, f"incorrect API key provided: {given}", "invalid_api_key")
            return next(self._script, self._afterwards)

    def wait_for(self, step: Step) -> None:
        """Wait until the response of a step is due."""
        if step.waits:
            self.release.wait()
        elif self._delay_s:
            self.release.wait(self._delay_s)


class _Listener(ThreadingHTTPServer):
    daemon_threads = False  # so that closing waits for them
    request_queue_size = 128
    chat: ChatServer

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self._open: set[socket.socket] = set()
        self._open_lock = threading.Lock()

    def process_request(self, request, client_address) -> None:
        with self._open_lock:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request) -> None:
        with self._open_lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        with self._open_lock:
            for item in self._open:
                with suppress(OSError):
                    item.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Listener

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["content-length"]))
        headers = {name.lower(): value for name, value in self.headers.items()}
        received = Received(self.path, headers, json.loads(raw))
        step = self.server.chat.take(received)
        self.server.chat.wait_for(step)
        body = _completion(received, step.choices) if step.body is None else step.body
        # The client has disconnected after its timeout.
        with suppress(ConnectionError):
            self._send(step, body)

    def _send(self, step: Step, body: bytes) -> None:
        self.send_response(step.status)
        for name, value in {"content-type": "application/json", **step.headers}.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if step.cut:
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        else:
            self.wfile.write(body)

    def handle(self) -> None:
        with suppress(ConnectionError):
            super().handle()

    def log_message(self, *_: object) -> None:
        """Log nothing; requests are in ``received``."""


def _completion(received: Received, at_most: int | None) -> bytes:
    wanted = received.body.get("n", 1)
    texts = [answer_to(received.prompt, index) for index in range(wanted if at_most is None else min(wanted, at_most))]
    prompt_tokens, completion_tokens = len(received.prompt.split()), sum(len(text.split()) for text in texts)
    return json.dumps(
        {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 0,
            "model": MODEL,
            "choices": [
                {"index": index, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
                for index, text in enumerate(texts)
            ],
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": completion_tokens,
                "total_tokens": prompt_tokens + completion_tokens,
            },
        }
    ).encode()


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve scripted chat completions until killed.")
    parser.add_argument("--port", type=int, default=0, help="by default a free port")
    parser.add_argument("--log", type=Path, help="file for one line of JSON per prompt")
    parser.add_argument("--key", help="the only accepted key; by default no key is required")
    parser.add_argument("--delay-ms", type=float, default=0, help="delay of each response")
    parser.add_argument("--choices", type=int, help="maximum number of choices in a response")
    chosen = parser.parse_args()
    server = ChatServer(
        afterwards=Step(choices=chosen.choices),
        key=chosen.key,
        port=chosen.port,
        log_file=chosen.log,
        delay_s=chosen.delay_ms / 1000,
    )
    print(server.url, flush=True)  # noqa: T201 - the parent reads it
    try:
        server.serve()
    except KeyboardInterrupt:
        server.close()


if __name__ == "__main__":
    main()
