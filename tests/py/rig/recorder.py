"""Stands between a client and a server on loopback, and keeps what was asked and how it was answered."""

from __future__ import annotations

import http.client
import json
import threading
import urllib.parse
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from .http import TIMEOUT_S

NOT_FORWARDED = {"error": {"type": "invalid_request_error", "message": "There is nobody behind the recorder."}}
# Of one connection, so they are not passed on.
HOP_HEADERS = {"connection", "keep-alive", "transfer-encoding", "content-length", "host"}


@dataclass(frozen=True)
class Exchange:
    """A request as it arrived, its headers in lower case, and the answer."""

    method: str
    path: str
    headers: dict[str, str]
    body: str
    status: int
    answer: str

    @property
    def form(self) -> dict[str, str]:
        """The parameters, of the body or the query."""
        text = self.body or urllib.parse.urlsplit(self.path).query
        return dict(urllib.parse.parse_qsl(text, keep_blank_values=True, strict_parsing=bool(text)))


class Recorder:
    """Passes everything on to an address, or answers 400 to everything when there is none."""

    def __init__(self, upstream: str | None = None) -> None:
        self.requests: list[Exchange] = []
        recorder = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = TIMEOUT_S

            def do_GET(self) -> None:
                body = read_body(self)
                headers = {name.lower(): value for name, value in self.headers.items()}
                status, answered, data = forward(upstream, self.command, self.path, headers, body)
                told = Exchange(self.command, self.path, headers, body.decode(), status, data.decode())
                recorder.requests.append(told)
                self.send_response(status)
                for name, value in answered:
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_POST = do_DELETE = do_GET

            def log_message(self, *_: Any) -> None:
                """Says nothing: what there is to know is kept."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(TIMEOUT_S)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def read_body(request: BaseHTTPRequestHandler) -> bytes:
    if request.headers.get("Transfer-Encoding", "").lower() != "chunked":
        return request.rfile.read(int(request.headers.get("Content-Length") or 0))
    body = b""
    while True:
        chunk = request.rfile.read(int(request.rfile.readline().split(b";")[0], 16))
        # A line end, or the empty line after the last chunk; the SDKs send no trailers.
        request.rfile.readline()
        if not chunk:
            return body
        body += chunk


def forward(
    upstream: str | None, method: str, path: str, headers: dict[str, str], body: bytes
) -> tuple[int, list[tuple[str, str]], bytes]:
    if upstream is None:
        return 400, [("Content-Type", "application/json")], json.dumps(NOT_FORWARDED).encode()
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(upstream).netloc, timeout=TIMEOUT_S)
    try:
        kept = {name: value for name, value in headers.items() if name not in HOP_HEADERS}
        connection.request(method, path, body or None, kept)
        answer = connection.getresponse()
        data = answer.read()
        return answer.status, [pair for pair in answer.getheaders() if pair[0].lower() not in HOP_HEADERS], data
    finally:
        connection.close()
