"""Is a store what was committed? Every file is read and held against the hash that its manifest names.

The catalog has no manifest, since it is derived: it is held against the hash noted when it was put in place, and row for row
against one built anew from the parts.
"""

from __future__ import annotations

import json
import mmap
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import duckdb
import google_crc32c
import polars as pl
import xxhash

from actstore import catalog, log
from actstore.errors import Damaged, NoRoom, NotStored, TooNew
from actstore.folder import check_format
from actstore.log import ARRAYS, File, Manifest, Part, Shard
from actstore.machine import n_processors
from actstore.writer import GROUP

BLOCK = 1 << 20  # bytes read at a time: few enough to be hashed while they are in the processor's own memory
AHEAD = 32 << 20  # bytes asked of the disk beforehand
COLUMNS = ("path", "kind", "what", "run", "site", "batch", "trees")


@dataclass(frozen=True)
class Finding:
    """Something that is not as it was committed.

    Attributes:
        path: inside the store.
        kind: `shard`, `part`, `weights`, `metadata`, `manifest`, `catalog`, `store.json` or `stray` (which harms nothing).
        what: is wrong with it.
        run, site, batch: whose it is, where it is of one.
        trees: `first to last` tree_id, of a shard or of a batch's part.
    """

    path: str
    kind: str
    what: str
    run: str | None = None
    site: str | None = None
    batch: int | None = None
    trees: str | None = None


@dataclass(frozen=True)
class Report:
    """What `verify` found: nothing but strays in a store that is whole."""

    findings: list[Finding]
    n_files: int
    n_bytes: int

    @property
    def damage(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.kind != "stray"]

    def table(self) -> pl.DataFrame:
        """A row a finding; columns as in COLUMNS."""
        return pl.DataFrame([asdict(finding) for finding in self.findings], schema=_SCHEMA)


_SCHEMA = {name: pl.Int64() if name == "batch" else pl.String() for name in COLUMNS}


def verify(path: str | Path, quick: bool = False, advance: Callable[[int], None] = lambda done: None) -> Report:
    """Look for damage.

    Args:
        path: the store.
        quick: look at sizes and the shards' own index checksums alone.
        advance: called with the bytes read so far.

    Raises:
        NotStored: there is no store.
        TooNew: a later version of actstore made it.
    """
    root = Path(path)
    findings: list[Finding] = []
    is_older = False
    try:
        is_older = check_format(root, older=True)["format"] < log.FORMAT_VERSION
    except TooNew:
        raise
    except Damaged as error:
        findings.append(Finding("store.json", "store.json", str(error)))
    manifests, broken = read_manifests(root)
    findings += broken
    jobs = [(manifest, file) for manifest in manifests for file in manifest.files]
    findings += _files(root, jobs, quick, advance)
    findings += _group(root)
    whole = not broken and not any(finding.kind == "part" for finding in findings)
    findings += _catalog(root, manifests if whole else None, quick, is_older)
    findings += _strays(root, manifests, broken)
    return Report(findings, len(jobs), sum(file.bytes for _, file in jobs))


def read_manifests(root: Path) -> tuple[list[Manifest], list[Finding]]:
    """The manifests that can be read, and what is wrong with the others."""
    found, broken = [], []
    numbers = {int(path.stem) for path in (root / log.LOG).glob("*.json") if log.MANIFEST.fullmatch(path.name)}
    for number in range(1, max(numbers | {catalog.snapshot(root)}, default=0) + 1):
        path = root / log.manifest_path(number)
        try:
            found.append(_manifest(path, number))
        except Damaged as error:
            broken.append(Finding(log.manifest_path(number), "manifest", str(error)))
        except OSError as error:
            broken.append(Finding(log.manifest_path(number), "manifest", _said(error)))
    return found, broken


def _manifest(path: Path, number: int) -> Manifest:
    """One commit, which names no file outside the store: repair is going to write where it says."""
    manifest = log.read_manifest(path, number)
    for file in manifest.files:
        if file.path.startswith("/") or not {"", ".", ".."}.isdisjoint(file.path.split("/")):
            raise Damaged(f"it names {file.path!r}, which is no path inside the store")
    return manifest


def _files(
    root: Path, jobs: list[tuple[Manifest, File]], quick: bool, advance: Callable[[int], None]
) -> Iterator[Finding]:
    """Hash every file, several at a time: the hash lets go of the interpreter, and is faster than one disk read."""
    positions = _positions(root) if quick else {}
    done = 0
    with ThreadPoolExecutor(n_processors()) as pool:
        for (manifest, file), what in zip(
            jobs, pool.map(lambda job: _wrong_with(root, job[1], quick, positions), jobs), strict=True
        ):
            done += file.bytes
            advance(done)
            if what:
                yield _finding(manifest, file, what)


