"""The commit: published once, durable before it is named, whole or not there; the lease; the sweep."""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.commits import log
from actstore.commits.manifest import Dropped, Manifest, Part, Shard, manifest_path
from actstore.errors import Busy, Damaged, NoRoom
from actstore.storage.at import check_room
from actstore.storage.backend import File
from actstore.storage.lease import lease
from actstore.storage.local import Local
from actstore.storage.whole import BLOCK, DIRECT_FROM
from tests.stores import committed_files, fake, files, folders

# Publishing.


def test_what_is_published_is_there_and_described(tmp_path: Path) -> None:
    file = Local(tmp_path).publish("parts/trees/x.parquet", b"content")
    assert file == File("parts/trees/x.parquet", 7, xxhash.xxh3_128_hexdigest(b"content"))
    assert files(tmp_path) == {"parts/trees/x.parquet": b"content"}
    assert (tmp_path / file.path).stat().st_mode & 0o777 == 0o444


def test_the_first_writer_wins(tmp_path: Path) -> None:
    first = Local(tmp_path).publish("log/x", b"first")
    assert Local(tmp_path).publish("log/x", b"first") == first
    with pytest.raises(Damaged, match="log/x exists with other content"):
        Local(tmp_path).publish("log/x", b"other")
    assert files(tmp_path) == {"log/x": b"first"}


def test_short_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, content: write(descriptor, bytes(content[:3])))
    Local(tmp_path).publish("x", b"0123456789")
    assert files(tmp_path) == {"x": b"0123456789"}


def fail_at(patch: pytest.MonkeyPatch, call: str, turn: int, error: BaseException, after: bool = False) -> None:
    """Let the turn-th call of os.<call> raise, before it does what it should, or after."""
    real: Callable[..., Any] = getattr(os, call)
    left = [turn]

    def failing(*args: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0]:
            return real(*args, **options)
        if after:
            real(*args, **options)
        raise error

    patch.setattr(os, call, failing)


CALLS = [  # of one publication into a new folder: mkdir, fsync of its parent; then the file; then fsync of the folder
    *[("mkdir", 1), ("open", 1), ("fsync", 1), ("open", 2), ("write", 1), ("fchmod", 1), ("fsync", 2)],
    *[("link", 1), ("unlink", 1), ("open", 3), ("fsync", 3)],
]


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize(("call", "turn"), CALLS)
def test_a_failure_anywhere_leaves_nothing_and_the_next_try_goes_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, turn: int, reason: int
) -> None:
    with monkeypatch.context() as patch:
        fail_at(patch, call, turn, OSError(reason, os.strerror(reason), "somewhere"))
        with pytest.raises(OSError, match=os.strerror(reason)) as caught:
            Local(tmp_path).publish("new/x", b"content")
    assert isinstance(caught.value, NoRoom) == (reason != errno.EIO)
    if isinstance(caught.value, NoRoom):
        assert "new/x (7 bytes)" in str(caught.value)
    assert files(tmp_path) == {}
    if (call, turn) in CALLS[:3]:
        assert folders(tmp_path) == set(), "a folder that may not be durable must be made again"
    Local(tmp_path).publish("new/x", b"content")
    assert files(tmp_path) == {"new/x": b"content"}


def test_the_calls_listed_are_all_that_a_publication_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [call for call, _ in traced(monkeypatch, lambda: Local(tmp_path).publish("new/x", b"content"))]
    assert sorted(made) == sorted(call for call, _ in CALLS if call in made)
    assert {call for call, _ in CALLS} - set(made) == {"open", "write", "fchmod"}


