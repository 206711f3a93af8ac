"""A store opened for reading: SQL over its tables, and activations aligned with the rows of a query.

    tree → tokens → model → activations  |  store  |  SQL → X, y → study

A store is a folder: Zarr arrays of activations, a DuckDB catalog of what they mean, and a log of commits that keeps the
two in step. Opening takes one snapshot and keeps it, whatever is ingested meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import polars as pl

from actstore.errors import BadInput
from actstore.reading import activations, given
from actstore.reading.opened import Opened
from actstore.reading.rows import read_ids
from actstore.sites import Site, wanted

if TYPE_CHECKING:
    import torch

    from actstore.reading.batches import Batches
    from actstore.reading.explain import Explanation


class Store:
    """A store, read-only; a context manager, though leaving it to the garbage collector harms nothing.

    A process that is forked afterwards (as multiprocessing does on Linux by default) can use neither this store nor another:
    every use refuses, and closing does nothing. Open the store in a process that is started anew; `batches` alone may be
    read in forked DataLoader workers.

    Args:
        path: the store's folder; `~` is the home folder.
        check: hold what is read against the hashes it was committed with: the catalog at once, and each shard of
            activations whole when it is first read, in this process and in those of queries with limits and of DataLoader
            workers (there once per epoch). Without it a read looks at sizes alone: a bit that flipped, or a shard in the
            place of another, goes unnoticed. An array that another Zarr tool rewrote cannot be checked and is refused.

    Raises:
        NotStored: there is no store.
        TooNew: a later version of actstore made it.
        Damaged: a committed file is missing or has another size than it was committed with, or a manifest is not the one
            that the next manifest, or the catalog, was written after; with check also: the catalog is not what was put in
            place.
        LimitReached: the system allows this process no more open files or memory.
        BadInput: the path is none of this machine; or this process was forked from one that had opened a store.
    """

    def __init__(self, path: str | Path, check: bool = False) -> None:
        self._opened = Opened(path, check)
        self._whole: Store | None = None

    @property
    def path(self) -> Path:
        """The store's folder."""
        return self._opened.path

    @property
    def check(self) -> bool:
        """Whether what is read is held against the hashes that it was committed with."""
        return self._opened.check

    @property
    def snapshot(self) -> int:
        """Number of the last commit that this store shows."""
        return self._opened.snapshot

    @property
    def only(self) -> str | None:
        """The run that this is of, see `of`; None for the whole store."""
        return self._opened.only

    @classmethod
    def _around(cls, opened: Opened, whole: Store) -> Store:
        store = cls.__new__(cls)
        vars(store).update(_opened=opened, _whole=whole)
        return store

    def __enter__(self) -> Store:
        self._opened.session.check()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        only = f".of({self.only!r})" if self.only is not None else ""
        try:
            return f"Store({str(self.path)!r}, snapshot={self.snapshot}, runs={self.runs()}){only}"
        except BadInput:
            return f"Store({str(self.path)!r}, closed)"

    def close(self) -> None:
        """Close it; in a process forked since it was opened, nothing."""
        self._opened.close()

    def sql(
        self,
        query: str,
        params: Mapping[str, Any] | None = None,
        timeout: float | None = None,
        memory: str | int | None = None,
    ) -> pl.DataFrame:
        """Run one SQL query over the store's tables (actstore/catalog/schema.sql says what each column holds).

        Beside DuckDB's own there are the functions `act(token_id, run, site)` and `logit_lens(token_id, run, site)`, which
        give a token's activation as FLOAT[d_model] and its logits as FLOAT[d_vocab] (FLOAT[] where the store's runs differ
        in d_model or d_vocab), `probe_direction(name)`, `dot(a, b)`, `norm(x)`, `distance(a, b)`, `cosine(a, b)`,
        `project(x, direction)` (the signed length of x along it), and the table `activations(run, site)`: tokens, and their
        activations as `x`. In the outermost SELECT, under a name of its own (`act(token_id, 'run', 'site') as x`), `act` is
        read for the rows that come out; elsewhere for every row that a join, a filter or an ORDER BY looks at. A column that
        `act` and `logit_lens` are given must have a name that ends in token_id; an expression may be anything.

        The tables hold every run and every set of trees, so a query of `outcomes`, `predictions` or `generations` says which
        run it wants (`where run = …`), or is asked in the session of one, `of(run)`. One that does neither, and yields no
        column `run`, gets the warning `actstore.SeveralRuns` where several runs have rows there.

        Args:
            query: a SELECT; `$name` stands for a parameter.
            params: a value for each `$name`: numbers, texts, dates; lists, arrays, Series and tensors for `unnest($name)`.
            timeout: seconds after which it is stopped. With this or `memory` it runs in a process of its own, which
                takes a second to start (not counted) and is killed at the limit, whatever it does.
            memory: what it may hold, results included: bytes, or text such as "2GB".

        Returns:
            A polars frame.

        Raises:
            BadInput: DuckDB refuses the query: its own words, its line and the caret; a parameter is of no such type; or a
                function is given another id for a token_id.
            NotStored: `act` or another function is asked for what is not there.
            LimitReached: it took longer, or held more.
        """
        return self._opened.sql(query, params, timeout, memory)

    @property
    def whole(self) -> Store:
        """The store with every run; itself, where it is not of one."""
        return self._whole or self

    def of(self, run: str) -> Store:
        """The store as one run has it: a session in which every table holds that run's rows alone.

        `outcomes`, `predictions`, `generations`, `results`, `runs`, `sites` and `shards` are the run's, `trees`, `edges`,
        `tokens` and the views over them those of its set of trees, `datasets` that set, `models` its model. So a query need
        not name the run, and gives the same rows whatever else is stored. `store.main.outcomes` is the whole table here, too.
        Every method works as on the whole store, and takes this run where none is named. The two share what they have open:
        closing one closes both.

        Raises:
            NotStored: there is no such run.
            BadInput: this store is of another run, or is closed.
        """
        return Store._around(self._opened.of(run), self.whole)

    def info(self) -> pl.DataFrame:
        """One row a run: its model, trees, sites and size, and how often its greedy answers are right."""
        of_all = self.whole.sql(files("actstore.catalog").joinpath("info.sql").read_text(encoding="utf-8"))
        return of_all if self.only is None else of_all.filter(run=self.only)

    def runs(self) -> list[str]:
        """Names of the runs, in the order they were defined."""
        return self._opened.runs()

    def sites(self, run: str) -> list[str]:
        """Short names of the sites of a run, in the order of the forward pass."""
        return self._opened.sites(run)

    def run(self, run: str | None) -> str:
        """The run meant: the one named, or the only one there is.

        Raises:
            NotStored: there is no such run.
            BadInput: none was named and there are several; or the store is closed, or of another process.
        """
        return self._opened.run(run)

    @overload
    def read(
        self,
        query: given.Tokens,
        run: str | None = ...,
        site: Site | None = ...,
        params: Mapping[str, Any] | None = ...,
        *,
        sites: Sequence[Site] | None = ...,
        timeout: float | None = ...,
        memory: str | int | None = ...,
        dtype: str = ...,
        out: Literal["numpy"] = ...,
        columns: Callable[[list[str]], None] | None = ...,
    ) -> tuple[np.ndarray, pl.DataFrame]: ...

    @overload
    def read(
        self,
        query: given.Tokens,
        run: str | None = ...,
        site: Site | None = ...,
        params: Mapping[str, Any] | None = ...,
        *,
        sites: Sequence[Site] | None = ...,
        timeout: float | None = ...,
        memory: str | int | None = ...,
        dtype: str = ...,
        out: Literal["torch"],
        columns: Callable[[list[str]], None] | None = ...,
    ) -> tuple[torch.Tensor, pl.DataFrame]: ...

    def read(
        self,
        query: given.Tokens,
        run: str | None = None,
        site: Site | None = None,
        params: Mapping[str, Any] | None = None,
        *,
        sites: Sequence[Site] | None = None,
        timeout: float | None = None,
        memory: str | int | None = None,
        dtype: str = "float32",
        out: str = "numpy",
        columns: Callable[[list[str]], None] | None = None,
    ) -> tuple[Any, pl.DataFrame]:
        """Run a query that names tokens, and read their activations.

        The query sees the trees of the run's set alone: `trees`, `edges`, `tokens`, the views over them, and the answers to
        these trees. Where it mentions no column `run`, it also sees this run's answers alone, as in `of(run)`; where it does,
        the answers of every run over these trees. `store.main.trees` is the whole table.

        Unless the store was opened with `check=True`, what is read is not held against the hashes that it was committed
        with: a flipped bit, or a shard that was put in the place of another, is read as it lies on the disk.

        Args:
            query: a SELECT with a column `token_id`; whatever else it yields comes back beside it. In its place: token ids (a
                list, an array, a Series), or a frame with a column `token_id`, which comes back as it is.
            run: whose activations; may be left out where the store holds one run.
            site: `resid_post.0` (read where none is named), `blocks.0.hook_resid_post` or `("resid_post", 0)`.
            params: a value for each `$name` of the query.
            sites: several sites of one row shape, in place of `site`; `resid_post` among them is every layer that is stored.
            timeout, memory: limits of the query, as of `sql`; reading the activations has none.
            dtype: of X: float32, float16, float64, or bfloat16 (torch alone).
            out: numpy or torch; a tensor shares the memory of what was read.
            columns: called with the names of the query's columns before the query runs; what it raises is raised.

        Returns:
            X: [n, d_model] (patterns: [n, head, key]), in the model's own units; with `sites` [n, n_sites, d_model].
            rows: the query's frame of n rows; row i of X is the activation of row i, in whatever order, repeats kept.

        Raises:
            NotStored: no such run or site, or a token has no activation there.
            BadInput: the query is refused, has two columns of one name, yields no integer token_id without NULLs, or one that
                is another id renamed; the sites' rows differ in shape; no such dtype or out; or an activation is too large for
                the dtype.
            LimitReached: the query took longer, or held more.
            Damaged: a file is not what was committed, or another store was put in the place of this one.

        A shard that is cut short while it is mapped kills the process that reads it (SIGBUS): no error can be raised.
        """
        dtype = activations.check_form(dtype, out)
        run = self.run(run)
        names = wanted(self._opened, run, site, sites)
        readers = [self._opened.reader(run, name) for name in names]
        activations.same_row_shape(readers, names)
        token_ids, rows = read_ids(self._opened, run, query, params, timeout, memory, columns)
        return activations.read_activations(readers, token_ids, sites is None, dtype, out), rows

    def explain(
        self,
        query: given.Tokens,
        run: str | None = None,
        site: Site | None = None,
        params: Mapping[str, Any] | None = None,
        *,
        sites: Sequence[Site] | None = None,
        timeout: float | None = None,
        memory: str | int | None = None,
    ) -> Explanation:
        """What `read` with the same arguments will cost: rows, chunks, shards, bytes. The query runs; no activation is read.

        Raises:
            NotStored: no such run or site, or a token is of another set of trees or not ingested yet. That one is padding
                only the read finds out.
            BadInput, LimitReached: as `read`.
        """
        from actstore.reading.explain import explain

        run = self.run(run)
        return explain(self._opened, query, run, wanted(self._opened, run, site, sites), params, timeout, memory)

    def scan(self, run: str | None = None, site: Site | None = None) -> pl.LazyFrame:
        """The tokens of a run as a polars LazyFrame, one row a token, in the order of token_id.

        What the query does not ask for is not read: columns that it does not select, rows that a filter on any column but
        x leaves out, and x itself where it is not selected. Filters that compare columns with each other or with values
        are answered by DuckDB, others by polars before any activation is read. `collect(engine="streaming")` stops early
        at a `head` behind a filter, and keeps memory flat in sinks and aggregations.

        Columns: those of `tokens`; of the edge that a token writes those of `edges` (NULL behind the bar), its `step` named
        `edge_step`, since `step` is the token's own; those of the tree, from `trees`; and `x`, Array(Float32, d_model)
        (patterns: [head, key]). Enums are polars Enums.

        Args:
            run: whose activations; may be left out where the store holds one run.
            site: as of `read`; trees that are not ingested there have no rows.

        Raises:
            NotStored: no such run or site.
        """
        from actstore.reading.scan import scan

        run = self.run(run)
        (name,) = wanted(self._opened, run, site, None)
        return scan(self._opened, run, name)

    def batches(
        self,
        query: given.Tokens,
        run: str | None = None,
        site: Site | None = None,
        params: Mapping[str, Any] | None = None,
        *,
        sites: Sequence[Site] | None = None,
        batch_size: int = 4096,
        shuffle: bool = True,
        seed: int = 0,
        start: int = 0,
        drop_last: bool = False,
        window: int = 2**18,
        timeout: float | None = None,
        memory: str | int | None = None,
    ) -> Batches:
        """A torch IterableDataset of batches (X, columns) of a query's rows, for sets that are larger than memory.

            data = store.batches("select token_id, source from edge_targets where split = 'train'")
            for epoch in range(3):
                data.set_epoch(epoch)
                for X, columns in DataLoader(data, batch_size=None, num_workers=2):
                    loss = ((probe(X) - columns["source"]) ** 2).mean()

        X is a float32 tensor [b, d_model] (patterns: [b, head, key]), with `sites` [b, n_sites, d_model]. `columns` has
        each column of the query: numbers and booleans without NULL as a tensor [b] (FLOAT[k]: [b, k]; unsigned ones of 16
        and 32 bits as int32 and int64), any other as a list. Row i of each is of one token.

        An epoch yields each row of the query once, repeats as often as the query has them. Its order follows from the
        ids, seed and epoch, however the query orders its rows (those with one and the same id as it orders them): the
        shards are shuffled, then all rows of each `window` rows' worth of shards. A selection that fits into one window is
        shuffled uniformly; of a larger one a batch holds rows of the window's shards alone, so a wider window mixes better
        and keeps more of the disk's pages in use. In memory are the query's rows, one batch, and pages of a window
        or two, which the system can take back. Without shuffle the order is the query's: give it an ORDER BY.

        In a DataLoader (with batch_size=None), worker w of n reads batches w, w + n, …, and they come in the same order as
        without workers. `len()` counts the batches to come.

        Args:
            query, run, site, params, sites, timeout, memory: as of `read`; the query runs now, on this store's snapshot, and
                the store may be closed before the batches are read.
            batch_size: rows; the last batch may have fewer.
            shuffle: see above.
            seed: of the order, from 0 on.
            start: number of the first batch to yield in the first epoch: k yields batches k, k + 1, … of the whole run.
            drop_last: leave out a last batch of fewer rows.
            window: rows.

        Raises:
            NotStored: as `read`, and before the first batch.
            LimitReached: as `read`.
            BadInput: as `read`; or a number that cannot be.
            Damaged: on iterating: a file is not what was committed, or another store was put in the place of this one.
        """
        from actstore.reading.batches import Batches

        run = self.run(run)
        return Batches(
            self._opened,
            query,
            run,
            wanted(self._opened, run, site, sites),
            params,
            one_site=sites is None,
            batch_size=batch_size,
            shuffle=shuffle,
            seed=seed,
            start=start,
            drop_last=drop_last,
            window=window,
            timeout=timeout,
            memory=memory,
        )
