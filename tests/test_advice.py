"""Every command that a message advises is provoked, run as it stands, and then what was asked for first works."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pytest
import yaml
from click.testing import CliRunner, Result

from actstore.catalog import tables
from actstore.cli import main
from actstore.errors import BadInput, Damaged, advised
from actstore.ingest.jobs.job import Ingest
from actstore.ingest.jobs.local import execute
from actstore.ingest.training.card import write_card
from actstore.ingest.trees.task import TreeSet
from actstore.storage import sealed
from actstore.store import Store
from actstore.writing.create import create
from tests.test_old_stores import unpack

ROOT = Path(__file__).parents[1]
ADVISING = {"advised", "ingest_more", "ingest_sites", "ingest_command"}  # what makes a command for a message


def advised_commands(message: str) -> list[list[str]]:
    """The words of each command of actstore's that a message tells to type, without `actstore`."""
    return [shlex.split(command)[1:] for command in re.findall(r"`(actstore [^`]+)`", message)]


@pytest.mark.parametrize(
    "words",
    [
        ["repair", "s.act"],
        ["ingest", "my store/s.act", "--run", "a b"],
        ["sql", "s", "it's $x"],
        ["sql", "s", "run = 'r'"],
    ],
)
def test_a_command_is_quoted_as_a_shell_needs_it(words):
    assert advised_commands(f"wrong; {advised(*words)} mends it") == [words]
    assert "'\"'\"'" not in advised("sql", "s", "run = 'r'"), "what a person can read"


@pytest.fixture(scope="module")
def made(shipped, tmp_path_factory):
    """A store, in a folder whose name has a blank, of 120 trees that the shipped model answered, without sites or sisters."""
    path = tmp_path_factory.mktemp("advice of") / "my store.act"
    execute(Ingest(path, shipped, TreeSet("reproduction", 120, name="d"), sites=[], run="r"))
    return path


@pytest.fixture
def store(made, tmp_path):
    """A copy of it to be added to."""
    shutil.copytree(made, path := tmp_path / "my store.act")
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@dataclass
class Case:
    """A message, and what makes it.

    Attributes:
        where: FILE:FUNCTION that makes the message.
        ask: the words of the command that is refused; STORE is the store.
        spoil: what is done to the store before.
        again: what is asked for after what was advised was done, where it is not the same; RUN is the run that was added.
        commands: how many are advised.
        more: words that are added to an ingest of as many trees as a model is given by default.
    """

    where: str
    ask: list[str]
    spoil: object = None
    again: list[str] | None = None
    commands: int = 1
    more: tuple[str, ...] = ()


def without_catalog(store: Path) -> None:
    (store / tables.CATALOG).unlink()


def flipped(name: str):
    def spoil(store: Path) -> None:
        path = next(iter(sorted(store.glob(name))))
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.chmod(0o644)
        path.write_bytes(bytes(content))

    return spoil


def text(name: str, content: str):
    def spoil(store: Path) -> None:
        (store / name).chmod(0o644)
        (store / name).write_text(content)

    return spoil


VIEW = "alter table tokens rename to others; create view tokens as from others"
EMBED = ["read", "STORE", "select token_id from edge_targets", "--run", "s", "--csv"]


def changed(statement: str):
    """Another program changes the catalog of a store with activations."""

    def spoil(store: Path) -> None:
        sites(store)
        (store / tables.CATALOG).chmod(0o644)
        with duckdb.connect(str(store / tables.CATALOG)) as connection:
            connection.execute(statement)

    return spoil


def a_log_beside_the_catalog(store: Path) -> None:
    (store / f"{tables.CATALOG}.wal").write_bytes(b"left")


def empty(store: Path) -> None:
    shutil.rmtree(store)
    create(store)


def of_format_2(store: Path) -> None:
    shutil.rmtree(store)
    unpack("format-2", store.parent).rename(store)


def of_another_database(store: Path) -> None:
    """The catalog is a DuckDB file, and no store's."""
    without_catalog(store)
    duckdb.connect(str(store / tables.CATALOG)).close()


def another_past(store: Path) -> None:
    """A manifest says something else, with a checksum that fits."""
    path = max((store / "log").glob("*.json"))
    body = {key: value for key, value in json.loads(path.read_text()).items() if key != "checksum"}
    path.chmod(0o644)
    path.write_text(json.dumps({**body, "run": "other", "checksum": sealed.checksum({**body, "run": "other"})}))


