"""The page of `actstore open`, without a browser: what its panels show, that its cells run, and who may read it."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

import actstore
from actstore.cli import main
from actstore.errors import BadInput, NotStored
from actstore.queries.app import asked, drawing, mapped, recorded, serve
from actstore.queries.app import sequence as sequences
from actstore.store import Store
from tests import tiny_models
from tests.planted_answers import DIRECTIONS, N_NODES, OFFSETS, PATTERN, ROOT_AT, TREES, X
from tests.test_advice import advised_commands
from tests.test_old_stores import unpack

TREE = 4


@pytest.fixture(scope="module")
def answered(answered_path):
    with Store(answered_path) as store:
        yield store


@pytest.fixture(scope="module")
def seen(answered):
    return sequences.sequence(answered, "tiny", TREE)


def test_a_tree_is_shown_with_its_tokens_edges_and_answers(answered, seen):
    assert seen.tree["path"] == TREES.path[TREE, : TREES.depth[TREE]].tolist()
    assert seen.words[seen.asked] == str(seen.tree["root"])
    assert seen.edges.select("source", "target").rows() == [tuple(map(int, edge)) for edge in TREES.edges[TREE]]
    assert seen.answers["position"].to_list() == [ROOT_AT + step for step in range(TREES.depth[TREE])]
    with pytest.raises(NotStored, match="has no sequence 999; it has 150, numbered 0 to 149"):
        sequences.sequence(answered, "tiny", 999)


def test_attention_is_the_stored_pattern_of_a_head_or_their_mean(answered, seen):
    n = len(seen.tokens)
    stored = PATTERN[TREE, :, ROOT_AT, :n]
    assert sequences.layers(answered, "tiny") == ["pattern.0"]
    np.testing.assert_allclose(sequences.attention(answered, seen, "pattern.0", ROOT_AT, "1"), stored[1], rtol=1e-6)
    np.testing.assert_allclose(sequences.attention(answered, seen, "pattern.0", ROOT_AT), stored.mean(0), rtol=1e-6)
    most = int(stored.mean(0).argmax())
    said, percent = sequences.most(seen, stored.mean(0), ROOT_AT, 1), f"{100 * stored.mean(0)[most]:.1f} %"
    assert said == (
        f"{seen.words[ROOT_AT]!r} at position {ROOT_AT} attends to {seen.words[most]!r} ({most}): {percent}."
    )


def test_a_recorded_probe_is_read_at_each_token_and_compared_where_the_label_is_known(answered, seen):
    (probe,) = sequences.probes(answered, "tiny").to_dicts()
    assert (probe["label"], probe["token_role"], probe["classes"]) == ("source", "edge_target", N_NODES - 1)
    grid = sequences.readouts(answered, seen, probe, ROOT_AT)
    logits = X[TREE, : len(seen.tokens)] @ DIRECTIONS.T + OFFSETS  # those recorded last
    read = logits.argmax(1)
    assert grid.words == [[str(k) for k in read]]
    at = 3 * 2 + 1  # the target of the third edge
    p = np.exp(logits[at] - logits[at].max())
    assert grid.shares[0][at] == pytest.approx(p.max() / p.sum(), rel=1e-5)
    targets = [3 * edge + 1 for edge in range(N_NODES - 1)]
    wrong = [edge for edge, at in enumerate(targets) if read[at] != TREES.edges[TREE, edge, 0]]
    assert [at for at, marked in enumerate(grid.marked[0]) if marked] == [targets[edge] for edge in wrong]
    assert [at for at, dim in enumerate(grid.dim) if not dim] == targets
    drawn = drawing.heat(grid, seen.words, ROOT_AT)
    assert drawn.count("<title>resid_post.0,") == len(seen.tokens)


def test_the_logit_lens_of_the_last_layer_is_what_the_model_answered(demo_store, monkeypatch):
    seen = sequences.sequence(demo_store, "reproduction", 1)
    grid = sequences.lens(demo_store, seen, seen.asked, "right")
    last = dict(zip(grid.positions, grid.words[-1], strict=True))
    assert [last[at] for at in seen.answers["position"]] == seen.answers["predicted"].to_list()
    right = dict(zip(grid.positions, grid.shares[-1], strict=True))
    stored = [right[at] for at in seen.answers["position"]]
    np.testing.assert_allclose(stored, seen.answers["p_target"].to_numpy(), atol=1e-4)
    assert right[0] is None, "nothing is right after the first token"
    monkeypatch.setattr(sequences, "MOST_LOGITS", 1)
    cut = sequences.lens(demo_store, seen, seen.asked)
    assert len(cut.positions) == sequences.FEWEST
    assert seen.asked in cut.positions
    assert f"{sequences.FEWEST} of {len(seen.tokens)} tokens, around {seen.asked}" in cut.said
    assert "direction:ltr" in drawing.heat(cut, seen.words, seen.asked), (
        "a map of few tokens is not pushed to the right"
    )
    monkeypatch.undo()
    likeliest = sequences.lens(demo_store, seen, seen.asked)
    assert min(share for row in likeliest.shares for share in row) > 1 / 40


def test_the_picture_marks_the_path_the_goal_and_a_wrong_answer(answered):
    (wrong,) = answered.of("tiny").sql("select min(tree_id) from outcomes where failure = 'wrong_child'").row(0)
    seen = sequences.sequence(answered, "tiny", wrong)
    plain = drawing.sequence(seen, seen.asked)
    assert plain.count("<circle") == N_NODES + 1, "a node each, and the goal's ring"
    assert plain.count("stroke-dasharray") == 1
    weights = np.zeros(len(seen.tokens))
    weights[seen.asked], weights[1] = 0.25, 0.75
    assert drawing.sequence(seen, seen.asked, weights).count("<path") == 1, "the other is its own"
    separator = seen.tokens["role"].to_list().index("separator")
    assert "| &lt;" not in plain
    assert drawing.sequence(seen, separator, weights).count("<path") == 2, "it names no node"
    assert "is right" not in drawing.about(seen)


def test_the_page_of_a_store_of_an_earlier_version_says_what_brings_it_up_to_date(tmp_path):
    path = unpack("format-2", tmp_path)
    with Store(path) as store:
        assert store.catalog_is_older
        (command,) = advised_commands(asked.older(store))
    assert CliRunner().invoke(main, command).exit_code == 0
    with Store(path) as store:
        assert not store.catalog_is_older


def test_what_tokens_say_is_escaped():
    shown = drawing.tokens(["<script>", "a b"], [0.1, None], ['"x"', "y"], 0)
    assert "<script>" not in shown
    assert "&lt;script&gt;" in shown
    assert "a&nbsp;b" in shown


def test_a_vector_is_drawn_as_bars_from_its_largest_numbers():
    drawn = drawing.bars([0.0] * 99 + [-2.0] + [1.0] * 100)
    assert drawn.count("<rect") == drawing.BARS
    assert 'height="9.0" fill="#D55E00"' in drawn
    assert drawing.bars(None) == drawing.bars([]) == ""
    frame = pl.DataFrame({"x": [[1.0, 2.0]], "words": [["a"]], "n": [1]})
    assert asked.vectors(frame) == ["x"]


def test_a_typed_query_gives_rows_or_one_line(answered):
    told = asked.ask(answered, "select tree_id from trees where depth = $d::int limit $n::int;", None, "d=2 n=3")
    assert len(told.frame) == 3
    assert told.said == "3 rows"
    assert asked.ask(answered, "select $run as run", "tiny").frame["run"].to_list() == ["tiny"]
    for text, given, said in (
        ("select nope from tokens", "", "nope"),
        ("selec", "", "selec"),
        ("drop table trees", "", "cannot do DROP"),
        ("select 1; select 2", "", ""),
        ("select $n", "n", "give NAME=VALUE"),
        ("", "", "Ctrl-Enter"),
    ):
        told = asked.ask(answered, text, None, given)
        assert told.frame is None
        assert said in told.said
        assert "\n" not in told.said


def test_a_long_answer_is_cut_and_says_so_unless_the_query_has_a_limit(answered):
    query = "select token_id, tree_id from tokens order by token_id desc"
    every = answered.sql(query)
    told = asked.ask(answered, query, most=100)
    assert told.frame.equals(every[:100])
    assert (told.said, told.is_whole) == ("the first 100 rows, and there are more: the Parquet file has all", False)
    assert pl.read_parquet(asked.whole(answered, query)).equals(every)
    for typed, n in ((f"{query} limit 300", 300), ("select 1 -- one", 1), (f"from ({query} limit 7)", 7)):
        told = asked.ask(answered, typed, most=100)
        assert (len(told.frame), told.is_whole) == (n, True)
    assert asked.ask(answered, "describe tokens", most=1).frame["column_name"][0] == "token_id"
    with pytest.raises(BadInput, match="nope"):
        asked.whole(answered, "select nope from tokens")


def test_the_box_completes_tables_columns_and_named_queries(answered):
    words = asked.words(answered)
    assert words["tables"].keys() == set(answered.tables)
    assert {"token_id", "role"} <= set(words["tables"]["tokens"])
    assert "--" not in words["queries"]["accuracy_by_depth"]
    told = asked.ask(answered, words["queries"]["accuracy_by_depth"], "tiny")
    assert told.frame["n_trees"].sum() == 150
    assert asked.counts(answered).startswith("150 sequences of ")


def test_a_map_samples_what_is_more_than_it_draws_and_says_so(answered):
    query = "select token_id, source, tree_id from edge_targets order by token_id"
    whole = mapped.plane(answered, query, "tiny", "resid_post.0")
    assert whole.said.startswith("all 1,050 rows")
    some = mapped.plane(answered, query, "tiny", "resid_post.0", n=100, seed=1)
    assert some.said.startswith("100 of 1,050 rows, sampled by seed 1")
    assert some.rows.equals(mapped.plane(answered, query, "tiny", "resid_post.0", n=100, seed=1).rows)
    assert some.rows["token_id"].is_sorted()
    ids = whole.rows["token_id"].to_numpy()
    flat = X.reshape(-1, X.shape[2])[(ids // 256) * X.shape[1] + ids % 256].astype(float)
    _, s, axes = np.linalg.svd(flat - flat.mean(0), full_matrices=False)
    expected = (flat - flat.mean(0)) @ axes[:2].T
    np.testing.assert_allclose(np.abs(whole.places), np.abs(expected), atol=1e-4)
    assert f"{100 * s[0] ** 2 / (s**2).sum():.1f} %" in whole.axes[0]
    with pytest.raises(BadInput, match="without a column token_id"):
        mapped.plane(answered, "select tree_id from trees", "tiny", "resid_post.0")
    with pytest.raises(BadInput, match="takes 3 or more"):
        mapped.plane(answered, f"{query} limit 2", "tiny", "resid_post.0")


def test_umap_places_few_rows_or_says_what_to_install(answered, monkeypatch):
    query = "select token_id, source from edge_targets order by token_id limit 60"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "umap", None)
        with pytest.raises(NotStored, match=r"pip install 'actstore\[umap\]'"):
            mapped.plane(answered, query, "tiny", "resid_post.0", mapped.UMAP)
    asked_of = []

    class Umap:
        def __init__(self, **options):
            asked_of.append(options)

        def fit_transform(self, X):
            asked_of.append(X.shape)
            return X[:, :2]

    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=Umap))
    drawn = mapped.plane(answered, query, "tiny", "resid_post.0", mapped.UMAP, n=10, seed=3)
    assert asked_of == [{"n_neighbors": 9, "random_state": 3, "n_jobs": 1}, (10, X.shape[2])]
    assert drawn.said == "10 of 60 rows, sampled by seed 3; UMAP of resid_post.0"
    assert drawn.axes == ("UMAP 1", "UMAP 2")


def test_umap_itself_gives_each_row_the_same_place_twice(answered):
    pytest.importorskip("umap", reason="umap-learn is not installed (`pip install 'actstore[umap]'`)")
    query = "select token_id, source from edge_targets where source < 2 order by token_id"
    drawn = mapped.plane(answered, query, "tiny", "resid_post.0", mapped.UMAP)
    assert drawn.places.shape == (len(drawn.rows), 2)
    assert np.isfinite(drawn.places).all()
    again = mapped.plane(answered, query, "tiny", "resid_post.0", mapped.UMAP)
    np.testing.assert_array_equal(drawn.places, again.places)


def test_a_brush_becomes_a_query_that_runs(answered):
    rows = pl.DataFrame({"token_id": [22, 1, 1, 7]})
    query = mapped.brushed(rows, [0, 1, 2, 9])
    assert query == "select * from tokens\nwhere token_id in (1, 22)"
    assert asked.ask(answered, query).frame["token_id"].to_list() == [1, 22]
    assert mapped.brushed(rows, []) == ""
    many = pl.DataFrame({"token_id": range(6000)})
    assert mapped.brushed(many, list(range(6000))).startswith("-- the first 5,000 of 6,000 chosen tokens\n")


def test_colours_are_classes_or_shares():
    few = mapped.coloured(pl.Series("a", [3, 1, None, 1]))
    assert few.classes == ["1", "3"]
    np.testing.assert_array_equal(few.values, [1, 0, np.nan, 0])
    many = mapped.coloured(pl.Series("a", range(101)))
    assert (many.classes, many.ends, many.values[50]) == ([], ["0", "100"], 0.5)
    words = mapped.coloured(pl.Series("a", ["x"] * 3 + [f"w{i}" for i in range(40)]))
    assert (len(words.classes), words.classes[0], words.classes[-1]) == (16, "x", "others")


def test_results_are_drawn_again_from_what_was_recorded(demo_path, tmp_path):
    import shutil

    import actstore

    shutil.copytree(demo_path, tmp_path / "s.act")
    (made,) = actstore.study(tmp_path / "s.act", "depth", check=False)
    with Store(tmp_path / "s.act") as store:
        assert recorded.listed(store).select("study", "run").rows() == [("depth", "reproduction")]
        assert store.latest() is store
        again = recorded.answer_of(store, "depth", "reproduction")
        assert again.results.drop("snapshot", "version").equals(made.answer.results.drop("snapshot", "version"))
        drawn, lacking = recorded.figures(store, "depth", ["reproduction", "x"])
        assert "<svg" in drawn
        assert "recorded nothing of run 'x'" in str(lacking)
        table = recorded.beside(store, "depth", recorded.metrics(store, "depth")[0])
        assert "reproduction" in table.columns
        assert recorded.probe_grid(store, "depth", "reproduction") is None
        with pytest.raises(NotStored, match="recorded nothing of run 'x'"):
            recorded.answer_of(store, "depth", "x")
    with pytest.raises(BadInput, match="closed"):
        store.latest()


def test_the_sessions_of_a_page_share_a_store_until_something_is_committed(demo_path, tmp_path, monkeypatch):
    import shutil

    monkeypatch.setattr(serve, "SHARED", {})
    path = tmp_path / "s.act"
    shutil.copytree(demo_path, path)
    first = serve.shared(path)
    assert serve.shared(str(path)) is first, "one that took seconds to open is not opened twice"
    one_run = Store(path).of("reproduction")
    actstore.study(path, "depth", check=False)
    assert len(recorded.listed(first)) == 0
    then = serve.shared(path)
    assert len(recorded.listed(then)) == 1
    assert then.snapshot == first.snapshot + 1
    assert (one_run.latest().only, one_run.latest().snapshot) == ("reproduction", then.snapshot)
    path.rename(tmp_path / "moved.act")
    shutil.copytree(demo_path, path)
    assert len(recorded.listed(serve.shared(path))) == 0, "another store of that name"


def test_figures_of_two_runs_have_one_scale(monkeypatch):
    from matplotlib.figure import Figure

    made = {}

    def plot(run):
        made[run] = figure = Figure()
        upper, lower = figure.subplots(2)
        upper.plot([1, 2], [0, {"a": 100, "b": -300}[run]])
        lower.imshow([[1, 2]] * len(made))
        return figure

    monkeypatch.setattr(recorded, "answer_of", lambda store, study, run: run)
    monkeypatch.setattr(recorded.studies, "plot", plot)
    assert all("<svg" in figure for figure in recorded.figures(None, "scrub", ["a", "b"]))
    (above, map_a), (also_above, map_b) = (made[run].axes for run in "ab")
    assert above.get_ylim() == also_above.get_ylim()
    assert above.get_ylim()[0] < -300
    assert above.get_ylim()[1] > 100
    assert list(above.get_yticks()) == list(also_above.get_yticks())
    assert map_a.get_ylim() != map_b.get_ylim(), "a map keeps its rows"


def test_numbers_stand_in_the_order_of_their_sites_and_labels():
    rows = [("r", f"z.{layer}", None, f"H1, length {n}", 0.5, None, None, 9) for layer in (10, 2) for n in (10, 9)]
    columns = ["run", "site", "token_role", "label", "value", "low", "high", "n"]
    frame = pl.DataFrame(rows, columns, orient="row")
    table = recorded.beside(SimpleNamespace(sql=lambda query, params: frame), "scrub", "recovered")
    expected = [(f"z.{layer}", f"H1, length {n}") for layer in (2, 10) for n in (9, 10)]
    assert table.select("site", "label").rows() == expected


PANELS = ("holds", "sql", "tree", "map", "results")


@pytest.mark.parametrize("panel", PANELS)
def test_the_cells_of_a_panel_run(answered_path, monkeypatch, panel):
    pytest.importorskip("marimo")
    import marimo as mo

    from actstore.queries.app.app import app

    monkeypatch.setenv(serve.SHOWN, str(answered_path))
    chosen = mo.ui.radio(["holds", "sql", "tree", "text", "map", "results"], value=panel)
    outputs, names = app.run(defs={"panel": chosen})
    assert names["store"].path == answered_path
    shown = " ".join(str(output.text) for output in outputs if hasattr(output, "text"))
    assert {
        "holds": "150 sequences of",
        "sql": "marimo-anywidget",
        "tree": "Tree 0, run tiny",
        "map": "PCA of resid_post.0",
        "results": "side by side",
    }[panel] in shown


def test_the_cells_show_a_text_with_the_logit_lens_in_its_tokenizers_pieces(tmp_path, monkeypatch):
    pytest.importorskip("marimo")
    import marimo as mo

    from actstore.queries.app.app import app

    tiny_models.llama(tmp_path / "tiny")  # a model with more numbers than its tokenizer has pieces
    root, sites = tmp_path / "t.act", ["embed", "resid_post", "pattern"]
    text = ["the cat sat", "a <b>dog</b> ran & hid"]
    actstore.ingest(root, str(tmp_path / "tiny"), text=text, run="t", dataset="d", sites=sites)
    monkeypatch.setenv(serve.SHOWN, str(root))
    with Store(root) as store:
        first, second = store.sql("select sequence_id from sequences order by 1")["sequence_id"]
        seen = sequences.sequence(store, "t", second)
        grid = sequences.lens(store, seen, 1)
        vocabulary = dict(store.sql("select number, token from vocabularies").rows())
        logits = store.sql(
            "select logit_lens(token_id, 't', 'resid_post.1') as x from tokens where sequence_id = $s order by token_id",
            {"s": second},
        )["x"].to_list()
    best = [int(np.argmax(row)) for row in logits]
    wanted = [sequences.spelled(vocabulary[top]) if top in vocabulary else f"#{top}" for top in best]
    assert grid.words[grid.sites.index("resid_post.1")] == wanted
    for panel, said in (("text", f"Sequence {first}, run t: 3 tokens"), ("map", "PCA of "), ("holds", "2 sequences")):
        chosen = mo.ui.radio(["holds", "text", "map"], value=panel)
        outputs, _ = app.run(defs={"panel": chosen})
        shown = " ".join(str(output.text) for output in outputs if hasattr(output, "text"))
        assert said in shown
        assert "<b>dog</b>" not in shown


def test_requests_of_other_pages_are_refused():
    async def inner(scope, receive, send):
        await send({"type": "served"})

    def asks(kind="http", **headers):
        sent = []

        async def send(message):
            sent.append(message)

        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        asyncio.run(serve.own_only(inner, 8000)({"type": kind, "headers": raw}, None, send))
        return sent[0]

    own = {"host": "127.0.0.1:8000"}
    assert asks(**own) == asks(host="localhost:8000", origin="http://localhost:8000") == {"type": "served"}
    assert asks(host="evil.example:8000")["status"] == 403, "a name that leads to loopback"
    assert asks(**own, origin="http://evil.example")["status"] == 403
    assert asks(**own, origin="null")["status"] == 403
    assert asks("websocket", **own, origin="http://127.0.0.1:9000")["type"] == "websocket.close"


def test_open_says_what_is_wrong_before_it_serves(tmp_path, monkeypatch, answered_path):
    done = CliRunner().invoke(main, ["open", str(tmp_path / "none.act"), "--no-browser"])
    assert done.exit_code == 1
    assert "none.act" in done.stderr
    assert done.stderr.count("\n") == 1
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = CliRunner().invoke(main, ["open", str(answered_path), "--no-browser", "--port", port])
    assert done.exit_code == 2
    assert f"cannot listen on port {port}" in done.stderr
    assert serve.SHOWN not in os.environ, "a later notebook would write into this store"
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    done = CliRunner().invoke(main, ["open", str(answered_path), "--no-browser"])
    assert done.exit_code == 1
    assert "pip install 'actstore[app]'" in done.stderr
