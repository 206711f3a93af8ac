"""What DuckDB's parser says of a query: the ids it takes for tokens, and whether it names a run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

import duckdb

from actstore.catalog.tables import column_comments
from actstore.errors import BadInput
from actstore.sql.session import EXPLAIN, LONGEST, Session

Node = dict[str, Any]
TAKE_TOKENS = ("act", "attention", "logit_lens")  # functions whose first argument is a token_id
OF_RUNS = ("outcomes", "predictions", "generations")  # tables that hold answers of several runs for one tree
MATTERS = re.compile(
    rf"\b(?:{'|'.join((*TAKE_TOKENS, *OF_RUNS))})\b", re.IGNORECASE
)  # other queries need not be parsed
NAMES_ACT = re.compile(r"\bact\s*\(", re.IGNORECASE)
RUN = re.compile(r"\brun\b", re.IGNORECASE)
REWRITTEN = re.compile(r"\b(?:explain|pivot\w*)\b", re.IGNORECASE)
NOT_PIVOT = {"pivot": b"from", "on": b"select *,", "using": b","}
NO_TOKEN = "a token is named by tree_id * 256 + position, so token 300 is no part of tree 300"


class _Statements(list[Node]):
    """JSON of each statement of a query, walked once for all questions about it."""

    @cached_property
    def objects(self) -> list[Node]:
        return list(_walk(list(self)))


class Asked:
    """One parsed query.

    DuckDB's parser returns neither EXPLAIN nor a PIVOT that first queries its columns. Of EXPLAIN
    the query within is parsed, and of such a PIVOT the SELECT of the same source and columns.

    Attributes:
        tree: JSON of each statement, and of each text that is passed to the table function `query`;
            empty if the parser returns none.
        is_as_written: True if the places in `tree` are those of the query's own text.
        explained: the query after EXPLAIN; None without EXPLAIN.
        takes_where: True if a WHERE can choose the run, as it cannot in a PIVOT or SUMMARIZE.

    Args:
        session: the session whose parser is used.
        query: any text.
    """

    def __init__(self, session: Session, query: str) -> None:
        self.query, self.explained = query, None
        self.tree = plain = _parsed(session, query)
        self.is_as_written = bool(plain)
        if not plain and len(query) <= LONGEST and REWRITTEN.search(query):
            with suppress(ValueError, duckdb.Error):
                content = query.encode()
                first = next((at for at, kind in duckdb.tokenize(query) if kind != duckdb.token_type.comment), 0)
                text = content[first:].decode()
                if found := EXPLAIN.match(text):
                    self.explained = text = text[found.end() :]
                plain = _parsed(session, text)
                self.tree = plain or _parsed(session, _without_pivot(text))
        self.takes_where = bool(plain) and not any(
            found.get("type") in ("PIVOT", "SHOW_REF") for found in _dicts(plain)
        )
        for call in nodes(self.tree, "FUNCTION"):
            for argument in call["arguments"] if call["function_name"].lower() == "query" else ():
                text = argument["expression"].get("literal", {}).get("text", "")
                self.tree = _Statements([*self.tree, *_parsed(session, text)])

    def refuse_other_ids(self, reads: bool) -> None:
        """Refuse a column used as a token_id whose name says otherwise; expressions are allowed.

        Args:
            reads: True if activations are read at the query's token_id, so that no other column may
                be renamed to it.

        Raises:
            BadInput: `act`, `attention` or `logit_lens` takes such a column, or such a column is
                renamed to token_id.
        """
        local = {name for found in nodes(self.tree, "LAMBDA") for name in _names(found["lhs"])}
        calls = [found for found in nodes(self.tree, "FUNCTION") if found["function_name"].lower() in TAKE_TOKENS]
        for call in calls:
            column = _given(call)
            if column and column not in local and not _is_token_id(column):
                function = call["function_name"].lower()
                raise BadInput(
                    f"{function}({column}, …) takes {column} for a token_id: {NO_TOKEN}; write {function}(token_id, …) with the "
                    f"token_id of tokens, edge_targets or answer_tokens. If {column} does hold token ids, say "
                    f"`{column} as token_id` where it is made, or write an expression: {function}({column} + 0, …)"
                )
        for column in _renamed(self.tree) if calls or reads else ():
            if column in _other_ids():
                raise BadInput(
                    f"the query's token_id is {column} renamed: {NO_TOKEN}; select the token_id of tokens, edge_targets or "
                    f"answer_tokens. If {column} does hold token ids, write an expression: {column} + 0 as token_id"
                )

    @cached_property
    def names_a_run(self) -> bool:
        """True if the query mentions a column `run` anywhere."""
        if not self.tree:
            return bool(RUN.search(self.query))
        every = self.tree.objects
        used = [*(_using(node) for node in every if node.get("type") == "JOIN"), *map(_pivot_groups, every)]
        return "run" in _names(self.tree) or any("run" in columns for columns in used)

    def without_run(self, columns: Sequence[str]) -> dict[str, str]:
        """Tables of OF_RUNS, by alias, for which the query neither chooses a run nor yields one.

        Of tables joined by their run, the first stands for all.

        Args:
            columns: the query's columns; of EXPLAIN, those of the query within.
        """
        if not self.tree:
            mentioned = [table for table in OF_RUNS if re.search(rf"\b{table}\b", self.query, re.IGNORECASE)]
            return {} if self.names_a_run else dict(zip(mentioned, mentioned, strict=True))
        shown = {found["show_type"] for found in _dicts(self.tree) if found.get("type") == "SHOW_REF"}
        if shown - {"SUMMARY"}:  # DESCRIBE yields none of the rows
            return {}
        defined = {entry["key"].lower() for found in _dicts(self.tree) for entry in _entries(found)}
        passed_on = "run" in map(str.lower, columns) or self.names_a_run or "SUMMARY" in shown
        lacking = [
            group
            for select in _selects(self.tree)
            for group in _groups(select)
            if not _is_named(select, group, passed_on)
        ]
        return dict(next(iter(group.items())) for group in lacking if not defined & set(group.values()))


def _parsed(session: Session, query: str) -> _Statements:
    """JSON of each statement; empty if the parser returns none."""
    with suppress(ValueError, RecursionError):
        parsed = json.loads(session.parse(query))
        return _Statements([] if parsed["error"] else parsed["statements"])
    return _Statements()


def _without_pivot(query: str) -> str:
    """Replace each `pivot a on b using c` by `from a select *, b, c`."""
    content, found = query.encode(), list[dict[str, int]]()
    scopes: list[dict[str, int]] = [{}]  # the places of PIVOT, its ON and its USING, in each open parenthesis
    for at, kind in duckdb.tokenize(query):
        word = content[at:].split(maxsplit=1)[0].lower() if kind == duckdb.token_type.keyword else content[at : at + 1]
        scope = scopes[-1]
        if word == b"(":
            scopes.append({})
        elif word == b")" and len(scopes) > 1:
            found.append(scopes.pop())
        elif word.startswith(b"pivot"):
            found.append(scope)
            scopes[-1] = {"pivot": at}
        elif word == b"on" and "pivot" in scope:  # joins within its source have one, too: the last is its own
            scopes[-1] = {"pivot": scope["pivot"], "on": at}
        elif word == b"using" and "on" in scope:
            scope.setdefault("using", at)
    places = {scope[word]: word for scope in [*found, *scopes] if "on" in scope for word in scope}
    for at in sorted(places, reverse=True):
        content = content[:at] + NOT_PIVOT[places[at]] + re.sub(rb"^\w+", b"", content[at:])
    return content.decode()


def nodes(tree: Any, kind: str) -> Iterator[Node]:
    """All nodes of a class in a JSON tree, the root included."""
    return (node for node in _dicts(tree) if node.get("class") == kind)


def _dicts(tree: Any) -> Iterator[Node]:
    """All JSON objects in a tree, root included."""
    return iter(tree.objects) if isinstance(tree, _Statements) else _walk(tree)


def _walk(tree: Any, within: bool = False) -> Iterator[Node]:
    """All JSON objects in a tree, root included; `within` leaves out those of nested SELECTs."""
    left = [tree]
    while left:
        node = left.pop()
        if isinstance(node, list):
            left += node
        elif isinstance(node, dict) and not (within and node is not tree and node.get("type") == "SELECT_NODE"):
            yield node
            left += [value for value in node.values() if value and isinstance(value, dict | list)]


def _selects(tree: Any) -> Iterator[Node]:
    return (node for node in _dicts(tree) if node.get("type") == "SELECT_NODE")


def _joins(source: Node) -> Iterator[Node]:
    """The joins of one SELECT's source, without those of nested SELECTs."""
    return (node for node in _walk(source, within=True) if node.get("type") == "JOIN")


