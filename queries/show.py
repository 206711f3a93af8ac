"""One tree for a reader: on a terminal with prompt and answers, and as a figure."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.text import Text
from rich.tree import Tree

from actstore.errors import NotStored
from actstore.outputs import printable
from actstore.queries.figures import COLOURS, heading, panels, style
from actstore.store import Store

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WHOLE = "\0"  # a blank within an edge


def draw_tree(store: Store, tree_id: int, width: int | None = None) -> Group:
    """Draw a tree with its path in bold, its prompt, and the greedy answer of each run.

    Args:
        store: an open store.
        tree_id: the tree.
        width: columns after which the prompt and the answers go on in the next line, between edges
            and steps; default: they are a line each.

    Raises:
        NotStored: the store holds no such tree.
    """
    tree, children = _tree(store, tree_id)
    on_path = {tree["root"], *tree["path"]}
    drawing = Tree(_node(tree["root"], on_path, tree["goal"]), guide_style="dim")
    _hang(drawing, tree["root"], children, on_path, tree["goal"])
    words = store.sql(
        "select token::varchar from tokens where tree_id = $tree order by position", {"tree": tree_id}
    ).to_series()
    facts = (
        f"tree {tree_id} of {tree['dataset']}: depth {tree['depth']}, {tree['n_leaves']} leaves, split {tree['split']}"
    )
    prompt = _line("prompt", " ".join(words).replace(" →", WHOLE + "→").replace(" ,", WHOLE + ","), width)
    return Group(Text(printable(facts)), drawing, prompt, *_answers(store, tree, width))


def _line(head: str, text: str, width: int | None) -> Text:
    """A name and what it has, in lines below each other; no line ends at WHOLE."""
    indent = " " * min(len(head) + 2, 16)
    lines = [f"{head}  {text}"]
    if width:
        lines = wrap(lines[0], width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return Text(printable("\n".join(lines).replace(WHOLE, " ")))


def _node(label: int, on_path: set[int], goal: int) -> Text:
    text = Text(str(label), style="bold" if label in on_path else "")
    return text.append("  ← goal") if label == goal else text


def _hang(branch: Tree, node: int, children: dict[int, list[int]], on_path: set[int], goal: int) -> None:
    for child in sorted(children.get(node, [])):
        _hang(branch.add(_node(child, on_path, goal)), child, children, on_path, goal)


def _answers(store: Store, tree: dict[str, Any], width: int | None) -> list[Text]:
    answers = store.sql(
        """select run, greedy_path, greedy_right, teacher_forced_right, failure, first_wrong_step, min(p_target) as p
        from outcomes left join predictions using (run, tree_id) where tree_id = $tree group by all order by run""",
        {"tree": tree["tree_id"]},
    )
    lines = [_line("path  ", _steps([tree["root"], *tree["path"]]), width)]
    for row in answers.to_dicts():
        verdict = "right" if row["greedy_right"] else f"wrong at step {row['first_wrong_step']}: {row['failure']}"
        answer = _steps([tree["root"], *row["greedy_path"]])
        lines.append(_line(row["run"], f"{answer}  {verdict}; least sure step p = {row['p']:.4f}", width))
    return lines


def _steps(labels: list[int]) -> str:
    return " →".join(str(label) for label in labels)


def plot_tree(store: Store, tree_id: int) -> Figure:
    """Draw a tree as a graph: the path in black, a ring around the goal.

    Raises:
        NotStored: the store holds no such tree.
    """
    tree, children = _tree(store, tree_id)
    path = [tree["root"], *tree["path"]]
    steps, place = set(pairwise(path)), places(tree["root"], children)
    with style():
        figure, (axis,) = panels(1, 0.42 * (1 - min(y for _, y in place.values())) + 0.3)
        axis.axis("off")
        axis.set_ylim(min(y for _, y in place.values()) - 0.5, 0.5)
        for source, targets in children.items():
            for target in targets:
                on_path = (source, target) in steps
                ends = zip(place[source], place[target], strict=True)
                axis.plot(*ends, color="black" if on_path else "0.7", linewidth=2 if on_path else 1, zorder=1)
        for node, at in place.items():
            if node == tree["goal"]:
                axis.scatter(*at, s=330, facecolor="none", edgecolor=COLOURS[0], linewidth=1.8, zorder=2)
            on_path = node in path
            axis.scatter(*at, s=170, facecolor="black" if on_path else "white", edgecolor="black", zorder=3)
            ink = "white" if on_path else "black"
            axis.text(*at, str(node), color=ink, ha="center", va="center_baseline", zorder=4)
        said = f"tree {tree_id}; black: the path of {len(steps)} step{'s' * (len(steps) != 1)} from the root; ring: the goal"
        heading(figure, f"The path from {tree['root']} to {tree['goal']}", said)
        figure.draw_without_rendering()
    return figure


def _tree(store: Store, tree_id: int) -> tuple[dict[str, Any], dict[int, list[int]]]:
    """A tree's row of `trees`, and node → its children in the order of the list."""
    found = store.sql("select * from trees where tree_id = $tree", {"tree": tree_id}).to_dicts()
    if not found:
        n, last = store.sql("select count(*), max(tree_id) from trees").row(0)
        raise NotStored(
            f"no tree {tree_id}: {store.path} holds {n:,} trees" + (f", numbered up to {last}" if n else "")
        )
    edges = store.sql("select source, target from edges where tree_id = $tree order by edge", {"tree": tree_id}).rows()
    return found[0], children_of(edges)


def children_of(edges: Iterable[tuple[int, int]]) -> dict[int, list[int]]:
    """Node → its children, in the order of the edges, (source, target)."""
    children: dict[int, list[int]] = {}
    for source, target in edges:
        children.setdefault(source, []).append(target)
    return children


def places(root: int, children: dict[int, list[int]]) -> dict[int, tuple[float, float]]:
    """Node → x, y: leaves from left to right, a parent above the middle of its children.

    Neighbouring leaves are 1 apart, and so are neighbouring depths; the root has y = 0.
    """
    place: dict[int, tuple[float, float]] = {}
    leaves = 0

    def put(node: int, depth: int) -> float:
        nonlocal leaves
        below = [put(child, depth + 1) for child in sorted(children.get(node, []))]
        leaves += not below
        x = sum(below) / len(below) if below else float(leaves)
        place[node] = x, -float(depth)
        return x

    put(root, 0)
    return place
