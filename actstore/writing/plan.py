"""What a run will store, stated before anything is written: its model, dataset and sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from actstore.arrays.layout import Layout
from actstore.commits.format import ARRAYS
from actstore.errors import BadInput
from actstore.named import NAME


@dataclass(frozen=True)
class SitePlan:
    """One array of a run.

    Attributes:
        site: TransformerLens' name.
        short: the short name.
        kind: 'resid' or 'pattern'.
        layout: the array's layout on the disk.
        axes: names of the array's axes.
    """

    site: str
    short: str
    kind: str
    layout: Layout
    axes: tuple[str, ...]

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
        }


@dataclass(frozen=True)
class RunPlan:
    """One model over one dataset: rows of `models`, `datasets` and `runs`, and the weights.

    Attributes:
        run: the run's name.
        model: a row of `models`, see schema.sql.
        weights: canonical safetensors bytes, whose sha256 is model["weights_sha256"].
        dataset: a row of `datasets` without first_tree_id, which the store assigns.
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

    def __post_init__(self) -> None:
        for name in (self.run, self.dataset["dataset"]):
            if not NAME.fullmatch(name) or name == "zarr.json":  # a file of that name lies beside the runs' folders
                raise BadInput(
                    f"got the name {name!r}; a run (--run) or dataset (--dataset) is named with letters, digits and . _ = , + -, "
                    "100 of them at most"
                )

    def row(self, first_tree_id: int) -> dict[str, Any]:
        """The run's row of `runs`."""
        return {
            "run": self.run,
            "weights_sha256": self.model["weights_sha256"],
            "dataset": self.dataset["dataset"],
            "first_tree_id": first_tree_id,
            "n_trees": self.dataset["n_trees"],
            **self.facts,
        }
