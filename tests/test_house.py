"""The rooms of the package: what each may import, no circle of files, and nothing private taken from elsewhere."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"actstore": ROOT / "actstore", "actstore.ingest": ROOT / "ingest", "actstore.queries": ROOT / "queries"}

# what each room may import, beside itself; CONTRIBUTING.md says what each is for
MAY = {
    "actstore": "verbs ingest.jobs store checkup interventions errors version cli.progress",
    "errors": "",
    "version": "",
    "intervals": "",
    "named": "",
    "cluster": "errors",
    "interventions": "",
    "advice": "named errors",
    "sites": "advice arrays errors",
    "storage": "errors",
    "commits": "storage errors",
    "outputs": "commits storage errors",
    "arrays": "storage errors",
    "catalog": "arrays commits storage errors",
    "sql": "catalog arrays commits storage errors",
    "reading": "sql catalog sites advice arrays commits storage errors",
    "writing": "catalog arrays named outputs commits storage errors version",
    "store": "reading sql sites advice outputs arrays commits storage errors",
    "checkup": "store commits storage errors version",
    "export": "store sites outputs errors",
    "upkeep": "interventions writing catalog arrays named commits storage errors",
    "ingest": "ingest.jobs",
    "ingest.task": "arrays",
    "ingest.trees": "ingest.task ingest.corpus.documents arrays catalog.declared errors",
    "ingest.corpus": "ingest.task arrays catalog.declared errors",
    "ingest.models": "ingest.trees arrays named storage errors",
    "ingest.answers": "ingest.models ingest.trees ingest.corpus arrays errors",
    "ingest.interventions": (
        "ingest.answers ingest.models ingest.trees ingest.corpus interventions store arrays errors"
    ),
    "ingest.training": "ingest.answers ingest.models ingest.trees named storage intervals errors",
    "ingest.jobs": (
        "ingest.task ingest.corpus ingest.trees ingest.models ingest.answers ingest.interventions interventions store writing "
        "cluster advice outputs arrays named commits storage errors"
    ),
    "ingest.replay": (
        "ingest.jobs ingest.interventions ingest.corpus ingest.answers ingest.models ingest.trees named store writing catalog "
        "arrays commits errors"
    ),
    "queries": "store interventions cluster writing.recording arrays.address named sites advice outputs intervals version errors",
}
ANY = ("cli", "verbs", "__main__")  # a command, and the function of its name, may call anything


def module_of(path: Path) -> str:
    name, folder = next((name, folder) for name, folder in reversed(FOLDERS.items()) if path.is_relative_to(folder))
    parts = path.relative_to(folder).with_suffix("").parts
    return ".".join([name, *(parts[:-1] if parts[-1] == "__init__" else parts)])


NOTEBOOKS = ROOT / "queries" / "notebooks"  # no room: they use the package as its users do
FILES = {
    module_of(path): path
    for folder in FOLDERS.values()
    for path in sorted(folder.rglob("*.py"))
    if path.parent != NOTEBOOKS
}


def room_of(module: str) -> str:
    """The first name below actstore, and of ingest the first two: a package's own file is of no room below it."""
    parts = module.split(".")[1:] or ["actstore"]
    return ".".join(parts[:2]) if parts[0] == "ingest" else parts[0]


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text())


@cache
def imported(module: str) -> frozenset[str]:
    """The package's modules that one imports, in functions and under TYPE_CHECKING too."""
    found = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{FILES[module]} imports by dots; write the whole name"
            inner = {f"{node.module}.{name.name}" for name in node.names}
            found |= {name if name in FILES else str(node.module) for name in inner}
    return frozenset(name for name in found if name.split(".")[0] == "actstore")


def named(text: str) -> set[str]:
    return set(text.split())


@pytest.mark.parametrize("module", FILES)
def test_a_file_imports_only_what_its_room_may(module):
    room = room_of(module)
    if room in ANY:
        return
    assert room in MAY, f"{FILES[module]} is in no room; give it one in MAY"
    for other in imported(module):
        allowed = named(MAY[room]) | {room}
        assert {room_of(other), other.removeprefix("actstore.")} & allowed, f"{FILES[module]} ({room}) imports {other}"


def test_the_table_names_rooms_that_are_there():
    rooms = {room_of(module) for module in FILES}
    assert {room for row in MAY.values() for room in named(row)} <= {
        *MAY,
        *ANY,
        "arrays.address",
        "ingest.corpus.documents",
        "catalog.declared",
        "cli.progress",
        "writing.recording",
    }
    assert rooms - set(ANY) <= MAY.keys()


def test_reading_and_writing_never_meet():
    above: dict[str, set[str]] = {}

    def reached(room: str) -> set[str]:
        if room not in above:
            above[room] = set()
            above[room] = {room}.union(*(reached(other) for other in named(MAY[room]) if other in MAY))
        return above[room]

    assert "writing" not in reached("store")
    assert not {"reading", "store"} & reached("upkeep")
    assert not {room for room in reached("queries") if room.startswith("ingest")}


def test_no_circle_of_files():
    left = {module: imported(module) & FILES.keys() for module in FILES}
    while free := [
        module
        for module, others in left.items()
        if not others & left.keys() or not any(module in imported(other) for other in left)
    ]:
        for module in free:
            del left[module]
    assert not left, f"these files import each other in a circle: {', '.join(sorted(left))}"


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_repr_html_"  # which notebooks call


