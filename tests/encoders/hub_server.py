"""A server with the part of the Hugging Face hub's protocol that downloads use, and with its faults."""

import hashlib
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories by name, each with files by name, and what goes wrong.

    ``status``, ``error_code`` and ``error_message`` answer every request. ``sent`` limits the bytes of a weights file
    that the first download sends before it cuts the connection; later ones send none. ``corrupt`` sends other bytes
    of the same length. ``pause`` is called in the middle of a weights file.
    """

    def __init__(self):
        self.repositories = {}
        self.status = None
        self.error_code = None
        self.sent = None
        self.corrupt = False
        self.pause = lambda: None
        self.url = ""
        self.requests = Counter()

    def add(self, repository, folder, *, without=()):
        """Publish the files of a folder."""
        self.repositories[repository] = {
            file.name: file.read_bytes() for file in folder.iterdir() if file.name not in without
        }


@contextmanager
def running_hub():
    """Run a hub on a free port of this machine."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self._answer(with_body=False)

        def do_GET(self):
            self._answer(with_body=True)

        def _answer(self, *, with_body):
            hub.requests[self.command] += 1
            repository, _, rest = self.path.lstrip("/").partition("/resolve/")
            name = rest.partition("/")[2]
            files = hub.repositories.get(repository)
            if hub.status is not None:
                return self._refuse(hub.status, hub.error_code)
            if files is None:
                return self._refuse(404, "RepoNotFound")
            if name not in files:
                return self._refuse(404, "EntryNotFound")
            content = files[name]
            start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
            body = content[start:]
            self.send_response(206 if start else 200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if with_body:
                self._send(body, is_weights=name.startswith("open_clip_") and not name.endswith(".json"))
            return None

        def _send(self, body, *, is_weights):
            if is_weights and hub.corrupt:
                body = bytes(byte ^ 1 for byte in body[:100]) + body[100:]
            if is_weights and hub.sent is not None:
                self.wfile.write(body[: hub.sent])
                hub.sent = 0
                self.close_connection = True
                return
            half = len(body) // 2
            self.wfile.write(body[:half])
            if is_weights:
                hub.pause()
            self.wfile.write(body[half:])

        def _refuse(self, status, code):
            self.send_response(status)
            if code is not None:
                self.send_header("X-Error-Code", code)
            if code == "EntryNotFound":
                self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