def dreams_only(store: Path) -> None:
    model = ["--model-of", "r", "--run", "x", "--prompt", "tree", "--dataset", "e", "--trees", "60"]
    assert run("ingest", store, *model).exit_code == 0


def sites(store: Path) -> None:
    words = ["--model-of", "r", "--run", "s", "--dataset", "d", "--sites", "embed"]
    assert run("ingest", store, *words).exit_code == 0


def shard_flipped(store: Path) -> None:
    sites(store)
    flipped("activations.zarr/s/*/c/0/0/0")(store)


def names_taken(store: Path) -> None:
    """Every name that an advice would choose first is another run's."""
    for name in ("r-patterns", "r-swap_last", "r-dreams", "baseline", "r-sites"):
        words = ["--model-of", "r", "--run", name, "--trees", "5", "--sites", "none", "--seed", "9"]
        assert run("ingest", store, *words).exit_code == 0


DIRECTION = ["sql", "STORE", "select probe_direction('s/embed/edge_target/source=3') as d"]
READ = ["read", "STORE", "select token_id from edge_targets", "--run", "s", "--site", "embed", "--check", "--csv"]
UNREAD = ["read", "STORE", "select token_id from edge_targets", "--csv", "--site"]
FEW = ("--trees", "20", "--sites", "none")
ZERO = ["-o", "how", "zero", "-o", "trees", "5", "-o", "roles", "root"]
PROBES = ["study", "STORE", "probes", "-o", "max_iter", "5"]
CASES = [
    Case("queries/attention/study.py:pattern_run", ["study", "STORE", "attention"]),
    Case("queries/attention/study.py:pattern_run", ["study", "STORE", "attention", "--run", "r"], names_taken),
    Case("queries/attention/study.py:pattern_run", ["attention", "STORE", "3", "--run", "r", "--out", "OUT.html"]),
    Case("queries/swap.py:companions", ["study", "STORE", "swap"], commands=2),
    Case("queries/swap.py:companions", ["study", "STORE", "swap", "--run", "r"], names_taken, commands=2),
    Case("queries/dreams/study.py:study", ["study", "STORE", "dreams"]),
    Case("queries/dreams/study.py:study", ["study", "STORE", "dreams", "--run", "r"], names_taken),
    Case("queries/compare/study.py:_other", ["study", "STORE", "compare"]),
    Case("queries/compare/study.py:_other", ["study", "STORE", "compare", "--run", "r"], names_taken),
    *(
        Case(
            "queries/depth.py:unanswered",
            ["study", "STORE", of, "--run", "x", *more],
            dreams_only,
            ["study", "STORE", of, "--run", "RUN", *more],
        )
        for of, *more in (("depth",), ("last-edge",), ("ablate", *ZERO), ("knockout", "-o", "trees", "3"))
    ),
    Case("queries/causes.py:check_stored", ["study", "STORE", "ablate", "-o", "trees", "5", "-o", "roles", "colon"]),
    Case("queries/probes/study.py:_where", PROBES, None, [*PROBES, "--run", "RUN", "-o", "sites", "embed"]),
    Case(
        "queries/probes/study.py:_where",
        [*PROBES, "--run", "s", "-o", "sites", "resid_mid.1"],
        sites,
        [*PROBES, "--run", "RUN", "-o", "sites", "resid_mid.1"],
    ),
    Case("queries/study.py:questions", ["study", "STORE", "depth"], empty, more=FEW),
    Case(
        "actstore/reading/opened.py:resolve_run",
        ["read", "STORE", "select token_id from edge_targets", "--site", "embed"],
        empty,
        more=("--trees", "20", "--sites", "embed"),
    ),
    *(
        Case("actstore/sites.py:not_held", [*UNREAD, site], None, [*UNREAD, site, "--run", "RUN"])
        for site in ("embed", "resid_mid.1", "blocks.1.hook_resid_mid", "resid_post")
    ),
    Case("actstore/advice.py:no_run", ["query", "STORE", "accuracy_by_depth", "-p", "run", "baseline"], more=FEW),
    Case("actstore/sql/functions.py:_read_direction", DIRECTION, sites),
    Case("actstore/catalog/tables.py:not_a_table", ["sql", "STORE", "select 1"], changed(VIEW)),
    Case(
        "actstore/reading/catalog_rows.py:impossible",
        [*EMBED, "--site", "embed"],
        changed("update sites set shape = []"),
    ),
    Case("actstore/catalog/tables.py:refuse_replayed", ["sql", "STORE", "select 1"], a_log_beside_the_catalog),
    Case(
        "actstore/commits/log.py:manifests", ["info", "STORE"], changed("update snapshot set snapshot = snapshot + 64")
    ),
    Case("actstore/commits/format.py:_no_store", ["sql", "STORE", "select 1"], shutil.rmtree, more=FEW),
    Case("actstore/commits/format.py:check_format", ["study", "STORE", "depth"], of_format_2),
    Case("actstore/commits/format.py:_mend", ["info", "STORE"], flipped("store.json")),
    Case("actstore/storage/local.py:_check_hash", READ, shard_flipped, commands=2),
    Case("actstore/sql/session.py:__init__", ["info", "STORE"], without_catalog),
    Case("actstore/reading/opened.py:_catalog_errors", ["info", "STORE"], of_another_database),
    Case(
        "actstore/reading/opened.py:_open_checked",
        ["query", "STORE", "role_counts", "--check"],
        flipped("catalog.duckdb"),
        commands=2,
    ),
    Case(
        "actstore/catalog/hash_note.py:noted_hashes",
        ["query", "STORE", "role_counts", "--check"],
        text("catalog.json", "{"),
    ),
    Case("actstore/upkeep/verify.py:raise_if_damaged", ["verify", "STORE"], flipped("parts/tokens/*")),
]
ELSEWHERE = {
    "actstore/cli/study.py:say_it",  # test_recording.py, as the next
    "queries/studies.py:warn",
    "queries/study.py:ask",  # test_ablate.py
    "queries/app/recorded.py:answer_of",  # test_app.py, as the next
    "queries/app/asked.py:older",
    "queries/report.py:_asked",  # test_report.py
    "actstore/checkup.py:_store",  # test_doctor.py
    "queries/dtype_bill.py:_others",  # test_dtype_bill.py
    "actstore/cli/ingest.py:ingest",  # below, as the rest
    "actstore/cli/ingest.py:_patch",  # test_refused_edits.py
    "actstore/cli/ingest.py:_execute_slice",  # test_slices.py, as the next
    "ingest/jobs/slices.py:execute_slice",
    "ingest/jobs/patched.py:_must_fit",  # test_patched_runs.py, as the next
    "actstore/writing/dropping.py:_of_run",
    "actstore/reading/opened.py:_check_log",  # below: `verify` says more, and mends nothing
    "actstore/reading/opened.py:_opening_errors",  # test_content.py, as the next
    "actstore/writing/parts.py:rows_committed",
    "actstore/reading/scope.py:_note",  # test_scope.py: a note, which refuses nothing
    "actstore/catalog/tables.py:in_use",  # test_beside_catalog.py: another process has the catalog open
    "actstore/storage/objects.py:_newer",  # test_bucket_store.py, as the next two
    "actstore/storage/objects.py:_mending",
    "actstore/storage/objects.py:_compare",
    "actstore/catalog/witness.py:doubt",  # test_repair_pairs.py: a file is removed before
    "actstore/catalog/witness.py:in_conflict",  # test_witness.py: only who looks can know which of the two is right
    "actstore/upkeep/repair.py:_refuse_shared_places",  # test_links.py
    "actstore/upkeep/repair.py:_how_to_remake",  # test_repair.py: what else there is where no copy is
    "actstore/upkeep/copying.py:_copy_file",  # test_copy.py
    "actstore/upkeep/merge_plan.py:damaged",  # test_merge.py, as the next, whose command is run there
    "actstore/upkeep/merge_plan.py:planned",
    "actstore/cli/upkeep.py:drop",  # test_drop.py: repair after a drop
    "actstore/writing/dropping.py:_refuse_labelled",  # test_drop.py: labels are dropped, then their dataset
    "queries/second.py:_line",  # test_confirm.py, since it is several commands in one line
    "queries/scrub/study.py:_check_sites",  # test_scrub.py, as the next
    "queries/scrub/donors.py:_no_tree",
    "ingest/training/card.py:write_card",
}
MENTIONED = re.compile(r"`actstore (models list|models sites|models add( NAME FILE)?|read)`")  # named, not spelled out


