"""Packed models: 8-bit weights of low entropy, lossless coding, containers, reading them back.

What this package does not know: the four texts, and how good a packed model is.
"""

from unicuco.packing.coder import entropy_bits
from unicuco.packing.int8 import Int8Matrix, drop_by_peaks, quantise, quantise_per_channel
from unicuco.packing.layout import Entry, Header, Role, Scheme
from unicuco.packing.model import QuantisedModel, StoredMatrix, int8_bytes
from unicuco.packing.planes import decode_tensor, encode_tensor, tensor_entropy_bits
from unicuco.packing.read import ContainerReader, PackedEntry, check_base, read_header
from unicuco.packing.sensitivity import Measured, measure
from unicuco.packing.source import folder_drafts
from unicuco.packing.speed import Link
from unicuco.packing.unpack import read_packed_variant, read_small_files, unpack_container
from unicuco.packing.write import available_threads, write_container

__all__ = [
    "ContainerReader",
    "Entry",
    "Header",
    "Int8Matrix",
    "Link",
    "Measured",
    "PackedEntry",
    "QuantisedModel",
    "Role",
    "Scheme",
    "StoredMatrix",
    "available_threads",
    "check_base",
    "decode_tensor",
    "drop_by_peaks",
    "encode_tensor",
    "entropy_bits",
    "folder_drafts",
    "int8_bytes",
    "measure",
    "quantise",
    "quantise_per_channel",
    "read_header",
    "read_packed_variant",
    "read_small_files",
    "tensor_entropy_bits",
    "unpack_container",
    "write_container",
]