def test_a_file_too_large_for_the_limits_is_no_room(tmp_path: Path) -> None:
    """The kernel itself refuses here, in the middle of a write."""
    code = """
import resource, sys
from pathlib import Path
from actstore.storage.local import Local
from actstore.errors import NoRoom
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    Local(Path(sys.argv[1])).publish("x", bytes(20_000))
except NoRoom as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"no room for {tmp_path / 'x'} (20,000 bytes): File too large; free some, then go on"
    assert files(tmp_path) == {}


# Durability. A disk may lose, when the power is cut, whatever was not fsynced: contents of files, entries of folders.


def traced(patch: pytest.MonkeyPatch, act: Callable[[], object]) -> list[tuple[str, tuple[str, ...]]]:
    """The calls that an action makes to os.mkdir, fsync, link, unlink, replace and rename, with their paths."""
    calls: list[tuple[str, tuple[str, ...]]] = []

    def recording(call: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(*args: Any, **options: Any) -> Any:
            paths = (
                [os.readlink(f"/proc/self/fd/{args[0]}")] if call == "fsync" else args[: 2 if n_paths[call] == 2 else 1]
            )
            done = real(*args, **options)
            calls.append((call, tuple(os.path.abspath(path) for path in paths)))
            return done

        return recorded

    n_paths = {"mkdir": 1, "fsync": 1, "link": 2, "unlink": 1, "replace": 2, "rename": 2}
    with patch.context() as context:
        for call in n_paths:
            context.setattr(os, call, recording(call, getattr(os, call)))
        act()
    return calls


class Disk:
    """What of a store would be there after a power cut, by the calls made so far."""

    def __init__(self) -> None:
        self.synced: set[str] = set()  # names whose content is durable
        self.pending: dict[str, set[str]] = {}  # folder → entries it would forget

    def apply(self, call: str, paths: tuple[str, ...]) -> None:
        if call == "fsync":
            self.synced.add(paths[0])
            self.pending.pop(paths[0], None)
        elif call in ("mkdir", "link", "replace", "rename"):
            self.pending.setdefault(os.path.dirname(paths[-1]), set()).add(paths[-1])
            if paths[0] in self.synced:
                self.synced.add(paths[-1])

    def holds(self, path: Path) -> bool:
        """Whether the file's content and every folder's entry on the way to it are durable."""
        forgotten = set().union(*self.pending.values())
        return str(path) in self.synced and not {str(path), *map(str, path.parents)} & forgotten


def test_when_a_manifest_is_linked_all_that_it_names_would_outlive_a_power_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, disk, seen = tmp_path / "new" / "s.act", Disk(), 0
    for call, paths in traced(monkeypatch, lambda: fake().store(root)):
        if call == "link" and Path(paths[1]).parent == root / "log":
            manifest = Manifest.from_json(Path(paths[1]).read_bytes(), Path(paths[1]))
            for file in manifest.files:
                name = Path(str(root / file.path))
                assert disk.holds(name), f"{file.path} is named by commit {manifest.number} before it is durable"
            assert paths[0] in disk.synced, "a manifest is linked before its content is durable"
            seen += 1
        disk.apply(call, paths)
    assert seen == len(log.manifests(root)) == 3
    for path in [*(root / "log").iterdir(), root / "catalog.duckdb"]:
        assert disk.holds(path), f"{path} is not durable when the store is closed"


def test_a_catalog_is_durable_before_it_takes_the_place_of_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, disk = tmp_path / "s.act", Disk()
    fake().store(root, [0])
    calls = traced(monkeypatch, lambda: fake().store(root, [1]))
    replaced = [turn for turn, (call, _) in enumerate(calls) if call == "replace"]
    assert len(replaced) == 2  # the note of its hash before it
    for number, turn in enumerate(replaced):
        for call, paths in calls[replaced[0] if number else 0 : turn]:
            disk.apply(call, paths)
        assert calls[turn][1][0] in disk.synced
    assert calls[replaced[0] + 1] == ("fsync", (str(root),))


# Manifests.

names = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8)
paths = st.lists(st.from_regex(r"[\w=,+-][\w. =,+-]{0,8}", fullmatch=True), min_size=1, max_size=4).map("/".join)
sizes, counts = st.integers(0, 2**62 - 1), st.integers(0, 2**31 - 1)
hashes, tables = (
    st.text("0123456789abcdef", min_size=32, max_size=32),
    st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True),
)
a_file = st.builds(File, paths, sizes, hashes)
a_part = st.builds(
    Part,
    *(paths, sizes, hashes),
    table=tables,
    rows=sizes,
    owner=names,
    batch=st.none() | counts,
    first_tree_id=st.none() | counts,
    n_trees=st.none() | st.integers(1, 2**31 - 1),
)
a_shard = st.builds(
    Shard,
    paths,
    sizes,
    hashes,
    run=names,
    site=names,
    batch=counts,
    first_tree_id=counts,
    n_trees=st.integers(1, 2**31 - 1),
)
a_drop = st.builds(
    Dropped,
    kind=st.sampled_from(["run", "dataset", "label"]),
    name=names,
    files=st.lists(paths, max_size=3),
    token_id=sizes,
    sequence_id=sizes,
)
a_manifest = st.builds(
    Manifest,
    number=st.integers(1, 2**31 - 1),
    kind=st.sampled_from(["run", "batch", "results", "labels", "site", "drop"]),
    run=st.none() | names,
    batch=st.none() | counts,
    parts=st.lists(a_part, max_size=3),
    shards=st.lists(a_shard, max_size=3),
    others=st.lists(a_file, max_size=3),
    dropped=st.none() | a_drop,
    previous=st.none() | hashes,
)


@given(a_manifest)
def test_a_manifest_is_read_back_as_it_was_written(manifest: Manifest) -> None:
    assert Manifest.from_json(manifest.to_json(), Path("x")) == manifest


@given(a_manifest, st.data())
def test_a_flipped_bit_or_a_cut_manifest_never_passes_for_another(manifest: Manifest, data: st.DataObject) -> None:
    content = bytearray(manifest.to_json())
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    cut = manifest.to_json()[: data.draw(st.integers(0, len(content) - 1))]
    for wrong in (bytes(content), cut):
        with suppress(Damaged):
            assert Manifest.from_json(wrong, Path("x")) == manifest


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"null", b'"x"', b"{}", b"\xff", b'{"checksum": 1}'])
def test_what_is_no_manifest_is_damaged(content: bytes) -> None:
    with pytest.raises(Damaged, match="cannot be read"):
        Manifest.from_json(content, Path("x"))


@pytest.mark.parametrize("wrong", [{"parts": 3}, {"parts": [3]}, {"shards": [{"path": "x"}]}, {"colour": "red"}])
def test_a_manifest_of_other_fields_is_damaged_though_its_checksum_is_right(wrong: dict[str, object]) -> None:
    body = json.loads(Manifest(1, "run").to_json()) | wrong
    del body["checksum"]
    checksum = xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())
    with pytest.raises(Damaged, match="cannot be read"):
        Manifest.from_json(json.dumps({**body, "checksum": checksum}).encode(), Path("x"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A log of four commits."""
    committed: list[Manifest] = []
    for number in range(1, 5):
        before = committed[-1] if committed else None
        committed.append(log.commit(tmp_path, Manifest(number, "batch", "r", number), before))
    return tmp_path


