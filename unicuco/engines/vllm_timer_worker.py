"""The process in which shapes without weights are timed; `DecodeTimer` starts and asks it.

One engine after another in one process: a new process would import for a minute. What it does not
know: what times are for.
"""

from __future__ import annotations

import gc
import importlib
from collections.abc import Mapping
from typing import Any

from unicuco.engines.serve_lines import serve_lines
from unicuco.engines.vllm_plugin import register
from unicuco.engines.vllm_worker import VllmWorker, step_clock


class TimerWorker(VllmWorker):
    """One vLLM engine of random weights inside this process, without a tokenizer."""

    def do_load(self, question: Mapping[str, Any]) -> dict[str, object]:
        """Start an engine on ``folder``, in place of the one that is there."""
        self._vllm = importlib.import_module("vllm")
        if self._llm is not None:
            self._llm = None
            gc.collect()
            importlib.import_module("vllm.distributed").cleanup_dist_env_and_memory()
        register()  # also where nothing is installed for vLLM to find it by
        platform = importlib.import_module("vllm.platforms").current_platform
        on_cpu = bool(platform.is_cpu())
        context, max_batch = int(question["context"]), int(question["max_batch"])
        self._llm = self._vllm.LLM(
            model=question["folder"],
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=context,
            max_num_seqs=max_batch,
            # Whole prompts of a whole batch in one step: whatever follows is decoding.
            max_num_batched_tokens=max(2048, max_batch * context),
            dtype="float32" if on_cpu else "auto",  # as `VllmWorker` serves it
            enforce_eager=bool(question["eager"]),
            gpu_memory_utilization=float(question["memory_fraction"]),
            disable_log_stats=True,
            seed=0,
        )
        self._clock = step_clock(on_cpu=on_cpu)
        device = "cpu" if on_cpu else str(platform.get_device_name())
        return {"device": device, "vllm": str(self._vllm.__version__)}


if __name__ == "__main__":
    serve_lines(TimerWorker().handle)
