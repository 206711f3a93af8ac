"""The study `path-patching`: along which direct paths does a donor tree's answer go into another?

A path leads from a sender, which is what attention, MLP or a head adds at all tokens of a role, to
a receiver: attention, MLP or a head of a later layer at all tokens of a role, or the logits. Two
passes run over the edited tree. In the first, the sender is the donor tree's, and all attention and
MLPs between sender and receiver are frozen as the edited tree's own, so that the residual stream
alone carries the change. In the second, the receiver is what it was in the first, and all else is
free. With the logits as receiver, the first pass has the answer.

With all else frozen, what the receiver reads is its own residual stream plus the difference of
both trees' senders. The first pass adds this difference where the receiver reads.

The measure, the donors, the controls and the test are those of the study `patching`. A path is
tested if it is possible: a sender's layer is before the receiver's, attention reads no later token,
and an MLP and the logits read their own token alone.

Sources: Wang et al. 2022 (arXiv:2211.00593), who let the MLPs between run; Goldowsky-Dill et al.
2023 (arXiv:2304.05969), who freeze them, too, as is done here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from actstore.errors import BadInput
from actstore.interventions import Edit
from actstore.queries.causes import MOST, check_stored, names_in, roles_of, shape_of, sites_of, sites_read
from actstore.queries.figures import FRAMED, colour_bar, entitle, heading, heat, maps, most
from actstore.queries.pairs import BEFORE, Contrast, pairs_of
from actstore.queries.patching import CONTROL, LISTED, check_direction, compared, percent
from actstore.queries.study import (
    Answer,
    Progress,
    Test,
    adjusted,
    adjustment,
    p_shown,
    result_rows,
    shown,
    significant,
    test_rows,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from actstore.interventions import Patching
    from actstore.store import Store

NAME = "path-patching"
FAMILIES = {"attn_out": "attention", "mlp_out": "MLP", "z": "head"}
LOGITS = "logits"
ANSWERING = "root"  # role of the token whose logits are the first step
PLACES = {role: place for place, role in enumerate(("bar", "goal", "colon", "root"), start=1)}  # all other roles: 0


@dataclass(frozen=True)
class Place:
    """A sender or a receiver: a site at the tokens of a role; `head` None for a whole site."""

    site: str
    head: int | None
    role: str

    @property
    def part(self) -> str:
        """`attn_out.0`, or `z.0 head 1`."""
        return self.site if self.head is None else f"{self.site} head {self.head}"

    @property
    def named(self) -> str:
        """`attn_out.1 at root`; `logits`."""
        return self.part if self.site == LOGITS else f"{self.part} at {self.role}"

    def reaches(self, receiver: Place) -> bool:
        """Whether a direct path to a receiver is possible."""
        if receiver.site != LOGITS and _stage(receiver.site) <= _stage(self.site):
            return False
        if receiver.site == LOGITS or receiver.site.startswith("mlp_out"):
            return self.role == receiver.role
        return PLACES.get(self.role, 0) <= PLACES.get(receiver.role, 0)

    def reads(self, n_layers: int) -> str:
        """The site from which a receiver reads the residual stream."""
        family, _, layer = self.site.partition(".")
        if family == LOGITS:
            return f"resid_post.{n_layers - 1}"
        return f"resid_mid.{layer}" if family == "mlp_out" else f"resid_pre.{layer}"


def _stage(site: str) -> tuple[int, bool]:
    """The layer of a site, and whether it is the layer's MLP, which comes after its attention."""
    family, _, layer = site.partition(".")
    return int(layer), family == "mlp_out"


