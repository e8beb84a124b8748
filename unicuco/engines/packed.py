"""`PackedModel`: text from a container whose weights stay packed while the model runs.

Transformers runs the model; every packed matrix is decoded, chunk by chunk, into one buffer that
all of them share, at the moment it is multiplied, and forgotten. What a memory limit leaves room
for stays decoded, those matrices first that save most decoding per byte. Small tensors (norms,
biases) are decoded once. What it does not know: vLLM, batches of prompts.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from unicuco.engines.packed_matrices import (
    Buffer,
    PackedEmbedding,
    PackedLinear,
    PackedMatrix,
    as_floats,
)
from unicuco.engines.protocol import Generation, Sampling, check_prompt_lengths
from unicuco.errors import ContainerError, EngineError
from unicuco.export.names import named_like
from unicuco.models import build_skeleton, load_tokenizer, quiet_transformers
from unicuco.models.folder import read_config
from unicuco.packing import ContainerReader, PackedEntry, Role, Scheme

_MIB: Final = 2**20
_LEAST_ITEMS: Final = 1024  # below, a tensor is decoded once and kept: it is no weight matrix


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedMemory:
    """Bytes of weights in memory: matrices as they are held, the shared buffer, small tensors.

    ``decoded`` of ``matrices`` are held decoded.
    """

    held_bytes: int
    buffer_bytes: int
    small_bytes: int
    decoded: int
    matrices: int

    @property
    def peak_bytes(self) -> int:
        """All together: nothing else of the weights is ever in memory."""
        return self.held_bytes + self.buffer_bytes + self.small_bytes


class PackedModel:
    """A causal language model that runs from a container.

    Args:
        file: the container; it is read and checked as a whole before anything is built.
        max_memory_mb: MiB that weights may take; none: as little as possible.

    Raises:
        ContainerError: the container is damaged.
        EngineError: the model can't run packed, or not within the limit.
        ModelError: the configuration in it is of no causal language model.
    """

    def __init__(self, file: Path, *, max_memory_mb: float | None = None) -> None:
        small_files, tensors = _read(file)
        with tempfile.TemporaryDirectory() as folder:
            for name, data in small_files.items():
                (Path(folder) / name).write_bytes(data)
            self._tokenizer: PreTrainedTokenizerBase = load_tokenizer(Path(folder))
            self._model = build_skeleton(read_config(Path(folder)))
        self._places = _places(self._model, tensors, file)
        self._matrices = {id(p): PackedMatrix(p) for p in self._packed_entries()}
        self._decode_within(max_memory_mb)
        self._buffer = Buffer(list(self._matrices.values()))
        self._small_bytes = 0
        self._put_in_place()

    @property
    def memory(self) -> PackedMemory:
        """What the weights take in memory."""
        matrices = list(self._matrices.values())
        return PackedMemory(
            held_bytes=sum(m.held_bytes for m in matrices),
            buffer_bytes=self._buffer.num_bytes,
            small_bytes=self._small_bytes,
            decoded=sum(m.is_decoded for m in matrices),
            matrices=len(matrices),
        )

    @property
    def model(self) -> nn.Module:
        """The model, for whoever judges it; call it as transformers' own."""
        return self._model

    @torch.no_grad()
    def generate(self, prompt: str, sampling: Sampling) -> Generation:
        """Continue a prompt.

        Raises:
            RequestError: the prompt is empty or longer than the context.
        """
        ids = self._tokenizer.encode(prompt, add_special_tokens=False, verbose=False)
        context = getattr(self._model.config.get_text_config(), "max_position_embeddings", 2048)
        check_prompt_lengths([len(ids)], context=context)
        drawn: dict[str, Any] = {"do_sample": False}  # Any: keywords of several types
        if sampling.temperature > 0:
            drawn = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0}
        count = min(sampling.max_tokens, context - len(ids))
        with torch.random.fork_rng(devices=[]), quiet_transformers():
            torch.manual_seed(sampling.seed)
            # Any: transformers mixes generation into its models without types.
            model: Any = self._model
            tokens = torch.tensor([ids])
            whole = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=count,
                pad_token_id=self._tokenizer.eos_token_id or 0,
                **drawn,
            )
        new = tuple(int(token) for token in whole[0, len(ids) :])
        ended = bool(new) and new[-1] == self._tokenizer.eos_token_id
        new = new[:-1] if ended else new
        text = str(self._tokenizer.decode(list(new), skip_special_tokens=True))
        return Generation(text=text, token_ids=new, finish_reason="stop" if ended else "length")

    def _decode_within(self, max_memory_mb: float | None) -> None:
        """Hold decoded what the limit leaves room for, the least compressible first."""
        if max_memory_mb is None:
            return
        matrices = list(self._matrices.values())
        small = sum(p.entry.num_items * 4 for p in self._small().values())
        buffer = max(
            (m.largest_chunk * (m.item_bytes + 4) + m.rounding_bytes for m in matrices), default=0
        )
        room = int(max_memory_mb * _MIB) - small - buffer - sum(m.held_bytes for m in matrices)
        if room < 0:
            needed = max_memory_mb - room / _MIB
            raise EngineError(
                f"the weights take {needed:.3g} MiB packed, more than {max_memory_mb:.3g}; "
                f"allow {needed:.3g} MiB or pack the model smaller"
            )
        for matrix in sorted(matrices, key=lambda m: m.decoded_bytes / m.held_bytes):
            extra = matrix.decoded_bytes - matrix.held_bytes
            if extra <= room:
                room -= extra
                matrix.decode()

    def _packed_entries(self) -> list[PackedEntry]:
        """Return the matrices that can stay packed: all of whose modules are of a known type."""
        modules = dict(self._model.named_modules(remove_duplicate=False))
        users: dict[int, list[tuple[str, PackedEntry]]] = {}
        for name, packed in self._places.items():
            users.setdefault(id(packed), []).append((name, packed))
        found = []
        for places in users.values():
            paths = [name.rpartition(".") for name, _ in places]
            # Exactly these types: a subclass may compute something else (OPT's positions).
            known = all(
                last == "weight" and type(modules[path]) in (nn.Embedding, nn.Linear, Conv1D)
                for path, _, last in paths
            )
            entry = places[0][1].entry
            if known and len(entry.shape) == 2 and entry.num_items >= _LEAST_ITEMS:
                found.append(places[0][1])
        return found

    def _small(self) -> dict[int, PackedEntry]:
        found = {id(packed): packed for packed in self._places.values()}
        return {key: packed for key, packed in found.items() if key not in self._matrices}

    @torch.no_grad()
    def _put_in_place(self) -> None:
        """Replace modules over packed matrices, and set every other parameter."""
        for path, module in list(self._model.named_modules(remove_duplicate=False)):
            matrix = self._matrices.get(id(self._places.get(f"{path}.weight")))
            if matrix is None:
                continue
            replacement: nn.Module
            if isinstance(module, nn.Embedding):
                replacement = PackedEmbedding(matrix, self._buffer)
            else:
                assert isinstance(module, nn.Linear | Conv1D)
                replacement = PackedLinear(
                    matrix, self._buffer, module.bias, transposed=isinstance(module, Conv1D)
                )
            parent, _, name = path.rpartition(".")
            setattr(self._model.get_submodule(parent), name, replacement)
        for name, parameter in self._model.named_parameters():
            packed = self._places[name]
            parameter.copy_(_whole(packed))
            self._small_bytes += parameter.nbytes


