"""Azurite, Microsoft's emulator of Azure's blobs, on loopback: npm's package `azurite`, if it is installed."""

from __future__ import annotations

import base64
import email.utils
import hashlib
import hmac
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.bucket_server import STARTS_WITHIN, free_ports

CONTAINER = "tests"
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="  # of every Azurite


def program() -> str | None:
    """Azurite's program, None if there is none on the path."""
    return shutil.which("azurite-blob")


@contextmanager
def server(folder: Path) -> Iterator[dict[str, str]]:
    """Run a server while the context lasts; gives the environment by which clients find it."""
    [port] = free_ports(1)
    options = ["--blobHost", "127.0.0.1", "--blobPort", str(port), "--location", str(folder)]
    command = [str(program()), *options, "--silent", "--skipApiVersionCheck", "--disableTelemetry"]
    started = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    endpoint = f"http://127.0.0.1:{port}/{ACCOUNT}"
    try:
        _make_container(endpoint)
        yield {
            "AZURE_STORAGE_ENDPOINT": endpoint,
            "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": KEY,
        }
    finally:
        started.kill()
        started.wait()


def _make_container(endpoint: str) -> None:
    """By a request that is signed as Azure's shared key asks."""
    date, version = email.utils.formatdate(usegmt=True), "2023-11-03"
    signed = f"PUT{chr(10) * 12}x-ms-date:{date}\nx-ms-version:{version}\n/{ACCOUNT}/{ACCOUNT}/{CONTAINER}\nrestype:container"
    key = hmac.new(base64.b64decode(KEY), signed.encode(), hashlib.sha256).digest()
    headers = {"x-ms-date": date, "x-ms-version": version}
    headers["Authorization"] = f"SharedKey {ACCOUNT}:{base64.b64encode(key).decode()}"
    asked = urllib.request.Request(f"{endpoint}/{CONTAINER}?restype=container", method="PUT", headers=headers)
    ends = time.monotonic() + STARTS_WITHIN
    while True:
        try:
            urllib.request.urlopen(asked)
            return
        except OSError:
            if time.monotonic() > ends:
                raise
            time.sleep(0.1)
