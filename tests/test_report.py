"""The page of all studies: it holds every answer, says what is lacking, and needs nothing beside itself."""

import re
import shutil
from base64 import b64decode
from dataclasses import replace
from html.parser import HTMLParser

import polars as pl
import pytest
from click.testing import CliRunner

from actstore.cli import main
from actstore.errors import Damaged, NoRoom, NotStored
from actstore.ingest.jobs.job import Ingest
from actstore.ingest.jobs.local import execute
from actstore.ingest.trees.task import TreeSet
from actstore.queries.report import TITLES, report
from actstore.queries.study import CAUSAL, STUDIES, questions
from actstore.store import Store
from tests.answering import Answering, noise
from tests.test_pipeline import small_model


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A run of 300 trees with answers that are made up, and no variants: some studies can be answered, others cannot."""
    root = tmp_path_factory.mktemp("report") / "s.act"
    trees = TreeSet("reproduction", 300, n_nodes=6, name="d")
    execute(Answering(root, small_model(), trees, sites=[], says=noise, run="small"))
    execute(Ingest(root, small_model(), trees, prompt="tree"))
    return root


class Wellformed(HTMLParser):
    """Every element that is opened is closed, in turn."""

    VOID = ("meta", "img", "br", "link", "source")

    def __init__(self):
        super().__init__()
        self.open, self.text = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_there_is_a_title_for_every_study_but_a_users_query_and_those_that_run_the_model():
    assert set(TITLES) == set(STUDIES) - {"probe", *CAUSAL}


def test_the_page_holds_every_answer_and_what_is_lacking(path, tmp_path):
    with Store(path) as store:
        made = report(store, tmp_path / "out")
    text, answered = made.page.read_text(), made.answers
    parser = Wellformed()
    parser.feed(text)
    assert parser.open == []
    shown = "".join(parser.text)
    assert {answer.name for answer in answered} == {"depth", "last-edge", "dreams"}
    for answer in answered:
        assert answer.sentence in shown
        assert answer.results["query"][0] in shown
    assert "--variant swap_last --sites none" in shown
    assert "--sites pattern" in shown
    assert small_model().weights_sha256 in shown
    assert "actstore study s.act depth --run small --seed 0" in shown


def test_no_number_and_no_interval_of_a_table_is_wrapped(path, tmp_path):
    with Store(path) as store:
        text = report(store, tmp_path / "out").page.read_text()
    assert "td { white-space: nowrap; }" in text
    cells = re.findall(r"<td([^>]*)>([^<]*)</td>", text)
    assert [kind for kind, said in cells if re.fullmatch(r"[-+\[\]0-9., ]+", said) and "long" in kind] == []
    assert all("long" in kind for kind, said in cells if len(said) > 60)
    assert {kind for kind, said in cells} == {"", " class=number", " class=long"}


def test_each_table_lies_in_the_page_as_csv(path, tmp_path):
    with Store(path) as store:
        made = report(store, tmp_path / "out")
    links = dict(
        re.findall(r'download="([^"]+)" href="data:text/csv;charset=utf-8;base64,([^"]+)"', made.page.read_text())
    )
    for answer in made.answers:
        lies = pl.read_csv(b64decode(links[f"{answer.name}-small.csv"]), infer_schema=False)
        assert lies.equals(pl.read_csv(answer.frame.write_csv().encode(), infer_schema=False))
        assert lies.columns == answer.frame.columns


def test_the_contents_lead_to_each_answer_and_what_is_not_confirmed_is_said(path, tmp_path):
    with Store(path) as store:
        text = report(store, tmp_path / "out").page.read_text()
    anchors, links = set(re.findall(r' id="([^"]+)"', text)), set(re.findall(r'href="#([^"]+)"', text))
    assert {"depth", "depth-small", "runs"} <= links <= anchors
    assert re.search(r"No finding \(\d+ significant comparisons?\) was tested on a second set", text)


def test_runs_of_one_model_over_one_set_answer_once(path, tmp_path):
    shutil.copytree(path, root := tmp_path / "s.act")
    execute(
        Answering(
            root, small_model(), TreeSet("reproduction", 300, n_nodes=6, name="d"), sites=[], says=noise, run="again"
        )
    )
    with Store(root) as store:
        for name in ("depth", "last-edge"):
            assert [asked.run for asked in questions(store, name)] == ["small"]
            assert [asked.run for asked in questions(store, name, ["again", "small"])] == ["again", "small"]


def test_the_page_needs_nothing_beside_itself_and_comes_out_the_same(path, tmp_path):
    with Store(path) as store:
        first = report(store, tmp_path / "one").page.read_text()
        again = report(store, tmp_path / "two").page.read_text()
    assert first == again
    assert not re.search(r"https?://|<script|<link|@import", first.replace("http://www.w3.org", ""))
    assert first.count('<img class="light" alt="Figure of the study') == 3
    figures = [b64decode(data) for data in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", first)]
    assert len(figures) == 6, "a light and a dark one of each"
    for figure in figures:
        assert not re.search(rb"https?://(?!www\.w3\.org|purl\.org|creativecommons)|<script|@import", figure)


def test_the_command_writes_the_page_and_records_what_it_says(path, tmp_path):
    done = CliRunner().invoke(main, ["report", str(path), str(tmp_path / "out"), "--run", "small"])
    assert done.exit_code == 0
    assert (tmp_path / "out" / "index.html").exists()
    with Store(path) as store:
        recorded = store.sql("select distinct study from results")["study"].to_list()
    assert set(recorded) == {"depth", "last-edge", "dreams"}


def test_a_run_that_is_not_there_is_refused(path, tmp_path):
    with Store(path) as store, pytest.raises(NotStored, match="no run 'other'"):
        report(store, tmp_path, runs=["other"])


# What goes wrong with one study costs no other answer.


def broken(*args, **options):
    raise ZeroDivisionError("a fault of ours")


FAULTS = {
    "the study fails": ("actstore.queries.depth.study", broken, False),
    "the figure fails": ("actstore.queries.depth.plot", broken, True),
    "the store is damaged": (
        "actstore.queries.depth.study",
        lambda *a, **o: (_ for _ in ()).throw(Damaged("x is cut")),
        False,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_study_that_fails_stands_on_the_page_and_the_others_are_kept_and_recorded(path, tmp_path, monkeypatch, fault):
    shutil.copytree(path, tmp_path / "s.act")
    with Store(path) as store:
        before = store.snapshot
    where, how, is_answered = FAULTS[fault]
    monkeypatch.setattr(where, how)
    done = CliRunner().invoke(main, ["report", str(tmp_path / "s.act"), str(tmp_path / "out"), "--run", "small"])
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)
    text = (tmp_path / "out" / "index.html").read_text()
    said = "x is cut" if "damaged" in fault else "ZeroDivisionError: a fault of ours (test_report.py, line "
    for shown in (done.stderr, text):
        assert "depth small: " in shown or "Failed: " in shown
        assert said in shown
    with Store(tmp_path / "s.act") as store:
        recorded = set(store.sql("select study from results where recorded > $n", {"n": before})["study"])
    assert recorded == {"last-edge", "dreams"} | ({"depth"} if is_answered else set())
    assert f"{3 if is_answered else 2} answered, " in done.stdout


def test_what_was_answered_and_what_was_lacking_are_told_apart(path, tmp_path):
    done = CliRunner().invoke(main, ["report", str(path), str(tmp_path / "out"), "--no-record"])
    assert done.exit_code == 0
    assert done.stdout == f"{tmp_path}/out/index.html: of 7 questions 3 answered, 4 lacking something\n"


def test_a_page_that_cannot_be_written_leaves_the_one_before(path, tmp_path, monkeypatch):
    with Store(path) as store:
        page = report(store, tmp_path / "out").page
        before = page.read_bytes()
        monkeypatch.setattr(
            "actstore.storage.whole.fsync", lambda *args: (_ for _ in ()).throw(OSError(28, "No space"))
        )
        with pytest.raises(NoRoom):
            report(store, tmp_path / "out", seed=1)
    assert page.read_bytes() == before
    assert list(page.parent.iterdir()) == [page]


def test_any_run_that_is_named_is_asked(path, tmp_path):
    with Store(path) as store:
        made = report(store, tmp_path / "out", runs=["small-dreams"])
    assert {answer.question.run for answer in made.asked} == {"small-dreams"}
    assert made.faults == []


@pytest.mark.parametrize("n_nodes", [2, 3])
@pytest.mark.parametrize("n_trees", [1, 30])
def test_the_smallest_trees_and_sets_lack_something_and_nothing_fails(tmp_path, n_nodes, n_trees):
    trees = TreeSet("reproduction", n_trees, n_nodes=n_nodes, name="d")
    changed = [
        replace(trees, name=f"d-{change}", variant_of="d", change=change) for change in ("swap_last", "swap_inner")
    ]
    for model in (small_model(), small_model(seed=2, name="other")):
        execute(Ingest(tmp_path / "s.act", model, trees, sites=["resid_post", "pattern"]))
        for varied in changed:
            execute(Ingest(tmp_path / "s.act", model, varied, sites=[]))
        execute(Ingest(tmp_path / "s.act", model, trees, prompt="tree"))
    with Store(tmp_path / "s.act") as store:
        made = report(store, tmp_path / "out")
    assert made.faults == []
    assert len(made.asked) == 6 * 2 + 1
