"""From the arguments of `actstore ingest` to a job."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actstore.commits.log import manifests
from actstore.errors import BadInput, nearest
from actstore.ingest.answers.next_token import Asked, Continued, understood
from actstore.ingest.corpus.corpus import Corpus, from_text, from_tokens
from actstore.ingest.corpus.documents import open_documents
from actstore.ingest.corpus.tokens import Vocabulary
from actstore.ingest.jobs.chosen import Chosen, Loading, choose
from actstore.ingest.jobs.job import Ingest, check_batch_size, check_stored, draft, run_name
from actstore.ingest.jobs.sets import stored_set
from actstore.ingest.models.config import ModelConfig, there_are
from actstore.ingest.models.sites import site_specs
from actstore.ingest.trees.given import GivenTrees, from_table
from actstore.ingest.trees.task import TreeSet
from actstore.ingest.trees.variants import vary
from actstore.storage.at import place
from actstore.writing.committed import check_plan, committed_datasets, committed_run, made_by

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from actstore.ingest.models.model import Model

ANSWERS = {"trees": ("all", "none"), "tokens": ("next", "none")}  # by task; the first is the default
Given = dict[str, Any]  # options by their names on the command line, without those left out


def prepare(
    store: str | Path,
    model: str | Path | Model | TransformerBridge | None = None,
    config: str | None = None,
    trees: int | None = None,
    distribution: str | None = None,
    depths: str | None = None,
    nodes: int | None = None,
    seed: int | None = None,
    dataset: str | None = None,
    run: str | None = None,
    sites: str | Sequence[str] | None = None,
    batch_size: int | None = None,
    device: str = "cpu",
    checkpoint: int | None = None,
    variant: str | None = None,
    prompt: str = "task",
    samples: int | None = None,
    wait: float = 10.0,
    model_of: str | None = None,
    *,
    text: Any = None,
    tokens: Any = None,
    trees_from: Any = None,
    column: str | None = None,
    context: int | None = None,
    cut: str | None = None,
    hub: bool = False,
    revision: str | None = None,
    untrained: int | None = None,
    keep_weights: bool = False,
    tokenizer: Any = None,
    answers: str | None = None,
    top: int | None = None,
    continued: int | None = None,
    dtype: str | None = None,
    codec: str | None = None,
) -> Ingest:
    """Turn the arguments of `actstore ingest` into a job; nothing is written.

    Args:
        model: a name, a path, or a TransformerBridge.
        trees, distribution, depths, nodes, seed: default: those of the stored set `dataset`, else
            10,000 trees of seed 0 from the model's own distribution, with as many nodes as the
            model has labels.
        depths: goal depths of `deep` trees, `1-15` or `3,5,7`.
        dataset: a stored set of trees or text, or the name of a new one.
        run: name of the run. The sites that a finished run of the name lacks are added to it; its
            weights, sequences and forward passes must be the same.
        sites: names in a list or separated by commas, see `site_specs`; `none` or an empty list is
            no site. Default: those of the run, or for a new run `embed` and `resid_post`.
        batch_size: sequences per forward pass; default: the run's own, or see Ingest.
        checkpoint: a step of the model's training, see `models.load`.
        variant: one of variants.CHANGES; changes the stored set `dataset`.
        prompt, samples, wait: see Ingest.
        model_of: takes the model of this stored run, with the store's own weights; instead of
            `model`.
        text, tokens: documents, or token ids, for a model of text: a file or a frame, see
            `corpus.from_text` and `corpus.from_tokens`.
        trees_from: trees of your own, see `trees.given.from_table`.
        column, context, cut: see `corpus.from_text`.
        config, hub, revision, untrained, keep_weights, tokenizer: see `models.load`.
        answers: `next` stores next-token predictions of text, if the model makes any, and `all`
            stores predictions and outcomes of trees. `none` stores no answers, so that a forward
            pass ends after the last site. Default: the run's own, or `next` and `all`.
        continued: continue each sequence of text by so many tokens, greedily and in `samples`
            draws, and store these continuations alone.
        dtype: how activations are stored: `float32`; `float16` or `bfloat16`, the nearest such
            numbers; or `int8`, with a scale for each vector, see arrays.encoding. What is read is
            float32 all the same. Default: the run's own, or `float32`.
        codec: how they are compressed, without loss: `none`; `zstd`; or `blosc`, which shuffles
            bytes before. Default: the run's own, or `none`.
        top: how many of the likeliest tokens each prediction names; default: the run's own, or 0.

    Raises:
        BadInput: an argument has no meaning, or the model cannot take these sequences.
        NotStored: there is no such model or checkpoint.
    """
    check_batch_size(batch_size)
    check_stored(dtype or "float32", codec or "none")
    for option, name in (("--run", run), ("--dataset", dataset)):
        if name == "":
            raise BadInput(f"got an empty name for {option}; give one, or leave {option} out")
    store = place(store)
    drawn = {"trees": trees, "distribution": distribution, "depths": depths, "nodes": nodes, "seed": seed}
    of_trees = {**drawn, "variant": variant, "prompt": None if prompt == "task" else prompt}
    cutting = {"column": column, "context": context, "cut": cut}
    files = {"text": text, "tokens": tokens, "trees-from": trees_from}
    of_text = {"text": text, "tokens": tokens, **cutting, "top": top, "continue": continued}
    if continued is not None and (
        more := [*_given({"answers": answers, "top": top, "sites": sites, "dtype": dtype, "codec": codec})]
    ):
        raise BadInput(f"got --continue and --{more[0]}; a run of continuations stores these alone: leave one out")
    _refuse_combinations(_given(files), _given(cutting), _given(drawn), variant, answers, top)
    if (source := text if text is not None else tokens) is not None:
        open_documents(source, column or ("text" if tokens is None else "tokens"))  # before a model is loaded
    how = Loading(config, checkpoint, hub, revision, untrained, keep_weights, tokenizer)
    chosen = choose(store, model, model_of, device, how)
    names = parse_sites(sites)
    if answers is not None and answers not in ANSWERS[chosen.task]:
        kind = "trees" if chosen.task == "trees" else "text"
        raise BadInput(
            f"got --answers {answers}, and model {chosen.name!r} reads {kind}; {there_are(ANSWERS[chosen.task])}"
        )
    if chosen.task == "tokens":
        _refuse(chosen, "reads text", "is of trees", {**of_trees, "trees-from": trees_from})
        loaded = chosen.load()
        sequences = _text(store, chosen, loaded, dataset, files, _given(cutting))
        if top and not loaded.predicts:
            raise BadInput(f"got --top {top}, and model {loaded.name!r} predicts no next token; leave it out")
        if continued is not None:
            if not loaded.predicts:
                raise BadInput(f"got --continue, and model {loaded.name!r} predicts no next token; leave it out")
            more_text = Continued(continued)
            job = Ingest(
                store,
                loaded,
                sequences,
                run,
                [],
                batch_size,
                prompt="text",
                samples=samples,
                wait=wait,
                asked=more_text,
            )
            check_plan(store, job.plan)
            return job
        if samples is not None:
            raise BadInput(
                "got --samples, which is of continuations that a model makes up; ask for them with --continue N"
            )
        own = _own(store, run or run_name(loaded.name))
        asked = own.asked if answers is None and top is None else None if answers == "none" else Asked(top or 0)
        names, batch_size = own.sites if names is None else names, batch_size or own.batch_size
        job = Ingest(
            store,
            loaded,
            sequences,
            run,
            names,
            batch_size,
            wait=wait,
            asked=asked,
            dtype=dtype or own.dtype,
            codec=codec or own.codec,
        )
        check_plan(store, job.plan)
        return job
    _refuse(chosen, "is a path-finding system, which reads trees", "is of text", of_text)
    assert chosen.shape is not None
    tree_set = _trees(store, chosen.shape, dataset, drawn, trees_from, variant)
    if prompt == "tree" and answers is not None:
        raise BadInput(
            f"got --prompt tree and --answers {answers}; a run of continuations stores these alone: leave one out"
        )
    own = _own(store, run or run_name(chosen.name, tree_set.row().get("change"), prompt))
    asked = own.asked if answers is None else None if answers == "none" else Asked()
    names, batch_size = own.sites if names is None else names, batch_size or own.batch_size
    specs = [] if names is not None and not names else site_specs(names, chosen.shape)
    if (how_stored := _given({"dtype": dtype, "codec": codec})) and (prompt != "task" or not specs):
        name, value = next(iter(how_stored.items()))
        raise BadInput(f"got --{name} {value}, and no activations are stored; leave it out")
    check_plan(store, draft(chosen.name, chosen.shape, tree_set, run, specs, prompt, samples))
    of_run: Given = {"prompt": prompt, "samples": samples, "wait": wait, "asked": asked}
    of_run |= {"dtype": dtype or own.dtype, "codec": codec or own.codec}
    job = Ingest(store, chosen.load(), tree_set, run, names, batch_size, **of_run)
    check_plan(store, job.plan)
    return job


@dataclass(frozen=True)
class Own:
    """What a stored run was made with, which stands for what is not asked for; see Ingest."""

    sites: list[str] | None = None
    batch_size: int | None = None
    asked: Asked | Continued | None = field(default_factory=Asked)
    dtype: str = "float32"
    codec: str = "none"


def _own(store: Path, run: str) -> Own:
    """What a run was made with; the defaults if there is no such run."""
    found = committed_run(store, run)
    if found is None:
        return Own()
    noted = made_by(found[0])
    return Own(found[1], noted["batch_size"], understood(noted["answers"] or "next"), noted["dtype"], noted["codec"])


def _given(options: Mapping[str, Any]) -> Given:
    return {name: value for name, value in options.items() if value is not None}


def _refuse_combinations(
    files: Given, cutting: Given, drawn: Given, variant: str | None, answers: str | None, top: int | None
) -> None:
    """Refuse options that exclude each other, whatever the model is.

    Raises:
        BadInput: names two of them.
    """
    if len(files) > 1:
        first, second, *_ = files
        raise BadInput(f"got --{first} and --{second}; a dataset comes from one file: name one of them")
    if cutting and not files.keys() & {"text", "tokens"}:
        raise BadInput(f"got --{next(iter(cutting))}, which says how a file is read; add --text FILE or --tokens FILE")
    if "trees-from" in files and (more := [*drawn, *["variant"] * bool(variant)]):
        raise BadInput(f"got --trees-from and --{more[0]}, which is of trees that are drawn; leave one out")
    known = list(dict.fromkeys(name for names in ANSWERS.values() for name in names))
    if answers is not None and answers not in known:
        raise BadInput(f"got --answers {answers!r}{nearest(answers, known)}; {there_are(known)}")
    if answers == "none" and top:
        raise BadInput("got --top, which is of the predictions that --answers none leaves out; leave one out")


def _refuse(chosen: Chosen, reads: str, kind: str, options: Mapping[str, Any]) -> None:
    """Refuse the options of the other task than the model's."""
    for name, value in options.items():
        if value is not None:
            raise BadInput(f"got --{name}, which {kind}, and model {chosen.name!r} {reads}; leave it out")


