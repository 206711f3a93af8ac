"""Attention patterns of one tree, with its tokens: a figure of one or all layers, or an HTML page.

The page is self-contained and works without a network. A token under the mouse, or a clicked token,
shows what it attends to and what attends to it.
"""

from __future__ import annotations

import html
import json
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

import numpy as np

from actstore.errors import BadInput, NotStored
from actstore.outputs import save_figure, save_pages, write_text
from actstore.queries.attention.study import pattern_run, pattern_sites
from actstore.queries.figures import panels, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from actstore.store import Store

ENDINGS = (".png", ".svg", ".pdf", ".html")
TREES = """
select count(*) as n, min(tree_id) as first, max(tree_id) as last, any_value(dataset) as dataset
from trees semi join held_trees($run) using (tree_id)
"""
TOKENS = """
select token::varchar as token from tokens semi join held_trees($run) using (tree_id)
where tree_id = $t order by position
"""
HTMLS_OWN = "<>&\u2028\u2029"  # the last two end a line of older JavaScript
TOKEN = 0.12  # inches per token of a drawn pattern, whose names have 7 points
BESIDE = 0.55  # inches beside a pattern: names of tokens, and of the axis; one of 55 tokens is as wide as a page
DIGITS = 4  # of a weight on the page; an eye cannot tell finer steps of colour apart


def patterns_of(store: Store, run: str, tree_id: int) -> tuple[list[str], dict[str, np.ndarray]]:
    """A tree's tokens, and site → pattern, float32 [head, query, key], a query and key per token.

    Args:
        run: name of the run; without patterns, another run of the same model over the same trees is
            used.

    Raises:
        NotStored: there is no such tree, or no pattern of the tree.
    """
    asked, run = run, pattern_run(store, run)
    n_trees, first, last, dataset = store.sql(TREES, {"run": run}).row(0)
    if not n_trees:
        raise NotStored(f"run {run!r} has no patterns of a tree yet; let its ingest go on")
    tokens = store.sql(TOKENS, {"run": run, "t": tree_id})
    if not len(tokens):
        raise NotStored(
            f"run {asked!r} has no tree {tree_id}; it has {n_trees:,} trees of the dataset {dataset!r}, numbered {first} to "
            f"{last}: give one of these numbers as TREE"
        )
    query, n = "select token_id from tokens where tree_id = $t order by position", len(tokens)
    read = {site: store.read(query, run, site, {"t": tree_id})[0] for site in pattern_sites(store, run)}
    return list(tokens["token"]), {site: X[:, :, :n].transpose(1, 0, 2) for site, X in read.items()}


