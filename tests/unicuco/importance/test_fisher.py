from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from unicuco.calibration import TokenSet
from unicuco.importance.fisher import fisher_rank_sums
from unicuco.models import read_site, site_module
from unicuco.ranks import rank_rows
from unicuco.testing.cases import random_tokens
from unicuco.testing.tiny import FAMILIES, build_tiny
from unicuco.types import ModelProfile


def random_ranks(profile: ModelProfile) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        site.path: rank_rows(torch.rand(site.num_rows, site.num_columns, generator=generator))
        for site in profile.sites
    }


def slow_sums(
    model: nn.Module,
    profile: ModelProfile,
    ranks: dict[str, Tensor],
    tokens: TokenSet,
    labels: list[Tensor],
) -> dict[str, Tensor]:
    """Sum w^2 F / 2 one token at a time: the outer product of g and x, squared."""
    totals = {site.path: torch.zeros(site.num_rows, site.num_columns) for site in profile.sites}
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    handles = []
    for site in profile.sites:

        def hook(
            module: nn.Module, args: tuple[Tensor], out: Tensor, path: str = site.path
        ) -> None:
            inputs[path], outputs[path] = args[0], out
            out.retain_grad()

        handles.append(site_module(model, site).register_forward_hook(hook))
    model.requires_grad_(True)
    for window, drawn in zip(tokens.ids, labels, strict=True):
        log_p = model(input_ids=window[None], use_cache=False).logits[0].log_softmax(-1)
        loss = -sum((log_p[t, int(label)] for t, label in enumerate(drawn)), torch.zeros(()))
        loss.backward()
        for path, total in totals.items():
            x = inputs[path].detach().reshape(-1, inputs[path].shape[-1])
            gradient = outputs[path].grad
            assert gradient is not None
            g = gradient.reshape(-1, gradient.shape[-1])
            for t in range(len(x)):
                total += torch.outer(g[t], x[t]).square()
    model.requires_grad_(False)
    for handle in handles:
        handle.remove()
    sums = {}
    for site in profile.sites:
        effect = read_site(model, site).square() * totals[site.path] / tokens.num_tokens / 2
        sums[site.path] = torch.stack(
            [effect[ranks[site.path] == r].sum() for r in range(site.num_columns)]
        )
    return sums


def drawn_labels(model: nn.Module, tokens: TokenSet, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        return [
            torch.multinomial(
                model(input_ids=window[None], use_cache=False).logits[0].softmax(-1),
                1,
                generator=generator,
            )[:, 0]
            for window in tokens.ids
        ]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_sums_agree_with_one_token_at_a_time(family: str) -> None:
    model, profile = build_tiny(family)
    tokens = random_tokens(seed=3, num_windows=2, context=7)
    ranks = random_ranks(profile)
    found = fisher_rank_sums(model, profile, ranks, tokens, seed=11)
    expected = slow_sums(model, profile, ranks, tokens, drawn_labels(model, tokens, 11))
    assert found.keys() == expected.keys()
    for site in profile.sites:
        sums = found[site.path]
        assert sums.dtype == torch.float64
        assert sums.shape == (site.num_columns,)
        torch.testing.assert_close(
            found[site.path].float(), expected[site.path], rtol=1e-3, atol=1e-8
        )


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_site_of_every_family_gets_finite_sums_above_zero(family: str) -> None:
    model, profile = build_tiny(family)
    sums = fisher_rank_sums(model, profile, random_ranks(profile), random_tokens(seed=4), seed=0)
    for path, values in sums.items():
        assert bool(torch.isfinite(values).all()), path
        assert bool((values >= 0).all()), path
        assert float(values.sum()) > 0, path


def test_the_model_is_left_as_it_was() -> None:
    model, profile = build_tiny("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fisher_rank_sums(model, profile, random_ranks(profile), random_tokens(seed=4), seed=0)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_seed_decides_the_labels() -> None:
    model, profile = build_tiny("llama")
    ranks, tokens = random_ranks(profile), random_tokens(seed=4)
    path = profile.sites[0].path
    one, same, other = (
        fisher_rank_sums(model, profile, ranks, tokens, seed=seed)[path] for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_sums_foretell_the_kl_of_pruning_one_site_a_little(  # the reason why they are collected
) -> None:
    from unicuco.objectives import DenseReference

    model, profile = build_tiny("llama")
    tokens = random_tokens(seed=6, num_windows=12, context=32)
    ranks = random_ranks(profile)
    sums = fisher_rank_sums(model, profile, ranks, tokens, seed=0)
    with torch.no_grad():
        reference = DenseReference.from_logits(model(input_ids=tokens.ids).logits.flatten(0, 1))
        ratios = []
        for site in profile.sites:
            weight = read_site(model, site)
            kept = weight.clone()
            weight.masked_fill_(ranks[site.path] < site.num_columns // 8, 0.0)
            kl = reference.kl(model(input_ids=tokens.ids).logits.flatten(0, 1)).mean()
            weight.copy_(kept)
            ratios.append(float(sums[site.path][: site.num_columns // 8].sum() / kl))
    # Cross terms are left out, so single sites differ; together they agree.
    assert 0.5 < sorted(ratios)[len(ratios) // 2] < 2.0, ratios
