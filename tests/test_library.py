"""What the commands do has a public name in Python: the same verbs and arguments, errors by their kind."""

from __future__ import annotations

import inspect
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

import actstore
from actstore import errors, verbs
from actstore.cli import main
from actstore.commits import log
from actstore.errors import ActstoreError, BadInput, NotStored
from actstore.reading import worker
from actstore.store import Store
from tests.stores import fake

CLASSES = [value for value in vars(errors).values() if inspect.isclass(value) and value.__module__ == errors.__name__]


def test_every_error_is_exported_and_has_a_kind_of_its_own():
    assert {each.__name__ for each in CLASSES} == {
        name for name in actstore.__all__ if inspect.isclass(found := getattr(actstore, name)) and found in CLASSES
    }
    assert all(getattr(actstore, each.__name__) is each for each in CLASSES)
    kinds = [each.kind for each in CLASSES if issubclass(each, ActstoreError)]
    assert (
        len({*kinds}) == len(kinds) == len(CLASSES) - 3
    )  # SeveralRuns, ComputedOtherwise and HalvedBatch are warnings
    for each in CLASSES:
        if issubclass(each, ActstoreError):
            assert "kind" in vars(each)
            again = ActstoreError.of_kind(each.kind, "said")
            assert (type(again), str(again)) == (each, "said")


def test_an_error_comes_back_as_its_class_though_that_is_called_otherwise(demo_path, request):
    """DuckDB hands the error of a function on as text, and the process of a query with limits as JSON."""
    request.addfinalizer(lambda: setattr(errors.NotStored, "__name__", "NotStored"))
    errors.NotStored.__name__ = "Renamed"
    with Store(demo_path) as store, pytest.raises(errors.NotStored, match="no site 'embed_'"):
        store.sql("select act(token_id, 'reproduction', 'embed_') from tokens")
    assert worker._as_sent(errors.NotStored("said"), None) == ("not_stored", "said")


# Names of the package.

NAMED_OTHERWISE = {"no_record": "record", "file": "labels"}  # of a command's options: the function's arguments
OF_A_COMMAND = {
    "as_csv",
    "as_json",
    "output_format",
    "parquet",
    "yes",
    "threads",
}  # how it prints, whether it asks; torch.set_num_threads
OF_APPEND = {"from_arrays", "site", "lineage", "allow_nan"}  # `ingest --from-arrays` does what Store.append does
OF_PATCH = {
    "base",
    "patches",
    "at",
    "how",
    "donors",
    "donor_site",
    "params",
    "tables",
}  # `ingest --base`: actstore.patch
VERBS = (
    "commit",
    "drop",
    "evaluate",
    "ingest",
    "label",
    "record",
    "repair",
    "report",
    "study",
    "train",
    "verify",
    "view",
)


@pytest.mark.parametrize("verb", VERBS)
def test_a_command_and_its_function_take_the_same(verb):
    options = {NAMED_OTHERWISE.get(str(option.name), option.name) for option in main.commands[verb].params}
    takes = inspect.signature(getattr(actstore, verb)).parameters
    assert set(takes) - {"progress"} == options - OF_A_COMMAND - (OF_APPEND | OF_PATCH if verb == "ingest" else set())
    for option in main.commands[verb].params:
        if option.name in takes and isinstance(
            option.default, int | str | float
        ):  # click's own word for none is another
            assert takes[option.name].default == option.default, option.name


ORDERS = [
    "import actstore",
    "import actstore.ingest",
    "from actstore.ingest.trees.draw import draw; import actstore",
    "from actstore import ingest; import actstore",
    "from actstore import *; import actstore",
]


@pytest.mark.parametrize("order", ORDERS)
def test_the_package_is_light_and_its_ingest_is_a_function_and_a_package_in_any_order(order):
    script = f"{order}; import sys; heavy = {{'torch', 'transformer_lens'}} & set(sys.modules); dir(actstore)"
    script += "; print(callable(actstore.ingest), actstore.ingest.__name__, heavy)"
    script += "; from actstore.ingest.jobs.job import Ingest; import inspect"
    script += "; print(Ingest.__name__, 'trees' in inspect.signature(actstore.ingest).parameters)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "True actstore.ingest set()\nIngest True\n"


def test_dir_names_what_there_is_and_nothing_else_is_there():
    assert {*actstore.__all__, "queries"} <= set(dir(actstore))
    assert all(getattr(actstore, name) is not None for name in dir(actstore))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = actstore.nothing


# The verbs.


