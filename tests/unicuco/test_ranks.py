from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unicuco.calibration import TokenSet, collect_input_norms
from unicuco.errors import ModelError, RunError, StorageError
from unicuco.importance import METRICS, SiteStats
from unicuco.models import LoadedModel, load_model, read_site
from unicuco.ranks import RankStore, build_ranks, cut, keep_mask, rank_rows
from unicuco.testing import FAMILIES, tiny_model_folder

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def drop_order(scores: list[list[float]]) -> list[tuple[int, int]]:
    """The design's order, slowly: by rank within the row, then by row; ties by column."""
    order: list[tuple[int, int, int]] = []
    for row, values in enumerate(scores):
        columns = sorted(range(len(values)), key=lambda column: (values[column], column))
        order += [(rank, row, column) for rank, column in enumerate(columns)]
    return [(row, column) for _, row, column in sorted(order)]


@st.composite
def score_matrices(draw: st.DrawFn) -> list[list[float]]:
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 7))
    # Few distinct values: ties in every row.
    value = st.sampled_from([0.0, 0.5, 1.0, 2.0]) | st.floats(0, 10, width=32)
    return draw(
        st.lists(st.lists(value, min_size=columns, max_size=columns), min_size=rows, max_size=rows)
    )


@settings(max_examples=60, deadline=None)
@given(scores=score_matrices())
def test_for_every_n_exactly_the_first_n_of_the_drop_order_go(scores: list[list[float]]) -> None:
    rank = rank_rows(torch.tensor(scores))
    order = drop_order(scores)
    for n in range(len(order) + 1):
        dropped = {tuple(place) for place in (~keep_mask(rank, n)).nonzero().tolist()}
        assert dropped == set(order[:n])


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    seed=st.integers(0, 9),
    fractions=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_masks_are_exact_nested_and_even_over_rows(
    rows: int, columns: int, seed: int, fractions: tuple[float, float]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rank = rank_rows(torch.rand(rows, columns, generator=generator))
    fewer, more = sorted(int(f * rows * columns) for f in fractions)
    small, large = keep_mask(rank, fewer), keep_mask(rank, more)
    assert int((~small).sum()) == fewer
    assert int((~large).sum()) == more
    assert bool((small | ~large).all())
    per_row = (~large).sum(dim=1)
    assert int(per_row.max() - per_row.min()) <= 1
    assert bool((per_row[:-1] >= per_row[1:]).all())


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    fraction=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
    transposed=st.booleans(),
)
def test_a_cut_zeroes_the_dropped_and_keeps_the_others_to_the_bit(
    rows: int, columns: int, fraction: float, dtype: torch.dtype, transposed: bool
) -> None:
    generator = torch.Generator().manual_seed(rows * 41 + columns)
    shape = (columns, rows) if transposed else (rows, columns)
    stored = torch.randn(shape, generator=generator).to(dtype)
    stored.flatten()[0] = -0.0
    stored.flatten()[-1] = torch.finfo(dtype).tiny / 2  # a subnormal
    weight = stored.T if transposed else stored
    rank = rank_rows(weight.float().abs())
    n = int(fraction * rows * columns)
    expected = torch.where(keep_mask(rank, n), weight, torch.zeros((), dtype=dtype))
    before = stored.clone()
    fresh = cut(weight, rank, n)
    assert torch.equal(stored, before)
    target = torch.full_like(weight, 9)
    assert cut(weight, rank, n, out=target) is target
    assert cut(weight, rank, n, out=weight) is weight
    for result in (fresh, target, weight):
        assert result.dtype == dtype
        assert bits(result) == bits(expected)


