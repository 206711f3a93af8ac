"""The study `probe`: a user's label that is linear in the activation is found, one that is random is not."""

import gc
import json
import re
import shutil

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

import actstore
from actstore.cli import main
from actstore.errors import BadInput, NotStored
from actstore.ingest.trees.draw import draw
from actstore.ingest.trees.tokens import n_positions
from actstore.queries import studies, study
from actstore.queries.probes import own_figures
from actstore.queries.probes.labelled import labelled
from actstore.queries.study import mean_row
from actstore.store import Store
from tests.planted import plant
from tests.planted_text import lengths, plant_text

N, D = 90, 6
TOTAL = int(lengths(N).sum())
# planted along one axis of resid_post.0 and z.0, and nowhere else; the piece of a token says little about its kind
KIND = "case when token_id * token_id % 7 in (1, 2) then 'warm' else 'cold' end"
LABEL = f"select token_id, {KIND} as label from tokens where dataset = $dataset"
NOISE = "select token_id, hash(token_id * 3 + 1) % 2 = 0 as label from tokens"


def warm(first, total=TOTAL):
    ids = first + np.arange(total)
    return np.isin(ids * ids % 7, (1, 2))


def sites(first, seed=0, planted=True):
    rng = np.random.default_rng(seed)
    values = {short: rng.standard_normal((TOTAL, D)).astype(np.float32) for short in ("embed", "resid_post.0", "z.0")}
    values["resid_post.0"][:, 2] += planted * 8 * warm(first)
    values["z.0"][:, 1] += planted * 8 * warm(first)
    values["z.0"] = values["z.0"].reshape(TOTAL, 2, 3)
    return values


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Run `text` over `stories`; the same model as `again` over `more`, a third of whose sequences are those of `stories`."""
    root = tmp_path_factory.mktemp("own") / "s.act"
    plant_text(root, sites(0), kinds={"z.0": "heads"}, weights="w")
    first = 1024  # ids of a further dataset begin at a shard
    plant_text(root, sites(first, 1), "again", "more", hashes=range(60, 60 + N), kinds={"z.0": "heads"}, weights="w")
    return root


@pytest.fixture(scope="module")
def store(path):
    with Store(path) as opened:
        assert opened.sql("select first_token_id from datasets order by rowid").to_series().to_list() == [0, 1024]
        yield opened


def value(answer, site, metric="accuracy", column="value"):
    return answer.results.filter(site=site, metric=metric)[column].item()


@pytest.fixture(scope="module")
def found(store):
    return study.ask(store, "probe", "text", query=LABEL, label="kind")


def test_a_label_that_is_linear_in_the_activation_is_found_there_alone(found):
    assert value(found, "resid_post.0") > 0.99
    assert [(test.site, test.found) for test in found.tests] == [("embed", False), ("resid_post.0", True)]
    n_test = int(lengths(N)[::3].sum())
    assert value(found, "resid_post.0", column="n") == n_test
    assert (
        value(found, "resid_post.0", "majority") == value(found, "embed", "majority") == pytest.approx(4 / 7, abs=0.08)
    )
    for control in ("shuffled_accuracy", "control_accuracy", "embed_accuracy"):
        assert value(found, "resid_post.0", control) < 0.9
    assert value(found, "resid_post.0", "above_embed") > 0.1
    assert "above_embed" not in found.results.filter(site="embed")["metric"]


def test_a_random_label_is_not_found(store):
    noise = study.ask(store, "probe", "text", query=NOISE)
    assert not any(test.found for test in noise.tests)
    assert "does not exceed the baseline" in noise.sentence
    assert "exceeds the baseline" not in noise.sentence
    assert noise.results.filter(metric="direction")["name"].to_list()[:2] == [
        "text/embed/label=false",
        "text/embed/label=true",
    ]


def test_the_answer_says_per_site_what_was_read_and_what_a_baseline_gives(found):
    row = found.results.filter(site="resid_post.0", metric="accuracy").row(0, named=True)
    assert re.search(
        rf"At resid_post.0 the accuracy is {100 * row['value']:.2f} % \({row['n']} rows of 30 test documents; 95 % interval "
        rf"{100 * row['low']:.2f} to .* best baseline gives .* \(most_frequent\): the difference of \+.*exceeds the baseline",
        found.sentence,
    )
    assert dict(found.frame.select("site", "exceeds it").rows()) == {"embed": "no", "resid_post.0": "yes"}
    assert found.frame["label"].unique().to_list() == ["kind"]
    params = json.loads(found.results["params"][0])
    assert params["query"] == LABEL == found.results["query"][0]
    assert params["params"] == {"dataset": "stories"}
    assert params["classes"] == ["cold", "warm"]
    assert study.plot(found).get_suptitle().startswith("Linear probes of 'kind'\nrun text")


def test_heads_are_probed_if_they_are_named(store):
    heads = study.ask(store, "probe", "text", query=LABEL, sites="z.0")
    assert value(heads, "z.0") > 0.99
    assert len(heads.results.filter(metric="direction")["direction"][0]) == 6


def test_a_split_of_the_query_is_taken_for_that_of_the_sequences(store):
    mine = f"select *, if(sequence_id % 2 = 0, 'test', 'train') as split from ({LABEL}) join tokens using (token_id)"
    assert value(study.ask(store, "probe", "text", query=mine), "embed", column="n") == lengths(N)[::2].sum()


PAIRS = [at // 6 * 3 + at % 3 for at in range(N)]  # of two sequences, on one side of the split


@pytest.fixture(scope="module")
def paired(tmp_path_factory):
    """Run `text` over sequences of which two are of one document."""
    root = plant_text(tmp_path_factory.mktemp("paired") / "s.act", sites(0), kinds={"z.0": "heads"}, documents=PAIRS)
    with Store(root) as opened:
        yield opened


def test_rows_of_one_document_are_not_independent(paired):
    rows = labelled(paired, "text", LABEL, {"dataset": "stories"})
    about = paired.sql("select token_id, document, sequence_id from tokens join sequences using (sequence_id)")
    of = rows.tokens.join(about, on="token_id")
    first = of.group_by("document").agg(pl.col("sequence_id").min().alias("first"), pl.col("unit").unique())
    assert first["unit"].list.len().to_list() == [1] * 45
    assert first["unit"].list.first().to_list() == first["first"].to_list()
    answer = study.ask(paired, "probe", "text", query=LABEL, sites="resid_post.0")
    for words in ("training rows of 30 documents", "of 15 test documents;", "The intervals are over test documents."):
        assert words in answer.sentence
    by_document = mean_row(
        np.ones(int((~rows.train).sum())), rows.units[~rows.train], 0, label="label", metric="accuracy"
    )
    assert value(answer, "resid_post.0") == 1
    assert value(answer, "resid_post.0", column="low") == by_document["low"]
    assert "over documents" in " ".join(study.plot(answer).get_suptitle().split())


def test_a_split_that_cuts_documents_is_refused(paired):
    split = "if(sequence_id % 2 = 0, 'test', 'train') as split"
    with pytest.raises(
        BadInput, match="rows of 45 documents on both sides, the first being that of sequence_id 0; rows of "
    ):
        study.ask(paired, "probe", "text", query=f"select token_id, {KIND} as label, {split} from tokens")


def test_a_parameter_whose_name_begins_like_one_of_the_studys_is_the_users(store, tmp_path):
    file = tmp_path / "commas.sql"
    file.write_text("select token_id, token = $runner as guess from tokens")
    commas = "select token_id, token = $runner as label from tokens"
    answer = study.ask(store, "probe", "text", query=commas, params={"runner": ","}, baselines=file, sites="embed")
    assert value(answer, "embed", "baseline_commas") == 1


def test_of_many_sites_the_first_the_lowest_and_the_highest_are_said(found, monkeypatch):
    monkeypatch.setattr(own_figures, "SITES_SAID", 1)
    said = own_figures.sentence(found.results, found.tests)
    assert "The probe exceeds its best baseline at 1 of 2 sites, and is below it at 0;" in said
    assert said.count("the accuracy is") == 2, "the first is the lowest"
    assert said.replace(said[said.index("The probe exceeds") : said.index("At embed")], "") == found.sentence


def test_the_table_begins_with_what_the_sentence_says(found):
    first = [
        "label",
        "site",
        "n",
        "accuracy %",
        "baseline %",
        "best baseline",
        "above it, points",
        "Holm",
        "exceeds it",
    ]
    assert found.frame.columns[: len(first)] == first


def test_baselines_of_the_user_count_where_they_are_best(store, tmp_path):
    right = tmp_path / "right.sql"
    right.write_text(f"select token_id, {KIND} as guess from tokens;\n")
    half = tmp_path / "half.sql"
    half.write_text(
        f"select token_id, {KIND} as guess, 0.5 as p from tokens where dataset = $dataset and $run = 'text'"
    )
    held = study.ask(store, "probe", "text", query=LABEL, baselines=f"{right},{half}")
    assert value(held, "resid_post.0", "baseline_right") == 1
    assert value(held, "resid_post.0", "baseline_half") == 0.5
    assert not any(test.found for test in held.tests)
    assert "(right)" in held.sentence
    assert held.frame["half %"].to_list() == [50, 50]


@pytest.mark.parametrize(
    ("sql", "words"),
    [
        ("select token_id, 'a' as guessed from tokens", "yields token_id, guessed, and no guess"),
        ("select token_id, 'a' as guess, 0.6 as p from tokens, range(2)", "add up to 1.2"),
        (
            "select token_id, 0.5 as guess from tokens",
            "the guess of the baseline .*mine.sql' holds .*a probe reads classes",
        ),
        ("select token_id + 100000 as token_id, 'a' as guess from tokens", "none of the .* test rows"),
    ],
)
def test_a_baseline_that_cannot_be_scored_is_refused_in_a_line(store, tmp_path, sql, words):
    file = tmp_path / "mine.sql"
    file.write_text(sql)
    with pytest.raises(BadInput, match=words) as error:
        study.ask(store, "probe", "text", query=LABEL, baselines=[file])
    assert "\n" not in str(error.value)


BAD = [
    ({}, "lacks its query"),
    ({"query": "no.sql"}, r"cannot read the query 'no.sql'"),
    ({"query": "select token_id, 1 as lable from tokens"}, "yields token_id, lable, and no label"),
    ({"query": "select token_id, 1 as label from tokens limit 0"}, "yields no row in run 'text'"),
    ({"query": "select token_id, 0.5 as label from tokens"}, "label holds .*a probe reads classes"),
    (
        {"query": "select token_id, nullif(token, ',') as label from tokens"},
        r"label is NULL in \d+ of \d+ rows, the first at",
    ),
    ({"query": "select null::bigint as token_id, 1 as label"}, "token_id is NULL"),
    ({"query": "select token::varchar as token_id, 1 as label from tokens"}, "ids of tokens, whole numbers"),
    ({"query": "select token_id, 1 as label from tokens"}, "have the label '1'"),
    ({"query": "select token_id, token_id = 3 as label from tokens"}, r"1 class \('true'\) has one row"),
    (
        {"query": "select token_id, token_id as label from tokens"},
        r"\d+ classes \('0', '1', '2', …\) have one row each",
    ),
    ({"query": "select token_id, split as label from tokens join sequences using (sequence_id)"}, "no row in training"),
    ({"query": f"select * from ({NOISE}), range(2)"}, "tokens again, the first being token_id"),
    (
        {"query": "select token_id + 900 as token_id, token as label from tokens"},
        "no tokens of the dataset of run 'text'",
    ),
    ({"query": f"select *, 'dev' as split from ({NOISE})"}, "split is 'dev' in"),
    ({"query": f"select *, if(token_id % 2 = 0, 'test', 'train') as split from ({NOISE})"}, "documents on both sides"),
    ({"query": f"select * from ({NOISE}) where token_id < 3"}, "0 training and 1 test documents"),
    ({"query": LABEL, "params": {"dataset": "more"}}, "leave `-p dataset` out"),
    ({"query": LABEL, "label": "a/b"}, "got 'a/b' for the label's name"),
    ({"query": LABEL, "max_iter": 0}, "got max_iter 0"),
]


@pytest.mark.parametrize(("options", "words"), BAD)
def test_what_cannot_be_probed_is_told_in_a_line(store, options, words):
    with pytest.raises(BadInput, match=words) as error:
        study.ask(store, "probe", "text", **options)
    assert "\n" not in str(error.value)


def test_a_site_that_is_not_held_is_refused(store):
    with pytest.raises(NotStored, match=r"it holds embed, resid_post\.0, z\.0"):
        study.ask(store, "probe", "text", query=LABEL, sites="resid_post.1")


def test_a_finding_is_confirmed_on_a_second_set_without_the_sequences_of_the_first(store):
    (asked,) = studies.answer(store, "probe", ["text"], options={"query": LABEL}, confirm="more")
    assert asked.confirmation, asked.error
    (claim,) = asked.confirmation.claims
    assert claim.confirmed
    shared = set(range(60, 90)) & set(range(60, 60 + N))
    assert asked.confirmation.second.n_shared == len(shared) == 30
    in_test = [at for at in range(0, N, 3) if 60 + at not in shared]
    assert claim.there.n == lengths(N)[in_test].sum()
    assert "60 sequences that were drawn apart" in asked.confirmation.sentence
    with pytest.raises(BadInput, match=r"takes \$dataset"):
        studies.answer(store, "probe", ["text"], options={"query": NOISE}, confirm="more")
    with pytest.raises(NotStored, match="no set of sequences 'fresh'"):
        studies.answer(store, "probe", ["text"], options={"query": LABEL}, confirm="fresh")


def test_stored_labels_are_probed_in_the_runs_own_dataset_and_confirmed_in_another(path, tmp_path):
    root = tmp_path / "l.act"
    shutil.copytree(path, root)
    with Store(root) as opened:
        opened.label("mood", opened.sql(f"select token_id, {KIND} as kind from tokens"))
    mine = "select token_id, kind as label from mood join tokens using (token_id) where dataset = $dataset"
    with Store(root) as opened:
        (asked,) = studies.answer(
            opened, "probe", ["text"], options={"query": mine, "sites": "resid_post.0"}, confirm="more"
        )
    assert value(asked.answer, "resid_post.0", column="n") == lengths(N)[::3].sum()
    assert [claim.confirmed for claim in asked.confirmation.claims] == [True]


def test_studies_of_trees_refuse_other_sequences_and_do_not_take_them_unasked(store):
    with pytest.raises(BadInput, match="'depth' is about trees, and run 'text' is over other sequences"):
        study.questions(store, "depth", ["text"])
    with pytest.raises(NotStored, match="no run over drawn trees"):
        study.questions(store, "depth")
    assert [one.run for one in study.questions(store, "probe")] == ["text", "again"]


def test_the_command_takes_a_query_a_file_and_parameters_and_records_the_answer(tmp_path):
    root = plant_text(tmp_path / "c.act", sites(0), kinds={"z.0": "heads"})
    file = tmp_path / "warm.sql"
    file.write_text(f"-- my label\nselect token_id, {KIND} as label from tokens where position >= $from::int;\n")
    words = ["study", str(root), "probe", "--query", str(file), "-p", "from", "1", "-o", "sites", "resid_post.0"]
    made = CliRunner().invoke(main, [*words, "--plot", str(tmp_path / "figure.png")])
    assert made.exit_code == 0, made.output
    assert "exceeds the baseline" in " ".join(made.output.split())
    assert (tmp_path / "figure.png").stat().st_size > 1000
    with Store(root) as opened:
        kept = opened.sql("select * from latest_results where study = 'probe' and metric = 'accuracy'").row(
            0, named=True
        )
        assert kept["n"] == lengths(N)[::3].sum() - 30
        assert kept["query"].startswith("-- my label")
        scored = opened.sql(
            "select avg(((dot(act(token_id, 'text', 'resid_post.0'), probe_direction(name)) + value > 0) "
            f"= ({KIND} = 'warm'))::int) as right from tokens, (select name, value from results where name like '%=warm')"
        )
        assert scored.item() > 0.99
    refused = CliRunner().invoke(main, ["study", str(root), "depth", "--query", "select 1"])
    assert refused.exit_code == 2
    assert "no 'query'" in refused.output


def test_trees_are_sequences(tmp_path):
    """A label of trees is read at a token of the tree, with intervals and split over trees."""
    trees = draw("reproduction", 3, 0, 60, 5)
    rng = np.random.default_rng(0)
    values = rng.standard_normal((2, 60, n_positions(5), 8)).astype(np.float32)
    values[1, :, :, 0] += 9 * (trees.goal[:, None] % 2)
    root = plant(tmp_path / "t.act", trees, {"embed": values[0], "resid_post.0": values[1]})
    with Store(root) as opened:
        odd = study.ask(
            opened, "probe", query="select token_id, goal % 2 = 1 as label from edge_targets where edge = 0"
        )
    assert [(test.site, test.found) for test in odd.tests] == [("embed", False), ("resid_post.0", True)]
    assert value(odd, "resid_post.0", column="n") == (trees.hashes() % 5 == 0).sum()


@pytest.fixture
def mine(store, tmp_path):
    """Labels of `text` in a file."""
    file = tmp_path / "mine.csv"
    store.of("text").sql(f"select token_id, {KIND} as label from tokens").write_csv(file)
    return file


def test_a_study_reads_a_users_table_at_both_doors(path, mine, tmp_path):
    asked = {"query": "select token_id, label from mine", "options": {"sites": "resid_post.0"}, "record": False}
    answer = actstore.study(path, "probe", "text", tables={"mine": pl.read_csv(mine)}, **asked)[0].answer
    assert value(answer, "resid_post.0") == 1
    assert json.loads(answer.results["params"][0])["tables"] == {"mine": "a DataFrame"}
    (tmp_path / "guessed.sql").write_text("select token_id, label as guess from other")
    words = ["study", str(path), "probe", "--run", "text", "--query", asked["query"], "-o", "sites", "resid_post.0"]
    words += ["-o", "baselines", str(tmp_path / "guessed.sql"), "--no-record", "--json"]
    made = CliRunner().invoke(main, [*words, "--table", f"mine={mine}", "--table", f"other={mine}"])
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)[0]["best baseline"] == "guessed"
    refused = CliRunner().invoke(main, [*words, "--table", f"mine={mine}", "--table", f"tokens={mine}"])
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    assert "'tokens' for a table (a table or view of every store)" in refused.stderr


@pytest.mark.parametrize(("name", "takes"), [("probe", "query, baselines"), ("probes", "baseline"), ("depth", "none")])
def test_a_table_that_no_query_reads_is_refused(path, mine, name, takes):
    with pytest.raises(BadInput, match=f"no query that could read it; .* take a query: {takes}$"):
        actstore.study(path, name, tables={"mine": mine}, record=False)


def test_a_store_with_tables_beside_it_stands_alone(path):
    frame = pl.DataFrame({"token_id": [0, 1]})
    beside = Store(path).beside({"mine": frame})  # the other store is garbage
    gc.collect()
    both = beside.of("text").beside({"more": frame})
    assert both.sql("select count(*) from mine join more using (token_id) join tokens using (token_id)").item() == 2
    assert both.read("from mine", site="embed")[0].shape == (2, D)
    with pytest.raises(BadInput, match="'mine' for a table"):
        both.beside({"mine": frame})
    beside.close()
