from __future__ import annotations

import numpy as np
import pytest
import torch

from unicuco.packing.planes import decode_tensor, encode_tensor, split_planes, tensor_entropy_bits

WORDS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def stored(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).reshape(-1).numpy()


def assert_lossless(data: np.ndarray, word: str) -> int:
    coded = encode_tensor(data, word)
    out = np.empty_like(data)
    decode_tensor(coded, word, out)
    assert np.array_equal(out, data)
    return len(coded)


@pytest.mark.parametrize("word", WORDS)
def test_every_type_comes_back_to_the_bit(word: str) -> None:
    values = torch.randn(3001, generator=torch.Generator().manual_seed(0)) * 3
    assert_lossless(stored(values.to(WORDS[word])), word)


@pytest.mark.parametrize("word", WORDS)
def test_every_pattern_of_bits_comes_back(word: str) -> None:
    width = WORDS[word].itemsize
    assert_lossless(np.random.default_rng(1).integers(0, 256, 4096 * width, dtype=np.uint8), word)


@pytest.mark.parametrize("word", ["F16", "BF16"])
def test_all_two_byte_floats_come_back_nan_and_negative_zero_included(word: str) -> None:
    assert_lossless(np.arange(2**16, dtype="<u2").view(np.uint8), word)


@pytest.mark.parametrize("word", WORDS)
def test_no_items_come_back(word: str) -> None:
    assert_lossless(np.empty(0, np.uint8), word)


def test_normal_bf16_weights_code_into_two_thirds_near_their_entropy() -> None:
    weights = 0.02 * torch.randn(2**16, generator=torch.Generator().manual_seed(0))
    data = stored(weights.bfloat16())
    size = assert_lossless(data, "BF16")
    assert size < 0.68 * data.size
    assert size * 8 <= 1.02 * tensor_entropy_bits(data, "BF16")


def test_the_first_plane_of_a_bfloat16_is_its_exponent() -> None:
    exponents, rest = split_planes(stored(torch.tensor([1.0, -2.0]).bfloat16()), "BF16")
    assert exponents.tolist() == [127, 128]
    assert rest.tolist() == [0, 1]  # mantissas, then signs
