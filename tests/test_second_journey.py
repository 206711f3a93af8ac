"""The README's journey with a text file and a language model, as written; with a tiny model in the place of the large one."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from actstore.store import Store
from tests import tiny_models

README = Path(__file__).parents[1] / "README.md"
NAMES = {"person": ("Ada Lovelace", "Alan Turing", "Grace Hopper"), "place": ("Paris", "London", "Rome")}


def commands() -> str:
    text = README.read_text()
    after = text[text.index("A second journey begins") :]
    return "\n".join(
        line[4:] for line in re.search(r"(?:^(?: {4}.*)?\n)+", after[after.index("\n    ") + 1 :], re.M)[0].splitlines()
    )


def sentences(first_row: int, n: int) -> tuple[list[str], list[str]]:
    """Lines of notes.jsonl and names.jsonl: a person and a place in each of n sentences."""
    notes, names = [], []
    for i in range(n):
        person, place = NAMES["person"][i % 3], NAMES["place"][i // 3 % 3]
        said = f"{person} saw the number {i} in {place}."
        notes.append(json.dumps({"text": said}))
        for label, word in (("person", person), ("place", place)):
            start = said.index(word)
            row = {"dataset": "notes", "row": first_row + i, "start": start, "end": start + len(word), "label": label}
            names.append(json.dumps(row))
    return notes, names


@pytest.mark.skipif(sys.platform == "win32", reason="the commands are a shell's")
def test_the_second_journey_works_as_written(tmp_path: Path) -> None:
    tiny_models.llama(tmp_path / "model")
    script = commands()
    assert script.count("actstore ") == 4
    script = re.sub(r"^MODEL=.*$", f"MODEL={tmp_path}/model", script, flags=re.M)
    notes, names = sentences(1, 60)
    (tmp_path / "more-notes").write_text("\n".join(notes) + "\n")
    (tmp_path / "more-names").write_text("\n".join(names) + "\n")
    more = "cat more-notes >> notes.jsonl; cat more-names >> names.jsonl"
    script, n = re.subn(r"^# … a hundred more sentences$", more, script, flags=re.M)
    assert n == 1
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euc", script],
        cwd=tmp_path,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    with Store(tmp_path / "text.act") as store:
        assert store.sql("select count(distinct sequence_id) from names join tokens using (token_id)").item() == 61
        info = store.info().row(0, named=True)
        assert (info["sequences"], info["planned"], info["dataset_tokens"] > 0) == (61, 61, True)
        assert store.sql("select count(*) from results where study = 'probe'").item() > 0
