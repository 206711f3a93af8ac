"""Continuations of text, compared with a loop of forward passes over one sequence at a time."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import actstore
from actstore.cli import main
from actstore.errors import BadInput
from actstore.store import Store
from tests import tiny_models

TEXTS = ["the cat sat on", "the dog", "the mat and the dog ran to the cat " * 6, "the"]
N_NEW, SAMPLES = 5, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("continued")
    tiny_models.llama(folder / "model", max_position_embeddings=32)
    (folder / "notes.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    actstore.ingest(
        folder / "s.act", str(folder / "model"), text=str(folder / "notes.jsonl"), continued=N_NEW, samples=SAMPLES
    )
    return folder


def test_each_token_is_what_the_model_gives_after_those_before_it(folder: Path) -> None:
    with Store(folder / "s.act") as store:
        [run] = store.runs()
        bridge, eos = store.model(), 0
        sequences = store.sql(
            "select sequence_id, list(number order by position) as ids from tokens group by all order by 1"
        )
        generated = store.sql(
            "select sequence_id, sample, position, v.number, p, p_best from generations g "
            "join vocabularies v on v.token = g.token::varchar order by 1, 2, 3"
        )
        assert (run, store.sql("select prompt, samples from runs").row(0)) == ("model-continued", ("text", SAMPLES))
    lengths, fewer = [], 0
    for sequence, prompt in sequences.iter_rows():
        for sample in range(SAMPLES + 1):
            rows = generated.filter(sequence_id=sequence, sample=sample)
            ids = list(prompt)
            seed = np.random.SeedSequence([sequence, sample, *b"generations"])
            draws = np.random.Generator(np.random.PCG64DXSM(seed)).random(N_NEW)
            for place, (position, number, p, p_best) in enumerate(
                rows.select("position", "number", "p", "p_best").iter_rows()
            ):
                with torch.no_grad():
                    given = torch.softmax(bridge(torch.tensor([ids]))[0, -1].double(), -1).numpy()
                assert position == len(ids)
                assert p == pytest.approx(given[number], abs=1e-5)
                assert p_best == pytest.approx(given.max(), abs=1e-5)
                if sample == 0:
                    assert given[number] >= given.max() - 1e-6
                else:
                    ends = given.cumsum()
                    assert ends[number] - given[number] - 1e-5 <= draws[place] <= ends[number] + 1e-5
                ids.append(number)
            n = len(ids) - len(prompt)
            assert n == N_NEW or ids[-1] == eos or len(ids) == 32
            lengths.append(n)
            fewer += len(ids) == 32 and n < N_NEW
    assert N_NEW in lengths
    assert fewer, "no sequence reaches the context, so nothing is tested of its end"


def test_they_are_verified_repaired_and_computed_again(folder: Path, tmp_path: Path) -> None:
    import shutil

    root = Path(shutil.copytree(folder / "s.act", tmp_path / "s.act"))
    told = []
    report = actstore.verify(
        root, recompute=3, progress=lambda *what: nullcontext(lambda *done: told.append((*what, *done)))
    )
    of_rerun = [(unit, done, total) for name, _, unit, done, total, *_ in told if name == "recompute"]
    assert (of_rerun[0], of_rerun[-1]) == (("sequences", 0, 3), ("sequences", 3, 3))
    assert [(found.what, found.agrees, found.n > 0) for found in report.differences] == [("generations", True, True)]
    [part] = (root / "parts" / "generations").glob("*.parquet")
    content = part.read_bytes()
    part.unlink()
    (root / "catalog.duckdb").unlink()
    assert not actstore.repair(root).left
    assert part.read_bytes() == content
    assert not actstore.verify(root).damage


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"continued": 0}, "got --continue 0; a continuation has 1 to"),
        ({"continued": 3, "sites": "embed"}, "got --continue and --sites"),
        ({"continued": 3, "top": 2}, "got --continue and --top"),
        ({"samples": 2}, "ask for them with --continue N"),
        ({"continued": 3, "samples": 256}, "there are 0 to 255"),
    ],
)
def test_what_has_no_meaning_is_refused(folder: Path, tmp_path: Path, options: dict[str, object], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        actstore.ingest(tmp_path / "s.act", str(folder / "model"), text=str(folder / "notes.jsonl"), **options)
    assert not (tmp_path / "s.act").exists()


def test_trees_are_continued_by_another_option(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="got --continue, which is of text"):
        actstore.ingest(tmp_path / "s.act", "reproduction", trees=5, continued=3)


def test_the_command_continues_a_stored_set(folder: Path) -> None:
    words = ["ingest", str(folder / "s.act"), "--model", str(folder / "model"), "--dataset", "notes"]
    done = CliRunner().invoke(main, [*words, "--continue", "2", "--samples", "0", "--run", "two"])
    assert done.exit_code == 0, done.output
    with Store(folder / "s.act") as store:
        counted = store.of("two").sql(
            "select sample, max(n) as n from (select sample, count(*) as n from generations "
            "group by sequence_id, sample) group by sample"
        )
        assert counted.rows() == [(0, 2)]
        with_room = store.sql("select count(*) from sequences where n_tokens < 32").item()
        assert store.info().filter(run="two")["sequences"].item() == with_room
