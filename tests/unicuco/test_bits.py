from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unicuco.bits import (
    KV_BITS,
    LIMITS,
    group_size,
    kv_token_bytes,
    pack_vectors,
    pack_words,
    round_matrix,
    round_vectors,
    site_bytes,
    unpack_words,
)
from unicuco.importance.sparsegpt import InverseFactor
from unicuco.types import Site


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("columns", "size"), [(256, 128), (704, 64), (96, 32), (40, 8), (44, 44), (7, 7)]
)
def test_groups_divide_the_row(columns: int, size: int) -> None:
    assert group_size(columns) == size


@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_is_to_the_nearest_of_a_slow_reference(bits: int) -> None:
    weight = random(3, 64)
    rounded = round_matrix(weight, bits, torch.float32)
    size = 64
    for row in range(3):
        for start in range(0, 64, size):
            group = weight[row, start : start + size]
            scale = float(group.abs().max()) / LIMITS[bits]
            expected = [round(float(w) / scale) for w in group]
            assert rounded.codes[row, start : start + size].tolist() == expected
    assert (rounded.dequantise() - weight).abs().max() <= rounded.scales.max() / 2 + 1e-6


def test_error_falls_with_bits_and_zeros_stay_zero() -> None:
    weight = random(16, 256)
    weight[torch.rand(16, 256, generator=torch.Generator().manual_seed(1)) < 0.5] = 0
    errors = []
    for bits in (4, 8):
        back = round_matrix(weight, bits, torch.bfloat16).dequantise()
        assert bool((back[weight == 0] == 0).all())
        errors.append(float((back - weight).square().sum()))
    assert errors[1] < errors[0] / 100


def test_a_row_of_zeros_and_tiny_weights_are_finite() -> None:
    weight = torch.zeros(2, 16)
    weight[1] = 1e-45
    for bits in (8, 4):
        assert bool(torch.isfinite(round_matrix(weight, bits, torch.bfloat16).dequantise()).all())


def test_gptq_loses_less_of_the_outputs_and_keeps_zeros() -> None:
    x = random(512, 64) @ random(64, 64, seed=1)  # inputs that depend on each other
    weight = random(24, 64, seed=2)
    weight[:, ::3] = 0
    upper = InverseFactor.of(2 / 512 * x.T @ x).upper
    plain = round_matrix(weight, 4, torch.float32).dequantise()
    made_up = round_matrix(weight, 4, torch.float32, upper=upper).dequantise()
    assert bool((made_up[:, ::3] == 0).all())
    lost = [((back - weight) @ x.T).square().sum() for back in (made_up, plain)]
    assert lost[0] < 0.85 * lost[1]


@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 99))
def test_packed_words_come_back(rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (rows, columns), generator=generator).to(torch.int8)
    words = pack_words(codes)
    assert words.dtype == torch.int32
    assert words.shape == (rows, -(-columns // 8))
    assert torch.equal(unpack_words(words, columns), codes)


@pytest.mark.parametrize("bits", KV_BITS)
@pytest.mark.parametrize("size", [4, 6, 64])
def test_a_packed_cache_takes_the_bytes_that_are_counted(bits: int, size: int) -> None:
    keys = random(1, 3, 10, size)
    assert 2 * len(pack_vectors(keys, bits)) == 10 * kv_token_bytes(3, size, bits)


def test_rounded_vectors_err_less_with_more_bits_and_sixteen_change_nothing() -> None:
    x = random(5, 7, 32)
    errors = [float((round_vectors(x, bits) - x).square().sum()) for bits in KV_BITS]
    assert errors[0] == 0
    assert errors == sorted(errors)
    assert errors[1] > 0
    assert torch.equal(round_vectors(torch.zeros(2, 4), 4), torch.zeros(2, 4))


def test_fewer_bits_take_fewer_bytes() -> None:
    site = Site(block=0, path="x", num_rows=64, num_columns=704, item_bytes=2)
    assert [site_bytes(site, bits) for bits in (16, 8, 4)] == [
        64 * 704 * 2,
        64 * 704 + 64 * 2,
        64 * 352 + 64 * 11 * 2 + 16,
    ]
