"""Pictures as SVG and HTML: a tree with its path, tokens in colour, heat maps, vectors as bars."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence as Listed
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from actstore.queries.figures import COLOURS
from actstore.queries.show import children_of, places

if TYPE_CHECKING:
    from actstore.queries.app.sequence import Grid, Sequence

BLUE, RED = COLOURS[0], COLOURS[1]
FONT = "font-family:ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace"
STEP_X, STEP_Y, RADIUS = 46, 62, 15  # pixels between leaves, between depths, and of a node
CELL = 22  # pixels of a heat map's row
CORNER = 16, 14  # where a token that names no node attends from
BARS = 48  # bars of a vector: further numbers share one, which shows the largest of them
MOST_LOSS = 8.0  # nats with the darkest colour
LEAST_FIT = 0.7  # of a map's size: its text has 12 pixels
LEAST = 0.005  # weight of the thinnest edge of attention that is drawn


def blue(share: float) -> str:
    """A colour from white (0) to blue (1)."""
    share = min(1.0, max(0.0, share))
    return f"rgb({round(255 * (1 - share))},{round(255 - 141 * share)},{round(255 - 77 * share)})"


def ink(share: float) -> str:
    """The colour of text over `blue`."""
    return "#fff" if share > 0.6 else "#1a1a1a"


def tree(asked: Sequence, at: int, weights: np.ndarray | None = None) -> str:
    """A tree with its path, the model's greedy path, and the attention of one token over it.

    Args:
        asked: a sequence with a tree.
        at: position of the token that attends.
        weights: float [n_tokens], its weights; None draws no attention.
    """
    assert asked.tree is not None
    root, path, goal = asked.tree["root"], [asked.tree["root"], *asked.tree["path"]], asked.tree["goal"]
    place = _places(root, asked.edges.select("source", "target").rows())
    width = max(x for x, _ in place.values()) + STEP_X
    height = max(y for _, y in place.values()) + STEP_Y // 2
    steps, greedy = set(pairwise(path)), [root, *(asked.greedy or [])]
    said = set(pairwise(greedy))
    parts = []
    for source, target in asked.edges.select("source", "target").rows():
        (x1, y1), (x2, y2) = place[source], place[target]
        colour, thick = ("#1a1a1a", 3) if (source, target) in steps else ("#b5b5b5", 1.5)
        parts.append(_line(x1, y1, x2, y2, colour, thick))
    for source, target in said - steps:  # a step of the model that is not on the path
        if source in place and target in place:
            (x1, y1), (x2, y2) = place[source], place[target]
            parts.append(_line(x1, y1, x2, y2, RED, 3, 'stroke-dasharray="5 4"'))
    parts += _attended(asked, at, weights, place) if weights is not None else []
    for node, (x, y) in place.items():
        fill = "#1a1a1a" if node in path else "#fff"
        text = "#fff" if node in path else "#1a1a1a"
        ring = f'<circle cx="{x}" cy="{y}" r="{RADIUS + 4}" fill="none" stroke="{BLUE}" stroke-width="2.5"/>'
        parts.append((ring if node == goal else "") + _node(x, y, str(node), fill, text))
    name = f"Tree {asked.sequence_id}: the path from {root} to the goal {goal}"
    return _svg(width, height, parts, name)


def _places(root: int, edges: Listed[tuple[int, int]]) -> dict[int, tuple[int, int]]:
    """Node → x, y in pixels, see show.places."""
    found = places(root, children_of(edges))
    return {node: (round(STEP_X * x), STEP_Y // 2 + round(-STEP_Y * y)) for node, (x, y) in found.items()}


def _attended(asked: Sequence, at: int, weights: np.ndarray, place: dict[int, tuple[int, int]]) -> list[str]:
    """Curves from the node of the attending token to the nodes of the tokens that it attends to."""
    nodes = asked.tokens["node"].to_list()
    by_node: dict[int, float] = {}
    for node, weight in zip(nodes, weights, strict=True):
        if node is not None:
            by_node[node] = by_node.get(node, 0.0) + float(weight)
    own, parts = nodes[at], []
    x1, y1 = place.get(own, CORNER)
    if own not in place:  # a separator, say, which names no node
        word = html.escape(asked.words[at])
        parts.append(
            f'<text x="{x1}" y="{y1 + 4}" text-anchor="end" font-size="14" fill="{RED}" style="{FONT}">{word}</text>'
        )
    for node, weight in sorted(by_node.items(), key=lambda pair: pair[1]):
        if weight < LEAST or node not in place:
            continue
        x2, y2 = place[node]
        style = f'fill="none" stroke="{BLUE}" stroke-width="{1 + 9 * weight:.1f}" stroke-opacity="{0.25 + 0.6 * weight:.2f}"'
        title = f"<title>{100 * weight:.1f} % to node {node}</title>"
        if node == own:
            parts.append(f'<circle cx="{x1}" cy="{y1}" r="{RADIUS + 8}" {style}>{title}</circle>')
        else:
            bend = 0.22
            cx, cy = (x1 + x2) / 2 + bend * (y2 - y1), (y1 + y2) / 2 - bend * (x2 - x1)
            parts.append(f'<path d="M{x1} {y1} Q{cx:.0f} {cy:.0f} {x2} {y2}" {style}>{title}</path>')
    return parts


def _line(x1: int, y1: int, x2: int, y2: int, colour: str, width: float, more: str = "") -> str:
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{colour}" stroke-width="{width}" {more}/>'


def _node(x: int, y: int, label: str, fill: str, text: str) -> str:
    return (
        f'<circle cx="{x}" cy="{y}" r="{RADIUS}" fill="{fill}" stroke="#1a1a1a" stroke-width="1.5"/>'
        f'<text x="{x}" y="{y + 4.5}" text-anchor="middle" font-size="13" fill="{text}" style="{FONT}">{label}</text>'
    )


def _svg(width: float, height: float, parts: Listed[str], name: str, fits: bool = False) -> str:
    sized = f"width:100%;height:auto;max-width:{width:.0f}px;min-width:{LEAST_FIT * width:.0f}px" if fits else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{html.escape(name, quote=True)}" '
        f'style="background:#fff;direction:ltr;{sized}">{"".join(parts)}</svg>'
    )


def tokens(words: Listed[str], shares: Listed[float | None], titles: Listed[str], at: int | None = None) -> str:
    """Tokens in rows, each in the colour of its share; `data-at` is a token's position."""
    parts = []
    for i, (word, share, title) in enumerate(zip(words, shares, titles, strict=True)):
        ring = f"outline:2px solid {RED};" if i == at else ""
        shown = html.escape(word).replace(" ", "&nbsp;") or "&nbsp;"
        colour = "background:#fff;color:#1a1a1a" if share is None else f"background:{blue(share)};color:{ink(share)}"
        parts.append(
            f'<span data-at="{i}" title="{html.escape(title, quote=True)}" '
            f'style="{colour};{ring}cursor:pointer;padding:1px 3px;margin:1px;border:1px solid #d0d0d0;border-radius:3px;'
            f'display:inline-block">{shown}</span>'
        )
    return f'<div style="{FONT};font-size:13px;line-height:1.6;background:#fff">{"".join(parts)}</div>'


