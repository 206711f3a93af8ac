"""Edits that have no meaning: one line says what was got, what there is and what to do; and nothing is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from click.testing import CliRunner, Result

import actstore
from actstore.cli import main
from actstore.errors import BadInput
from actstore.ingest.interventions.change import without_directions
from actstore.ingest.jobs.job import Ingest
from actstore.ingest.jobs.local import execute
from actstore.ingest.jobs.patched import patching
from actstore.ingest.trees.task import TreeSet
from actstore.interventions import Edit
from actstore.store import Store
from tests.stores import committed_files
from tests.test_advice import advised_commands
from tests.test_interventions import tiny

ROOTS = "from tokens where role = 'root'"
SITES = ["embed", "resid_post", "z.1", "pattern.1"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs `base`; `other`, of other trees; `dreams`, of continuations; `half`, stopped after a batch. Not to be changed."""
    root = tmp_path_factory.mktemp("refused") / "s.act"
    trees = [TreeSet("deep", 6, seed, n_nodes=6, name=f"d{seed}", trees_per_shard=3) for seed in range(3)]
    execute(Ingest(root, tiny(), trees[0], "base", SITES))
    execute(Ingest(root, tiny(), trees[1], "other", ["embed"]))
    execute(Ingest(root, tiny(), trees[0], "dreams", prompt="tree"))

    def stop(done: int, total: int) -> None:
        if done > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(Ingest(root, tiny(), trees[2], "half", ["embed"]), stop)
    return root