def test_a_notebook_does_what_the_commands_do(tmp_path):
    shown = []

    def progress(what, total, unit):
        shown.append((what, unit))
        return verbs.silent(what, total, unit)

    root = tmp_path / "s.act"
    with pytest.raises(NotStored):
        actstore.verify(root)
    assert actstore.ingest(root, "reproduction", trees=20, sites="none", run="r") == "r"
    (asked,) = actstore.study(root, "depth", plot=tmp_path / "depth.svg", progress=progress)
    assert asked.answer.of == ["r"]
    assert (asked.lacks, asked.fault) == ("", "")
    assert (tmp_path / "depth.svg").exists()
    with Store(root) as store:
        assert len(store.sql("select * from results")) == len(asked.answer.results)
        assert actstore.study(store, "depth", "r", record=False)[0].answer.frame.equals(asked.answer.frame)
        with pytest.raises(NotStored, match="no run 'q'"):
            actstore.study(store, "depth", "q", record=False)
        with pytest.raises(NotStored, match="--variant swap_last"):
            actstore.study(store, "swap")
        made = actstore.report(store, tmp_path / "out", runs="r")
    assert made.page.exists()
    assert "depth" in {answer.name for answer in made.answers}
    found = actstore.verify(root, recompute=2, progress=progress)
    assert found.damage == []
    assert found.differences
    assert all(each.agrees for each in found.differences)
    (part,) = (root / "parts" / "trees").iterdir()
    whole = part.read_bytes()
    part.write_bytes(whole[:-1])
    assert [each.kind for each in actstore.verify(root, recompute=2).damage] == ["part"]
    assert actstore.repair(root, progress=progress).left == []
    assert part.read_bytes() == whole
    assert shown == [("study depth r", "parts"), ("verify", "bytes"), ("recompute", "trees"), ("repair", "bytes")]