def _using(join: Node) -> list[str]:
    return [column.lower() for column in join["using_columns"]]


def _pivot_groups(node: Node) -> list[str]:
    """The columns that a PIVOT groups by; none for another node."""
    return [column.lower() for column in node["groups"]] if node.get("type") == "PIVOT" else []


def _entries(node: Node) -> list[Node]:
    """The WITH entries of a SELECT."""
    found: list[Node] = node["cte_map"]["map"] if "cte_map" in node else []
    return found


def _names(tree: Any) -> set[str]:
    """Names of all mentioned columns, without their tables."""
    return {found["column_names"][-1].lower() for found in nodes(tree, "COLUMN_REF")}


# ids


def _given(call: Node) -> str | None:
    """The column that a function takes as token_id; None if the argument is an expression."""
    path, arguments = call["qualified_name"]["path"], call["arguments"]
    if len(path) > 1 and len(arguments) == 2:  # tree_id.act('run', 'site')
        return str(path[-2]).lower()
    first = arguments[0]["expression"] if arguments else {}
    return str(first["column_names"][-1]).lower() if first.get("class") == "COLUMN_REF" else None


def _is_token_id(column: str) -> bool:
    return column.lower().endswith("token_id")


def _other_ids() -> set[str]:
    """Columns other than token_id of the tables about trees."""
    columns = column_comments()
    return {column for table, column in columns if (table, "tree_id") in columns} - {"token_id"}


