"""The server of `actstore open`: marimo's, on loopback, for requests that know the token."""

from __future__ import annotations

import os
import secrets
import socket
import sys
import threading
import webbrowser
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from importlib.resources import as_file, files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from actstore.errors import BadInput, NotStored
from actstore.store import Store

SHOWN = "ACTSTORE_STORE"  # the store that the page shows, as for the notebooks
LOOPBACK = "127.0.0.1"
SHARED: dict[str, Store] = {}  # the open store of each path, see `shared`
OPENING = threading.Lock()
NEEDED = ("marimo", "anywidget", "uvicorn")
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Scope]]
Send = Callable[[Scope], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]


def check_installed() -> None:
    """Look for what the page needs.

    Raises:
        NotStored: a library of the extra `app` is missing.
    """
    if missing := [name for name in NEEDED if not find_spec(name)]:
        raise NotStored(f"the page needs {', '.join(missing)}; install with `pip install 'actstore[app]'`")


def shared(path: str | Path) -> Store:
    """The store that all sessions of the page read: opened once, and anew after a commit.

    A large store takes seconds to open if its catalog is of an earlier version.

    Raises:
        ActstoreError: see Store.
    """
    with OPENING:
        key = str(path)
        SHARED[key] = SHARED[key].latest() if key in SHARED else Store(path)
        return SHARED[key]


def listen(port: int) -> socket.socket:
    """Listen on loopback.

    Args:
        port: 0 for any that is free.

    Raises:
        BadInput: the port is taken, or may not be used.
    """
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((LOOPBACK, port))
        listening.listen(64)
    except OSError as error:
        listening.close()
        raise BadInput(f"cannot listen on port {port} ({error.strerror}); give another --port, or none") from None
    return listening


def own_only(app: Asgi, port: int) -> Asgi:
    """Refuse requests of other sites' pages, and those that a name of another host leads here."""
    hosts = {f"{name}:{port}" for name in (LOOPBACK, "localhost")}

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
            origin = headers.get(b"origin")
            is_own = headers.get(b"host") in hosts and (origin is None or origin.removeprefix("http://") in hosts)
            if not is_own:
                await _refuse(scope["type"], send)
                return
        await app(scope, receive, send)

    return guarded


async def _refuse(kind: str, send: Send) -> None:
    if kind == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"This page is served to its own address only.\n"})


def serve(store: Path, port: int = 0, browser: bool = True, said: Callable[[str], None] = print) -> None:
    """Serve a store's page until Ctrl-C, which ends this process.

    Args:
        store: the store's folder or address; the caller has opened it, see `shared`.
        port: 0 for any that is free.
        browser: whether to open a browser at the page.
        said: called with the page's address, which holds the token.

    Raises:
        NotStored: a library is missing.
        BadInput: the port cannot be used.
    """
    check_installed()
    import marimo
    import uvicorn

    token = secrets.token_urlsafe(24)
    with listen(port) as listening, as_file(files("actstore.queries.app").joinpath("app.py")) as app:
        os.environ[SHOWN] = str(store)  # of this process from here on, which ends with the server
        at = listening.getsockname()[1]
        page = marimo.create_asgi_app(quiet=True, include_code=False, token=token).with_app(path="/", root=str(app))
        settings = uvicorn.Config(
            own_only(page.build(), at),
            log_level="critical",
            lifespan="on",
            timeout_graceful_shutdown=1,
            ws_max_size=2**28,
        )
        address = f"http://{LOOPBACK}:{at}/?access_token={token}"
        said(address)
        if browser:
            webbrowser.open(address)
        with suppress(KeyboardInterrupt):
            uvicorn.Server(settings).run(sockets=[listening])
    sys.stdout.flush()
    os._exit(0)  # threads of marimo's sessions wait for messages without an end; nothing is left to write
