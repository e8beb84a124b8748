"""Tensors of any stored type as planes of bytes, each coded by itself.

The bits of a float are rotated by one, sign last, so that a bfloat16 or float32 gives its exponent
as one whole byte: that plane holds nearly all there is to gain, the mantissa's next to nothing.
Integers are split into bytes as they are. Every pattern of bits comes back, NaN and -0 included.

A coded tensor is its planes, most significant first: for all but the last the length (u32,
little-endian) and the coded array, for the last the coded array. What it does not know: shapes.
"""

from __future__ import annotations

import struct
from typing import Final

import numpy as np
from numpy.typing import NDArray

from unicuco.packing.coder import Bytes, decode, encode, entropy_bits

# By safetensors' words. What is not here has one byte per item or is packed: one plane.
_FLOAT_BYTES: Final = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_INTEGER_BYTES: Final = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2}
_LENGTH: Final = struct.Struct("<I")


def item_bytes(dtype: str) -> int:
    """Return how many bytes the items of a type have, 1 where they are split no further."""
    return _FLOAT_BYTES.get(dtype) or _INTEGER_BYTES.get(dtype, 1)


def encode_tensor(data: Bytes, dtype: str) -> bytes:
    """Code a tensor's bytes.

    Args:
        data: ``n`` bytes as stored, little-endian.
        dtype: safetensors' word, e.g. BF16.
    """
    coded = [encode(plane) for plane in split_planes(data, dtype)]
    return b"".join([*(_LENGTH.pack(len(part)) + part for part in coded[:-1]), coded[-1]])


def decode_tensor(coded: bytes | memoryview, dtype: str, out: Bytes) -> None:
    """Decode a tensor's bytes into ``out``.

    Raises:
        ValueError: ``coded`` is no coded tensor of so many bytes.
    """
    width = item_bytes(dtype)
    if width == 1:
        decode(coded, out)
        return
    rest = memoryview(coded)
    items = out.view(f"<u{width}")
    items[:] = 0
    plane = np.empty(len(items), np.uint8)
    for place in reversed(range(width)):
        length = len(rest)
        if place:
            (length,) = _LENGTH.unpack(rest[: _LENGTH.size])
            rest = rest[_LENGTH.size :]
        decode(rest[:length], plane)
        rest = rest[length:]
        # Shifted through the items' own type: bytes alone would overflow.
        items |= plane.astype(items.dtype) << items.dtype.type(8 * place)
    if dtype in _FLOAT_BYTES:
        _rotate(items, left=False)


def split_planes(data: Bytes, dtype: str) -> list[Bytes]:
    """Return a tensor's planes, most significant first; each has one byte per item."""
    width = item_bytes(dtype)
    if width == 1:
        return [data]
    items = data.view(f"<u{width}").copy()
    if dtype in _FLOAT_BYTES:
        _rotate(items, left=True)
    planes = items.view(np.uint8).reshape(-1, width)
    return [np.ascontiguousarray(planes[:, place]) for place in reversed(range(width))]


def tensor_entropy_bits(data: Bytes, dtype: str) -> float:
    """Return the bits that a tensor takes at the order-0 entropy of its planes."""
    return sum(entropy_bits(plane) * plane.size for plane in split_planes(data, dtype))


def _rotate(items: NDArray[np.unsignedinteger], *, left: bool) -> None:
    """Rotate every item by one bit in place."""
    one = items.dtype.type(1)
    last = items.dtype.type(8 * items.itemsize - 1)
    if left:
        carried = items >> last
        items <<= one
    else:
        carried = items << last
        items >>= one
    items |= carried