@pytest.mark.parametrize("module", FILES)
def test_nothing_private_is_taken_from_elsewhere(module):
    own = {"self", "cls"} | {node.name for node in ast.walk(tree(module)) if isinstance(node, ast.ClassDef)}
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "actstore":
            assert not [name.name for name in node.names if is_private(name.name)], ast.unparse(node)
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            of_own = isinstance(node.value, ast.Name) and node.value.id in own
            of_python = isinstance(node.value, ast.Name) and node.value.id in ("os", "sys")
            assert of_own or of_python, f"{FILES[module]}:{node.lineno}: {ast.unparse(node)}"


# The storage seam: a store's bytes are touched in storage/ alone; all else asks storage.at for their place.

CALLS = {  # that touch a file: of os, and of any path
    "os": "open link symlink unlink remove rename replace rmdir mkdir makedirs scandir listdir walk truncate",
    "": "open read_bytes read_text write_bytes write_text glob rglob iterdir unlink rmdir mkdir touch",
}
OF_PATHS = {"local", "whole", "lease", "links", "regular", "hashing"}  # modules of storage/ that take paths
NO_STORE_OF_ITS_OWN = {  # files that touch others, and by what: none of it is a store's
    "catalog.build": "regular.check_regular shutil.copyfile unlink touch",  # what the place lends
    "catalog.hash_note": "hashing.hash_of hashing.hash_of_file",  # a descriptor, and the new catalog
    "catalog.tables": "regular.check_regular shutil.copyfile read_text",  # what the place lends, and schema.sql
    "checkup": "glob read_text os.open os.link write_bytes",  # /proc, /sys, and a temporary folder
    "cli.activation_files": "open",  # the user's
    "cli.complete": "iterdir",  # folders that a word may mean
    "cli.prompt": "mkdir open",  # the history
    "cli.terminal": "os.open shutil.get_terminal_size shutil.which",  # /dev/null, and a pager
    "commits.format": "glob iterdir",  # the names of stores beside, for a message
    "ingest.corpus.documents": "glob open read_bytes",  # the user's
    "ingest.corpus.spool": "open shutil.rmtree",  # in a temporary folder
    "ingest.models.config": "open",  # models and their configurations, until the next comment
    "ingest.models.load": "glob read_bytes",
    "ingest.models.pretrained": "iterdir open read_bytes",  # a model's own files
    "ingest.models.weights": "mkdir read_bytes write_bytes whole.write_whole",
    "ingest.replay.definitions": "read_bytes",
    "ingest.training.card": "read_text",
    "ingest.training.checkpoints": "mkdir local.Local open read_text",
    "ingest.training.recipe": "glob",
    "named": "glob",
    "outputs": "mkdir os.listdir os.rename shutil.rmtree write_text whole.beside whole.write_whole",  # the user's
    "export.hugging_face": "write_text",  # the user's
    "queries": "iterdir read_text",  # the queries that are installed
    "queries.probes.baselines": "read_text",  # the user's query
    "queries.app.serve": "open",  # a browser
    "queries.app.widgets": "read_text",  # the scripts that are installed
    "queries.report": "mkdir",  # the user's
    "reading.files": "read_bytes",  # the user's
    "sql.process": "read_text",  # /proc
    "sql.session": "regular.check_regular regular.open_regular",  # the catalog that the place lends
    "store": "read_text",  # info.sql
    "upkeep.verify": "hashing.hash_of",  # a descriptor
    "writing.recording": "read_bytes",  # results that were kept beside the store
}


def touches(source: ast.Module) -> set[str]:
    """The calls by which a file touches files by their path, and what it takes from storage/ to do so."""
    found = set()
    for node in ast.walk(source):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            of = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            if of == "shutil" or node.func.attr in named(CALLS["os" if of == "os" else ""]):
                found.add(f"{of}.{node.func.attr}" if of in ("os", "shutil") else node.func.attr)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "open":
            found.add("open")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("actstore.storage"):
            of = str(node.module).rpartition(".")[2]
            whole = {name.name for name in node.names} & OF_PATHS if of == "storage" else set()
            taken = {f"{of}.{name.name}" for name in node.names if of in OF_PATHS and not name.name.isupper()}
            found |= whole | taken
    return found


@pytest.mark.parametrize("module", [module for module in FILES if room_of(module) != "storage"])
def test_a_stores_bytes_are_touched_in_storage_alone(module):
    may = named(NO_STORE_OF_ITS_OWN.get(module.removeprefix("actstore."), ""))
    assert touches(tree(module)) <= may, f"{FILES[module]}: ask storage.at.at(root) for the store's place instead"


def test_what_would_pass_the_seam_by_is_seen():
    lines = {
        "(root / path).read_bytes()": "read_bytes",
        "os.open(path, 0)": "os.open",
        "open(path)": "open",
        "shutil.rmtree(root)": "shutil.rmtree",
        "from actstore.storage.local import Local": "local.Local",
        "from actstore.storage import links": "links",
        "from actstore.storage.regular import LONGEST": None,
        "place.descriptor(path)": None,
    }
    for line, seen in lines.items():
        assert touches(ast.parse(line)) == ({seen} if seen else set()), line