def _text(
    store: Path, chosen: Chosen, model: Model, dataset: str | None, files: Mapping[str, Any], options: Given
) -> Corpus:
    """The documents of a file, or those of a stored set."""
    vocabulary = Vocabulary(model.tokenizer, chosen.tokenizer_sha256 or model.tokenizer_sha256, model.d_vocab)
    if files["text"] is not None:
        return from_text(files["text"], vocabulary, n_ctx=model.n_ctx, name=dataset, **options)
    if files["tokens"] is not None:
        return from_tokens(files["tokens"], vocabulary, n_ctx=model.n_ctx, name=dataset, **options)
    row = committed_datasets(store).get(dataset) if dataset else None
    if row is None:
        named = f"no dataset {dataset!r} is stored" if dataset else "no text was named"
        raise BadInput(
            f"model {model.name!r} reads text, and {named}; give --text FILE, --tokens FILE, or a stored dataset (--dataset)"
        )
    if row.get("task") != "tokens":
        raise BadInput(f"dataset {dataset!r} holds trees, and model {model.name!r} reads text; name another")
    corpus = stored_set(store, manifests(store), row, vocabulary)
    assert isinstance(corpus, Corpus)
    corpus.check(vocabulary, model.n_ctx)
    return corpus


def _trees(
    store: Path,
    shape: ModelConfig,
    dataset: str | None,
    drawn: Mapping[str, Any],
    trees_from: Any,
    variant: str | None,
) -> TreeSet | GivenTrees:
    """Trees that are given, or stored, or to be drawn."""
    there = committed_datasets(store)
    row = there.get(dataset) if dataset else None
    stored = row or {}
    if stored.get("task") == "tokens":
        raise BadInput(
            f"dataset {dataset!r} holds text, and a path-finding system reads trees; name another (--dataset), or a "
            "model of text"
        )
    if trees_from is not None:
        given = from_table(trees_from, dataset)
        stored = there.get(given.name, {})
        return replace(given, trees_per_shard=stored.get("trees_per_shard") or given.trees_per_shard)
    if row is not None and row["distribution"] is None:
        if more := [*_given(drawn), *["variant"] * bool(variant)]:
            raise BadInput(f"got --{more[0]}, and the trees of {dataset!r} were given, not drawn; leave it out")
        held = stored_set(store, manifests(store), row)
        assert isinstance(held, GivenTrees)
        return held
    defaults = {"distribution": shape.system, "n_trees": 10_000, "seed": 0, "n_nodes": shape.n_nodes}
    asked = {
        "distribution": drawn["distribution"],
        "n_trees": drawn["trees"],
        "seed": drawn["seed"],
        "n_nodes": drawn["nodes"],
        "depths": _parse_depths(drawn["depths"]),
    }
    chosen: dict[str, Any] = {
        key: value if value is not None else stored.get(key, defaults.get(key)) for key, value in asked.items()
    }
    if chosen["depths"] is not None:
        chosen["depths"] = tuple(chosen["depths"])
    chosen |= {key: stored.get(key) for key in ("trees_per_shard", "variant_of", "change")}
    tree_set = TreeSet(**chosen, name=dataset)
    if variant:
        tree_set = _variant(there, tree_set, variant)
    if not tree_set.trees_per_shard:  # a set that is stored keeps its batches
        stored = there.get(tree_set.row()["dataset"], {})
        tree_set = replace(tree_set, trees_per_shard=stored.get("trees_per_shard"))
    return tree_set