def ran(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def patched(store: Path, query: str, at: str, *more: object) -> Result:
    return ran("ingest", store, "--base", "base", "--patch", query, "--at", at, *more)


REFUSED = {  # what is said → the query, the site, further words
    "yields position and no token_id": (f"select position {ROOTS}", "embed", "--how", "zero"),
    "the query yields no row": (f"select token_id {ROOTS} and false", "embed", "--how", "zero"),
    "token_id is String; it must be an integer": (
        f"select token_id::varchar as token_id {ROOTS}",
        "embed",
        "--how",
        "zero",
    ),
    "1 of 6 values of the query's token_id are NULL": (
        f"select nullif(token_id, 17) as token_id {ROOTS}",
        "embed",
        "--how",
        "zero",
    ),
    "names 6 tokens twice, the first 17;": (
        f"select token_id {ROOTS} union all select token_id {ROOTS}",
        "embed",
        "--how",
        "zero",
    ),
    "names 6 tokens and head twice": (
        f"select token_id, 1 as head {ROOTS} union all select token_id, 1 {ROOTS}",
        "z.1",
        "--how",
        "zero",
    ),
    "6 of 6 token ids of the edits are of no token that run 'base' has, the first": (
        "select token_id from store.main.tokens where role = 'root' and dataset = 'd1'",
        "embed",
        "--how",
        "zero",
    ),
    "are of no token that run 'base' has, the first 23;": ("select 23 as token_id", "embed", "--how", "zero"),
    "and no donor_token_id or vector; --how replace needs": (f"select token_id {ROOTS}", "embed"),
    "yields both donor_token_id and vector": (
        f"select token_id, token_id as donor_token_id, [1.0] as vector {ROOTS}",
        "embed",
    ),
    "yields vector, which has no meaning with --how zero": (
        f"select token_id, [1.0] as vector {ROOTS}",
        "embed",
        "--how",
        "zero",
    ),
    "vectors of 3 numbers, and embed has 16; give": (f"select token_id, [1.0, 2, 3] as vector {ROOTS}", "embed"),
    r"vectors of 3 numbers, and embed has 16 \(or several vectors": (
        f"select token_id, [1.0, 2, 3] as vector {ROOTS}",
        "embed",
        "--how",
        "project",
    ),
    "vectors of 16 numbers, and z.1 has 8; give": (
        f"select token_id, 1 as head, list_resize([1.0], 16, 0.0) as vector {ROOTS}",
        "z.1",
    ),
    "vectors of several lengths": (
        f"select token_id, list_resize([1.0], if(token_id = 17, 16, 32), 0.0) as vector {ROOTS}",
        "embed",
        "--how",
        "project",
    ),
    "vector are NULL or too large": (
        f"select token_id, if(token_id = 17, null, list_resize([1.0], 16, 0.0)) as vector {ROOTS}",
        "embed",
    ),
    "vectors with NULL, NaN or infinity": (
        f"select token_id, list_resize([if(token_id = 17, 'nan'::float, 1.0)], 16, 0.0) as vector {ROOTS}",
        "embed",
    ),
    "with NULL, NaN or infinity; leave": (f"select token_id, list_resize([1.0], 16) as vector {ROOTS}", "embed"),
    "vector is List\\(List": (f"select token_id, [list_resize([1.0], 16, 0.0)] as vector {ROOTS}", "embed"),
    "vector is Struct": (f"select token_id, {{'a': 1}} as vector {ROOTS}", "embed"),
    "vector is List\\(Date\\); it must be numbers": (
        f"select token_id, list_resize([current_date], 16, current_date) as vector {ROOTS}",
        "embed",
    ),
    "vector is List\\(Boolean": (f"select token_id, list_resize([true], 16, true) as vector {ROOTS}", "embed"),
    "two columns named vector; rename": (
        f"select token_id, list_resize([1.0], 16, 0.0) as vector, list_resize([2.0], 16, 0.0) as vector {ROOTS}",
        "embed",
    ),
    "two columns named token_id; rename": (f"select token_id, token_id {ROOTS}", "embed", "--how", "zero"),
    "yields group, which has no meaning with --how zero": (
        f'select token_id, tree_id as "group" {ROOTS}',
        "embed",
        "--how",
        "zero",
    ),
    "a vector of zeros, which has no direction, at token_id 17;": (
        f"select token_id, list_resize([if(token_id = 17, 0.0, 1.0)], 16, 0.0) as vector {ROOTS}",
        "embed",
        "--how",
        "project",
    ),
    "got --donors, and no query yields donor_token_id": (
        f"select token_id {ROOTS}",
        "embed",
        "--how",
        "zero",
        "--donors",
        "base",
    ),
    "got --donor-site, and no query yields donor_token_id": (
        f"select token_id {ROOTS}",
        "embed",
        "--how",
        "zero",
        "--donor-site",
        "embed",
    ),
    "got an empty name for --run": (f"select token_id {ROOTS}", "embed", "--how", "zero", "--run", ""),
    "none stands alone": (f"select token_id {ROOTS}", "embed", "--how", "zero", "--sites", "none,embed"),
    "got device 'cuda:99'": (f"select token_id {ROOTS}", "embed", "--how", "zero", "--device", "cuda:99"),
    "vector is Decimal": (f"select token_id, 1.5 as vector {ROOTS}", "embed"),
    "yields vectors for pattern.1; a pattern is": (f"select token_id, [1.0] as vector {ROOTS}", "pattern.1"),
    "--how mean at a pattern": (f"select token_id {ROOTS}", "pattern.1", "--how", "mean"),
    "site embed has none; leave the column out": (f"select token_id, 0 as head {ROOTS}", "embed", "--how", "zero"),
    "heads that site z.1 does not have; it has 0 to 1": (f"select token_id, 2 as head {ROOTS}", "z.1", "--how", "zero"),
    "--how knockout at embed": (f"select token_id, token_id as key_token_id {ROOTS}", "embed", "--how", "knockout"),
    "6 of 6 keys are no token that the edited one attends to, the first 18": (
        f"select token_id, token_id + 1 as key_token_id {ROOTS}",
        "pattern.0",
        "--how",
        "knockout",
    ),
    "1 of 2 keys are no token that the edited one attends to, the first 1;": (
        f"select token_id, if(token_id = 17, 17, 1) as key_token_id {ROOTS} and tree_id < 2",
        "pattern.0",
        "--how",
        "knockout",
    ),
    "6 donors stand at another position": (
        f"select token_id, token_id - 1 as donor_token_id {ROOTS}",
        "pattern.1",
    ),
    "run 'base' is \\[16\\], and z.1 has \\[2, 8\\]": (
        f"select token_id, token_id as donor_token_id {ROOTS}",
        "z.1",
        "--donor-site",
        "embed",
    ),
    "--how replce": (f"select token_id {ROOTS}", "embed", "--how", "replce"),
    "which are 3 sites, resid_post.0 to resid_post.2; an edit is at one": (
        f"select token_id {ROOTS}",
        "resid_post",
        "--how",
        "zero",
    ),
    "resid_past.1": (f"select token_id {ROOTS}", "resid_past.1", "--how", "zero"),
    "cannot read the query 'gone.sql'": ("gone.sql", "embed"),
    "the name 'a/b'": (f"select token_id {ROOTS}", "embed", "--how", "zero", "--run", "a/b"),
    "run 'base' is stored, and holds no edits; name the new run otherwise": (
        f"select token_id {ROOTS}",
        "embed",
        "--how",
        "zero",
        "--run",
        "base",
    ),
    "--answers none": (f"select token_id {ROOTS}", "embed", "--how", "zero", "--answers", "none"),
    "batch size of 0": (f"select token_id {ROOTS}", "embed", "--how", "zero", "--batch-size", "0"),
}


@pytest.mark.parametrize("said", REFUSED)
def test_an_edit_without_a_meaning_is_refused_in_one_line(store: Path, said: str):
    before = committed_files(store)
    done = patched(store, *REFUSED[said])
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(done.stderr)
    assert done.exit_code == 2
    assert len(done.stderr.splitlines()) == 1
    assert committed_files(store) == before


NOT_STORED = {
    "no run 'bose'": ["--base", "bose"],
    "of no tree of this run": ["--base", "base", "--donors", "other", "--donor-site", "embed"],
    "no run 'elsewhere'": ["--base", "base", "--donors", "elsewhere"],
    "no run ''": ["--base", "base", "--donors", ""],
    "holds no site ''": ["--base", "base", "--donor-site", ""],
}


@pytest.mark.parametrize("said", NOT_STORED)
def test_what_is_not_stored_is_said(store: Path, said: str):
    query = f"select token_id, token_id as donor_token_id {ROOTS}"
    done = ran("ingest", store, "--patch", query, "--at", "embed", *NOT_STORED[said])
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(done.stderr)
    assert (done.exit_code, len(done.stderr.splitlines())) == (1, 1)


def test_a_base_with_edits_is_refused_and_names_its_own_base(store: Path, tmp_path: Path):
    copied = actstore.copy(store, tmp_path / "s.act", ["base"]).out
    words = [
        "ingest",
        copied,
        "--patch",
        f"select token_id {ROOTS}",
        "--at",
        "blocks.1.hook_resid_post",
        "--how",
        "zero",
    ]
    assert ran(*words, "--base", "base").exit_code == 0
    with Store(copied) as opened:
        assert opened.runs() == ["base", "base-zero-resid_post.1"]
    before = committed_files(copied)
    refused = ran(*words, "--base", "base-zero-resid_post.1", "--run", "twice")
    assert (refused.exit_code, len(refused.stderr.splitlines())) == (2, 1)
    assert "holds edits of run 'base', which a new run would not have; name 'base' (--base)" in refused.stderr
    assert committed_files(copied) == before


def test_directions_that_depend_on_others_take_nothing_more_away():
    x, v = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32))
    once = without_directions(x, v)
    torch.testing.assert_close(without_directions(x, torch.cat([v, 2 * v], 1)), once)
    torch.testing.assert_close((once * v).sum(1), torch.zeros(3), atol=1e-5, rtol=0)
    two = without_directions(x, torch.cat([v, v.flip(1)], 1))
    torch.testing.assert_close(without_directions(x, torch.cat([v, v, v.flip(1)], 1)), two)


