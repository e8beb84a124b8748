"""The process that holds vLLM's asynchronous engine; `StreamingVllmEngine` starts and asks it.

A switch is: wait for what runs, pause, reload, reset the prefix cache, resume, ask the canary and
the memory;
requests that come meanwhile wait at a gate. A switch that fails in the middle leaves weights that
are half old and half new, so the process ends; the owner compares what was answered. What it does
not know: which folders may be switched in place; the owner compares shapes and checksums before it
asks.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import itertools
import os
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from unicuco.engines.folder import check_bits
from unicuco.engines.serve_lines import serve_streams
from unicuco.engines.streaming import CANARY_TOKENS
from unicuco.engines.vllm_plugin import register

_FIT_MEMORY: Final = -1  # vLLM's word for: the model's context, or less if the cache holds less
_UNFIT: Final = 70  # exit status
_EXTENSION: Final = "unicuco.engines.vllm_sketch.SketchingWorker"


class StreamingWorker:
    """One asynchronous vLLM engine inside this process.

    vLLM's objects are ``Any``: its types would pull the whole library into every type check.
    """

    def __init__(self) -> None:
        self._vllm: Any = None
        self._llm: Any = None
        self._gate = asyncio.Lock()
        self._numbers = itertools.count()
        self._running = 0
        self._idle = asyncio.Condition()
        self._torn = False  # in the middle of a switch, or after one that failed

    async def handle(self, question: Mapping[str, Any]) -> AsyncGenerator[dict[str, object], None]:
        """Do what ``question["op"]`` says; a failure is an answer with "error"."""
        try:
            if question["op"] == "generate":
                async with contextlib.aclosing(self.generate(question)) as answers:
                    async for answer in answers:
                        yield answer
            else:
                yield await getattr(self, f"do_{question['op']}")(question)
        except Exception as error:  # every failure of the library becomes one line for the owner
            yield {"error": " ".join(f"{type(error).__name__}: {error}".split())[:400]}
            self._end_if_unfit()

    async def do_load(self, question: Mapping[str, Any]) -> dict[str, object]:
        """Start the engine on ``folder``."""
        self._vllm = importlib.import_module("vllm")
        register()  # also where nothing is installed for vLLM to find it by
        platform = importlib.import_module("vllm.platforms").current_platform
        check_bits(question["odd_matrix"], on_cpu=bool(platform.is_cpu()))
        arguments = importlib.import_module("vllm.engine.arg_utils").AsyncEngineArgs(
            model=question["folder"],
            max_model_len=question["context"] or _FIT_MEMORY,
            # bfloat16 kernels on a CPU are slower and their greedy tokens differ from Hugging
            # Face's float32.
            dtype=question["dtype"] or ("float32" if platform.is_cpu() else "auto"),
            kv_cache_dtype=question["kv_cache_dtype"],
            enforce_eager=bool(question["eager"]),
            tensor_parallel_size=int(question["num_gpus"]),
            gpu_memory_utilization=float(question["memory_fraction"]),
            worker_extension_cls=_EXTENSION,
            disable_log_stats=True,
            seed=0,
        )
        module = importlib.import_module("vllm.v1.engine.async_llm")
        self._llm = module.AsyncLLM.from_engine_args(arguments)
        return {"context": int(self._llm.model_config.max_model_len)}

    async def do_expect(self, question: Mapping[str, Any]) -> dict[str, object]:
        """Say what transformers makes of ``folder``, beside the running engine."""
        from unicuco.engines import canary

        folder = Path(question["folder"])
        expected = await asyncio.to_thread(canary.expectation_of, folder, question["prompt"])
        return asdict(expected)

    async def do_switch(self, question: Mapping[str, Any]) -> dict[str, object]:
        """Read the weights of ``folder`` into the running engine, and say what it answers then."""
        async with self._gate:
            await self._drained()
            started = time.perf_counter()
            self._torn = True
            await self._llm.pause_generation(mode="wait", clear_cache=True)
            await self._reload(question["folder"])
            # Cached keys and values are the old weights'; vLLM does not drop them by itself.
            if not await self._llm.reset_prefix_cache():
                raise RuntimeError("the prefix cache can't be reset while requests run")
            await self._llm.resume_generation()
            answer = await self.do_show(question)
            self._torn = False
        return {**answer, "seconds": time.perf_counter() - started}

    async def do_show(self, question: Mapping[str, Any]) -> dict[str, object]:
        """Say what the engine answers to the canary prompt, and what it holds in memory."""
        tokens = await self._canary(question["prompt"])
        sketches = await self._llm.collective_rpc("sketch_weights")
        return {"tokens": tokens, "weights": sketches[0]}

    async def do_reload(self, question: Mapping[str, Any]) -> dict[str, object]:
        """Reload weights and nothing else: what a switch is measured against."""
        started = time.perf_counter()
        await self._reload(question["folder"])
        return {"seconds": time.perf_counter() - started}

    async def do_ping(self, question: Mapping[str, Any]) -> dict[str, object]:
        """Answer that the engine's own processes are well."""
        await self._llm.check_health()
        return {}

    async def generate(
        self, question: Mapping[str, Any]
    ) -> AsyncGenerator[dict[str, object], None]:
        """Yield the pieces of one answer; closing the generator aborts it."""
        async with self._gate:
            self._running += 1
        try:
            parameters = self._vllm.SamplingParams(
                **question["sampling"],
                output_kind=importlib.import_module("vllm.sampling_params").RequestOutputKind.DELTA,
            )
            outputs = self._llm.generate(
                {"prompt_token_ids": question["prompt"]}, parameters, f"r{next(self._numbers)}"
            )
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    piece = output.outputs[0]
                    yield {
                        "text": piece.text,
                        "token_ids": list(piece.token_ids),
                        "finish_reason": piece.finish_reason,
                    }
        finally:
            self._running -= 1
            async with self._idle:
                self._idle.notify_all()

    async def _drained(self) -> None:
        """Return when nothing runs; called with the gate held, so nothing can begin either."""
        async with self._idle:
            await self._idle.wait_for(lambda: self._running == 0)

    async def _reload(self, folder: str) -> None:
        await self._llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})

    async def _canary(self, prompt: Sequence[int]) -> list[int]:
        parameters = self._vllm.SamplingParams(temperature=0.0, max_tokens=CANARY_TOKENS)
        tokens: list[int] = []
        outputs = self._llm.generate(
            {"prompt_token_ids": list(prompt)}, parameters, f"c{next(self._numbers)}"
        )
        async for output in outputs:
            tokens = list(output.outputs[0].token_ids)
        return tokens

    def _end_if_unfit(self) -> None:
        """Leave with vLLM's core gone or weights half old, half new: no answer may come of it.

        The owner takes the end of this process for the word.
        """
        if self._torn or (self._llm is not None and self._llm.errored):
            os._exit(_UNFIT)


if __name__ == "__main__":
    serve_streams(StreamingWorker().handle)
