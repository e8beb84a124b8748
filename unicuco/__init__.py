"""UniCuCo: learn once how a language model compresses, then answer any compression request at once.

Importing it makes Transformers' automatic classes know shrunk models (`unicuco.models.shrunk`), and
loads nothing: Transformers' own tables of names get two more when they are loaded, and the modules
that those names stand for are loaded when such a model is.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Final

__all__: list[str] = []

_CONFIGS: Final = "transformers.models.auto.configuration_auto"
_MODELS: Final = "transformers.models.auto.modeling_auto"
# Table of Transformers: model type -> class.
_NAMES: Final = {
    _CONFIGS: (
        "CONFIG_MAPPING_NAMES",
        {"shrunk_llama": "ShrunkLlamaConfig", "shrunk_qwen2": "ShrunkQwen2Config"},
    ),
    _MODELS: (
        "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
        {"shrunk_llama": "ShrunkLlamaForCausalLM", "shrunk_qwen2": "ShrunkQwen2ForCausalLM"},
    ),
}
# Where Transformers looks for the classes of a model type.
_PACKAGES: Final = ("transformers.models.shrunk_llama", "transformers.models.shrunk_qwen2")


class _Package(Loader):
    """A module whose classes are those of `unicuco.models`, loaded when they are asked for."""

    def exec_module(self, module: ModuleType) -> None:
        def find(name: str) -> Any:  # Any: what a module holds
            if name.startswith("__"):
                raise AttributeError(name)
            home = "shrunk_config" if name.endswith("Config") else "shrunk"
            return getattr(importlib.import_module(f"unicuco.models.{home}"), name)

        module.__getattr__ = find  # type: ignore[method-assign]


class _Finder(MetaPathFinder):
    """Finds those packages, and follows the loading of the modules that hold the tables."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name in _PACKAGES:
            return ModuleSpec(name, _Package())
        if name not in _NAMES or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)  # the others find it
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_name(module: ModuleType) -> None:
                run(module)
                _add_names(module)

            spec.loader.exec_module = run_and_name  # type: ignore[method-assign]
        return spec


def _add_names(module: ModuleType) -> None:
    table, names = _NAMES[module.__name__]
    getattr(module, table).update(names)


def _extend_transformers() -> None:
    if any(type(f).__module__ == __name__ for f in sys.meta_path):
        return  # this module was loaded before, and is loaded again
    sys.meta_path.insert(0, _Finder())
    if _MODELS in sys.modules:  # too late for names: its tables have been read
        importlib.import_module("unicuco.models.shrunk").register_models()
    elif _CONFIGS in sys.modules:
        _add_names(sys.modules[_CONFIGS])


_extend_transformers()
