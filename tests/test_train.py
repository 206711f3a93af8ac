"""Training: packed goals against each goal alone, runs that go on where they were killed, and what is refused."""

import json
import re
import sys
from types import SimpleNamespace

import networkx as nx
import numpy as np
import polars as pl
import pytest
import torch
import yaml
from torch.nn.functional import cross_entropy

from actstore.errors import BadInput, Busy, NoRoom, NotStored
from actstore.ingest.models import load
from actstore.ingest.models.config import ModelConfig
from actstore.ingest.models.equations import forward
from actstore.ingest.models.weights import canonical, read_state, state
from actstore.ingest.training import checkpoints
from actstore.ingest.training.card import write_card
from actstore.ingest.training.evaluation import evaluate
from actstore.ingest.training.learner import Learner, Tally
from actstore.ingest.training.packing import every_goal, pack
from actstore.ingest.training.recipe import Recipe, read_config, recipe_of, step_trees
from actstore.ingest.training.train import to_wandb, train
from actstore.ingest.trees.draw import draw
from actstore.storage.lease import lease

TINY = {
    "d_model": 32,
    "d_head": 16,
    "n_heads": 2,
    "n_layers": 2,
    "d_mlp": 64,
    "act_fn": "gelu",
    "attention_dir": "causal",
}


def write_config(path, system="reproduction", n_nodes=5, **more):
    optimizer = {"lr": 0.003, "weight_decay": 0.01}
    said = {
        "system": system,
        "n_nodes": n_nodes,
        "model": TINY,
        "optimizer": optimizer,
        "batch_size": 16,
        "max_iters": 75,
    }
    path.write_text(yaml.safe_dump({**said, **more}))
    return str(path)


@pytest.fixture
def tiny(tmp_path):
    return write_config(tmp_path / "tiny.yaml", training={"shallow": 0.4, "inner_goals": [2, 3]})


def tiny_model(system, n_nodes, seed=0):
    config = ModelConfig.from_mapping({"system": system, "n_nodes": n_nodes, "model": TINY}, "test")
    bridge = load.build(config, seed)
    with torch.no_grad():  # biases start at 0 and layer norms at 1, which would hide a wrong one
        for value in bridge.parameters():
            value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(value.numel())) * 0.3)
    return config, bridge, state(bridge, config)


def prompts_of_every_leaf(trees, row):
    """Each leaf's prompt, path and depth as words, found by networkx."""
    graph = nx.DiGraph([(int(source), int(target)) for source, target in trees.edges[row]])
    root = int(trees.root[row])
    listed = " ".join(f"{source} →{target} ," for source, target in trees.edges[row])[:-1] + "|"
    for leaf in sorted(node for node in graph if graph.out_degree(node) == 0):
        path = nx.shortest_path(graph, root, leaf)[1:]
        yield leaf, f"{listed} {leaf} : {root}".split(), [f"→{node}" for node in path]


def targets_of(system, trees, row, leaf, path):
    """What must be predicted after the root: the path, and the baseline's padding."""
    if system == "reproduction":
        return path
    if leaf == trees.goal[row]:
        return path + [","] * (trees.n_nodes + 2 - len(path))
    return [*path, ","]


