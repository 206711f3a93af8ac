"""The command that fills a store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from actstore.cli.group import KEPT, main, say
from actstore.cli.options import checkpoint_option, store_argument, wait_option
from actstore.errors import advised


@main.command()
@store_argument
@click.option("--model", help="A model's name (`actstore models list`) or a checkpoint's path.")
@click.option(
    "--model-of", metavar="RUN", help="Instead of --model: the model of a stored run, by the weights in the store."
)
@click.option("--config", type=click.Path(), help="The checkpoint's YAML, if not beside it.")
@checkpoint_option
@click.option("--trees", type=int, help="How many trees; default 10,000.")
@click.option("--distribution", help="reproduction, baseline or deep; default: the model's own.")
@click.option("--depths", help="Goal depths of `deep` trees: 1-15 or 3,5,7.")
@click.option("--nodes", type=int, help="Nodes per tree, 2 to 64; default: the model's number of labels.")
@click.option("--seed", type=int, help="Seed of the stream of trees; default 0.")
@click.option("--dataset", help="Name of the set of trees: a stored set, or a new set drawn as the options above say.")
@click.option("--run", help="Name of the run; default: the model's name.")
@click.option(
    "--sites",
    help="embed, resid_pre, resid_mid, resid_post, pattern, or one layer (resid_post.0), separated by commas; or none.",
)
@click.option(
    "--variant",
    help="swap_last or swap_inner: in each tree of the stored --dataset, an edge of the path trades places.",
)
@click.option(
    "--prompt",
    default="task",
    show_default=True,
    help="tree: give the model only the edges, and store its continuations.",
)
@click.option("--samples", type=int, help="With --prompt tree: continuations drawn besides the greedy one; default 1.")
@click.option("--batch-size", default=128, show_default=True, help="Trees per forward pass.")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option(
    "--from-arrays",
    metavar="FILE",
    help="Instead of a model: token_id and X of this .npz, .safetensors or .parquet, as --site of the stored --run.",
)
@click.option("--site", help="With --from-arrays: name of the new site.")
@click.option("--lineage", metavar="TEXT", help="With --from-arrays: what X is, from which site, by which code.")
@click.option("--allow-nan", is_flag=True, help="With --from-arrays: accept NaN and infinity.")
@wait_option
def ingest(
    store: Path, from_arrays: str | None, site: str | None, lineage: str | None, allow_nan: bool, **options: Any
) -> None:
    """Run a model over generated trees, and store its activations and answers.

    If the command is stopped or killed, the same command continues after the last commit, and ends
    with the same bytes.

    Example:

    \b
        actstore ingest demo.act --model reproduction --trees 2000
        actstore ingest demo.act --model reproduction --run patterns --trees 500 --sites pattern,resid_post.0
        actstore ingest demo.act --model reproduction --trees 2000 --checkpoint 1000
        actstore ingest demo.act --model mine.pt --config mine.yaml --dataset reproduction-16nodes-seed0-2000
        actstore ingest demo.act --model reproduction --dataset reproduction-16nodes-seed0-2000 --variant swap_last
        actstore ingest demo.act --model reproduction --dataset reproduction-16nodes-seed0-2000 --prompt tree
        actstore ingest demo.act --from-arrays sae.npz --run reproduction --site sae.3 --lineage "SAE of resid_post.3"
    """
    if from_arrays is not None:
        _append(store, from_arrays, options["run"], site, lineage, allow_nan, options["wait"])
        return
    if site or lineage or allow_nan:
        raise click.UsageError("--site, --lineage and --allow-nan come with --from-arrays (a model's sites: --sites)")
    from actstore.cli.progress import progress
    from actstore.ingest.jobs.local import execute
    from actstore.ingest.jobs.prepare import prepare

    job = prepare(store, **options)
    click.get_current_context().meta[KEPT] = job.kept
    say(job.announcement())
    with progress(f"ingest {job.plan.run}", job.trees.n_trees, "trees") as advance:
        execute(job, advance)
    look = advised("info", store)
    say(f"{store}: run {job.plan.run} holds {job.trees.n_trees:,} trees; look with {look}")


def _append(
    store: Path, file: str, run: str | None, site: str | None, lineage: str | None, allow_nan: bool, wait: float
) -> None:
    from actstore import verbs
    from actstore.reading.files import read_arrays

    if run is None or site is None:
        raise click.UsageError("--from-arrays needs the stored --run, and the name of the new --site")
    said = {"file": Path(file).name} | ({"what": lineage} if lineage else {})
    n = verbs.append(store, run, site, *read_arrays(Path(file)), said, allow_nan, wait)
    say(f"{store}: site {site} of run {run} holds {n:,} tokens")
