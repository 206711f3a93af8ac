"""Cut the power of a disk at random moments during an ingest: what was reported as committed must be there, whole.

    python -m tests.torture.power 40        # as root, where loop devices can be mounted; else it says so and skips

The disk is ext4 on a loop device, shut down by EXT4_IOC_SHUTDOWN without flushing its journal: what was written and not
synced is lost, as when the power goes.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import fcntl
import random
import signal
import struct
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from tests.torture.kills import N_TREES, PER_SHARD, ingest, same_store
from tests.torture.template import check, fork, wait

EXT4_IOC_SHUTDOWN = 0x8004587D  # _IOR('X', 125, __u32), linux/fs/ext4/ext4.h
NO_LOG_FLUSH = 2
MEGABYTES = 96
N_COMMITS = 1 + N_TREES // PER_SHARD  # of the whole ingest: its definition, and its batches
PATIENCE = 60.0  # seconds for them


def run(*command: str | Path) -> None:
    subprocess.run([str(part) for part in command], check=True, capture_output=True)


def cannot() -> str:
    """Why no disk can be cut off here; nothing where one can."""
    if os.geteuid():
        return "only root can mount a loop device"
    with tempfile.TemporaryDirectory() as folder:
        image, mounted = Path(folder) / "disk", Path(folder) / "mounted"
        mounted.mkdir()
        try:
            make_disk(image)
            run("mount", "-o", "loop", image, mounted)
            run("umount", mounted)
        except (OSError, subprocess.CalledProcessError) as error:
            return f"no ext4 can be made and mounted on a loop device here ({error})"
    return ""


def make_disk(image: Path) -> None:
    with image.open("wb") as file:
        file.truncate(MEGABYTES << 20)
    run("mkfs.ext4", "-q", "-F", image)


def cut(image: Path, mounted: Path, whole: Path, model: object, rng: random.Random) -> tuple[int, int]:
    """One cut. Returns how many commits had been reported, and how many there are after it."""
    make_disk(image)
    run("mount", "-o", "loop", image, mounted)
    root, told = mounted / "s.act", image.with_name("told")
    told.write_text("")

    def work() -> None:
        from actstore.commits import log
        from actstore.commits.manifest import Manifest

        commit = log.commit

        def reporting(at: Path, manifest: Manifest, before: Manifest | None = None) -> Manifest:
            published = commit(at, manifest, before)
            with told.open("a") as file:  # on a disk that keeps its power
                file.write(f"{manifest.number}\n")
            return published

        log.commit = reporting
        ingest(root, model)

    child = fork(work)
    wanted, until = rng.randint(0, N_COMMITS - 1), time.monotonic() + PATIENCE
    while len(told.read_text().split()) < wanted and time.monotonic() < until:
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.2))  # somewhere within the next commit, or the catalog after it
    descriptor = os.open(mounted, os.O_RDONLY)
    fcntl.ioctl(descriptor, EXT4_IOC_SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
    os.close(descriptor)
    reported = len(told.read_text().split())  # what is reported from here on is of a disk that is gone
    os.kill(child, signal.SIGKILL)
    wait(child)
    run("umount", mounted)
    run("mount", "-o", "loop", image, mounted)
    try:
        if reported or (root / "store.json").exists():
            check(lambda: look(root, reported))
        there = len(list((root / "log").glob("*.json"))) if (root / "log").exists() else 0
        check(lambda: ingest(root, model))
        check(lambda: same_store(root, whole))
    finally:
        run("umount", mounted)
    return reported, there


def look(root: Path, reported: int) -> None:
    """Every commit that was reported is there, and every file that one names is whole."""
    from actstore.upkeep.verify import verify

    report = verify(root)
    lost = [finding for finding in report.damage if finding.kind != "catalog"]
    assert not lost, lost
    there = len(list((root / "log").glob("*.json")))
    assert there >= reported, f"{reported} commits were reported, {there} are there"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("cuts", type=int, nargs="?", default=40)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    if why := cannot():
        print(f"skipped: {why}")
        return
    torch.set_num_threads(1)
    from tests.test_pipeline import small_model

    model, rng = small_model(), random.Random(asked.seed)
    with tempfile.TemporaryDirectory() as folder:
        image, mounted, whole = Path(folder) / "disk", Path(folder) / "mounted", Path(folder) / "whole.act"
        mounted.mkdir()
        check(lambda: ingest(whole, model))
        found = [cut(image, mounted, whole, model, rng) for _ in range(asked.cuts)]
    print(f"{asked.cuts} cuts, {sum(reported for reported, _ in found)} commits reported before them, 0 lost")


if __name__ == "__main__":
    main()
