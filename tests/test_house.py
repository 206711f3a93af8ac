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
    "actstore": "verbs ingest.jobs store errors version",
    "errors": "",
    "version": "",
    "intervals": "",
    "named": "",
    "advice": "named errors",
    "sites": "advice arrays errors",
    "storage": "errors",
    "commits": "storage errors",
    "outputs": "commits storage errors",
    "arrays": "storage errors",
    "catalog": "commits storage errors",
    "sql": "catalog arrays commits storage errors",
    "reading": "sql catalog sites advice arrays commits storage errors",
    "writing": "catalog arrays named outputs commits storage errors version",
    "store": "reading sql sites advice arrays commits storage errors",
    "upkeep": "writing catalog arrays commits storage errors",
    "ingest": "ingest.jobs",
    "ingest.trees": "ingest.task arrays errors",
    "ingest.models": "ingest.trees arrays named storage errors",
    "ingest.answers": "ingest.models ingest.trees arrays errors",
    "ingest.training": "ingest.answers ingest.models ingest.trees named storage intervals errors",
    "ingest.jobs": "ingest.task ingest.trees ingest.models ingest.answers writing arrays named commits storage errors",
    "ingest.replay": "named ingest.jobs ingest.answers ingest.models ingest.trees store writing catalog arrays commits errors",
    "queries": "store writing.recording arrays.address named sites advice outputs intervals version errors",
}
ANY = ("cli", "verbs", "__main__")  # a command, and the function of its name, may call anything


def module_of(path: Path) -> str:
    name, folder = next((name, folder) for name, folder in reversed(FOLDERS.items()) if path.is_relative_to(folder))
    parts = path.relative_to(folder).with_suffix("").parts
    return ".".join([name, *(parts[:-1] if parts[-1] == "__init__" else parts)])


FILES = {module_of(path): path for folder in FOLDERS.values() for path in sorted(folder.rglob("*.py"))}


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
        "ingest.task",
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