def test_manifests_come_in_order_from_any_number_on(root: Path) -> None:
    for name in ("notes.json", "5.json", ".00000005.json.77.tmp", "00000005.json.orig"):
        (root / "log" / name).write_text("not a manifest")
    assert [manifest.number for manifest in log.manifests(root)] == [1, 2, 3, 4]
    assert [manifest.number for manifest in log.manifests(root, after=2)] == [3, 4]
    assert log.manifests(root, after=4) == []


def test_a_manifest_names_the_one_before_it(root: Path) -> None:
    first, second, third, fourth = log.manifests(root)
    assert first.previous is None
    for before, manifest in ((first, second), (second, third), (third, fourth)):
        assert manifest.previous == xxhash.xxh3_128_hexdigest((root / manifest_path(before.number)).read_bytes())


@pytest.mark.parametrize("edited", [1, 2, 3])
def test_an_edit_of_a_past_manifest_shows_though_its_checksum_is_right(root: Path, edited: int) -> None:
    path = root / manifest_path(edited)
    manifest = replace(log.read_manifest(root, edited), run="another")
    path.unlink()
    path.write_bytes(manifest.to_json())
    for after in range(edited + 1):
        with pytest.raises(
            Damaged, match=f"manifest {edited} is not the one that manifest {edited + 1} was written after"
        ):
            log.manifests(root, after=after)


