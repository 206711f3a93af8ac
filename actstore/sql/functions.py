"""Activations in SQL: `act`, `attention`, `logit_lens`, `probe_direction`.

All four are Arrow functions. DuckDB calls them with up to 2,048 rows at a time, from several
threads; NULL in gives NULL out. Vectors are FLOAT[d_model] (logits FLOAT[d_vocab]) if all runs of
the store share one width, so that DuckDB's array functions apply. A SQL function has one return
type. If the widths differ, the type is therefore a list, FLOAT[], of each run's own width. The
macros take both, and `x::float[128]` makes an array of a list.

The macros live in the session's own database. In the catalog, they would break every other client.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from actstore.errors import BadInput, NotStored, advised
from actstore.sql.logit_lens import Unembedding, read_unembedding
from actstore.sql.macros import D_MODELS, D_VOCABS, shared_width

if TYPE_CHECKING:
    from actstore.arrays.site import Reader
    from actstore.sql.session import Session
    from actstore.sql.snapshot import Snapshot

ACTIVATIONS = """table
        select tokens.*, act(tokens.token_id, run, site) as x
        from store.main.tokens
        where tokens.sequence_id in (
            select unnest(range(batch.first_tree_id, batch.first_tree_id + batch.n_trees))
            from (select unnest(batches_of(run, site)) as batch)
        )"""  # a macro that names a function, which has to be there before it

KIND = "select kind from sites where run = $run and $site in (site, short)"
IS = {  # a kind of site, in messages
    "resid": "holds vectors of the residual stream",
    "vector": "holds vectors",
    "heads": "holds a vector per head",
    "pattern": "is an attention pattern",
}


def add_functions(session: Session, store: Snapshot) -> Vectors:
    """Register act(), logit_lens() … on a session.

    Args:
        session: the store's own session, on the same snapshot.
        store: kept by a weak reference, since the garbage collector does not see what a
            connection's functions hold.

    Returns:
        The `Vectors` that the functions read with.
    """
    d_model, d_vocab = shared_width(session, D_MODELS), shared_width(session, D_VOCABS)
    vectors = Vectors(weakref.ref(store), d_model, d_vocab)
    text, token = ["VARCHAR"], ["BIGINT", "VARCHAR", "VARCHAR"]
    batches = "STRUCT(first_tree_id INTEGER, n_trees INTEGER)[]"
    session.add_function("act", vectors.act, token, f"FLOAT[{d_model or ''}]")
    session.add_function("attention", vectors.attention, token, "FLOAT[][]")
    session.add_function("logit_lens", vectors.logit_lens, token, f"FLOAT[{d_vocab or ''}]")
    session.add_function("probe_direction", vectors.probe_direction, text, f"FLOAT[{d_model or ''}]")
    session.add_function("batches_of", vectors.batches_of, text * 2, batches)
    session.add_macro("activations(run, site)", ACTIVATIONS)
    return vectors


class Vectors:
    """The functions as DuckDB calls them: Arrow columns of up to 2,048 rows in, an Arrow array out.

    Facts about the store are looked up once, since a query of a million rows makes 500 calls.
    """

    def __init__(self, store: Callable[[], Snapshot | None], d_model: int | None, d_vocab: int | None) -> None:
        self._opened, self.d_model, self._d_vocab = store, d_model, d_vocab
        self.not_taken: Counter[str] = Counter()
        self._kinds: dict[tuple[str, str], str] = {}  # not the readers, since these hold the store
        self._unembeddings: dict[str, Unembedding] = {}
        self._directions: dict[str, np.ndarray] = {}

    def act(self, token_ids: pa.ChunkedArray, run: pa.ChunkedArray, site: pa.ChunkedArray) -> pa.Array:
        """Activations of tokens: the SQL function `act`."""
        ids = token_ids.to_numpy()
        return _by_group(lambda rows, *where: self.reader(*where).gather(ids[rows]), self.d_model, run, site)

    def attention(self, token_ids: pa.ChunkedArray, run: pa.ChunkedArray, site: pa.ChunkedArray) -> pa.Array:
        """Weights from tokens to all keys, a list per head: the SQL function `attention`."""
        ids = token_ids.to_numpy()
        if not len(ids):
            return pa.array([], pa.list_(pa.list_(pa.float32())))
        return _by_group(lambda rows, *where: self.pattern(*where).gather(ids[rows]), None, run, site)

    def logit_lens(self, token_ids: pa.ChunkedArray, run: pa.ChunkedArray, site: pa.ChunkedArray) -> pa.Array:
        """Logits of tokens' residual streams: the SQL function `logit_lens`."""
        ids = token_ids.to_numpy()

        def logits(rows: np.ndarray, run: str, site: str) -> np.ndarray:
            return self._unembedding(run).logits(self.reader(run, site).gather(ids[rows]))

        return _by_group(logits, self._d_vocab, run, site)

    def probe_direction(self, name: pa.ChunkedArray) -> pa.Array:
        """Recorded directions by name: the SQL function `probe_direction`."""
        return _by_group(lambda rows, name: np.tile(self._direction(name), (len(rows), 1)), self.d_model, name)

    def batches_of(self, run: pa.ChunkedArray, site: pa.ChunkedArray) -> pa.Array:
        """The trees stored for a site: a list of (first tree_id, number of trees)."""
        asked = list(zip(run.to_pylist(), site.to_pylist(), strict=True))
        found = {where: self._batches(*where) for where in set(asked)}
        batch = pa.struct([("first_tree_id", pa.int32()), ("n_trees", pa.int32())])
        return pa.array([found[where] for where in asked], pa.list_(batch))

    @property
    def _store(self) -> Snapshot:
        store = self._opened()
        if store is None:
            raise BadInput("the store is closed; open it again")
        return store

    def reader(self, run: str, site: str) -> Reader:
        """The reader of a residual site.

        Args:
            site: the site's name.

        Raises:
            NotStored: there is no such run or site.
            BadInput: the site is a pattern, or the store is closed.
        """
        return self._reader(
            run,
            site,
            ("resid", "vector"),
            "no vector of d_model numbers; read it with Store.read (`actstore read`), or ask for a residual site (from sites "
            "where kind = 'resid')",
        )

    def pattern(self, run: str, site: str) -> Reader:
        """The reader of an attention pattern.

        Args:
            site: the site's name.

        Raises:
            NotStored: there is no such run or site.
            BadInput: the site is no pattern, or the store is closed.
        """
        return self._reader(
            run, site, ("pattern",), "no attention pattern; ask for one (from sites where kind = 'pattern')"
        )

    def _reader(self, run: str, site: str, kinds: Sequence[str], otherwise: str) -> Reader:
        """The reader of a site of these kinds; `otherwise` ends the message about another kind."""
        store, where = self._store, (run, site)
        reader = store.reader(run if where in self._kinds else store.resolve_run(run), site)
        if where not in self._kinds:
            self._kinds[where] = str(store.sql(KIND, {"run": run, "site": site}).item())
        if (kind := self._kinds[where]) not in kinds:
            raise BadInput(f"site {site!r} of run {run!r} {IS[kind]}, {otherwise}")
        return reader

    def _batches(self, run: str, site: str) -> list[dict[str, int]]:
        self.reader(run, site)  # raises for an unknown run or site
        held = self._store.sql(
            "select shards.first_tree_id, shards.n_trees from shards join sites using (run, site) "
            "where run = $run and $site in (site, short)",
            {"run": run, "site": site},
        )
        return held.to_dicts()

    def _unembedding(self, run: str) -> Unembedding:
        if run not in self._unembeddings:
            store = self._store
            found = store.sql("select weights_sha256 from runs where run = $run", {"run": store.resolve_run(run)})
            self._unembeddings[run] = read_unembedding(store, str(found.item()))
        return self._unembeddings[run]

    def _direction(self, name: str) -> np.ndarray:
        if name not in self._directions:
            self._directions[name] = _read_direction(self._store, name)
        return self._directions[name]


