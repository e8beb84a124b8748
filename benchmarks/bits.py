"""Double compression: coded size, KL, decoding, loading over a link, and packed inference.

``python -m benchmarks.bits``: 2 to 5 minutes on one core; results go to
``benchmarks/results/bits.json``. Steps are chosen on validation text; KL is reported on test text.
Timings are medians of alternating runs, processor seconds where no link is involved.
"""

from __future__ import annotations

import argparse
import io
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

import numpy as np
import torch

from benchmarks.common import Finding, save, table
from unicuco.engines import Sampling
from unicuco.engines.packed import PackedModel
from unicuco.models import load_model, load_tokenizer, model_digest, resolve_model
from unicuco.packing import (
    ContainerReader,
    Int8Matrix,
    Link,
    PackedEntry,
    Role,
    Scheme,
    folder_drafts,
    int8_bytes,
    quantise_per_channel,
    tensor_entropy_bits,
    write_container,
)
from unicuco.packing.layout import chunk_shapes
from unicuco.pipeline import unpack
from unicuco.pipeline.quantising import Judge, Quantiser
from unicuco.pipeline.texts import test_windows, window_length

_KLS: Final = (0.004, 0.008, 0.015, 0.03)  # on validation text
_CHOSEN: Final = 0.015
_LINK_MBPS: Final = 200.0
_RUNS: Final = 7
_PROMPT: Final = "def main("


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--test-tokens", type=int, default=8192)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    folder = resolve_model(options.model)
    quantiser = Quantiser(folder, calibration=None, tokens=8192, seed=options.seed)
    context = window_length(quantiser.loaded.profile.max_context, None)
    text = test_windows(load_tokenizer(folder), None, tokens=options.test_tokens, context=context)
    judge = Judge(quantiser.loaded.model, text.ids)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        curve, matrices = _curve(quantiser, judge, folder, place)
        findings = _targets(curve)
        findings += _coding(folder, place / "packed", matrices)
        findings += _loading(folder, place, matrices)
        findings += _inference(place, int8_bytes(folder, matrices))
    print(table(list(curve[0]), [list(row.values()) for row in curve]))
    rows = [[f.method, f.test, f.figure, f.bound, f.verdict] for f in findings]
    print(table(["part", "what", "figure", "target", ""], rows))
    document: dict[str, object] = {
        "model": options.model,
        "seed": options.seed,
        "test_tokens": text.num_tokens,
        "curve": curve,
        "findings": [
            {
                "part": f.method,
                "what": f.test,
                "figure": f.figure,
                "target": f.bound,
                "met": f.passed,
            }
            for f in findings
        ],
    }
    print("saved to", save("bits", document))


def _curve(
    quantiser: Quantiser, judge: Judge, folder: Path, place: Path
) -> tuple[list[dict[str, object]], dict[str, Int8Matrix]]:
    """Pack at every KL; return size and test KL of each, and the chosen one's matrices."""
    plain = quantiser.model.apply(lambda matrix, weight: quantise_per_channel(weight))
    size = int8_bytes(folder, plain)
    curve = [
        _point("plain INT8, coded", judge.kl(), size, pack_matrices(folder, place / "plain", plain))
    ]
    chosen: dict[str, Int8Matrix] = {}
    for kl in _KLS:
        matrices, measured = quantiser.within(kl)
        file = place / ("packed" if kl == _CHOSEN else "other")
        name = f"aware, validation KL {measured:.4f}"
        curve.append(_point(name, judge.kl(), size, pack_matrices(folder, file, matrices)))
        chosen = matrices if kl == _CHOSEN else chosen
    return curve, chosen


def _point(name: str, kl: float, int8: int, packed: int) -> dict[str, object]:
    return {"what": name, "test_kl": kl, "bytes": packed, "times_smaller_than_int8": int8 / packed}


