"""The resumable loop behind `actstore ingest`: trees → tokens → model → activations → a committed batch of the store.

While the model runs over one batch of trees, a thread checksums, writes and commits the one before, so storing hides
behind the forward pass. Memory is two batches of the wanted sites, however many trees there are.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actstore.arrays import Layout, ShardBuffer
from actstore.errors import BadInput, NotStored
from actstore.ingest import predictions
from actstore.ingest.activations import SiteSpec, forward, site_specs
from actstore.ingest.models import Model, load
from actstore.ingest.tokens import encode, n_positions, token_rows
from actstore.ingest.trees import Trees, draw, edge_rows, tree_rows
from actstore.log import check_room
from actstore.writer import RunPlan, SitePlan, Writer, committed_batches, committed_dataset, open_writer

SHARD_ROWS = 64 * 1024  # positions × trees: 32 MiB a site at d_model 128, large enough to write and map in one go
CATALOG_BYTES = 4_000_000  # of a small one: DuckDB gives every column blocks of its own
BYTES_PER_TOKEN_ROW = 20  # in parts and catalog, tree, edge and answer rows counted in; rounded up from a real store


@dataclass(frozen=True)
class TreeSet:
    """A set of trees to run over: the first n_trees of a seed's stream."""

    distribution: str
    n_trees: int
    seed: int = 0
    n_nodes: int = 16
    depths: tuple[int, ...] | None = None
    name: str | None = None
    trees_per_shard: int | None = None

    def __post_init__(self) -> None:
        if self.n_trees < 1:
            raise BadInput(f"got {self.n_trees} trees; ask for 1 or more (--trees)")
        draw(self.distribution, self.seed, 0, 0, self.n_nodes, depths=self.depths)  # refuses what no tree can be

    def slice(self, start: int, stop: int) -> Trees:
        return draw(self.distribution, self.seed, start, stop, self.n_nodes, depths=self.depths)

    def row(self) -> dict[str, Any]:
        """The row of `datasets`, but for first_tree_id."""
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
        }


