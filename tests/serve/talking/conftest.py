"""One service that talks, for all tests here: the embedded model, eight variants, two engines."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from serve.config import EngineOptions, ServeConfig
from tests.serve.conftest import small_config, wait_until
from unicuco.models import load_model, load_tokenizer
from unicuco.models.folder import resolve_model
from unicuco.pipeline import LearnOptions, LocalBackend, Run, learn, prune
from unicuco.types import Request, Target

NUM_VARIANTS = 8
APP = "talking"


@dataclass(kw_only=True)
class Talking:
    """The running service, and what transformers says of the same folders."""

    url: str
    config: ServeConfig
    folders: dict[str, Path]
    _models: dict[str, Any] = field(default_factory=dict)

    @property
    def variants(self) -> list[str]:
        """Ids of the eight variants."""
        return [name for name in self.folders if ":" in name]

    def client(self) -> openai.OpenAI:
        """The official client, as anybody would make it."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def http(self) -> httpx.Client:
        """A plain client."""
        return httpx.Client(base_url=self.url, timeout=120)

    def status(self) -> dict[str, Any]:
        """What the engines do, asked of the deployment itself."""
        from ray import serve as ray_serve

        handle = ray_serve.get_deployment_handle("models", APP)
        return handle.status.remote().result()  # type: ignore[no-any-return]

    def greedy(self, name: str, prompt: str, count: int) -> list[tuple[int, float]]:
        """Transformers' greedy tokens, each with its lead over the runner-up in nats."""
        if name not in self._models:
            folder = self.folders[name]
            self._models[name] = load_model(folder).model, load_tokenizer(folder)
        model, tokenizer = self._models[name]
        ids, past, answer = list(tokenizer(prompt)["input_ids"]), None, []
        fed = ids
        while len(answer) < count:
            with torch.no_grad():
                out = model(torch.tensor([fed]), past_key_values=past, use_cache=True)
            past, best = out.past_key_values, out.logits[0, -1].topk(2)
            answer.append((int(best.indices[0]), float(best.values[0] - best.values[1])))
            fed = [answer[-1][0]]
            if fed[0] == model.config.eos_token_id:
                break
        return answer

    def check(self, name: str, prompt: str, tokens: list[int]) -> None:
        """Check an answer token by token, up to a place where two tokens are as good as equal."""
        expected = self.greedy(name, prompt, len(tokens))
        for place, (token, lead) in enumerate(expected):
            if tokens[place] != token:
                assert lead < 1e-3, (name, prompt, place, tokens, expected)
                return


def num_at_work(status: dict[str, Any]) -> int:
    """Sequences that run or wait, in a status of `Talking`."""
    return status["queued"] + sum(e["running"] for e in status["engines"])  # type: ignore[no-any-return]


def _is_ready(http: httpx.Client) -> bool:
    try:
        return http.get("/ready").status_code == 200
    except httpx.RemoteProtocolError:  # seen once while engines that started took every core
        return False


@pytest.fixture(scope="session")
def talking(serve_port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Talking]:
    """The service. Two engines start at once, which takes a minute or two."""
    from serve.running import running

    root = tmp_path_factory.mktemp("talking")
    run_folder, data = root / "python", root / "data"
    options = LearnOptions(model="reference", out=run_folder, tokens=512, evaluations=6)
    learn(options, backend=LocalBackend(), progress=lambda step: None)
    run = Run.open(run_folder)
    folders = {"python": resolve_model("reference")}
    (data / "variants" / "python").mkdir(parents=True)
    for number in range(NUM_VARIANTS):
        folder = data / "variants" / "python" / f"v{number}"
        prune(run, Request(target=Target.SPARSITY, value=0.1 + 0.1 * number), folder)
        folders[f"python:v{number}"] = folder
    engines = EngineOptions(
        min_engines=2, max_engines=2, num_cpus=0.01, threads=1, slots=8, longest_wait_s=1.0,
        max_queued=128, start_timeout_s=540,
    )  # fmt: skip
    config = small_config(run_folder, data, serve_port, engines=engines)
    with running(config, name=APP, route_prefix=f"/{APP}") as url:
        talk = Talking(url=url, config=config, folders=folders)
        with talk.http() as http:
            assert wait_until(lambda: _is_ready(http), 540)
            wait_until(lambda: all(e["digest"] for e in talk.status()["engines"]), 240)
        yield talk


@pytest.fixture
def engine_pids(talking: Talking) -> list[int]:
    """Process ids of the engines that run."""
    deadline = time.monotonic() + 200
    while True:
        pids = [e["pid"] for e in talking.status()["engines"] if e["digest"] is not None]
        if len(pids) == 2 or (pids and time.monotonic() > deadline):
            return pids
        time.sleep(0.5)
