"""``unicuco generate``: text from a variant through vLLM."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from unicuco.cli.terminal import DebugOption, JsonOption, open_terminal


def generate(
    ctx: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A variant or any model folder.")],
    prompt: Annotated[str, typer.Option("--prompt", help="The text to continue.")],
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="New tokens at most.")] = 64,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Decides what is drawn.")] = 0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Continue a prompt. Starting vLLM takes about a minute without a GPU; answering does not."""
    with open_terminal(ctx, as_json=as_json, debug=debug) as terminal:
        from rich.markup import escape

        from unicuco.cli.waiting import waiting
        from unicuco.engines import ENGINES, Sampling

        sampling = Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed)
        with closing(ENGINES["vllm"]()) as engine:
            with waiting("starting vLLM"):
                engine.load(folder)
            with waiting("generating"):
                (answer,) = engine.generate([prompt], sampling)
        terminal.show(answer.to_dict(), f"[dim]{escape(prompt)}[/dim]{escape(answer.text)}")