def bits(tensor: Tensor) -> list[list[int]]:
    same_size = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    whole: list[list[int]] = tensor.view(same_size).tolist()
    return whole


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("by_columns", [True, False])
def test_a_matrix_larger_than_one_chunk_is_cut_whole(
    dtype: torch.dtype, parallel: bool, by_columns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unicuco.ranks._CUT_BYTES", 4096)
    monkeypatch.setattr("unicuco.ranks._SERIAL_WEIGHTS", 1000)
    generator = torch.Generator().manual_seed(0)
    shape = (111, 301) if by_columns else (301, 111)
    weight = torch.randn(shape, generator=generator).to(dtype)
    weight = weight.T if by_columns else weight
    rank = rank_rows(torch.rand(301, 111, generator=generator))
    n = 20_001
    expected = weight.masked_fill(~keep_mask(rank, n), 0)
    assert torch.equal(cut(weight, rank, n, parallel=parallel), expected)
    for other in DTYPES:
        target = torch.empty_like(weight, dtype=other)
        found = cut(weight, rank, n, out=target, parallel=parallel)
        assert torch.equal(found, expected.to(other))
    assert torch.equal(cut(weight, rank, n, out=weight, parallel=parallel), expected)


def test_out_of_another_shape_is_refused() -> None:
    weight = torch.randn(3, 4)
    with pytest.raises(ValueError, match="out"):
        cut(weight, rank_rows(weight.abs()), 2, out=torch.empty(4, 3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("other", DTYPES)
def test_a_cut_may_be_written_in_another_dtype(dtype: torch.dtype, other: torch.dtype) -> None:
    weight = torch.randn(7, 30, generator=torch.Generator().manual_seed(3)).to(dtype)
    rank, target = rank_rows(weight.float().abs()), torch.full((7, 30), 9, dtype=other)
    assert torch.equal(cut(weight, rank, 100, out=target), cut(weight, rank, 100).to(other))


def test_ranks_of_long_rows_cut_as_short_ones_do() -> None:
    weight = torch.randn(3, 20, generator=torch.Generator().manual_seed(4))
    rank = rank_rows(weight.abs())
    for dtype in DTYPES:
        narrow, wide = (cut(weight.to(dtype), r, 31) for r in (rank, rank.int()))
        assert torch.equal(narrow, wide)


def test_a_cut_does_not_spread_what_was_dropped() -> None:
    weight = torch.tensor([[float("nan"), float("inf"), 1.0]])
    rank = torch.tensor([[0, 1, 2]], dtype=torch.int16)
    assert cut(weight, rank, 2).tolist() == [[0.0, 0.0, 1.0]]


def test_a_cut_of_a_parameter_asks_for_no_gradient() -> None:
    weight = torch.nn.Parameter(torch.randn(3, 4))
    result = cut(weight, rank_rows(weight.detach().abs()), 6)
    assert not result.requires_grad
    assert int((result == 0).sum()) == 6


def test_a_second_cut_from_the_dense_weights_may_bring_weights_back() -> None:
    dense = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))
    rank, live = rank_rows(dense.abs()), dense.clone()
    cut(dense, rank, 33, out=live)
    cut(dense, rank, 3, out=live)
    assert torch.equal(live, cut(dense, rank, 3))


@pytest.mark.parametrize("n", [-1, 13])
def test_more_than_everything_and_less_than_nothing_are_refused(n: int) -> None:
    rank = rank_rows(torch.rand(3, 4))
    with pytest.raises(ValueError, match=r"num_dropped must be in \[0, 12\]"):
        keep_mask(rank, n)
    with pytest.raises(ValueError, match=r"num_dropped must be in \[0, 12\]"):
        cut(torch.rand(3, 4), rank, n)


def test_ranks_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="weight is"):
        cut(torch.rand(4, 3), rank_rows(torch.rand(3, 4)), 2)


@pytest.mark.parametrize(
    ("columns", "dtype"), [(32_767, torch.int16), (32_768, torch.int32), (40_000, torch.int32)]
)
def test_ranks_take_two_bytes_unless_a_row_is_too_long(columns: int, dtype: torch.dtype) -> None:
    weight = torch.randn(2, columns, generator=torch.Generator().manual_seed(0))
    rank = rank_rows(weight.abs())
    assert rank.dtype == dtype
    assert int(rank.max()) == columns - 1
    for n in (0, 1, columns, 2 * columns - 1, 2 * columns):
        assert int((cut(weight, rank, n) == 0).sum()) == n


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(tiny_model_folder(tmp_path_factory.mktemp("llama"), "llama"))


@pytest.fixture(scope="module")
def store(llama: LoadedModel) -> RankStore:
    return build_ranks(llama.model, llama.profile, METRICS["magnitude"], {})


@pytest.mark.parametrize("metric", sorted(METRICS))
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_ranked_by_every_metric(tmp_path: Path, family: str, metric: str) -> None:
    loaded = load_model(tiny_model_folder(tmp_path / "m", family, num_blocks=1))
    ids = torch.randint(1, 257, (2, 16), generator=torch.Generator().manual_seed(1))
    norms = collect_input_norms(loaded.model, loaded.profile, TokenSet.from_ids(ids))
    ranks = build_ranks(loaded.model, loaded.profile, METRICS[metric], norms)
    ranks.check_sites(loaded.profile)
    assert ranks.metric == metric
    for site in loaded.profile.sites:
        stats = SiteStats(input_norm=norms[site.path])
        scores = METRICS[metric].score(read_site(loaded.model, site), stats)
        n = site.num_weights // 3
        order = drop_order(scores.tolist())[:n]
        dropped = (~keep_mask(ranks.ranks[site.path], n)).nonzero().tolist()
        assert sorted(map(tuple, dropped)) == sorted(order)


def test_scores_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    loaded = load_model(tiny_model_folder(tmp_path / "m", "llama"))
    norms = {s.path: torch.full((s.num_columns,), float("nan")) for s in loaded.profile.sites}
    with pytest.raises(ModelError, match=r"wanda scores of model\.layers\.0\.self_attn\.q_proj"):
        build_ranks(loaded.model, loaded.profile, METRICS["wanda"], norms)


def test_a_store_comes_back_from_disk_with_one_file_per_block(
    store: RankStore, tmp_path: Path
) -> None:
    store.save(tmp_path / "ranks")
    names = sorted(path.name for path in (tmp_path / "ranks").iterdir())
    assert names == ["block-0000.safetensors", "block-0001.safetensors"]
    again = RankStore.load(tmp_path / "ranks")
    assert again.metric == "magnitude"
    assert again.ranks.keys() == store.ranks.keys()
    assert all(torch.equal(again.ranks[path], rank) for path, rank in store.ranks.items())
    assert {rank.dtype for rank in again.ranks.values()} == {torch.int16}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ranks"]


