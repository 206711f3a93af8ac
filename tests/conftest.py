"""What all tests share: hypothesis without deadlines (the same examples each time on a build server), and a small store."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads on a tiny model wait for each other

import pytest
from hypothesis import settings

settings.register_profile("here", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "here")


@pytest.fixture(scope="session")
def shipped():
    """The trained model that the project ships; loaded once, since transformer_lens takes seconds to import."""
    from actstore.ingest.models import load

    return load("reproduction")


@pytest.fixture(scope="session")
def demo_path(shipped, tmp_path_factory):
    """A store of 40 trees through the shipped model, at the default sites, in batches of 16."""
    from actstore.ingest.pipeline import Ingest, TreeSet

    path = tmp_path_factory.mktemp("demo") / "demo.act"
    Ingest(path, shipped, TreeSet("reproduction", 40, trees_per_shard=16), batch_size=8).execute()
    return path


@pytest.fixture
def demo_store(demo_path):
    from actstore.store import Store

    with Store(demo_path) as store:
        yield store