def draw_patterns(store: Store, run: str, tree_id: int, layer: int | None = None, head: int = 0) -> Figure:
    """Draw a tree's patterns with its tokens.

    Args:
        layer: number of a layer; default: all layers side by side.
        head: number of the head in each layer.

    Raises:
        NotStored: there is no such tree, layer or pattern.
        BadInput: there is no such head.
    """
    tokens, patterns = patterns_of(store, run, tree_id)
    if layer is not None:
        wanted = f"pattern.{layer}"
        if wanted not in patterns:
            raise NotStored(f"run {run!r} holds no {wanted}; it holds {', '.join(patterns)}")
        patterns = {wanted: patterns[wanted]}
    n_heads = next(iter(patterns.values())).shape[0]
    if not 0 <= head < n_heads:
        raise BadInput(f"got head {head}; there are {n_heads}, from 0")
    columns = min(len(patterns), 2)
    side = max(4.0, TOKEN * len(tokens)) + BESIDE
    with style():
        figure, axes = panels(len(patterns), side, columns, columns * side, gridspec_kw={"hspace": 0.03})
        figure.set_figheight(figure.get_figheight() + 0.6)  # the scale, and the title
        for axis, (site, pattern) in zip(axes, patterns.items(), strict=True):
            axis.grid(False)
            axis.spines[["top", "right"]].set_visible(True)
            shown = axis.imshow(pattern[head], cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
            ticks = range(len(tokens))
            axis.set_xticks(ticks, tokens, rotation=90, fontsize=7)
            axis.set_yticks(ticks, tokens, fontsize=7)
            axis.tick_params(length=1.5, pad=1)
            axis.set_xlabel("attended to (key)")
            axis.set_ylabel("attending (query)")
            axis.set_title(f"{site}, head {head}", loc="left")
        figure.colorbar(
            shown,
            ax=axes,
            location="bottom",
            shrink=0.4,
            aspect=40,
            fraction=0.02,
            pad=0.01,
            label="share of the attention",
        )
        figure.suptitle(f"Tree {tree_id}, run {run}", x=0.02, ha="left")
        figure.draw_without_rendering()  # ticks are made here, in this style
    return figure


def page(store: Store, run: str, tree_id: int) -> str:
    """The self-contained HTML page of one tree, with all layers and heads."""
    tokens, patterns = patterns_of(store, run, tree_id)
    data = {
        "tokens": tokens,
        "patterns": {
            f"{site}, head {head}": [[round(float(w), DIGITS) for w in row[: q + 1]] for q, row in enumerate(pattern)]
            for site, heads in patterns.items()
            for head, pattern in enumerate(heads)
        },
    }
    title = html.escape(f"Attention: tree {tree_id}, run {run}")
    return Template(PAGE).substitute(title=title, data=script_json(data))


def script_json(data: object) -> str:
    """JSON for a <script>, with every character escaped that HTML could interpret."""
    text = json.dumps(data, ensure_ascii=False)
    return "".join(f"\\u{ord(character):04x}" if character in HTMLS_OWN else character for character in text)


def save(store: Store, run: str, tree_id: int, out: str, layer: int | None = None, head: int = 0) -> None:
    """Write a tree's patterns as a figure (.png, .svg, .pdf) or a page (.html), atomically.

    All layers together are wider than the page of a paper; in a .pdf, each layer has a page.
    """
    ending = Path(out).suffix
    if ending == ".html":
        write_text(out, page(store, run, tree_id))
        return
    with style():  # its fonts are those that journals take
        if ending == ".pdf" and layer is None:
            layers = [int(site.rpartition(".")[2]) for site in pattern_sites(store, pattern_run(store, run))]
            save_pages(out, (draw_patterns(store, run, tree_id, one, head) for one in layers))
        else:
            save_figure(out, draw_patterns(store, run, tree_id, layer, head), dpi=150)


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
  :root { color-scheme: light dark; --paper: #fff; --ink: #1a1a1a; --line: #ccc; --most: #0072B2; --chosen: #D55E00; }
  @media (prefers-color-scheme: dark) {
    :root:not(.printed) { --paper: #16181d; --ink: #e8e8e8; --line: #555; --most: #56B4E9; --chosen: #E69F00; }
  }
  body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }
  body { color: var(--ink); background: var(--paper); }
  h1 { font-size: 1.3rem; }
  .tokens { display: flex; flex-wrap: wrap; gap: 2px; font-family: ui-monospace, monospace; margin: 1rem 0; }
  .tokens button { font: inherit; color: inherit; border: 1px solid var(--line); border-radius: 3px; padding: 1px 5px; }
  .tokens button { cursor: pointer; min-width: 1.9em; background: var(--paper); }
  .tokens button.chosen { outline: 3px solid var(--chosen); }
  .tokens button:focus-visible { outline: 3px solid var(--ink); }
  label { margin-right: 1.5rem; }
  .wide { overflow-x: auto; }
  canvas { width: 44rem; height: 44rem; }
  #said { min-height: 3em; }
  .key { display: inline-block; width: 8rem; height: .8rem; border: 1px solid var(--line); vertical-align: middle; }
  .key { background: linear-gradient(90deg, var(--paper), var(--most)); }
  .tokens button, .key { print-color-adjust: exact; }
  @media print {
    body { margin: 0; font-size: 10pt; }
    label:has(input:not(:checked)) { display: none; }
    .wide { overflow: visible; break-inside: avoid; }
    canvas { width: 100%; height: auto; }
  }
</style>
</head>
<body>
<h1>$title</h1>
<p>
  <label>Layer <select id="site"></select></label>
  <label><input type="checkbox" id="turned"> show the tokens that attend to the chosen token</label>
  0 <span class="key"></span> 1
</p>
<div class="tokens" id="tokens"></div>
<p id="said" aria-live="polite">Point at a token, or click a token to keep it.</p>
<div class="wide"><canvas id="matrix" width="1408" height="1408" aria-label="The whole pattern"></canvas></div>
<p>Rows (queries) attend to columns (keys).</p>
<script type="application/json" id="data">$data</script>
<script>
const data = JSON.parse(document.getElementById("data").textContent);
const site = document.getElementById("site"), turned = document.getElementById("turned");
const said = document.getElementById("said"), canvas = document.getElementById("matrix");
let kept = null, at = data.tokens.length - 1;
for (const name of Object.keys(data.patterns)) site.add(new Option(name, name));
const buttons = data.tokens.map((token, i) => {
  const button = document.createElement("button");
  button.textContent = token;
  button.title = "position " + i;
  button.addEventListener("mouseenter", () => { if (kept === null) { at = i; show(); } });
  button.addEventListener("focus", () => { if (kept === null) { at = i; show(); } });
  button.addEventListener("click", () => { kept = kept === i ? null : i; at = i; show(); });
  document.getElementById("tokens").append(button);
  return button;
});
const weight = (q, k) => data.patterns[site.value][q][k] || 0;
const dark = matchMedia("(prefers-color-scheme: dark)");
const rgb = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const numbers = hex => (hex.length > 4 ? hex.slice(1).match(/../g) : [...hex.slice(1)].map(c => c + c)).map(c => parseInt(c, 16));
function shade(w) {
  const [none, most] = [numbers(rgb("--paper")), numbers(rgb("--most"))];
  return `rgb($${none.map((from, i) => Math.round(from + w * (most[i] - from))).join(", ")})`;
}
function show() {
  const weights = buttons.map((_, i) => turned.checked ? weight(i, at) : weight(at, i));
  buttons.forEach((button, i) => {
    button.style.background = shade(weights[i]);
    button.style.color = weights[i] > 0.6 ? rgb("--paper") : rgb("--ink");
    button.classList.toggle("chosen", i === at);
  });
  const most = weights.map((w, i) => [w, i]).sort((a, b) => b[0] - a[0]).slice(0, 5).filter(([w]) => w > 0.0005);
  said.textContent = `$${data.tokens[at]} at position $${at} ` + (turned.checked ? "is attended to by " : "attends to ")
    + most.map(([w, i]) => `$${data.tokens[i]} (position $${i}): $${(100 * w).toFixed(1)} %`).join(", ");
  matrix();
}
function matrix() {
  const n = data.tokens.length, edge = 88, side = (canvas.width - edge) / n, draw = canvas.getContext("2d");
  const shades = Array.from({ length: 101 }, (_, i) => shade(i / 100));
  draw.clearRect(0, 0, canvas.width, canvas.height);
  for (let q = 0; q < n; q++) for (let k = 0; k <= q; k++) {
    draw.fillStyle = shades[Math.round(100 * weight(q, k))];
    draw.fillRect(edge + k * side, edge + q * side, side + 0.5, side + 0.5);
  }
  draw.font = `$${Math.min(22, side * 0.85)}px ui-monospace, monospace`;
  draw.fillStyle = rgb("--ink");
  draw.textBaseline = "middle";
  data.tokens.forEach((token, i) => {
    draw.textAlign = "right";
    draw.fillText(token, edge - 6, edge + (i + 0.5) * side);
    draw.save();
    draw.translate(edge + (i + 0.5) * side, edge - 6);
    draw.rotate(-Math.PI / 2);
    draw.textAlign = "left";
    draw.fillText(token, 0, 0);
    draw.restore();
  });
  draw.strokeStyle = rgb("--line");
  draw.lineWidth = 1;
  draw.strokeRect(edge, edge, n * side, n * side);
  draw.strokeStyle = rgb("--chosen");
  draw.lineWidth = 4;
  if (turned.checked) draw.strokeRect(edge + at * side, edge, side, n * side);
  else draw.strokeRect(edge, edge + at * side, n * side, side);
}
for (const [event, printed] of [["beforeprint", true], ["afterprint", false]])  // paper is light, and so is the matrix on it
  addEventListener(event, () => { document.documentElement.classList.toggle("printed", printed); show(); });
dark.addEventListener("change", show);
site.addEventListener("change", show);
turned.addEventListener("change", show);
show();
</script>
</body>
</html>
"""
