"""Verify a store: hash every file, and compare with the hash in its manifest.

The catalog is derived and in no manifest. Its hash is compared with the hash noted when it was put
in place, and its rows with the parts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import duckdb
import google_crc32c
import polars as pl

from actstore.catalog import tables, witness
from actstore.commits import checkpoint, log
from actstore.commits.format import ARRAYS, CHECKPOINT, FORMAT_VERSION, LOG, WEIGHTS, check_format
from actstore.commits.log import led_astray, log_hash
from actstore.commits.manifest import Manifest, Part, Shard, manifest_path
from actstore.errors import Damaged, TooNew, Unreachable, advised
from actstore.storage.at import at, place
from actstore.storage.backend import File
from actstore.storage.machine import limit_reached, n_processors
from actstore.upkeep import verify_catalog
from actstore.writing.parts import GROUP

Advance = Callable[[int, int], None]  # bytes read so far, bytes of all files
COLUMNS = ("path", "kind", "what", "run", "site", "batch", "trees")


@dataclass(frozen=True)
class Finding:
    """Something that is not as it was committed.

    Attributes:
        path: the file, inside the store.
        kind: `shard`, `part`, `weights`, `metadata`, `manifest`, `catalog`, `checkpoint` (of the
            log), `store.json`, `link` (a link into another store), `conflict` (the catalog and the
            manifests are each whole and disagree) or `stray` (harmless).
        what: what is wrong with the file.
        run: the file's run, if any.
        site: the file's site, if any.
        batch: the file's batch, if any.
        trees: `first to last` tree_id of a shard or of a batch's part.
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
    """The findings of `verify`; in a whole store there are only strays.

    Attributes:
        findings: one per file that is not as it was committed.
        n_files: number of files that were read.
        n_bytes: size of these files.
        differences: a Difference (ingest/replay/difference.py) per comparison with a rerun.
    """

    findings: list[Finding]
    n_files: int
    n_bytes: int
    differences: Sequence[Any] = ()

    @property
    def damage(self) -> list[Finding]:
        """Findings that are not strays."""
        return [finding for finding in self.findings if finding.kind != "stray"]

    def as_frame(self) -> pl.DataFrame:
        """One row per finding, with the columns of COLUMNS."""
        return pl.DataFrame([asdict(finding) for finding in self.findings], schema=_SCHEMA)


_SCHEMA = {name: pl.Int64() if name == "batch" else pl.String() for name in COLUMNS}


def verify(path: str | Path, quick: bool = False, advance: Advance = lambda done, total: None) -> Report:
    """Look for damage.

    Args:
        quick: check only sizes and the shards' index checksums.
        advance: called with the bytes read so far, and with those of all files.

    Returns:
        The findings, and how much was read.

    Raises:
        NotStored: there is no store.
        TooNew: a later version of actstore made the store.
    """
    root = place(path)
    wrong, is_older = list[Finding](), False
    try:
        is_older = check_format(root, older=True)["format"] < FORMAT_VERSION
    except TooNew:
        raise
    except Damaged as error:
        wrong.append(Finding("store.json", "store.json", str(error)))
    summed = checkpoint.content(root)  # before the manifests: a writer may go on
    with tables.attached_if_whole(root) as catalog:
        manifests, broken = read_manifests(root, catalog=catalog)
        report = verify_files(root, manifests, broken, summed, is_older, quick, advance, catalog)
    return replace(report, findings=wrong + report.findings)


def verify_files(
    root: Path,
    manifests: list[Manifest],
    broken: list[Finding],
    summed: bytes | None,
    is_older: bool,
    quick: bool,
    advance: Advance,
    catalog: duckdb.DuckDBPyConnection | None = None,
) -> Report:
    """Look for damage in a store whose manifests were read.

    Args:
        manifests, broken: see read_manifests.
        summed: the checkpoint's bytes, read before the manifests.
        is_older: an earlier version made the store.
        quick, advance: see verify.
        catalog: has the catalog attached, from before the manifests were read; default: attached
            when the catalog is compared.
    """
    findings = list(broken)
    if not broken and summed is not None and not checkpoint.fits(summed, manifests):
        findings.append(
            Finding(CHECKPOINT, "checkpoint", "it is not what the manifests come to; no reader relies on it")
        )
    jobs = [(manifest, file) for manifest in log.live(manifests) for file in manifest.files]
    jobs.sort(key=lambda job: isinstance(job[1], Shard))  # stable: the shards last
    n_small = sum(not isinstance(file, Shard) for _, file in jobs)
    positions = _positions(root, jobs) if quick else {}
    total, done = sum(file.bytes for _, file in jobs), 0
    with _threads(at(root).at_once) as threads:
        verdicts = [threads.submit(_wrong_with, root, file, quick, positions) for _, file in jobs[:n_small]]
        parts = [verdict for (_, file), verdict in zip(jobs, verdicts, strict=False) if isinstance(file, Part)]
        of_catalog = threads.submit(_catalog, root, None if broken else manifests, is_older, parts, quick, catalog)
        verdicts += [threads.submit(_wrong_with, root, file, quick, positions) for _, file in jobs[n_small:]]
        astray = [Finding(path, "link", what) for path, what in led_astray(root, (file.path for _, file in jobs))]
        # where a manifest is broken, nobody knows what it names, and no writer removes that
        last = [*_group(root)], [] if broken else [*_strays(root, manifests)]
        wrong = []
        for (manifest, file), verdict in zip(jobs, verdicts, strict=True):
            if what := verdict.result():
                wrong.append(_finding(manifest, file, what))
            done += file.bytes
            advance(done, total)
        findings += [finding for finding in wrong if finding.kind != "shard"] + astray
        findings += [finding for finding in wrong if finding.kind == "shard"] + last[0]
        findings += of_catalog.result() + last[1]
    return Report(findings, len(jobs), total)


