"""Activations stored as float16, bfloat16 and int8: how far from float32 they are, who else reads them, and every
command over a run that is stored so."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import polars as pl
import pytest
import tensorstore
import torch
import zarr
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import actstore
from actstore import verbs
from actstore.arrays import staged
from actstore.arrays.encoding import largest_error, quantised, widened
from actstore.arrays.layout import Layout
from actstore.arrays.metadata import as_written, metadata
from actstore.arrays.pack import ShardBuffer
from actstore.arrays.ranged import RangedReader
from actstore.arrays.reader import SiteReader
from actstore.cli.group import main
from actstore.errors import BadInput
from actstore.ingest.corpus.corpus import from_text
from actstore.ingest.corpus.tokens import Vocabulary
from actstore.ingest.jobs.job import Ingest
from actstore.ingest.jobs.local import execute
from actstore.ingest.jobs.patched import prepare_patch
from actstore.ingest.jobs.prepare import prepare
from actstore.ingest.models.load import load
from actstore.ingest.replay.compare import compare
from actstore.ingest.replay.remake import files_of
from actstore.interventions import Edit
from actstore.storage.local import Local
from actstore.store import Store
from actstore.upkeep.repair import repair
from actstore.upkeep.verify import verify
from tests import tiny_models
from tests.test_pipeline import EVERY_SITE, contents, small_model, trees
from tests.test_staged import LateCopies, staged_buffer

Of = Callable[[Layout], ShardBuffer]
NARROW = ["float16", "bfloat16", "int8"]
LARGEST = {"float32": 1e30, "float16": 65504.0, "bfloat16": float(ml_dtypes.finfo("bfloat16").max), "int8": 3e38}


def decoded(stored: np.ndarray) -> np.ndarray:
    """The numbers of an int8 array, from the definition: four bytes of a scale, then the numbers."""
    scale = stored[..., :4].copy().view("<f4")
    return np.where(stored[..., 4:] == -128, np.nan, scale * stored[..., 4:]).astype(np.float32)


@st.composite
def layouts(pick: st.DrawFn, dtypes: list[str] = NARROW) -> Layout:
    """Arrays of all three arrangements: positions of trees, patterns, and rows."""
    n, pos, width = pick(st.integers(1, 7)), pick(st.integers(1, 6)), pick(st.integers(1, 6))
    per, dtype = pick(st.integers(1, 8)), pick(st.sampled_from(dtypes))
    match pick(st.sampled_from(["resid", "pattern", "heads", "rows"])):
        case "resid":
            return Layout((n, pos, width), 1, per, dtype)
        case "heads":
            return Layout((n, pos, 2, width), 1, per, dtype)
        case "pattern":
            return Layout((n, 2, pos, pos), 2, per, dtype)
    return Layout((4 * 256, width), None, 4, dtype)


def planted(layout: Layout, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of very different sizes, with vectors of zeros and vectors with one huge number; and lengths."""
    rng = np.random.default_rng(seed)
    n = 30 if layout.position_axis is None else layout.shape[0]
    X = rng.standard_normal((n, *layout.shape[1:]), dtype=np.float32)
    X *= 10.0 ** rng.integers(-6, 4, (*X.shape[:-1], 1))
    X[rng.random(X.shape[:-1]) < 0.2] = 0
    huge = rng.random(X.shape[:-1]) < 0.2
    X[huge, 0] = LARGEST[layout.dtype] / 2
    if layout.position_axis is None:
        return X, np.array([13, 17])
    return X, rng.integers(1, layout.chunks_per_shard, n, np.intp, endpoint=True)


def pack(layout: Layout, X: np.ndarray, lengths: np.ndarray, buffer: ShardBuffer | None = None) -> list[bytes]:
    buffer, shards = buffer or ShardBuffer(layout), []
    if layout.position_axis is None:
        buffer.put(0, torch.from_numpy(X[:13]))
        buffer.put(13, torch.from_numpy(X[13:]))
        return [bytes(buffer.seal(lengths))]
    for start in range(0, len(X), layout.rows_per_chunk):
        buffer.put(0, torch.from_numpy(X[start : start + layout.rows_per_chunk]))
        shards.append(bytes(buffer.seal(lengths[start : start + layout.rows_per_chunk])))
    return shards


