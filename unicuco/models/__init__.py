"""Models: finding their files, loading them, and finding sites and blocks by structure.

What this package does not know: texts, ranks, strategies. It needs torch and transformers; import
it only where a model is really needed.
"""

from unicuco.models.folder import check_model_folder, model_digest, resolve_model, weight_files
from unicuco.models.load import (
    LoadedModel,
    build_skeleton,
    load_model,
    load_tokenizer,
    quiet_transformers,
)
from unicuco.models.structure import block_module, profile_model, read_site, site_module

__all__ = [
    "LoadedModel",
    "block_module",
    "build_skeleton",
    "check_model_folder",
    "load_model",
    "load_tokenizer",
    "model_digest",
    "profile_model",
    "quiet_transformers",
    "read_site",
    "resolve_model",
    "site_module",
    "weight_files",
]
