"""The checkpoint of the log: one sealed file that sums up manifests 1 to n for readers.

The checkpoint is derived from the manifests, and is no witness of what was committed. If it does
not fit, every manifest is read. A writer replaces it after the catalog, so a reader that reads the
checkpoint first and the catalog second finds no older catalog.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from actstore.commits import log
from actstore.commits.format import CHECKPOINT
from actstore.commits.manifest import Manifest
from actstore.errors import Damaged, Unreachable
from actstore.storage import sealed
from actstore.storage.at import at
from actstore.storage.content import Hash, Positive, as_a, check_inside, json_object
from actstore.storage.machine import limit_reached
from actstore.storage.regular import LONGEST

LEAST = 16  # commits; the manifests of fewer are read as quickly


@dataclass(frozen=True)
class Checkpoint:
    """What manifests 1 to n come to.

    Attributes:
        commits: n.
        last_xxh3_128: xxh3-128 of manifest n.
        log_xxh3_128: log_hash of all n.
        definitions: the commits among them that define runs; a reader checks their files' sizes.
    """

    commits: Positive
    last_xxh3_128: Hash
    log_xxh3_128: Hash
    definitions: list[Manifest]

    @classmethod
    def of(cls, committed: Sequence[Manifest]) -> Checkpoint:
        """The checkpoint of a whole log."""
        runs = [manifest for manifest in log.live(committed) if manifest.kind == "run" and manifest.files]
        return cls(len(committed), committed[-1].xxh3_128, log.log_hash(committed), runs)

    def to_json(self) -> bytes:
        """The bytes of the checkpoint's file."""
        body = asdict(self)
        for definition in body["definitions"]:
            del definition["dropped"]  # of a drop alone; older checkpoints lack it
        return sealed.to_json(body)

    def since(self, root: Path, snapshot: int, hash_of_log: str) -> list[Manifest] | None:
        """The definitions, and the commits after n; None if the checkpoint does not fit.

        Args:
            root: the store.
            snapshot: commits that the catalog holds.
            hash_of_log: of their manifests, as the catalog has it.
        """
        if self.commits > snapshot:
            return None
        try:
            last, *since = log.chained(root, self.commits - 1, snapshot)
        except (Damaged, FileNotFoundError):
            return None
        fits = last.xxh3_128 == self.last_xxh3_128 and log.log_hash(since, self.log_xxh3_128) == hash_of_log
        return log.live([*self.definitions, *since]) if fits else None


def content(root: Path) -> bytes | None:
    """The bytes of a store's checkpoint; None if there is none, empty if it cannot be read."""
    try:
        return at(root).read(CHECKPOINT)
    except FileNotFoundError:
        return None
    except Unreachable:
        raise
    except OSError as error:
        if reached := limit_reached(error, f"cannot read {root / CHECKPOINT}"):
            raise reached from error
        return b""


def parsed(held: bytes | None) -> Checkpoint | None:
    """The checkpoint in some bytes; None if they hold none."""
    if not held or not sealed.is_whole(held):
        return None
    try:
        found = as_a(Checkpoint, json_object(held))
        for file in (file for manifest in found.definitions for file in manifest.files):
            check_inside(file.path)
    except ValueError:
        return None
    return found


def fits(held: bytes, committed: Sequence[Manifest]) -> bool:
    """True if some bytes are the checkpoint of the first n commits, for any n."""
    found = parsed(held)
    return bool(
        found and found.commits <= len(committed) and Checkpoint.of(committed[: found.commits]).to_json() == held
    )


def write(root: Path, committed: Sequence[Manifest]) -> None:
    """Replace the checkpoint, if there is one or the log is long enough for one.

    Args:
        committed: all manifests.
    """
    if not committed or (len(committed) < LEAST and not at(root).has(CHECKPOINT)):
        return
    wanted = Checkpoint.of(committed).to_json()
    if len(wanted) <= LONGEST and content(root) != wanted:
        at(root).swap(CHECKPOINT, wanted)
