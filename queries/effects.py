"""The effect of edits on a run's answers: accuracy lost and log-loss gained, paired over trees.

Each step that the edited run predicts is compared with the same step of the base run. An effect is
tested beyond a control, which is an edit of the same size: the steps' changes under the edit, less
those under the control, with the trees' signs flipped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from actstore.intervals import bootstrap, share_over_trees, sign_flip
from actstore.queries.depth import unanswered
from actstore.queries.study import Test

if TYPE_CHECKING:
    from actstore.interventions import Edit, Patching
    from actstore.store import Store

BASE = "select token_id, correct, p_target from predictions where run = $run order by token_id"
LEAST_P = 1e-30  # a smaller probability counts as this one, so that no loss is infinite
ROUNDING = 1e-6  # share of a loss, which is computed in float32
MEASURES = {"accuracy": "accuracy lost", "loss": "log-loss gained"}


@dataclass(frozen=True)
class Effect:
    """What edits change at each predicted step.

    Attributes:
        trees: int64 [n], the tree of each step, by token.
        changes: measure → float64 [n]: `accuracy` lost (-1 to 1) and `loss` gained (nats).
    """

    trees: np.ndarray
    changes: Mapping[str, np.ndarray]

    @classmethod
    def mean(cls, effects: Sequence[Effect]) -> Effect:
        """The mean of effects at the same steps."""
        changes = {name: np.mean([effect.changes[name] for effect in effects], axis=0) for name in MEASURES}
        return cls(effects[0].trees, changes)

    def less(self, control: Effect) -> Effect:
        """The effect beyond that of a control, which edits the same trees."""
        return Effect(self.trees, {name: self.changes[name] - control.changes[name] for name in MEASURES})

    def rows(self, metric: str, seed: int, **about: Any) -> list[dict[str, Any]]:
        """Rows of `results`, one per measure: the mean change with its interval over trees."""
        return [
            {**about, "metric": f"{name}_{metric}", **_mean(name, changes, self.trees, seed), "n": len(changes)}
            for name, changes in self.changes.items()
        ]

    def tests(self, rows: Sequence[Mapping[str, Any]], seed: int, what: str, control: str) -> list[Test]:
        """Test the mean of each measure.

        Args:
            rows: of this effect, see `rows`.
            seed: seed of the sign flips.
            what: what the edits do, in words.
            control: what the effect has to exceed.
        """
        tests = []
        for row, (name, changes) in zip(rows, self.changes.items(), strict=True):
            by_tree = np.bincount(np.unique(self.trees, return_inverse=True)[1], weights=changes)
            label = row["label"] if name == "accuracy" else f"{row['label']}, loss"
            unit = "" if name == "accuracy" else " in nats"
            said = f"{MEASURES[name]}{unit} {what}, beyond {control}"
            points = name == "accuracy"
            p = sign_flip(by_tree, seed)
            tests.append(Test.of({**row, "label": label}, p, said, exceeds=f"that of {control}", points=points))
        return tests


def _mean(name: str, changes: np.ndarray, trees: np.ndarray, seed: int) -> dict[str, float | None]:
    """Mean and interval: of shares as of other changes, of losses by bootstrap over trees."""
    if name == "accuracy":
        low, high = share_over_trees(changes, trees, seed)
        return {"value": float(changes.mean()), "low": low, "high": high}
    _, tree = np.unique(trees, return_inverse=True)
    sums, counts = np.bincount(tree, weights=changes), np.bincount(tree)
    low, high = bootstrap(lambda drawn: (drawn @ sums) / (drawn @ counts), len(sums), seed)
    apart = high - low > ROUNDING * max(abs(low), abs(high))  # trees that all agree give no interval
    return {"value": float(changes.mean()), "low": low if apart else None, "high": high if apart else None}


class Effects:
    """Runs edits, and compares their answers with those of the base run.

    Args:
        store: an open store.
        run: the base run.
        patch: runs the edits.

    Raises:
        NotStored: the run has no answers, see `depth.unanswered`.
    """

    def __init__(self, store: Store, run: str, patch: Patching) -> None:
        self._run, self._patch = run, patch
        self.base = store.sql(BASE, {"run": run})
        if not len(self.base):
            raise unanswered(store, run)

    def of(self, edits: Sequence[Edit]) -> Effect:
        """The effect of edits, at the steps of all edited trees."""
        edited = self._patch(self._run, edits).sort("token_id")
        both = edited.join(self.base, on="token_id", suffix="_base", maintain_order="left")
        right = {side: both[f"correct{side}"].to_numpy().astype(np.float64) for side in ("", "_base")}
        loss = {side: -np.log(both[f"p_target{side}"].to_numpy().astype(np.float64).clip(LEAST_P)) for side in right}
        changes = {"accuracy": right["_base"] - right[""], "loss": loss[""] - loss["_base"]}
        return Effect(both["tree_id"].to_numpy(), changes)
