"""An open store: its folder, a session on one snapshot of its catalog, and readers of its sites."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb

from actstore.advice import no_run
from actstore.arrays.families import in_order
from actstore.catalog import hash_note, tables
from actstore.catalog.tables import one_line
from actstore.commits import checkpoint
from actstore.commits.checkpoint import Checkpoint
from actstore.commits.format import FORMAT_VERSION, check_format
from actstore.commits.log import check_sizes, live, log_hash, manifests
from actstore.commits.manifest import Manifest
from actstore.errors import ActstoreError, BadInput, Damaged, NotStored, advised
from actstore.reading import given, scope
from actstore.reading.catalog_rows import catalog_rows
from actstore.sql import rows as rows_of
from actstore.sql.macros import add_macros
from actstore.sql.session import Check, Session
from actstore.storage.at import at, place
from actstore.storage.backend import Reading
from actstore.storage.content import Text
from actstore.storage.machine import limit_reached

if TYPE_CHECKING:
    import polars as pl

    from actstore.arrays.site import Reader
    from actstore.sql.functions import Vectors
    from actstore.sql.rows import Rows

NAMES = "select table_name from information_schema.tables where table_catalog = 'store'"


class Opened:
    """What is open of a store; Store documents what each method takes, returns and raises.

    Attributes:
        path: the store's folder.
        folder: the place of its bytes, held open.
        session: the session on the catalog.
        snapshot: number of the catalog's last commit.
        check: True if files that are read are compared with their committed hashes.
    """

    def __init__(self, path: str | Path, check: bool = False) -> None:
        self.path, self.check = place(path), check
        self._readers: dict[tuple[str, str], Reader] = {}
        self.run_names: list[str] | None = None
        self.was_built = False  # True if the catalog was built from the parts at opening
        self._functions: list[Vectors] = []  # one after the first query; shared with the stores of runs
        self._adding_functions = threading.Lock()
        self.only: str | None = None  # the run whose rows this shows, see `of`
        self.parent: Opened | None = None  # the whole store, if this shows one run
        self.beside_of: Opened | None = None  # what holds the session, if this has a caller's tables beside it
        with _opening_errors(self.path), ExitStack() as opened:
            self._open(opened)
            self._opened = opened.pop_all()

    def _open(self, opened: ExitStack) -> None:
        self.about = check_format(self.path, older=True)
        summed = None if self.check else checkpoint.parsed(checkpoint.content(self.path))  # before the catalog
        hashes: dict[str, str] = {}
        self.folder: Reading = at(self.path).hold(hashes if self.check else None)
        opened.callback(self.folder.close)
        [catalog] = opened.enter_context(at(self.path).local([tables.CATALOG]))
        tables.refuse_replayed(self.path, catalog)
        self.session = self._open_session(catalog)
        opened.callback(self.session.close)
        tables.refuse_replayed(self.path, catalog)  # one that came while the catalog was opened was read with it
        with _catalog_errors(self.path):
            try:
                self._check_tables()
            except ValueError:
                if not self._lacks_columns():
                    raise
                self.session.close()
                self.session = self._open_older()
                opened.callback(self.session.close)
                self._check_tables()
            self.snapshot, hash_of_log = self._snapshot()
        committed = self._check_log(hash_of_log, summed)
        hashes |= {file.path: file.xxh3_128 for manifest in committed for file in manifest.files}
        if self.check and self.was_built:
            for part in [part for manifest in committed for part in manifest.parts]:
                self.folder.read(part.path, part.bytes)
        self.folder.check()  # or the session and the arrays may belong to two stores

    def _check_log(self, hash_of_log: str, summed: Checkpoint | None) -> list[Manifest]:
        """Compare the log with the catalog, and the sizes of the files that its manifests name.

        Where the checkpoint fits, it stands for past batches, and the size of their shards is
        compared when a shard is first read.

        Returns:
            The manifests that were read, or that the checkpoint holds.
        """
        if summed and (few := summed.since(self.path, self.snapshot, hash_of_log)) is not None:
            with suppress(Damaged):  # the manifests judge what is damaged
                check_sizes(self.path, few)
                return few
        # what was dropped since is not looked for: the next writer removes it
        committed = live(manifests(self.path, least=self.snapshot))[: self.snapshot]
        if log_hash(committed) != hash_of_log:
            raise Damaged(
                f"the manifests of {self.path} are not those that its catalog was built from; see "
                f"{advised('verify', self.path)}"
            )
        check_sizes(self.path, committed)
        return committed

    @property
    def vectors(self) -> Vectors:
        """The session's functions, added by the first query that needs one: they import pyarrow."""
        from actstore.sql.functions import add_functions

        self.with_macros()
        with self._adding_functions:
            if not self._functions:
                with _opening_errors(self.path), _catalog_errors(self.path), tables.ctrl_c():
                    self._functions.append(add_functions(self.session, self.whole))
        return self._functions[0]

    def with_macros(self) -> Session:
        """The session, with its macros and declared views."""
        self.session.check()
        with self._adding_functions:
            if not self.session.has_macros:
                with _opening_errors(self.path), _catalog_errors(self.path), tables.ctrl_c():
                    add_macros(self.session, self.whole)
                self.session.has_macros = True
        return self.session

    def _open_session(self, catalog: Path) -> Session:
        if self.about["format"] == FORMAT_VERSION:
            return self._open_checked(catalog) if self.check else Session(catalog, self.path)
        return self._open_older()

    def _open_older(self) -> Session:
        """Open a catalog that is built from the parts: the store's own lacks tables or columns."""
        from actstore.catalog import build

        self.was_built = True
        with build.of_older(self.path) as built:
            return Session(built, self.path)

    def _open_checked(self, catalog: Path) -> Session:
        """Open the catalog after its hash was compared with the noted one."""
        while True:  # a writer may replace the catalog meanwhile
            session = Session(catalog, self.path)
            try:
                is_noted = hash_note.is_noted(self.path, session.fileno())
            except FileNotFoundError:
                is_noted = False
            if is_noted:
                return session
            session.close()
            if is_noted is False:
                raise Damaged(
                    f"{self.path / tables.CATALOG} is not what was put in place (its hash is not noted): look with "
                    f"{advised('verify', self.path)}, then mend it with {advised('repair', self.path)}"
                )

    def close(self) -> None:
        """See Store.close."""
        self._opened.close()
        self._readers.clear()

    def _lacks_columns(self) -> bool:
        """Whether a version before the last columns of the present format made the catalog."""
        with suppress(BadInput):
            self.session.columns(
                [
                    "select task, generations.sequence_id, base_run, vector from datasets, generations, interventions, edits"
                ]
            )
            return False
        with suppress(BadInput):
            return bool(self.session.columns(["select first_tree_id from datasets"]))
        return False

    def _check_tables(self) -> None:
        """Raises as check_tables; the slow query runs only if the types are not as expected."""
        with suppress(BadInput):
            held = self.session.columns([tables.ROWS.format(name) for name in tables.TABLE_NAMES])
            there = dict(zip(tables.TABLE_NAMES, held, strict=True))
            wanted = {(table, column): dtype for (table, column), (dtype, _) in tables.columns().items()}
            wanted |= {(table, "rowid"): "BIGINT" for table in tables.TABLE_NAMES}
            if all(there[table].get(column) == dtype for (table, column), dtype in wanted.items()):
                return
        tables.check_tables(self.session.look_up(tables.TABLES_THERE))

    def _snapshot(self) -> tuple[int, str]:
        (found,) = self.session.look_up("select snapshot, log_xxh3_128 from snapshot")
        return int(found["snapshot"]), str(found["log_xxh3_128"])

    def sql(
        self,
        query: str,
        params: Mapping[str, Any] | None = None,
        timeout: float | None = None,
        memory: str | int | None = None,
        reads: str | None = None,
        check: Check | None = None,
    ) -> pl.DataFrame:
        """See Store.sql.

        Args:
            query, params, timeout, memory: see Store.sql.
            reads: the run whose activations are read at the query's token_id, see scope.ask.
            check: see Session.sql.
        """
        given.check_query(query)
        params = given.parameters(params)
        if timeout is None and memory is None:
            return scope.ask(self, query, params, reads, check)
        return self._limited(query, params, timeout, memory, reads, check)

    def rows(
        self,
        query: str,
        params: Mapping[str, Any] | None = None,
        timeout: float | None = None,
        memory: str | int | None = None,
    ) -> Rows:
        """See Store.rows."""
        given.check_query(query)
        params = given.parameters(params)
        if timeout is None and memory is None:
            return scope.rows(self, query, params)
        return rows_of.of_frame(self._limited(query, params, timeout, memory))

    def _limited(
        self,
        query: str,
        params: dict[str, Any],
        timeout: float | None,
        memory: str | int | None,
        reads: str | None = None,
        check: Check | None = None,
    ) -> pl.DataFrame:
        from actstore.sql import process

        return process.run_in_process(self, query, params, process.Limits.of(timeout, memory), reads, check)

    @property
    def whole(self) -> Opened:
        """See Store.whole."""
        return self.parent or self

    def is_latest(self) -> bool:
        """Whether the store is what was opened, and nothing was committed since."""
        self.session.check()
        with suppress(Damaged):  # another store in its place, say, which is judged where it is opened
            self.folder.check()
            return not manifests(self.path, after=self.snapshot, least=self.snapshot)
        return False

    def of(self, run: str) -> Opened:
        """See Store.of."""
        run = self.resolve_run(run)
        scoped = copy.copy(self.whole)  # the functions hold the whole store by a weak reference
        scoped.parent, scoped.only, scoped.run_names = self.whole, run, [run]
        return scoped

    def beside(self, tables: Mapping[str, Any] | None) -> Opened:
        """This store with a caller's tables beside its own.

        Args:
            tables: see Store.sql; without any, the store itself is returned.
        """
        if not tables:
            return self
        _ = self.vectors  # which hold the store weakly, and not the copy
        taken = {row["table_name"] for row in self.session.look_up(NAMES)} | self.session.views.keys()
        found = copy.copy(self)
        found.session = self.session.beside(given.tables(tables, taken | self.session.tables.keys()))
        found.beside_of = self
        return found

    def runs(self) -> list[str]:
        """See Store.runs."""
        self.session.check()
        if self.run_names is None:  # a snapshot's runs never change
            self.run_names = [run for (run,) in self._texts("select run from runs")]
        return list(self.run_names)

    def sites(self, run: str) -> list[str]:
        """See Store.sites."""
        query = "select site, short from sites where run = $run order by rowid"
        return in_order(dict(self._texts(query, {"run": self.resolve_run(run)})))

    def _texts(self, query: str, params: Mapping[str, Any] | None = None) -> list[list[str]]:
        """Rows of texts in the catalog."""
        return catalog_rows(self, list[Text], [[*row.values()] for row in self.session.look_up(query, params)])

    def resolve_run(self, run: str | None) -> str:
        """See Store.resolve_run."""
        self.session.check()
        if self.only is not None and run not in (None, self.only):
            raise BadInput(f"this is run {self.only!r} of {self.path}, and not run {run!r}; ask the whole store")
        runs = self.runs()
        if run in runs and run is not None:
            return run
        if run is not None:
            raise no_run(self, run, runs)
        held = f"{self.path} holds {', '.join(runs) if runs else 'no run'}"
        if len(runs) == 1:
            return runs[0]
        if not runs:
            raise NotStored(f"{held} yet; ingest one with {advised('ingest', self.path, '--model', 'reproduction')}")
        raise BadInput(f"which run? {held}: name one (run={runs[0]!r}, --run {runs[0]})")

    def local(self, path: str) -> Path:
        """A file or folder of the store as a path of this machine, until the store is closed."""
        [found] = self._opened.enter_context(at(self.path).local([path]))
        return found

    def readers(self, run: str, sites: Sequence[str]) -> list[Reader]:
        """The readers of several sites, see `reader`; what they need is read together."""
        if self.folder.reads_ranges and len(new := [site for site in sites if (run, site) not in self._readers]) > 1:
            query = "select path from sites where run = $run and short in (select unnest($sites::varchar[]))"
            paths = self._texts(query, {"run": run, "sites": new})
            self.folder.ahead([f"{path}/zarr.json" for (path,) in paths])
        return [self.reader(run, site) for site in sites]

    def reader(self, run: str, site: str) -> Reader:
        """The reader of a site; the same object at each call.

        Args:
            site: the site's short name.

        Raises:
            NotStored: the run holds no such site.
            BadInput: the store is closed, or was opened by another process.
        """
        self.session.check()
        if (run, site) not in self._readers:
            from actstore.reading.sites import open_site

            self._readers[run, site] = open_site(self, run, site)
        return self._readers[run, site]


@contextmanager
def _catalog_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (BadInput, ValueError, TypeError) as error:
        raise Damaged(
            f"{path / tables.CATALOG} is no catalog of a store ({error}); rebuild it with {advised('repair', path)}"
        ) from error


@contextmanager
def _opening_errors(path: Path) -> Iterator[None]:
    """Turn errors of the system or a library into the package's own while a store is opened.

    Raises:
        LimitReached: the system allows this process no more.
        Damaged: for any other error.
    """
    try:
        yield
    except ActstoreError:
        raise
    except (OSError, ValueError, duckdb.Error, tables.polars_errors()) as error:
        raise limit_reached(error, f"cannot open {path}") or Damaged(
            f"{path} cannot be opened ({one_line(error)}); see {advised('verify', path)}"
        ) from error
