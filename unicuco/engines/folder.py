"""Reads of a model folder what an engine must know before it loads it: context, shapes, tokenizer.

Reads no weight into memory. What it does not know: whether an engine
implements the architecture.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from unicuco.errors import EngineError, RequestError
from unicuco.export.document import DOCUMENT_NAME, read_variant
from unicuco.headers import read_header

# Names that the families use for the longest sequence, in the order of transformers' own attribute
# maps.
_CONTEXT_KEYS: Final = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "n_ctx",
)
# Differences in these change nothing that an engine computes.
_IDLE_CONFIG_KEYS: Final = frozenset(
    {"_name_or_path", "transformers_version", "torch_dtype", "dtype"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderFacts:
    """What two folders must share to be switched in place, and the context.

    ``context`` in tokens, none where config.json states none; ``tensors`` are (name, dtype, shape),
    sorted by name. ``formats`` are those of its weights of fewer bits, and ``kv_cache_dtype`` the
    engine's flag for keys and values that the variant asks for.
    """

    path: Path
    context: int | None
    config: str
    tokenizer: str
    tensors: tuple[tuple[str, str, tuple[int, ...]], ...]
    formats: tuple[str, ...] = ()
    kv_cache_dtype: str = "auto"

    def engine_flags(self, dtype: str | None) -> dict[str, str | None]:
        """Return what an engine is told of number types, given what its user chose."""
        # vLLM's 4-bit product on a CPU knows bfloat16, and no float32.
        needed = "bfloat16" if "pack-quantized" in self.formats else None
        return {
            "dtype": dtype or needed,
            "kv_cache_dtype": self.kv_cache_dtype,
            "odd_matrix": self.odd_matrix,
        }

    @property
    def odd_matrix(self) -> str | None:
        """The first 4-bit matrix whose rows and columns are not all multiples of 32, or none."""
        for name, _, shape in self.tensors:
            if name.endswith(".weight_packed") and (shape[0] % 32 or shape[1] * 8 % 32):
                return name.removesuffix(".weight_packed")
        return None

    def replaced_by(self, other: FolderFacts) -> FolderFacts:
        """Return ``other`` if an engine that serves this folder can switch to it in place.

        Raises:
            EngineError: it can't; the line says why.
        """
        difference = self.difference(other)
        if difference is not None:
            raise EngineError(
                f"{other.path} can't take the place of {self.path}: {difference}; load it instead"
            )
        return other

    def difference(self, other: FolderFacts) -> str | None:
        """Return in words why ``other`` can't be switched to in place, or none."""
        if self.formats or other.formats:
            return "weights of fewer bits are arranged anew when an engine loads them"
        if self.kv_cache_dtype != other.kv_cache_dtype:
            return "keys and values are cached as another type"
        if self.tensors != other.tensors:
            mine, theirs = set(self.tensors), set(other.tensors)
            name = min(tensor[0] for tensor in mine ^ theirs)
            return f"tensor {name} differs in shape, type or presence"
        if self.config != other.config:
            return "config.json differs"
        if self.tokenizer != other.tokenizer:
            return "the tokenizer differs"
        return None


def check_bits(odd_matrix: str | None, *, on_cpu: bool) -> None:
    """Refuse 4-bit weights that vLLM has no product for.

    Args:
        odd_matrix: as `FolderFacts` finds it.
        on_cpu: whether the engine runs on a CPU.

    Raises:
        RequestError: there is one; says which bits can be run.
    """
    if odd_matrix is not None and on_cpu:
        raise RequestError(
            f"4 bits of {odd_matrix} can't be run on a CPU, where rows and columns must be "
            "multiples of 32; 8 and 16 bits can: ask for more bytes, or use transformers"
        )


def read_facts(folder: Path) -> FolderFacts:
    """Read and check a model folder; a variant's files are also compared with their sha256.

    Raises:
        EngineError: one line that says why the folder holds no model that can be served.
        VariantError: it is a variant with a missing or altered file.
    """
    config = _read_config(folder)
    flag = "auto"
    if (folder / DOCUMENT_NAME).is_file():
        flag = read_variant(folder).kv_cache_dtype
    files = _weight_files(folder)
    if not files:
        raise EngineError(
            f"{folder} holds no *.safetensors weights; give a model or variant folder"
        )
    tensors = sorted(tensor for file in files for tensor in _tensors(file))
    if not tensors:
        raise EngineError(
            f"{folder} holds *.safetensors files without a single tensor; give a model folder"
        )
    kept = {key: value for key, value in config.items() if key not in _IDLE_CONFIG_KEYS}
    return FolderFacts(
        path=folder,
        context=_context(config),
        config=json.dumps(kept, sort_keys=True),
        tokenizer=_tokenizer_digest(folder),
        tensors=tuple(tensors),
        formats=_formats(config),
        kv_cache_dtype=flag,
    )


def read_context(folder: Path) -> int | None:
    """Return the longest context that config.json states, in tokens, or none.

    Raises:
        EngineError: the folder holds no config.json that can be read.
    """
    return _context(_read_config(folder))


def _read_config(folder: Path) -> dict[str, object]:
    if not folder.is_dir():
        raise EngineError(f"{folder} is no folder; give a model or variant folder")
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EngineError(
            f"{folder} holds no config.json; give a model or variant folder"
        ) from None
    except (OSError, ValueError) as error:
        raise EngineError(f"{file} can't be read: {error}") from None
    if not isinstance(config, dict):
        raise EngineError(f"{file} must hold a JSON object")
    return config


def _context(config: Mapping[str, object]) -> int | None:
    nested = config.get("text_config")  # the language tower of a LLaVA-style model
    for source in (config, nested if isinstance(nested, dict) else {}):
        for key in _CONTEXT_KEYS:
            value = source.get(key)
            if isinstance(value, int) and value > 0:
                return value
    return None


def _formats(config: Mapping[str, object]) -> tuple[str, ...]:
    """Return the forms of compressed-tensors' groups; none where weights are floats."""
    codes = config.get("quantization_config")
    groups = codes.get("config_groups") if isinstance(codes, dict) else None
    if not isinstance(groups, dict):
        return ()
    return tuple(sorted({str(g.get("format")) for g in groups.values() if isinstance(g, dict)}))


def _weight_files(folder: Path) -> list[Path]:
    """The files that make up the checkpoint; others beside them are not loaded by an engine."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return sorted({folder / str(name) for name in places.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EngineError(f"{index} can't be read: {error!r}") from None


def _tensors(file: Path) -> list[tuple[str, str, tuple[int, ...]]]:
    try:
        return [(entry.name, entry.dtype, entry.shape) for entry in read_header(file).entries]
    except (OSError, ValueError) as error:
        raise EngineError(f"{file} can't be read as safetensors: {error}") from None


def _tokenizer_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model"):
        file = folder / name
        if file.is_file():
            digest.update(name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