@pytest.mark.parametrize("change", [{"previous": None}, {"previous": None, "format": 2}])
def test_a_chain_that_was_cut_shows(root: Path, change: dict[str, Any]) -> None:
    path = root / manifest_path(3)
    cut = replace(log.read_manifest(root, 3), **change)
    path.unlink()
    path.write_bytes(cut.to_json())
    with pytest.raises(Damaged, match="manifest 2 is not the one that manifest 3 was written after"):
        log.manifests(root)


def test_the_hash_of_a_log_follows_from_every_manifest_and_can_be_gone_on_with(root: Path) -> None:
    committed = log.manifests(root)
    assert log.log_hash(committed[2:], log.log_hash(committed[:2])) == log.log_hash(committed)
    assert len({log.log_hash(committed[:n]) for n in range(5)}) == 5
    assert log.log_hash([replace(committed[0], xxh3_128="0"), *committed[1:]]) != log.log_hash(committed)


@pytest.mark.parametrize("gone", [1, 2, 3])
def test_a_gap_is_damaged_and_named(root: Path, gone: int) -> None:
    (root / "log" / f"{gone:08d}.json").unlink()
    with pytest.raises(Damaged, match=f"lacks manifest {gone} of 4"):
        log.manifests(root)


def test_a_log_shorter_than_its_catalog_says_is_damaged(root: Path) -> None:
    (root / "log" / "00000004.json").unlink()
    assert len(log.manifests(root, least=3)) == 3
    with pytest.raises(Damaged, match="lacks manifest 4 of 4"):
        log.manifests(root, least=4)


def test_a_manifest_under_anothers_name_is_damaged(root: Path) -> None:
    content = (root / "log" / "00000004.json").read_bytes()
    (root / "log" / "00000003.json").unlink()
    (root / "log" / "00000003.json").write_bytes(content)
    with pytest.raises(Damaged, match=r"00000003\.json is number 4"):
        log.manifests(root)


# The lease.

HOLD = """
import sys
from pathlib import Path
from actstore.storage.lease import lease
with lease(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(root: Path, *arguments: str | bytes) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that holds the lease."""
    command = [sys.executable, "-c", HOLD, str(root), *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_second_writer_is_told_who_the_first_is(tmp_path: Path) -> None:
    with holder(tmp_path, "ingest", b"caf\xe9 \xff.act", "a\nb") as process:
        with (
            pytest.raises(
                Busy, match=f"is being written by process {process.pid} on .* ingest .*; wait for it"
            ) as caught,
            lease(tmp_path),
        ):
            pass
        assert "\n" not in str(caught.value)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(timeout=10) == 0
    with lease(tmp_path):
        pass


def test_a_killed_holder_leaves_no_lock(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=10)
    with lease(tmp_path), pytest.raises(Busy, match=f"by process {os.getpid()} "), lease(tmp_path):
        pass


def test_an_error_while_the_lease_is_held_gives_it_back(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), lease(tmp_path):
        raise RuntimeError
    with lease(tmp_path):
        pass


# The sweep.


def test_a_sweep_removes_what_no_manifest_names_and_nothing_else(tmp_path: Path) -> None:
    root = tmp_path / "s.act"
    fake().store(root)
    before, before_folders = files(root), folders(root)
    junk = {
        *("log/.00000004.json.77.tmp", "log/notes", "parts/trees/d-000009.parquet", "parts/new/x.parquet"),
        *("activations.zarr/r/blocks.0.hook_resid_post/c/7/0/0", "activations.zarr/gone/zarr.json", "models/x"),
    }
    for path in junk:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"junk")
    (root / "parts/empty/deep").mkdir(parents=True)
    mine = {"README.md": b"mine", ".notes.tmp": b"mine", "figures/a.png": b"mine"}
    for path, content in mine.items():
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_bytes(content)
    (root / ".catalog.duckdb.77.tmp").write_bytes(b"junk")
    (root / ".catalog.duckdb.77.tmp.wal").write_bytes(b"junk")
    assert log.sweep(root, log.manifests(root)) == sorted(junk)
    assert files(root) == before | mine
    assert folders(root) == before_folders | {"figures"}
    assert log.sweep(root, log.manifests(root)) == []


