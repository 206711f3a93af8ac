"""What is dropped with a run, a dataset or a label: the files of earlier commits that hold it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from actstore.arrays.address import Ids
from actstore.catalog.witness import OF_RUN
from actstore.commits import log
from actstore.commits.format import ARRAYS, check_format, unembedding_path, weights_path
from actstore.commits.manifest import Dropped, Manifest, Part
from actstore.errors import BadInput, NotStored, advised, nearest
from actstore.storage.backend import File
from actstore.writing.committed import dropped_ids
from actstore.writing.parts import read_part, rows_committed
from actstore.writing.writer import open_writer

Kind = Literal["run", "dataset", "label"]
Rows = list[dict[str, Any]]
OF_DATASET = ("datasets", "trees", "edges", "tokens", "listed_sequences", "relations")


def plan(root: Path, kind: Kind, name: str) -> tuple[Dropped, int]:
    """What a drop would take out, and its bytes; nothing is written.

    A run goes with its arrays, answers and recorded results, and with its model if no other run is
    of that model. Its dataset stays. A dataset goes with its sequences, tokens and documents.

    Args:
        kind: what is dropped.
        name: of the run, dataset or label; views are dropped as labels are.

    Raises:
        NotStored: the store holds nothing of the name.
        BadInput: a run, a variant or a label is left over the dataset; or a run with edits rests on
            the run.
    """
    check_format(root)
    committed = log.live(log.manifests(root))
    tables = ("models", "datasets", "runs", "relations", "interventions")
    rows = {table: rows_committed(root, committed, table).to_dicts() for table in tables}
    is_gone = {"run": _of_run, "dataset": _of_dataset, "label": _of_label}[kind](root, rows, name)
    if kind == "dataset":
        _refuse_labelled(root, committed, rows, name)
    files = [(manifest, file) for manifest in committed for file in manifest.files]
    gone = [file for manifest, file in files if is_gone(manifest, file)]
    ids = Ids.beyond(rows["datasets"], dropped_ids(committed))
    return Dropped(kind, name, [file.path for file in gone], *ids), sum(file.bytes for file in gone)


def drop(root: Path, kind: Kind, name: str, wait: float = 0.0) -> Dropped:
    """Commit a drop.

    Args:
        kind, name: see `plan`.
        wait: seconds to wait for another process that writes to the store.

    Raises:
        NotStored, BadInput: see `plan`.
        Busy: another process still writes.
    """
    plan(root, kind, name)
    with open_writer(root, wait=wait) as writer:
        dropped, _ = plan(root, kind, name)  # what a writer before this one has brought goes, too
        writer.drop(dropped)
    return dropped


IsGone = Callable[[Manifest, File], bool]


def _of_run(root: Path, rows: dict[str, Rows], name: str) -> IsGone:
    run = _named(root, rows["runs"], "run", name)
    weights = run["weights_sha256"]
    edited = {row["run"] for row in rows["interventions"] if name in (row["base_run"], row["donor_run"])} - {name}
    if edited:
        commands = " and ".join(advised("drop", root, "--run", each) for each in sorted(edited))
        raise BadInput(f"run {name!r} is base or donor of {', '.join(sorted(edited))}; drop that first with {commands}")
    is_last = not any(row["weights_sha256"] == weights and row["run"] != name for row in rows["runs"])
    of_model = {weights_path(weights), unembedding_path(weights)} if is_last else set()

    def is_gone(manifest: Manifest, file: File) -> bool:
        if not isinstance(file, Part):
            return file.path.startswith(f"{ARRAYS}/{name}/") or file.path in of_model
        if file.table == "results":
            return read_part(root, file.path)["run"].unique().to_list() == [name]
        if file.table == "models":
            return is_last and weights.startswith(file.owner)
        of_run = file.table in ("runs", *OF_RUN) and file.owner == name
        return of_run or (file.table == "sites" and file.owner.split("/")[0] == name)

    return is_gone


def _of_dataset(root: Path, rows: dict[str, Rows], name: str) -> IsGone:
    vocabulary = _named(root, rows["datasets"], "dataset", name).get("vocabulary")
    is_shared = any(row.get("vocabulary") == vocabulary and row["dataset"] != name for row in rows["datasets"])
    over = [f"run {row['run']}" for row in rows["runs"] if row["dataset"] == name]
    over += [f"its variant {row['dataset']}" for row in rows["datasets"] if row.get("variant_of") == name]
    if over:
        raise BadInput(f"dataset {name!r} is that of {', '.join(over)}; drop those first")
    documents = [row["name"] for row in rows["relations"] if (row["kind"], row["owner"]) == ("documents", name)]

    def is_gone(manifest: Manifest, file: File) -> bool:
        if not isinstance(file, Part) or manifest.kind == "labels":
            return False
        if file.table == "vocabularies":
            return file.owner == vocabulary and not is_shared
        return file.owner == name and file.table in (*OF_DATASET, *documents)

    return is_gone


def _refuse_labelled(root: Path, committed: Sequence[Manifest], rows: dict[str, Rows], name: str) -> None:
    """Refuse to drop a dataset while labels lie on its tokens or sequences."""
    row = _named(root, rows["datasets"], "dataset", name)
    first, stop = Ids.of_dataset(row), Ids.beyond([row])
    over = {}
    for label in (relation["name"] for relation in rows["relations"] if relation["kind"] == "labels"):
        keys = rows_committed(root, committed, label).to_series()  # the key is the first column
        least, end = (getattr(ids, keys.name) for ids in (first, stop))
        if n := int(((keys >= least) & (keys < end)).sum()):
            over[label] = n
    if over:
        labels = ", ".join(f"{label} ({n:,} rows)" for label, n in over.items())
        commands = " and ".join(advised("drop", root, "--label", label) for label in over)
        raise BadInput(
            f"labels lie on dataset {name!r}: {labels}; drop them first with {commands}, or replace them by labels of other "
            "datasets (label --replace)"
        )


def _of_label(root: Path, rows: dict[str, Rows], name: str) -> IsGone:
    _named(root, [row for row in rows["relations"] if row["kind"] in ("labels", "view")], "name", name, "label")
    return lambda manifest, file: manifest.kind == "labels" and isinstance(file, Part) and file.owner == name


def _named(root: Path, rows: Sequence[dict[str, Any]], column: str, name: str, called: str = "") -> dict[str, Any]:
    """The row of a name.

    Raises:
        NotStored: there is none; says which names there are.
    """
    names, called = [str(row[column]) for row in rows], called or column
    if name not in names:
        held = ", ".join(names) if names else f"no {called}"
        raise NotStored(f"no {called} {name!r}{nearest(name, names)}; {root} holds {held}")
    return rows[names.index(name)]
