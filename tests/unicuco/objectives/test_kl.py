from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from unicuco.objectives import DenseReference, top_k_for

LARGE = 9000  # beyond what is kept whole


def logits_of(seed: int, tokens: int, vocabulary: int, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(tokens, vocabulary, generator=generator)


def slow_kl(dense: Tensor, pruned: Tensor) -> list[float]:
    result = []
    for p_logits, q_logits in zip(dense.tolist(), pruned.tolist(), strict=True):
        p_sum = math.fsum(math.exp(z) for z in p_logits)
        q_sum = math.fsum(math.exp(z) for z in q_logits)
        total = 0.0
        for a, b in zip(p_logits, q_logits, strict=True):
            p, q = math.exp(a) / p_sum, math.exp(b) / q_sum
            total += p * (math.log(p) - math.log(q))
        result.append(total)
    return result


def test_kl_agrees_with_the_definition() -> None:
    dense, pruned = logits_of(1, 5, 40), logits_of(2, 5, 40)
    kl = DenseReference.from_logits(dense).kl(pruned)
    assert kl.shape == (5,)
    assert kl.tolist() == pytest.approx(slow_kl(dense, pruned), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("vocabulary", [40, LARGE])
def test_a_model_diverges_from_itself_by_nothing(vocabulary: int) -> None:
    dense = logits_of(3, 4, vocabulary)
    assert float(DenseReference.from_logits(dense).kl(dense).abs().max()) < 1e-5


@given(st.integers(0, 10**6), st.floats(-30, 30))
def test_kl_is_never_negative_and_a_shift_of_all_logits_means_nothing(
    seed: int, shift: float
) -> None:
    dense, pruned = logits_of(seed, 2, 20), logits_of(seed + 1, 2, 20)
    reference = DenseReference.from_logits(dense)
    kl = reference.kl(pruned)
    assert bool((kl > -1e-6).all())
    torch.testing.assert_close(reference.kl(pruned + shift), kl, rtol=1e-4, atol=1e-4)
    shifted = DenseReference.from_logits(dense + shift)
    torch.testing.assert_close(shifted.kl(pruned), kl, rtol=1e-4, atol=1e-4)


def test_small_vocabularies_are_kept_whole_and_large_ones_by_at_least_512_entries() -> None:
    assert [top_k_for(v) for v in (40, 4096, 8192)] == [40, 4096, 8192]
    assert 512 <= top_k_for(8193) < 8193
    assert 512 <= top_k_for(250_000) < 8193
    whole = DenseReference.from_logits(logits_of(4, 2, 40))
    assert whole.indices is None
    top = DenseReference.from_logits(logits_of(4, 2, LARGE))
    assert top.probabilities.shape == (2, top_k_for(LARGE))
    assert top.indices is not None


def _full(dense: Tensor, pruned: Tensor) -> Tensor:
    log_p, log_q = dense.double().log_softmax(-1), pruned.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@pytest.mark.parametrize("noise", [0.01, 0.3, 2.0])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_kl_of_the_top_and_the_tail_is_never_above_the_full_one_and_close(
    noise: float, scale: float
) -> None:
    dense = logits_of(5, 6, LARGE, scale)
    pruned = dense + noise * logits_of(6, 6, LARGE, 1.0)
    kept = DenseReference.from_logits(dense).kl(pruned).double()
    full = _full(dense, pruned)
    assert bool((kept <= full * (1 + 1e-4) + 1e-5).all())
    tail = 1 - DenseReference.from_logits(dense).probabilities.sum(-1).double()
    # The chain rule: what is missing is the KL inside the tail, weighted by the tail's mass.
    inside = tail * noise**2
    assert bool((full - kept <= 2 * inside + 1e-5).all())


def test_the_top_and_the_tail_agree_with_the_definition() -> None:
    dense, pruned = logits_of(7, 3, LARGE), logits_of(8, 3, LARGE)
    p, q = dense.double().softmax(-1), pruned.double().softmax(-1)
    top = p.argsort(-1, descending=True)[:, : top_k_for(LARGE)]
    p_top, q_top = p.gather(-1, top), q.gather(-1, top)
    p_all = torch.cat([p_top, 1 - p_top.sum(-1, keepdim=True)], -1)
    q_all = torch.cat([q_top, 1 - q_top.sum(-1, keepdim=True)], -1)
    expected = (p_all * (p_all / q_all).log()).sum(-1)
    kl = DenseReference.from_logits(dense).kl(pruned).double()
    torch.testing.assert_close(kl, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("vocabulary", [30, LARGE])
def test_the_gradient_of_the_kl_is_the_difference_of_probabilities(vocabulary: int) -> None:
    dense, pruned = logits_of(9, 2, vocabulary), logits_of(10, 2, vocabulary).requires_grad_(True)
    DenseReference.from_logits(dense).kl(pruned).sum().backward()
    assert pruned.grad is not None
    expected = (pruned.softmax(-1) - dense.softmax(-1)).detach()
    if vocabulary == LARGE:  # in the tail only the sum is known
        expected = expected.gather(-1, dense.topk(512, dim=-1).indices)
        found = pruned.grad.gather(-1, dense.topk(512, dim=-1).indices)
    else:
        found = pruned.grad
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("vocabulary", [30, LARGE])
def test_references_are_joined_and_sliced_by_token(vocabulary: int) -> None:
    dense, pruned = logits_of(11, 6, vocabulary), logits_of(12, 6, vocabulary)
    whole = DenseReference.from_logits(dense)
    parts = [DenseReference.from_logits(part) for part in dense.split(2)]
    joined = DenseReference.concatenate(parts)
    torch.testing.assert_close(joined.kl(pruned), whole.kl(pruned))
    middle = whole.slice(2, 5)
    assert torch.equal(middle.kl(pruned[2:5]), whole.kl(pruned)[2:5])
    assert middle.probabilities.data_ptr() == whole.probabilities[2:5].data_ptr()


@pytest.mark.parametrize("vocabulary", [50, LARGE])
def test_the_kl_of_a_model_that_knows_nothing(vocabulary: int) -> None:
    reference = DenseReference.from_logits(logits_of(7, 4, vocabulary, scale=2.0))
    expected = reference.kl(torch.zeros(4, vocabulary))
    assert torch.allclose(reference.kl_of_uniform(vocabulary), expected, atol=1e-4)


def test_half_precision_logits_are_judged_in_float32() -> None:
    dense, pruned = logits_of(13, 3, 40).bfloat16(), logits_of(14, 3, 40).bfloat16()
    kl = DenseReference.from_logits(dense).kl(pruned)
    assert kl.dtype == torch.float32
    assert torch.equal(kl, DenseReference.from_logits(dense.float()).kl(pruned.float()))