@pytest.mark.parametrize("system", ["reproduction", "baseline"])
def test_a_packed_batch_has_the_loss_and_the_gradient_of_its_goals_one_by_one(system):
    config, bridge, params = tiny_model(system, 7)
    spelling = [word.replace(">", "→") for word in config.vocabulary.words()]
    trees = draw(system, 3, 0, 6, 7)
    losses = []
    for row in range(len(trees)):
        for leaf, prompt, path in prompts_of_every_leaf(trees, row):
            answer = targets_of(system, trees, row, leaf, path)
            ids = torch.tensor([[spelling.index(word) for word in prompt + answer]])
            logits = bridge(ids[:, :-1])[0, len(prompt) - 1 :]
            losses.append(cross_entropy(logits, ids[0, len(prompt) :], reduction="none"))
    one_by_one = torch.cat(losses)

    for value in params.values():
        value.requires_grad_()
    batch = pack(trees, config.vocabulary)
    packed = cross_entropy(forward(params, config, batch, torch.float32), batch.target, reduction="none")

    torch.testing.assert_close(packed, one_by_one, atol=2e-5, rtol=2e-5)
    assert abs((packed.mean() - one_by_one.mean()).item()) < 1e-6
    one_by_one.mean().backward()
    packed.mean().backward()
    embedding = dict(bridge.named_parameters())
    gradients = [value.grad for name, value in embedding.items() if value.shape == params["embed.W_E"].shape]
    assert any(torch.allclose(params["embed.W_E"].grad, gradient, atol=1e-6) for gradient in gradients)


def test_a_small_tree_is_a_full_prompt_with_edges_left_out():
    config, bridge, params = tiny_model("reproduction", 8)
    trees = draw("reproduction", 5, 0, 4, 5, 8)
    slots = np.array([[0, 2, 3, 6], [1, 2, 5, 6], [0, 1, 2, 6], [3, 4, 5, 6]])
    batch = pack(trees, config.vocabulary, slots)
    packed = forward(params, config, batch, torch.float32)
    rows = []
    for row in range(len(trees)):
        for _, prompt, path in prompts_of_every_leaf(trees, row):
            ids = torch.tensor([[config.vocabulary.words().index(word) for word in (prompt + path)[:-1]]])
            position = [3 * slot + part for slot in slots[row] for part in range(3)]
            position += range(3 * 7, 3 * 7 + 2 + len(path))
            logits = bridge.original_model(ids, position_ids=torch.tensor([position]))
            rows.append(logits[0, len(prompt) - 1 :])
    torch.testing.assert_close(packed, torch.cat(rows), atol=2e-5, rtol=2e-5)


def test_every_goal_is_tallied_once_at_its_depth_and_only_whole_paths_count():
    config, _, _ = tiny_model("reproduction", 7)
    trees = draw("reproduction", 8, 0, 20, 7)
    batch = pack(trees, config.vocabulary)
    logits = torch.nn.functional.one_hot(batch.target, config.d_vocab).float()
    leaves = [path for row in range(20) for _, _, path in prompts_of_every_leaf(trees, row)]
    depths = np.bincount([len(path) for path in leaves], minlength=7)
    perfect = Tally.of(torch.tensor(0.0), logits, batch, 7)
    assert (perfect.paths == depths).all()
    assert (perfect.paths_right == depths).all()

    last_of_third = int(np.flatnonzero(batch.goal == 2)[-1])
    logits[last_of_third] = logits[last_of_third].roll(1)
    spoilt = Tally.of(torch.tensor(0.0), logits, batch, 7)
    assert spoilt.n_right == spoilt.n_tokens - 1
    assert (perfect.paths_right - spoilt.paths_right == np.eye(7)[len(leaves[2])]).all()


def test_shallow_goals_are_all_nodes_near_the_root_each_with_its_path():
    config, _, _ = tiny_model("reproduction", 9)
    trees = draw("reproduction", 4, 0, 12, 9)
    shallow = Recipe(shallow=1.0).goals_at(0, trees)
    tree, goals = every_goal(trees, shallow)
    expected = []
    for row in range(len(trees)):
        graph = nx.DiGraph([(int(source), int(target)) for source, target in trees.edges[row]])
        paths = nx.single_source_shortest_path(graph, int(trees.root[row]), cutoff=2)
        expected += [(row, *path[1:]) for _, path in sorted(paths.items()) if len(path) > 1]
    found = [(int(row), *path[: int(depth)]) for row, path, depth in zip(tree, goals.path, goals.depth, strict=True)]
    assert found == expected
    assert (goals.goal == [path[-1] for path in expected]).all()
    assert int(pack(trees, config.vocabulary, is_goal=shallow).depth.max()) == 2