def test_the_same_ranks_make_the_same_files(store: RankStore, tmp_path: Path) -> None:
    for name in ("a", "b"):
        store.save(tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_saving_again_replaces_the_whole_store(
    store: RankStore, llama: LoadedModel, tmp_path: Path
) -> None:
    folder = tmp_path / "ranks"
    store.save(folder)
    first_block = {site.path for site in llama.profile.sites if site.block == 0}
    ranks = {path: rank for path, rank in store.ranks.items() if path in first_block}
    RankStore(metric="wanda", ranks=ranks).save(folder)
    assert RankStore.load(folder).metric == "wanda"
    assert len(list(folder.iterdir())) == 1


def test_a_failed_save_leaves_the_old_store_and_nothing_else(
    store: RankStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "ranks"
    store.save(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("unicuco.ranks.save_file", full)
    with pytest.raises(StorageError, match=r"can't be written .* No space left"):
        RankStore(metric="wanda", ranks=store.ranks).save(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["ranks"]


def test_a_loaded_store_maps_its_file_instead_of_copying_it(
    store: RankStore, tmp_path: Path
) -> None:
    store.save(tmp_path / "ranks")
    loaded = RankStore.load(tmp_path / "ranks", verify=False)
    maps = Path("/proc/self/maps")
    if maps.exists():
        mapped = [line.split("-") for line in maps.read_text().splitlines() if "block-0" in line]
        spans = [(int(a, 16), int(rest[0].split()[0], 16)) for a, *rest in mapped]
        first = next(iter(loaded.ranks.values())).data_ptr()
        assert any(start <= first < end for start, end in spans)


def test_no_ranks_at_all_are_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(RunError, match="holds no ranks"):
            RankStore.load(folder)


def test_a_missing_file_is_noticed(store: RankStore, tmp_path: Path) -> None:
    store.save(tmp_path / "ranks")
    (tmp_path / "ranks" / "block-0001.safetensors").unlink()
    with pytest.raises(RunError, match="holds 1 of 2 rank files"):
        RankStore.load(tmp_path / "ranks")


@pytest.mark.parametrize("kept", [0, 5, 300, 1200])
def test_a_file_that_is_cut_off_is_refused(store: RankStore, tmp_path: Path, kept: int) -> None:
    store.save(tmp_path / "ranks")
    path = tmp_path / "ranks" / "block-0001.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(RunError, match=r"block-0001\.safetensors is cut off or damaged") as error:
        RankStore.load(tmp_path / "ranks")
    assert "\n" not in str(error.value)


@settings(max_examples=40, deadline=None)
@given(place=st.integers(0, 2**20), bit=st.integers(0, 7))
def test_no_flipped_bit_goes_unnoticed(
    tmp_path_factory: pytest.TempPathFactory, place: int, bit: int
) -> None:
    folder = tmp_path_factory.mktemp("flip") / "ranks"
    rank = rank_rows(torch.rand(4, 6, generator=torch.Generator().manual_seed(0)))
    RankStore(metric="wanda", ranks={"h.0.a": rank}).save(folder)
    path = folder / "block-0000.safetensors"
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1 << bit
    path.write_bytes(content)
    try:
        again = RankStore.load(folder)
    except RunError:
        return
    # Only padding of the file's header may change unseen.
    assert again.metric == "wanda"
    assert [torch.equal(r, rank) for r in again.ranks.values()] == [True]


def test_files_of_two_stores_are_told_apart(
    store: RankStore, llama: LoadedModel, tmp_path: Path
) -> None:
    other = {path: rank.flip(1).contiguous() for path, rank in store.ranks.items()}
    store.save(tmp_path / "a")
    RankStore(metric="magnitude", ranks=other).save(tmp_path / "b")
    stray = tmp_path / "b" / "block-0001.safetensors"
    stray.replace(tmp_path / "a" / stray.name)
    with pytest.raises(RunError, match="mixes the ranks of several runs"):
        RankStore.load(tmp_path / "a")


def test_another_format_is_refused(store: RankStore, tmp_path: Path) -> None:
    store.save(tmp_path / "ranks")
    path = tmp_path / "ranks" / "block-0000.safetensors"
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = {"unicuco.ranks": '{"format": 9}'}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
    with pytest.raises(RunError, match="has rank format 9; this version reads 1"):
        RankStore.load(tmp_path / "ranks")


def test_ranks_of_another_model_are_refused(store: RankStore, tmp_path: Path) -> None:
    wider = load_model(tiny_model_folder(tmp_path / "w", "llama", hidden_size=32)).profile
    with pytest.raises(
        RunError, match=r"another model: .* is \(32, 32\) there and \(16, 16\) here"
    ):
        store.check_sites(wider)
    other = load_model(tiny_model_folder(tmp_path / "o", "opt")).profile
    with pytest.raises(RunError, match="is in only one of the two"):
        store.check_sites(other)