def sequence(asked: Sequence, at: int, weights: np.ndarray | None = None) -> str:
    """A tree over its tokens, or a text's tokens: blue for attention, or for surprise without one.

    Args:
        at: position of the token that attends.
        weights: float [n_tokens], its weights.
    """
    loss = dict(asked.answers.select("position", "loss").drop_nulls().iter_rows())
    if weights is not None:
        shares: list[float | None] = [float(weight) if k <= at else None for k, weight in enumerate(weights)]
        titles = [f"position {k}" + (f": {100 * w:.1f} %" if k <= at else "") for k, w in enumerate(weights)]
    else:
        shares = [min(1.0, loss[k - 1] / MOST_LOSS) if k - 1 in loss else None for k in range(len(asked.tokens))]
        titles = [f"position {k}" + (f": loss {loss[k - 1]:.2f}" if k - 1 in loss else "") for k in range(len(shares))]
    strip = tokens(asked.words, shares, titles, at)
    return strip if asked.tree is None else tree(asked, at, weights) + strip


def about(asked: Sequence) -> str:
    """A sequence and the model's answer, in a line."""
    if asked.tree is None:
        loss = asked.answers["loss"].drop_nulls().to_list()
        said = f"; mean loss {sum(loss) / len(loss):.3f} nats" if loss else ""
        return f"Sequence {asked.sequence_id}, run {asked.run}: {len(asked.tokens)} tokens{said}."
    path = " →".join(map(str, [asked.tree["root"], *asked.tree["path"]]))
    said = "no answer is stored"
    if asked.greedy is not None:
        answer = " →".join(map(str, [asked.tree["root"], *asked.greedy]))
        said = "the model is right" if asked.greedy == asked.tree["path"] else f"the model answers {answer} (dashed)"
    return (
        f"Tree {asked.sequence_id}, run {asked.run}: depth {asked.tree['depth']}, {asked.tree['n_leaves']} leaves, split "
        f"{asked.tree['split']}. Path {path} (black), goal {asked.tree['goal']} (blue ring); {said}."
    )