def test_a_donor_that_is_padding_is_refused(store: Path):
    with Store(store) as opened:
        ends = opened.of("base").sql(
            "select tree_id, max(position) as last from tokens group by 1 order by 2, 1 limit 1"
        )
        padding = 256 * ends["tree_id"].item() + ends["last"].item() + 1
    done = patched(store, f"select token_id, {padding} as donor_token_id {ROOTS} and tree_id = 1", "embed")
    assert (done.exit_code, len(done.stderr.splitlines())) == (1, 1)
    assert f"{padding}" in done.stderr
    assert "padding, past its tree's last token" in done.stderr
    later = (
        f"select token_id, if(tree_id = 1, {padding}, token_id) as donor_token_id {ROOTS}"  # found as the last of all
    )
    assert "padding, past its tree's last token" in patched(store, later, "embed").stderr
    with Store(store) as opened, pytest.raises(actstore.NotStored, match="padding, past"):
        patching(opened)("base", [Edit(later, "embed")])


@pytest.mark.parametrize(
    ("run", "said"), [("dreams", "holds continuations"), ("half", "1 of 2 batches are stored; finish it first")]
)
def test_a_base_that_is_no_finished_run_over_tasks_is_refused(store: Path, run: str, said: str):
    done = ran("ingest", store, "--base", run, "--patch", f"select token_id {ROOTS}", "--at", "embed", "--how", "zero")
    assert (done.exit_code, len(done.stderr.splitlines())) == (2, 1)
    assert said in done.stderr
    with Store(store) as opened, pytest.raises(BadInput, match=said):
        patching(opened)(run, [Edit(f"select token_id {ROOTS}", "embed", "zero")])


