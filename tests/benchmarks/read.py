"""Reads against the limit of any store, `np.take` from an `np.memmap` of the same numbers, and against what people would
pick instead: `python -m tests.benchmarks.read`, in a process of its own, since the peers' libraries are large.

The limit is one raw file of the site, float32 [n_tokens, d_model], with row numbers at hand. All that is compared is
timed in turns in one run, and figures are medians of the ratios within a round. Before it is timed, what each returns is
compared with what the limit returns.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from mmap import PAGESIZE as PAGE
from pathlib import Path
from unittest.mock import patch

import duckdb
import numpy as np
import polars as pl

from actstore.arrays import mapped as of_maps
from actstore.arrays import pages
from actstore.arrays.layout import Layout
from actstore.arrays.mapped import FEW, Shards
from actstore.arrays.plan import NEAR, Runs, cut, joined, whole_pages
from actstore.arrays.reader import AHEAD, BLOCK
from actstore.ingest.jobs.job import Ingest
from actstore.ingest.jobs.local import execute
from actstore.ingest.models.load import load
from actstore.ingest.trees.task import TreeSet
from actstore.store import Store
from tests.benchmarks import Row, median, peers
from tests.benchmarks.timing import Action, alternate, drop_pages, milliseconds, plus, ratio, timed

SITE = "resid_post.0"  # the first layer is the kindest to running the model again, which may stop there
SMALL = 2_000  # trees of the store that is made where none is given
COLD_ROUNDS, WARM_ROUNDS = 5, 40
DEEP = 8  # steps from root to goal
N_LAST_EDGES = 64
LAST_EDGES = f"""
    select token_id from edge_targets
    where is_last and tree_id in (
        select tree_id from trees join outcomes using (tree_id) join predictions using (run, tree_id)
        where depth >= {DEEP} group by tree_id, greedy_right order by greedy_right, min(p_target) limit {N_LAST_EDGES})
    order by token_id"""
SHARDS = "select shards.path from shards join sites using (run, site) where short = $site"


@dataclass(frozen=True)
class Selection:
    """Tokens to read.

    Attributes:
        name: in the table.
        query: SQL that yields their token_id.
        predicate: the same for a scan; None where a scan cannot say it.
        ids: int64 [n] token ids, ascending.
        rows: int64 [n] where they lie in the raw file.
    """

    name: str
    query: str
    predicate: pl.Expr | None
    ids: np.ndarray
    rows: np.ndarray


def sections(path: Path, cold_only: bool = False) -> dict[str, list[Row]]:
    """Every table of reads from the store at path, which holds one run of the shipped model.

    The cold reads come first: a page that is mapped cannot be dropped.
    """
    with tempfile.TemporaryDirectory(dir=".") as folder:
        with Store(path) as store:
            every = store.sql("select token_id from tokens order by token_id")["token_id"].to_numpy()
            selections = _selections(store, every)
            raw = Path(folder) / "raw.npy"
            np.save(raw, store._opened.reader(store.resolve_run(None), SITE).gather(every))
            in_place = _write_in_place(store, Path(folder) / "shards.bin")
            errs = _how_it_errs(store, selections[-1])
        cold = _cold(path, raw, Path(folder) / "shards.bin", in_place, selections)
        n_trees = f"{SITE} of {np.unique(every >> 8).size:,} trees"
        of_cold = {f"Reading {n_trees}, ids at hand, cold": cold + _cold_opening(path, selections[-2].ids)}
        with Store(path) as store:
            of_cold["What a look at pages costs a warm gather"] = _looks(store, selections)
        if cold_only:
            return of_cold
        with Store(path) as store:
            ids_at_hand, with_sql, against = _warm(store, np.load(raw, mmap_mode="r"), selections, Path(folder))
            several = [_several_sites(store, selection) for selection in selections[:2]]
    return {
        f"Reading {n_trees}, ids at hand, warm ({errs})": ids_at_hand,
        **of_cold,
        "Reading with the SQL counted, warm": with_sql,
        "All sites in one call, warm": several,
        f"Peers' time over the store's, ids at hand, warm: {', '.join(s.name for s in selections)}": against,
    }


def _selections(store: Store, every: np.ndarray) -> list[Selection]:
    a_tenth = "hash(tree_id) % 10 = 0"
    trees = store.sql(f"select tree_id from trees where {a_tenth}")["tree_id"]
    one = store.sql("select tree_id from trees order by tree_id")["tree_id"][len(every) % 1_000]
    targets, tree_id = pl.col("role") == "edge_target", pl.col("tree_id")
    a_hundredth = "select token_id from tokens where hash(token_id) % 100 = 0"
    chosen = {
        "all edge targets": ("select token_id from edge_targets", targets),
        "10 % of trees": (
            f"select token_id from edge_targets where {a_tenth}",
            targets & tree_id.is_in(trees.implode()),
        ),
        "1 % of tokens": (a_hundredth, None),
        "one tree": (f"select token_id from tokens where tree_id = {one}", tree_id == one),
        "last edges": (LAST_EDGES, None),
    }
    selections = []
    for name, (query, predicate) in chosen.items():
        ids = np.sort(
            store.sql(query)["token_id"].to_numpy()
        )  # the peers need them sorted; a join may not yield them so
        selections.append(Selection(name, query, predicate, ids, np.searchsorted(every, ids)))
    return selections


def _how_it_errs(store: Store, last: Selection) -> str:
    """Which trees the last selection is of: where the model errs too rarely, its least sure answers stand in."""
    ids = ", ".join(map(str, np.unique(last.ids >> 8)))
    right, wrong = store.sql(
        f"select count(*) filter (greedy_right), count(*) filter (not greedy_right) from outcomes where tree_id in ({ids})"
    ).row(0)
    stand_ins = f", and the {right} answered right with the least probability" if right else ""
    return f"{last.name}: of trees of depth {DEEP} and more, {wrong} answered wrong{stand_ins}"


def _write_in_place(store: Store, to: Path) -> tuple[Layout, int, np.ndarray]:
    """Write the shards one after another to one file.

    Returns:
        The layout, the first id, and int64 [batch, chunk]: the byte of the file at which each chunk starts.
    """
    reader = store._opened.reader(store.resolve_run(None), SITE)
    starts = np.zeros((reader.layout.n_shards, reader.layout.chunks_per_shard), np.int64)
    with to.open("wb") as file:
        for batch, shard in sorted(reader.shards.items()):
            starts[batch] = file.tell() + reader.files.chunk_starts(batch)
            file.write((store.path / shard).read_bytes())
    return reader.layout, reader.first_token_id, starts


def _cold(
    path: Path, raw: Path, shards: Path, in_place: tuple[Layout, int, np.ndarray], selections: list[Selection]
) -> list[Row]:
    """Gather and limits with no page of any's file in memory; a limit's file is mapped already.

    A limit gets the advice that the gather gives: the same runs, as long and as far ahead. Without
    advice, it reads as far around each page as the disk's readahead goes. One limit is of the rows in
    the order of tokens, one of the shards' own bytes in one file: rows lie there as in the store,
    and nothing is to be opened, mapped or read of an index.
    """
    rows = []
    layout, first, starts = in_place
    for selection in selections:
        row, position = layout.split(selection.ids - first)
        batch, slot = np.divmod(row, layout.rows_per_chunk)
        lies = starts[batch, position] + slot * layout.row_bytes
        rounds = [_cold_round(path, raw, shards, lies, selection) for _ in range(COLD_ROUNDS)]
        limit, of_shards, unadvised, gather, unaware = zip(*rounds, strict=True)
        name = f"{selection.name}, {len(selection.ids):,} rows"
        rows.append(_row(f"{name}: gather / limit with the same advice", gather, limit, most=1.25))
        rows.append(_row(f"{name}: gather / the same limit, rows as in the shards", gather, of_shards, most=1.25))
        rows.append(_row(f"{name}: gather / limit without advice", gather, unadvised))
        faster = ratio(unaware, gather)
        figure = f"{faster:.1f} ({milliseconds(unaware)} / {milliseconds(gather)} ms)"
        is_few = len(selection.ids) < 1_000
        goal, met = ("≥ 10", faster >= 10) if is_few else ("", None)
        rows.append(Row(f"{name}: gather without advice / gather", figure, goal, met))
    return rows


def _cold_round(path: Path, raw: Path, shards: Path, lies: np.ndarray, selection: Selection) -> list[float]:
    """Seconds of the limits and of the gather, each with advice and without; a store anew for each.

    A reader that has read holds its maps, and pages that are mapped cannot be dropped.
    """
    seconds = []
    mapped = np.load(raw, mmap_mode="r")
    row_bytes, before = mapped.shape[1] * mapped.itemsize, mapped.offset
    del mapped

    def in_order(mapped: np.ndarray, some: slice = slice(None)) -> np.ndarray:
        return np.take(mapped[before:].view(np.float32).reshape(-1, row_bytes // 4), selection.rows[some], axis=0)

    def in_place(mapped: np.ndarray, some: slice) -> np.ndarray:
        every = np.ndarray((len(mapped) - row_bytes) // 4 + 1, f"V{row_bytes}", mapped, strides=(4,))
        return every[lies[some] // 4].view(np.float32).reshape(-1, row_bytes // 4)

    at = selection.rows * row_bytes + before
    limits: list[tuple[Path, Callable[[np.ndarray], np.ndarray]]] = [
        (raw, lambda mapped: _advised(mapped, at, row_bytes, partial(in_order, mapped))),
        (shards, lambda mapped: _advised(mapped, lies, row_bytes, partial(in_place, mapped))),
        (raw, in_order),
    ]
    for file, take in limits:
        mapped = np.memmap(file, np.uint8, mode="r")
        drop_pages([file])
        limit, X = timed(lambda take=take, mapped=mapped: take(mapped))
        del mapped
        seconds.append(limit)
    for looks, few in ((pages.some_missing, FEW), (lambda *about: False, 0)):
        with Store(path) as store, patch.object(pages, "some_missing", looks), patch.object(of_maps, "FEW", few):
            reader = store._opened.reader(store.resolve_run(None), SITE)
            drop_pages([path / file for file in store.sql(SHARDS, {"site": SITE})["path"].to_list()])
            gather, same = timed(lambda reader=reader: reader.gather(selection.ids))
            seconds.append(gather)
        np.testing.assert_array_equal(X, same)
    return seconds


def _cold_opening(path: Path, ids: np.ndarray) -> list[Row]:
    """`actstore info`, and an opening with a first read, with no page of the store's files in memory.

    Python's and the libraries' own files are in memory.
    """
    files = [file for file in path.rglob("*") if file.is_file() and file.stat().st_size]
    info = [sys.executable, "-m", "actstore", "info", str(path)]

    def opening() -> None:
        with Store(path) as store:
            store.read(ids, site=SITE)

    actions: dict[str, Callable[[], object]] = {
        "actstore info": lambda: subprocess.run(info, stdout=subprocess.DEVNULL, check=True),
        f"open, and read one tree's {len(ids)} tokens": opening,
    }
    rows = []
    for name, action in actions.items():
        cold, warm = list[float](), list[float]()
        for _ in range(COLD_ROUNDS):
            warm.append(timed(action)[0])
            drop_pages(files)
            cold.append(timed(action)[0])
        rows.append(_row(f"{name}: store cold / warm", cold, warm))
    return rows


def _looks(store: Store, selections: list[Selection]) -> list[Row]:
    """Warm gathers, against gathers that do not ask which pages are in memory."""
    rows, reader = [], store._opened.reader(store.resolve_run(None), SITE)
    for selection in selections:
        seconds: dict[str, list[float]] = {"gather": [], "unaware": []}
        for _ in range(2):  # the first read of a few rows maps nothing
            reader.gather(selection.ids)
        for number in range(WARM_ROUNDS):
            for name in list(seconds)[:: 1 if number % 2 else -1]:
                with patch.object(Shards, "is_cold", Shards.is_cold if name == "gather" else lambda *about: False):
                    seconds[name].append(timed(lambda ids=selection.ids: reader.gather(ids))[0])
        most = 1.02 if selection.name in ("all edge targets", "1 % of tokens") else None
        rows.append(
            _row(f"{selection.name}: gather / the same without a look", seconds["gather"], seconds["unaware"], most)
        )
    return rows


def _advised(mapped: np.ndarray, starts: np.ndarray, row_bytes: int, take: Callable[[slice], np.ndarray]) -> np.ndarray:
    """Rows of a mapped file, block by block, with the next blocks' pages asked for as a gather asks.

    Args:
        mapped: uint8 [bytes of the file].
        starts: int64 [n]: the byte at which each row starts.
        take: copies some of the rows.
    """
    X = np.empty((len(starts), row_bytes // 4), np.float32)
    n_rows = BLOCK // max(row_bytes, PAGE)
    blocks = [slice(first, first + n_rows) for first in range(0, len(starts), n_rows)]

    def fetch(some: np.ndarray) -> None:
        wanted = whole_pages(Runs(np.zeros(len(some), np.int64), some, some + row_bytes), PAGE)
        runs = cut(joined(*wanted, NEAR), pages.LONGEST)
        pages.fetch(runs.starts + mapped.ctypes.data, runs.ends - runs.starts)

    for number in range(-AHEAD, len(blocks)):
        if number + AHEAD < len(blocks):
            fetch(starts[blocks[number + AHEAD]])
        if number >= 0:
            X[blocks[number]] = take(blocks[number])
    return X


def _warm(
    store: Store, mapped: np.ndarray, selections: list[Selection], folder: Path
) -> tuple[list[Row], list[Row], list[Row]]:
    """The limit, the store's ways and the peers, all in turns at each selection."""
    others = [*peers.write_all(np.asarray(mapped), folder), peers.running_again(store, SITE)]
    ids_at_hand, with_sql, ahead = [], [], {peer.name: [] for peer in others}
    for selection in selections:
        taken = {peer.name: _peer(peer, selection) for peer in others}
        actions = _ours(store, selection, mapped) | taken
        seconds = alternate(actions, mapped[selection.rows])
        ids_at_hand.append(_gather_row(selection, seconds))
        with_sql += _sql_rows(selection, seconds)
        for peer in others:
            ahead[peer.name].append(_against(seconds[peer.name], seconds["gather"]))
    against = [_peer_row(name, ratios) for name, ratios in ahead.items()]
    return ids_at_hand, with_sql, against


