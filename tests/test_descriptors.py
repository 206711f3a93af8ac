"""A store has more shards than a process may have files open, and what the system refuses is no damage."""

from __future__ import annotations

import errno
import gc
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from actstore.arrays import mapped
from actstore.arrays.foreign import ForeignReader
from actstore.arrays.layout import Layout
from actstore.arrays.reader import SiteReader
from actstore.errors import Damaged, LimitReached
from actstore.reading import batches as batching
from actstore.sql import process
from actstore.storage import machine
from actstore.storage.local import Local
from actstore.store import Store
from actstore.upkeep.repair import repair
from actstore.upkeep.verify import verify
from tests.stores import Fake, fake
from tests.test_arrays import pack, planted

SITES = ["embed", *[f"resid_post.{layer}" for layer in range(6)]]
N_BATCHES, N_DESCRIPTORS = 520, 256
ALL = "select token_id, tree_id, position from tokens order by hash(token_id)"


def wide() -> Fake:
    return fake(n_trees=2 * N_BATCHES, trees_per_shard=2, n_nodes=3, sites=SITES)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)  # 7,000 files, and no power is cut here
        wide().store(root := tmp_path_factory.mktemp("wide") / "s.act")
    return root


def in_a_process(path: Path, call: str, n_descriptors: int) -> None:
    """Run a function of this module in a process that may have so many files open."""
    script = f"from tests import test_descriptors as module; module.{call}({str(path)!r})"
    subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[1],
        check=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (n_descriptors, n_descriptors)),
    )


def read_everything(path: str) -> None:
    """Read every site of every batch on every road."""
    whole = wide()
    names = [site.site for site in whole.plan.sites]
    expected = np.stack([whole.activations[name] for name in names], 2)
    with Store(path) as store:
        X, rows = store.read(ALL, sites=SITES)
        places = rows["tree_id"].to_numpy(), rows["position"].to_numpy()
        np.testing.assert_array_equal(X, expected[places])
        found = store.sql(f"select act(token_id, 'r', 'resid_post.5') as x, * from ({ALL})")
        np.testing.assert_array_equal(found["x"].to_numpy(), X[:, 6])
        inside = store.sql(f"select sum(dot(act(token_id, 'r', 'embed'), act(token_id, 'r', 'embed'))) from ({ALL})")
        assert inside.item() == pytest.approx(float(np.square(X[:, 0]).sum()), rel=1e-5)
        scanned = store.scan(site="resid_post.3").select("x").collect()["x"].to_numpy()
        np.testing.assert_array_equal(scanned, X[np.argsort(rows["token_id"].to_numpy()), 4])
        batches = store.batches(ALL, sites=SITES, shuffle=False, batch_size=2_000, window=100)
        read = [X for X, _ in DataLoader(batches, batch_size=None, num_workers=2)]
        np.testing.assert_array_equal(torch.cat(read).numpy(), X)
        assert store.sql(f"select count(act(token_id, 'r', 'embed')) from ({ALL})", timeout=100).item() == len(X)
        assert len(os.listdir("/proc/self/fd")) < 64
    assert not verify(path).damage
    assert repair(path, lambda *of: {}).snapshot == N_BATCHES + 1


def query_with_many_open(path: str) -> None:
    """A limited query's pipe has a number that select() does not take."""
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1_100)]
    with Store(path) as store:
        assert store.sql("select count(*) from trees", timeout=100).item() == 2 * N_BATCHES
    assert max(held) > 1_024


def test_more_shards_than_descriptors_read_as_the_oracle_does(path):
    in_a_process(path, "read_everything", N_DESCRIPTORS)


