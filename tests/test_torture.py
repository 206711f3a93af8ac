"""A little of `make torture`: kills at random moments, and readers beside a writer; each in a process that can fork."""

import subprocess
import sys

import pytest


def run(module, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", f"tests.torture.{module}", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("seed", ["1"])
def test_twenty_kills_leave_no_difference(seed):
    said = run("kills", "20", "--seed", seed)
    assert [line.split(":")[0] for line in said.splitlines()] == [
        "ingest_kills",
        "train_kills",
        "study_kills",
        "repair_kills",
    ]
    assert sum(int(line.split()[1]) for line in said.splitlines()) >= 20
    assert said.count("0 differences") == 4


def test_a_connection_that_ends_in_the_middle_of_a_shard_loses_nothing():
    said = run("buckets", "--only", "shards", "--share", "0.2")
    assert "in the middle of each shard, put and read, once and for good" in said


def test_readers_beside_a_writer_see_one_snapshot_each():
    assert "each of one snapshot" in run("readers", "--trees", "80", "--readers", "8")


def test_flipped_bits_are_found_and_mended():
    assert "all found, all mended" in run("flips", "6", "--seed", "3")


def test_a_disk_that_fails_at_any_call_leaves_a_known_state():
    said = run("faults", "--share", "0.012", "--seed", "5")
    if said.startswith("skipped"):
        pytest.skip(said.strip())
    assert "each left a known state, and went on to the same bytes" in said


def test_a_power_cut_loses_no_commit_that_was_reported():
    said = run("power", "2", "--seed", "2")
    if said.startswith("skipped"):
        pytest.skip(said.strip())
    assert said.rstrip().endswith("0 lost")
