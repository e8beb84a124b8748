"""The vLLM plugin: shrunk models in stock vLLM, through the entry points ``vllm.general_plugins``.

vLLM calls `register` in each of its processes. It makes ``AutoConfig`` know the configurations and
vLLM's registry the names of the model classes, which are imported when one of them is served. What
it needs beside vLLM is vLLM's own: torch, transformers and safetensors.
"""

from __future__ import annotations

import importlib
from typing import Final

_MODELS: Final = ("ShrunkLlamaForCausalLM", "ShrunkQwen2ForCausalLM")
_CLASS: Final = "unicuco.engines.vllm_shrunk:ShrunkForCausalLM"


def register() -> None:
    """Make shrunk models known to this process' Transformers and vLLM; twice is allowed."""
    importlib.import_module("unicuco.models.shrunk_config").register_configs()
    registry = importlib.import_module("vllm").ModelRegistry
    for name in _MODELS:
        registry.register_model(name, _CLASS)
