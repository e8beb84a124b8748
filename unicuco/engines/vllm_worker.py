"""The process that holds vLLM; `VllmEngine` starts and asks it.

vLLM is imported on the first "load", after the owner has set the environment. What it does not
know: which folders may be switched in place; the owner compares shapes before it asks.
"""

from __future__ import annotations

import importlib
import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from unicuco.engines.folder import check_bits
from unicuco.engines.protocol import Sampling, check_prompt_lengths
from unicuco.engines.serve_lines import serve_lines
from unicuco.engines.vllm_plugin import register
from unicuco.errors import RequestError

_FIT_MEMORY: Final = -1  # vLLM's word for: the model's context, or less if the cache holds less


def step_clock(*, on_cpu: bool) -> Callable[[], float]:
    """Return the clock that steps are timed by: of one thread on a CPU, the processor's time.

    What other programs take of the core is then no part of it.
    """
    alone = on_cpu and os.environ.get("OMP_NUM_THREADS") == "1"
    return time.process_time if alone else time.perf_counter


class VllmWorker:
    """One vLLM engine inside this process.

    vLLM's objects are ``Any``: its types would pull the whole library into every type check.
    """

    def __init__(self) -> None:
        self._vllm: Any = None
        self._llm: Any = None
        self._context = 0
        self._clock = time.perf_counter

    def handle(self, question: Mapping[str, Any]) -> dict[str, object]:
        """Do what ``question["op"]`` says; a refusal or failure is an answer with "error"."""
        try:
            result = getattr(self, f"do_{question['op']}")(question)
        except RequestError as error:
            return {"error": str(error), "kind": "request"}
        except Exception as error:  # every failure of the library becomes one line for the owner
            return {
                "error": " ".join(f"{type(error).__name__}: {error}".split())[:400],
                "kind": "engine",
            }
        return dict(result)

    def do_load(self, question: Mapping[str, Any]) -> dict[str, object]:
        """Start the engine on ``folder``."""
        self._vllm = importlib.import_module("vllm")
        register()  # also where nothing is installed for vLLM to find it by
        platform = importlib.import_module("vllm.platforms").current_platform
        on_cpu = bool(platform.is_cpu())
        check_bits(question["odd_matrix"], on_cpu=on_cpu)
        self._llm = self._vllm.LLM(
            model=question["folder"],
            max_model_len=question["context"] or _FIT_MEMORY,
            # bfloat16 kernels on a CPU are slower and their greedy tokens differ from Hugging
            # Face's float32.
            dtype=question["dtype"] or ("float32" if on_cpu else "auto"),
            kv_cache_dtype=question["kv_cache_dtype"],
            enforce_eager=bool(question["eager"]),
            tensor_parallel_size=int(question["num_gpus"]),
            gpu_memory_utilization=float(question["memory_fraction"]),
            disable_log_stats=True,
            seed=0,
        )
        self._clock = step_clock(on_cpu=on_cpu)
        self._context = int(self._llm.llm_engine.model_config.max_model_len)
        return {"device": "cpu" if on_cpu else str(platform.device_type)}

    def do_switch(self, question: Mapping[str, Any]) -> dict[str, object]:
        """Read the weights of ``folder`` into the running engine."""
        self._llm.collective_rpc("reload_weights", kwargs={"weights_path": question["folder"]})
        # Cached keys and values are the old weights'; vLLM does not drop them by itself.
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("the prefix cache can't be reset while requests run")
        return {}

    def do_generate(self, question: Mapping[str, Any]) -> dict[str, object]:
        """Continue the prompts."""
        prompts: Sequence[str] = question["prompts"]
        sampling = Sampling(**question["sampling"])
        tokenizer = self._llm.get_tokenizer()
        ids = [list(tokenizer(prompt)["input_ids"]) for prompt in prompts]
        check_prompt_lengths([len(prompt) for prompt in ids], context=self._context)
        parameters = self._vllm.SamplingParams(
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed if sampling.temperature > 0 else None,
        )
        outputs = self._llm.generate(
            [{"prompt_token_ids": prompt} for prompt in ids], parameters, use_tqdm=False
        )
        answers = [output.outputs[0] for output in outputs]
        return {
            "generations": [
                {
                    "text": a.text,
                    "token_ids": list(a.token_ids),
                    "finish_reason": str(a.finish_reason),
                }
                for a in answers
            ]
        }

    def do_time(self, question: Mapping[str, Any]) -> dict[str, object]:
        """Return the seconds of every step of decoding ``batch`` sequences."""
        engine, batch = self._llm.llm_engine, int(question["batch"])
        parameters = self._vllm.SamplingParams(
            temperature=0.0,
            max_tokens=1 + int(question["steps"]),  # the first comes with the prompts
            ignore_eos=True,
            detokenize=False,
        )
        for row in range(batch):
            prompt = [
                (5 * row + 3 * place + 1) % question["vocabulary"]
                for place in range(question["prompt_tokens"])
            ]
            engine.add_request(str(row), {"prompt_token_ids": prompt}, parameters)
        arrivals = []
        while engine.has_unfinished_requests():
            # Steps that give nothing, as where the engine schedules ahead, belong to the next one.
            if len(engine.step()) == batch:
                arrivals.append(self._clock())
        return {"seconds": [b - a for a, b in itertools.pairwise(arrivals)]}

    def do_ping(self, question: Mapping[str, Any]) -> dict[str, object]:
        """Answer that the engine's own processes are well."""
        engine = self._llm.llm_engine.engine_core
        if hasattr(engine, "resources") and engine.resources.engine_dead:
            raise RuntimeError("vLLM's engine core is dead")
        return {}


if __name__ == "__main__":
    serve_lines(VllmWorker().handle)
