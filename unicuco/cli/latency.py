"""``unicuco latency``: measure how fast a run's shapes are on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from unicuco.cli.plan import BaseOption, RunArgument
from unicuco.cli.progress import ProgressDisplay
from unicuco.cli.request_options import parse_whole_numbers
from unicuco.cli.terminal import DebugOption, JsonOption, open_terminal

if TYPE_CHECKING:
    from unicuco.pipeline import LatencyReport


def latency(
    ctx: typer.Context,
    run: RunArgument,
    batches: Annotated[
        str,
        typer.Option("--batches", help="Sequences decoded at a time, rising, commas between."),
    ] = "1,4,16",
    shapes: Annotated[int, typer.Option("--shapes", help="How many shapes to time.")] = 12,
    rounds: Annotated[int, typer.Option("--rounds", help="Timings of each, in turns.")] = 20,
    threads: Annotated[int, typer.Option("--threads", help="Of the engine; 0: one per core.")] = 0,
    base: BaseOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure vLLM's time per token of some shapes on this machine, for --max-latency-ms.

    Once per run and machine; takes some minutes. The run keeps a model of it in latency.json.
    """
    with open_terminal(ctx, as_json=as_json, debug=debug) as terminal:
        counts = parse_whole_numbers("--batches", batches)
        from unicuco.pipeline import LatencyOptions, Run, measure_run

        options = LatencyOptions(batches=counts, shapes=shapes, rounds=rounds, threads=threads)
        with ProgressDisplay() as progress:
            report = measure_run(Run.open(run, base=base), options, progress)
        terminal.show({**report.model.to_dict(), **report.to_dict()}, _line(report))


def _line(report: LatencyReport) -> str:
    dense = ", ".join(
        f"{ms:.3g} ms at batch {batch}"
        for ms, batch in zip(report.ms[0].tolist(), report.model.batches, strict=True)
    )
    return (
        f"dense model: {dense}; {len(report.ms)} shapes, each predicted from the others within "
        f"{float(report.errors.median()):.1%} (median), {float(report.errors.max()):.1%} (worst)"
    )
