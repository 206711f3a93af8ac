"""What a machine, a folder and a store are like, and what would be slow there: `actstore doctor`.

Each fact is one line. A fact with advice is something to look at. Nothing is loaded that takes
time, and nothing is written but a file in a folder beside the store, which is removed at once.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from statistics import median

from actstore.commits import log, pending
from actstore.commits.format import FORMAT_VERSION, check_format
from actstore.errors import ActstoreError, advised
from actstore.storage.at import at, place, scheme
from actstore.storage.backend import ENDLESS
from actstore.storage.cache import folder as cache_folder
from actstore.storage.machine import (
    GROUP,
    LEAST_FOR_MODELS,
    MEMORY,
    allowed_maps,
    check_memory,
    free_memory,
    n_processors,
)
from actstore.store import Store
from actstore.version import __version__

LIBRARIES = (
    *("duckdb", "polars", "pyarrow", "numpy", "zarr", "safetensors", "scikit-learn"),
    *("torch", "transformer_lens", "transformers"),
)
OF_DEVELOPERS = ("dev", "bench")  # extras that nobody else needs
EXTRA = re.compile(r"""^([\w.-]+).*;.*extra\s*==\s*['"]([\w-]+)['"]""")
OVER_A_NETWORK = re.compile(r"nfs\d?|cifs|smb\d?|smbfs|lustre|gpfs|beegfs|ceph|glusterfs|afs|9p|fuse(\..*)?|fuseblk")
FEW_FILES, FEW_MAPS = 4096, 65_530  # open files of a store of many sites; Linux's own number of maps
LITTLE_MEMORY, LITTLE_ROOM = 4e9, 5e9  # bytes: what a small language model, and a small ingest, take
NO_LIMIT = 1 << 60
PAGES = 32  # of the file that is tried
SLOW_PAGE = 0.002  # seconds: a local disk takes a tenth of that, and one that turns more
DIRECT: int | None = getattr(os, "O_DIRECT", None)  # not on every system


@dataclass(frozen=True)
class Fact:
    """Something that was looked at.

    Attributes:
        about: versions, extras, machine, folder or store.
        what: what was looked at.
        found: what it is, for a person to read.
        advice: what is slow or wrong about it, and what to do; None if nothing is.
    """

    about: str
    what: str
    found: str
    advice: str | None = None

    def __str__(self) -> str:
        """One line."""
        return f"{self.what}: {self.found}" + (f"; {self.advice}" if self.advice else "")


def doctor(store: str | Path | Store | None = None) -> list[Fact]:
    """Say what versions, limits and disks there are, what would be slow here, and how a store is.

    Args:
        store: a path, or an open store; need not be one that can be opened. Default: the working
            folder is looked at, as the place of a store to be made.

    Returns:
        The facts, by what they are about. A store that cannot be opened is a fact.

    Raises:
        BadInput: the path has a character that is not Unicode, or leads to no known kind of place.
    """
    root = None if store is None else store.path if isinstance(store, Store) else place(store)
    memory = _memory()
    facts = [*_versions(), *_extras(), *_machine(memory)]
    facts += _folder(Path.cwd() if root is None else root)
    return facts if root is None else [*facts, *_store(root, memory)]


def _versions() -> Iterator[Fact]:
    yield Fact("versions", "actstore", __version__)
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    yield Fact("versions", "Python", f"{platform.python_version()} on {system}")
    for name in LIBRARIES:
        found = _version(name)
        advice = None if found else f"actstore needs it: pip install {name}"
        yield Fact("versions", name, found or "not installed", advice)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _extras() -> Iterator[Fact]:
    """What each extra brings, and whether it is installed; a missing extra is no fault."""
    libraries: dict[str, list[str]] = {}
    for text in requires("actstore") or []:
        if (named := EXTRA.match(text)) and named[2] not in OF_DEVELOPERS:
            libraries.setdefault(named[2], []).append(named[1])
    for extra, names in sorted(libraries.items()):
        lacking = [name for name in names if _version(name) is None]
        said = ", ".join(f"{name} {_version(name)}" for name in names)
        how = f"not installed ({', '.join(lacking)}); pip install 'actstore[{extra}]'"
        yield Fact("extras", extra, how if lacking else said)