def test_what_could_not_be_recorded_is_kept_and_a_warning_names_the_file(tmp_path, monkeypatch):
    root = tmp_path / "s.act"
    actstore.ingest(root, "reproduction", trees=20, sites="none")
    monkeypatch.chdir(tmp_path)
    real = log.commit
    monkeypatch.setattr(log, "commit", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with (
        pytest.warns(UserWarning, match="keeps what is not recorded; `actstore record") as said,
        pytest.raises(OSError, match="no room"),
    ):
        actstore.study(root, "depth")
    assert len(said) == 1
    monkeypatch.setattr(log, "commit", real)
    (file,) = tmp_path.glob("results-*.parquet")
    (frame,) = actstore.record(root, file)
    with Store(root) as store:
        assert len(store.sql("select * from results")) == len(frame)


def test_a_model_is_graded_by_the_verb_of_the_command(monkeypatch):
    monkeypatch.setattr("actstore.ingest.training.recipe.recipe_of", lambda yaml: None)  # what it saw takes a minute
    graded = actstore.evaluate("reproduction", distribution="deep", trees=8)
    assert (graded.n_trees, graded.distributions) == (8, ("deep",))


# A store.


def test_a_store_names_its_tables_and_columns(demo_store):
    schema = demo_store.schema()
    assert schema.columns == ["table", "column", "type", "comment"]
    assert {"tokens", "edge_targets", "latest_results"} <= set(demo_store.tables)
    assert demo_store.tables == demo_store.of("reproduction").tables
    for table in demo_store.tables:
        columns = demo_store.sql(f"select * from {table} limit 0").columns
        assert schema.filter(table=table)["column"].to_list() == columns
    assert schema.row(by_predicate=(pl.col("table") == "trees") & (pl.col("column") == "tree_id"), named=True) == {
        **{"table": "trees", "column": "tree_id", "type": "INTEGER", "comment": "unique in the store"}
    }


@pytest.mark.parametrize("run", [None, "reproduction"])
def test_a_store_is_pickled_as_its_path(demo_path, monkeypatch, run, tmp_path):
    monkeypatch.chdir(demo_path.parent)
    with Store(demo_path.name, check=True) as store:
        sent = pickle.dumps(store if run is None else store.of(run))
    monkeypatch.chdir(tmp_path)
    again = pickle.loads(sent)
    assert (again.path, again.check, again.only) == (demo_path, True, run)
    assert again.whole.runs() == ["reproduction"]
    again.close()


def test_a_notebook_shows_what_a_store_holds(demo_path):
    with Store(demo_path) as store:
        shown = store._repr_html_()
    assert "reproduction" in shown
    assert "<table" in shown
    assert "closed" in store._repr_html_()


def test_numbers_of_ones_own_are_recorded(tmp_path):
    fake("a").store(tmp_path / "s.act")
    fake("b", weights=b"other").store(tmp_path / "s.act")
    mine = pl.DataFrame({"metric": ["direction"], "value": [0.5], "name": ["mine"], "direction": [[1.0] + 5 * [0.0]]})
    with Store(tmp_path / "s.act") as store:
        store.of("a").record("my study", mine)
        store.record("my study", mine.with_columns(run=pl.lit("b"), name=pl.lit("other"), seed=3))
        for wrong, error in (
            (mine, BadInput),  # which run?
            (mine.with_columns(run=pl.lit("c")), NotStored),
            (mine.with_columns(run=pl.lit("a"), valeu=1), BadInput),
            (mine.with_columns(run=pl.lit("a")).drop("metric"), BadInput),
            (mine.with_columns(run=pl.lit("a"), value=pl.lit("much")), BadInput),
        ):
            with pytest.raises(error):
                store.record("my study", wrong)
        with pytest.raises(BadInput, match="of your own"):
            store.of("a").record("depth", mine)
        with pytest.raises(BadInput, match=r"a frame of results takes no 'goal'; it takes study, run"):
            store.of("a").record("my study", mine.with_columns(goal=1))
        with pytest.raises(BadInput, match="got a list to record; give a polars frame"):
            store.of("a").record("my study", [1])
        assert len(store.sql("select * from results")) == 0
    with Store(tmp_path / "s.act") as store:
        found = store.sql("select study, run, metric, value, seed, snapshot, version from results order by run")
        assert found.rows() == [
            ("my study", "a", "direction", 0.5, None, store.snapshot - 2, actstore.__version__),
            ("my study", "b", "direction", 0.5, 3, store.snapshot - 2, actstore.__version__),
        ]
        assert store.sql("select probe_direction('mine') as d")["d"][0].to_list() == [1.0] + 5 * [0.0]


def test_a_stored_activation_goes_back_into_the_stored_model(demo_store):
    """Tree 0's residual stream in the pass of tree 1 has the model answer tree 0."""
    bridge = demo_store.model()
    query = """
        select token_id, list_position(vocabulary, token::varchar) - 1 as id from tokens, models
        where tree_id = $tree and role != 'path' order by position
    """
    X, rows = demo_store.read(query, site="resid_post.2", params={"tree": 0}, out="torch")
    first, second = (
        torch.tensor(demo_store.sql(query, {"tree": tree})["id"].to_list(), dtype=torch.int64)[None] for tree in (0, 1)
    )
    assert first.shape == (1, len(rows))

    def patch(resid, hook):
        resid[0] = X
        return resid

    clean, other = bridge(first), bridge(second)
    patched = bridge.run_with_hooks(second, fwd_hooks=[("blocks.2.hook_resid_post", patch)])
    np.testing.assert_allclose(patched.numpy(), clean.numpy(), atol=1e-4)
    assert (other - clean).abs().max() > 1
    with pytest.raises(NotStored):
        demo_store.model("nobody")
    with pytest.raises(BadInput):
        demo_store.model(device="tpu")


def test_a_bridge_that_the_store_made_is_a_path_finding_system(demo_path, demo_store, tmp_path):
    """Its weights are those that the bridge has now, and any option of text is refused."""
    again = shutil.copytree(demo_path, tmp_path / "again.act")
    dataset = demo_store.sql("select dataset from runs").item()
    actstore.ingest(again, demo_store.model(), dataset=dataset, sites="resid_mid.0")
    with Store(again) as store:
        assert store.runs() == ["reproduction"]
        assert "resid_mid.0" in store.sites("reproduction")
    changed = demo_store.model()
    with torch.no_grad():
        changed.unembed.original_component.weight.zero_()
    with pytest.raises(BadInput, match="weights"):
        actstore.ingest(again, changed, dataset=dataset)
    with pytest.raises(BadInput, match="--keep-weights, and the model is a path-finding system in a bridge"):
        actstore.ingest(again, changed, dataset=dataset, keep_weights=True)
    actstore.ingest(again, changed, dataset=dataset, run="mute", sites="none")
    with Store(again) as store:
        assert store.sql("select avg(correct::int) < 0.2 from predictions where run = 'mute'").item()
    changed.unembed.original_component.weight.fill_(float("nan"))
    with pytest.raises(BadInput, match=r"the bridge: weight .unembed\.W_U. holds"):
        actstore.ingest(again, changed, dataset=dataset, run="nan")


def test_the_store_looks_one_thing_up_by_name():
    """Its room may not import those above; `_above` is the one way round, and leads to verbs.py alone."""
    source = Path(inspect.getfile(Store)).read_text()
    assert source.count("import_module(") == 1
    assert 'import_module("actstore.verbs")' in source