def _group(root: Path) -> Iterator[Finding]:
    """What is wrong with the group that all arrays are in, which no manifest names."""
    path = f"{ARRAYS}/zarr.json"
    try:
        if (root / path).read_bytes() != GROUP:
            yield Finding(path, "metadata", "its content is not what was put in place")
    except OSError as error:
        yield Finding(path, "metadata", _said(error))


def _said(error: OSError) -> str:
    is_missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
    return "is missing" if is_missing else error.strerror or str(error)


def _finding(manifest: Manifest, file: File, what: str) -> Finding:
    trees = None
    of_batch = next(iter(manifest.shards), None)
    if isinstance(file, Shard) or (isinstance(file, Part) and of_batch):
        shard = file if isinstance(file, Shard) else of_batch
        assert shard is not None
        trees = f"{shard.first_tree_id} to {shard.first_tree_id + shard.n_trees - 1}"
    kind = "shard" if isinstance(file, Shard) else "part" if isinstance(file, Part) else "metadata"
    kind = "weights" if file.path.startswith(log.WEIGHTS) else kind
    site = file.site if isinstance(file, Shard) else None
    return Finding(file.path, kind, what, manifest.run, site, manifest.batch, trees)


def _wrong_with(root: Path, file: File, quick: bool, positions: dict[tuple[str, str], int]) -> str:
    """What is wrong with a committed file; nothing where it is whole."""
    try:
        with (root / file.path).open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            if size != file.bytes:
                return f"is {size:,} bytes long, not {file.bytes:,}"
            if quick:
                whole = not isinstance(file, Shard) or _index_is_whole(opened.fileno(), file, positions)
                return "" if whole else "its index is not what was committed"
            if hash_of(opened.fileno()) != file.xxh3_128:
                return "its content is not what was committed"
    except OSError as error:
        return _said(error)
    return ""


_of_thread = threading.local()


def hash_of(descriptor: int) -> str:
    """xxh3-128, hexadecimal, of a file from its start; what the page cache does not hold is read ahead."""
    digest, block, offset = xxhash.xxh3_128(), _block(), 0
    while n := os.preadv(descriptor, [block], offset):
        if offset % AHEAD == 0:
            _read_ahead(descriptor, offset + n)
        digest.update(block[:n])
        offset += n
    return digest.hexdigest()


def _block() -> memoryview:
    """Memory of the thread's own, to read into: new memory for each file would take longer than to hash it."""
    if not hasattr(_of_thread, "block"):
        _of_thread.block = memoryview(mmap.mmap(-1, BLOCK))
    return _of_thread.block


def _read_ahead(descriptor: int, offset: int) -> None:
    if advise := getattr(os, "posix_fadvise", None):  # Linux has it
        advise(descriptor, offset, AHEAD, os.POSIX_FADV_WILLNEED)