def _machine(memory: int) -> Iterator[Fact]:
    import resource

    def about(what: str, found: str, advice: str | None = None) -> Fact:
        return Fact("machine", what, found, advice)

    n, share = n_processors(), _share_of_processors()
    few = share is not None and share < n
    shared = f", {share:g} of them by the control group" if few else ""
    less = f"more threads than that wait for each other: OMP_NUM_THREADS={max(int(share or 1), 1)}" if few else None
    yield about("processors", f"{n}{shared}", less)
    told = os.environ.get("OMP_NUM_THREADS", "")
    many = told.isdecimal() and int(told) > n
    yield about(
        "threads", f"OMP_NUM_THREADS={told}" if told else "as many as processors", _if(many, f"give {n} or fewer")
    )
    load = os.getloadavg()[0]
    yield about("load", f"{load:.1f} in the last minute", _if(load > n, "other processes take the processors now"))
    free, with_swap = free_memory(swap=False), free_memory()
    little = "a language model may not fit: smaller --batch-size, fewer --sites"
    if free is None or with_swap is None:
        yield about("memory", _size(memory))
    else:
        swap = f", {_size(with_swap)} with swap" if with_swap > free else ""
        yield about("memory", f"{_size(memory)}, {_size(free)} free{swap}", _if(free < LITTLE_MEMORY, little))
    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    limit = most != resource.RLIM_INFINITY
    tight = f"models need {_size(LEAST_FOR_MODELS)}: ulimit -v unlimited"
    yield about("addresses", _size(most) if limit else "no limit", _if(limit and most < LEAST_FOR_MODELS, tight))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # the command raised the first to the second
    files = "no limit" if hard == resource.RLIM_INFINITY else f"{hard:,} at most"
    few_files = hard != resource.RLIM_INFINITY and hard < FEW_FILES
    yield about("open files", files, _if(few_files, "too few for a store of many sites: ulimit -n 65536"))
    maps = allowed_maps()
    few_maps = f"reads of many sites need more: sysctl -w vm.max_map_count={FEW_MAPS}"
    yield about("memory maps", f"{maps:,} at most", _if(maps < FEW_MAPS, few_maps))
    yield about("GPU", *_gpu())


def _if(holds: bool, advice: str) -> str | None:
    return advice if holds else None


def _size(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:,.1f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:,.1f} MB"


def _memory() -> int:
    """Bytes of memory: the machine's, or what a control group leaves this process."""
    total = NO_LIMIT
    with suppress(OSError, ValueError):
        found = re.search(r"^MemTotal:\s+(\d+) kB", MEMORY.read_text(), re.MULTILINE)
        total = int(found[1]) * 1024 if found else NO_LIMIT
        return min(total, int((GROUP / "memory.max").read_text()))
    return total


def _share_of_processors() -> float | None:
    """Processors that a control group leaves this process; None if it sets no limit."""
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return int(quota) / int(period)
    return None


def _gpu() -> tuple[str, str | None]:
    """The GPUs, and whether torch can use them; torch is not loaded."""
    names = []
    for about in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        with suppress(OSError):
            names += re.findall(r"^Model:\s+(.*\S)", about.read_text(), re.MULTILINE)
    without = names and "+cpu" in (_version("torch") or "")
    return ", ".join(names) or "none", "this torch is built without CUDA; install another" if without else None


def _folder(root: Path) -> Iterator[Fact]:
    def about(what: str, found: str, advice: str | None = None) -> Fact:
        return Fact("folder", what, found, advice)

    if scheme(root):
        here = cache_folder()
        lacks = None if _version("obstore") else "needs obstore: pip install 'actstore[s3]'"
        yield about("place", f"{root}, over a network; catalogs are kept in {here}", lacks)
        root = here
    while not root.is_dir() and root != root.parent:
        root = root.parent
    root = root.resolve()
    kind, source = _file_system(root)
    slow = "each read is asked over the network; `actstore copy` to a local disk, and read there"
    lost = "held in memory, and gone after a restart; name a folder on a disk"
    network = bool(OVER_A_NETWORK.fullmatch(kind))
    yield about(
        "file system", f"{kind} of {source}, {root}", slow if network else _if(kind in ("tmpfs", "ramfs"), lost)
    )
    free = at(root).free_room()
    room = "none is counted" if free == ENDLESS else f"{_size(free)} free"
    yield about("room", room, _if(free < LITTLE_ROOM, "an ingest says what it needs before it begins"))
    yield from _abilities(root, about)


def _file_system(folder: Path) -> tuple[str, str]:
    """The kind of a folder's file system, and what is mounted there."""
    best = ("unknown", "unknown", "")
    with suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            mounted, _, rest = line.partition(" - ")
            point = re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), mounted.split()[4])
            if folder.is_relative_to(point) and len(point) >= len(best[2]):
                kind, source = rest.split()[:2]
                best = (kind, source, point)
    return best[0], best[1]


