"""``unicuco generate``: text from a variant through vLLM, or from a packed model as it is."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unicuco.cli.terminal import DebugOption, JsonOption, open_terminal
from unicuco.cli.unpack import BaseOption
from unicuco.errors import RequestError

if TYPE_CHECKING:
    from unicuco.engines import Sampling


def generate(
    ctx: typer.Context,
    prompt: Annotated[str, typer.Option("--prompt", help="The text to continue.")],
    folder: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="A variant or any model folder.")
    ] = None,
    packed: Annotated[
        Path | None,
        typer.Option("--packed", help="Instead of DIR: run what `unicuco pack` made, packed."),
    ] = None,
    base: BaseOption = None,
    max_memory_mb: Annotated[
        float | None,
        typer.Option(
            "--max-memory-mb",
            min=0,
            help="With --packed: MiB for weights; what fits stays decoded. Left out: the least.",
        ),
    ] = None,
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
        if (folder is None) == (packed is None):
            raise RequestError("give a model folder or --packed FILE, and not both")
        if packed is not None:
            document, text = _from_packed(packed, base, max_memory_mb, prompt, sampling)
            terminal.show(document, f"[dim]{escape(prompt)}[/dim]{escape(text)}")
            return
        assert folder is not None
        if base is not None or max_memory_mb is not None:
            raise RequestError("--base and --max-memory-mb are of --packed")
        with closing(ENGINES["vllm"]()) as engine:
            with waiting("starting vLLM"):
                engine.load(folder)
            with waiting("generating"):
                (answer,) = engine.generate([prompt], sampling)
        terminal.show(answer.to_dict(), f"[dim]{escape(prompt)}[/dim]{escape(answer.text)}")


def _from_packed(
    file: Path,
    base: str | None,
    max_memory_mb: float | None,
    prompt: str,
    sampling: Sampling,
) -> tuple[dict[str, object], str]:
    """Return the document and the text of a packed model's answer."""
    from unicuco.cli.waiting import waiting
    from unicuco.engines.packed import PackedModel
    from unicuco.pipeline.packing import open_header

    with waiting("loading the packed model"):
        open_header(file, base)
        model = PackedModel(file, max_memory_mb=max_memory_mb)
    with waiting("generating"):
        answer = model.generate(prompt, sampling)
    memory = model.memory
    document = {
        **answer.to_dict(),
        "weights": {
            "peak_bytes": memory.peak_bytes,
            "decoded": memory.decoded,
            "matrices": memory.matrices,
        },
    }
    return document, answer.text