def study(
    store: Store,
    run: str,
    seed: int,
    progress: Progress,
    patch: Patching,
    senders: str | Sequence[str] = "attn_out,mlp_out",
    from_: str | Sequence[str] = "all",
    receivers: str | Sequence[str] = "attn_out,logits",
    to: str | Sequence[str] = ANSWERING,
    direction: str = "noise",
    pairs: str | Path | None = None,
    trees: int = 100,
) -> Answer:
    """Patch paths from senders to receivers with the activations of donor trees.

    Args:
        store: an open store.
        run: a run over whole tasks that holds the senders, and of heads (`z`) `attn_out` of their
            layers, too. Where the run also holds `embed`, `resid_post` and the receivers, only
            later tokens and layers are run.
        seed: seed of the pairs, sign flips and bootstrap.
        progress: called after each path and each control.
        patch: runs edits.
        senders: families (`attn_out`, `mlp_out`, and `z`, head by head) or sites (`z.3`).
        from_: (option `from`) roles of the senders' tokens, some of BEFORE.
        receivers: as `senders`, and `logits`.
        to: roles of the receivers' tokens, some of BEFORE; the logits are those at the root.
        direction, pairs: see the study `patching`.
        trees: at most so many pairs.

    Raises:
        NotStored: the run has no answers, or lacks a sender.
        BadInput: an option has no meaning, no path or more paths than can be tested are asked for,
            or there are too few pairs.
    """
    check_direction(direction)
    n_layers, n_heads = shape_of(store, run)
    sent = sites_of(senders, list(FAMILIES), n_layers)
    from_roles, to_roles = roles_of(from_, BEFORE), roles_of(to, BEFORE)
    received = _receivers(receivers, n_layers)
    check_stored(store, run, sites_read(sent), n_layers)
    ends = _places([site for site in received if site != LOGITS], to_roles, n_heads)
    ends += [Place(LOGITS, None, ANSWERING)] if LOGITS in received else []
    paths = [
        (sender, receiver)
        for sender in _places(sent, from_roles, n_heads)
        for receiver in ends
        if sender.reaches(receiver)
    ]
    if not 0 < len(paths) <= MOST:
        raise BadInput(
            f"got {len(paths)} possible paths, of which 1 to {MOST} can be tested; name other senders, receivers, from or to (-o)"
        )
    chosen, query = pairs_of(store, run, pairs, trees, direction, np.random.default_rng(seed))
    contrast = Contrast(store, run, patch, chosen, sent[0])
    patched = Paths(store, run, patch, contrast, n_layers)
    controls = {sender.part: (sender, receiver) for sender, receiver in paths}
    total, rows, tests = len(paths) + len(controls), [], []
    for done, (sender, receiver) in enumerate(paths, start=1):
        moved, control = (patched.moved(sender, receiver, donor) for donor in ("donor", "same"))
        head = "" if sender.head is None else f" head {sender.head}"
        about = {
            "site": sender.site,
            "token_role": sender.role,
            "label": f"{direction}{head}, to {receiver.named}",
        }
        what = f"the donor's answer by the path to {receiver.named}, beyond a donor with the edited tree's own"
        of_path, test = compared(about, contrast, moved, control, seed, f"{head.strip()}: {what}" if head else what)
        rows += of_path
        tests.append(test)
        progress(done, total, f"{sender.named} to {receiver.named}")
    for done, (part, (sender, receiver)) in enumerate(controls.items(), start=len(paths) + 1):
        moved = patched.moved(sender, receiver, "token_id")
        about = {"site": sender.site, "token_role": sender.role, "label": CONTROL}
        rows.append({**about, "metric": "largest_share", "value": float(np.abs(moved).max()), "n": len(moved)})
        progress(done, total, f"{part} control")
    tests = list(adjusted(tests))
    params = {"run": run, "trees": trees, "senders": sent, "from": from_roles, "receivers": received, "to": to_roles}
    params |= {"direction": direction, "left_out": contrast.n_left_out}
    results = result_rows(
        [*rows, *test_rows(tests)], study=NAME, run=run, query=query, params=params, snapshot=store.snapshot, seed=seed
    )
    return Answer(NAME, as_frame(results), results, sentence(results, tests, contrast.n_left_out), tuple(tests))