def test_inner_goals_are_the_far_nodes_beside_the_leaves():
    trees = draw("baseline", 4, 0, 40, 12)
    is_goal = Recipe(inner_goals=(3, 5)).goals_at(0, trees)
    for row in range(len(trees)):
        graph = nx.DiGraph([(int(source), int(target)) for source, target in trees.edges[row]])
        depths = nx.single_source_shortest_path_length(graph, int(trees.root[row]))
        wanted = {node for node, depth in depths.items() if graph.out_degree(node) == 0 or 3 <= depth <= 5}
        assert set(np.flatnonzero(is_goal[row])) == wanted
    shallow = Recipe(shallow=0.5, steps=10, inner_goals=(3, 5))
    assert (shallow.goals_at(5, trees) == is_goal).all()
    assert (shallow.goals_at(0, trees) <= (trees.node_depths() <= 2)).all()


def test_the_trees_of_a_step_follow_from_its_number_and_never_come_again():
    _, config, recipe = read_config("reproduction")
    steps = [0, 700, 4000, 4001, 9999]
    first = [step_trees(recipe, config, step) for step in steps]
    again = [step_trees(recipe, config, step) for step in reversed(steps)][::-1]
    for (trees, slots), (same, same_slots) in zip(first, again, strict=True):
        assert (trees.hashes() == same.hashes()).all()
        assert (trees.edges == same.edges).all()
        assert (slots == same_slots).all()
        assert (np.diff(slots, axis=1) > 0).all()
        assert (slots[:, -1] == 14).all()
    hashes = np.concatenate([trees.hashes() for trees, _ in first])
    assert len(np.unique(hashes)) == len(hashes)


def test_the_learning_rate_rises_stays_and_falls_to_nothing_while_trees_grow_to_full_size():
    recipe = Recipe(steps=1000, lr=0.5, warmup=0.1, decay=0.4, curriculum=0.3)
    rates = [recipe.lr_at(step) for step in range(1000)]
    assert rates[0] == pytest.approx(0.005)
    assert rates[99:600] == [0.5] * 501
    assert rates[-1] == pytest.approx(0.5 / 400)
    sizes = [recipe.n_nodes_at(step, 16) for step in range(1000)]
    assert sizes[0] == 4
    assert sizes == sorted(sizes)
    assert sizes[300:] == [16] * 700
    assert {recipe.n_nodes_at(step, 2) for step in range(1000)} == {2}
    assert {recipe.deepest_at(step) for step in range(1000)} == {None}
    shallow = Recipe(steps=1000, shallow=0.2)
    assert [shallow.deepest_at(step) for step in (0, 49, 50, 100, 199, 200, 999)] == [2, 2, 3, 4, 5, None, None]


class Killed(BaseException):
    """What no handler of ours catches, as none catches SIGKILL."""


def test_a_killed_run_goes_on_to_the_same_bytes_and_the_same_log(tiny, tmp_path):
    whole = train(tiny, tmp_path / "whole")

    def kill(row):
        if row["step"] == 50:
            raise Killed

    out = tmp_path / "killed"
    with pytest.raises(Killed):
        train(tiny, out, progress=kill)
    with open(out / "tiny.jsonl", "a") as log:
        log.write('{"step": 7')  # a row cut short
    steps = []
    resumed = train(tiny, out, progress=lambda row: steps.append(row["step"]))
    assert steps == [75]  # a row that was shown is one that is kept
    assert resumed.read_bytes() == whole.read_bytes()
    logs = [pl.read_ndjson(run / "tiny.jsonl").drop("seconds") for run in (tmp_path / "whole", out)]
    assert logs[0].equals(logs[1])
    assert logs[0]["step"].to_list() == [25, 50, 75]
    assert train(tiny, out).read_bytes() == whole.read_bytes()  # nothing is left to do