def write(folder: Path, layout: Layout, X: np.ndarray, lengths: np.ndarray) -> dict[int, str]:
    """The array as a Zarr array; the path of each shard."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "zarr.json").write_bytes(metadata(layout, tuple("abcd"[: len(layout.shape)]), {}))
    paths = {batch: layout.shard_name(batch) for batch in range(len(pack(layout, X, lengths)))}
    for path, shard in zip(paths.values(), pack(layout, X, lengths), strict=True):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(shard)
    return paths


def tokens(layout: Layout, X: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ids of all tokens, and the row of each, float32 [n, *row]."""
    if layout.position_axis is None:
        return np.arange(30), X
    tree, position = np.nonzero(np.arange(layout.chunks_per_shard) < lengths[:, None])
    return tree * 256 + position, np.moveaxis(X, layout.position_axis, 1)[tree, position]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("arrays")


# What is stored.


@given(layouts(), st.integers(0, 2**32))
@settings(max_examples=60)
def test_what_is_read_is_within_half_a_step_of_what_was_given(folder: Path, layout: Layout, seed: int) -> None:
    X, lengths = planted(layout, seed)
    paths = write(folder / "a", layout, X, lengths)
    ids, given_ = tokens(layout, X, lengths)
    for reader in (
        SiteReader(layout, 0, paths, "a site", Local(folder / "a")),
        RangedReader(layout, 0, paths, "a site", Local(folder / "a")),
    ):
        found = reader.gather(ids)
        assert found.dtype == np.float32
        if layout.dtype == "int8":  # half a scale, but for float32's own rounding of a number near 127
            bound = np.maximum(np.abs(given_).max(axis=-1, keepdims=True) / 127, 1.2e-38) / 2 * (1 + 1e-4)
            assert (np.abs(found.astype(np.float64) - given_) <= bound).all()
        else:
            half = ml_dtypes.bfloat16 if layout.dtype == "bfloat16" else np.float16
            np.testing.assert_array_equal(found, given_.astype(half).astype(np.float32))
        assert (found[given_ == 0] == 0).all()
        size = float(np.abs(given_).max())
        assert np.abs(found.astype(np.float64) - given_).max() <= largest_error(layout.dtype, size) * (1 + 1e-4)


@given(layouts(["float16", "float32", "bfloat16", "int8"]), st.integers(0, 2**32))
@settings(max_examples=40)
def test_foreign_readers_find_the_numbers(folder: Path, layout: Layout, seed: int) -> None:
    """tensorstore reads every dtype, and zarr-python all but bfloat16, which it does not know."""
    X, lengths = planted(layout, seed)
    paths = write(folder / "b", layout, X, lengths)
    ids, _ = tokens(layout, X, lengths)
    ours = SiteReader(layout, 0, paths, "a site", Local(folder / "b")).gather(ids)
    opened = tensorstore.open(
        {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder / "b")}}, read=True
    ).result()
    read = [opened.read().result()] if layout.position_axis is not None else [opened[:32].read().result()]
    if layout.dtype != "bfloat16":
        array = zarr.open_array(str(folder / "b"), mode="r")
        read.append(np.asarray(array[:] if layout.position_axis is not None else array[:32]))
    for values in read:
        values = decoded(values) if layout.dtype == "int8" else values.astype(np.float32)
        _, rows = tokens(layout, values, lengths) if layout.position_axis is not None else (ids, values[:30])
        np.testing.assert_array_equal(rows, ours)
        if layout.position_axis is None:
            assert np.isnan(values[30:32]).all()
        else:
            assert np.isnan(values).sum() == np.isnan(values).any(axis=-1).sum() * values.shape[-1]  # padding
            assert np.isfinite(values).sum() == ours.size


@given(layouts(), st.integers(0, 2**32))
@settings(max_examples=30)
def test_a_gpu_packs_the_same_bytes(layout: Layout, seed: int) -> None:
    X, lengths = planted(layout, seed)
    if layout.position_axis is None:
        lengths = np.array([30])
    buffer, expected = staged_buffer(layout), pack(layout, X, lengths)
    for _ in range(2):
        assert pack(layout, X, lengths, buffer) == expected


