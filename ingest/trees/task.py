"""A set of trees to run a model over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from actstore.errors import BadInput
from actstore.ingest.trees.draw import draw
from actstore.ingest.trees.tokens import Drawn, n_positions
from actstore.ingest.trees.variants import vary

if TYPE_CHECKING:
    import polars as pl

SHARD_ROWS = 64 * 1024  # positions × trees: 32 MiB a site at d_model 128, large enough to write and map in one go


@dataclass(frozen=True)
class TreeSet:
    """A set of trees to run a model over: the first n_trees of a seed's stream.

    Attributes:
        seed, n_nodes, depths: see `draw`.
        name: default: made from the other attributes.
        trees_per_shard: trees per batch; default: SHARD_ROWS positions.
        variant_of: the stored set that `change` turns into this one, tree by tree; see variants.py.
    """

    distribution: str
    n_trees: int
    seed: int = 0
    n_nodes: int = 16
    depths: tuple[int, ...] | None = None
    name: str | None = None
    trees_per_shard: int | None = None
    variant_of: str | None = None
    change: str | None = None
    task: ClassVar[str] = "trees"

    def __post_init__(self) -> None:
        if self.n_trees < 1:
            raise BadInput(f"got {self.n_trees} trees; ask for 1 or more (--trees)")
        draw(self.distribution, self.seed, 0, 0, self.n_nodes, depths=self.depths)  # refuses what no tree can be

    @property
    def n_sequences(self) -> int:
        """Number of trees."""
        return self.n_trees

    @property
    def n_batches(self) -> int:
        """Number of batches."""
        return -(-self.n_trees // int(self.row()["trees_per_shard"]))

    @cached_property
    def n_tokens(self) -> int:
        """Tokens of all trees, estimated from the first 1,000."""
        return round(self.n_trees * float(self.between(0, min(1000, self.n_trees)).lengths.mean()))

    def parts(self) -> Mapping[str, pl.DataFrame]:
        """Rows of further tables that come with the set's definition: none."""
        return {}

    def drawn(self, batch: int) -> Drawn:
        """Draw one batch of the set."""
        per_shard = int(self.row()["trees_per_shard"])
        return self.between(batch * per_shard, min((batch + 1) * per_shard, self.n_trees))

    def between(self, start: int, stop: int) -> Drawn:
        """Draw trees start…stop-1 of the set, ready to be written as words and as rows."""
        trees = draw(self.distribution, self.seed, start, stop, self.n_nodes, depths=self.depths)
        trees, changes = vary(trees, self.change, self.seed, start) if self.change else (trees, None)
        return Drawn(start, trees, changes)

    def row(self) -> dict[str, Any]:
        """The row of `datasets`, without first_tree_id."""
        depths = "" if self.depths is None else f"-depth{'_'.join(map(str, self.depths))}"
        name = f"{self.distribution}{depths}-{self.n_nodes}nodes-seed{self.seed}-{self.n_trees}"
        fitting = SHARD_ROWS // n_positions(self.n_nodes) // 64 * 64
        return {
            "dataset": self.name or name,
            "distribution": self.distribution,
            "seed": self.seed,
            "n_nodes": self.n_nodes,
            "depths": None if self.depths is None else list(self.depths),
            "n_trees": self.n_trees,
            "n_positions": n_positions(self.n_nodes),
            "trees_per_shard": self.trees_per_shard or min(self.n_trees, fitting),
            "variant_of": self.variant_of,
            "change": self.change,
        }