def _peer(peer: peers.Peer, selection: Selection) -> Action:
    return Action(lambda: peer.take(selection.rows), lambda X: X, peer.atol)


def _ours(store: Store, selection: Selection, mapped: np.ndarray) -> dict[str, Action]:
    run, query = store.resolve_run(None), selection.query
    reader = store._opened.reader(run, SITE)
    plain = duckdb.connect(store.path / "catalog.duckdb", read_only=True)
    act = f"select token_id, act(token_id, '{run}', '{SITE}') as x from ({query})"
    actions = {
        "limit": Action(lambda: np.take(mapped, selection.rows, axis=0), lambda X: X),
        "gather": Action(lambda: reader.gather(selection.ids), lambda X: X),
        "DuckDB": Action(lambda: plain.sql(query).pl()),
        "read": Action(lambda: store.read(query, site=SITE), _in_order),
        "act": Action(lambda: store.sql(act), _x),
    }
    if selection.predicate is not None:
        scan = store.scan(run, SITE).filter(selection.predicate).select("token_id", "x")
        actions["scan"] = Action(scan.collect, _x)
    return actions


def _x(frame: pl.DataFrame) -> np.ndarray:
    return _in_order((frame["x"].to_numpy(), frame))


def _in_order(read: tuple[np.ndarray, pl.DataFrame]) -> np.ndarray:
    """The rows by token_id, which is the limit's order: DuckDB's threads may yield those of a join in another."""
    X, rows = read
    ids = rows["token_id"].to_numpy()
    return X if (ids[1:] > ids[:-1]).all() else X[np.argsort(ids)]