@given(st.sets(st.sampled_from(["a", "b", "a/c", "a/d", "b/c/e", "b/c/f"])))
@settings(max_examples=25)
def test_a_sweep_keeps_exactly_the_files_that_are_committed(
    tmp_path_factory: pytest.TempPathFactory, kept: set[str]
) -> None:
    root, here = tmp_path_factory.mktemp("sweep"), {"a/c", "a/d", "b/c/e", "b/c/f", "g"}
    published = {path: Local(root).publish(f"parts/{path}", path.encode()) for path in here}
    manifest = Manifest(1, "batch", others=[published[path] for path in kept & here])
    log.commit(root, manifest)
    log.sweep(root, [manifest])
    assert {path for path in files(root) if path.startswith("parts/")} == {f"parts/{path}" for path in kept & here}


def test_missing_and_shortened_files_are_found_by_size(tmp_path: Path) -> None:
    file = Local(tmp_path).publish("a/b", b"content")
    committed = [Manifest(1, "batch"), Manifest(2, "batch", others=[file])]
    log.check_sizes(tmp_path, committed)
    (tmp_path / "a" / "b").chmod(0o644)
    (tmp_path / "a" / "b").write_bytes(b"conten")
    with pytest.raises(Damaged, match=re.escape("a/b is 6 bytes long, not 7; commit 2 names it")):
        log.check_sizes(tmp_path, committed)
    (tmp_path / "a" / "b").unlink()
    with pytest.raises(Damaged, match="a/b is missing; commit 2"):
        log.check_sizes(tmp_path, committed)


# Room.


def test_room_is_asked_for_where_the_store_will_be(tmp_path: Path) -> None:
    free = check_room(tmp_path / "not" / "there", 0, "it")
    assert free > 0
    with pytest.raises(NoRoom, match=f"the run needs .* GB and the disk of {tmp_path}/not/there has .* GB free"):
        check_room(tmp_path / "not" / "there", free * 1000, "the run")
    assert list(tmp_path.iterdir()) == []


def test_the_same_inputs_give_the_same_committed_bytes(tmp_path: Path) -> None:
    fake().store(tmp_path / "a.act")
    fake().store(tmp_path / "b.act")
    assert committed_files(tmp_path / "a.act") == committed_files(tmp_path / "b.act")


@pytest.mark.parametrize("size", [DIRECT_FROM, DIRECT_FROM + 4, 3 * DIRECT_FROM + BLOCK - 1])
@pytest.mark.parametrize("refused", [False, True])
def test_large_content_written_past_the_page_cache_is_the_same_content(tmp_path, monkeypatch, size, refused):
    content = np.frombuffer(mmap.mmap(-1, size), np.uint8)
    content[:] = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    write, direct = os.write, []

    def watched(descriptor, data):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            direct.append(len(data))
            if refused:
                raise OSError(errno.EINVAL, "a file system that cannot")
            data = data[: max(BLOCK, len(data) // 3 // BLOCK * BLOCK)]  # a short write
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", watched)
    file = Local(tmp_path).publish("a/b", content.data)
    assert (tmp_path / "a/b").read_bytes() == content.tobytes()
    assert file.bytes == size
    assert direct, "nothing went past the cache: nothing was tested"
