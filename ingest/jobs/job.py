"""The job of `actstore ingest`: one model over one set of trees, at chosen sites."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from actstore.arrays.layout import Layout
from actstore.arrays.pack import ShardBuffer
from actstore.errors import BadInput, NotStored, nearest
from actstore.ingest.models.config import ModelConfig, there_are
from actstore.ingest.models.forward import forward
from actstore.ingest.models.load import Model
from actstore.ingest.models.sites import SiteSpec, site_specs
from actstore.ingest.trees.draw import concatenate
from actstore.ingest.trees.task import TreeSet
from actstore.ingest.trees.tokens import Drawn
from actstore.storage.at import at, place
from actstore.writing.committed import committed_batches
from actstore.writing.plan import RunPlan, SitePlan

if TYPE_CHECKING:
    import torch

    from actstore.ingest.answers.continuations import Generator

PROMPTS = ("task", "tree")
MOST_SAMPLES = 255  # a sample's number is a byte
DREAMS = "dreams"  # ends the default name of a run of continuations
CATALOG_BYTES = 4_000_000  # of a small catalog: DuckDB gives every column its own blocks
BYTES_PER_TOKEN_ROW = 20  # in parts and catalog, with tree, edge and answer rows; rounded up from a real store
Buffers = Mapping[str, ShardBuffer]  # TransformerLens name of a site → its activations


@dataclass
class Ingest:
    """A run to store: one model over one set of trees, at chosen sites.

    Attributes:
        sites: see `site_specs`; an empty list stores the answers alone.
        batch_size: trees per forward pass; 64 to 128 are the quickest on a CPU.
        prompt: the model's input: `task`, or `tree`, the edges alone, which the model continues
            freely.
        samples: for prompt `tree`: number of sampled continuations, in addition to the greedy one.
        wait: seconds to wait for another process that writes to the store.
        publish_every: seconds between new catalogs for readers, while batches are committed.
    """

    store: Path
    model: Model
    trees: TreeSet
    run: str | None = None
    sites: Sequence[str] | None = None
    batch_size: int = 128
    publish_every: float = 30.0
    prompt: str = "task"
    samples: int | None = None
    wait: float = 0.0
    specs: list[SiteSpec] = field(init=False)
    generator: Generator | None = field(init=False, default=None)
    plan: RunPlan = field(init=False)

    def __post_init__(self) -> None:
        check_batch_size(self.batch_size)
        self.store = place(self.store)
        self.plan, self.specs = draft(
            self.model.name, self.model.config, self.trees, self.run, self.sites, self.prompt, self.samples
        )
        if self.prompt == "tree":
            from actstore.ingest.answers.continuations import Generator

            self.generator = Generator(self.model, self.plan.facts["samples"], self.trees.seed)
        about = {"device": str(self.device), "versions": json.dumps({**versions(), "batch_size": self.batch_size})}
        facts = {**about, **self.plan.facts}
        self.plan = replace(self.plan, model=self.model.row(), weights=self.model.weights, facts=facts)

    @property
    def device(self) -> torch.device:
        """The device that the model lies on."""
        return next(self.model.bridge.parameters()).device

    @property
    def n_batches(self) -> int:
        """Number of batches of the whole run."""
        return -(-self.trees.n_trees // int(self.plan.dataset["trees_per_shard"]))

    def bounds(self, batch: int) -> tuple[int, int]:
        """Indices in the set of a batch's first tree and of the tree after its last."""
        per_shard = int(self.plan.dataset["trees_per_shard"])
        return batch * per_shard, min((batch + 1) * per_shard, self.trees.n_trees)

    def originals(self, datasets: pl.DataFrame) -> int | None:
        """tree_id of the first tree of the set that a variant was made from; None for a drawn set.

        Args:
            datasets: the committed rows of `datasets`.
        """
        if not self.trees.variant_of:
            return None
        known = {row["dataset"]: row["first_tree_id"] for row in datasets.to_dicts()}
        return int(known[self.trees.variant_of])

    def left(self) -> list[int]:
        """Numbers of the batches that the store does not hold yet; reads the store."""
        try:
            done = committed_batches(self.store, self.plan.run)
        except NotStored:
            done = set()
        return [batch for batch in range(self.n_batches) if batch not in done]

    @cached_property
    def n_tokens(self) -> int:
        """Token rows of the whole set, estimated from its first 1,000 trees."""
        first = self.trees.drawn(0, min(1000, self.trees.n_trees))
        return round(self.trees.n_trees * float(first.lengths.mean()))

    def bytes_of(self, n_batches: int) -> int:
        """Estimated bytes of n batches."""
        shards = sum(site.layout.shard_bytes for site in self.plan.sites)
        a_batch = shards + self.n_tokens * BYTES_PER_TOKEN_ROW // self.n_batches
        return n_batches * a_batch + (CATALOG_BYTES if n_batches else 0)

    def bytes_left(self) -> int:
        """Estimated bytes of the batches that are not stored yet."""
        return self.bytes_of(len(self.left()))

    def kept(self) -> str:
        """One sentence: what a stop keeps now, and what the same command does after it."""
        done = self.n_batches - len(self.left())
        if not done:
            return "nothing was committed yet, and the same command starts over"
        return f"{done} of {self.n_batches} batches are committed, and the same command goes on from there"

    def announcement(self) -> str:
        """One sentence: what the job will cost in trees, tokens, sites and bytes."""
        free = at(self.store).free_room()
        left = len(self.left())
        done = self.n_batches - left
        resumed = f"; {done} of {self.n_batches} batches are there" if done else ""
        return (
            f"run {self.plan.run}: {self.trees.n_trees:,} trees ({self.plan.dataset['dataset']}), about {self.n_tokens:,} tokens, "
            f"{len(self.specs)} sites; {self.bytes_of(left) / 1e9:.2f} GB to write, {free / 1e9:.1f} GB free{resumed}"
        )

    def answers(
        self, drawn: Drawn, first_tree_id: int, into: Buffers, advance: Callable[[int], None]
    ) -> dict[str, pl.DataFrame]:
        """Run the model over one batch of trees.

        Args:
            first_tree_id: tree_id of the batch's first tree.
            into: receives the activations.
            advance: called with the number of trees of the set done so far.

        Returns:
            The rows of `predictions` and `outcomes`, or of `generations`.
        """
        return (self._continuations if self.generator else self._predictions)(drawn, first_tree_id, into, advance)

    def _predictions(
        self, drawn: Drawn, first_tree_id: int, into: Buffers, advance: Callable[[int], None]
    ) -> dict[str, pl.DataFrame]:
        import torch

        from actstore.ingest.answers import tree_paths

        ids = torch.from_numpy(self.model.config.vocabulary.encode(drawn.words)).to(self.device)
        answers = []
        for rows in self._passes(len(ids)):

            def take(spec: SiteSpec, activations: torch.Tensor, at: int = rows.start) -> None:
                into[spec.name].put(at, activations)

            logits = forward(self.model, ids[rows], self.specs, take)
            answers.append(tree_paths.answer(self.model, drawn.words[rows], logits))
            advance(drawn.start + rows.stop)
        graded = concatenate(answers)
        return {
            "predictions": tree_paths.prediction_rows(graded, self.plan.run, first_tree_id),
            "outcomes": tree_paths.outcome_rows(graded, self.plan.run, first_tree_id),
        }

    def _continuations(
        self, drawn: Drawn, first_tree_id: int, into: Buffers, advance: Callable[[int], None]
    ) -> dict[str, pl.DataFrame]:
        from actstore.ingest.answers import continuations

        assert self.generator is not None
        generated = []
        for rows in self._passes(len(drawn.words)):
            generated.append(self.generator.go_on(drawn.words[rows], drawn.start + rows.start))
            advance(drawn.start + rows.stop)
        whole = concatenate(generated)
        return {"generations": continuations.generation_rows(whole, self.plan.run, first_tree_id)}

    def _passes(self, n_trees: int) -> list[slice]:
        """The rows of a batch in each forward pass."""
        starts = range(0, n_trees, self.batch_size)
        return [slice(start, min(start + self.batch_size, n_trees)) for start in starts]