def written(words: list[str], store: Path, added: str = "") -> list[str]:
    places = {"STORE": str(store), "RUN": added}
    return [places.get(word, word.replace("OUT", str(store.parent / "out"))) for word in words]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.where} {' '.join(case.ask)}")
def test_what_a_message_advises_works_and_then_so_does_what_was_asked_for(store, case):
    if case.spoil:
        case.spoil(store)
    refused = run(*written(case.ask, store))
    assert refused.exit_code in (1, 2), refused.output
    commands = advised_commands(refused.stderr)
    assert len(commands) == case.commands, refused.stderr
    added = ""
    for command in commands:
        done = run(*command, *(case.more if command[0] == "ingest" else ()))
        assert done.exit_code == (1 if command[0] == "verify" else 0), done.output
        added = command[command.index("--run") + 1] if "--run" in command else ""
    answered = run(*written(case.again or case.ask, store, added))
    assert answered.exit_code == 0, answered.output


def test_manifests_that_are_not_the_catalogs_are_looked_at_by_the_command_that_is_advised(store):
    another_past(store)
    with pytest.raises(Damaged, match="not those that its catalog was built from") as refused:
        Store(store)
    (command,) = advised_commands(str(refused.value))
    assert command == ["verify", str(store)]
    assert f"{store}: " in run(*command).stderr


