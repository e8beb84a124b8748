"""The deployment that talks: vLLM engines that take turns with the variants of every run.

One replica holds up to ``max_engines`` engines, each in processes of its own, and decides which
variant each serves and how many of them run (`serve.fleet`). More replicas would each decide for
themselves, so there is one, and Ray reserves for it what all its engines may use; an engine may use
several GPUs of its node. A variant that lies packed is served too: each engine unpacks it for as
long as it serves it; of its container only the head is read here.

Why not `ray.serve.llm`: its server holds one model per deployment and switches between LoRA
adapters only, so 8 variants would be 8 engines of full size; it offers neither pausing, reloading
nor checking; and its application is a second ingress without this one's keys, envelope, catalogue
and queues. Its request types import vLLM, which takes a minute in every process that speaks HTTP.
What it does well (one model, many replicas) is not this deployment's problem.

What this module does not know: HTTP, vLLM.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from ray import serve as ray_serve
from ray.serve import Application

from serve.catalogue import Catalogue, ModelId, UnknownModelError
from serve.config import EngineOptions, ServeConfig
from serve.fleet import AnswerError, Fleet, Piece, Prompt, Target
from serve.scheduler import QueueFullError
from serve.texts import ChatMessage, Texts, Written
from unicuco.engines import (
    Expectation,
    StreamingEngine,
    StreamingVllmEngine,
    StreamSampling,
    VllmOptions,
)
from unicuco.errors import RequestError, UnicucoError
from unicuco.export.document import DOCUMENT_NAME, VariantDocument
from unicuco.models import resolve_model
from unicuco.packing import check_base, read_header, read_small_files
from unicuco.pipeline.files import load_json
from unicuco.types import ServedAs

_log = logging.getLogger("ray.serve")

_MOST_TEXTS: Final = 64  # tokenizers held; variants of one run share a model's, but not its object
_STATUS: Final = {"refused": 500, "lost": 503, "failed": 500}

Engines = Callable[[ServeConfig], Sequence[StreamingEngine]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TalkCall:
    """One call for text. Either ``prompts`` (texts or token ids) or ``messages``.

    ``max_tokens`` none: what the context leaves. ``copies``: answers to each prompt.
    """

    model: str
    prompts: tuple[str | tuple[int, ...], ...] = ()
    messages: tuple[ChatMessage, ...] = ()
    copies: int = 1
    max_tokens: int | None = None
    sampling: StreamSampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Began:
    """The call was understood; ``fingerprint`` names the contents of what answers."""

    fingerprint: str
    prompt_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """The next pieces of all answers, at least one; all that were there together."""

    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """There is no answer, or no more of it. A value, not an exception: it crosses processes."""

    status: int
    code: str
    message: str
    param: str | None = None
    retry_after_s: int | None = None


TalkEvent = Began | Said | Failed


def bind_models(config: ServeConfig) -> Application | None:
    """Return the bound deployment, or none where it was left out or vLLM is not installed."""
    options = config.engines
    if options.max_engines == 0:
        return None
    if importlib.util.find_spec("vllm") is None:
        _log.warning("vLLM is not installed: the service plans and prunes, but does not talk")
        return None
    settings: dict[str, Any] = {  # Any: options as Serve takes them
        "name": "models",
        "num_replicas": 1,
        "max_ongoing_requests": 10_000,  # the fleet's own queue refuses, with an envelope
        "ray_actor_options": {
            "num_cpus": options.num_cpus * options.max_engines,
            "num_gpus": options.num_gpus * options.max_engines,
        },
        "graceful_shutdown_timeout_s": 30.0,
        "health_check_period_s": 5.0,
    }
    return ray_serve.deployment(**settings)(Models).bind(config, vllm_engines)


def vllm_engines(config: ServeConfig) -> list[StreamingEngine]:
    """Return the engines of a configuration; nothing is started yet."""
    options = config.engines
    vllm = VllmOptions(
        context=options.max_model_len,
        num_gpus=max(1, int(options.num_gpus)),
        # Engines that are bound to cores would meet whatever else is bound to them: shares do.
        threads=options.threads or _share_of_cores(options),
    )
    known: dict[str, Expectation] = {}
    shutil.rmtree(config.scratch_folder, ignore_errors=True)  # by engines that were killed
    return [
        StreamingVllmEngine(
            vllm,
            scratch=config.scratch_folder / str(number),
            known=known,
            start_timeout_s=options.start_timeout_s,
        )
        for number in range(options.max_engines)
    ]


def _share_of_cores(options: EngineOptions) -> int:
    return max(1, len(os.sched_getaffinity(0)) // options.max_engines)


class Models:
    """One replica.

    Args:
        config: of the service.
        engines: makes the engines, within the replica.
    """

    def __init__(self, config: ServeConfig, engines: Engines) -> None:
        self._options = config.engines
        self._config = config
        self._catalogue = Catalogue(config)
        self._engines = engines
        self._fleet: Fleet | None = None
        self._texts: OrderedDict[str, Texts] = OrderedDict()
        self._in_use: Counter[str] = Counter()

    async def check_health(self) -> None:
        """Serve asks this from the start, so the engines start with the service."""
        self._started()

    async def ready(self) -> bool:
        """Say whether a call would be answered without waiting for an engine to start."""
        fleet = self._started()
        return not self._options.min_engines or any(s.digest is not None for s in fleet.status)

    async def in_use(self, model: str) -> bool:
        """Say whether a call for this model runs or waits."""
        return self._in_use[model] > 0

    async def status(self) -> dict[str, Any]:  # Any: JSON
        """Return what the engines do now."""
        fleet = self._started()
        return {"engines": [asdict(s) for s in fleet.status], "queued": fleet.num_queued}

    async def talk(self, call: TalkCall) -> AsyncGenerator[TalkEvent, None]:
        """Yield `Began`, then what is said as it comes, or `Failed` at any place."""
        fleet = self._started()
        self._in_use[call.model] += 1
        try:
            async with aclosing(self._talk(fleet, call)) as events:
                async for event in events:
                    yield event
        except QueueFullError as error:
            yield Failed(
                status=429,
                code="overloaded",
                message=str(error),
                retry_after_s=error.retry_after_s,
            )
        except AnswerError as error:
            yield self._explained(call, error)
        except UnknownModelError:
            yield _unknown(call.model)
        except RequestError as error:
            yield Failed(status=400, code="invalid_request", message=str(error))
        except UnicucoError as error:
            yield Failed(status=500, code="model_unusable", message=str(error), param="model")
        finally:
            self._in_use[call.model] -= 1
            self._in_use += Counter()  # drops zeros

    async def _talk(self, fleet: Fleet, call: TalkCall) -> AsyncGenerator[TalkEvent, None]:
        target, texts, prompts = await asyncio.to_thread(self._read, call)
        context = min(texts.context, self._options.max_model_len or texts.context)
        sequences = []
        for prompt in prompts:
            room = context - len(prompt.tokens)
            if not prompt.tokens:
                raise RequestError("the prompt is empty; give at least one token of text")
            if room < 1:
                yield _too_long(len(prompt.tokens), context, is_chat=bool(call.messages))
                return
            for copy in range(call.copies):
                sampling = _sampling(call, prompt, min(room, self._options.max_tokens), copy)
                sequences.append(Prompt(tokens=prompt.tokens, sampling=sampling))
        num_tokens = sum(len(prompt.tokens) for prompt in prompts)
        yield Began(fingerprint=f"fp_{target.digest[:16]}", prompt_tokens=num_tokens)
        async with aclosing(fleet.generate(target, sequences)) as pieces:
            async for there in pieces:
                yield Said(pieces=tuple(there))

    def _started(self) -> Fleet:
        """Return the fleet; it belongs to the loop that calls run on, so it is made here."""
        if self._fleet is None:
            options = self._options
            self._fleet = Fleet(
                self._engines(self._config),
                slots=options.slots,
                max_queued=options.max_queued,
                patience_s=options.longest_wait_s,
                min_engines=options.min_engines,
                idle_stop_s=options.idle_stop_s,
            )
            if options.min_engines:
                self._warming = asyncio.create_task(self._warm(self._fleet))
        return self._fleet

    async def _warm(self, fleet: Fleet) -> None:
        name = ModelId(run=self._catalogue.run_ids[0])
        try:
            fleet.warm(await asyncio.to_thread(self._target, name))
        except UnicucoError as error:
            _log.warning("engines are not started before they are needed: %s", error)

    def _read(self, call: TalkCall) -> tuple[Target, Texts, list[Written]]:
        """Find the model and write the prompts in its tokens; reads files."""
        target = self._target(ModelId.parse(call.model))
        texts = self._texts_of(target)
        if call.messages:
            return target, texts, [texts.write_chat(call.messages)]
        written = [
            texts.write(prompt) if isinstance(prompt, str) else texts.take(prompt)
            for prompt in call.prompts
        ]
        return target, texts, written

    def _target(self, name: ModelId) -> Target:
        """Return where a model lies now and what an engine must find there.

        Raises:
            UnknownModelError: nothing has that name.
            UnicucoError: the run's base model is not there.
        """
        manifest = load_json(self._catalogue.run_folder(name.run) / "run.json")
        base = str(manifest["profile"]["digest"])
        if name.suffix is None:
            folder = resolve_model(str(manifest["base_model"]["path"]))
            return Target(folder=folder, digest=base, family=base)
        found = self._catalogue.find(name)
        try:
            if found.is_file():
                now = found.stat()
                digest, document = _of_container(found, now.st_mtime_ns, now.st_size, base)
            else:
                document = (found / DOCUMENT_NAME).read_bytes()
                digest = hashlib.sha256(document).hexdigest()
        except OSError:
            raise UnknownModelError(f"no variant is called {str(name)!r}") from None
        family = base if _is_mask(document) else f"{base}:{digest}"
        return Target(folder=found, digest=digest, family=family)

    def _texts_of(self, target: Target) -> Texts:
        texts = self._texts.get(target.digest) or _read_texts(target.folder)
        self._texts[target.digest] = texts
        self._texts.move_to_end(target.digest)
        while len(self._texts) > _MOST_TEXTS:
            self._texts.popitem(last=False)
        return texts

    def _explained(self, call: TalkCall, error: AnswerError) -> Failed:
        """Say why there is no answer; a model that was deleted meanwhile is simply not there."""
        try:
            self._target(ModelId.parse(call.model))
        except UnknownModelError:
            return _unknown(call.model)
        except UnicucoError as reason:
            _log.warning("%s can't be found any more: %s", call.model, reason)
        retry = 1 if error.kind == "lost" else None
        return Failed(
            status=_STATUS[error.kind],
            code=f"engine_{error.kind}",
            message=str(error),
            retry_after_s=retry,
        )


@functools.lru_cache(maxsize=_MOST_TEXTS)  # a large model's header takes a while
def _of_container(file: Path, mtime_ns: int, num_bytes: int, base: str) -> tuple[str, bytes]:
    """Return what names a container's contents, as the file is now, and its strategy.json.

    Raises:
        ContainerError: it is damaged as far as the header tells, or of another base model.
    """
    header = read_header(file)
    check_base(header, base, str(file))
    return header.digest, read_small_files(file).get(DOCUMENT_NAME, b"")


@functools.lru_cache(maxsize=_MOST_TEXTS)
def _is_mask(document: bytes) -> bool:
    """Say whether a variant has its base's shapes and types; the others load in engines anew.

    Of one that can't be read nothing is said here: the engine that is to load it says it.
    """
    try:
        return VariantDocument.parse(document.decode()).plan.served_as is ServedAs.MASK
    except ValueError:
        return True


def _read_texts(model: Path) -> Texts:
    """Read the tokenizer and context of a folder, or of what a container holds."""
    if model.is_dir():
        return Texts(model)
    with tempfile.TemporaryDirectory() as folder:
        for name, content in read_small_files(model).items():
            (Path(folder) / name).write_bytes(content)
        return Texts(Path(folder))


def _sampling(call: TalkCall, prompt: Written, room: int, copy: int) -> StreamSampling:
    asked = call.sampling
    return replace(
        asked,
        max_tokens=min(room, call.max_tokens or room),
        stop=asked.stop or prompt.stop,
        seed=None if asked.seed is None else asked.seed + copy,
    )


def _unknown(model: str) -> Failed:
    return Failed(status=404, code="model_not_found", message=f"no model {model!r}", param="model")


def _too_long(num_tokens: int, context: int, *, is_chat: bool) -> Failed:
    return Failed(
        status=400,
        code="context_length_exceeded",
        message=f"the prompt has {num_tokens} tokens, but prompt and answer share a context of "
        f"{context}; shorten the prompt",
        param="messages" if is_chat else "prompt",
    )
