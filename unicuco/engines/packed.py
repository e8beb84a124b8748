"""`PackedModel`: text from a container whose weights stay packed while the model runs.

Transformers runs the model; every packed matrix is decoded, chunk by chunk, into one buffer that
all of them share, at the moment it is multiplied, and forgotten. What a memory limit leaves room
for stays decoded, those matrices first that save most decoding per byte. Small tensors (norms,
biases) are decoded once. What it does not know: vLLM, batches of prompts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from unicuco.engines.protocol import Generation, Sampling, check_prompt_lengths
from unicuco.errors import ContainerError, EngineError
from unicuco.models import build_skeleton, load_tokenizer, quiet_transformers
from unicuco.models.folder import read_config
from unicuco.packing import ContainerReader, Entry, PackedEntry, Role, Scheme
from unicuco.packing.coder import Bytes
from unicuco.packing.int8 import FLOATS
from unicuco.packing.layout import chunk_shapes

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


class _Buffer:
    """Where every chunk is decoded: its stored bytes, and float32 weights made of them.

    While 8-bit weights are rounded to their file's type, there is a copy of the chunk in that type.
    """

    def __init__(self, matrices: list[_Matrix]) -> None:
        items = max((m.largest_chunk for m in matrices), default=0)
        widths = [m.item_bytes for m in matrices if not m.is_decoded]
        self.stored = np.empty(items * max(widths, default=0), np.uint8)
        self.weights = torch.empty(items)
        self._rounding_bytes = max((m.rounding_bytes for m in matrices), default=0)

    @property
    def num_bytes(self) -> int:
        """Bytes that the buffer takes."""
        return self.stored.nbytes + self.weights.nbytes + self._rounding_bytes


class _Matrix:
    """A stored matrix ``a x b``, packed or decoded to what its file type or 8 bits take."""

    def __init__(self, packed: PackedEntry) -> None:
        entry = packed.entry
        self.entry = entry
        self._packed: PackedEntry | None = packed
        self._scales = packed.scales() if entry.scheme is Scheme.INT8 else None
        self._decoded = np.empty(0, np.uint8)
        self.item_bytes = 1 if self._scales else entry.num_bytes // max(1, entry.num_items)
        self._heights = [shape[0] for shape in chunk_shapes(entry.shape)]
        if entry.scheme is Scheme.RAW:
            self.decode()

    @property
    def largest_chunk(self) -> int:
        """Items of the largest chunk."""
        return max(self._heights) * self.entry.shape[1]

    @property
    def rounding_bytes(self) -> int:
        """Bytes of the largest chunk in the file's type, where it has to be rounded to that."""
        width = FLOATS[self.entry.dtype].itemsize if self._scales is not None else 0
        return self.largest_chunk * width

    @property
    def is_decoded(self) -> bool:
        """Whether it is held decoded."""
        return self._packed is None

    @property
    def held_bytes(self) -> int:
        """Bytes of it in memory now."""
        scales = sum(self.entry.shape) if self._scales is not None else 0
        return scales + (len(self._packed.payload) if self._packed else self._decoded.nbytes)

    @property
    def decoded_bytes(self) -> int:
        """Bytes of it in memory once decoded."""
        scales = sum(self.entry.shape) if self._scales is not None else 0
        return scales + self.entry.num_items * self.item_bytes

    def decode(self) -> None:
        """Hold it decoded from now on."""
        packed = self._packed
        if packed is None:
            return
        if self.entry.scheme is Scheme.RAW:
            self._decoded = np.frombuffer(packed.payload, np.uint8)
        else:
            self._decoded = np.empty(self.entry.num_items * self.item_bytes, np.uint8)
            start = 0
            for index, height in enumerate(self._heights):
                end = start + height * self.entry.shape[1] * self.item_bytes
                packed.decode_chunk(index, self._decoded[start:end])
                start = end
        self._packed = None

    def chunks(
        self, buffer: _Buffer, wanted: Callable[[int, int], bool] = lambda start, end: True
    ) -> Iterator[tuple[int, Tensor]]:
        """Give first row and float32 weights ``rows x b`` of chunks, valid until the next.

        Args:
            buffer: where they are decoded.
            wanted: told the first row of a chunk and the one behind it; False: leave it out.
        """
        width = self.entry.shape[1]
        starts = accumulate(self._heights, initial=0)
        for index, (row, height) in enumerate(zip(starts, self._heights, strict=False)):
            if not wanted(row, row + height):
                continue
            start, size = (n * width * self.item_bytes for n in (row, height))
            if self._packed is None:
                stored = self._decoded[start : start + size]
            else:
                stored = buffer.stored[:size]
                self._packed.decode_chunk(index, stored)
            weights = buffer.weights[: height * width].view(height, width)
            if self._scales is not None:
                codes = stored.view(np.int8).reshape(height, width)
                self._scales.part(row, codes).dequantise(weights)
                # As the unpacked model has them: rounded to the type of its file.
                weights.copy_(weights.to(FLOATS[self.entry.dtype]))
            else:
                weights.copy_(_floats(stored, self.entry).view(height, width))
            yield row, weights