def sealed(dtype: str, X: list[float], lengths: tuple[int, ...] = (2,), of: Of = ShardBuffer) -> np.ndarray:
    """Pack one sequence of vectors of two numbers; what tensorstore's definition makes of it."""
    layout = Layout((1, 2, 2), 1, 1, dtype)
    buffer = of(layout)
    buffer.put(0, torch.tensor(X).reshape(1, 2, 2))
    buffer.hand_over()
    shard = buffer.seal(np.array(lengths))
    chunks = np.frombuffer(shard, np.uint8)[: 2 * layout.chunk_bytes].reshape(2, -1)[:, :-4]
    if dtype == "int8":
        return decoded(chunks.copy().view(np.int8))
    return chunks.copy().view(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype).astype(np.float32)


@pytest.mark.parametrize("of", [ShardBuffer, staged_buffer])
@pytest.mark.parametrize(("dtype", "most", "beyond"), [("float16", 65519.0, 65520.0), ("bfloat16", 3.39e38, 3.4e38)])
def test_a_number_beyond_the_dtype_is_refused_and_never_infinity(
    dtype: str, most: float, beyond: float, of: Of
) -> None:
    assert np.isfinite(sealed(dtype, [1, 2, most, -most], of=of)).all()
    with pytest.raises(BadInput, match=f"too large for {dtype}"):
        sealed(dtype, [1, 2, 3, -beyond], of=of)
    assert np.isnan(sealed(dtype, [1, 2, 3, beyond], (1,), of)[1]).all()  # of padding nothing is kept
    assert np.isinf(sealed(dtype, [1, 2, 3, np.inf], of=of)).sum() == 1  # a score that is infinite stays so


def test_a_buffer_forgets_the_number_that_was_too_large() -> None:
    layout = Layout((1, 1, 2), 1, 1, "float16")
    for buffer in (ShardBuffer(layout), staged_buffer(layout)):
        buffer.put(0, torch.tensor([[[1.0, 1e6]]]))
        with pytest.raises(BadInput, match="too large"):
            buffer.seal(np.array([1]))
        buffer.put(0, torch.tensor([[[1.0, torch.inf]]]))
        buffer.seal(np.array([1]))


def test_each_pattern_of_16_bits_is_widened_as_numpy_does() -> None:
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16).reshape(256, 256)
    np.testing.assert_array_equal(widened(halves), halves.astype(np.float32))


def test_int8_holds_nan_and_refuses_infinity() -> None:
    """Keys that a sequence of text has not are NaN in a pattern."""
    np.testing.assert_array_equal(sealed("int8", [127, np.nan, np.nan, np.nan]), [[127, np.nan], [np.nan, np.nan]])
    np.testing.assert_array_equal(sealed("int8", [0, -0.0, 1e-44, 0]), np.zeros((2, 2)))
    with pytest.raises(BadInput, match="infinite"):
        sealed("int8", [1, 2, 3, -np.inf])
    assert np.isnan(sealed("int8", [1, 2, 3, -np.inf], (1,))[1]).all()


def test_a_vector_with_one_huge_number_loses_the_others_and_its_neighbours_lose_nothing() -> None:
    found = sealed("int8", [1e6, 1.0, 127.0, 1.0])
    np.testing.assert_array_equal(found[0], [np.float32(1e6 / 127) * 127, 0])
    np.testing.assert_array_equal(found[1], [127, 1])


def test_the_largest_float32_is_finite_in_int8() -> None:
    """A model's mask is often this number."""
    largest = float(np.finfo(np.float32).max)
    stored = quantised(torch.tensor([[largest, -largest, 1.0]])).numpy()
    with np.errstate(over="raise"):
        np.testing.assert_allclose(decoded(stored), [[largest, -largest, 0]], rtol=1e-6)


