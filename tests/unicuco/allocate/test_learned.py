"""BESA, Lua-LLM and AdapMTL as allocators, and what they share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from unicuco.allocate import (
    AdapMtl,
    AllocationContext,
    Allocator,
    Besa,
    Lua,
)
from unicuco.allocate.adapmtl import AdapMtlOptions
from unicuco.allocate.besa import BesaOptions
from unicuco.allocate.learned import check_memory, token_loss
from unicuco.allocate.lua import LuaOptions
from unicuco.dimensions import Granularity
from unicuco.errors import AllocationError
from unicuco.models import site_module
from unicuco.testing import FAMILIES, tiny_model_folder
from unicuco.testing.allocator import AllocatorContract
from unicuco.testing.cases import EvaluationCase, make_evaluation_case
from unicuco.testing.planted import NUM_BLOCKS


# Contracts run at the defaults where a model has sensitivity to find, and in few steps elsewhere:
# budgets, grids and determinism don't depend on how long was learned, and every test learns anew.
def is_planted(context: AllocationContext) -> bool:
    evidence = context.evidence
    return evidence is not None and evidence.profile.num_blocks == NUM_BLOCKS


@pytest.mark.slow
class TestBesa(AllocatorContract):
    name = "besa"
    needs_evidence = True
    sees_sensitivity = True

    def make(self, context: AllocationContext) -> Allocator:
        return Besa(context, None if is_planted(context) else BesaOptions(steps=1))


@pytest.mark.slow
class TestLua(AllocatorContract):
    name = "lua"
    needs_evidence = True
    sees_sensitivity = True

    def make(self, context: AllocationContext) -> Allocator:
        return Lua(context, None if is_planted(context) else LuaOptions(steps=1))


@pytest.mark.slow
class TestAdapMtl(AllocatorContract):
    name = "adapmtl"
    needs_evidence = True
    sees_sensitivity = True

    def make(self, context: AllocationContext) -> Allocator:
        return AdapMtl(context, None if is_planted(context) else AdapMtlOptions(steps=20))


def all_three(context: AllocationContext) -> list[Allocator]:
    return [
        Besa(context, BesaOptions(steps=2)),
        Lua(context, LuaOptions(steps=2)),
        AdapMtl(context, AdapMtlOptions(steps=2)),
    ]


def test_weights_are_bit_identical_after_learning_and_have_no_gradients(
    case: EvaluationCase,
) -> None:
    model = case.loaded.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    for allocator in all_three(case.context):
        allocator.allocate([0.5])
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_models_of_every_family_can_be_learned(family: str, tmp_path: Path) -> None:
    case = make_evaluation_case(tiny_model_folder(tmp_path / family, family))
    for allocator in all_three(case.context):
        (strategy,) = allocator.allocate([0.5])
        kept = case.space.cost.kept_params(strategy.values)
        assert kept == case.space.kept_for_sparsity(0.5), allocator.name


def test_a_block_axis_takes_the_mean_of_its_sites(tiny_llama: Path) -> None:
    blocks = make_evaluation_case(tiny_llama, granularity=Granularity.BLOCK)
    sites = make_evaluation_case(tiny_llama)
    coarse, fine = (
        AdapMtl(case.context, AdapMtlOptions(steps=60)).allocate([0.6])[0]
        for case in (blocks, sites)
    )
    profile = sites.loaded.profile
    drops = sites.space.cost.site_drops(fine.values)
    for block, value in enumerate(coarse.values):
        own = [site for site in profile.sites if site.block == block]
        share = sum(drops[s.path] for s in own) / sum(s.num_weights for s in own)
        assert value == pytest.approx(share, abs=0.03)


def test_a_loss_that_is_not_finite_is_refused_in_one_line(tmp_path: Path) -> None:
    case = make_evaluation_case(tiny_model_folder(tmp_path, "llama"))
    with torch.no_grad():
        last = case.loaded.profile.sites[-1]
        site_module(case.loaded.model, last).weight.fill_(3e38)  # type: ignore[operator]
    for allocator in all_three(case.context):
        with pytest.raises(AllocationError, match=f"loss of {allocator.name} became") as error:
            allocator.allocate([0.5])
        assert "\n" not in str(error.value)


def test_what_does_not_fit_into_memory_is_refused_before_it_begins() -> None:
    check_memory("lua", 10, available=10)
    with pytest.raises(AllocationError, match=r"about 3\.0 GiB beside it, and 1\.0 GiB are free"):
        check_memory("lua", 3 * 2**30, available=2**30)


def test_the_seed_decides_the_order_of_windows(case: EvaluationCase) -> None:
    evidence = case.context.require_evidence("test")
    other = replace(case.context, evidence=replace(evidence, seed=1))
    first = [allocator.allocate([0.5]) for allocator in all_three(case.context)]
    assert [allocator.allocate([0.5]) for allocator in all_three(case.context)] == first
    assert [allocator.allocate([0.5]) for allocator in all_three(other)] != first


def test_the_token_loss_is_that_of_the_next_token() -> None:
    ids = torch.tensor([[3, 1, 2]])
    logits = torch.full((1, 3, 5), -1e4)
    logits[0, 0, 1] = logits[0, 1, 2] = logits[0, 2, 0] = 1e4
    assert float(token_loss(logits, ids)) == 0.0