def test_donors_at_a_site_that_is_not_there_are_had_by_the_command_that_is_advised(store: Path, tmp_path: Path):
    copied = actstore.copy(store, tmp_path / "s.act").out
    words = f"select token_id, token_id as donor_token_id {ROOTS}", "resid_mid.1", "--run", "x"
    refused = patched(copied, *words)
    assert refused.exit_code == 1
    (command,) = advised_commands(refused.stderr)
    assert command[-4:] == ["--run", "base", "--sites", "resid_mid.1"]
    assert ran(*command).exit_code == 0
    done = patched(copied, *words)
    assert done.exit_code == 0, done.output
    with Store(copied) as opened:
        apart = opened.sql(
            "select max(abs(a.p_target - b.p_target)) from predictions a join predictions b using (token_id) "
            "where a.run = 'base' and b.run = 'x'"
        ).item()
        assert apart < 1e-4  # each tree is its own donor
    (command,) = advised_commands(done.stdout)
    assert ran(*command).exit_code == 0
    grouped = patched(copied, f"select token_id {ROOTS}", "resid_mid.2", "--how", "mean")
    (command,) = advised_commands(grouped.stderr)  # a mean, too, is of stored activations
    assert ran(*command).exit_code == 0
    assert patched(copied, f"select token_id {ROOTS}", "resid_mid.2", "--how", "mean").exit_code == 0


def test_donors_of_another_run_at_a_site_that_it_lacks_are_had_by_the_command_that_is_advised(
    store: Path, tmp_path: Path
):
    copied = actstore.copy(store, tmp_path / "s.act").out
    theirs = "(select min(token_id) from store.main.tokens where dataset = 'd1' and role = 'root')"
    words = f"select token_id, {theirs} as donor_token_id {ROOTS}", "resid_mid.1", "--donors", "other", "--run", "x"
    refused = patched(copied, *words)
    assert (refused.exit_code, len(refused.stderr.splitlines())) == (1, 1)
    (command,) = advised_commands(refused.stderr)
    assert command[-4:] == ["--run", "other", "--sites", "resid_mid.1"]
    assert ran(*command).exit_code == 0
    done = patched(copied, *words)
    assert done.exit_code == 0, done.output


