from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unicuco.packing.coder import decode, encode, entropy_bits, store
from unicuco.packing.layout import CHUNK_ITEMS


def rounded_normal(sigma: float, zeros: float, size: int = CHUNK_ITEMS) -> np.ndarray:
    generator = np.random.default_rng(0)
    values = np.clip(np.rint(generator.normal(0, sigma, size)), -127, 127).astype(np.int8)
    values[generator.random(size) < zeros] = 0
    return values.view(np.uint8)


def round_trip(data: np.ndarray) -> int:
    coded = encode(data)
    out = np.empty_like(data)
    decode(coded, out)
    assert np.array_equal(out, data)
    return len(coded)


@given(st.binary(max_size=400), st.integers(0, 255), st.integers(1, 5))
def test_any_bytes_come_back(data: bytes, mask: int, repeat: int) -> None:
    array = np.frombuffer(data * repeat, np.uint8) & np.uint8(mask)
    assert round_trip(array) <= array.size + 1


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 4097, CHUNK_ITEMS - 3])
@pytest.mark.parametrize("sigma", [0.3, 1.5, 40.0])
def test_lengths_that_no_packing_divides_come_back(size: int, sigma: float) -> None:
    round_trip(rounded_normal(sigma, 0.2, size))


@pytest.mark.parametrize(
    ("sigma", "zeros"),
    [(60, 0), (30, 0), (10, 0), (4, 0), (2.5, 0), (1.5, 0), (10, 0.5), (3, 0.7), (30, 0.8)],
)
def test_coded_size_is_within_2_percent_of_the_entropy(sigma: float, zeros: float) -> None:
    data = rounded_normal(sigma, zeros)
    assert round_trip(data) <= 1.02 * entropy_bits(data) * data.size / 8


@pytest.mark.parametrize(("sigma", "zeros"), [(0.3, 0), (1, 0.9), (5, 0.97)])
def test_what_is_nearly_certain_codes_below_a_bit(sigma: float, zeros: float) -> None:
    data = rounded_normal(sigma, zeros)
    assert round_trip(data) <= 1.1 * entropy_bits(data) * data.size / 8


def test_constants_cost_next_to_nothing() -> None:
    assert round_trip(np.full(CHUNK_ITEMS, 7, np.uint8)) < 200


def test_what_can_t_be_coded_is_stored() -> None:
    data = np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8)
    assert encode(data) == store(data)


def test_entropy_is_that_of_the_definition() -> None:
    assert entropy_bits(np.array([0, 0, 1, 1], np.uint8)) == 1.0
    assert entropy_bits(np.arange(256, dtype=np.uint8)) == 8.0
    assert entropy_bits(np.empty(0, np.uint8)) == 0.0


@pytest.mark.parametrize("sigma", [0.3, 1.5, 40.0])
def test_bytes_that_are_cut_or_of_another_array_are_refused(sigma: float) -> None:
    data = rounded_normal(sigma, 0, 3000)
    coded = encode(data)
    out = np.empty_like(data)
    for cut in (0, 1, 3, len(coded) // 2, len(coded) - 1):
        with pytest.raises(ValueError, match=r"."):
            decode(coded[:cut], out)
    with pytest.raises(ValueError, match="packing 99"):
        decode(b"\x63" + coded[1:], out)
    with pytest.raises(ValueError, match=r"."):
        decode(coded, np.empty(2 * data.size, np.uint8))
