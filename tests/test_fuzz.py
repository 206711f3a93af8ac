"""Malformed files of every kind end in one of the package's own errors: never in a traceback, never in another's code running."""

import json
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from actstore.catalog import tables
from actstore.commits.manifest import Manifest, manifest_path
from actstore.errors import ActstoreError, BadInput, Damaged
from actstore.ingest.jobs.job import Ingest
from actstore.ingest.models.config import ModelConfig
from actstore.ingest.models.weights import read_state
from actstore.ingest.training.recipe import read_config
from actstore.ingest.trees.task import TreeSet
from actstore.named import NAME
from actstore.storage import sealed
from actstore.store import Store
from actstore.upkeep.verify import verify
from tests.stores import TABLES, fake
from tests.test_pipeline import small_model

ROOT = Path(__file__).parents[1]
OFTEN = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
SELDOM = settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
YAML = (ROOT / "data" / "configs" / "reproduction.yaml").read_text()
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just([]), st.just({}))
NESTED = st.recursive(
    SCALARS, lambda of: st.lists(of, max_size=3) | st.dictionaries(st.text(max_size=6), of, max_size=3)
)


def mutated(content: bytes) -> st.SearchStrategy[bytes]:
    """A file with a stretch of it replaced, cut off or put in twice."""
    place = st.integers(0, len(content))
    return st.one_of(
        st.builds(
            lambda at, new: content[:at] + new + content[at + len(new) :], place, st.binary(min_size=1, max_size=40)
        ),
        st.builds(lambda at: content[:at], place),
        st.builds(lambda at, to: content[:at] + content[min(at, to) :], place, place),
    )


def ends_well(work):
    """What work gives, or None where it ends in one of the package's own errors."""
    try:
        return work()
    except ActstoreError:
        return None


@OFTEN
@given(st.data())
def test_a_configuration_that_is_none_is_refused(tmp_path, data):
    path = tmp_path / "c.yaml"
    path.write_bytes(data.draw(mutated(YAML.encode())))
    ends_well(lambda: read_config(str(path)))
    ends_well(lambda: ModelConfig.from_yaml(path))


@OFTEN
@given(
    key=st.sampled_from(
        ["system", "n_nodes", "model", "optimizer", "batch_size", "max_iters", "training", "random_seed"]
    ),
    value=NESTED,
)
@example(key="model", value={"d_model": 1e999})
@example(key="training", value={"inner_goals": [[], {}]})
@example(key="optimizer", value={"betas": [None, "x"]})
def test_a_configuration_of_other_types_is_refused(tmp_path, key, value):
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps({"system": "reproduction", "n_nodes": 5, "model": {"n_layers": 1}, key: value}))
    ends_well(lambda: read_config(str(path)))


@pytest.fixture(scope="module")
def weights():
    return small_model().weights


@OFTEN
@given(st.data())
def test_weights_that_are_none_are_refused(tmp_path, weights, data):
    path = tmp_path / "w.safetensors"
    path.write_bytes(data.draw(mutated(weights[:6000])))
    ends_well(lambda: read_state(path))


@SELDOM
@given(st.data())
def test_a_pickled_checkpoint_that_is_none_is_refused(tmp_path, data):
    path = tmp_path / "w.pt"
    torch.save({"embed.W_E": torch.zeros(3, 4)}, path)
    path.write_bytes(data.draw(mutated(path.read_bytes())))
    ends_well(lambda: read_state(path))


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("save", [torch.save, lambda what, path: path.write_bytes(pickle.dumps(what))])
def test_a_checkpoint_runs_nobodys_code(tmp_path, save):
    save({"embed.W_E": Payload(tmp_path / "owned")}, tmp_path / "w.pt")
    with pytest.raises(BadInput):
        read_state(tmp_path / "w.pt")
    assert not (tmp_path / "owned").exists()


def test_no_pickle_is_loaded_anywhere():
    for path in [*ROOT.glob("actstore/**/*.py"), *ROOT.glob("ingest/**/*.py"), *ROOT.glob("queries/**/*.py")]:
        text = path.read_text()
        assert not re.search(
            r"pickle\.loads?\(|allow_pickle=True|joblib|yaml\.(unsafe_)?load\(|(?<![.\w])eval\(|(?<![.\w])exec\(", text
        ), path
        for call in re.findall(r"torch\.load\([^\n]*", text):
            assert "weights_only=True" in call, path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzz") / "s.act"
    fake().store(root)
    return root