def _abilities(folder: Path, about: Callable[..., Fact]) -> Iterator[Fact]:
    """What the file system is able to do, tried on a file beside the store, in its own folder."""
    beside = folder.parent if (folder / "store.json").exists() else folder
    read_only = None if os.access(folder, os.W_OK) else "a store here can be read, and not written"
    try:
        if beside.stat().st_dev != folder.stat().st_dev:
            raise OSError(errno.EXDEV, "the store is mounted by itself")
        with tempfile.TemporaryDirectory(prefix=".actstore-doctor-", dir=beside) as made:
            path = Path(made, "tried")
            path.write_bytes(bytes(PAGES * mmap.PAGESIZE))
            lacking = [name for name, works in _tries(path) if not works]
            seconds = None if "direct reads" in lacking else _page_time(path)
    except OSError as error:
        yield about("writing", f"not tried in {beside} ({error.strerror})", read_only)
        return
    needed = [name for name in lacking if name != "direct reads"]
    without = f"no store can be written here without {', '.join(needed)}; name another file system"
    can = (
        f"works; no {', '.join(lacking)}" if lacking else "works, with hard links, locks, fsync, maps and direct reads"
    )
    yield about("writing", can, _if(bool(needed), without))
    if seconds is not None:
        slow = "rows in no order wait for the disk: read in the order of token_id, or by Store.batches"
        yield about(
            "reading", f"{seconds * 1e3:.2g} ms for a page that is not in memory", _if(seconds > SLOW_PAGE, slow)
        )


def _tries(path: Path) -> Iterator[tuple[str, bool]]:
    """Abilities of a file system, and whether each is there."""

    def works(call: Callable[[int], object], flags: int = os.O_RDWR) -> bool:
        try:
            descriptor = os.open(path, flags)
        except OSError:
            return False
        try:
            call(descriptor)
        except (OSError, ValueError):
            return False
        finally:
            os.close(descriptor)
        return True

    yield "hard links", works(lambda _: os.link(path, path.with_name("link")))
    yield "locks", works(lambda descriptor: fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB))
    yield "fsync", works(os.fsync)
    yield "maps", works(lambda descriptor: mmap.mmap(descriptor, mmap.PAGESIZE, prot=mmap.PROT_READ).close())
    with mmap.mmap(-1, mmap.PAGESIZE) as page:  # direct reads want an address that begins a page
        yield "direct reads", DIRECT is not None and works(lambda fd: os.readv(fd, [page]), os.O_RDONLY | DIRECT)


def _page_time(path: Path) -> float:
    """Seconds that the disk takes for a page: the median of some."""
    assert DIRECT is not None
    descriptor, times = os.open(path, os.O_RDONLY | DIRECT), []
    try:
        with mmap.mmap(-1, mmap.PAGESIZE) as page:
            for number in range(0, PAGES, 2):
                began = time.perf_counter()
                os.preadv(descriptor, [page], number * mmap.PAGESIZE)
                times.append(time.perf_counter() - began)
    finally:
        os.close(descriptor)
    return median(times)


def _store(root: Path, memory: int) -> Iterator[Fact]:
    def about(what: str, found: str, advice: str | None = None) -> Fact:
        return Fact("store", what, found, advice)

    try:
        check_memory()
        made = check_format(root, older=True)
        form = f"{made['format']}, made by {made['made_by']}"
        older = f"this is version {FORMAT_VERSION}; {advised('repair', root)} brings it up to date"
        yield about("format", form, _if(int(made["format"]) < FORMAT_VERSION, older))
        with Store(root) as store:
            runs, is_older = store.info_rows().dicts(), store.catalog_is_older
        commits = log.live(log.manifests(root))
        files = {file.path: file.bytes for commit in commits for file in commit.files}
        pended = pending.runs(root)
    except (ActstoreError, OSError) as error:
        yield about("opens", "no", " ".join(str(error).split()))
        return
    size = sum(files.values())
    slow = (
        f"larger than the memory ({_size(memory)}): reads in no order wait for the disk; Store.batches reads in windows"
    )
    yield about("opens", "yes")
    yield about("size", f"{_size(size)} in {len(files):,} files, {len(commits):,} commits", _if(size > memory, slow))
    anew = f"an earlier version made it, and each opening builds it anew; {advised('repair', root)}"
    yield about("catalog", "older" if is_older else "up to date", _if(is_older, anew))
    short = [
        f"{row['run']} {row['sequences']:,} of {row['planned']:,}" for row in runs if row["sequences"] < row["planned"]
    ]
    goes_on = f"not finished: {', '.join(short)}; the same `actstore ingest` goes on"
    yield about("runs", ", ".join(str(row["run"]) for row in runs) or "none", _if(bool(short), goes_on))
    if pended:
        taken = f"{advised('commit', root)} takes what is whole"
        yield about("slices", f"of {', '.join(pended)}, not committed", taken)
    yield about("health", f"not looked at; {advised('verify', root, '--quick')} looks at each file")
