"""The job of `actstore ingest`: one model over one set of sequences, at chosen sites."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from actstore.arrays.address import Ids, is_of_trees
from actstore.arrays.codec import CODECS
from actstore.arrays.encoding import STORED_AS
from actstore.errors import BadInput, NotStored, nearest
from actstore.ingest.answers import next_token
from actstore.ingest.answers.next_token import Asked, Continued
from actstore.ingest.answers.passes import run_text
from actstore.ingest.jobs.plans import bytes_per_batch, site_plan
from actstore.ingest.models.config import ModelConfig, there_are
from actstore.ingest.models.forward import activations as activations_of
from actstore.ingest.models.forward import forward
from actstore.ingest.models.load import Model
from actstore.ingest.models.passes import Passes
from actstore.ingest.models.sites import SiteSpec
from actstore.ingest.task import Sequences
from actstore.ingest.trees.draw import concatenate
from actstore.ingest.trees.given import GivenTrees
from actstore.ingest.trees.task import TreeSet
from actstore.ingest.trees.tokens import Drawn as TreesDrawn
from actstore.storage.at import at, place
from actstore.storage.backend import ENDLESS
from actstore.writing.committed import committed_sites, lacking
from actstore.writing.plan import RunPlan

if TYPE_CHECKING:
    import torch

    from actstore.ingest.answers.continuations import Generator
    from actstore.ingest.answers.text_continuations import TextGenerator
    from actstore.ingest.interventions.patch import Patch

PROMPTS = ("task", "tree")
MOST_SAMPLES = 255  # a sample's number is a byte
CONTINUATIONS = {"tree": "dreams", "text": "continued"}  # prompt → end of the default name of a run
CATALOG_BYTES = 4_000_000  # of a small catalog: DuckDB gives every column its own blocks
BYTES_PER_TOKEN_ROW = {"trees": 20, "tokens": 60}  # in parts and catalog, with all rows beside; rounded up from stores
MOST_AT_ONCE = 128  # sequences per forward pass: 64 to 128 trees are the quickest on a CPU
TOKENS_AT_ONCE = 4096  # of a forward pass over text: logits of 50,000 words take 0.8 GB
Buffers = Mapping[str, Any]  # TransformerLens name of a site → its ShardBuffer, or what takes its place
Graded = Callable[[], dict[str, pl.DataFrame]]  # gives the rows of a batch's answers


@dataclass
class Ingest:
    """A run to store: one model over one set of sequences, at chosen sites.

    Attributes:
        sequences: trees for a path-finding system; documents as tokens for any other model.
        sites: see `site_specs`; an empty list stores the answers alone.
        batch_size: sequences per forward pass; default: 128 trees, or as many sequences as have
            TOKENS_AT_ONCE tokens, 1 to 128.
        prompt: the input of a path-finding system: `task`, or `tree`, the edges alone, which the
            model continues freely. `text`: sequences of text, which it continues.
        samples: for prompts `tree` and `text`: number of sampled continuations, in addition to the
            greedy one.
        asked: which next-token predictions to store of text, or for prompt `text` how many tokens
            to continue it by. Default: predictions of every token but a sequence's last, if the
            model predicts. Of trees, `predictions` and `outcomes` by default. None: no answers, and
            a forward pass ends after the last site.
        patch: edits of the activations; the run then holds the edited sequences alone.
        wait: seconds to wait for another process that writes to the store.
        publish_every: seconds between new catalogs for readers, while batches are committed.
        grades: whether answers are graded; else `answers` gives none, as without `asked`.
        dtype: how activations are stored, one of arrays.encoding.STORED_AS.
        codec: how they are compressed, one of arrays.codec.CODECS.
    """

    store: Path
    model: Model
    sequences: Sequences
    run: str | None = None
    sites: Sequence[str] | None = None
    batch_size: int | None = None
    publish_every: float = 30.0
    prompt: str = "task"
    samples: int | None = None
    wait: float = 0.0
    asked: Asked | Continued | None = field(default_factory=Asked)
    patch: Patch | None = None
    dtype: str = "float32"
    codec: str = "none"
    specs: list[SiteSpec] = field(init=False)
    generator: Generator | TextGenerator | None = field(init=False, default=None)
    plan: RunPlan = field(init=False)
    per_pass: int = field(init=False)
    grades: bool = field(init=False, default=True)

    def __post_init__(self) -> None:
        check_batch_size(self.batch_size)
        check_stored(self.dtype, self.codec)
        self.store = place(self.store)
        if self.prompt != "task":  # up to the continuation its activations would equal those of the whole task
            self.sites = []
        chooses_none = self.sites is not None and not len(self.sites)
        self.specs = [] if chooses_none else self.model.sites(self.sites)
        self.asked = None if self.of_text and not self.model.predicts else self.asked
        drafted = draft(
            self.model.name,
            self.model.config,
            self.sequences,
            self.run,
            self.specs,
            self.prompt,
            self.samples,
            self.dtype,
            self.codec,
        )
        self.per_pass = self.batch_size or default_batch_size(drafted.dataset)
        if self.prompt == "tree":
            from actstore.ingest.answers.continuations import Generator

            self.generator = Generator(self.model, drafted.facts["samples"], self.trees.seed)
        if isinstance(self.asked, Continued):
            from actstore.ingest.answers.text_continuations import TextGenerator

            self.generator = TextGenerator(self.model, drafted.facts["samples"], self.asked.n_new)
        made_by: dict[str, Any] = {**versions(), "batch_size": self.per_pass}
        if self.dtype != "float32":
            made_by["dtype"] = self.dtype
        if self.codec != "none":
            made_by["codec"] = self.codec
        if self.of_text or self.asked is None:
            made_by["answers"] = next_token.said(self.asked)
        of_run = {} if self.patch is None else self.patch.tables(drafted.run)
        if self.patch is not None:
            made_by |= self.patch.noted(of_run)
        about = {"device": str(self.device), "versions": json.dumps(made_by)}
        self.plan = replace(
            drafted,
            model=self.model.row(),
            weights=self.model.weights,
            unembedding=self.model.unembedding,
            parts=self.sequences.parts(),
            of_run=of_run,
            facts={**about, **drafted.facts},
        )

    @property
    def of_text(self) -> bool:
        """True if the sequences are tokens of text, and not trees."""
        return self.sequences.task == "tokens"

    @property
    def trees(self) -> TreeSet | GivenTrees:
        """The sequences of a run over trees."""
        assert isinstance(self.sequences, TreeSet | GivenTrees)
        return self.sequences

    @property
    def device(self) -> torch.device:
        """The device that the model lies on."""
        return next(self.model.bridge.parameters()).device

    @property
    def n_batches(self) -> int:
        """Number of batches of the whole run."""
        return self.sequences.n_batches

    @property
    def unit(self) -> str:
        """What the sequences are called, in the plural."""
        return "sequences" if self.of_text else "trees"

    def originals(self, datasets: pl.DataFrame) -> int | None:
        """tree_id of the first tree of the set that a variant was made from; None for a drawn set.

        Args:
            datasets: the committed rows of `datasets`.
        """
        original = self.plan.dataset.get("variant_of")
        if not original:
            return None
        known = {row["dataset"]: row["first_tree_id"] for row in datasets.to_dicts()}
        return int(known[original])

    def over(self, sites: Collection[str], grades: bool = True) -> Ingest:
        """The same job with some of its sites alone.

        Args:
            sites: TransformerLens' names.
            grades: see the class.
        """
        part = copy.copy(self)
        part.specs = [spec for spec in self.specs if spec.name in sites]
        part.plan = replace(self.plan, sites=[site for site in self.plan.sites if site.site in sites])
        part.grades = grades
        return part

    def held(self) -> dict[int, set[str]]:
        """Number of each committed batch → the sites that it has; reads the store."""
        try:
            return committed_sites(self.store, self.plan.run)
        except NotStored:
            return {}

    def left(self) -> list[int]:
        """Numbers of the batches that lack rows or one of the sites; reads the store."""
        return list(lacking(self.plan, self.held()))

    def n_of(self, batches: Collection[int]) -> int:
        """Number of sequences of some batches; of text, an estimate unless they are all or none."""
        if self.of_text:
            return self.sequences.n_sequences * len(batches) // self.n_batches
        per_batch = int(self.plan.dataset["trees_per_shard"])
        return sum(min(per_batch, self.sequences.n_sequences - batch * per_batch) for batch in batches)

    @cached_property
    def n_tokens(self) -> int:
        """Token rows of the whole set; of trees, estimated from the first 1,000."""
        return self.sequences.n_tokens

    def bytes_of(self, n_batches: int) -> int:
        """Estimated bytes of n batches."""
        return self._bytes({batch: [site.site for site in self.plan.sites] for batch in range(n_batches)}, {})

    def bytes_left(self) -> int:
        """Estimated bytes of what is not stored yet."""
        held = self.held()
        return self._bytes(lacking(self.plan, held), held)

    def _bytes(self, left: Mapping[int, Sequence[str]], held: Collection[int]) -> int:
        """Estimated bytes of some sites of some batches, and of the rows of those not held."""
        per_batch = self.n_tokens // self.n_batches
        of_site = {site.site: bytes_per_batch(site.layout, per_batch) for site in self.plan.sites}
        of_rows = self.n_tokens * BYTES_PER_TOKEN_ROW[self.sequences.task] // self.n_batches
        shards = sum(of_site[site] for sites in left.values() for site in sites)
        return shards + of_rows * len(left.keys() - held) + (CATALOG_BYTES if left else 0)

    def kept(self) -> str:
        """One sentence: what a stop keeps now, and what the same command does after it."""
        done = self.n_batches - len(self.left())
        if not done:
            return "nothing was committed yet, and the same command starts over"
        return f"{done} of {self.n_batches} batches are committed, and the same command goes on from there"

    def announcement(self) -> str:
        """One sentence: what the job will cost in trees, tokens, sites and bytes."""
        free, held = at(self.store).free_room(), self.held()
        room = "" if free == ENDLESS else f"; {free / 1e9:.1f} GB free"
        left = lacking(self.plan, held)
        done = self.n_batches - len(left)
        resumed = f"; {done} of {self.n_batches} batches are there" if done else ""
        about = "about " * (not self.of_text)
        if self.patch is not None:
            return f"run {self.plan.run}: {self.patch.said()}, {self._n_sites}{room}{resumed}"
        return (
            f"run {self.plan.run}: {self.sequences.n_sequences:,} {self.unit} ({self.plan.dataset['dataset']}), "
            f"{about}{self.n_tokens:,} tokens, {self._sites_said(left, held)}; {self._bytes(left, held) / 1e9:.2f} GB to "
            f"write{room.replace(';', ',')}{resumed}"
        )

    @property
    def _n_sites(self) -> str:
        return f"{len(self.specs)} site{'s' * (len(self.specs) != 1)}"

    def _sites_said(self, left: Mapping[int, Sequence[str]], held: Collection[int]) -> str:
        """How many sites are stored; or which are added to a run, and which it has."""
        added = {site for batch, sites in left.items() if batch in held for site in sites}
        if not added:
            return self._n_sites
        more = [spec.short for spec in self.specs if spec.name in added]
        there = [spec.short for spec in self.specs if spec.name not in added]
        skipped = f" ({', '.join(there)} {'is' if len(there) == 1 else 'are'} there already)" if there else ""
        return f"adds {', '.join(more)}{skipped}"

    def begin(self, drawn: Any, into: Buffers, passes: Passes) -> Iterator[Any]:
        """Queue the passes over a batch, if `passes` runs two at once.

        Args:
            drawn: the batch, as the set of sequences draws it.
            into: receives the activations.
            passes: runs them.

        Returns:
            What `answers` needs of each pass.
        """
        if self.of_text or self.patch is not None or self.generator is not None:
            return iter(())
        import torch

        from actstore.ingest.answers import tree_paths

        ids, words = torch.from_numpy(self.model.config.vocabulary.encode(drawn.words)).to(self.device), drawn.words

        def run(model: Model, rows: slice) -> tuple[np.ndarray, np.ndarray] | None:
            def take(spec: SiteSpec, activations: torch.Tensor) -> None:
                into[spec.name].put(rows.start, activations)

            if not self.grades or self.asked is None:
                activations_of(model, ids[rows], self.specs, take)
                return None
            logits = forward(model, ids[rows], self.specs, take)
            return tree_paths.predictions(model, words[rows], tree_paths.of_steps(words[rows], logits))

        return passes.each(run, self._passes(len(ids)))

    def answers(
        self,
        drawn: Any,
        first: Ids,
        into: Buffers,
        advance: Callable[[int], None],
        passes: Passes | None = None,
        found: Iterable[Any] = (),
    ) -> Graded:
        """Run the model over one batch.

        Args:
            drawn: the batch, as the set of sequences draws it.
            first: ids of the batch's first sequence.
            into: receives the activations.
            advance: called with the number of sequences of the set done so far.
            passes, found: of a job without edits: what runs its passes, and what `begin` gave.

        Returns:
            A function that gives the rows of `predictions` and `outcomes`, or of `generations`;
            none without `grades` or `asked`.
        """
        if self.patch is not None:
            assert not isinstance(self.asked, Continued)
            patch = self.patch if self.grades else replace(self.patch, greedy=False)
            run_edited = patch.run_text if self.of_text else patch.run_trees
            rows = run_edited(
                self.model, self.specs, drawn, first, self.per_pass, self.asked, self.plan.run, into, advance
            )
        elif isinstance(self.asked, Continued):
            rows = self._text_continuations(drawn, first, advance)
        elif self.of_text:
            options = (self.per_pass, self.asked if self.grades else None, self.plan.run)
            rows = run_text(self.model, self.specs, drawn, first, into, *options, advance)
        elif self.generator:
            rows = self._continuations(drawn, first.sequence_id, advance)
        else:
            assert passes is not None
            given = []
            for pass_over, predicted in zip(self._passes(len(drawn.words)), found, strict=True):
                given.append(predicted)
                advance(drawn.start + pass_over.stop)
            return partial(self._predictions, drawn, first.sequence_id, given, passes)
        return lambda: rows

    def _predictions(
        self, drawn: TreesDrawn, first_tree_id: int, given: Sequence[Any], passes: Passes
    ) -> dict[str, pl.DataFrame]:
        """Grade what the passes over a batch gave."""
        from actstore.ingest.answers import tree_paths

        if None in given:
            return {}
        predicted, p_target = map(np.concatenate, zip(*given, strict=True))
        next_word = tree_paths.next_words(passes.model, self.per_pass)
        graded = tree_paths.graded(drawn.words, predicted, p_target, next_word)
        return {
            "predictions": tree_paths.prediction_rows(graded, self.plan.run, first_tree_id),
            "outcomes": tree_paths.outcome_rows(graded, self.plan.run, first_tree_id),
        }

    def _continuations(
        self, drawn: TreesDrawn, first_tree_id: int, advance: Callable[[int], None]
    ) -> dict[str, pl.DataFrame]:
        from actstore.ingest.answers import continuations

        assert isinstance(self.generator, continuations.Generator)
        generated = []
        for rows in self._passes(len(drawn.words)):
            generated.append(self.generator.go_on(drawn.words[rows], drawn.start + rows.start))
            advance(drawn.start + rows.stop)
        whole = concatenate(generated)
        return {"generations": continuations.generation_rows(whole, self.plan.run, first_tree_id)}

    def _text_continuations(self, drawn: Any, first: Ids, advance: Callable[[int], None]) -> dict[str, pl.DataFrame]:
        from actstore.ingest.answers import text_continuations

        assert isinstance(self.generator, text_continuations.TextGenerator)
        every = np.arange(len(drawn))
        rows = self.generator.go_on(drawn, every, self.per_pass, lambda done: advance(drawn.start + done))
        return {"generations": text_continuations.generation_rows(rows, drawn, self.plan.run, first)}

    def _passes(self, n_trees: int) -> list[slice]:
        """The rows of a batch in each forward pass."""
        starts = range(0, n_trees, self.per_pass)
        return [slice(start, min(start + self.per_pass, n_trees)) for start in starts]


def draft(
    model: str,
    config: Any,
    sequences: Sequences,
    run: str | None,
    specs: Sequence[SiteSpec],
    prompt: str = "task",
    samples: int | None = None,
    dtype: str = "float32",
    codec: str = "none",
) -> RunPlan:
    """The plan of a run, without its model; needs no weights.

    Args:
        model, config: the model's name and shape.
        specs: the run's sites; none are stored with prompt `tree`.
        run, prompt, samples, dtype, codec: see Ingest.

    Raises:
        BadInput: an argument has no meaning, or the model cannot take these sequences.
    """
    dataset = sequences.row()
    of_trees = isinstance(config, ModelConfig)
    if of_trees != (sequences.task == "trees"):
        reads, got = ("trees", "text") if of_trees else ("text", "trees")
        how = "--trees N or --trees-from FILE" if of_trees else "--text FILE or --tokens FILE"
        raise BadInput(f"model {model!r} reads {reads}, and got {got}; give {how}, or name another model")
    facts = _tree_facts(model, config, dataset, prompt, samples) if of_trees else _text_facts(prompt, samples)
    change = dataset.get("change")
    return RunPlan(
        run=run or run_name(model, change, prompt),
        model={},
        weights=b"",
        dataset=dataset,
        sites=[] if prompt != "task" else [site_plan(spec, dataset, dtype, codec) for spec in specs],
        facts=facts,
    )


def run_name(model: str, change: str | None = None, prompt: str = "task") -> str:
    """The name of a run that nobody named.

    Args:
        model: the model's name.
        change: see trees/variants.py.
        prompt: see Ingest.
    """
    return "-".join([model, *filter(None, [change, CONTINUATIONS.get(prompt)])])


def _samples(samples: int | None) -> int:
    """The number of sampled continuations, 1 by default."""
    samples = 1 if samples is None else samples
    if not 0 <= samples <= MOST_SAMPLES:
        raise BadInput(f"got {samples} samples; there are 0 to {MOST_SAMPLES} (--samples)")
    return samples


def _text_facts(prompt: str, samples: int | None) -> dict[str, Any]:
    """Columns of `runs` for a run over text."""
    return {"prompt": prompt, "samples": _samples(samples)} if prompt == "text" else {}


def _tree_facts(
    model: str, config: ModelConfig, dataset: Mapping[str, Any], prompt: str, samples: int | None
) -> dict[str, Any]:
    """Columns of `runs` for a run over trees."""
    n_nodes = dataset["n_nodes"]
    if prompt not in PROMPTS:
        raise BadInput(f"got --prompt {prompt!r}{nearest(prompt, PROMPTS)}; {there_are(PROMPTS)}")
    if prompt == "tree":
        samples = _samples(samples)
    elif samples is not None:
        raise BadInput("--samples is of continuations that a model makes up; ask for them with --prompt tree")
    if n_nodes > config.n_nodes:
        raise BadInput(
            f"got trees of {n_nodes} nodes; model {model!r} has labels for {config.n_nodes}: use --nodes "
            f"{config.n_nodes} or less"
        )
    if dataset["n_positions"] > config.n_ctx:
        raise BadInput(
            f"trees of {n_nodes} nodes take {dataset['n_positions']} tokens; model {model!r} has a context of "
            f"{config.n_ctx}: use fewer --nodes"
        )
    return {"prompt": prompt, "samples": samples}


def check_batch_size(batch_size: int | None) -> None:
    """Refuse a batch size below 1."""
    if batch_size is not None and batch_size < 1:
        raise BadInput(f"got a batch size of {batch_size}; a forward pass takes 1 sequence or more (--batch-size)")


def check_stored(dtype: str, codec: str) -> None:
    """Refuse a dtype that activations cannot be stored as, and a codec that there is not."""
    if codec not in CODECS:
        raise BadInput(f"got codec {codec!r}{nearest(codec, CODECS)}; {there_are(CODECS)} (--codec)")
    if dtype not in STORED_AS:
        raise BadInput(f"got dtype {dtype!r}{nearest(dtype, STORED_AS)}; {there_are(STORED_AS)} (--dtype)")


def default_batch_size(dataset: Mapping[str, Any]) -> int:
    """Sequences per forward pass: 128 trees; or of text, as many as have TOKENS_AT_ONCE tokens."""
    if is_of_trees(dataset):
        return MOST_AT_ONCE
    return min(MOST_AT_ONCE, max(1, TOKENS_AT_ONCE // int(dataset["n_positions"])))


@cache
def versions() -> Mapping[str, str | int]:
    """Versions of the packages that a run depends on, for its row of `runs`."""
    return {name: version(name) for name in ("actstore", "torch", "transformer_lens")}
