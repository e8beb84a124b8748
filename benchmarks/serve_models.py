"""What a checked switch costs beside a bare reload, and whether load ever mixes two variants.

One idle vLLM engine is switched 200 times, in place, among eight masked variants of the embedded
model (files hashed, shapes compared, prefix cache reset, canary and weights in memory checked);
between the switches the weights are reloaded with no check at all. Then 16 clients stream greedy
answers from eight variants on two engines of the fleet that serves, and every answer's tokens are
compared with those of transformers for the variant it names.

    python -m benchmarks.serve_models [--switches 200] [--clients 16] [--answers 6]
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from benchmarks.common import save, table
from serve.fleet import Fleet, Prompt, Target
from unicuco.engines import Expectation, StreamingVllmEngine, StreamSampling, VllmOptions
from unicuco.models import load_model, load_tokenizer
from unicuco.pipeline import LearnOptions, LocalBackend, Run, learn, prune
from unicuco.types import Request
from unicuco.types import Target as Kind

VARIANTS = 8
TOKENS = 16
TEXTS = ("def main(argv):\n    ", "import os\n\n", "class Reader:\n    def ", "    return self.")
ALLOWED = (2.0, 0.1)  # times the bare reload, plus seconds


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table and write ``results/serve_models.json``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--switches", type=int, default=200)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--answers", type=int, default=6, help="per client")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as root:
        folders = make_variants(Path(root))
        results = asyncio.run(measure(folders, options))
        results["mixed"] = count_mixed(folders, results.pop("answers"))
    show(results)
    print("saved to", save("serve_models", {"model": "reference", **results}))


def make_variants(root: Path) -> list[Path]:
    """Learn a small run of the embedded model and cut eight variants of it."""
    options = LearnOptions(model="reference", out=root / "run", tokens=512, evaluations=6)
    learn(options, backend=LocalBackend(), progress=lambda step: None)
    run = Run.open(root / "run")
    folders = [root / f"v{number}" for number in range(VARIANTS)]
    for number, folder in enumerate(folders):
        prune(run, Request(target=Kind.SPARSITY, value=0.1 + 0.1 * number), folder)
    return folders


async def measure(folders: list[Path], options: argparse.Namespace) -> dict[str, Any]:
    """Measure switches on one engine, then load on two."""
    known: dict[str, Expectation] = {}
    engines = [StreamingVllmEngine(VllmOptions(threads=1), known=known) for _ in range(2)]
    try:
        started = time.perf_counter()
        targets = [await target_of(engines[0], folder) for folder in folders]
        start_s = time.perf_counter() - started
        switch, reload = await switches(engines[0], folders, options.switches)
        answers, seconds = await load(engines, targets, options)
    finally:
        await asyncio.gather(*(engine.close() for engine in engines))
    bare = median(reload)
    p99 = quantiles(switch, n=100)[98]
    return {
        "num_switches": len(switch),
        "start_and_first_switches_s": start_s,
        "reload_median_s": bare,
        "reload_p99_s": quantiles(reload, n=100)[98],
        "switch_median_s": median(switch),
        "switch_p99_s": p99,
        "switch_max_s": max(switch),
        "allowed_s": ALLOWED[0] * bare + ALLOWED[1],
        "is_within": p99 <= ALLOWED[0] * bare + ALLOWED[1],
        "num_clients": options.clients,
        "load_s": seconds,
        "answers": answers,
    }


async def target_of(engine: StreamingVllmEngine, folder: Path) -> Target:
    """Let an engine serve a folder once, so that its canary is known."""
    checked = await engine.serve(folder)
    return Target(folder=folder, digest=checked.digest, family="reference")


async def switches(
    engine: StreamingVllmEngine, folders: list[Path], count: int
) -> tuple[list[float], list[float]]:
    """Return the seconds of each switch and of a bare reload after it."""
    switch, reload = [], []
    for number in range(count):
        started = time.perf_counter()
        await engine.serve(folders[number % VARIANTS])
        switch.append(time.perf_counter() - started)
        started = time.perf_counter()
        await engine.reload()
        reload.append(time.perf_counter() - started)
    return switch, reload


async def load(
    engines: list[StreamingVllmEngine], targets: list[Target], options: argparse.Namespace
) -> tuple[list[tuple[int, int, list[int]]], float]:
    """Return (variant, text, tokens) of every answer, and how long all took."""
    fleet = Fleet(engines, slots=8, patience_s=1.0)
    await engines[1].serve(targets[0].folder)
    tokenizer = load_tokenizer(targets[0].folder)
    prompts = [tuple(tokenizer(text)["input_ids"]) for text in TEXTS]
    answers: list[tuple[int, int, list[int]]] = []

    async def client(number: int) -> None:
        for turn in range(options.answers):
            variant, text = (number + 3 * turn) % VARIANTS, (number + turn) % len(TEXTS)
            sampling = StreamSampling(max_tokens=TOKENS)
            prompt = Prompt(tokens=prompts[text], sampling=sampling)
            tokens: list[int] = []
            async for pieces in fleet.generate(targets[variant], [prompt]):
                for piece in pieces:
                    tokens += piece.delta.token_ids
            answers.append((variant, text, tokens))

    started = time.perf_counter()
    await asyncio.gather(*(client(number) for number in range(options.clients)))
    seconds = time.perf_counter() - started
    await fleet.close()
    return answers, seconds


def count_mixed(folders: list[Path], answers: list[tuple[int, int, list[int]]]) -> dict[str, int]:
    """Count the answers that are not, token by token, those of transformers for their variant."""
    expected = {}
    for variant, folder in enumerate(folders):
        model, tokenizer = load_model(folder).model, load_tokenizer(folder)
        for text, prompt in enumerate(TEXTS):
            expected[variant, text] = greedy(model, list(tokenizer(prompt)["input_ids"]))
    wrong = sum(not agrees(tokens, expected[variant, text]) for variant, text, tokens in answers)
    return {"answers": len(answers), "wrong": wrong}


# Any: a transformers model
def greedy(model: Any, ids: list[int]) -> list[tuple[int, float]]:
    """Return greedy tokens, each with its lead over the runner-up in nats."""
    start, leads = len(ids), []
    while len(leads) < TOKENS:
        with torch.no_grad():
            best = model(torch.tensor([ids])).logits[0, -1].topk(2)
        ids.append(int(best.indices[0]))
        leads.append(float(best.values[0] - best.values[1]))
        if ids[-1] == model.config.eos_token_id:
            break
    return list(zip(ids[start:], leads, strict=True))


def agrees(tokens: list[int], expected: list[tuple[int, float]]) -> bool:
    """Compare up to a place where two tokens are as good as equal (a thousandth of a nat)."""
    for token, (best, lead) in zip(tokens, expected, strict=False):
        if token != best:
            return lead < 1e-3
    return len(tokens) == len(expected)


def show(results: dict[str, Any]) -> None:
    """Print the table."""
    mixed = results["mixed"]
    rows = [
        ["bare reload, median", f"{1000 * results['reload_median_s']:.1f} ms"],
        ["checked switch, median", f"{1000 * results['switch_median_s']:.1f} ms"],
        ["checked switch, p99", f"{1000 * results['switch_p99_s']:.1f} ms"],
        ["allowed (2 × reload + 100 ms)", f"{1000 * results['allowed_s']:.1f} ms"],
        [
            f"answers to {results['num_clients']} streaming clients",
            f"{mixed['answers']}, {mixed['wrong']} wrong, in {results['load_s']:.1f} s",
        ],
    ]
    print(f"{results['num_switches']} switches among {VARIANTS} variants, one idle engine\n")
    print(table(["what", "figure"], rows))


if __name__ == "__main__":
    main()
