"""Text from a model folder through vLLM, held in a process of its own.

The environment that vLLM reads at import is given to that process alone, so the caller's is never
touched, and a caller that has imported torch, ray or vLLM already makes no difference. What it does
not know: HTTP, streaming.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from unicuco.engines.child import ChildProcess
from unicuco.engines.decoding import DecodeLoad, median_ms, step_question
from unicuco.engines.folder import FolderFacts, read_facts
from unicuco.engines.protocol import Generation, Sampling
from unicuco.errors import EngineError, RequestError

START_S: Final = 600.0  # imports alone take over a minute on a cold disk
_PING_S: Final = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmOptions:
    """How vLLM runs. The defaults serve one small model on whatever this machine has.

    ``context``: tokens per prompt and answer together, none = the model's or what memory holds;
    more than the model's is refused. ``dtype``: none = float32 on a CPU (bfloat16 for 4-bit
    weights), else the checkpoint's.
    ``kv_cache_gib``: whole GiB for keys and values, CPU only. ``memory_fraction``: of the device's
    memory, GPU only. ``threads``: OpenMP threads, 0 = one per core that this process may use.
    ``cores``: the cores to bind them to; give two engines different ones.
    """

    context: int | None = None
    dtype: str | None = None
    eager: bool = True
    kv_cache_gib: int = 1
    memory_fraction: float = 0.5
    num_gpus: int = 1
    threads: int = 0
    cores: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.context is not None and self.context < 2:
            raise RequestError(f"context must be at least 2 tokens, got {self.context}")
        if self.kv_cache_gib < 1:
            raise RequestError(
                f"kv_cache_gib must be a whole number of at least 1, got {self.kv_cache_gib}"
            )

    def check_context(self, facts: FolderFacts) -> None:
        """Refuse a context that the model does not have.

        Raises:
            EngineError: more was asked for than the folder holds.
        """
        asked, most = self.context, facts.context
        if asked is not None and most is not None and asked > most:
            raise EngineError(
                f"a context of {asked} tokens was asked for, but {facts.path} holds {most}"
            )

    def environment(self) -> dict[str, str]:
        """Return the environment variables that vLLM and OpenMP read at their first import."""
        cores = ",".join(map(str, self.cores))
        threads = self.threads or len(self.cores) or len(os.sched_getaffinity(0))
        variables = {
            "VLLM_CPU_KVCACHE_SPACE": str(self.kv_cache_gib),
            # "auto" would keep a core free and bind every engine to the same ones.
            "VLLM_CPU_OMP_THREADS_BIND": cores or "nobind",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # this process is the engine's own already
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "HF_HUB_OFFLINE": "1",  # a folder is complete; nothing may be fetched for it
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "passive",  # spinning threads of two engines starve each other
        }
        if cores:
            variables |= {"OMP_PLACES": f"{{{cores}}}", "OMP_PROC_BIND": "true"}
        return variables


class VllmChild:
    """Whoever has vLLM in a process of its own, while something is loaded.

    Args:
        options: of the engine.
    """

    def __init__(self, options: VllmOptions) -> None:
        self.options = options
        self._child: ChildProcess | None = None

    def close(self) -> None:
        """End the process; closing twice is allowed, and loading again too."""
        if self._child is not None:
            self._child.close()
        self._child = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _start(self, worker: str) -> None:
        self._child = ChildProcess(
            # -P: the folder that the user stands in must not shadow a module
            [sys.executable, "-P", "-m", worker],
            {**os.environ, **self.options.environment()},
        )

    def _ask(self, question: Mapping[str, object], *, timeout_s: float | None) -> dict[str, object]:
        if self._child is None:
            raise EngineError("nothing is loaded; call load first")
        answer = self._child.ask(question, timeout_s=timeout_s)
        if "error" in answer:
            message = str(answer["error"])
            raise RequestError(message) if answer["kind"] == "request" else EngineError(message)
        return answer


class VllmEngine(VllmChild):
    """A `TextEngine` on vLLM. One process while something is loaded, none otherwise."""

    name = "vllm"

    def __init__(self, options: VllmOptions | None = None) -> None:
        super().__init__(options or VllmOptions())
        self._facts: FolderFacts | None = None

    @property
    def folder(self) -> Path | None:
        """The folder being served, or none."""
        return None if self._facts is None else self._facts.path

    @property
    def pid(self) -> int | None:
        """The engine's process id while something is loaded."""
        return None if self._child is None else self._child.pid

    def load(self, folder: Path) -> None:
        """See `TextEngine.load`. The first takes about a minute, nearly all of it imports."""
        require_vllm()
        facts = read_facts(folder)
        self.options.check_context(facts)
        if self._child is not None and self._child.alive and self._facts is not None:
            if self._facts.difference(facts) is None:
                self._switch(facts)
                return
            self.close()
        self._start("unicuco.engines.vllm_worker")
        question = {
            "op": "load",
            "folder": str(folder.resolve()),
            **{
                name: getattr(self.options, name)
                for name in ("context", "eager", "num_gpus", "memory_fraction")
            },
            **facts.engine_flags(self.options.dtype),
        }
        try:
            self._ask(question, timeout_s=START_S)
        except (EngineError, RequestError) as error:
            self.close()
            raise EngineError(f"vLLM can't serve {folder}: {error}") from None
        self._facts = facts

    def switch(self, folder: Path) -> None:
        """See `TextEngine.switch`. Takes 0.1 to 0.2 s for a small model."""
        self._switch(self._loaded().replaced_by(read_facts(folder)))

    def generate(
        self, prompts: Sequence[str], sampling: Sampling | None = None
    ) -> list[Generation]:
        """See `TextEngine.generate`; greedy tokens equal Hugging Face's in float32."""
        self._loaded()
        if not prompts:
            return []
        chosen = dataclasses.asdict(sampling or Sampling())
        answer = self._ask(
            {"op": "generate", "prompts": list(prompts), "sampling": chosen}, timeout_s=None
        )
        generations = answer["generations"]
        assert isinstance(generations, list)
        return [
            Generation(
                text=g["text"], token_ids=tuple(g["token_ids"]), finish_reason=g["finish_reason"]
            )
            for g in generations
        ]

    def step_ms(self, load: DecodeLoad) -> float:
        """See `unicuco.engines.decoding.Decoder.step_ms`."""
        self._loaded()
        return median_ms(self._ask(step_question(load), timeout_s=None))

    def check_health(self) -> None:
        """See `TextEngine.check_health`."""
        self._ask({"op": "ping"}, timeout_s=_PING_S)

    def close(self) -> None:
        """See `TextEngine.close`."""
        super().close()
        self._facts = None

    def _loaded(self) -> FolderFacts:
        if self._facts is None:
            raise EngineError("nothing is loaded; call load first")
        return self._facts

    def _switch(self, facts: FolderFacts) -> None:
        try:
            self._ask({"op": "switch", "folder": str(facts.path.resolve())}, timeout_s=START_S)
        except EngineError as error:
            self.close()  # weights may be half old, half new: nothing may be served from them
            raise EngineError(
                f"switching to {facts.path} failed, and the engine was closed: {error}"
            ) from None
        self._facts = facts


def require_vllm() -> None:
    """Refuse, in one line, to go on without vLLM.

    Raises:
        EngineError: it is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise EngineError(
            "vLLM is not installed; install unicuco[cpu] (no GPU) or unicuco[gpu], then try again"
        )