def pack_matrices(
    folder: Path, file: Path, matrices: dict[str, Int8Matrix], link_mbps: float | None = None
) -> int:
    """Write a container; return its bytes without those of the small files."""
    drafts = folder_drafts(folder, {name: partial(matrices.__getitem__, name) for name in matrices})
    digest = model_digest(folder)
    link = Link(mbps=link_mbps)
    header = write_container(file, drafts, base_digest=digest, facts={"int8": None}, link=link)
    small = sum(e.packed_bytes for e in header.entries if e.role is not Role.TENSOR)
    return file.stat().st_size - small


def _targets(curve: list[dict[str, object]]) -> list[Finding]:
    points = [(float(str(p["test_kl"])), float(str(p["times_smaller_than_int8"]))) for p in curve]
    best = max((ratio for kl, ratio in points if kl <= 0.02), default=0.0)
    return [Finding("size", "times smaller than INT8 at a test KL <= 0.02", best, ">= 2.2")]


def _coding(folder: Path, file: Path, matrices: dict[str, Int8Matrix]) -> list[Finding]:
    """Compare what is coded with its entropy, what comes back with what went in; time decoding."""
    entropy, coded, exact = 0.0, 0, True
    drafts = {d.name: d for d in folder_drafts(folder)}
    with file.open("rb") as stream:
        packed = list(ContainerReader(stream, str(file)).packed())
    with file.open("rb") as stream:
        for loaded in ContainerReader(stream, str(file)).loaded(threads=1):
            if isinstance(loaded.content, Int8Matrix):
                went = matrices[loaded.entry.name]
                parts = [(went.codes, loaded.content.codes), (went.rows, loaded.content.rows)]
                parts.append((went.columns, loaded.content.columns))
                exact &= all(np.array_equal(a, b) for a, b in parts)
                scales = np.concatenate([went.rows, went.columns]).view(np.uint8)
                entropy += tensor_entropy_bits(went.codes.reshape(-1).view(np.uint8), "I8") / 8
                entropy += tensor_entropy_bits(scales, "I8") / 8
            else:
                read = drafts[loaded.entry.name].read
                assert read is not None
                exact &= np.array_equal(read(), loaded.content)
                if loaded.entry.role is Role.TENSOR:
                    entropy += tensor_entropy_bits(loaded.content, loaded.entry.dtype) / 8
            coded += loaded.entry.packed_bytes * (loaded.entry.role is Role.TENSOR)
    return [
        Finding("coding", "bit-exact", float(exact), "== 1"),
        Finding("coding", "coded bytes over order-0 entropy", coded / entropy, "<= 1.02"),
        Finding("coding", "decoded MB per second and core", _decoding_mbps(packed), ">= 100"),
    ]


def _decoding_mbps(packed: list[PackedEntry]) -> float:
    """Return the best of some runs over all 8-bit codes: MB of them per processor second."""
    chosen = [p for p in packed if p.entry.scheme is Scheme.INT8]
    best = 0.0
    for _ in range(_RUNS):
        started = time.thread_time()
        size = 0
        for one in chosen:
            for index, shape in enumerate(chunk_shapes(one.entry.shape)):
                out = np.empty(math.prod(shape), np.uint8)
                one.decode_chunk(index, out)
                size += out.size
        best = max(best, size / 1e6 / (time.thread_time() - started))
    return best


class _Throttled(io.RawIOBase):
    """A file that gives its bytes no faster than a link of so many megabits per second."""

    def __init__(self, file: BinaryIO, mbps: float) -> None:
        self._file, self._bytes_per_s = file, mbps * 1e6 / 8
        self._started, self._given = time.perf_counter(), 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(min(size, 1 << 16))
        self._given += len(data)
        time.sleep(max(0.0, self._started + self._given / self._bytes_per_s - time.perf_counter()))
        return data