def test_a_query_with_limits_answers_where_descriptors_are_large_numbers(path):
    in_a_process(path, "query_with_many_open", 2_048)


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    first_free = os.dup(0)
    os.close(first_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (first_free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_lack_of_descriptors_is_told_and_over_once_there_are_some(path):
    assert {batching, process}  # imported before: importing opens files, too
    with Store(path) as store:
        for _ in range(2):  # the second maps the shard
            store.read("select token_id from tokens where tree_id = 0")
        store.sql("select norm(act(token_id, 'r', 'embed')) from tokens where tree_id = 0")  # imports the functions
        with no_descriptor_left():
            for call in (
                lambda: store.read("select token_id from tokens"),
                lambda: store.sql("select norm(act(token_id, 'r', 'embed')) from tokens"),
                lambda: store.sql("select 1", timeout=10),
                lambda: list(store.batches("select token_id from tokens")),
                lambda: Store(path),
                lambda: verify(path),
            ):
                with pytest.raises(LimitReached, match=r"files open, and may have no more: .*`ulimit -n"):
                    call()
            X, _ = store.read("select token_id from tokens where tree_id = 0")  # mapped already
        assert len(store.read("select token_id from tokens where tree_id < 900")[0]) > len(X)


def test_an_array_of_another_tool_is_not_damaged_either(tmp_path):
    import zarr

    layout = Layout((4, 3, 5), 1, 2)
    zarr.create_array(tmp_path / "a", shape=layout.shape, chunks=(2, 1, 5), dtype="float32")[:] = 1
    reader = ForeignReader(tmp_path / "a", layout, 0, None, "a site")
    with no_descriptor_left():
        with pytest.raises(LimitReached, match="ulimit"):
            reader.gather(np.array([0]))
        with pytest.raises(LimitReached, match="ulimit"):
            ForeignReader(tmp_path / "a", layout, 0, None, "a site")
    assert reader.gather(np.array([0])).tolist() == [[1] * 5]


def test_more_shards_than_maps_read_as_the_oracle_does(path, monkeypatch):
    """Sites let go of their shards where a process has mapped many, and a gather of more goes in groups."""
    most, of_file = 40, mapped._Map
    there = list[int]()

    def counted(descriptor, size):
        made = of_file(descriptor, size)
        there.append(Path("/proc/self/maps").read_text().count(str(path)))
        return made

    monkeypatch.setattr(mapped, "FEW", 0)
    monkeypatch.setattr(mapped, "allowed_maps", lambda: mapped.SHARE * most)
    monkeypatch.setattr(mapped, "_Map", counted)
    whole = wide()
    sites = SITES[:2]
    expected = np.stack([whole.activations[site.site] for site in whole.plan.sites[:2]], 2)
    with Store(path) as store:
        X, rows = store.read(f"{ALL} limit 3000", sites=sites)
        np.testing.assert_array_equal(X, expected[rows["tree_id"].to_numpy(), rows["position"].to_numpy()])
        for batch in range(0, N_BATCHES, 3):
            X, _ = store.read(np.array([512 * batch]), site=SITES[0])
            np.testing.assert_array_equal(X[0], expected[2 * batch, 0, 0])
        half = store.read(f"{ALL} limit 3000", sites=sites, dtype="float16")[0]
        assert half.dtype == np.float16
    assert len(there) > 3 * N_BATCHES
    assert max(there) <= 1.5 * most + 1  # those that are let go of are read to the end
    gc.collect()
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_a_further_shard_takes_its_place_in_the_view_that_is_there(path):
    """Else each would cost as much as all that are mapped: 977 shards took 2.3 s, and take 0.09."""
    with Store(path) as store:
        reader = store._opened.reader("r", "embed")
        reader.gather(np.array([0]))
        reader.gather(np.array([0]))
        view = reader.files._view
        for _ in range(2):
            reader.gather(np.arange(0, 2 * N_BATCHES, 7) * 256)
        assert reader.files._view is view
        assert len(view.maps) > N_BATCHES / 8


def shard(folder: Path) -> tuple[Layout, Path]:
    layout = Layout((2, 3, 5), 1, 2)
    (folder / "shard").write_bytes(pack(layout, *planted(layout, 0))[0])
    return layout, folder / "shard"


@pytest.mark.parametrize(
    ("reason", "advice"),
    [(errno.EMFILE, "ulimit -n"), (errno.ENFILE, r"fs\.file-max"), (errno.ENOMEM, "ulimit -v"), (errno.EIO, None)],
)
def test_what_the_system_refuses_says_what_ran_out(tmp_path, reason, advice):
    class Refusing(Local):
        def open_for_map(self, path):
            raise OSError(reason, os.strerror(reason))

    layout, _ = shard(tmp_path)
    with pytest.raises(LimitReached if advice else Damaged, match=advice or "Input/output error"):
        SiteReader(layout, 0, {0: "shard"}, "a site", Refusing(tmp_path)).gather(np.array([0]))


def test_a_process_that_has_all_its_maps_says_so(tmp_path, monkeypatch):
    layout, _ = shard(tmp_path)
    monkeypatch.setattr(mapped, "FEW", 0)
    (tmp_path / "max_map_count").write_text("10\n")
    monkeypatch.setattr(machine, "MAPS", tmp_path / "max_map_count")
    of_file = mapped._Map
    monkeypatch.setattr(mapped, "_Map", lambda descriptor, size: of_file(descriptor, 2**60))  # which no system maps
    with pytest.raises(LimitReached, match=r"maps of memory and may have 10: .*`sysctl -w vm\.max_map_count=40`"):
        SiteReader(layout, 0, {0: "shard"}, "a site", Local(tmp_path)).gather(np.array([0]))


def test_a_shard_is_mapped_without_a_descriptor_until_the_last_array_goes(tmp_path):
    layout, path = shard(tmp_path)
    reader = SiteReader(layout, 0, {0: "shard"}, "a site", Local(tmp_path))
    X = reader.gather(np.array([0]))
    windows, offsets, _ = reader.files.find(np.array([0]), np.array([0]))

    def is_mapped() -> bool:
        gc.collect()
        return str(path) in Path("/proc/self/maps").read_text()

    del reader
    assert is_mapped()
    assert not any(str(path) in os.path.realpath(held) for held in Path("/proc/self/fd").iterdir())
    assert windows[offsets].view(np.float32).tolist() == X[0].tolist()
    assert not windows.flags.writeable
    del windows
    assert not is_mapped()


COMMAND = """
import resource
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
from actstore.cli import main
main(["models", "list"], standalone_mode=False)
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
"""


def test_a_command_may_open_as_many_files_as_the_hard_limit_allows():
    subprocess.run([sys.executable, "-c", COMMAND], check=True, timeout=100, stdout=subprocess.DEVNULL)