@contextmanager
def _threads(at_once: int) -> Iterator[ThreadPoolExecutor]:
    """One thread for each processor, of which one compares the catalog first; two at least.

    Hashing and DuckDB release the interpreter. What has not begun is left out after an error.

    Args:
        at_once: files that are best hashed at the same time, see Storage.
    """
    threads = ThreadPoolExecutor(max(n_processors(), at_once, 2))
    try:
        yield threads
    except BaseException:
        threads.shutdown(cancel_futures=True)
        raise
    threads.shutdown()


def _catalog(
    root: Path,
    manifests: list[Manifest] | None,
    is_older: bool,
    parts: list[Future[str]],
    quick: bool,
    catalog: duckdb.DuckDBPyConnection | None,
) -> list[Finding]:
    if not quick:
        parts_are_whole = not any(part.result() for part in parts)
        wrong = verify_catalog.wrong_with(root, manifests, is_older, parts_are_whole, catalog)
        return [Finding(path, kind, what) for path, kind, what in wrong]
    found = [Finding(path, verify_catalog.CATALOG, what) for path, what in verify_catalog.lacking_or_added(root)]
    if not found and manifests is not None and (what := witness.conflict(root, manifests)):
        found.append(Finding(tables.CATALOG, verify_catalog.CONFLICT, what))
    return found


def read_manifests(
    root: Path,
    instead: Mapping[str, bytes] = MappingProxyType({}),
    catalog: duckdb.DuckDBPyConnection | None = None,
) -> tuple[list[Manifest], list[Finding]]:
    """The manifests that can be read, and findings about the others.

    Args:
        instead: path → bytes to take in place of the file's own.
        catalog: has the catalog attached; default: attached here.
    """
    found: list[Manifest] = []
    broken: list[Finding] = []
    held, hash_of_log = (
        tables.snapshot_if_whole(root, catalog) if catalog else tables.built_from(root)
    )  # before the manifests: a writer may go on
    there = log.numbers(root)
    known = {**at(root).ahead([manifest_path(number) for number in there]), **instead}
    for expected, number in zip([1, *(number + 1 for number in there)], there, strict=False):
        if number > expected:
            gap = _gap(root, expected, number - 1)
            broken.append(replace(gap, what=gap.what + log.foreign(root, there, expected) * (expected > held)))
        try:
            manifest = log.read_manifest(root, number, known.get(manifest_path(number)))
            before = found[-1] if found and found[-1].number == number - 1 else None
            if (before or number == 1) and (what := log.breaks_chain(before, manifest)):
                broken.append(Finding(manifest_path(max(number - 1, 1)), "manifest", what))
            found.append(manifest)
        except Damaged as error:
            broken.append(Finding(manifest_path(number), "manifest", str(error)))
        except OSError as error:
            broken.append(Finding(manifest_path(number), "manifest", _unreadable(error, root, manifest_path(number))))
    last = max([0, *there[-1:]])
    if held > last and (broken or log_hash(found) != hash_of_log):  # else the catalog's number is what is damaged
        gap = _gap(root, last + 1, held)
        broken.append(replace(gap, what=gap.what + witness.doubt(root, last)))
    broken += [Finding(manifest_path(number), "manifest", what) for number, what in witness.at_odds(found)]
    return found, broken


def _gap(root: Path, first: int, last: int) -> Finding:
    """The finding for manifests that are missing: one each gap, since a name can be any number."""
    what = "is missing" + f", as are all up to {last}" * (last > first)
    if link := at(root).broken(LOG):
        what += f", since {link}"
    return Finding(manifest_path(first), "manifest", what)


