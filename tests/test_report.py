"""The page of all studies: it holds every answer, says what is lacking, and needs nothing beside itself."""

import re
from html.parser import HTMLParser

import pytest
from click.testing import CliRunner

from actstore.cli import main
from actstore.errors import NotStored
from actstore.ingest.pipeline import Ingest, TreeSet
from actstore.queries.report import TITLES, report
from actstore.queries.study import STUDIES
from actstore.store import Store
from tests.answering import Answering, noise
from tests.test_pipeline import small_model


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A run of 300 trees with answers that are made up, and no variants: some studies can be answered, others cannot."""
    root = tmp_path_factory.mktemp("report") / "s.act"
    trees = TreeSet("reproduction", 300, n_nodes=6, name="d")
    Answering(root, small_model(), trees, sites=[], says=noise, run="small").execute()
    Ingest(root, small_model(), trees, prompt="tree").execute()
    return root


class Wellformed(HTMLParser):
    """Every element that is opened is closed, in turn."""

    VOID = ("meta", "img", "br", "link")

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


def test_there_is_a_title_for_every_study():
    assert set(TITLES) == set(STUDIES)


def test_the_page_holds_every_answer_and_what_is_lacking(path, tmp_path):
    with Store(path) as store:
        page, answered = report(store, tmp_path / "out")
    text = page.read_text()
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


def test_the_page_needs_nothing_beside_itself_and_comes_out_the_same(path, tmp_path):
    with Store(path) as store:
        first = report(store, tmp_path / "one")[0].read_text()
        again = report(store, tmp_path / "two")[0].read_text()
    assert first == again
    assert not re.search(r"https?://|<script|<link|@import", first.replace("http://www.w3.org", ""))
    assert first.count("data:image/png;base64,") == 3


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
