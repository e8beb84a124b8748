from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from unicuco.dimensions import (
    DIMENSIONS,
    ByteCost,
    Granularity,
    ProductCost,
    build_cost,
    build_space,
)
from unicuco.dimensions.depth import Depth
from unicuco.dimensions.kv_bits import KvBits
from unicuco.dimensions.low_rank import LowRank
from unicuco.dimensions.sparsity import MAX_SITE_SPARSITY, Sparsity
from unicuco.dimensions.weight_bits import WeightBits
from unicuco.dimensions.width import Width
from unicuco.errors import RequestError
from unicuco.models import block_module, read_site
from unicuco.testing.dimension import DimensionContract
from unicuco.testing.profiles import make_profile
from unicuco.testing.tiny import FAMILIES, build_tiny
from unicuco.types import ModelProfile

PROFILE = make_profile([[(40, 60), (80, 30)], [(50, 50), (20, 90)], [(60, 60)]])


class TestSparsity(DimensionContract):
    dimension = Sparsity()


class TestDepth(DimensionContract):
    dimension = Depth()


class TestWidth(DimensionContract):
    dimension = Width()
    families = frozenset({"llama", "qwen2"})


class TestLowRank(DimensionContract):
    dimension = LowRank()
    families = frozenset({"llama", "qwen2"})
    profile = build_tiny("qwen2")[1]


class TestWeightBits(DimensionContract):
    dimension = WeightBits()
    families = frozenset(FAMILIES) - {"gpt2"}


class TestKvBits(DimensionContract):
    dimension = KvBits()


def test_every_dimension_has_a_contract_test() -> None:
    kinds = (TestSparsity, TestDepth, TestWidth, TestLowRank, TestWeightBits, TestKvBits)
    tested = {kind.dimension.name for kind in kinds}
    assert set(DIMENSIONS) == tested
    assert all(name == dimension.name for name, dimension in DIMENSIONS.items())


# --- sparsity -----------------------------------------------------------------------------------


def zeroed(profile: ModelProfile, values: list[float], granularity: Granularity) -> list[int]:
    sizes = [site.num_weights for site in profile.sites]
    return Sparsity().zeroed(profile.sites, sizes, values, granularity)


def test_layer_granularity_counts_the_weights_of_each_site() -> None:
    axes = Sparsity().axes(PROFILE, Granularity.LAYER)
    assert [axis.name for axis in axes] == [f"sparsity/{site.path}" for site in PROFILE.sites]
    assert [axis.num_steps for axis in axes] == [2400, 2400, 2500, 1800, 3600]
    assert {(axis.low, axis.high) for axis in axes} == {(0.0, MAX_SITE_SPARSITY)}
    values = [k / axis.num_steps for k, axis in zip((1, 2, 3, 1700, 0), axes, strict=True)]
    assert zeroed(PROFILE, values, Granularity.LAYER) == [1, 2, 3, 1700, 0]


@given(st.data())
def test_block_granularity_splits_a_block_exactly_and_in_proportion(data: st.DataObject) -> None:
    shapes = st.tuples(st.integers(1, 9), st.integers(1, 9))
    blocks = data.draw(st.lists(st.lists(shapes, min_size=1, max_size=5), min_size=1, max_size=3))
    profile = make_profile(blocks)
    axes = Sparsity().axes(profile, Granularity.BLOCK)
    counts = [data.draw(st.integers(0, axis.num_steps)) for axis in axes]
    values = [count / axis.num_steps for count, axis in zip(counts, axes, strict=True)]
    drops = zeroed(profile, values, Granularity.BLOCK)
    for block, (count, axis) in enumerate(zip(counts, axes, strict=True)):
        own = [(s, n) for s, n in zip(profile.sites, drops, strict=True) if s.block == block]
        assert sum(dropped for _, dropped in own) == count
        for site, dropped in own:
            assert abs(dropped - count * site.num_weights / axis.num_steps) < 1
            assert 0 <= dropped <= site.num_weights