def _receivers(wanted: str | Sequence[str], n_layers: int) -> list[str]:
    """The wanted receivers, sites and LOGITS."""
    names = names_in(wanted)
    sites = [name for name in names if name != LOGITS]
    found = sites_of(sites, list(FAMILIES), n_layers) if sites else []
    return [*found, *([LOGITS] if LOGITS in names or names == ["all"] else [])]


def _places(sites: Sequence[str], roles: Sequence[str], n_heads: int) -> list[Place]:
    """Each site, or each of its heads, at each role."""
    heads = {site: range(n_heads) if site.startswith("z.") else [None] for site in sites}
    return [Place(site, head, role) for site in sites for head in heads[site] for role in roles]


class Paths:
    """Both passes of path patching, over pairs of trees.

    Args:
        store: an open store.
        run: the run of the pairs.
        patch: runs edits.
        contrast: the pairs.
        n_layers: layers of the run's model.
    """

    def __init__(self, store: Store, run: str, patch: Patching, contrast: Contrast, n_layers: int) -> None:
        self._store, self._run, self._patch, self._contrast = store, run, patch, contrast
        self._n_layers = n_layers
        self._changes: dict[tuple[Place, str], np.ndarray] = {}

    def moved(self, sender: Place, receiver: Place, donor: str) -> np.ndarray:
        """float64 [n_pairs]: the share that the path moves each edited tree's answer, see Contrast.

        Args:
            donor: `donor`, `same`, or `token_id`, the tree itself.
        """
        tokens = self._contrast.tokens(sender.role)["token_id"]
        rows = _vectors(tokens, self._change(sender, donor))
        first = Edit("from rows", receiver.reads(self._n_layers), "add", tables={"rows": rows})
        if receiver.site == LOGITS:
            return self._contrast.moved([first])
        tokens = self._contrast.tokens(receiver.role)["token_id"]
        X = self._patch.activations(self._run, [first], receiver.site, tokens.to_numpy())
        rows = _vectors(tokens, X if receiver.head is None else X[:, receiver.head], receiver.head)
        return self._contrast.moved([Edit("from rows", receiver.site, tables={"rows": rows})])

    def _change(self, sender: Place, donor: str) -> np.ndarray:
        """float32 [n_tokens, d_model]: what the donor's sender adds, less what the own one adds."""
        if (sender, donor) not in self._changes:
            if len(self._changes) > 3:  # the paths of a sender are asked one after another
                self._changes.clear()
            tokens = self._contrast.tokens(sender.role)
            ids, donors = tokens["token_id"].to_numpy(), tokens[donor].to_numpy()
            added = sites_read([sender.site])[-1]
            own, _ = self._store.read(ids, self._run, added)
            if sender.head is None:
                there, _ = self._store.read(donors, self._run, added)
            else:
                rows = pl.DataFrame({"token_id": ids, "donor_token_id": donors, "head": [sender.head] * len(ids)})
                of_head = Edit("from rows", sender.site, tables={"rows": rows})
                there = self._patch.activations(self._run, [of_head], added, ids)
            self._changes[sender, donor] = there - own
        return self._changes[sender, donor]


def _vectors(tokens: pl.Series, X: np.ndarray, head: int | None = None) -> pl.DataFrame:
    """Rows of an edit: columns token_id, vector and, of a head, head."""
    rows = pl.DataFrame({"token_id": tokens, "vector": pl.Series(X.reshape(len(X), -1)).arr.to_list()})
    return rows if head is None else rows.with_columns(head=pl.lit(head, pl.Int64))


def _named(row: dict[str, Any]) -> tuple[str, str]:
    """Sender and receiver of a row of `results`: `z.0 head 1`, `attn_out.1 at root`."""
    start, _, receiver = row["label"].partition(", to ")
    _, _, head = start.partition(" head ")
    return f"{row['site']} head {head}" if head else row["site"], receiver


