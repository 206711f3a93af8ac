"""A commit's manifest: what the commit is, and every file that it brought."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import xxhash
from msgspec import Meta

from actstore.commits.format import CHAINED_FROM, FORMAT_VERSION, LOG
from actstore.errors import Damaged
from actstore.storage.backend import File
from actstore.storage.content import Count, Hash, Positive, Size, Text, as_a, check_inside, json_object
from actstore.storage.sealed import checksum

TableOfParts = Annotated[str, Meta(pattern=r"^[a-z_][a-z0-9_]{0,62}\Z")]  # of schema.sql, or declared in `relations`
MANIFEST = re.compile(r"[0-9]{8,}\.json")
NOT_SAID = {"owner": "", "batch": None, "first_tree_id": None, "n_trees": None}  # defaults for parts of older manifests


@dataclass(frozen=True)
class Part(File):
    """The rows that one commit brought to one table, as Parquet.

    Attributes:
        table: the table's name.
        rows: number of rows.
        owner: name of the rows' dataset (`datasets`, `trees`, `edges`, `tokens`) or run; sha256 of
            the weights (`models`); or the commit's number in eight digits (`results`). Owner and
            batch make the path.
        batch: number of the owner's batch of trees; None if the rows belong to no batch. Of labels
            that took the place of others: the commit's number.
        first_tree_id: first tree of the batch; None without a batch, and in older manifests without
            a shard.
        n_trees: trees of the batch; None as first_tree_id.
    """

    table: TableOfParts
    rows: Size
    owner: Text = ""
    batch: Count | None = None
    first_tree_id: Count | None = None
    n_trees: Positive | None = None


@dataclass(frozen=True)
class Shard(File):
    """One batch of trees of one site of a run."""

    run: Text
    site: Text
    batch: Count
    first_tree_id: Count
    n_trees: Positive


@dataclass(frozen=True)
class Dropped:
    """What a commit took out of the store: files of earlier commits, which hold a run, say.

    Attributes:
        kind: run, dataset or label.
        name: of the run, dataset or label.
        files: paths of the files. A later commit may bring a file of the same path.
        token_id: no dataset that was ever stored has this token id or a larger one.
        sequence_id: the same of sequence ids.
    """

    kind: Literal["run", "dataset", "label"]
    name: Text
    files: list[Text]
    token_id: Size
    sequence_id: Size


@dataclass(frozen=True)
class Manifest:
    """One commit: what it is, and every file that it brought. Numbers run from 1 without a gap.

    Attributes:
        number: the commit's number.
        kind: run, batch, results, labels, site or drop. A site was appended to a run, or sites
            were added to it: their definition is a commit, and each batch of them is one.
        run: the run that a definition, a batch or a site belongs to; else None. A merged store has
            definitions and batches of no run: rows of a dataset that a dropped run had brought.
        batch: the batch's number, of a run or of sites added to it; else None.
        parts: Parquet files of rows.
        shards: files of activations.
        others: zarr.json files and weights.
        dropped: what a drop took out, or the labels whose place new ones take; else None, and then
            not in the manifest's file.
        previous: xxh3-128 of the manifest before, which shows an edit of the past. None in the
            first manifest, and in formats 1 and 2.
        format: the store's format when the manifest was written.
        xxh3_128: hash of the manifest's own bytes, once written or read; not stored in them.
    """

    number: Positive
    kind: Literal["run", "batch", "results", "labels", "site", "drop"]
    run: Text | None = None
    batch: Count | None = None
    parts: list[Part] = field(default_factory=list)
    shards: list[Shard] = field(default_factory=list)
    others: list[File] = field(default_factory=list)
    dropped: Dropped | None = None
    previous: Hash | None = None
    format: Positive = FORMAT_VERSION
    xxh3_128: str = field(default="", compare=False)

    @property
    def files(self) -> list[File]:
        """All files of the commit."""
        return [*self.parts, *self.shards, *self.others]

    @property
    def is_appended(self) -> bool:
        """True if the commit appended a site: vectors that no forward pass of the run gave."""
        return self.kind == "site" and self.batch is None and bool(self.shards)

    def to_json(self) -> bytes:
        """The manifest's bytes, with a checksum over everything else, which shows a flipped bit."""
        body = self._body()
        return json.dumps({**body, "checksum": checksum(body)}, indent=1).encode()

    def _body(self) -> dict[str, Any]:
        body = {"format": self.format, **asdict(self)}
        del body["xxh3_128"]
        if self.dropped is None:
            del body["dropped"]
        if self.format < CHAINED_FROM:
            del body["previous"]
            body["parts"] = [{key: part[key] for key in part if key not in NOT_SAID} for part in body["parts"]]
        return body

    @classmethod
    def from_json(cls, content: bytes, path: Path) -> Manifest:
        """Parse a manifest's bytes.

        Args:
            path: the manifest's file, for the message.

        Raises:
            Damaged: the bytes are not a manifest, or not the ones that were written.
        """
        try:
            body = json_object(content)
            if body.pop("checksum", None) != checksum(body):
                raise ValueError("its checksum does not match")
            manifest = as_a(cls, {**body, "xxh3_128": xxhash.xxh3_128_hexdigest(content)})
            unsaid = [
                "xxh3_128",
                *["previous"] * (manifest.format < CHAINED_FROM),
                *["dropped"] * (not manifest.dropped),
            ]
            named = {key.name for key in fields(cls)} - set(unsaid)
            if body.keys() == named:
                listed = [*(NOT_SAID | part for part in body["parts"]), *body["shards"], *body["others"]]
            held = [NOT_SAID | vars(file) if isinstance(file, Part) else vars(file) for file in manifest.files]
            dropped = asdict(manifest.dropped) if manifest.dropped else None
            if body.keys() != named or listed != held or body.get("dropped") != dropped:
                raise ValueError("it has other keys than a manifest")
            for file in manifest.files:
                check_inside(file.path)
            if all("owner" in part for part in body["parts"]):
                return manifest
            return replace(manifest, parts=[_told_by_name(manifest, part) for part in manifest.parts])
        except ValueError as error:
            raise Damaged(f"manifest {path} cannot be read ({error}); restore it from a copy of the store") from error


def _told_by_name(manifest: Manifest, part: Part) -> Part:
    """Fill in a part of an older manifest, which names no owner, from its file name and a shard."""
    name = Path(part.path).stem
    if manifest.kind != "batch":
        return replace(part, owner=name)
    first, n = next(((shard.first_tree_id, shard.n_trees) for shard in manifest.shards), (None, None))
    owner = name.removesuffix(f"-{manifest.batch or 0:06d}")
    return replace(part, owner=owner, batch=manifest.batch, first_tree_id=first, n_trees=n)


def manifest_path(number: int) -> str:
    """Path of a commit's manifest, inside the store."""
    return f"{LOG}/{number:08d}.json"
