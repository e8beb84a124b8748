"""Engines that produce text from a model folder: blocking ones, and one that streams to many."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from unicuco.engines.canary import Expectation
from unicuco.engines.decoding import DecodeLoad, Decoder, compare_decoding
from unicuco.engines.protocol import Generation, Sampling, TextEngine
from unicuco.engines.streaming import Checked, Delta, StreamingEngine, StreamSampling
from unicuco.engines.streaming_vllm import StreamingVllmEngine
from unicuco.engines.vllm_engine import VllmEngine, VllmOptions, require_vllm
from unicuco.engines.vllm_timer import DecodeTimer

ENGINES: Final[Mapping[str, Callable[[], TextEngine]]] = {
    "vllm": VllmEngine,
}

__all__ = [
    "ENGINES",
    "Checked",
    "DecodeLoad",
    "DecodeTimer",
    "Decoder",
    "Delta",
    "Expectation",
    "Generation",
    "Sampling",
    "StreamSampling",
    "StreamingEngine",
    "StreamingVllmEngine",
    "TextEngine",
    "VllmEngine",
    "VllmOptions",
    "compare_decoding",
    "require_vllm",
]
