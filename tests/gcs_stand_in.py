"""A stand-in for Google Cloud Storage in memory: objects by the XML API, with generations and conditions.

It is no real server. It follows what the XML API documents of PUT, GET, HEAD, DELETE and lists, as far as obstore asks.
"""

from __future__ import annotations

import email.utils
import itertools
import json
import re
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from xml.sax.saxutils import escape

BUCKET = "tests"
Object = tuple[bytes, int, float]  # content, generation, when it was put


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int]) -> None:
        super().__init__(address, _Handler)
        self.objects: dict[str, Object] = {}
        self.generations = itertools.count(1000)
        self.lock = threading.Lock()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def handle_one(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, _, query = self.path.partition("?")
        bucket, _, key = urllib.parse.unquote(path[1:]).partition("/")
        if bucket != BUCKET:
            return self._answer(404, b"<Error><Code>NoSuchBucket</Code></Error>")
        with self.server.lock:
            if not key:
                return self._list(dict(urllib.parse.parse_qsl(query)))
            return self._put(key, content) if self.command == "PUT" else self._get_or_delete(key)

    do_GET = do_PUT = do_HEAD = do_DELETE = handle_one  # noqa: N815 - the names that the base class calls

    def _put(self, key: str, content: bytes) -> None:
        generation = self.server.objects[key][1] if key in self.server.objects else 0
        wanted = self.headers.get("x-goog-if-generation-match")
        if wanted is not None and int(wanted) != generation:
            return self._answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
        self.server.objects[key] = content, next(self.server.generations), time.time()
        return self._answer(200, b"", self.server.objects[key])

    def _get_or_delete(self, key: str) -> None:
        if key not in self.server.objects:
            return self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        if self.command == "DELETE":
            del self.server.objects[key]
            return self._answer(204, b"")
        found = self.server.objects[key]
        if asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            first, last = int(asked[1]), min(int(asked[2]), len(found[0]) - 1)
            where = {"Content-Range": f"bytes {first}-{last}/{len(found[0])}"}
            return self._answer(206, found[0][first : last + 1], found, where)
        return self._answer(200, found[0], found)

    def _list(self, query: dict[str, str]) -> None:
        found = sorted(item for item in self.server.objects.items() if item[0].startswith(query.get("prefix", "")))
        listed = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(content)}</Size><ETag>{generation}</ETag>"
            f"<LastModified>{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime(put))}</LastModified></Contents>"
            for key, (content, generation, put) in found
        )
        self._answer(200, f"<ListBucketResult>{listed}</ListBucketResult>".encode())

    def _answer(
        self, status: int, content: bytes, of: Object | None = None, more: dict[str, str] | None = None
    ) -> None:
        self.send_response_only(status)
        if of:
            self.send_header("ETag", f'"{of[1]}"')
            self.send_header("x-goog-generation", str(of[1]))
            self.send_header("Last-Modified", email.utils.formatdate(of[2], usegmt=True))
        for name, value in (more or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def stand_in(account: Path) -> Iterator[dict[str, str]]:
    """Run it while the context lasts; gives the environment by which clients find it.

    Args:
        account: where to write the file of an account that needs no key.
    """
    with _Server(("127.0.0.1", 0)) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            url = f"http://127.0.0.1:{server.server_address[1]}"
            about = {
                "gcs_base_url": url,
                "disable_oauth": True,
                "client_email": "",
                "private_key": "",
                "private_key_id": "",
            }
            account.write_text(json.dumps(about))
            yield {"GOOGLE_SERVICE_ACCOUNT": str(account), "GOOGLE_BASE_URL": url}
        finally:
            server.shutdown()
