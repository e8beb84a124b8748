"""Pack a model folder into a container, and unpack it again.

Lossless, or with 8-bit weights whose steps are as coarse as a limit of KL allows, which is measured
on validation text; the test text is not read here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from unicuco.errors import ContainerError, RequestError
from unicuco.export.document import DOCUMENT_NAME, read_variant
from unicuco.files import replace_with
from unicuco.models import model_digest, resolve_model
from unicuco.packing import (
    Header,
    Int8Matrix,
    Link,
    available_threads,
    check_base,
    folder_drafts,
    int8_bytes,
    read_header,
    unpack_container,
    write_container,
)
from unicuco.pipeline.options import ProgressSink
from unicuco.pipeline.quantising import Quantiser
from unicuco.search.drive import Progress

DEFAULT_TOKENS: Final = 8192  # 20 s for the reference model on one core


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Options:
    """How weights become 8-bit ones: the KL that may cost, and what else goes.

    ``max_kl`` in nats per token on validation text, > 0; ``sparsity`` of the sites, in [0, 1),
    dropped by |w| times the input's largest absolute value before rounding; ``calibration`` a UTF-8
    text (none: the reference corpus), ``tokens`` of it for calibration and validation each.

    Raises:
        RequestError: a value outside its range.
    """

    max_kl: float = 0.01
    sparsity: float = 0.0
    calibration: Path | None = None
    tokens: int = DEFAULT_TOKENS
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.max_kl) and self.max_kl > 0):
            raise RequestError(f"max_kl must be above 0 nats per token, got {self.max_kl:g}")
        if not 0 <= self.sparsity < 1:
            raise RequestError(f"sparsity must be in [0, 1), got {self.sparsity:g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PackReport:
    """What a container holds.

    Bytes are of all tensors: as the folder stores them, as plain 8-bit weights (none where nothing
    was quantised), and in the container, its header included; ``coded`` of ``tensors`` travel
    coded. ``kl`` was measured on validation text, in nats per token, or none.
    """

    stored_bytes: int
    int8_bytes: int | None
    packed_bytes: int
    file_bytes: int
    tensors: int
    coded: int
    kl: float | None

    def to_dict(self) -> dict[str, object]:
        """Return the document of ``unicuco pack --json``."""
        ratio = None if self.int8_bytes is None else self.int8_bytes / self.packed_bytes
        return {
            "stored_bytes": self.stored_bytes,
            "int8_bytes": self.int8_bytes,
            "packed_bytes": self.packed_bytes,
            "file_bytes": self.file_bytes,
            "ratio": self.stored_bytes / self.packed_bytes,
            "ratio_to_int8": ratio,
            "tensors": self.tensors,
            "coded_tensors": self.coded,
            "validation_kl": self.kl,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class PackOptions:
    """What to pack.

    ``model``: any name `resolve_model` takes; ``out`` the file to make; ``link_mbps`` megabits per
    second of the way to whoever loads it (none: as small as it gets); ``int8`` none: lossless.
    ``threads`` code here and are taken to decode there; 0: one per core.
    """

    model: str
    out: Path
    link_mbps: float | None = None
    int8: Int8Options | None = None
    threads: int = 0


def pack(options: PackOptions, progress: ProgressSink = lambda step: None) -> PackReport:
    """Pack a folder; the container stands at ``out`` as a whole or not at all.

    Raises:
        RequestError: the link has no speed, or an option is out of range.
        ContainerError: something stands at ``out``.
        ModelError: no usable model is there.
        VariantError: a variant with missing or altered files.
        InfeasibleRequestError: no step meets ``max_kl``.
        StorageError: the disk refused.
    """
    link = Link(mbps=options.link_mbps, threads=options.threads or available_threads())
    _check_free(options.out)
    folder = resolve_model(options.model)
    digest = _base_digest(folder)
    matrices: dict[str, Int8Matrix] = {}
    facts: dict[str, object] = {"link_mbps": options.link_mbps, "int8": None}
    kl = None
    if options.int8 is not None:
        matrices, kl = _quantise(folder, options.int8, progress)
        facts["int8"] = {
            "sparsity": options.int8.sparsity,
            "validation_kl": kl,
            "max_kl": options.int8.max_kl,
        }
    drafts = folder_drafts(folder, {name: partial(matrices.__getitem__, name) for name in matrices})
    header: list[Header] = []

    def write(target: Path) -> None:
        written = write_container(
            target,
            drafts,
            base_digest=digest,
            facts=facts,
            link=link,
            threads=options.threads,
            progress=lambda done, total: progress(Progress(stage="code", done=done, total=total)),
        )
        header.append(written)

    replace_with(options.out, write)
    return _report(header[0], options.out, int8_bytes(folder, matrices) if matrices else None, kl)


def unpack(
    file: Path,
    out: Path,
    *,
    base: str | None = None,
    threads: int = 0,
    progress: ProgressSink = lambda step: None,
) -> Header:
    """Unpack a container into the folder that it was made of, or one of 8-bit weights decoded.

    See `unpack_container`.

    Args:
        file: the container.
        out: folder to make; it may exist only if it is empty.
        base: refuse a container that was not made of this model; none: any.
        threads: that decode; 0: one per core.
        progress: told of the bytes done, stage "unpack".

    Raises:
        ContainerError: it is cut short, altered, no container, or of another base model.
        VariantError: something stands at ``out``.
        StorageError: the disk refused.
    """
    open_header(file, base)
    return unpack_container(
        file,
        out,
        threads=threads,
        progress=lambda done, total: progress(Progress(stage="unpack", done=done, total=total)),
    )


def open_header(file: Path, base: str | None) -> Header:
    """Read a container's header and check what it is of.

    Args:
        file: the container.
        base: the model that it must be made of; none: any.

    Raises:
        ContainerError: it is no container, damaged, or of another base model.
        ModelError: ``base`` is no model.
    """
    header = read_header(file)
    if base is not None:
        check_base(header, _base_digest(resolve_model(base)), str(file))
    return header


def _base_digest(folder: Path) -> str:
    """Return the digest of the model that a folder was cut from, or its own."""
    if (folder / DOCUMENT_NAME).is_file():
        return read_variant(folder).base_digest
    return model_digest(folder)


def _quantise(
    folder: Path, options: Int8Options, progress: ProgressSink
) -> tuple[dict[str, Int8Matrix], float]:
    quantiser = Quantiser(
        folder,
        calibration=options.calibration,
        tokens=options.tokens,
        seed=options.seed,
        progress=progress,
    )
    return quantiser.within(options.max_kl, sparsity=options.sparsity)


def _report(header: Header, out: Path, int8: int | None, kl: float | None) -> PackReport:
    tensors = header.tensors
    payload = sum(entry.packed_bytes for entry in tensors)
    file_bytes = out.stat().st_size
    return PackReport(
        stored_bytes=sum(entry.num_bytes for entry in tensors),
        int8_bytes=int8,
        packed_bytes=payload + file_bytes - header.packed_bytes,
        file_bytes=file_bytes,
        tensors=len(tensors),
        coded=sum(entry.is_coded for entry in tensors),
        kl=kl,
    )


def _check_free(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise ContainerError(f"{out} exists already; choose another place or remove it")
    if not out.parent.is_dir():
        raise ContainerError(f"{out.parent} is no folder; make it or choose another place")
