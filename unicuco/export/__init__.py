"""Variants on disk: cut from a base model's files, written whole, checked when read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from unicuco.export.document import CheckpointRef, VariantDocument, read_variant

if TYPE_CHECKING:
    from unicuco.export.variant import write_variant


def __getattr__(name: str) -> object:
    """Load torch and transformers only for those who cut; reading a variant needs neither."""
    if name == "write_variant":
        from unicuco.export.variant import write_variant

        return write_variant
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["CheckpointRef", "VariantDocument", "read_variant", "write_variant"]
