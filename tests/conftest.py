"""What all tests share: hypothesis without deadlines (the same examples each time on a build server), and a small store."""

import os
import shutil

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads on a tiny model wait for each other
os.environ.pop("ACTSTORE_MODELS", None)  # whoever runs the tests may have models of their own, here
os.environ["XDG_DATA_HOME"] = os.devnull  # and here

import pytest
from hypothesis import settings

settings.register_profile("here", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "here")


@pytest.fixture(autouse=True)
def no_progress(monkeypatch):
    """What a command says does not depend on how slow the machine is: no line of progress comes after five seconds."""
    from actstore.cli import progress

    monkeypatch.setattr(progress, "SECONDS_BEFORE_A_LINE", 1e6)


@pytest.fixture(scope="session")
def shipped():
    """The trained model that the project ships; loaded once, since transformer_lens takes seconds to import."""
    from actstore.ingest.models.load import load

    return load("reproduction")


@pytest.fixture(scope="session")
def demo_path(shipped, tmp_path_factory):
    """A store of 40 trees through the shipped model, at the default sites, in batches of 16."""
    from actstore.ingest.jobs.job import Ingest
    from actstore.ingest.jobs.local import execute
    from actstore.ingest.trees.task import TreeSet

    path = tmp_path_factory.mktemp("demo") / "demo.act"
    execute(Ingest(path, shipped, TreeSet("reproduction", 40, trees_per_shard=16), batch_size=8))
    return path


@pytest.fixture(scope="session")
def answered_path(tmp_path_factory):
    """A store whose answers, patterns, activations and directions are made up; not to be changed."""
    from tests.planted_answers import plant_answers

    return plant_answers(tmp_path_factory.mktemp("answered") / "s.act")


@pytest.fixture
def demo_store(demo_path):
    from actstore.store import Store

    with Store(demo_path) as store:
        yield store


@pytest.fixture(scope="session")
def damageable(tmp_path_factory):
    """A small store with everything in it that can be damaged; not to be changed."""
    from tests.damaged import make

    return make(tmp_path_factory.mktemp("damageable") / "s.act")


@pytest.fixture
def store(damageable, tmp_path):
    """A copy of it, to be damaged."""
    shutil.copytree(damageable, tmp_path / "s.act")
    return tmp_path / "s.act"


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """A real S3 server on loopback; gives the environment by which clients find it."""
    from tests.bucket_server import server

    with server(tmp_path_factory.mktemp("s3") / "server") as env:
        yield env


@pytest.fixture(scope="module")
def s3(s3_server, tmp_path_factory):
    """The server, in this process's environment, and a cache of the module's own."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in s3_server.items():
            patch.setenv(name, value)
        patch.setenv("ACTSTORE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield s3_server