def test_the_metadata_says_how_int8_is_decoded_and_only_its_own_shape_is_mapped() -> None:
    layout = Layout((8, 7, 5), 1, 3, "int8")
    about = json.loads(metadata(layout, tuple("abc"), {"run": "r"}))
    assert about["shape"] == [8, 7, 9]
    assert about["fill_value"] == -1
    assert "scale * int8" in about["attributes"]["int8"]
    assert as_written(about, Layout((8, 7, 5), 1, 3)) == layout
    assert as_written(about, Layout((8, 7, 9), 1, 3)) is None


# Every command over a run that is stored so.


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model over ten trees, a run for each dtype, with every site."""
    root = tmp_path_factory.mktemp("dtypes") / "s.act"
    for dtype in ["float32", *NARROW]:
        execute(Ingest(root, small_model(), trees(), dtype, EVERY_SITE, 3, dtype=dtype))
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "s.act")
    return tmp_path / "s.act"


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(staged.STREAMS, "cpu", LateCopies)


@pytest.mark.parametrize("dtype", NARROW)
def test_every_way_to_read_gives_the_same_float32(made: Path, dtype: str) -> None:
    with Store(made) as store:
        for site in store.sites(dtype):
            (exact, _), (X, _) = (store.read("from tokens order by token_id", run, site) for run in ("float32", dtype))
            assert X.dtype == np.float32
            bound = np.abs(exact).max(axis=-1, keepdims=True) * {"int8": 1 / 254, "float16": 2**-11}.get(dtype, 2**-8)
            assert (np.abs(X - exact) <= bound * (1 + 1e-4) + 2**-25).all()
            assert (exact != X).any()
        X, rows = store.read("from tokens order by token_id", dtype, "resid_post.1")
        by_act = store.sql(f"select act(token_id, '{dtype}', 'resid_post.1') as x from tokens order by token_id")
        np.testing.assert_array_equal(by_act["x"].to_numpy(), X)
        scanned = store.scan(run=dtype, site="resid_post.1").sort("token_id").collect()
        np.testing.assert_array_equal(scanned["x"].to_numpy(), X)
        batched = np.concatenate([b for b, *_ in store.batches("from tokens", dtype, "resid_post.1", batch_size=50)])
        np.testing.assert_array_equal(batched[np.lexsort(batched.T)], X[np.lexsort(X.T)])
        wide, _ = store.read(rows["token_id"], dtype, "resid_post.1", dtype="float64")
        np.testing.assert_array_equal(wide, X)
        said = store.explain("from tokens", dtype, "resid_post.1")
        each = {"int8": 16 + 4, "float16": 32, "bfloat16": 32}[dtype]
        assert said.bytes_needed == len(X) * each
    with Store(made, check=True) as store:
        np.testing.assert_array_equal(store.read(rows["token_id"], dtype, "resid_post.1")[0], X)


def test_the_stores_verify_and_their_runs_compute_the_same_again(made: Path) -> None:
    assert not verify(made).damage
    found = compare(made, 5)
    assert all(each.agrees for each in found), [each for each in found if not each.agrees]
    tolerances = {each.run: each.tolerance for each in found if each.what == "resid_post.1"}
    assert tolerances["float32"] == 1e-4 < tolerances["float16"] < tolerances["int8"] < 0.005 > tolerances["bfloat16"]
    worst = {each.run: each.worst for each in found if each.what == "resid_post.1"}
    assert worst["int8"] > 1e-3  # so that a tolerance of float32's would not hold


@pytest.mark.parametrize("dtype", NARROW)
def test_a_damaged_shard_is_made_again_byte_for_byte(root: Path, dtype: str) -> None:
    shard = next(path for path in (root / f"activations.zarr/{dtype}").rglob("c/1/*/0") if path.is_file())
    before = shard.read_bytes()
    shard.chmod(0o644)
    shard.write_bytes(before[:10] + bytes([before[10] ^ 1]) + before[11:])
    assert [finding.run for finding in verify(root).damage] == [dtype]
    assert len(repair(root, files_of).mended) == 1
    assert shard.read_bytes() == before


def test_a_lost_row_of_runs_is_guessed_with_its_dtype(root: Path) -> None:
    lost = root / "parts/runs/int8.parquet"
    for path in (lost, root / "catalog.duckdb"):
        path.unlink()
    done = repair(root, files_of)
    assert not done.left
    assert lost.exists()


def test_stopped_between_batches_the_same_command_ends_with_the_same_bytes(tmp_path: Path) -> None:
    def job(root: Path) -> Ingest:
        return Ingest(root, small_model(), trees(), "r", ["resid_post"], 3, dtype="int8")

    def stop(done: int, total: int) -> None:
        if done > 4:
            raise KeyboardInterrupt

    execute(job(tmp_path / "whole.act"))
    with pytest.raises(KeyboardInterrupt):
        execute(job(tmp_path / "cut.act"), stop)
    execute(job(tmp_path / "cut.act"))
    assert contents(tmp_path / "cut.act") == contents(tmp_path / "whole.act")


def test_a_store_of_each_dtype_is_that_of_a_gpu(made: Path, tmp_path: Path, late: None) -> None:
    for dtype in ["float32", *NARROW]:
        execute(Ingest(tmp_path / "late.act", small_model(), trees(), dtype, EVERY_SITE, 3, dtype=dtype))
    assert contents(tmp_path / "late.act") == contents(made)


def test_a_run_keeps_its_dtype(root: Path) -> None:
    again = {"model_of": "int8", "dataset": trees().row()["dataset"], "run": "int8"}
    with pytest.raises(BadInput, match="stored with dtype int8, not float16"):
        prepare(root, dtype="float16", **again)
    job = prepare(root, sites="embed,attn_out.0", **again)
    execute(job)
    with Store(root) as store:
        kinds = {
            path: json.loads((root / path / "zarr.json").read_bytes())["data_type"]
            for (path,) in store.sql("select path from sites where run = 'int8'").rows()
        }
        assert set(kinds.values()) == {"int8"}
        assert len(kinds) == 10
        assert set(store.sql("select versions->>'$.dtype' as d from runs")["d"]) == {None, *NARROW}


def test_copied_merged_and_exported_the_numbers_stay(made: Path, tmp_path: Path) -> None:
    verbs.copy(made, tmp_path / "copied.act", runs=["int8"])
    execute(Ingest(tmp_path / "other.act", small_model(seed=3), trees(6), "others", ["embed"], 3, dtype="bfloat16"))
    verbs.merge([tmp_path / "other.act", tmp_path / "copied.act"], tmp_path / "merged.act")
    query = "from tokens where dataset = (select dataset from runs where run = $run) order by token_id"
    with Store(made) as one, Store(tmp_path / "merged.act") as two:
        for store, run in ((one, "int8"), (two, "int8")):
            X, _ = store.read(query, run, "pattern.1", {"run": run})
            np.testing.assert_array_equal(X, one.read(query, "int8", "pattern.1", {"run": "int8"})[0])
        two.export(tmp_path / "x.npy", "from tokens where tree_id < 2", "others", "embed")
        X, _ = two.read("from tokens where tree_id < 2", "others", "embed")
        np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), X)
    assert not verify(tmp_path / "merged.act").damage


# Edits.

DONATED = (
    "select a.token_id, b.token_id as donor_token_id from tokens a join tokens b using (position) "
    "where a.role = 'root' and b.role = 'root' and a.tree_id % 2 = 0 and b.tree_id = a.tree_id + 1"
)


def test_an_edited_run_of_a_base_in_int8_rounds_only_what_is_read(root: Path) -> None:
    """Unedited activations are computed, so a zeroed site gives exactly what a base of float32 does."""
    edits = [Edit("select token_id from tokens where role = 'root'", "resid_post.0", "zero")]
    assert not prepare_patch(root, "float32", edits, "x").patch.whole
    assert prepare_patch(root, "int8", edits, "x").patch.whole
    for base in ("float32", "int8"):
        actstore.patch(root, base, edits, run=f"zero-{base}", sites=["resid_post.1"])
        actstore.patch(root, base, DONATED, "resid_post.0", run=f"donated-{base}", dtype="float16", sites=["embed"])
    with Store(root) as store:
        p = {
            run: store.sql("select p_target from predictions where run = $run order by token_id", {"run": run})
            for run in ("zero-float32", "zero-int8", "donated-float32", "donated-int8")
        }
        apart = {
            name: np.abs(p[f"{name}-int8"]["p_target"].to_numpy() - p[f"{name}-float32"]["p_target"].to_numpy()).max()
            for name in ("zero", "donated")
        }
        assert apart["zero"] < 1e-5
        assert 1e-5 < apart["donated"] < 0.05
        X, _ = store.read(np.arange(3), "donated-int8", "embed")
        exact, _ = store.read(np.arange(3), "float32", "embed")
        np.testing.assert_array_equal(X, exact.astype(np.float16))
    assert all(each.agrees for each in compare(root, 3))
    again = prepare_patch(root, "int8", run="donated-int8")
    assert again.dtype == "float16"
    with pytest.raises(BadInput, match="stored with dtype float16, not int8"):
        prepare_patch(root, "int8", run="donated-int8", dtype="int8")


# The command.


def test_the_command_stores_int8_and_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    def ran(*more: str) -> str:
        args = ["ingest", str(tmp_path / "c.act"), "--model", "reproduction", "--trees", "8", "--sites", "embed", *more]
        done = CliRunner().invoke(main, args)
        return f"{done.exit_code} {done.output}"

    assert ran("--dtype", "int4").startswith("2 ")
    assert "got dtype 'int4'" in ran("--dtype", "int4")
    assert ran("--dtype", "int8").startswith("0 ")
    assert ran().startswith("0 ")  # takes the run's own
    assert "not float32" in ran("--dtype", "float32")
    assert "no activations are stored" in ran("--dtype", "int8", "--sites", "none", "--run", "n")
    with Store(tmp_path / "c.act") as store:
        assert store.read("from tokens", site="embed")[0].dtype == np.float32


def test_an_activation_beyond_float16_stops_the_ingest_and_says_what_to_do(tmp_path: Path) -> None:
    model = copy.deepcopy(small_model())  # the model itself is that of other tests
    with torch.no_grad():
        for name, weight in model.bridge.named_parameters():
            if "embed" in name:
                weight.mul_(1e7)
    job = Ingest(tmp_path / "s.act", model, trees(), "r", ["embed"], 3, dtype="float16")
    with pytest.raises(BadInput, match=r"embed of batch 0 cannot be stored as float16: .*--dtype"):
        execute(job)
    execute(Ingest(tmp_path / "s.act", model, trees(), "wide", ["embed"], 3, dtype="bfloat16"))
    assert not verify(tmp_path / "s.act").damage
    assert pl.DataFrame(verify(tmp_path / "s.act").differences).is_empty()


# Text, whose sequences have many lengths.


@pytest.mark.parametrize("dtype", NARROW)
def test_sequences_of_many_lengths_are_stored_in_each_dtype(tmp_path: Path, dtype: str) -> None:
    """A pattern's keys that a sequence has not are NaN, in int8 too."""
    tiny_models.llama(tmp_path / "tiny")
    model = load(str(tmp_path / "tiny"))
    words = tiny_models.WORDS.split()
    texts = [" ".join(words[: 3 + i % 9]) for i in range(12)]
    vocabulary = Vocabulary(model.tokenizer, model.tokenizer_sha256, model.d_vocab)
    sites = ["resid_post.0", "pattern.1", "z.0"]
    for run in ("float32", dtype):
        with from_text(texts, vocabulary, n_ctx=model.n_ctx, name="notes") as corpus:
            execute(Ingest(tmp_path / "s.act", model, corpus, run, sites, 5, dtype=run))
    with Store(tmp_path / "s.act", check=True) as store:
        assert store.sql("select layout from datasets").item() == "rows"
        for site in sites:
            (exact, _), (X, _) = (store.read("from tokens order by token_id", run, site) for run in ("float32", dtype))
            np.testing.assert_array_equal(np.isnan(X), np.isnan(exact))
            bound = np.nanmax(np.abs(exact), axis=-1, keepdims=True) / 254 * (1 + 1e-4)
            assert (np.nan_to_num(np.abs(X - exact)) <= bound).all()
        assert np.isnan(store.read("from tokens", dtype, "pattern.1")[0]).any()
    assert all(each.agrees for each in compare(tmp_path / "s.act", 4))
