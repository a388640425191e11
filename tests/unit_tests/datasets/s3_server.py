"""The few requests of S3 that reading needs, served from memory on this machine."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class S3Server(ThreadingHTTPServer):
    """GET with ranges and conditions, and HEAD.

    Attributes:
        objects: content by "bucket/key".
        requests: method, path and range of each request.
        cut_bodies: that many bodies more end after half of what was announced.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str]] = []
        self.cut_bodies = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: S3Server

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        path = self.path.split("?")[0].lstrip("/")
        wanted = self.headers.get("Range", "")
        self.server.requests.append((self.command, path, wanted))
        content = self.server.objects.get(path)
        if content is None:
            self._send(404, _error("NoSuchKey"), {}, with_body)
            return
        etag = f'"{hashlib.md5(content).hexdigest()}"'
        if self.headers.get("If-Match", etag) != etag:
            self._send(412, _error("PreconditionFailed"), {}, with_body)
            return
        status, headers = 200, {"ETag": etag, "Accept-Ranges": "bytes"}
        if match := re.fullmatch(r"bytes=(\d+)-(\d+)", wanted):
            begin, last = map(int, match.groups())
            headers["Content-Range"] = f"bytes {begin}-{min(last, len(content) - 1)}/{len(content)}"
            status, content = 206, content[begin : last + 1]
        self._send(status, content, headers, with_body)

    def _send(self, status: int, content: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body and self.server.cut_bodies:
            self.server.cut_bodies -= 1
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
        elif with_body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def _error(code: str) -> bytes:
    return f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """A server that runs within the block."""
    server = S3Server()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