@OFTEN
@given(st.data())
def test_a_manifest_that_is_none_is_damage(whole, data):
    content = (whole / manifest_path(2)).read_bytes()
    bad = data.draw(mutated(content))
    found = ends_well(lambda: Manifest.from_json(bad, Path("m")))
    assert found is None or found == Manifest.from_json(content, Path("m")), (
        "a checksum holds for what it was made of alone"
    )


@OFTEN
@given(NESTED)
def test_a_manifest_of_other_types_is_damage(value):
    body = {"format": 2, "number": value, "kind": value, "parts": value, "shards": value, "others": value}
    content = json.dumps({**body, "checksum": sealed.checksum(body)}).encode()
    ends_well(lambda: Manifest.from_json(content, Path("m")))


def copy_of(whole, tmp_path):
    root = tmp_path / "s.act"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(whole, root)
    return root


def replace(path, content):
    path.unlink()
    path.write_bytes(content)


@SELDOM
@given(st.data())
def test_a_store_json_that_is_none_is_damage(whole, tmp_path, data):
    root = copy_of(whole, tmp_path)
    replace(root / "store.json", data.draw(mutated((root / "store.json").read_bytes())))
    ends_well(lambda: Store(root).close())
    ends_well(lambda: verify(root))


@SELDOM
@given(st.data())
def test_a_zarr_json_that_is_none_is_damage_or_read_right(whole, tmp_path, data):
    root = copy_of(whole, tmp_path)
    path = root / "activations.zarr/r/blocks.0.hook_resid_post/zarr.json"
    replace(path, data.draw(mutated(path.read_bytes())))

    def read():
        with Store(root) as store:
            return store.read("select token_id, tree_id from tokens", "r", "resid_post.0")

    found = ends_well(read)
    if found is not None:
        np.testing.assert_array_equal(found[0][:, 0], found[1]["tree_id"].to_numpy())


@SELDOM
@given(cut=st.integers(0, 40_000))
def test_a_catalog_that_is_cut_short_is_damage(whole, tmp_path, cut):
    root = copy_of(whole, tmp_path)
    replace(root / tables.CATALOG, (root / tables.CATALOG).read_bytes()[:cut])
    with pytest.raises(Damaged, match="actstore repair"):
        Store(root)
    assert [finding.kind for finding in verify(root).damage] == ["catalog"]


@SELDOM
@given(st.data())
def test_a_catalog_that_was_changed_anywhere_is_refused_or_read_right(whole, tmp_path, data):
    root = copy_of(whole, tmp_path)
    content = (root / tables.CATALOG).read_bytes()
    bad = data.draw(mutated(content))
    replace(root / tables.CATALOG, bad)

    def read():
        with Store(root) as store:
            return [store.sql(f"from {table}") for table in TABLES]

    found = ends_well(read)
    if found is not None:
        with Store(whole) as store:
            assert all(rows.equals(store.sql(f"from {table}")) for rows, table in zip(found, TABLES, strict=True))
    if bad != content:
        assert [finding.kind for finding in verify(root).damage] == ["catalog"]


@given(st.text(max_size=12))
@example("..")
@example("a/../b")
@example("x'y")
@example('x"y')
@example("a\nb")
@example("\U0001f333")
@example("zarr.json")
def test_a_runs_name_is_one_that_a_folder_can_have(name):
    trees = TreeSet("reproduction", 2, n_nodes=4)
    model = small_model()
    if NAME.fullmatch(name) and name != "zarr.json":
        assert Ingest(Path("nowhere.act"), model, trees, run=name, sites=["embed"]).plan.run == name
    elif name:
        with pytest.raises(BadInput, match="is named with letters"):
            Ingest(Path("nowhere.act"), model, trees, run=name, sites=["embed"])


@pytest.mark.parametrize(
    "name", ["it's.act", 'a "b".act', "tree \U0001f333.act", "two\nlines.act", "a*[b].act", "x=1;drop.act"]
)
def test_a_stores_path_may_be_any(tmp_path, name):
    root = tmp_path / name
    fake().store(root)
    with Store(root) as store:
        X, rows = store.read("select token_id, tree_id from tokens", "r", "resid_post.0")
        np.testing.assert_array_equal(X[:, 0], rows["tree_id"].to_numpy())
    assert verify(root).findings == []