def test_training_learns_and_leaves_checkpoints_that_load(tmp_path):
    config = write_config(tmp_path / "learns.yaml", n_nodes=4, max_iters=300)
    path = train(config, tmp_path / "out")
    log = pl.read_ndjson(tmp_path / "out" / "learns.jsonl")
    assert log["loss"][-1] < 0.6 * log["loss"][0]
    by_depth = log.select("step", "by_depth").explode("by_depth").unnest("by_depth")
    assert (by_depth["right"] <= by_depth["paths"]).all()
    loaded = load.load(str(path))
    assert (loaded.name, loaded.config.n_nodes) == ("learns", 4)
    assert load.checkpoints(path) == [0, 250]
    before = load.load(str(path), checkpoint=0)
    initial = state(load.build(loaded.config, 42), loaded.config)
    assert before.name == "learns-step0"
    assert before.weights == canonical({name: value.half() for name, value in initial.items()})
    with pytest.raises(NotStored, match="no checkpoint 100 of learns; there are 0, 250"):
        load.load(str(path), checkpoint=100)


def test_a_card_says_what_was_trained_and_how_good_it_is_on_trees_never_seen(tmp_path):
    config = write_config(tmp_path / "tiny.yaml", n_nodes=6, max_iters=50, training={"shallow": 0.4})
    path = train(config, tmp_path / "out")
    graded = write_card(path, 300)
    model, recipe = load.load(str(path)), recipe_of(path.with_suffix(".yaml"))
    assert recipe == read_config(config)[2]
    again = evaluate(model, n_trees=300, recipe=recipe)
    assert graded.frame.equals(again.frame)
    text = path.with_suffix(".md").read_text()
    assert f"sha256 `{model.weights_sha256}`" in text
    assert (
        "800 fresh trees (no fixed set), 16 per step: 600 of the `reproduction` distribution, 200 `deep`; seed 42"
        in text
    )
    rows = [
        line.split(" | ") for line in text.splitlines() if re.match(r"\| [\w, ]+ \| (all|\d+) \| \d+ \| \S+ \(", line)
    ]
    assert [int(row[2]) for row in rows] == graded.frame["n_trees"].to_list()
    assert [float(row[5].split()[0]) for row in rows] == [round(100 * share, 2) for share in graded.frame["greedy"]]
    path.with_suffix(".yaml").write_text(yaml.safe_dump(model.config.to_mapping()))
    with pytest.raises(BadInput, match="names no recipe"):
        write_card(path, 300)


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_state(tiny, tmp_path, monkeypatch):
    honest = Learner._gradient

    def spoilt(learner, part, n_targets):
        tally, gradient = honest(learner, part, n_targets)
        return (Tally(float("nan"), 1, 1, tally.paths, tally.paths) if learner.step == 60 else tally), gradient

    with monkeypatch.context() as patched:
        patched.setattr(Learner, "_gradient", spoilt)
        with pytest.raises(BadInput, match=r"step 60: the loss is nan.*last good state is step 50"):
            train(tiny, tmp_path / "out")
    good = read_state(tmp_path / "out" / "state.safetensors")
    assert int(good["step"]) == 50
    assert all(torch.isfinite(value).all() for value in good.values())
    assert not (tmp_path / "out" / "tiny.safetensors").exists()