def heat(grid: Grid, words: Listed[str], at: int | None = None, fits: bool = False) -> str:
    """A heat map: a row per site, the last at the top, and a column per token.

    Args:
        grid: shares and words.
        words: every token of the sequence, for the columns' names.
        at: position whose column is framed.
        fits: shrink the map to the column that it stands in, to LEAST_FIT of its size at most.
    """
    names = [words[position].strip() or "␣" for position in grid.positions]
    turned = max(len(name) for name in names) > 5
    beside = [] if turned else [names]  # a turned name needs no more than a line's height
    longest = max((len(word) for row in [*grid.words, *beside] for word in row), default=1)
    wide = max(30, 8 + 7 * min(longest, 9))
    top = (16 + 6 * min(14, max(len(name) for name in names))) if turned else 24
    left = max(112, 20 + round(7.3 * max(map(len, grid.sites))))
    parts = []
    for i, (name, pale) in enumerate(zip(names, grid.dim, strict=True)):
        x, y = left + (i + 0.5) * wide, top - 6
        turn = f' transform="rotate(-50 {x:.0f} {y})" text-anchor="start"' if turned else ' text-anchor="middle"'
        weight = "normal" if pale else "bold"
        parts.append(
            f'<text x="{x:.0f}" y="{y}"{turn} font-size="12" font-weight="{weight}" fill="#1a1a1a" style="{FONT}">'
            f"{html.escape(name[:14])}<title>position {grid.positions[i]}</title></text>"
        )
    for r, site in enumerate(reversed(grid.sites)):
        row = len(grid.sites) - 1 - r
        y = top + r * CELL
        parts.append(
            f'<text x="{left - 8}" y="{y + 15}" text-anchor="end" font-size="12" fill="#1a1a1a" style="{FONT}">'
            f"{html.escape(site)}</text>"
        )
        for i, (share, word, wrong) in enumerate(zip(grid.shares[row], grid.words[row], grid.marked[row], strict=True)):
            x, faint = left + i * wide, ' opacity="0.35"' if grid.dim[i] else ""
            title = f"{site}, {names[i]} ({grid.positions[i]}): {word}" + ("" if share is None else f", {share:.4f}")
            value = 0.0 if share is None else share
            frame = f'stroke="{RED}" stroke-width="1.6"' if wrong and not grid.dim[i] else 'stroke="#ddd"'
            parts.append(
                f'<g{faint} data-at="{grid.positions[i]}" style="cursor:pointer"><title>{html.escape(title)}</title>'
                f'<rect x="{x + 1}" y="{y + 1}" width="{wide - 2}" height="{CELL - 2}" fill="{blue(value)}" {frame}/>'
                f'<text x="{x + wide / 2:.0f}" y="{y + 15}" text-anchor="middle" font-size="12" fill="{ink(value)}" '
                f'style="{FONT}">{html.escape(_cut(word.strip()))}</text></g>'
            )
    width, height = left + len(names) * wide + 70 * turned + 8, top + len(grid.sites) * CELL + 8
    if at in grid.positions:
        x = left + grid.positions.index(at) * wide
        parts.append(
            f'<rect x="{x}" y="{top}" width="{wide}" height="{len(grid.sites) * CELL}" fill="none" stroke="#1a1a1a" '
            'stroke-width="2" pointer-events="none"/>'
        )
    late = at is not None and at > grid.positions[-1] - 10 and len(names) > 20  # then the view begins at the right end
    return f'<div style="overflow-x:auto;direction:{"rtl" if late else "ltr"}">{_svg(width, height, parts, grid.said, fits)}</div>'