def test_a_site_on_which_nothing_rests_is_refused(store: Path):
    before = committed_files(store)
    done = patched(store, f"select token_id {ROOTS}", "attn_scores.1", "--how", "zero")
    assert (done.exit_code, len(done.stderr.splitlines())) == (2, 1)
    assert "edit at attn_scores.1, which TransformerLens gives after the pass has used it" in done.stderr
    assert committed_files(store) == before
    with Store(store) as opened, pytest.raises(BadInput, match="edit q, k or v of the layer"):
        patching(opened)("base", [Edit(f"select token_id {ROOTS}", "attn_scores.1", "zero")])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--patch", "select 1"], "--patch comes with --base"),
        (["--donor-site", "embed"], "--donor-site comes with --base"),
        (["--base", "base"], "got 0 --patch, 0 --at and 0 --how"),
        (["--base", "base", "--patch", "select 1"], "got 1 --patch, 0 --at"),
        (
            ["--base", "base", "--patch", "a", "--patch", "b", "--patch", "c", *["--at", "embed"] * 2],
            "got 3 --patch, 2 --at",
        ),
        (["--base", "base", "--patch", "a", *["--at", "embed"], *["--how", "zero"] * 2], "1 --at and 2 --how"),
        (
            ["--base", "base", "--patch", "a", "--at", "embed", "--model", "tiny"],
            "--model, which has no meaning with --base",
        ),
        (
            ["--base", "base", "--patch", "a", "--at", "embed", "--trees", "3"],
            "--trees, which has no meaning with --base",
        ),
    ],
)
def test_words_that_do_not_go_together_are_refused(store: Path, words: list[str], said: str):
    done = ran("ingest", store, *words)
    assert done.exit_code == 2
    assert said in " ".join(done.stderr.split())


def test_a_file_a_table_and_a_parameter_are_of_the_edits_that_name_them(store: Path, tmp_path: Path):
    copied = actstore.copy(store, tmp_path / "s.act").out
    (tmp_path / "mine.csv").write_text("token_id\n17\n529\n")
    (tmp_path / "edits.sql").write_text("select token_id from mine where token_id < $most::int")
    words = [
        "ingest",
        copied,
        "--base",
        "base",
        "--patch",
        tmp_path / "edits.sql",
        "--at",
        "resid_post.1",
        "--how",
        "zero",
    ]
    words += ["--patch", f"select token_id {ROOTS}", "--at", "z.1", "--how", "mean"]
    words += ["--table", f"mine={tmp_path / 'mine.csv'}", "--run", "x"]
    assert ran(*words, "-p", "least", 3).exit_code == 2
    done = ran(*words, "-p", "most", 100)
    assert done.exit_code == 0, done.output
    with Store(copied) as opened:
        about = opened.sql("select how, params, n_edits from interventions where run = 'x' order by edit").rows()
        assert about == [("zero", '{"most": "100"}', 1), ("mean", "{}", 6)]
    frame = pl.DataFrame({"token_id": np.array([17, 273])})
    edit = Edit(
        "select token_id from rows where token_id > $n", "embed", "zero", params={"n": 20}, tables={"rows": frame}
    )
    actstore.patch(copied, "base", edit, run="y")
    actstore.patch(copied, "base", "from rows", "embed", "zero", run="z", tables={"rows": frame})
    with Store(copied) as opened:
        assert opened.sql("select run, token_id from edits where run != 'x' order by all").rows() == [
            *(("y", 273), ("z", 17), ("z", 273))
        ]
    for given in ([edit], edit):
        with pytest.raises(BadInput, match="beside them; give these to each Edit"):
            actstore.patch(copied, "base", given, at="embed")
    with pytest.raises(BadInput, match="got a query and no site"):
        actstore.patch(copied, "base", "from tokens")
