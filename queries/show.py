"""One tree for a reader: a drawing, its prompt, and the answer of each run."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.text import Text
from rich.tree import Tree

from actstore.errors import NotStored
from actstore.outputs import printable
from actstore.store import Store


def draw_tree(store: Store, tree_id: int) -> Group:
    """Draw a tree with its path in bold, its prompt, and the greedy answer of each run.

    Raises:
        NotStored: the store holds no such tree.
    """
    found = store.sql("select * from trees where tree_id = $tree", {"tree": tree_id}).to_dicts()
    if not found:
        n, last = store.sql("select count(*), max(tree_id) from trees").row(0)
        raise NotStored(
            f"no tree {tree_id}: {store.path} holds {n:,} trees" + (f", numbered up to {last}" if n else "")
        )
    tree = found[0]
    edges = store.sql("select source, target from edges where tree_id = $tree order by edge", {"tree": tree_id}).rows()
    children: dict[int, list[int]] = {}
    for source, target in edges:
        children.setdefault(source, []).append(target)
    on_path = {tree["root"], *tree["path"]}
    drawing = Tree(_node(tree["root"], on_path, tree["goal"]), guide_style="dim")
    _hang(drawing, tree["root"], children, on_path, tree["goal"])
    words = store.sql(
        "select token::varchar from tokens where tree_id = $tree order by position", {"tree": tree_id}
    ).to_series()
    facts = (
        f"tree {tree_id} of {tree['dataset']}: depth {tree['depth']}, {tree['n_leaves']} leaves, split {tree['split']}"
    )
    return Group(Text(printable(facts)), drawing, Text("prompt  " + " ".join(words)), *_answers(store, tree))


def _node(label: int, on_path: set[int], goal: int) -> Text:
    text = Text(str(label), style="bold" if label in on_path else "")
    return text.append("  ← goal") if label == goal else text


def _hang(branch: Tree, node: int, children: dict[int, list[int]], on_path: set[int], goal: int) -> None:
    for child in sorted(children.get(node, [])):
        _hang(branch.add(_node(child, on_path, goal)), child, children, on_path, goal)


def _answers(store: Store, tree: dict[str, Any]) -> list[Text]:
    answers = store.sql(
        """select run, greedy_path, greedy_right, teacher_forced_right, failure, first_wrong_step, min(p_target) as p
        from outcomes left join predictions using (run, tree_id) where tree_id = $tree group by all order by run""",
        {"tree": tree["tree_id"]},
    )
    lines = [Text("path    " + _steps([tree["root"], *tree["path"]]))]
    for row in answers.to_dicts():
        verdict = "right" if row["greedy_right"] else f"wrong at step {row['first_wrong_step']}: {row['failure']}"
        answer = _steps([tree["root"], *row["greedy_path"]])
        lines.append(Text(printable(f"{row['run']}  {answer}  {verdict}; least sure step p = {row['p']:.4f}")))
    return lines


def _steps(labels: list[int]) -> str:
    return " →".join(str(label) for label in labels)
