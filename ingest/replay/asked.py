"""What `verify --recompute` will run, known before a model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from actstore.store import Store


@dataclass(frozen=True)
class Reruns:
    """How much of each run is run again.

    Attributes:
        n_of: run → number of its sequences.
        models: names of the runs' models, each once.
        unit: trees, or sequences where some are of text.
    """

    n_of: dict[str, int]
    models: list[str]
    unit: str

    @property
    def n(self) -> int:
        """Sequences of all runs together."""
        return sum(self.n_of.values())

    def __str__(self) -> str:
        """One line for a person to read."""
        run = f"run {next(iter(self.n_of))}" if len(self.n_of) == 1 else f"{len(self.n_of)} runs"
        models = f"model{'s' * (len(self.models) > 1)} {', '.join(self.models)}"
        return f"recompute: if the files are whole, {self.n:,} {self.unit} of {run} go through the {models} again"


def planned(path: str | Path, n_sequences: int) -> Reruns:
    """How much a rerun of n sequences of each run comes to; of a shorter run it is all.

    Raises:
        NotStored, Damaged, TooOld, TooNew: the store cannot be opened.
    """
    query = "select run, model, n_trees is null from runs join models using (weights_sha256) order by runs.rowid"
    with Store(path) as store:
        held = {row["run"]: int(row["sequences"]) for row in store.info_rows().dicts()}
        runs = list(store.rows(query))
    n_of = {str(run): min(n_sequences, held[str(run)]) for run, _, _ in runs}
    models = list(dict.fromkeys(str(model) for _, model, _ in runs))
    return Reruns(n_of, models, "sequences" if any(of_text for _, _, of_text in runs) else "trees")