def _positions(root: Path) -> dict[tuple[str, str], int]:
    """Chunks in a shard of each (run, site), out of the arrays' own metadata."""
    found = {}
    for path in (root / ARRAYS).glob("*/*/zarr.json"):
        try:
            about = json.loads(path.read_bytes())
            outer = about["chunk_grid"]["configuration"]["chunk_shape"]
            inner = about["codecs"][0]["configuration"]["chunk_shape"]
        except (OSError, ValueError, KeyError, IndexError, TypeError):
            continue  # which its own finding says
        n = 1
        for large, small in zip(outer, inner, strict=False):
            n *= -(-large // small)
        found[path.parent.parent.name, path.parent.name] = n
    return found


def _index_is_whole(descriptor: int, shard: Shard, positions: dict[tuple[str, str], int]) -> bool:
    n = positions.get((shard.run, shard.site))
    if n is None:
        return True
    size = 16 * n + 4
    index = os.pread(descriptor, size, shard.bytes - size)
    return google_crc32c.value(index[:-4]).to_bytes(4, "little") == index[-4:]


def _catalog(root: Path, manifests: list[Manifest] | None, quick: bool, is_older: bool) -> Iterator[Finding]:
    """What is wrong with the catalog.

    Args:
        is_older: an earlier version made the store, which noted no hash.
        manifests: all of them, where they and their parts are whole; else rows are not compared.
    """
    if not (root / catalog.NAME).exists():
        yield Finding(catalog.NAME, "catalog", "is missing")
        return
    if quick:
        return
    try:
        is_noted = _is_noted(root)
    except FileNotFoundError:
        if not is_older:
            yield Finding(catalog.HASHES, "catalog", "is missing")
            return
        is_noted = True
    except Damaged as error:
        yield Finding(catalog.HASHES, "catalog", str(error))
        return
    if not is_noted:
        yield Finding(catalog.NAME, "catalog", "its content is not what was put in place")
    elif manifests is not None:
        yield from _rows_that_differ(root, manifests)


def _is_noted(root: Path) -> bool:
    """Whether the catalog has a hash that was noted; one that a writer puts in its place meanwhile is looked at, too."""
    path = root / catalog.NAME
    while True:
        with path.open("rb") as opened:
            found = hash_of(opened.fileno())
            if found in catalog.noted_hashes(root):  # read behind it: a hash is noted before its catalog is there
                return True
            if os.path.samestat(os.fstat(opened.fileno()), path.stat()):
                return False


def _rows_that_differ(root: Path, manifests: list[Manifest]) -> Iterator[Finding]:
    """Build a catalog from the parts, of as many commits as the one there holds, and compare every row of every table.

    Raises:
        NoRoom: there is none for it where temporary files go.
    """
    with tempfile.TemporaryDirectory(prefix="actstore-verify-") as folder, duckdb.connect() as connection:
        connection.execute(f"set temp_directory = {catalog.quoted(folder)}")
        connection.execute(f"attach {catalog.quoted(root / catalog.NAME)} as there (read_only)")  # and keep that one
        held = connection.execute("select snapshot from there.snapshot").fetchall()[0][0]
        anew = Path(folder) / "anew.duckdb"
        try:
            catalog.build(root, anew, manifests[:held] if held <= len(manifests) else log.manifests(root)[:held])
        except (duckdb.Error, OSError) as error:
            if any(os.strerror(reason) in str(error) for reason in log.DISK_FULL):
                raise NoRoom(f"no room in {folder} to build a catalog to compare with; set TMPDIR to a roomier disk") from error
            raise
        connection.execute(f"attach {catalog.quoted(anew)} as anew (read_only)")
        there = {row[0] for row in connection.execute(TABLES).fetchall()}
        for table in [table for table in catalog.tables() if table in there]:  # an older catalog lacks some
            names = [row[0] for row in connection.execute(f"describe there.{table}").fetchall()]
            columns = ", ".join(name for name in names if name != "format_version")  # an older catalog's is its own
            for what in _differences(connection, table, columns):
                yield Finding(catalog.NAME, "catalog", what)


TABLES = "select table_name from duckdb_tables() where database_name = 'there'"


def _differences(connection: duckdb.DuckDBPyConnection, table: str, columns: str) -> Iterator[str]:
    """How many rows of a table are in one of the two catalogs alone.

    A sum over hashes of the rows, which needs no memory, says whether there are any; then they are counted.
    """
    digest = f"select count(*), sum(hash({columns})::uhugeint), bit_xor(hash(1, {columns})) from"
    one, other = (connection.execute(f"{digest} {where}.{table}").fetchall() for where in ("there", "anew"))
    if one == other:
        return
    for left, right, what in (("there", "anew", "the parts lack"), ("anew", "there", "it lacks")):
        query = f"select {columns} from {left}.{table} except all select {columns} from {right}.{table}"
        n = connection.execute(f"select count(*) from ({query})").fetchall()[0][0]
        if n:
            yield f"{what} {n:,} rows of table {table}"


def _strays(root: Path, manifests: list[Manifest], broken: list[Finding]) -> Iterator[Finding]:
    """Files that no manifest names: left by a stopped writer, and removed by the next."""
    named = {file.path for manifest in manifests for file in manifest.files} | {f"{ARRAYS}/zarr.json"}
    named |= {log.manifest_path(manifest.number) for manifest in manifests} | {finding.path for finding in broken}
    for folder in (log.LOG, log.PARTS, ARRAYS, log.WEIGHTS):
        for path in sorted((root / folder).rglob("*")):
            relative = path.relative_to(root).as_posix()
            if not path.is_dir() and relative not in named:
                yield Finding(relative, "stray", "no commit names it; the next writer removes it")


def raise_if_damaged(report: Report, path: str | Path) -> None:
    """Refuse a store that is not whole.

    Raises:
        Damaged: says how much is wrong, and what to do.
    """
    if report.damage:
        first: Any = report.damage[0]
        raise Damaged(
            f"{path} is damaged: {len(report.damage)} of {report.n_files:,} files, the first {first.path} ({first.what}); "
            f"mend it with `actstore repair {path}`"
        )
