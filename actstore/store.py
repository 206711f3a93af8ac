"""A store opened for reading: SQL over its tables, and activations aligned with a query's rows.

    tree → tokens → model → activations  |  store  |  SQL → X, y → study

A store is a folder: Zarr arrays of activations, a DuckDB catalog that describes them, and a log of
commits that keeps the two in step. Opening takes one snapshot and keeps it, whatever is ingested
meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, overload

from actstore.errors import BadInput, NotStored, nearest
from actstore.outputs import Exported, Work, silent
from actstore.reading import activations, given
from actstore.reading.activations import Dtype, Form
from actstore.reading.opened import Opened
from actstore.reading.rows import read_ids
from actstore.sites import Site, wanted
from actstore.sql.rows import Rows
from actstore.storage.at import absolute

if TYPE_CHECKING:
    import numpy as np
    import polars as pl
    import torch
    from transformer_lens import ActivationCache
    from transformer_lens.model_bridge import TransformerBridge

    from actstore.reading.batches import Batches
    from actstore.reading.explain import Explanation


# a column of a view is explained as that of the first of these tables that has it
SCHEMA = """
with columns as (from duckdb_columns() where database_name = 'store'),
views as (select view_oid as table_oid from duckdb_views() where database_name = 'store' and view_name <> 'sequences'),
sources as (
    select column_name, arg_min(comment, list_position(
        ['edges', 'trees', 'tokens', 'results'], table_name
    )) as of_source
    from columns
    where table_name in ('edges', 'trees', 'tokens', 'results')
    group by column_name
)
select table_name as "table", column_name as "column", data_type as type,
    if(table_oid in (from views), of_source, comment) as comment
from columns left join sources using (column_name)
order by table_oid, column_index
"""


TABLES = """
select table_name as "table", if(table_name in (select name from relations), 'labels', 'table') as kind,
    estimated_size as rows, column_count as columns