def _load_s(file: Path, mbps: float | None) -> float:
    """Return the seconds until every tensor of a container is in memory, 8-bit codes as such."""
    with file.open("rb", buffering=0 if mbps is None else -1) as raw:
        started = time.perf_counter()
        stream = raw if mbps is None else cast(BinaryIO, _Throttled(raw, mbps))
        held = [loaded.content for loaded in ContainerReader(stream, str(file)).loaded()]
        assert held
        return time.perf_counter() - started


def _loading(folder: Path, place: Path, matrices: dict[str, Int8Matrix]) -> list[Finding]:
    """Load the packed and the unpacked 8-bit model, over a link and from the disk's cache."""
    pack_matrices(folder, place / "unpacked", matrices, link_mbps=1e9)
    disk = place.joinpath("unpacked").stat().st_size * 8e-6 / _read_s(place / "unpacked")
    pack_matrices(folder, place / "slow", matrices, link_mbps=_LINK_MBPS)
    pack_matrices(folder, place / "fast", matrices, link_mbps=disk)
    runs: dict[str, list[float]] = {"slow": [], "link": [], "fast": [], "disk": []}
    for _ in range(_RUNS):
        runs["link"].append(_load_s(place / "unpacked", _LINK_MBPS))
        runs["slow"].append(_load_s(place / "slow", _LINK_MBPS))
    for turn in range(8 * _RUNS):
        # Each goes first in every other turn: what runs after a pause finds a cold processor.
        pair = [("disk", "unpacked"), ("fast", "fast")]
        for kind, name in pair if turn % 2 else pair[::-1]:
            runs[kind].append(_load_s(place / name, None))
    median = {name: statistics.median(times) for name, times in runs.items()}
    return [
        Finding("loading", "seconds of INT8 over 200 Mbit/s", median["link"], ""),
        Finding("loading", "packed, share of that", median["slow"] / median["link"], "<= 0.6"),
        Finding("loading", "Mbit/s of the disk, measured", disk, ""),
        Finding("loading", "seconds of INT8 from it", median["disk"], ""),
        Finding("loading", "adaptive, share of that", median["fast"] / median["disk"], "<= 1.1"),
    ]


def _read_s(file: Path) -> float:
    times = []
    for _ in range(_RUNS):
        started = time.perf_counter()
        file.read_bytes()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _inference(place: Path, int8: int) -> list[Finding]:
    """Run the packed model, with nothing and with everything decoded, and the unpacked one."""
    unpack(place / "packed", place / "folder")
    loaded = load_model(place / "folder")
    tokens = load_tokenizer(place / "folder").encode(_PROMPT, add_special_tokens=False)
    # Any: transformers mixes generation into its models without types.
    model: Any = loaded.model

    def unpacked() -> list[int]:
        ids = torch.tensor([tokens])
        whole = model.generate(ids, max_new_tokens=32, do_sample=False, pad_token_id=0)
        return [int(token) for token in whole[0, len(tokens) :]]

    least = PackedModel(place / "packed")
    most = PackedModel(place / "packed", max_memory_mb=1e6)
    sampling = Sampling(max_tokens=32)
    equal = list(least.generate(_PROMPT, sampling).token_ids) == unpacked()
    return [
        Finding(
            "inference", "peak weight bytes over INT8's", least.memory.peak_bytes / int8, "<= 0.6"
        ),
        Finding("inference", "greedy tokens equal the unpacked model's", float(equal), "== 1"),
        Finding(
            "inference", "tokens/s, packed", _rate(lambda: least.generate(_PROMPT, sampling)), ""
        ),
        Finding(
            "inference",
            "tokens/s, 8-bit codes decoded",
            _rate(lambda: most.generate(_PROMPT, sampling)),
            "",
        ),
        Finding("inference", "tokens/s, unpacked float32", _rate(unpacked), ""),
    ]


def _rate(generate: Callable[[], object]) -> float:
    """Return tokens per processor second, the best of three."""
    best = 0.0
    for _ in range(3):
        started = time.process_time()
        generate()
        best = max(best, 32 / (time.process_time() - started))
    return best


if __name__ == "__main__":
    main()