def _by_group(
    read: Callable[..., np.ndarray], width: int | None, first: pa.ChunkedArray, *others: pa.ChunkedArray
) -> pa.Array:
    """One vector per row; rows that share their names are read in one call.

    Args:
        read: takes rows, intp [n], and a value of each column; returns float32 [n, d].
        width: d, for a fixed-size list; None for a list.
        first: a column of text: the first name.
        others: columns of text: further names.
    """
    if not len(first):  # every row had a NULL
        return pa.array([], pa.list_(pa.float32(), width or -1))
    groups = list(_groups(first, *others))
    vectors = [_arrow(read(rows, *names), width) for names, rows in groups]
    if len(vectors) == 1:
        return vectors[0]
    return pa.concat_arrays(vectors).take(pa.array(np.argsort(np.concatenate([rows for _, rows in groups]))))


def _groups(*columns: pa.ChunkedArray) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    """The names that rows share, and the rows: intp, in their order."""
    n = len(columns[0])
    firsts = tuple(column[0] for column in columns)
    if all(pc.all(pc.equal(column, first)).as_py() for column, first in zip(columns, firsts, strict=True)):
        yield tuple(first.as_py() for first in firsts), np.arange(n)  # as in nearly every query
        return
    rows: dict[tuple[str, ...], list[int]] = {}
    for row, names in enumerate(zip(*(column.to_pylist() for column in columns), strict=True)):
        rows.setdefault(names, []).append(row)
    yield from ((names, np.array(found)) for names, found in rows.items())


def _arrow(X: np.ndarray, width: int | None) -> pa.Array:
    """float32 [n, d], or [n, head, key] as lists of lists, as Arrow that shares its memory."""
    values = pa.array(np.ascontiguousarray(X, np.float32).reshape(-1))
    if width:
        return pa.FixedSizeListArray.from_arrays(values, width)
    for axis in reversed(range(1, X.ndim)):
        ends = np.arange(math.prod(X.shape[:axis]) + 1, dtype=np.int32) * np.int32(X.shape[axis])
        values = pa.ListArray.from_arrays(pa.array(ends), values)
    return values


def _read_direction(store: Snapshot, name: str) -> np.ndarray:
    """float32 [d_model]: the direction last recorded under a name.

    Raises:
        NotStored: there is no direction of this name.
    """
    known = "from latest_results where direction is not null"
    found = store.sql(f"select direction {known} and name = $name order by recorded desc limit 1", {"name": name})
    if len(found):
        return np.array(found["direction"][0], np.float32)
    names = store.sql(f"select distinct name {known} order by name")["name"].to_list()
    if not names:
        raise NotStored(
            f"no probe direction {name!r}: the store has none yet; {advised('study', store.path, 'probes')} records them"
        )
    close = get_close_matches(name, names, n=3) or names[:3]
    raise NotStored(
        f"no probe direction {name!r}; the nearest of {len(names)} is {', '.join(close)} "
        "(select name from latest_results where direction is not null)"
    )