def test_a_larger_block_setting_drops_no_fewer_weights_than_one_less_of_any_site() -> None:
    # Largest remainders may move single weights between sites as the block's count grows.
    axis = Sparsity().axes(PROFILE, Granularity.BLOCK)[0]
    before = [0, 0]
    for count in range(0, axis.max_step, 7):
        now = zeroed(PROFILE, [count / axis.num_steps, 0, 0], Granularity.BLOCK)[:2]
        assert all(new >= old - 1 for new, old in zip(now, before, strict=True))
        before = now


# --- depth --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("removed", [(0,), (1,), (0, 1)])
def test_a_removed_block_is_skipped_exactly(family: str, removed: tuple[int, ...]) -> None:
    model, profile = build_tiny(family)
    ids = torch.randint(1, 257, (2, 12), generator=torch.Generator().manual_seed(1))
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def watch(block: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = args[0] if args else kwargs["hidden_states"]
            result = output[0] if isinstance(output, tuple) else output
            seen[block] = (given.clone(), result.clone())

        return hook

    values = [float(block in removed) for block in range(2)]
    Depth().apply(model, profile, values, Granularity.BLOCK)
    for block in range(2):  # after the dimension's own hooks: what the next module gets
        module = block_module(model, profile, block)
        module.register_forward_hook(watch(block), with_kwargs=True)
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for block, (given_, result) in seen.items():
        assert torch.equal(given_, result) == (block in removed)


def test_the_model_without_a_block_is_the_model_built_without_it() -> None:
    model, profile = build_tiny("llama")
    ids = torch.randint(1, 257, (2, 12), generator=torch.Generator().manual_seed(2))
    Depth().apply(model, profile, [1.0, 0.0], Granularity.BLOCK)
    with torch.no_grad():
        skipped = model(input_ids=ids, use_cache=False).logits
    Depth().apply(model, profile, [0.0, 0.0], Granularity.BLOCK)
    inner = model.get_submodule("model")
    inner.layers = nn.ModuleList([inner.get_submodule("layers.1")])
    model.config.num_hidden_layers = 1
    with torch.no_grad():
        assert torch.equal(skipped, model(input_ids=ids, use_cache=False).logits)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_parts_of_a_block_hold_all_its_parameters_and_add_up(family: str) -> None:
    _, profile = build_tiny(family)
    assert [part.block for part in profile.parts] == [0, 0, 1, 1]
    for block in range(2):
        own = [part for part in profile.parts if part.block == block]
        assert sum(part.num_params for part in own) == profile.block_params[block]
        assert sum(part.num_bytes for part in own) == profile.block_bytes[block]
        sites = [site.path for site in profile.sites if site.block == block]
        assert [path for part in own for path in part.sites] == sites
    assert all((part.num_units > 0) == (family in ("llama", "qwen2")) for part in profile.parts)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("removed", [0, 1, 2, 3])
def test_a_removed_part_adds_nothing_and_the_rest_runs(family: str, removed: int) -> None:
    model, profile = build_tiny(family)
    ids = torch.randint(1, 257, (2, 12), generator=torch.Generator().manual_seed(1))
    values = [float(p == removed) for p in range(4)]
    with torch.no_grad():
        dense = model(input_ids=ids, use_cache=False).logits
        Depth().apply(model, profile, values, Granularity.LAYER)
        without = model(input_ids=ids, use_cache=False).logits
        # Its last matrix writes what is added: nothing, once weights and biases are zero.
        Depth().apply(model, profile, [0.0] * 4, Granularity.LAYER)
        last = model.get_submodule(profile.parts[removed].sites[-1])
        for parameter in last.parameters():
            parameter.zero_()
        zeroed = model(input_ids=ids, use_cache=False).logits
    assert torch.equal(without, zeroed)
    assert not torch.equal(without, dense)


def test_a_block_without_its_parts_is_a_removed_block() -> None:
    model, profile = build_tiny("qwen2")
    ids = torch.randint(1, 257, (2, 12), generator=torch.Generator().manual_seed(3))
    by_part = build_cost(profile, ("depth",), Granularity.LAYER)
    by_block = build_cost(profile, ("depth",), Granularity.BLOCK)
    assert by_part.shape([0, 0, 1, 1]) == by_block.shape([0, 1])
    by_part.apply(model, [0, 0, 1, 1])
    with torch.no_grad():
        parts_gone = model(input_ids=ids, use_cache=False).logits
        by_part.apply(model, [0] * 4)
        by_block.apply(model, [0, 1])
        assert torch.equal(parts_gone, model(input_ids=ids, use_cache=False).logits)


def test_parts_that_cannot_be_told_apart_leave_whole_blocks() -> None:
    profile = replace(PROFILE, parts=())
    with pytest.raises(RequestError, match="give --granularity block"):
        build_space(profile, ("depth",))
    cost = build_cost(profile, ("depth",), Granularity.BLOCK)
    assert cost.kept_params([0, 1, 0]) == profile.total_params - profile.block_params[1]


def test_a_removed_block_takes_everything_in_it_out_of_the_count() -> None:
    cost = build_cost(PROFILE, ("depth",), Granularity.BLOCK)
    values = [0.0, 1.0, 0.0]
    assert cost.kept_params(values) == PROFILE.total_params - PROFILE.block_params[1]
    assert cost.num_bytes(values) == PROFILE.total_bytes - PROFILE.block_bytes[1]
    drops = cost.site_drops(values)
    assert [drops[site.path] for site in PROFILE.sites] == [0, 0, 2500, 1800, 0]


# --- several together ---------------------------------------------------------------------------


def test_dimensions_meet_as_a_product() -> None:
    cost = build_cost(PROFILE, ("depth", "sparsity"), Granularity.LAYER)
    assert [part.name for part in cost.dimensions] == ["sparsity", "depth"]
    sparsity = [0.5, 0.25, 0.5, 0.5, 0.0]
    both = [*sparsity, 0.0, 0.0, 1.0, 1.0, 0.0]  # both parts of block 1
    assert cost.kept_params(both) == PROFILE.total_params - PROFILE.block_params[1] - 1200 - 600
    relaxed = cost.kept(torch.tensor([both], dtype=torch.float64))
    assert float(relaxed[0]) == cost.kept_params(both)
    half = cost.kept(torch.tensor([[*sparsity, 0.0, 0.0, 0.5, 0.5, 0.0]], dtype=torch.float64))
    block = PROFILE.block_params[1] - 1250 - 900  # what is left of it
    assert float(half[0]) == pytest.approx(cost.kept_params([*sparsity, *[0] * 5]) - block / 2)


def test_units_and_what_is_inside_heads_meet_as_a_product_with_their_biases() -> None:
    _, profile = build_tiny("qwen2")  # 4 query heads of 4 coordinates in 2 groups, hidden 16
    cost = build_cost(profile, ("width", "low_rank"), Granularity.LAYER)
    space = build_space(profile, ("width", "low_rank"), Granularity.LAYER)
    names = [f"{kind}/model.layers.1.self_attn{end}" for kind, end in (
        ("width", ""), ("low_rank", ".pairs"), ("low_rank", ".ranks")
    )]  # fmt: skip
    settings = dict(zip(names, (0.5, 0.5, 0.25), strict=True))
    values = [settings.get(name, 0.0) for name in space.names]
    before = 16 * 16 + 16 + 2 * (8 * 16 + 8) + 16 * 16
    # Of one group: two query heads of one pair, a key of one pair, values of three coordinates.
    after = (4 * 16 + 4) + (2 * 16 + 2) + (3 * 16 + 3) + 16 * 6
    assert cost.kept_params(values) == profile.total_params - before + after
    assert cost.num_bytes(values) == profile.total_bytes - 4 * (before - after)
    relaxed = cost.kept(torch.tensor([values], dtype=torch.float64))
    assert float(relaxed[0]) == pytest.approx(cost.kept_params(values), abs=1e-6)


def test_low_rank_is_not_learned_with_masks() -> None:
    with pytest.raises(RequestError, match="low_rank and sparsity are not learned together"):
        build_space(build_tiny("llama")[1], ("sparsity", "low_rank"))


@pytest.mark.parametrize("dimensions", [(), ("sparsity", "sparsity"), ("sparcity",)])
def test_dimensions_are_known_and_different(dimensions: tuple[str, ...]) -> None:
    with pytest.raises(RequestError, match=r"different names out of sparsity, depth, .*; got"):
        build_space(PROFILE, dimensions)


def test_dimensions_are_applied_after_those_they_must_follow() -> None:
    order: list[str] = []

    class Noted(Sparsity):
        def __init__(self, name: str, must_follow: frozenset[str]) -> None:
            self.name, self.must_follow = name, must_follow

        def apply(self, model: nn.Module, profile: Any, values: Any, granularity: Any) -> None:
            order.append(self.name)

    parts = [Noted("a", frozenset({"b", "absent"})), Noted("b", frozenset({"c"}))]
    parts.append(Noted("c", frozenset()))
    cost = ProductCost(PROFILE, parts, Granularity.LAYER)
    cost.apply(nn.Identity(), [0.0] * 15)
    assert order == ["c", "b", "a"]


def test_masks_are_not_the_dimension_s_business_on_a_live_model() -> None:
    model, profile = build_tiny("llama")
    before = [read_site(model, site).clone() for site in profile.sites]
    Sparsity().apply(model, profile, [0.5] * len(profile.sites), Granularity.LAYER)
    after = [read_site(model, site) for site in profile.sites]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


# --- bits ---------------------------------------------------------------------------------------


def test_matrices_that_an_engine_fuses_share_their_bits() -> None:
    _, profile = build_tiny("llama")
    names = [axis.name for axis in WeightBits().axes(profile, Granularity.LAYER)]
    inside = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    assert names == [f"weight_bits/model.layers.{b}.{path}" for b in range(2) for path in inside]
    cost = build_cost(profile, ["weight_bits"], Granularity.LAYER)
    assert isinstance(cost, ByteCost)
    bits = cost.weight_bits([1.0, 0.5, 0.0, 0.5, *[0.0] * 4])
    assert bits[:7] == (4, 4, 4, 8, 16, 16, 8)
    assert set(bits[7:]) == {16}


def test_eight_bits_round_the_inputs_of_their_matrix_alone() -> None:
    model, profile = build_tiny("llama")
    ids = torch.randint(1, 257, (1, 12), generator=torch.Generator().manual_seed(1))
    dense = model(input_ids=ids).logits
    WeightBits().apply(model, profile, [1.0] * 8, Granularity.LAYER)
    assert torch.equal(model(input_ids=ids).logits, dense)  # 4 bits take inputs as they are
    WeightBits().apply(model, profile, [0.0, 0.5, *[0.0] * 6], Granularity.LAYER)
    assert not torch.equal(model(input_ids=ids).logits, dense)


def test_bytes_of_weights_and_cache_are_counted_by_hand() -> None:
    profile = make_profile([[(4, 64), (8, 32)]])  # 2 bytes a weight, 2 heads of 4
    cost = build_cost(profile, ["sparsity", "weight_bits", "kv_bits"], Granularity.LAYER)
    assert isinstance(cost, ByteCost)
    outside = profile.total_bytes - 2 * 512
    half = [32 / 256, 128 / 256, 0.5, 1.0, 2 / 3]  # zeros, zeros, 8 bits, 4 bits, 6 bits
    eight, four = 256 + 4 * 2, 8 * 4 * 4 + 8 * 2 + 16
    assert cost.num_bytes(half) == outside + eight + four
    sparse = 64 + 256 // 8 + 8 * 2 + 16  # 128 weights of half a byte, and where they are
    assert cost.packed_bytes(half) == outside + eight + sparse  # 32 zeros cost what they save
    assert cost.kv_bytes(half, 10) == 10 * 2 * 2 * (3 + 2)
    assert cost.kv_bytes([0.0] * 5, 10) == 10 * 2 * 2 * 8
    assert cost.size_of(half) == cost.packed_bytes(half) + cost.kv_bytes(half, cost.kv_tokens)
