"""The folder of a training: its state, kept weights and log."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from safetensors import SafetensorError, safe_open

from actstore.errors import BadInput, NoRoom
from actstore.ingest.models import load
from actstore.ingest.models.config import ModelConfig
from actstore.ingest.models.weights import read_state, replace, save
from actstore.ingest.training.recipe import Recipe, Row
from actstore.storage.local import Local

if TYPE_CHECKING:
    from actstore.ingest.training.learner import Learner

STATE = "state.safetensors"
KEPT = (0, 250, 500, 1000, 2000, 5000)  # steps whose weights are kept, dense where most is learnt


@dataclass(frozen=True)
class TrainingFolder:
    """The folder of one training, with the configuration and recipe of that training."""

    out: Path
    name: str
    config: ModelConfig
    recipe: Recipe

    @property
    def state_path(self) -> Path:
        """Path of the state that a training resumes from."""
        return self.out / STATE

    @property
    def weights_path(self) -> Path:
        """Path of the trained weights."""
        return self.out / f"{self.name}.safetensors"

    @property
    def log_path(self) -> Path:
        """Path of the log, JSON lines."""
        return self.weights_path.with_suffix(".jsonl")

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Lock the folder, and turn file-system errors into the package's errors.

        Raises:
            Busy: another training writes to the folder.
            NoRoom: the disk is full.
            BadInput: the folder cannot be written.
        """
        try:
            (self.out / self.name).mkdir(parents=True, exist_ok=True)
            with Local(self.out).lease():
                yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoRoom(
                    f"no room in {self.out}: {error.strerror}; free some, then run it again to go on"
                ) from error
            if error.filename is None:  # not of a file, but of a pipe, say
                raise
            raise BadInput(f"cannot write {error.filename}: {error.strerror}; name another folder") from error

    def mapping(self) -> Row:
        """The configuration and recipe, as in the YAML."""
        recipe = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self.recipe).items()}
        optimizer = {key: recipe.pop(key) for key in ("lr", "weight_decay")} | {"betas": recipe.pop("betas")}
        top = {
            "random_seed": recipe.pop("seed"),
            "batch_size": recipe.pop("batch_size"),
            "max_iters": recipe.pop("steps"),
        }
        return {**self.config.to_mapping(), "optimizer": optimizer, **top, "training": recipe}

    def resume(self, device: str) -> tuple[Learner, list[Row]]:
        """The learner in its saved state, else a new learner; and the rows of the log so far.

        Raises:
            BadInput: the folder holds a training of another configuration.
        """
        from actstore.ingest.training.learner import Learner

        learner = Learner.new(self.config, self.recipe, device)
        if not self.state_path.exists():
            self._write_config()
            self._write_log([])
            return learner, []
        saved = read_state(self.state_path)
        self._check_same(json.loads(bytes(saved["run"].tolist())))
        learner.restore(saved)
        lines = self.log_path.read_text().splitlines(keepends=True) if self.log_path.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        rows = [row for row in rows if row["step"] <= learner.step]
        self._write_log(rows)
        return learner, rows

    def _check_same(self, saved: Row) -> None:
        mine = _flat(self.mapping())
        for key, value in _flat(saved).items():
            if mine.get(key) != value:
                raise BadInput(
                    f"{self.out} holds a training with {key} {value}, and this one has {mine.get(key)}: "
                    "name another folder, or the configuration it was started with"
                )

    def save_state(self, learner: Learner) -> None:
        """Save the state that a training resumes from."""
        import torch

        content = json.dumps(self.mapping()).encode()
        save({**learner.state(), "run": torch.tensor(list(content), dtype=torch.uint8)}, self.state_path)

    def keep(self, learner: Learner) -> None:
        """Save the weights in float16, if this step is one of KEPT."""
        path = load.checkpoint_path(self.weights_path, learner.step)
        if learner.step in KEPT and learner.step < self.recipe.steps and not path.exists():
            save({name: value.detach().half() for name, value in learner.params.items()}, path)

    def finish(self, learner: Learner) -> Path:
        """Save YAML and trained weights; return the path of the weights."""
        self._write_config()
        save(learner.params, self.weights_path)
        return self.weights_path

    def _write_config(self) -> None:
        replace(self.weights_path.with_suffix(".yaml"), yaml.safe_dump(self.mapping(), sort_keys=False).encode())

    def log(self, row: Row) -> None:
        """Append a row to the log."""
        with self.log_path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def _write_log(self, rows: list[Row]) -> None:
        replace(self.log_path, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def last_good(self) -> str:
        """The step that the folder holds, in words."""
        step = kept_step(self.out)
        if step is None:
            return f"nothing good is in {self.out} yet"
        return f"the last good state is step {step} in {self.out}"


def kept_step(out: Path) -> int | None:
    """The step from which a training in this folder would resume; None for a fresh start."""
    with suppress(OSError, SafetensorError), safe_open(out / STATE, "numpy") as state:
        return int(state.get_tensor("step"))
    return None


def _flat(mapping: Row, prefix: str = "") -> Row:
    """Nested keys joined by dots: {'model.d_model': 128, …}."""
    flat: Row = {}
    for key, value in mapping.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