def _read(file: Path) -> tuple[dict[str, bytes], dict[str, PackedEntry]]:
    """Read and check a whole container: small files decoded, tensors packed, by name."""
    small: dict[str, bytes] = {}
    tensors: dict[str, PackedEntry] = {}
    try:
        with file.open("rb") as stream:
            for packed in ContainerReader(stream, str(file)).packed():
                if packed.entry.role is Role.TENSOR:
                    tensors[packed.entry.name] = packed
                elif packed.entry.role is Role.FILE:
                    small[packed.entry.file] = packed.decoded().tobytes()
    except OSError as error:
        raise ContainerError(f"{file} can't be read: {error.strerror or error}") from None
    return small, tensors


def _whole(packed: PackedEntry) -> Tensor:
    """Decode a tensor that is kept: in its file's type."""
    if packed.entry.scheme is Scheme.INT8:
        matrix = PackedMatrix(packed)
        parts = matrix.chunks(Buffer([matrix]))
        return torch.cat([weights.clone() for _, weights in parts])
    return as_floats(packed.decoded(), packed.entry).view(packed.entry.shape)


def _places(
    model: nn.Module, tensors: dict[str, PackedEntry], file: Path
) -> dict[str, PackedEntry]:
    """Return the tensor of every parameter; tied parameters have one, under any of their names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    places: dict[str, PackedEntry] = {}
    for tied in names.values():
        found = {stored for name in tied for stored in named_like(name, tensors)}
        if not found:
            raise EngineError(
                f"{file} has no tensor for {tied[0]}; unpack it and load the folder instead"
            )
        places |= dict.fromkeys(tied, tensors[min(found)])
    return places
