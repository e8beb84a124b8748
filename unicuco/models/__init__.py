"""Models: finding their files, loading them, and finding sites and blocks by structure.

What this package does not know: texts, ranks, strategies. Whatever needs transformers (300 MB in
memory) is loaded when it is first asked for: a learner that only counts weights never asks.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final

from unicuco.models.access import block_module, gate, read_site, silence, site_module
from unicuco.models.folder import check_model_folder, model_digest, resolve_model, weight_files
from unicuco.models.lean import import_lean

if TYPE_CHECKING:
    from unicuco.models.load import (
        LoadedModel,
        build_skeleton,
        load_model,
        load_tokenizer,
        quiet_transformers,
    )
    from unicuco.models.structure import profile_model

_HEAVY: Final = {
    "LoadedModel": "load",
    "build_skeleton": "load",
    "load_model": "load",
    "load_tokenizer": "load",
    "profile_model": "structure",
    "quiet_transformers": "load",
}


def __getattr__(name: str) -> object:
    """Import what needs transformers when it is asked for."""
    if name in _HEAVY:
        import_lean()
        return getattr(import_module(f"unicuco.models.{_HEAVY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "LoadedModel",
    "block_module",
    "build_skeleton",
    "check_model_folder",
    "gate",
    "load_model",
    "load_tokenizer",
    "model_digest",
    "profile_model",
    "quiet_transformers",
    "read_site",
    "resolve_model",
    "silence",
    "site_module",
    "weight_files",
]