@pytest.mark.parametrize("content", ["{", '{"format": "x"}', "[]", ""])
def test_where_no_command_helps_none_is_advised(store, content):
    text("store.json", content)(store)
    for refused in (run("info", store), run("repair", store)):
        assert refused.exit_code == 1
        assert "restore it from a copy" in refused.stderr
        assert advised_commands(refused.stderr) == []


def test_a_model_without_a_recipe_is_graded_by_the_command_that_is_advised(tmp_path):
    for suffix in (".safetensors", ".yaml"):
        shutil.copy(ROOT / "data" / "checkpoints" / f"reproduction{suffix}", tmp_path / f"a model{suffix}")
    said = yaml.safe_load((tmp_path / "a model.yaml").read_text())
    said.pop("training")
    (tmp_path / "a model.yaml").write_text(yaml.safe_dump(said))
    with pytest.raises(BadInput, match="names no recipe") as refused:
        write_card(tmp_path / "a model.safetensors")
    (command,) = advised_commands(str(refused.value))
    done = run(*command, "--trees", "20")
    assert done.exit_code == 0, done.output


def test_what_was_ingested_is_looked_at_by_the_command_that_is_named(store):
    done = run("ingest", store, "--model-of", "r", "--dataset", "d", "--run", "again", "--sites", "none")
    (command,) = advised_commands(done.stdout)
    assert "again" in run(*command).stdout


def test_a_variant_of_no_stored_set_says_which_sets_there_are(store):
    words = ["ingest", store, "--model", "reproduction", "--variant", "swap_last", "--dataset"]
    refused = run(*words, "e")
    assert refused.exit_code == 2
    assert "there is d" in refused.stderr or "there are d" in refused.stderr
    assert run(*words, "d", "--sites", "none").exit_code == 0


# Every command in a message is one of the above.


def advisers() -> set[str]:
    """FILE:FUNCTION of every place that makes a command for a message."""
    found = set()
    for path in [path for folder in ("actstore", "ingest", "queries") for path in (ROOT / folder).rglob("*.py")]:
        name = path.relative_to(ROOT).as_posix()
        for function in [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]:
            inner = [node for node in ast.walk(function) if isinstance(node, ast.FunctionDef) and node is not function]
            nested = {call for node in inner for call in ast.walk(node)}
            calls = [node for node in ast.walk(function) if isinstance(node, ast.Call) and node not in nested]
            if function.name not in ADVISING and any(
                isinstance(call.func, ast.Name) and call.func.id in ADVISING for call in calls
            ):
                found.add(f"{name}:{function.name}")
    return found


def test_every_place_that_advises_a_command_is_tested():
    assert advisers() == {case.where for case in CASES} | ELSEWHERE


def test_no_message_writes_a_command_by_hand():
    """Where it would not be quoted, and not tested here; docstrings and help are no messages."""
    for path in [path for folder in ("actstore", "ingest", "queries") for path in (ROOT / folder).rglob("*.py")]:
        tree = ast.parse(path.read_text())
        raised = [node for node in ast.walk(tree) if isinstance(node, ast.Raise)]
        texts = [node.value for one in raised for node in ast.walk(one) if isinstance(node, ast.Constant)]
        for text in (text for text in texts if isinstance(text, str)):
            assert "`actstore" not in MENTIONED.sub("", text), f"{path.name}: {text}"
