"""What is looked at before anything heavy is imported: a mistake in a command is told at once, and so is the list of models."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from actstore.queries.study import STUDIES

HEAVY = ("torch", "transformers", "transformer_lens", "sklearn", "scipy", "matplotlib")
RUN = """
import json, sys
from click.testing import CliRunner
from actstore.cli import main

found = []
for arguments in json.loads(sys.argv[1]):
    result = CliRunner().invoke(main, arguments)
    imported = [name for name in json.loads(sys.argv[2]) if name in sys.modules]
    found.append([arguments, type(result.exception).__name__, result.stderr or str(result.exception), imported])
    if imported:
        break
print(json.dumps(found))
"""


def ran(*commands: list[str]) -> list[list]:
    """Each command's arguments, how it ended, what it said and what of HEAVY it imported, to the first that imported any."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(commands), json.dumps(HEAVY)], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


INGEST = ["ingest", "STORE", "--model", "reproduction"]
MISTAKES = [
    ["ingest", "STORE", "--model", "reproductoin"],
    ["ingest", "STORE", "--model", "gpt2"],
    ["ingest", "STORE", "--model", "missing.pt"],
    [*INGEST, "--config", "missing.yaml"],
    [*INGEST, "--checkpoint", "123"],
    [*INGEST, "--trees", "0"],
    [*INGEST, "--trees", "1e4"],
    [*INGEST, "--trees", "-5"],
    [*INGEST, "--nodes", "99"],
    [*INGEST, "--nodes", "17"],
    [*INGEST, "--seed", "-1"],
    [*INGEST, "--distribution", "shallow"],
    [*INGEST, "--distribution", "deep", "--depths", "0"],
    [*INGEST, "--depths", "5-3"],
    [*INGEST, "--sites", "resid_pots"],
    [*INGEST, "--sites", "resid_post.9"],
    [*INGEST, "--sites", "embed", "--run", "../up"],
    [*INGEST, "--trees", "41"],
    [*INGEST, "--dataset", "nope", "--variant", "swap_last"],
    [*INGEST, "--prompt", "forest"],
    [*INGEST, "--prompt", "tree", "--samples", "300"],
    [*INGEST, "--samples", "3"],
    [*INGEST, "--device", "abacus"],
    [*INGEST, "--batch-size", "0"],
    [*INGEST, "--modle", "reproduction"],
    ["ingest", "FILE", "--model", "reproduction"],
    ["train", "reproductoin", "OUT"],
    ["train", "reproduction", "OUT", "--steps", "0"],
    ["train", "reproduction", "OUT", "--nodes", "99"],
    ["train", "reproduction", "OUT", "--device", "abacus"],
    ["train", "reproduction", "OUT", "--grade", "0"],
    ["train", "reproduction", "FILE/out"],
    ["evaluate", "reproductoin"],
    ["evaluate", "reproduction", "--checkpoint", "3"],
    ["evaluate", "reproduction", "--distribution", "shallow"],
    ["evaluate", "reproduction", "--trees", "0"],
    ["evaluate", "reproduction", "--nodes", "17"],
    ["evaluate", "reproduction", "--seed", "42"],
    ["evaluate", "reproduction", "--device", "abacus"],
    ["models", "add", "mine", "missing.pt"],
    ["models", "add", "a/b", "missing.pt"],
    ["study", "STORE", "probs"],
    ["study", "STORE", "depth", "--run", "reproductoin"],
    *(["study", "STORE", study, "-o", "rum", "1"] for study in STUDIES),
    ["read", "STORE", "select token_id from tokens", "--site", "resid_pots"],
    ["query", "STORE", "acuracy_by_depth"],
    ["attention", "STORE", "1", "--run", "reproductoin", "--out", "x.png"],
    ["verify", "MISSING"],
    ["repair", "MISSING"],
    ["show", "STORE", "4711"],
    ["info", "MISSING"],
]


def test_a_mistake_is_told_before_anything_heavy_is_imported(demo_path, tmp_path):
    (tmp_path / "file").write_text("no store")
    places = {"STORE": demo_path, "OUT": tmp_path / "out", "FILE": tmp_path / "file", "FILE/out": tmp_path / "file/out"}
    places["MISSING"] = tmp_path / "missing.act"
    commands = [[str(places.get(argument, argument)) for argument in arguments] for arguments in MISTAKES]
    for arguments, ended, said, imported in ran(*commands):
        assert ended == "SystemExit", f"{' '.join(arguments)}: {ended} {said}"
        assert not imported, f"{' '.join(arguments)} imported {imported} before it said {said}"


@pytest.mark.parametrize("flag", ["--csv", "--json"])
def test_listing_models_imports_nothing_heavy(flag):
    ((_, ended, _, imported),) = ran(["models", "list", flag])
    assert (ended, imported) == ("NoneType", [])


THREADS = """
import sys
import numpy as np
from threadpoolctl import threadpool_info
from actstore.queries.probes import fit

X, y = np.arange(8.0).reshape(4, 2), np.arange(4) % 2
fit.fit_all([(fit.Whitening.of(X)(X), y)], np.ones(4, bool))
assert not {"sklearn", "scipy", "torch"} & set(sys.modules)
fit.fit_with_ones = lambda *_: threadpool_info()
(limited,) = fit.fit_all([(X, y)], np.ones(4, bool))
blas = lambda libraries: [library["num_threads"] for library in libraries if library["user_api"] == "blas"]
assert blas(limited) == [1]
assert blas(threadpool_info()) == [2]
"""


def test_a_fit_needs_numpy_alone_on_one_thread_of_blas():
    subprocess.run(
        [sys.executable, "-c", THREADS],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"},
    )