def _gather_row(selection: Selection, seconds: dict[str, list[float]]) -> Row:
    """Of many rows, the ratio must be small; of few, where a call costs more than the copy, the difference."""
    n, limit, gather = len(selection.ids), seconds["limit"], seconds["gather"]
    what = f"{selection.name}, {n:,} rows: gather / limit"
    if n >= 10_000:
        return _row(what, gather, limit, most=1.25 if n >= 100_000 else 2.0)
    row = _row(what, gather, limit)
    over = median([ours - theirs for ours, theirs in zip(gather, limit, strict=False)])
    return replace(row, goal="< 0.3 ms over the limit", met=over < 0.3e-3)


def _sql_rows(selection: Selection, seconds: dict[str, list[float]]) -> list[Row]:
    read, name = seconds["read"], selection.name
    best = plus(seconds["DuckDB"], seconds["limit"])
    rows = [
        _row(f"{name}: read / (plain DuckDB + limit)", read, best, most=1.5),
        _row(f"{name}: act() in SQL / read", seconds["act"], read, most=2.5),
    ]
    if "scan" in seconds:
        rows.append(_row(f"{name}: scan / read", seconds["scan"], read, most=2.0))
    return rows


def _row(what: str, ours: Sequence[float], against: Sequence[float], most: float | None = None) -> Row:
    times = ratio(ours, against)
    figure = f"{times:.2f} ({milliseconds(ours)} / {milliseconds(against)} ms)"
    return Row(what, figure, f"≤ {most:g}", times <= most) if most else Row(what, figure, "")