def draft(
    model: str,
    config: ModelConfig,
    trees: TreeSet,
    run: str | None,
    sites: Sequence[str] | None,
    prompt: str,
    samples: int | None,
) -> tuple[RunPlan, list[SiteSpec]]:
    """The plan of a run, without its model, and the run's sites; needs no weights.

    Args:
        model, config: the model's name and shape.
        run, sites, prompt, samples: see Ingest.

    Raises:
        BadInput: an argument has no meaning, or the model cannot take these trees.
    """
    dataset = trees.row()
    if prompt not in PROMPTS:
        raise BadInput(f"got --prompt {prompt!r}{nearest(prompt, PROMPTS)}; {there_are(PROMPTS)}")
    if prompt == "tree":  # up to the bar its activations would equal those of the whole task
        sites, samples = [], 1 if samples is None else samples
        if not 0 <= samples <= MOST_SAMPLES:
            raise BadInput(f"got {samples} samples; there are 0 to {MOST_SAMPLES} (--samples)")
    elif samples is not None:
        raise BadInput("--samples is of continuations that a model makes up; ask for them with --prompt tree")
    if trees.n_nodes > config.n_nodes:
        raise BadInput(
            f"got trees of {trees.n_nodes} nodes; model {model!r} has labels for {config.n_nodes}: use --nodes "
            f"{config.n_nodes} or less"
        )
    if dataset["n_positions"] > config.n_ctx:
        raise BadInput(
            f"trees of {trees.n_nodes} nodes take {dataset['n_positions']} tokens; model {model!r} has a context of "
            f"{config.n_ctx}: use fewer --nodes"
        )
    specs = [] if sites is not None and not len(sites) else site_specs(sites, config)
    plan = RunPlan(
        run=run or "-".join([model, *filter(None, [trees.change, DREAMS * (prompt == "tree")])]),
        model={},
        weights=b"",
        dataset=dataset,
        sites=[_site_plan(spec, config, dataset) for spec in specs],
        facts={"prompt": prompt, "samples": samples},
    )
    return plan, specs


def check_batch_size(batch_size: int) -> None:
    """Refuse a batch size below 1."""
    if batch_size < 1:
        raise BadInput(f"got a batch size of {batch_size}; a forward pass takes 1 tree or more (--batch-size)")


def _site_plan(spec: SiteSpec, config: Any, dataset: dict[str, Any]) -> SitePlan:
    n_trees, positions, per_shard = dataset["n_trees"], dataset["n_positions"], dataset["trees_per_shard"]
    if spec.kind == "pattern":
        layout = Layout((n_trees, config.n_heads, positions, positions), 2, per_shard)
        return SitePlan(spec.name, spec.short, spec.kind, layout, ("tree", "head", "query", "key"))
    layout = Layout((n_trees, positions, config.d_model), 1, per_shard)
    return SitePlan(spec.name, spec.short, spec.kind, layout, ("tree", "position", "d_model"))


def versions() -> dict[str, str | int]:
    """Versions of the packages that a run depends on, for its row of `runs`."""
    return {name: version(name) for name in ("actstore", "torch", "transformer_lens")}
