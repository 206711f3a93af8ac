"""Files that are published for a commit: each once, and described as a manifest names them.

A writer publishes while it holds the lease. A slice or a worker of a cluster holds none: what it
published is in no store until a writer commits the manifest that it gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeVar

import polars as pl
import xxhash

from actstore.catalog import part_types
from actstore.commits import log
from actstore.commits.manifest import Manifest, Part, Shard
from actstore.errors import BadInput
from actstore.storage.at import at
from actstore.storage.backend import File
from actstore.storage.several import several
from actstore.writing.contents import Content
from actstore.writing.parts import read_part
from actstore.writing.plan import RunPlan

R = TypeVar("R")


class Published:
    """Publishes files of one store.

    Args:
        root: the store's folder.
        committed: the store's commits; what they hold is not published again.
        check: called before each file; raises where nothing may be published.

    Attributes:
        files: path → committed file.
    """

    def __init__(self, root: Path, committed: Sequence[Manifest], check: Callable[[], None] = lambda: None) -> None:
        self.root, self._check = root, check
        self.files = {file.path: file for manifest in log.live(committed) for file in manifest.files}

    def batch(
        self,
        plan: RunPlan,
        batch: int,
        first_sequence_id: int,
        n_sequences: int,
        contents: Iterable[Content],
        kind: Literal["batch", "site"] = "batch",
        pool: Executor | None = None,
    ) -> Manifest:
        """Publish the files of one batch, and give the manifest that would commit them.

        Args:
            first_sequence_id, n_sequences, contents, kind, pool: see Writer.commit_batch.

        Returns:
            A manifest, not yet published, of number 1.

        Raises:
            BadInput: the batch, or the same trees by another run, are committed with other content.
            Damaged: other bytes are published under the name of a file.
        """
        known = {"", *part_types.every_column(), *plan.declared}
        of_parts, of_shards, begun = list[Content](), list[Content](), list[Future[list[File]]]()
        for content in contents:  # the pool publishes a shard while the next content is made
            if content.table not in known:
                raise BadInput(
                    f"nobody declared a table {content.table}; declare it first, with the dataset that it belongs to"
                )
            (of_parts if content.table else of_shards).append(content)
            if pool and not content.table:
                begun.append(pool.submit(self.other, content))
        found = self.each(lambda part: self.part(part, first_sequence_id, n_sequences), of_parts)
        published = (each.result() for each in begun) if pool else self.each(self.other, of_shards)
        parts = [*chain.from_iterable(found)]
        placed: dict[str, Any] = {"batch": batch, "first_tree_id": first_sequence_id, "n_trees": n_sequences}
        shards = [
            Shard(**vars(file), run=plan.run, site=content.site, **placed)
            for content, files in zip(of_shards, published, strict=True)
            for file in files
        ]
        return Manifest(1, kind, plan.run, batch, parts, shards)

    def part(self, part: Content, first_tree_id: int | None = None, n_trees: int | None = None) -> list[Part]:
        """Publish rows of a table; returns [] if an earlier commit brought the same rows."""
        if part.path in self.files:
            if not self.agrees(part):
                raise otherwise(self.root / part.path)
            return []
        table = part.table
        origin = part.owner, part.batch, first_tree_id, n_trees
        files = self.file(part.path, part.content)
        return [Part(file.path, file.bytes, file.xxh3_128, table, part.rows, *origin) for file in files]

    def agrees(self, part: Content) -> bool:
        """True if the committed part of the same path holds the same rows.

        Args:
            part: rows of a part that is committed.
        """
        if self._has(part.path, part.content):
            return True
        held = read_part(self.root, part.path)  # another version may encode the same rows otherwise
        return held.equals(pl.read_parquet(bytes(part.content)))

    def each(self, publish: Callable[[Content], list[R]], contents: Iterable[Content]) -> Iterator[list[R]]:
        """What publishing each content gives, as many at a time as the place takes."""
        return several(publish, contents, at(self.root).at_once, lambda content: len(content.content))

    def other(self, content: Content) -> list[File]:
        """Publish a file that is no part; see file."""
        return self.file(content.path, content.content)

    def file(self, path: str, content: bytes | memoryview) -> list[File]:
        """Publish a file; returns [] if an earlier commit brought the same bytes."""
        if path in self.files:
            if not self._has(path, content):
                raise otherwise(self.root / path)
            return []
        self._check()
        return [at(self.root).publish(path, content)]

    def lacking(self, files: Iterable[File]) -> set[str]:
        """Paths of those of some published files that are not committed.

        Raises:
            BadInput: a path is committed with other content.
        """
        found = set()
        for file in files:
            if file.path not in self.files:
                found.add(file.path)
            elif self.files[file.path].xxh3_128 != file.xxh3_128:
                raise otherwise(self.root / file.path)
        return found

    def _has(self, path: str, content: bytes | memoryview) -> bool:
        return xxhash.xxh3_128_hexdigest(content) == self.files[path].xxh3_128


def otherwise(path: Path) -> BadInput:
    """The error for a file that is committed with other content."""
    return BadInput(
        f"{path} is committed and what is to be stored under its name now differs: it was made by another version or "
        "from other input; name the new run and its set of trees otherwise (--run, --dataset)"
    )