def _against(peer: list[float], gather: list[float]) -> float:
    """Of a peer that was timed once, over the median of ours."""
    return ratio(peer, gather) if len(peer) > 1 else peer[0] / median(gather)


def _peer_row(name: str, ratios: list[float]) -> Row:
    figure = " / ".join(f"{times:,.0f}" if times >= 10 else f"{times:.1f}" for times in ratios)
    return Row(name, figure, "each ≥ 5", min(ratios) >= 5)


def _several_sites(store: Store, selection: Selection) -> Row:
    query, sites = selection.query, store.sites(store.resolve_run(None))
    X = np.stack([_in_order(store.read(query, site=site)) for site in sites], axis=1)
    actions = {
        "one call": Action(lambda: store.read(query, sites=sites), _in_order),
        "one by one": Action(lambda: [store.read(query, site=site) for site in sites]),
    }
    seconds = alternate(actions, X)
    what = f"{selection.name}: {len(sites)} sites in one call / one by one"
    return _row(what, seconds["one call"], seconds["one by one"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Time reads from a store of the shipped model at its default sites.")
    parser.add_argument("store", type=Path, nargs="?", help="made for it if not given")
    parser.add_argument("--trees", type=int, default=SMALL, help="of the store that is made (%(default)s)")
    parser.add_argument("--cold", action="store_true", help="time cold reads and warm gathers only")
    parser.add_argument("--json", type=Path, help="write the tables' rows to this file, and print none")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        if given.store is None:
            given.store = Path(folder) / "small.act"
            execute(Ingest(given.store, load("reproduction"), TreeSet("reproduction", given.trees)))
        tables = sections(given.store, cold_only=given.cold)
    if given.json:
        given.json.write_text(json.dumps({title: [asdict(row) for row in rows] for title, rows in tables.items()}))
        return
    for title, rows in tables.items():
        print(f"\n{title}")
        for row in rows:
            verdict = "" if row.met is None else "met" if row.met else "NOT met"
            print(f"  {row.what:60} {row.figure:45} {row.goal:24} {verdict}")


if __name__ == "__main__":
    main()