def _group(root: Path) -> Iterator[Finding]:
    """What is wrong with the Zarr group of all arrays, which no manifest names; "" if nothing."""
    path = f"{ARRAYS}/zarr.json"
    try:
        if at(root).read(path) != GROUP:
            yield Finding(path, "metadata", "its content is not what was put in place")
    except OSError as error:
        yield Finding(path, "metadata", _unreadable(error, root, path))


def _unreadable(error: OSError, root: Path, path: str) -> str:
    """The message for a file that the system refuses to read.

    Raises:
        LimitReached, Unreachable: nothing is known of the file.
    """
    if isinstance(error, Unreachable):
        raise error
    if reached := limit_reached(error, "cannot verify every file"):
        raise reached from error
    if link := at(root).broken(path):
        return f"is missing, since {link}"
    is_missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
    return "is missing" if is_missing else error.strerror or str(error)


def _finding(manifest: Manifest, file: File, what: str) -> Finding:
    trees = None
    if isinstance(file, Shard | Part) and file.first_tree_id is not None:
        trees = f"{file.first_tree_id} to {file.first_tree_id + (file.n_trees or 0) - 1}"
    kind = "shard" if isinstance(file, Shard) else "part" if isinstance(file, Part) else "metadata"
    kind = "weights" if file.path.startswith(WEIGHTS) else kind
    site = file.site if isinstance(file, Shard) else None
    return Finding(file.path, kind, what, manifest.run, site, manifest.batch, trees)


def _wrong_with(root: Path, file: File, quick: bool, positions: dict[tuple[str, str], int]) -> str:
    """What is wrong with a committed file; "" if the file is whole."""
    index, found = b"", file.xxh3_128
    n_chunks = positions.get((file.run, file.site)) if isinstance(file, Shard) else None
    try:
        if quick:
            size, index = at(root).end(file.path, 16 * (n_chunks or 0) + 4)
        else:
            size, found = at(root).hashed(file.path)
    except OSError as error:
        return _unreadable(error, root, file.path)
    if size != file.bytes:
        return f"is {size:,} bytes long, not {file.bytes:,}"
    if quick and n_chunks is not None and not _index_is_whole(index, n_chunks):
        return "its index is not what was committed"
    return "" if found == file.xxh3_128 else "its content is not what was committed"


def _positions(root: Path, jobs: list[tuple[Manifest, File]]) -> dict[tuple[str, str], int]:
    """Chunks per shard of each (run, site), from the arrays' own metadata."""
    found = {}
    shards = [file for _, file in jobs if isinstance(file, Shard)]
    sites = {(shard.run, shard.site): f"{ARRAYS}/{shard.run}/{shard.site}/zarr.json" for shard in shards}
    known = at(root).ahead(list(sites.values()))
    for (run, site), path in sites.items():
        try:
            about = json.loads(known[path] if path in known else at(root).read(path))
            outer = about["chunk_grid"]["configuration"]["chunk_shape"]
            inner = about["codecs"][0]["configuration"]["chunk_shape"]
            n = math.prod(-(-int(large) // int(small)) for large, small in zip(outer, inner, strict=True))
        except (OSError, ValueError, LookupError, TypeError, ArithmeticError, RecursionError):
            continue  # it has its own finding
        found[run, site] = n
    return found


def _index_is_whole(index: bytes, n_chunks: int) -> bool:
    """True if the end of a shard is an index of so many chunks, with its crc32c."""
    is_long_enough = n_chunks > 0 and len(index) == 16 * n_chunks + 4
    return is_long_enough and google_crc32c.value(index[:-4]).to_bytes(4, "little") == index[-4:]


def _strays(root: Path, manifests: list[Manifest]) -> Iterator[Finding]:
    """Files that no manifest names: a stopped writer left them, the next writer removes them."""
    dropped = {path for manifest in manifests if manifest.dropped for path in manifest.dropped.files}
    for path in log.strays(root, manifests):
        what = "it was dropped" if path in dropped else "no commit names it"
        yield Finding(path, "stray", f"{what}; the next writer removes it")


def raise_if_damaged(report: Report, path: str | Path) -> None:
    """Raise for a store that is damaged.

    Args:
        report: what `verify` found.

    Raises:
        Damaged: says how much is damaged, and what to do.
    """
    if report.damage:
        first: Any = report.damage[0]
        raise Damaged(
            f"{path} is damaged: {len(report.damage)} of {report.n_files:,} files, the first {first.path} ({first.what}); "
            f"mend it with {advised('repair', path)}"
        )