def parse_sites(text: str | Sequence[str] | None) -> list[str] | None:
    """Names of sites: a list, or words that are separated by commas; `none` is no site.

    Raises:
        BadInput: `none` stands among others.
    """
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")] if isinstance(text, str) else list(text)
    if "none" in names and len(names) > 1:
        raise BadInput(f"got --sites {text}; none stands alone, for a run without activations")
    return [] if names == ["none"] else names


def _variant(there: Collection[str], original: TreeSet, change: str) -> TreeSet:
    """The variant of a stored set, one of those named.

    Raises:
        BadInput: the set is not stored or is itself a variant, or the change is unknown.
    """
    if original.name is None or original.name not in there:
        named = f"no set {original.name!r} is stored" if original.name else "no set was named"
        raise BadInput(
            f"--variant {change} is made from a stored set of trees, and {named} (--dataset); "
            f"{there_are(list(there))}: name one, or ingest it first, without --variant"
        )
    if original.variant_of:
        raise BadInput(f"{original.name} is a variant of {original.variant_of} already; name the drawn set (--dataset)")
    vary(original.between(0, 0).trees, change, original.seed, 0)  # refuses what is no change
    return replace(original, name=f"{original.name}-{change}", variant_of=original.name, change=change)


def _parse_depths(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    ranges = [re.fullmatch(r"\s*(\d{1,2})(?:\s*-\s*(\d{1,2}))?\s*", part) for part in text.split(",")]
    ends = [(int(found[1]), int(found[2] or found[1])) for found in ranges if found]
    if len(ends) < len(ranges) or any(low > high for low, high in ends):
        raise BadInput(f"got --depths {text}; write a range (1-15) or a list (3,5,7)")
    return tuple(sorted({depth for low, high in ends for depth in range(low, high + 1)}))
