"""A small store with everything in it that can be damaged, and ways to damage it."""

from dataclasses import replace
from pathlib import Path

from actstore.commits import log
from actstore.ingest.jobs.job import Ingest
from actstore.ingest.jobs.local import execute
from actstore.ingest.trees.task import TreeSet
from actstore.queries import study
from actstore.store import Store
from actstore.writing.writer import open_writer
from tests.test_pipeline import small_model

TREES = TreeSet("reproduction", 40, seed=1, n_nodes=6, name="d", trees_per_shard=16)


def make(root, model=None):
    """A run with sites, one over variants without, continuations, and a study's results."""
    model = model or small_model()
    execute(Ingest(root, model, TREES, sites=["embed", "resid_post.1", "pattern.0"]))
    varied = replace(TREES, name="d-swap_last", variant_of="d", change="swap_last")
    execute(Ingest(root, model, varied, sites=[]))
    execute(Ingest(root, model, TREES, prompt="tree"))
    with Store(root) as store:
        results = study.ask(store, "depth", run="small").results
    with open_writer(root) as writer:
        writer.record(results)
    return root


def damage(path: Path, change):
    """Change a file that is read-only."""
    content = bytearray(path.read_bytes())
    change(content)
    mode = path.stat().st_mode
    path.unlink()
    path.write_bytes(content)
    path.chmod(mode)


def flip(offset, bit=0):
    """A change of one bit."""

    def change(content):
        content[offset] ^= 1 << bit

    return change


def shorten(content):
    """A change that cuts the last byte off."""
    del content[-1]


def committed(root):
    """Every committed file."""
    return [file for manifest in log.manifests(root) for file in manifest.files]
