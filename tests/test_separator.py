"""Training many models at once: the equations, the batches and the probe of data/separator.py."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from actstore.data import separator
from actstore.data.separator import Arm, Stack, batch, fit_and_predict
from actstore.ingest.models import equations, load, weights
from actstore.ingest.training.learner import Learner
from actstore.ingest.training.packing import pack
from actstore.ingest.training.recipe import read_config, step_trees


def small(n_nodes=5):
    _, config, recipe = read_config("reproduction", n_nodes, 200)
    return replace(config, n_layers=2, d_model=32, d_head=32, d_mlp=64), replace(recipe, batch_size=16)


def test_stacked_models_have_the_logits_of_the_training():
    config, recipe = small()
    trees, slots = step_trees(recipe, config, 150)
    packed = pack(trees, config.vocabulary, slots, recipe.goals_at(150, trees))
    planes = torch.from_numpy(batch(recipe, config, 150, packed=True)).long()
    shapes = weights.shapes(config)
    states = [weights.state(load.build(config, seed), config) for seed in (1, 2)]
    stacked = separator.logits(separator.flattened(states, shapes), shapes, planes.expand(2, -1, -1, -1), torch.float32)
    for number, state in enumerate(states):
        alone = equations.forward(state, config, packed, torch.float32)
        torch.testing.assert_close(stacked[number][packed.at], alone, atol=2e-5, rtol=0)
    assert torch.equal(planes[separator.TARGET].flatten()[packed.at], packed.target)


def test_a_step_of_a_stack_is_a_step_of_the_training(monkeypatch):
    monkeypatch.setattr(separator, "CHUNK", 1)
    config, recipe = small()
    arms = [Arm(seed=42), Arm(decayed=False, seed=42), Arm(every_token=True, seed=42)]
    stack = Stack(arms, recipe, config, 200, "cpu")
    assert len(stack.recipes) == 1  # the three see the same trees
    stack.learn(separator.chunk((stack.recipes, config, True, 0)))
    learner = Learner.new(config, recipe, "cpu")
    monkeypatch.setattr(torch, "bfloat16", torch.float32)
    with ThreadPoolExecutor(1) as pool:
        tally = learner.learn(pool)
    ours = separator.views(stack.flat.detach(), stack.shapes)
    assert abs(float(stack.loss[0]) - tally.loss) < 1e-4
    for name, value in learner.params.items():
        moved = ours[name] - weights.state(load.build(config, 42), config)[name]
        assert moved.abs().max() <= 1.01 * recipe.lr_at(0) + 1e-6
        torch.testing.assert_close(ours[name][0], value.detach(), atol=2e-5, rtol=0)
    assert torch.equal(stack.flat[0], stack.flat[1])
    assert not torch.equal(stack.flat[0], stack.flat[2])


def test_one_goal_per_tree_is_one_of_the_packed_goals():
    config, recipe = small()
    one, packed = (batch(recipe, config, 199, packed=which) for which in (False, True))
    goal_at = 3 * (config.n_nodes - 1)
    assert one[separator.SEGMENT, :, goal_at:].max(initial=0, where=one[separator.SEGMENT, :, goal_at:] < 255) == 1
    first = packed[separator.POSITION] == goal_at
    for tree in range(one.shape[1]):
        goals = packed[separator.IDS, tree][first[tree] & (packed[separator.SEGMENT, tree] > 0)]
        assert one[separator.IDS, tree, goal_at] in goals


def test_the_probe_agrees_with_scikit_learn():
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(3000, 12)).astype(np.float32), rng.integers(0, 4, 3000)
    X[:, :4] += 1.5 * np.eye(4, dtype=np.float32)[y]
    X = X @ rng.normal(size=(12, 12)).astype(np.float32)
    both = torch.from_numpy(np.stack([X, rng.permutation(X)]))
    said = fit_and_predict(both[:, :2000], torch.from_numpy(y[:2000]), both[:, 2000:], 4).numpy()
    standard = (X - X[:2000].mean(0)) / X[:2000].std(0)
    oracle = LogisticRegression(max_iter=1000).fit(standard[:2000], y[:2000])
    assert np.mean(said[0] == oracle.predict(standard[2000:])) > 0.995
    assert abs(np.mean(said[1] == y[2000:]) - 0.25) < 0.06


def test_a_run_writes_a_row_per_arm_and_probed_step(tmp_path):
    config, recipe = small(4)
    arms = [Arm(), Arm(packed=False), Arm(False, False, False, notebook=True)]
    separator.run(arms, tmp_path / "out.csv", config, recipe, 50, 50, probed_trees=256)
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * 3
    assert lines[0].startswith("goals,trees,rate,loss_on,seed,step,loss,paths,all,edge 0,edge 1,embed")
    assert lines[1].split(",")[9] == "100.0"  # the first separator follows one source alone