@dataclass
class Ingest:
    """One run to be stored: one model over one set of trees, at the sites asked for.

    Attributes:
        batch_size: trees a forward pass; 64 to 128 are the quickest on a CPU.
        publish_every: seconds between new catalogs for the readers, while batches are committed.
    """

    store: Path
    model: Model
    trees: TreeSet
    run: str | None = None
    sites: Sequence[str] | None = None
    batch_size: int = 128
    publish_every: float = 30.0
    specs: list[SiteSpec] = field(init=False)
    plan: RunPlan = field(init=False)

    def __post_init__(self) -> None:
        config, dataset = self.model.config, self.trees.row()
        if not self.trees.trees_per_shard:  # a set that is stored keeps its batches
            stored = committed_dataset(self.store, dataset["dataset"]) or dataset
            dataset["trees_per_shard"] = stored["trees_per_shard"]
        if self.trees.n_nodes > config.n_nodes:
            raise BadInput(
                f"got trees of {self.trees.n_nodes} nodes; model {self.model.name!r} has labels for {config.n_nodes}: "
                f"use --nodes {config.n_nodes} or less"
            )
        if dataset["n_positions"] > config.n_ctx:
            raise BadInput(
                f"trees of {self.trees.n_nodes} nodes take {dataset['n_positions']} tokens; model {self.model.name!r} has a "
                f"context of {config.n_ctx}: use fewer --nodes"
            )
        self.specs = site_specs(self.sites, config)
        self.plan = RunPlan(
            run=self.run or self.model.name,
            model=_model_row(self.model),
            weights=self.model.weights,
            dataset=dataset,
            sites=[_site_plan(spec, config, dataset) for spec in self.specs],
            facts={"device": str(self.device), "versions": json.dumps(_versions())},
        )

    @property
    def device(self) -> torch.device:
        return next(self.model.bridge.parameters()).device

    @property
    def n_batches(self) -> int:
        return -(-self.trees.n_trees // int(self.plan.dataset["trees_per_shard"]))

    def left(self) -> list[int]:
        """The batches that are not committed yet, by what the store says now."""
        try:
            done = committed_batches(self.store, self.plan.run)
        except NotStored:
            done = set()
        return [batch for batch in range(self.n_batches) if batch not in done]

    def tokens(self) -> int:
        """Token rows of the whole set, estimated from its first 1,000 trees."""
        some = self.trees.slice(0, min(1000, self.trees.n_trees))
        return round(self.trees.n_trees * (3 * self.trees.n_nodes + float(some.depth.mean())))

    def bytes_left(self) -> int:
        """Bytes still to be written."""
        a_batch = (
            sum(site.layout.shard_bytes for site in self.plan.sites)
            + self.tokens() * BYTES_PER_TOKEN_ROW // self.n_batches
        )
        left = len(self.left())
        return left * a_batch + (CATALOG_BYTES if left else 0)

    def announcement(self) -> str:
        """What it will cost, said before it is paid."""
        free = check_room(self.store, 0, "")
        done = self.n_batches - len(self.left())
        resumed = f"; {done} of {self.n_batches} batches are there" if done else ""
        return (
            f"run {self.plan.run}: {self.trees.n_trees:,} trees ({self.plan.dataset['dataset']}), about {self.tokens():,} tokens, "
            f"{len(self.specs)} sites; {self.bytes_left() / 1e9:.2f} GB to write, {free / 1e9:.1f} GB free{resumed}"
        )

    def execute(self, advance: Callable[[int], None] = lambda trees: None) -> None:
        """Store what is not stored yet.

        Args:
            advance: called with the trees done so far.

        Raises:
            NoRoom: the disk has less free than what is left to write; nothing was touched.
            BadInput: the run's name is taken by other weights, trees or sites.
            Busy: another process writes to the store.
            KeyboardInterrupt: Ctrl-C; the batches that were finished are committed and published.
        """
        check_room(self.store, self.bytes_left(), f"run {self.plan.run!r}")
        with open_writer(self.store, make=True) as writer:
            first_tree_id = writer.define(self.plan)
            done = writer.batches(self.plan.run)
            self._run_batches(writer, first_tree_id, [b for b in range(self.n_batches) if b not in done], advance)

    def _run_batches(self, writer: Writer, first_tree_id: int, left: list[int], advance: Callable[[int], None]) -> None:
        """Run the model in this thread; let the pool's one thread commit the batch before."""
        per_shard = int(self.plan.dataset["trees_per_shard"])
        buffers = [{site.site: ShardBuffer(site.layout) for site in self.plan.sites} for _ in left[:2]]
        published = time.monotonic()
        with ThreadPoolExecutor(1, thread_name_prefix="commit") as pool:
            pending: Future[None] | None = None
            for turn, batch in enumerate(left):
                trees = self.trees.slice(batch * per_shard, min((batch + 1) * per_shard, self.trees.n_trees))
                into = buffers[turn % 2]
                answers = self._run_model(trees, into, batch * per_shard, advance)
                if pending:
                    pending.result()
                    if time.monotonic() - published > self.publish_every:
                        writer.publish()
                        published = time.monotonic()
                pending = pool.submit(
                    self._commit, writer, batch, first_tree_id + batch * per_shard, trees, answers, into
                )
            if pending:
                pending.result()

    def _run_model(
        self, trees: Trees, into: dict[str, ShardBuffer], done: int, advance: Callable[[int], None]
    ) -> predictions.Answers:
        """Fill the buffers with the activations of one batch of trees, and grade the model's answers."""
        words = encode(trees)
        ids = torch.from_numpy(self.model.config.vocabulary.encode(words)).to(self.device)
        answers = []
        for start in range(0, len(trees), self.batch_size):
            some = slice(start, min(start + self.batch_size, len(trees)))

            def take(spec: SiteSpec, activations: torch.Tensor, first: int = start) -> None:
                into[spec.name].put(first, activations)

            logits = forward(self.model, ids[some], self.specs, take)
            answers.append(predictions.answer(self.model, words[some], logits))
            advance(done + some.stop)
        return predictions.concatenate(answers)

    def _commit(
        self,
        writer: Writer,
        batch: int,
        first_tree_id: int,
        trees: Trees,
        answers: predictions.Answers,
        buffers: dict[str, ShardBuffer],
    ) -> None:
        lengths = (3 * trees.n_nodes + trees.depth).astype(np.intp)
        dataset = self.plan.dataset["dataset"]
        writer.commit_batch(
            self.plan,
            batch,
            first_tree_id,
            len(trees),
            of_trees={
                "trees": tree_rows(trees, first_tree_id, dataset),
                "edges": edge_rows(trees, first_tree_id),
                "tokens": token_rows(trees, first_tree_id),
            },
            of_run={
                "predictions": predictions.prediction_rows(answers, self.plan.run, first_tree_id),
                "outcomes": predictions.outcome_rows(answers, self.plan.run, first_tree_id),
            },
            arrays={site: buffer.seal(lengths) for site, buffer in buffers.items()},
        )


def prepare(
    store: Path,
    model: str,
    config: str | None = None,
    trees: int | None = None,
    distribution: str | None = None,
    depths: str | None = None,
    nodes: int | None = None,
    seed: int | None = None,
    dataset: str | None = None,
    run: str | None = None,
    sites: str | None = None,
    batch_size: int = 128,
    device: str = "cpu",
    checkpoint: int | None = None,
) -> Ingest:
    """Turn what `actstore ingest` was given into a run to be stored; nothing is written yet.

    Args:
        trees, distribution, depths, nodes, seed: what is not given comes from the stored set of that name (`dataset`),
            else 10,000 trees of seed 0 from the model's own distribution, with as many nodes as it has labels.
        depths: goal depths of `deep` trees, `1-15` or `3,5,7`.
        sites: names with commas between, as in `site_specs`.
        checkpoint: a step of the model's training, as in `models.load`.

    Raises:
        BadInput: an argument that means nothing, or a model that cannot take these trees.
        NotStored: no such model or checkpoint.
    """
    loaded = load(model, config, device, checkpoint)
    defaults = {"distribution": loaded.config.system, "n_trees": 10_000, "seed": 0, "n_nodes": loaded.config.n_nodes}
    stored = (committed_dataset(Path(store), dataset) if dataset else None) or {}
    given: dict[str, Any] = {
        "distribution": distribution,
        "n_trees": trees,
        "seed": seed,
        "n_nodes": nodes,
        "depths": _parse_depths(depths),
    }
    chosen: dict[str, Any] = {
        key: value if value is not None else stored.get(key, defaults.get(key)) for key, value in given.items()
    }
    if chosen["depths"] is not None:
        chosen["depths"] = tuple(chosen["depths"])
    names = [name.strip() for name in sites.split(",")] if sites else None
    return Ingest(Path(store), loaded, TreeSet(**chosen, name=dataset), run, names, batch_size)


def _parse_depths(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        ranges = [part.split("-") for part in text.split(",")]
        depths = {depth for ends in ranges for depth in range(int(ends[0]), int(ends[-1]) + 1)}
    except ValueError:
        depths = set()
    if not depths:
        raise BadInput(f"got --depths {text}; write a range (1-15) or a list (3,5,7)")
    return tuple(sorted(depths))


def _site_plan(spec: SiteSpec, config: Any, dataset: dict[str, Any]) -> SitePlan:
    n_trees, positions, per_shard = dataset["n_trees"], dataset["n_positions"], dataset["trees_per_shard"]
    if spec.kind == "pattern":
        layout = Layout((n_trees, config.n_heads, positions, positions), 2, per_shard)
        return SitePlan(spec.name, spec.short, spec.kind, layout, ("tree", "head", "query", "key"))
    layout = Layout((n_trees, positions, config.d_model), 1, per_shard)
    return SitePlan(spec.name, spec.short, spec.kind, layout, ("tree", "position", "d_model"))


def _model_row(model: Model) -> dict[str, Any]:
    config = model.config
    sizes = {
        name: getattr(config, name)
        for name in ("n_layers", "n_heads", "d_model", "d_head", "d_mlp", "n_ctx", "d_vocab")
    }
    return {
        "weights_sha256": model.weights_sha256,
        "model": model.name,
        "system": config.system,
        "n_nodes": config.n_nodes,
        **sizes,
        "n_params": sum(parameter.numel() for parameter in model.bridge.original_model.parameters()),
        "vocabulary": config.vocabulary.words(),
        "config": json.dumps(config.to_mapping()),
        "source": model.source,
    }


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("actstore", "torch", "transformer_lens")}
