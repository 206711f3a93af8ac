"""Names of runs and datasets, and the folders in which models are found by name."""

from __future__ import annotations

import os
import re
from importlib import resources
from pathlib import Path

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=,+-]{0,99}")  # a run's and a dataset's name is also a folder's


SHIPPED = Path(str(resources.files("actstore.data")))


def own_folder() -> Path:
    """The folder in which `add` puts a model by default; its models are found from anywhere.

    It is $ACTSTORE_MODELS, or the user's own folder.
    """
    told = os.environ.get("ACTSTORE_MODELS")
    return Path(told).expanduser() if told else _user_folder()


def _user_folder() -> Path:
    data = os.environ.get("XDG_DATA_HOME", "")  # absolute, or to be ignored: the XDG base directory specification
    return Path(data if os.path.isabs(data) else "~/.local/share").expanduser() / "actstore" / "models"


def folders() -> list[Path]:
    """The folders in which models are looked up by name, nearest first."""
    told = [own_folder()] if os.environ.get("ACTSTORE_MODELS") else []
    return [*told, Path("data/checkpoints"), _user_folder(), SHIPPED / "checkpoints"]


def by_name() -> dict[str, Path]:
    """Files of all models, by name, as seen from the working folder."""
    found: dict[str, Path] = {}
    for folder in folders():
        for path in sorted(folder.glob("[!.]*.safetensors")):
            found.setdefault(path.stem, path)
    return dict(sorted(found.items()))


def available() -> list[str]:
    """Names of the models that `load` knows."""
    return list(by_name())