def _renamed(tree: Any) -> Iterator[str]:
    """The columns that a SELECT, or a list of names after it, renames to token_id."""
    for node in _dicts(tree):
        for item in node["select_list"] if node.get("type") == "SELECT_NODE" else ():
            if _is_token_id(item["alias"]):
                yield from _plain(item)
        if node.get("column_name_alias") and node.get("subquery"):  # (select …) t(token_id)
            yield from _by_place(node["column_name_alias"], node["subquery"]["node"])
        if node.get("aliases") and node.get("query_node"):  # with t(token_id) as (select …)
            yield from _by_place(node["aliases"], node["query_node"])
        if node.get("type") == "SET_OPERATION_NODE":  # the first SELECT names the columns
            first, *others = node["children"] or [{}]
            names = [item["alias"] or item.get("column_names", [""])[-1] for item in first.get("select_list", ())]
            for other in others:
                yield from _by_place(names, other)


def _plain(item: Node) -> Iterator[str]:
    if item["class"] == "COLUMN_REF" and not _is_token_id(item["column_names"][-1]):
        yield item["column_names"][-1].lower()


def _by_place(names: Sequence[str], node: Node) -> Iterator[str]:
    items = node.get("select_list", [])
    if not any(item["class"] == "STAR" for item in items):
        for name, item in zip(names, items, strict=False):
            if _is_token_id(name):
                yield from _plain(item)


# runs


def _groups(select: Node) -> list[dict[str, str]]:
    """The tables of OF_RUNS that a SELECT reads, by alias, grouped by joins on their run.

    A group that is also joined on the run with another table is left out, since that table may
    choose the run.
    """
    tables = {_alias(table): table["table_name"].lower() for table in _sources(select["from_table"])}
    group = {alias: {alias} for alias in tables}
    joins = list(_joins(select["from_table"]))
    tied = [[*_sides(join)] for join in joins if "run" in _using(join) or join["ref_type"] == "NATURAL"]
    tied += [[_table(side) for side in pair] for pair in _equal_runs(select)]
    for aliases in tied:
        together = set().union(*(group.setdefault(alias, {alias}) for alias in aliases))
        group |= dict.fromkeys(together, together)
    found: list[dict[str, str]] = []
    for alias in tables:
        named = {other: tables.get(other, "") for other in sorted(group[alias])}
        if set(named.values()) <= set(OF_RUNS) and named not in found:
            found.append(named)
    return found


def _alias(table: Node) -> str:
    return str(table["alias"] or table.get("table_name", "")).lower()


def _sources(table: Node | None) -> Iterator[Node]:
    """The tables of a FROM, without those of its subqueries."""
    if table and table["type"] == "BASE_TABLE":
        yield table
    elif table and table["type"] == "PIVOT":
        yield from _sources(table["source"])
    elif table and table["type"] == "JOIN":
        yield from _sources(table["left"])
        yield from _sources(table["right"])


def _sides(join: Node) -> Iterator[str]:
    """Aliases on both sides of a join by name.

    A side of several tables gives those of OF_RUNS, or all if there are none.
    """
    for side in (join["left"], join["right"]):
        if side["type"] not in ("BASE_TABLE", "JOIN"):
            yield _alias(side)
        tables = list(_sources(side))
        of_runs = [table for table in tables if table["table_name"].lower() in OF_RUNS]
        yield from map(_alias, of_runs or tables)


def _equal_runs(select: Node) -> Iterator[tuple[Node, Node]]:
    """The two sides of each `a.run = b.run`."""
    for found in nodes(select, "COMPARISON"):
        if found["type"] == "COMPARE_EQUAL" and _table(found["left"]) and _table(found["right"]):
            yield found["left"], found["right"]


def _table(node: Node) -> str:
    """The alias of a column `alias.run`; "" for anything else."""
    names = [name.lower() for name in node.get("column_names", ())]
    return names[-2] if len(names) > 1 and names[-1] == "run" else ""


def _is_named(select: Node, group: dict[str, str], passed_on: bool) -> bool:
    """True if a SELECT mentions a group's run outside the group's joins.

    Args:
        group: aliases of the group.
        passed_on: True if a run that `*` yields is mentioned elsewhere.
    """
    ties = {id(side) for pair in _equal_runs(select) for side in pair}
    if any(_table(found) in group for found in nodes(select, "COLUMN_REF") if id(found) not in ties):
        return True
    within = list(_walk(select, within=True))
    own = [node for node in within if node.get("class") in ("COLUMN_REF", "STAR")]
    if any("run" in _pivot_groups(node) for node in within) or any(
        [name.lower() for name in node.get("column_names", ())] == ["run"] for node in own
    ):
        return True
    stars = [star for star in own if star["class"] == "STAR" and "run" not in star["exclude_list"]]
    return passed_on and any(star["relation_name"].lower() in ("", *group) for star in stars)
