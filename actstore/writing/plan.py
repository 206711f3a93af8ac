"""What a run will store, stated before anything is written: its model, dataset and sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from actstore.arrays.address import POSITIONS_PER_TREE, Ids, is_of_trees
from actstore.arrays.layout import Layout
from actstore.commits.format import ARRAYS
from actstore.errors import BadInput
from actstore.named import NAME

AXES_OF_TREES = (("tree", "position", "d_model"), ("tree", "head", "query", "key"))


@dataclass(frozen=True)
class SitePlan:
    """One array of a run.

    Attributes:
        site: TransformerLens' name.
        short: the short name.
        kind: 'resid', 'vector', 'heads' or 'pattern', see schema.sql.
        layout: the array's layout on the disk.
        axes: names of the array's axes.
        lineage: for vectors that no forward pass of the run gave; JSON.
    """

    site: str
    short: str
    kind: str
    layout: Layout
    axes: tuple[str, ...]
    lineage: str | None = None

    @classmethod
    def over(
        cls,
        dataset: Mapping[str, Any],
        site: str,
        short: str,
        kind: str,
        row_shape: tuple[int, ...],
        axes: tuple[str, ...],
        lineage: str | None = None,
        dtype: str = "float32",
        codec: str = "none",
    ) -> SitePlan:
        """The array of a site over one set of sequences.

        A grid has [sequence, position, *row], and [sequence, head, query, key] for a pattern. In
        rows the array is [row, *row_shape].

        Args:
            dataset: the set's row of `datasets`, as planned or as the catalog holds it.
            row_shape: shape of one token's activation; of a pattern (head, key), with as many keys
                as the longest sequence has tokens.
            axes: names of the axes of row_shape.
            dtype, codec: how numbers are stored, see arrays.encoding and arrays.codec.
        """
        of_trees = is_of_trees(dataset)
        if dataset.get("layout") == "rows":
            layout = Layout(
                (int(dataset["n_ids"]), *row_shape), None, int(dataset["rows_per_chunk"]), dtype, codec=codec
            )
            return cls(site, short, kind, layout, ("row", *axes), lineage)
        n = int(dataset["n_trees"] if of_trees else dataset["n_sequences"])
        per_batch = int(dataset["trees_per_shard"] if of_trees else dataset["rows_per_chunk"])
        at = 1 if kind == "pattern" else 0  # the axis of a row before which the positions stand
        shape = (n, *row_shape[:at], int(dataset["n_positions"]), *row_shape[at:])
        names = (*axes[:at], "query" if kind == "pattern" else "position", *axes[at:])
        stride = int(dataset.get("stride") or POSITIONS_PER_TREE)
        layout = Layout(shape, 1 + at, per_batch, dtype, stride, codec)
        return cls(site, short, kind, layout, ("tree" if of_trees else "sequence", *names), lineage)

    def path(self, run: str) -> str:
        """Path of the array's folder inside the store."""
        return f"{ARRAYS}/{run}/{self.site}"

    def row(self, run: str) -> dict[str, Any]:
        """The site's row of `sites`."""
        return {
            "run": run,
            "site": self.site,
            "short": self.short,
            "kind": self.kind,
            "shape": self.layout.shape,
            "path": self.path(run),
            "axes": None if self.axes in AXES_OF_TREES else list(self.axes),
            "lineage": self.lineage,
        }


@dataclass(frozen=True)
class RunPlan:
    """One model over one dataset: rows of `models`, `datasets` and `runs`, and the weights.

    Attributes:
        run: the run's name.
        model: a row of `models`, see schema.sql.
        weights: canonical safetensors bytes, whose sha256 is model["weights_sha256"].
        dataset: a row of `datasets` without the first ids, which the store assigns.
        parts: rows of further tables that come with the dataset: vocabularies, relations.
        of_run: rows of further tables that come with the run: interventions, edits.
        unembedding: safetensors bytes of the model's last layer; b"" if the weights hold it.
        sites: the arrays.
        facts: device, versions, prompt and samples, for the row of `runs`.

    Raises:
        BadInput: the run's or the dataset's name cannot name a folder.
    """

    run: str
    model: Mapping[str, Any]
    weights: bytes
    dataset: Mapping[str, Any]
    sites: Sequence[SitePlan]
    facts: Mapping[str, Any]
    parts: Mapping[str, pl.DataFrame] = field(default_factory=dict)
    of_run: Mapping[str, pl.DataFrame] = field(default_factory=dict)
    unembedding: bytes = b""

    def __post_init__(self) -> None:
        for name in (self.run, self.dataset["dataset"]):
            if not NAME.fullmatch(name) or name == "zarr.json":  # a file of that name lies beside the runs' folders
                raise BadInput(
                    f"got the name {name!r}; a run (--run) or dataset (--dataset) is named with letters, digits and . _ = , + -, "
                    "100 of them at most"
                )

    @property
    def declared(self) -> list[str]:
        """Names of the tables that come with the dataset."""
        return self.parts["relations"]["name"].to_list() if "relations" in self.parts else []

    @property
    def n_batches(self) -> int:
        """Batches of the dataset."""
        return n_batches(self.dataset)

    @property
    def of_trees(self) -> bool:
        """True if the sequences are trees."""
        return is_of_trees(self.dataset)

    def row(self, first: Ids) -> dict[str, Any]:
        """The run's row of `runs`, given the first ids of its dataset."""
        return {
            "run": self.run,
            "weights_sha256": self.model["weights_sha256"],
            "dataset": self.dataset["dataset"],
            "first_tree_id": first.sequence_id if self.of_trees else None,
            "n_trees": self.dataset["n_trees"] if self.of_trees else None,
            **self.facts,
        }

    def dataset_row(self, first: Ids) -> dict[str, Any]:
        """The dataset's row of `datasets`, given its first ids."""
        if self.of_trees:
            return {**self.dataset, "first_tree_id": first.sequence_id}
        return {**self.dataset, "first_token_id": first.token_id, "first_sequence_id": first.sequence_id}


def n_batches(dataset: Mapping[str, Any]) -> int:
    """Batches of a dataset, given its row of `datasets`, planned or stored."""
    if dataset.get("layout") == "rows":
        return int(dataset["n_ids"]) // int(dataset["rows_per_shard"])
    n, per_batch = ("n_trees", "trees_per_shard") if is_of_trees(dataset) else ("n_sequences", "rows_per_chunk")
    return -(-int(dataset[n]) // int(dataset[per_batch]))
