"""The rank store: per site, once, the order in which weights go; a strategy is then a comparison.

Weights are ordered by (rank within the row, row index) and the first n are dropped. So any n can
be reached, masks of smaller n lie inside those of larger n, and rows differ by at most one weight
(or as a row rule says, `unicuco.rows`).

Notation: a matrix is ``o x i``; q, r = divmod(n, o). Row j drops its t_j = q + (j < r) lowest
ranks: weight (j, k) is dropped exactly when rank[j, k] < t_j, one comparison against a per-row
threshold.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from unicuco.errors import ModelError, RunError, StorageError
from unicuco.headers import read_metadata
from unicuco.importance import ImportanceMetric, SiteStats, StatKind
from unicuco.models import read_site
from unicuco.rows import equal_counts, row_counts
from unicuco.tensors import map_tensors
from unicuco.types import ModelProfile

_FORMAT: Final = 1
# One key: the library writes several in an order that changes from file to file.
_HEADER: Final = "unicuco.ranks"
_INT16_COLUMNS: Final = torch.iinfo(torch.int16).max
# Sorting makes 64-bit indices: chunks of rows bound that to 64 MiB whatever the matrix.
_SORT_CHUNK: Final = 1 << 22
# Bytes of weights cut at a time where a buffer is needed, which then stays in the cache.
_CUT_BYTES: Final = 1 << 20
_TURNED_ROWS: Final = 128  # whose ranks are brought to another layout at a time (best of 16 .. all)
_SERIAL_WEIGHTS: Final = 1 << 15  # up to so many elements torch works in the calling thread alone
_hand_on: Final = torch.ops.aten.threshold_backward.grad_input
_BITS: Final = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class RankStore:
    """The drop order of every site under one metric.

    Attributes:
        metric: name of the importance metric.
        ranks: site path to ``o x i`` int16 (int32 where a row is longer than 32,767): the weight's
            rank within its row, 0 dropped first; equal scores by column index.
    """

    metric: str
    ranks: Mapping[str, Tensor]

    def save(self, folder: Path) -> None:
        """Write one safetensors file per block into ``folder``, replaced as a whole or not at all.

        Raises:
            StorageError: the disk refused.
        """
        staged = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        groups = [
            {path: self.ranks[path].contiguous() for path in g} for g in _by_block(self.ranks)
        ]
        digests = [_digest(tensors) for tensors in groups]
        header: dict[str, object] = {
            "format": _FORMAT,
            "metric": self.metric,
            "num_files": len(groups),
            "store": _store_digest(self.metric, digests),
        }
        try:
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir(parents=True)
            for number, (tensors, digest) in enumerate(zip(groups, digests, strict=True)):
                path = staged / f"block-{number:04d}.safetensors"
                _write(tensors, path, {**header, "sha256": digest})
            _replace(staged, folder)
        except (OSError, SafetensorError) as error:
            raise StorageError(f"the ranks can't be written to {folder}: {error}") from error
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    @classmethod
    def load(cls, folder: Path, *, verify: bool = True) -> RankStore:
        """Memory-map the files that `save` wrote.

        Args:
            folder: what `save` was given.
            verify: also read every rank and compare its file's sha256 (about a second per GB).

        Raises:
            RunError: files are missing, cut off, altered or of different stores.
        """
        files = sorted(folder.glob("block-*.safetensors"))
        if not files:
            raise RunError(f"{folder} holds no ranks; learn the run again")
        ranks: dict[str, Tensor] = {}
        stores: set[tuple[str, str]] = set()
        digests: list[str] = []
        for path in files:
            header, tensors = _read(path)
            if header.get("num_files") != len(files):
                raise RunError(
                    f"{folder} holds {len(files)} of {header.get('num_files')} rank files; "
                    "learn the run again"
                )
            stores.add((str(header.get("metric")), str(header.get("store"))))
            digests.append(_digest(tensors) if verify else str(header.get("sha256")))
            if digests[-1] != header.get("sha256"):
                raise RunError(f"{path} was altered; learn the run again")
            ranks.update(tensors)
        metric, store = stores.pop()
        if stores or store != _store_digest(metric, digests):
            raise RunError(f"{folder} mixes the ranks of several runs; learn the run again")
        return cls(metric=metric, ranks=ranks)

    def check_sites(self, profile: ModelProfile) -> None:
        """Check that the store holds exactly this model's sites.

        Raises:
            RunError: a site is missing, superfluous or of another shape.
        """
        shapes = {site.path: (site.num_rows, site.num_columns) for site in profile.sites}
        if shapes.keys() != self.ranks.keys():
            path = min(shapes.keys() ^ self.ranks.keys())
            raise RunError(f"the ranks belong to another model: {path} is in only one of the two")
        for path, shape in shapes.items():
            if tuple(self.ranks[path].shape) != shape:
                found = tuple(self.ranks[path].shape)
                raise RunError(
                    f"the ranks belong to another model: {path} is {shape} there and {found} here"
                )


def narrowed_rank(rank: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """Return the drop order of a matrix that keeps only some rows or columns; none: all."""
    if rows is not None:
        rank = rank[rows]
    # What stays goes in the order it had; ranks are different within a row, so there are no ties.
    return rank if columns is None else rank_rows(rank[:, columns].float()).to(rank.device)


def build_ranks(
    model: nn.Module, profile: ModelProfile, metric: ImportanceMetric, stats: Mapping[str, Tensor]
) -> RankStore:
    """Sort every row of every site once.

    Args:
        model: with dense weights.
        profile: of that model.
        metric: which weights go first.
        stats: site path to input norm, as `collect_input_norms` returns them; empty where the
            metric needs none.

    Raises:
        ModelError: a score is NaN or infinite.
    """
    ranks: dict[str, Tensor] = {}
    for site in profile.sites:
        norm = stats[site.path] if StatKind.INPUT_NORM in metric.needs else None
        scores = metric.score(read_site(model, site), SiteStats(input_norm=norm))
        if not bool(torch.isfinite(scores).all()):
            raise ModelError(f"{metric.name} scores of {site.path} are NaN or infinite")
        ranks[site.path] = rank_rows(scores)
    return RankStore(metric=metric.name, ranks=ranks)


def rank_rows(scores: Tensor) -> Tensor:
    """Rank ``o x i`` scores within rows; ``o x i`` int16 or int32 on the CPU, ties by column."""
    rows, columns = scores.shape
    dtype = torch.int16 if columns <= _INT16_COLUMNS else torch.int32
    ranks = torch.empty(rows, columns, dtype=dtype)
    places = torch.arange(columns, dtype=dtype).expand(rows, columns)
    step = max(1, _SORT_CHUNK // max(1, columns))
    for start in range(0, rows, step):
        order = torch.argsort(scores[start : start + step], dim=1, stable=True).cpu()
        ranks[start : start + step].scatter_(1, order, places[start : start + step])
    return ranks


def row_thresholds(rank: Tensor, num_dropped: int, rows: Tensor | None = None) -> Tensor:
    """Return t, ``o x 1`` of the ranks' dtype: row j drops ranks below t_j, ``num_dropped`` in all.

    ``rows`` are the site's offsets of a `RowRule`; none: rows drop equally, to within one weight.

    Raises:
        ValueError: ``num_dropped`` is negative or more than the matrix holds, or ``rows`` belongs
            to another matrix.
    """
    counts = row_counts(rank.shape[0], rank.shape[1], num_dropped, rows)
    return counts[:, None].to(rank.device, rank.dtype)


def keep_mask(rank: Tensor, num_dropped: int, rows: Tensor | None = None) -> Tensor:
    """Return the ``o x i`` mask after dropping the first ``num_dropped`` weights; True = keep."""
    return rank >= row_thresholds(rank, num_dropped, rows)


def cut(
    weight: Tensor,
    rank: Tensor,
    num_dropped: int,
    *,
    rows: Tensor | None = None,
    out: Tensor | None = None,
    parallel: bool = True,
) -> Tensor:
    """Zero the first ``num_dropped`` weights in drop order; all others stay as they are to the bit.

    Rows of one threshold are cut in one pass over memory, ten times as fast as `torch.where` on one
    core; so the first rows and the others, which drop a weight less, are cut apart. Where weights
    are stored by columns, ranks are brought into their order first, a pass more.

    Args:
        weight: ``o x i``, any float dtype, stored by rows or by columns.
        rank: ``o x i`` from the rank store, on the same device.
        num_dropped: in [0, o * i].
        rows: the site's offsets of a `RowRule`; none: rows drop equally.
        out: where to write, of ``weight``'s shape and any float dtype: ``weight`` itself, or memory
            apart from it. Default: a new tensor of ``weight``'s dtype.
        parallel: whether torch's other threads may help. They spin when they have nothing to do,
            which costs more than they bring where somebody else needs the cores.

    Returns:
        ``out``, or the new tensor.

    Raises:
        ValueError: shapes differ or ``num_dropped`` is out of range.
    """
    if weight.shape != rank.shape:
        raise ValueError(f"weight is {tuple(weight.shape)} and its ranks {tuple(rank.shape)}")
    result = torch.empty_like(weight, requires_grad=False) if out is None else out
    if result.shape != weight.shape:
        raise ValueError(f"weight is {tuple(weight.shape)} and out {tuple(result.shape)}")
    height, width = weight.shape
    bits = _BITS[weight.element_size()]
    source, target = weight.detach().view(bits), result.detach()
    is_direct = target.dtype is weight.dtype
    target = target.view(bits) if is_direct else target
    thresholds = None if rows is None else row_thresholds(rank, num_dropped, rows)
    level, more = equal_counts(height, width, num_dropped) if rows is None else (0, 0)
    needs_room = bits is not rank.dtype or not is_direct
    step = max(1, height)
    if not parallel:
        step = max(1, _SERIAL_WEIGHTS // max(1, width))
    elif not weight.is_cuda and (needs_room or thresholds is not None):
        step = max(1, _CUT_BYTES // max(1, weight.element_size() * width))
    by_columns = weight.stride(0) < weight.stride(1)
    if by_columns and not weight.is_cuda:
        step = min(step, _TURNED_ROWS)
    # One for all chunks: fresh memory costs a page fault for every 4 KiB of it.
    room_for = (min(step, height) if needs_room else 0, width)
    buffer = rank.new_empty(room_for[::-1] if by_columns else room_for, dtype=bits)
    buffer = buffer.T if by_columns else buffer
    for first, last, threshold in ((0, more, level + 1), (more, height, level)):
        for start in range(first, last, step):
            stop = min(start + step, last)
            order, room, limit = rank[start:stop], buffer[: stop - start], threshold - 1
            if thresholds is not None:
                order = order - thresholds[start:stop]
            if by_columns:  # nothing is vectorised where the layouts differ
                order = order.T.contiguous().T
            if bits is not rank.dtype:
                if rank.element_size() > weight.element_size():  # they may not fit
                    order, limit = order > limit, 0
                order = room.copy_(order)
            place = target[start:stop]
            # The derivative of torch's threshold hands its first argument on where the second lies
            # above a number, and is 0 elsewhere. Nothing else in torch selects vectorised.
            _hand_on(source[start:stop], order, limit, grad_input=place if is_direct else room)
            if not is_direct:
                place.copy_(room.view(weight.dtype))
    return result


def _by_block(paths: Iterable[str]) -> list[list[str]]:
    # A site's path is the block list's path, the block's number, and the way inside.
    groups: dict[str, list[str]] = {}
    for path in paths:
        found = re.match(r".*?\.\d+(?=\.|$)", path)
        groups.setdefault(found.group() if found else path, []).append(path)
    return list(groups.values())


def _write(tensors: dict[str, Tensor], path: Path, header: Mapping[str, object]) -> None:
    save_file(tensors, path, metadata={_HEADER: json.dumps(header, sort_keys=True)})
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _replace(staged: Path, folder: Path) -> None:
    # A folder can't be renamed onto a full one: the old one steps aside first and goes last.
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        folder.rename(aside)
    try:
        staged.rename(folder)
    except OSError:
        if aside.exists():
            aside.rename(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)
    descriptor = os.open(folder.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: Path) -> tuple[dict[str, object], dict[str, Tensor]]:
    try:
        file, tensors = map_tensors(path)
        header = json.loads(read_metadata(file).get(_HEADER, "{}"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is cut off or damaged ({error}); learn the run again") from error
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        found = header.get("format") if isinstance(header, dict) else None
        raise RunError(f"{path} has rank format {found!r}; this version reads {_FORMAT}")
    return header, tensors


def _store_digest(metric: str, file_digests: list[str]) -> str:
    return hashlib.sha256("\n".join([metric, *file_digests]).encode()).hexdigest()


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}\n{tensor.dtype}\n{tuple(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()