def _cut(word: str) -> str:
    return word if len(word) <= 9 else f"{word[:8]}…"


def bars(vector: Listed[float] | None) -> str:
    """A vector as small bars, an SVG of one line's height; blue above 0, red below."""
    if vector is None or not len(vector):
        return ""
    numbers = np.nan_to_num(np.asarray(vector, float))
    parts = np.array_split(numbers, min(BARS, len(numbers)))
    heights = [part[np.abs(part).argmax()] for part in parts]
    largest = max(map(abs, heights)) or 1.0
    drawn = []
    for i, height in enumerate(heights):
        tall = 9 * abs(height) / largest
        y = 10 - tall if height > 0 else 10
        colour = BLUE if height > 0 else RED
        drawn.append(f'<rect x="{3 * i}" y="{y:.1f}" width="2.4" height="{tall:.1f}" fill="{colour}"/>')
    title = f"{len(numbers)} numbers, {numbers.min():.3g} to {numbers.max():.3g}, norm {np.linalg.norm(numbers):.3g}"
    return _svg(3 * len(heights), 20, [f"<title>{title}</title>", *drawn], title)


def beside(columns: Listed[str]) -> str:
    """HTML in columns of one width; what is wider scrolls within its own column."""
    cells = "".join(f'<div style="overflow-x:auto">{column}</div>' for column in columns)
    return (
        f'<div style="display:grid;grid-template-columns:repeat({len(columns)},minmax(0,1fr));gap:16px">{cells}</div>'
    )


def image(svg: str) -> str:
    """A figure as an image, so that ids within one SVG are not those of another."""
    coded = base64.b64encode(svg.encode()).decode()
    return f'<img alt="figure" style="max-width:100%;background:#fff" src="data:image/svg+xml;base64,{coded}">'


def steps(asked: Sequence) -> str:
    """The model's answer step by step, a table."""
    rows = []
    shown = asked.answers
    for row in shown.iter_rows(named=True):
        mark = "right" if row["correct"] else "wrong"
        colour = "" if row["correct"] else f' style="color:{RED};font-weight:bold"'
        p = row["p_target"]
        rows.append(
            f"<tr{colour}><td>{row['step']}</td><td>{html.escape(row['right'] or '')}</td>"
            f"<td>{html.escape(row['predicted'] or '')}</td><td>{p:.4f}</td><td>{mark}</td></tr>"
        )
    head = "<tr><th>step</th><th>right</th><th>predicted</th><th>p of the right step</th><th></th></tr>"
    style = "<style>.steps td,.steps th{padding:1px 10px;text-align:right}</style>"
    look = f"{FONT};font-size:13px;width:auto;display:inline-block"
    return f'{style}<table class="steps" style="{look}">{head}{"".join(rows)}</table>'
