"""A proxy before an S3 server that drops connections, answers in the server's place, or is slow."""

from __future__ import annotations

import email.utils
import http.client
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Fault = str  # "refuse" (nothing is sent on), "lost" (done, and no answer), "torn" (half of a body), a status such as "409", or ""
Choose = Callable[[str, str], Fault]  # takes method and path of a request


class Cutting(ThreadingHTTPServer):
    """Sends requests on to `upstream`, but for the faults that `choose` names."""

    daemon_threads = True
    choose: Choose
    upstream: str
    failing: dict[str, Fault]  # kind of request, see kind_of → its fault
    told = ""  # what the server says beside a status that it answers with
    count: Callable[[str], None]  # takes the kind of each request, see kind_of
    delay = 0.0  # seconds before each request is sent on
    ahead = 0.0  # seconds by which the server's clock, as its answers have it, is ahead of this machine's
    bytes_per_second = 0.0  # of a body, of the answer or of the request; 0: as fast as it comes


def kind_of(method: str, path: str, headers: Mapping[str, str]) -> str:
    """head, list, get, get_ranges, create (If-None-Match), swap (If-Match), put or delete."""
    if method == "PUT":
        return "create" if "If-None-Match" in headers else "swap" if "If-Match" in headers else "put"
    if method == "GET":
        return "list" if "list-type" in path else "get_ranges" if "Range" in headers else "get"
    return (
        "delete"
        if method == "DELETE" or (method == "POST" and path.endswith(("?delete", "?delete=")))
        else method.lower()
    )


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Cutting

    def handle_one(self) -> None:
        body = self._body(int(self.headers.get("Content-Length") or 0))
        kind = kind_of(self.command, self.path, self.headers)
        self.server.count(kind)
        fault = self.server.choose(self.command, self.path) or self.server.failing.get(kind, "")
        time.sleep(self.server.delay)
        if fault == "refuse":
            return self._drop()
        if fault.isdigit():
            return self._answer(int(fault), [], self.server.told.encode())
        is_put = self.command == "PUT"
        upstream = http.client.HTTPConnection(self.server.upstream)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                upstream.putheader(name, value)
            upstream.endheaders()
            if fault == "torn" and is_put:
                upstream.send(body[: len(body) // 2])
                return self._drop()
            upstream.send(body)
            answer = upstream.getresponse()
            content = answer.read()
        finally:
            upstream.close()
        if fault == "lost":
            return self._drop()
        headers = [
            (name, self._later(value) if name.lower() == "last-modified" else value)
            for name, value in answer.getheaders()
            if name.lower() not in ("transfer-encoding", "connection")
        ]
        return self._answer(answer.status, headers, content, fault == "torn")

    def _later(self, when: str) -> str:
        return email.utils.format_datetime(
            email.utils.parsedate_to_datetime(when) + timedelta(seconds=self.server.ahead), usegmt=True
        )

    def _body(self, size: int) -> bytes:
        if not (speed := self.server.bytes_per_second):
            return self.rfile.read(size)
        parts = []
        for start in range(0, size, 1 << 16):
            parts.append(self.rfile.read(min(1 << 16, size - start)))
            time.sleep(len(parts[-1]) / speed)
        return b"".join(parts)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = handle_one  # noqa: N815 - the names that the base class calls

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes, torn: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if not any(name.lower() == "content-length" for name, _ in headers):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if torn:
            content = content[: len(content) // 2]
        if speed := self.server.bytes_per_second:
            for start in range(0, len(content), 1 << 14):
                self.wfile.write(content[start : start + (1 << 14)])
                time.sleep((1 << 14) / speed)
        else:
            self.wfile.write(content)
        if torn:
            self._drop()

    def _drop(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(2)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def cutting(upstream: str, choose: Choose = lambda method, path: "") -> Iterator[tuple[str, Cutting]]:
    """Run a proxy before a server, `http://127.0.0.1:port`; gives its own address, and itself."""
    with Cutting(("127.0.0.1", 0), _Handler) as server:
        server.choose, server.upstream, server.failing = choose, upstream.removeprefix("http://"), {}
        server.count = lambda kind: None
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", server
        finally:
            server.shutdown()