class _PackedLinear(nn.Module):
    """``Linear`` (or, ``transposed``, GPT-2's ``Conv1D``) over a packed matrix."""

    def __init__(
        self, matrix: _Matrix, buffer: _Buffer, bias: Tensor | None, *, transposed: bool
    ) -> None:
        super().__init__()
        self._matrix, self._buffer, self._transposed = matrix, buffer, transposed
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b, ``... x o``."""
        rows, columns = self._matrix.entry.shape
        out = x.new_zeros(*x.shape[:-1], columns if self._transposed else rows)
        for row, weights in self._matrix.chunks(self._buffer):
            part = slice(row, row + len(weights))
            if self._transposed:
                out += x[..., part] @ weights
            else:
                out[..., part] = x @ weights.T
        return out if self.bias is None else out + self.bias


class _PackedEmbedding(nn.Module):
    """``Embedding`` over a packed matrix; chunks without a wanted row are not decoded."""

    def __init__(self, matrix: _Matrix, buffer: _Buffer) -> None:
        super().__init__()
        self._matrix, self._buffer = matrix, buffer

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of token ids, ``... x h``."""
        out = torch.zeros(*ids.shape, self._matrix.entry.shape[1])
        for row, weights in self._matrix.chunks(
            self._buffer, lambda start, end: bool(((ids >= start) & (ids < end)).any())
        ):
            here = (ids >= row) & (ids < row + len(weights))
            out[here] = weights[ids[here] - row]
        return out


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
        self._matrices = {id(p): _Matrix(p) for p in self._packed_entries()}
        self._decode_within(max_memory_mb)
        self._buffer = _Buffer(list(self._matrices.values()))
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
                replacement = _PackedEmbedding(matrix, self._buffer)
            else:
                assert isinstance(module, nn.Linear | Conv1D)
                replacement = _PackedLinear(
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
                    data = np.empty(packed.entry.num_bytes, np.uint8)
                    _decode_whole(packed, data)
                    small[packed.entry.file] = data.tobytes()
    except OSError as error:
        raise ContainerError(f"{file} can't be read: {error.strerror or error}") from None
    return small, tensors


def _whole(packed: PackedEntry) -> Tensor:
    """Decode a tensor that is kept: in its file's type."""
    if packed.entry.scheme is Scheme.INT8:
        matrix = _Matrix(packed)
        parts = matrix.chunks(_Buffer([matrix]))
        return torch.cat([weights.clone() for _, weights in parts])
    data = np.empty(packed.entry.num_bytes, np.uint8)
    _decode_whole(packed, data)
    return _floats(data, packed.entry).view(packed.entry.shape)


def _decode_whole(packed: PackedEntry, out: Bytes) -> None:
    """Decode an entry that is no 8-bit matrix."""
    if packed.entry.scheme is Scheme.RAW:
        out[:] = np.frombuffer(packed.payload, np.uint8)
        return
    start = 0
    per_item = out.size // max(1, packed.entry.num_items)
    for index, shape in enumerate(chunk_shapes(packed.entry.shape)):
        end = start + int(np.prod(shape, dtype=np.int64)) * per_item
        packed.decode_chunk(index, out[start:end])
        start = end


def _places(
    model: nn.Module, tensors: dict[str, PackedEntry], file: Path
) -> dict[str, PackedEntry]:
    """Return the tensor of every parameter; tied parameters have one, under any of their names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    places: dict[str, PackedEntry] = {}
    for tied in names.values():
        found = {stored for name in tied for stored in _stored(name, tensors)}
        if not found:
            raise EngineError(
                f"{file} has no tensor for {tied[0]}; unpack it and load the folder instead"
            )
        places |= dict.fromkeys(tied, tensors[min(found)])
    return places


def _stored(name: str, tensors: dict[str, PackedEntry]) -> list[str]:
    """Return the tensor of a parameter's name, or else those whose name is its tail."""
    if name in tensors:
        return [name]
    return [stored for stored in tensors if f".{name}".endswith(f".{stored}")]


def _floats(data: Bytes, entry: Entry) -> Tensor:
    if entry.dtype not in FLOATS:
        raise EngineError(f"{entry.name} is stored as {entry.dtype}, which can't run packed")
    return torch.from_numpy(data).view(FLOATS[entry.dtype])