def test_a_folder_of_another_training_is_refused_and_left_as_it_was(tiny, tmp_path):
    train(tiny, tmp_path / "out", steps=25)

    def files():
        return {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.suffix}

    before = files()
    assert len(before) == 5
    with pytest.raises(BadInput, match=r"max_iters 25, and this one has 75"):
        train(tiny, tmp_path / "out")
    with pytest.raises(BadInput, match="random_seed"):
        train(tiny, tmp_path / "out", steps=25, seed=1)
    assert files() == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"training": {"curiculum": 0.5}}, r"training\.curiculum.*did you mean 'curriculum'.*there are steps"),
        ({"training": {"decay": 2}}, "decay 2; it is a share"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"batch_size": "many"}, "batch_size 'many'"),
        ({"optimizer": {"lr": "1e-3"}}, "lr '1e-3'; it is a number, such as 0.001"),
        ({"optimizer": {"betas": [0.9]}}, r"betas \(0.9,\); they are two numbers"),
        ({"random_seed": -1}, "seed -1"),
        ({"training": {"inner_goals": [6]}}, r"inner_goals \(6,\); they are two depths"),
        ({"training": {"inner_goals": [7, 6]}}, r"inner_goals \(7, 6\)"),
        ({"training": {"parts": 0}}, "parts 0"),
        ({"model": {**TINY, "n_ctx": 9}}, r"n_ctx is 9, and trees of 5 nodes need 18"),
    ],
)
def test_a_configuration_that_contradicts_itself_is_refused_in_one_line(tmp_path, more, message):
    config = write_config(tmp_path / "wrong.yaml", **more)
    with pytest.raises(BadInput, match=message) as refused:
        train(config, tmp_path / "out")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_trained_on_or_written_to_is_refused_in_one_line(tiny, tmp_path, monkeypatch):
    with pytest.raises(
        BadInput, match=r"no configuration 'reproductoin' \(did you mean 'reproduction'\?\).*baseline, reproduction"
    ):
        train("reproductoin", tmp_path / "out")
    with pytest.raises(BadInput, match="use cpu or cuda"):
        train(tiny, tmp_path / "out", device="tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BadInput, match="no CUDA device"):
        train(tiny, tmp_path / "out", device="cuda")
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="name another folder"):
        train(tiny, tmp_path / "file" / "out")

    with lease(tmp_path), pytest.raises(Busy, match="is being written by"):
        train(tiny, tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save", full)
    with pytest.raises(NoRoom, match="free some"):
        train(tiny, tmp_path / "out")


def test_both_shipped_configurations_and_the_notebooks_are_recipes(tmp_path):
    for name in ("reproduction", "baseline"):
        assert read_config(name)[1].system == name
    model = {key: TINY[key] for key in ("d_model", "d_head", "n_layers", "act_fn", "attention_dir")}
    notebooks = {"random_seed": 7, "n_nodes": 16, "model": model, "optimizer": {"lr": 0.002}, "max_iters": None}
    (tmp_path / "conf.yaml").write_text(json.dumps({**notebooks, "epoch_len_steps": 5000, "use_wandb": True}))
    _, config, recipe = read_config(str(tmp_path / "conf.yaml"))
    assert (config.system, recipe.seed, recipe.lr, recipe.steps) == ("reproduction", 7, 0.002, Recipe.steps)
    assert read_config(str(tmp_path / "conf.yaml"), 9)[1].n_ctx == 40


def test_rows_go_to_wandb_when_it_is_there_and_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(BadInput, match="wandb is not installed"):
        to_wandb("trees", tmp_path / "out")

    def nobody(**_):
        raise ConnectionError("no API key\nconfigured")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=nobody, Error=ConnectionError))
    with pytest.raises(BadInput, match="no API key configured; mend it, or leave --wandb out"):
        to_wandb("trees", tmp_path / "out")
    sent = []
    run = SimpleNamespace(log=lambda row, step: sent.append((step, row)))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **said: run))
    config = write_config(tmp_path / "tiny.yaml", n_nodes=4, max_iters=2)
    train(config, tmp_path / "out", progress=to_wandb("trees", tmp_path / "out"))
    log = pl.read_ndjson(tmp_path / "out" / "tiny.jsonl").row(0, named=True)
    assert [step for step, _ in sent] == [2]
    assert sent[0][1]["loss"] == log["loss"]
    assert sent[0][1]["path_accuracy/1"] == log["by_depth"][0]["right"] / log["by_depth"][0]["paths"]