def as_frame(results: pl.DataFrame) -> pl.DataFrame:
    """The paths that move most of the answer beyond their control, in percent."""
    by_key = dict(iter(results.group_by("site", "token_role", "label")))
    largest = results.filter(metric="moved_beyond_control").sort("value", descending=True, maintain_order=True)
    moving = largest.filter(pl.col("value") != 0)
    rows = []
    for row in (moving if len(moving) else largest).head(LISTED).iter_rows(named=True):
        of_path = by_key[row["site"], row["token_role"], row["label"]]
        sender, receiver = _named(row)
        rows.append(
            {
                "sender": sender,
                "tokens": row["token_role"],
                "receiver": receiver,
                "Holm": p_shown(of_path.filter(metric="p_holm")["value"].item()),
                "moved beyond it %": percent(row),
            }
        )
    return pl.DataFrame(rows)


def sentence(results: pl.DataFrame, tests: Sequence[Test], n_left_out: int) -> str:
    """How many paths carry the answer, which carries most, and the controls."""
    first, n_pairs = results.row(0, named=True), tests[0].n
    found = sorted((test for test in tests if test.found), key=lambda test: -test.estimate)
    text = (
        f"Over {n_pairs:,} pairs of trees, {len(found)} of {len(tests)} direct paths carry the first step of the donor into run "
        f"{first['run']!r} significantly, beyond a donor with the same first step"
    )
    if found:
        most = found[0]
        sender, receiver = _named({"site": most.site, "label": most.label})
        text += (
            f", most that from {sender} at {most.token_role} to {receiver}: {shown(most)} percent of the logit difference "
            f"({p_shown(most.p_holm)})"
        )
    text += f"; {n_left_out} pairs are left out, whose logit differences are too close."
    own = max(results.filter(metric="largest_share")["value"].to_list())
    text += f" With each tree as its own donor, the share changes by at most {own:.1g} (the control)."
    return f"{text} {adjustment(tests)}"


def plot(answer: Answer) -> Figure:
    """Heat maps, sender's layer × role, of what paths move beyond their control.

    There is a panel per receiver and kind of sender.
    """
    panels_of: dict[tuple[str, str], dict[tuple[int, str], float]] = {}
    marked: set[tuple[str, str, int, str]] = set()
    framed = significant(answer.results, "moved_beyond_control")
    for row in answer.results.filter(metric="moved_beyond_control").iter_rows(named=True):
        sender, receiver = _named(row)
        family, _, rest = sender.partition(".")
        layer, _, head = rest.partition(" ")
        key = receiver, f"{head or FAMILIES[family]}"
        panels_of.setdefault(key, {})[int(layer), row["token_role"]] = row["value"]
        if (row["site"], row["token_role"], row["label"]) in framed:
            marked.add((*key, int(layer), row["token_role"]))
    cells = [cell for panel in panels_of.values() for cell in panel]
    layers = sorted({layer for layer, _ in cells})
    roles = [role for role in BEFORE if role in {role for _, role in cells}]
    senders = list(dict.fromkeys(sender for _, sender in panels_of))
    receivers = list(dict.fromkeys(receiver for receiver, _ in panels_of))  # a receiver's maps, as long, side by side
    order = sorted(panels_of, key=lambda key: (receivers.index(key[0]), senders.index(key[1])))
    held = {key: [layer for layer in layers if layer in {layer for layer, _ in panels_of[key]}] for key in order}
    figure, axes = maps([len(held[key]) for key in order])
    for axis, key in zip(axes, order, strict=True):
        values = [[panels_of[key].get((layer, role)) for role in roles] for layer in held[key]]
        frames = [[(*key, layer, role) in marked for role in roles] for layer in held[key]]
        image = heat(axis, values, frames, roles, held[key], 1.0)
        entitle(axis, f"{key[1]} to {key[0]}")
    colour_bar(figure, image, axes, "logit difference moved beyond the control (%)")
    n = most(answer.results.filter(metric="moved_beyond_control")["n"])
    heading(
        figure,
        "Which direct paths carry the first step",
        f"run {answer.results['run'][0]}; up to {n:,} pairs per cell; {FRAMED}",
    )
    return figure