from duckdb_tables() where database_name = 'store'
union all
select view_name, 'view', null, column_count from duckdb_views() where database_name = 'store' and not internal
order by kind = 'view', kind desc, "table"
"""


def _above(name: str) -> Any:
    """A function of actstore/verbs.py, a room above this one, found by name at the call."""
    return getattr(import_module("actstore.verbs"), name)


def _reopened(path: Path, check: bool, run: str | None) -> Store:
    store = Store(path, check)
    return store if run is None else store.of(run)


class Store:
    """A store, read-only. A context manager; leaving it to the garbage collector does no harm.

    A process that is forked later (multiprocessing's default on Linux) can use neither this store
    nor another: every use is refused, and closing does nothing. Start a new process to open the
    store there. Only `batches` can be read in forked DataLoader workers.

    Args:
        path: the store's folder; `~` is the home folder.
        check: compare every file that is read with its committed hash: the catalog at once, and
            each shard of activations, whole, when it is first read. Processes of queries with
            limits and DataLoader workers check too (workers once per epoch). Without `check` a read
            looks only at sizes: a flipped bit, or a shard in the place of another, goes unnoticed.
            An array that another Zarr tool rewrote cannot be checked and is refused.

    Raises:
        NotStored: there is no store.
        TooNew: a later version of actstore made the store.
        Damaged: a committed file is missing or has another size than was committed, or a manifest
            is not the one that the next manifest, or the catalog, was written after. With `check`
            also: the catalog is not what was put in place.
        Busy: a client of DuckDB has the catalog open to write.
        LimitReached: the system allows this process no more open files or memory.
        BadInput: the path is not on this machine, or this process was forked from one that had
            opened a store.
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
        """True if files that are read are compared with their committed hashes."""
        return self._opened.check

    @property
    def catalog_is_older(self) -> bool:
        """True if an earlier version made the catalog, which each opening then builds anew.

        `actstore repair` brings it up to date.
        """
        return self._opened.was_built

    @property
    def snapshot(self) -> int:
        """Number of the last commit that this store shows."""
        return self._opened.snapshot

    @property
    def only(self) -> str | None:
        """The run whose rows this store shows, see `of`; None for the whole store."""
        return self._opened.only

    @classmethod
    def _around(cls, opened: Opened, whole: Store | None) -> Store:
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
        if "_opened" not in vars(self):  # for a traceback with variables, of an opening that failed
            return "Store(not opened)"
        only = f".of({self.only!r})" if self.only is not None else ""
        try:
            return f"Store({str(self.path)!r}, snapshot={self.snapshot}, runs={self.runs()}){only}"
        except BadInput:
            state = "closed" if self._opened.session.closed else "opened by another process"
            return f"Store({str(self.path)!r}, {state})"

    def _repr_html_(self) -> str:
        """What a notebook shows: the store's path, its snapshot, and `info()`."""
        try:
            return f"<p>{escape(str(self.path))}, snapshot {self.snapshot}</p>{self.info()._repr_html_()}"
        except BadInput:
            return f"<p>{escape(repr(self))}</p>"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle a store as its path. Loading opens the store at the snapshot of that moment."""
        return _reopened, (absolute(self.path), self.check, self.only)

    def close(self) -> None:
        """Close the store; in a process forked after it was opened, do nothing."""
        self._opened.close()

    def sql(
        self,
        query: str,
        params: Mapping[str, Any] | None = None,
        timeout: float | None = None,
        memory: str | int | None = None,
        tables: Mapping[str, given.Table] | None = None,
    ) -> pl.DataFrame:
        """Run one SQL query over the store's tables; see actstore/catalog/schema.sql for columns.

        Besides DuckDB's own functions there are `act(token_id, run, site)`, a token's activation as
        FLOAT[d_model], and `logit_lens(token_id, run, site)`, its logits as FLOAT[d_vocab]. Both
        are FLOAT[] if the store's sites differ in width, or its runs in d_vocab. A list becomes an
        array for DuckDB's array functions by `act(…)::float[128]`; the functions below take both.
        `attention(token_id, run, site)` reads a pattern: a token's weights to all keys, a list per
        head, FLOAT[][]. Further there are `probe_direction(name)`, `dot(a, b)`, `norm(x)`,
        `distance(a, b)`, `cosine(a, b)`, `project(x, direction)` (the signed length of x along
        direction), and the table `activations(run, site)`: tokens, with their activations as `x`.

        In the top SELECT, with its own alias (`act(token_id, 'run', 'site') as x`), `act` reads
        only the rows that the query returns. Elsewhere `act` reads every row that a join, a filter
        or an ORDER BY looks at. A column passed to `act`, `attention` or `logit_lens` must have a
        name ending in token_id; expressions are not checked.

        The tables hold every run and every dataset. A query of `outcomes`, `predictions` or
        `generations` therefore chooses a run (`where run = …`), or is asked in one run's session,
        `of(run)`. A query that does neither, and yields no column `run`, gets the warning
        `actstore.SeveralRuns` if several runs have rows there.

        Args:
            query: a SELECT; `$name` stands for a parameter.
            params: a value for each `$name`: numbers, texts, dates; lists, arrays, Series and
                tensors for `unnest($name)`.
            timeout: seconds after which the query is stopped. With `timeout` or `memory` the query
                runs in its own process, which takes a second to start (not counted) and is killed
                at the limit in any case.
            memory: most memory for the query and its result: bytes, or text such as "2GB".
            tables: tables of your own for this query alone, by name: `tables={"mine": frame}` is
                read by `from mine`. A table is a frame of polars, pandas, Arrow or DuckDB, a dict
                of columns, or the path of a .parquet, .csv or .jsonl file. See `label` for tables
                that stay.

        Returns:
            A polars frame.

        Raises:
            BadInput: DuckDB refuses the query (the message has DuckDB's words, the line and a
                caret); a parameter has a type that no query takes; or a function is given another
                id as a token_id.
            NotStored: a function is asked for something that is not stored.
            LimitReached: the query reached a limit.
        """
        return self._opened.beside(tables).sql(query, params, timeout, memory)

    def rows(
        self,
        query: str,
        params: Mapping[str, Any] | None = None,
        timeout: float | None = None,
        memory: str | int | None = None,
        tables: Mapping[str, given.Table] | None = None,
    ) -> Rows:
        """Run one SQL query as `sql` does, for its rows as tuples of Python's own values.

            for role, n in store.rows("select role, count(*) from tokens group by all"):
                print(role, n)

        A short result of numbers, texts and lists of them needs neither polars nor pyarrow, whose
        imports take a tenth of a second.

        Args:
            query, params, timeout, memory, tables: see `sql`.

        Returns:
            The rows, with the names and types of their columns.

        Raises:
            BadInput, NotStored, LimitReached: see `sql`.
        """
        return self._opened.beside(tables).rows(query, params, timeout, memory)

    def latest(self) -> Store:
        """This store, if nothing was committed since it was opened; else the store opened anew.

        An open store shows one snapshot for good. A store opened anew has the same `check` and, if
        this store shows one run, that run.

        Raises:
            NotStored, Damaged, Busy: see Store.
            BadInput: this store is closed, or belongs to another process.
        """
        return self if self._opened.whole.is_latest() else _reopened(self.path, self.check, self.only)

    @property
    def whole(self) -> Store:
        """The store with every run."""
        return self._whole or self

    def of(self, run: str) -> Store:
        """The store as one run sees it: a session whose tables hold only that run's rows.

        `outcomes`, `predictions`, `generations`, `results`, `runs`, `sites` and `shards` hold the
        run's rows; `trees`, `edges`, `tokens` and the views over them those of its dataset;
        `datasets` that dataset; `models` its model. A query therefore need not name the run, and
        gives the same rows whatever else is stored. `store.main.outcomes` is the whole table here,
        too. Every method works as on the whole store, with this run as the default. Both stores
        share what is open: closing one closes both.

        Raises:
            NotStored: there is no such run.
            BadInput: this store shows another run, or is closed.
        """
        return Store._around(self._opened.of(run), self.whole)

    def beside(self, tables: Mapping[str, given.Table]) -> Store:
        """The store with tables of your own beside its own, for every query.

            mine = store.beside({"mine": frame})
            actstore.queries.select(mine, "mine.sql")

        `sql(…, tables=…)` does so for one query. Both stores share what is open: closing one closes
        both.

        Args:
            tables: see `sql`.

        Raises:
            BadInput: a table has the name of another, or is no table.
        """
        found = Store._around(self._opened.whole.beside(tables), None)
        return found if self.only is None else found.of(self.only)

    @property
    def tables(self) -> list[str]:
        """Names of the tables and views that `sql` reads, your own views last."""
        return [*self.schema()["table"].unique(maintain_order=True), *self._opened.session.views]

    def schema(self) -> pl.DataFrame:
        """One row per column of a table or view: table, column, type, comment (NULL for views).

        The columns of a view of your own are those of `store.sql("describe NAME")`.
        """
        return self.whole.sql(SCHEMA)

    def schema_rows(self, table: str | None = None) -> Rows:
        """The rows of `schema` as tuples of Python's own values, see `rows`.

        Args:
            table: of this table or view alone, a view of your own, too; default: of all.

        Raises:
            NotStored: there is no such table.
        """
        every = self.whole.rows(SCHEMA)
        if table is None:
            return every
        if len(found := every.where("table", table)):
            return found
        if table in self._opened.session.views:
            described = self.whole.rows(f'describe "{table}"')
            rows = [(table, row["column_name"], row["column_type"], None) for row in described.dicts()]
            return Rows(every.columns, every.types, every.kinds, rows)
        known = dict.fromkeys([*(row[0] for row in every), *self._opened.session.views])
        raise NotStored(f"no table {table!r}{nearest(table, known)}; {self.path} has {', '.join(known)}")

    def tables_rows(self) -> Rows:
        """A row per table and view: table, kind, rows (of tables), columns; see `rows`.

        `kind` is table, labels (a table of yours or of a dataset's input), view, or own view.
        """
        found = self.whole.rows(TABLES)
        views = [(name, "own view", None, None) for name in self._opened.session.views]
        return Rows(found.columns, found.types, found.kinds, [*found, *views])

    def info(self) -> pl.DataFrame:
        """One row per run: model, trees, sites, size, and the share of right greedy answers.

        `stored_as` names the dtype and codec of the run's sites, such as `float16` or `int8, zstd`;
        NULL for float32 without a codec.
        """
        return self.info_rows().frame()

    def info_rows(self) -> Rows:
        """The rows of `info` as tuples of Python's own values, see `rows`."""
        found = self.whole.rows(files("actstore.catalog").joinpath("info.sql").read_text(encoding="utf-8"))
        runs = [row["run"] for row in found.dicts()]
        of_all = found.with_column("sites", [" ".join(self.whole.sites(run)) or None for run in runs])
        return of_all if self.only is None else of_all.where("run", self.only)

    def runs(self) -> list[str]:
        """Names of the runs, in the order of their definition."""
        return self._opened.runs()

    def sites(self, run: str) -> list[str]:
        """Short names of a run's sites, in the order of the forward pass."""
        return self._opened.sites(run)

    def resolve_run(self, run: str | None) -> str:
        """Resolve a run's name: the given run, or the store's only run.

        Args:
            run: a run's name, or None.

        Raises:
            NotStored: there is no such run.
            BadInput: no run was named and there are several; or the store is closed, or was opened
                by another process.
        """
        return self._opened.resolve_run(run)

    def model(self, run: str | None = None, device: str = "cpu") -> TransformerBridge:
        """The model of a run, made from the weights that the store keeps.

            X, rows = store.read(query, site="resid_post.2", out="torch")

            def patch(resid, hook):  # resid: float32 [tree, position, d_model]
                resid[0, rows["position"].to_list()] = X
                return resid

            hooks = [("blocks.2.hook_resid_post", patch)]
            logits = store.model().run_with_hooks(ids, fwd_hooks=hooks)

        The column `site` of the table `sites` holds the names of hooks. A token id is the place of
        a word in `models.vocabulary`, counted from 0.

        Args:
            run: the run; optional if the store holds one run.
            device: "cpu" or "cuda".

        Returns:
            A TransformerBridge of TransformerLens: float32, in eval mode, without gradients.

        Raises:
            NotStored: there is no such run.
            BadInput: there is no such device; or no run was named and there are several.
            Damaged: the stored weights are not those that were run.
        """
        return _above("model")(self, run, device)

    def cache(
        self,
        sequence_ids: Sequence[int],
        sites: Sequence[Site] | None = None,
        run: str | None = None,
        model: TransformerBridge | None = None,
    ) -> ActivationCache:
        """Whole sequences as TransformerLens' ActivationCache, as `run_with_cache` gives it.

            cache = store.cache([0, 1, 2], ["resid_post", "pattern.0"], model=store.model())
            cache["resid_post", 3]  # float32 [sequence, position, d_model]

        The cache's keys are the hooks' full names, the column `site` of the table `sites`. It holds
        [sequence, position, d_model], [sequence, position, head, d_head], and for patterns
        [sequence, head, query, key], in the order of `sequence_ids`. Sequences are padded on the
        right with zeros to the longest of them. The numbers are those of a forward pass, up to its
        rounding in batches of another size.

        Args:
            sequence_ids: one or more ids of the table `sequences`; a tree's is its tree_id.
            sites: sites to hold, see `read`; rows may differ in shape. Default: all of the run.
            run: the run to read; optional if the store holds one run.
            model: a model for those methods of the cache that need one (`logit_attrs`,
                `apply_ln_to_stack`), such as `store.model(run)`; default: none.

        Raises:
            NotStored: there is no such run, site or sequence, or a sequence is not ingested yet.
            BadInput: there is no id, or ids are no integers.
            Damaged: see `read`.
        """
        found: ActivationCache = _above("cache")(self, sequence_ids, sites, run, model)
        return found

    def export(
        self,
        out: str | Path,
        query: given.Tokens | None = None,
        run: str | None = None,
        site: Site | None = None,
        params: Mapping[str, Any] | None = None,
        *,
        format: str | None = None,
        context: int | None = None,
        dtype: str = "float32",
        timeout: float | None = None,
        memory: str | int | None = None,
        tables: Mapping[str, given.Table] | None = None,
        progress: Work = silent,
    ) -> Exported:
        """Write activations for other tools, whole or not at all, outside every store.

        `saelens` is a Hugging Face dataset that SAELens reads as cached activations
        (`use_cached_activations`). Each of its rows holds the activations of `context` tokens, in
        the query's order, in a column that is named like the hook: [context, d_in]. `token_ids` are
        the tokens' numbers in the model's vocabulary, `store_token_ids` their ids here. Tokens
        after the last whole row are left out. `parquet` is the query's rows with a column `x`.
        `npy` is X alone. Memory holds the query's rows and a piece of X.

        Args:
            out: a file .parquet or .npy; otherwise a new folder.
            query: see `read`; default: every token that the run holds at the site.
            run, site, params, timeout, memory, tables: see `read`.
            format: saelens, parquet or npy; default: as the ending of `out` says.
            context: tokens per row of a dataset; default: as many as each sequence has among the
                rows, if that is one number, else 128.
            dtype: float32 or float16.
            progress: see `outputs.Work`.

        Returns:
            What was written: `n_tokens`, `n_left_out`, `n_not_finite` (rows with a NaN or an
            infinity), `context`.

        Raises:
            NotStored, LimitReached, Damaged: see `read`.
            BadInput: see `read`; or nothing can be written there, the folder is there, the library
                `datasets` is not installed, or a number is too large for the dtype.
        """
        _above("check_out")(out, format)
        run = self.resolve_run(run)
        (name,) = wanted(self._opened, run, site, None)
        rows = None if query is None else read_ids(self._opened.beside(tables), run, query, params, timeout, memory)[1]
        found: Exported = _above("export_rows")(self, out, rows, run, name, format, context, dtype, progress)
        return found

    def record(self, name: str, frame: pl.DataFrame, wait: float = 10.0) -> None:
        """Record numbers of your own in the table `results`, in one commit.

        This store keeps its snapshot: open the store again to see the rows.

        Args:
            name: of your study; not that of a study of actstore.
            frame: columns `metric` and `value`, and any other column of `results`. `study`,
                `params`, `snapshot` and `version` are filled in; so is `run`, if the store holds
                one. A row with a `name` and a `direction` [d_model] is a direction for
                `probe_direction(name)`.
            wait: seconds to wait for another process that writes to the store.

        Raises:
            BadInput: the name is taken, or the frame's columns are not those of `results`.
            NotStored: there is no such run.
            Busy: another process still writes.
        """
        _above("record_rows")(self, name, frame, wait)

    def label(
        self,
        name: str,
        labels: given.Table,
        on: Literal["token_id", "sequence_id", "span"] = "token_id",
        wait: float = 10.0,
        *,
        replace: bool = False,
        add: bool = False,
    ) -> None:
        """Store labels of your own as a table, in one commit.

            store.label("sentiment", frame)  # token_id, score
            Store("demo.act").sql("select avg(score) from tokens join sentiment using (token_id)")

        The labels are verified, repaired and part of the snapshot, as all else. This store keeps
        its snapshot: open the store again to see the table. `actstore.drop(store, label=name)`
        takes it out.

        Args:
            name: of the table: lower-case letters, digits and _.
            labels: a frame of polars, pandas, Arrow or DuckDB, a dict of columns, or the path of a
                .parquet, .csv or .jsonl file. It has one row for each token or sequence that it
                labels, and any columns besides: numbers, texts, booleans, dates, and lists of them.
            on: how a row says what it labels: by a column `token_id` or `sequence_id`; or "span",
                by the columns `dataset`, `row` (of the dataset's input, from 0), `start` and `end`
                (characters of that row's text: from 0, and the one after the last). A span labels
                every token that it overlaps. Its table has the columns `token_id` and `span`, the
                number of the labels' row, and the labels' further columns.
            wait: seconds to wait for another process that writes to the store.
            replace: put these labels in the place of those of the name, if there are any. Every
                snapshot has the old or the new ones. The old rows cannot be read after that.
            add: add the rows to the labels of the name. They have the same columns, and no id that
                has a row there. Spans are numbered after those there.

        Raises:
            NotStored: the store has no such token, sequence, dataset or text; the message counts
                the rows and names the first. With `add`, also: there are no labels of the name.
            BadInput: the name is taken; there is no such column; a key is NULL or has two rows; a
                column is one of `tokens` or `sequences`, or of a type that no table holds; or a
                span lies outside the text or on no token.
            Busy: another process still writes.
        """
        _above("label")(self, name, labels, on, wait, replace=replace, add=add)

    def view(self, name: str, query: str, wait: float = 10.0, *, replace: bool = False) -> None:
        """Store a SELECT of your own as a view, in one commit.

            store.view("late", "select * from tokens where position > 20")
            Store("demo.act").read("select token_id from late", site="resid_post.0")

        Queries of `sql`, `read`, `explain`, `batches` and `export` read it like a table. In the
        session of one run it reads the run's rows. A view reads tables, labels and the store's own
        views, and no view of yours. The query is kept as text in the table `relations`; no catalog
        holds the view. This store keeps its snapshot: open the store again to read the view.
        `actstore.drop(store, label=name)` takes it out. A view that reads what was dropped later
        cannot be read.

        Args:
            name: of the view: lower-case letters, digits and _.
            query: one SELECT without parameters, checked like a query of `sql`; at most 100,000
                characters.
            wait: seconds to wait for another process that writes to the store.
            replace: put this view in the place of that of the name, if there is one.

        Raises:
            BadInput: the name is taken, or the query is refused.
            Busy: another process still writes.
        """
        _above("view")(self, name, query, wait, replace=replace)

    def checked_view(self, name: str, query: str) -> Any:
        """Check a view without storing it; see `view`.

        Returns:
            The view's declaration (catalog.declared.View).
        """
        from actstore.reading.views import checked

        return checked(self._opened, name, query)

    def append(
        self,
        run: str,
        site: str,
        token_ids: given.Tokens,
        X: Any,
        lineage: Mapping[str, Any] | None = None,
        allow_nan: bool = False,
        wait: float = 10.0,
    ) -> None:
        """Store activations of your own as a new site of a run, in one commit.

            erased = X - np.outer(X @ direction, direction)
            store.append("reproduction", "erased.3", rows, erased, {"of": "resid_post.3"})

        The site is read, hashed and verified as the run's other sites. `actstore verify
        --recompute` cannot compute it again. Tokens that were not given are not stored there. This
        store keeps its snapshot: open the store again to read the site.

        Args:
            run: the run whose dataset the tokens belong to.
            site: a name that no site of the run has.
            token_ids: token ids, each once, or a frame with a column `token_id`.
            X: floats [n, width] or [n, head, width], in the order of `token_ids`; stored as
                float32.
            lineage: what the activations are, from which site, by which code; a dict that JSON
                holds. It is kept in the column `lineage` of `sites`.
            allow_nan: accept NaN and infinity, but no row that begins with NaN: a token that is not
                stored reads so.
            wait: seconds to wait for another process that writes to the store.

        Raises:
            NotStored: there is no such run, or an id is of no token of its dataset.
            BadInput: the name is taken or cannot be a name; an id is given twice; X has another
                shape; or a number is NaN, infinite or too large for float32.
            Busy: another process still writes.
        """
        _above("append")(self, run, site, token_ids, X, lineage, allow_nan, wait)

    def labelled(self, name: str, labels: pl.DataFrame, on: Literal["token_id", "sequence_id", "span"]) -> Any:
        """Check labels without storing them; see `label`.

        Returns:
            The table's declaration (catalog.declared.Relation), and its rows.
        """
        from actstore.reading.labelled import labelled

        return labelled(self._opened, name, labels, on)

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
        dtype: Dtype = ...,
        out: Literal["numpy"] = ...,
        columns: Callable[[list[str]], None] | None = ...,
        tables: Mapping[str, given.Table] | None = ...,
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
        dtype: Dtype = ...,
        out: Literal["torch"],
        columns: Callable[[list[str]], None] | None = ...,
        tables: Mapping[str, given.Table] | None = ...,
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
        dtype: Dtype = "float32",
        out: Form = "numpy",
        columns: Callable[[list[str]], None] | None = None,
        tables: Mapping[str, given.Table] | None = None,
    ) -> tuple[Any, pl.DataFrame]:
        """Run a query that names tokens, and read their activations.

        The query sees only the trees of the run's dataset: `trees`, `edges`, `tokens`, the views
        over them, and the answers to these trees. If the query mentions no column `run`, it also
        sees only this run's answers, as in `of(run)`. Otherwise it sees the answers of every run
        over these trees. `store.main.trees` is the whole table.

        Unless the store was opened with `check=True`, files are not compared with their committed
        hashes: a flipped bit, or a shard in the place of another, is read as it is.

        A shard that is cut short while it is mapped kills the process that reads it, by SIGBUS. No
        error can be raised for it.

        Args:
            query: a SELECT with a column `token_id`; its other columns are returned, too. Instead
                of SQL: token ids (a list, an array, a Series), or a frame with a column `token_id`,
                which is returned unchanged.
            run: the run to read; optional if the store holds one run.
            site: default `resid_post.0`; also spelled `blocks.0.hook_resid_post` or `("resid_post",
                0)`.
            params: a value for each `$name` of the query.
            sites: several sites of one row shape, instead of `site`; `resid_post` stands for every
                stored layer.
            timeout, memory: limit of the query, see `sql`; reading activations has none.
            dtype: dtype of X: float32, float16, float64, or bfloat16 (torch only), whatever the run
                is stored as (`ingest --dtype`).
            out: numpy or torch; a tensor shares the memory that was read into.
            columns: called with the names of the query's columns before the query runs; its error
                is raised.
            tables: tables of your own for this query, see `sql`.

        Returns:
            X: [n, d_model] (patterns: [n, head, key]), in the model's own units; with `sites` [n,
                n_sites, d_model].
            rows: the query's frame of n rows, in the query's order, with repeats. Row i of X is the
                activation of row i.

        Raises:
            NotStored: there is no such run or site, or a token has no activation there.
            BadInput: the query is refused, has two columns of one name, yields no integer token_id
                without NULLs, or renames another id to token_id; the sites' rows differ in shape;
                dtype or out is unknown; or an activation is too large for the dtype.
            LimitReached: the query reached a limit, or X takes more memory than is free.
            Damaged: a file is not what was committed, or another store is in this one's place.
        """
        form = activations.check_form(dtype, out)
        run = self.resolve_run(run)
        names = wanted(self._opened, run, site, sites)
        readers = self._opened.readers(run, names)
        activations.same_row_shape(readers, names)
        token_ids, rows = read_ids(self._opened.beside(tables), run, query, params, timeout, memory, columns)
        return activations.read_activations(readers, token_ids, sites is None, form, out), rows

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
        tables: Mapping[str, given.Table] | None = None,
    ) -> Explanation:
        """Say what `read` with the same arguments costs: rows, chunks, shards, bytes.

        The query runs; no activation is read.

        Args:
            query, run, site, params, sites, timeout, memory, tables: see `read`.

        Raises:
            NotStored: there is no such run or site, or a token belongs to another dataset or is not
                ingested yet. Padding is not detected here; `read` raises for it.
            BadInput: see `read`.
            LimitReached: see `read`.
        """
        from actstore.reading.explain import explain

        run = self.resolve_run(run)
        return explain(
            self._opened.beside(tables), query, run, wanted(self._opened, run, site, sites), params, timeout, memory
        )

    def scan(
        self,
        run: str | None = None,
        site: Site | None = None,
        *,
        tables: Mapping[str, given.Table] | None = None,
    ) -> pl.LazyFrame:
        """A run's tokens as a polars LazyFrame, one row per token, in the order of token_id.

        Only what a query asks for is read: columns that are not selected, rows that a filter on any
        column but x removes, and x if it is not selected, are left out. DuckDB applies filters that
        compare columns with each other or with values. polars applies other filters before any
        activation is read. `collect(engine="streaming")` stops early at a `head` after a filter,
        and keeps memory flat in sinks and aggregations.

        The columns are those of `tokens`; those of `edges` for the edge that the token writes (NULL
        after the bar), its `step` named `edge_step`, since `step` is the token's own; those of
        `trees`; and `x`, Array(Float32, d_model) (patterns: [head, key]). Enums are polars Enums.

        Args:
            run: the run to read; optional if the store holds one run.
            site: see `read`; trees that are not ingested there have no rows.
            tables: tables of your own, see `sql`. Each has a column token_id, sequence_id or
                tree_id, and one row for each of these ids that it has. Its other columns are added
                before `x`; they are NULL at tokens without a row.

        Raises:
            NotStored: there is no such run or site.
            BadInput: a table has no such column, two rows for one id, or a column that the scan
                has.
        """
        from actstore.reading.scan import scan

        run = self.resolve_run(run)
        (name,) = wanted(self._opened, run, site, None)
        return scan(self._opened.beside(tables), run, name)

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
        tables: Mapping[str, given.Table] | None = None,
    ) -> Batches:
        """A torch IterableDataset of batches (X, columns) of a query's rows, for large sets.

            data = store.batches("select token_id, source from edge_targets where split = 'train'")
            for epoch in range(3):
                data.set_epoch(epoch)
                for X, columns in DataLoader(data, batch_size=None, num_workers=2):
                    loss = ((probe(X) - columns["source"]) ** 2).mean()

        X is a float32 tensor [b, d_model] (patterns: [b, head, key]), with `sites` [b, n_sites,
        d_model]. `columns` holds each column of the query. Numbers and booleans without NULL are a
        tensor [b] (FLOAT[k]: [b, k]; unsigned numbers of 16 and 32 bits become int32 and int64).
        Any other column is a list. Row i of X and of each column belongs to the same token.

        The set may be larger than memory. An epoch yields each row of the query once. The shards
        are shuffled, then all rows within a window: consecutive shards that together hold about
        `window` rows. The order depends only on ids, seed and epoch. Rows that share an id keep the
        query's order. A selection that fits into one window is shuffled uniformly. In a larger
        selection, a batch holds rows of one window's shards only, so a wider window mixes better
        and keeps more of the disk's pages in use. Memory holds the query's rows, one batch, and
        pages of a window or two, which the system can take back. Without `shuffle` the order is the
        query's: give the query an ORDER BY.

        Of a store in a bucket, shards are copied whole into this machine's cache (ACTSTORE_CACHE).
        A later epoch fetches none, as long as the shards fit under the cache's limit, 20 GB by
        default (ACTSTORE_CACHE_SIZE).

        A DataLoader takes the batches with `batch_size=None`, since they are batches already; with
        a batch_size of its own it would stack them, which is refused. Worker w of n reads batches
        w, w + n, …, and the batches come in the same order as without workers. `len()` counts the
        batches to come.

        Args:
            query: see `read`. The query runs now, on this store's snapshot; the store may be closed
                before the batches are read.
            run, site, params, sites: see `read`.
            batch_size: rows per batch; the last batch may have fewer.
            shuffle: see above.
            seed: seed of the order, 0 or more.
            start: number of the first batch to yield in the first epoch: k yields batches k, k + 1,
                … of the same epoch.
            drop_last: leave out a last batch of fewer rows.
            window: rows per window.
            timeout, memory, tables: see `read`.

        Raises:
            NotStored: see `read`; raised before the first batch.
            LimitReached: see `read`.
            BadInput: see `read`; or a number is out of range.
            Damaged: while iterating: a file is not what was committed, or another store is in this
                one's place.
        """
        from actstore.reading.batches import Batches

        run = self.resolve_run(run)
        return Batches(
            self._opened.beside(tables),
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
