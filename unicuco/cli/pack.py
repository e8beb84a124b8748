"""``unicuco pack``: a model folder as one small file, lossless or with 8-bit weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unicuco.cli.progress import ProgressDisplay
from unicuco.cli.terminal import DebugOption, JsonOption, open_terminal
from unicuco.errors import RequestError

if TYPE_CHECKING:
    from unicuco.pipeline import PackReport


def pack(
    ctx: typer.Context,
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A variant or any model.")],
    out: Annotated[Path, typer.Option("--out", help="The file to make.")],
    link_mbps: Annotated[
        float | None,
        typer.Option(
            "--link-mbps",
            help="Megabits per second of the disk or link that it will be loaded over: what "
            "decodes more slowly than it saves stays as it is. Left out: as small as it gets.",
        ),
    ] = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="Quantise: 8-bit weights that code into few bits.")
    ] = False,
    max_kl: Annotated[
        float | None,
        typer.Option("--max-kl", help="Nats per token that --int8 may cost (default 0.01)."),
    ] = None,
    sparsity: Annotated[
        float | None,
        typer.Option("--sparsity", help="With --int8: drop this fraction of weights first."),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", help="With --int8: UTF-8 text; else the embedded one."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", min=1, help="With --int8: of calibration text.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Decides what is drawn.")] = 0,
    threads: Annotated[
        int, typer.Option("--threads", min=0, help="That code and decode; 0: one per core.")
    ] = 0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Pack a folder for disk or link; unpacked, it is the same to the bit (but for --int8)."""
    with open_terminal(ctx, as_json=as_json, debug=debug) as terminal:
        given = {"--max-kl": max_kl, "--sparsity": sparsity, "--calibration": calibration}
        idle = [name for name, value in {**given, "--tokens": tokens}.items() if value is not None]
        if idle and not int8:
            raise RequestError(f"{idle[0]} says how weights are quantised; add --int8")
        from unicuco.pipeline import Int8Options, PackOptions
        from unicuco.pipeline import pack as pack_folder

        usual = Int8Options()
        quantising = Int8Options(
            max_kl=usual.max_kl if max_kl is None else max_kl,
            sparsity=usual.sparsity if sparsity is None else sparsity,
            calibration=calibration,
            tokens=usual.tokens if tokens is None else tokens,
            seed=seed,
        )
        options = PackOptions(
            model=folder,
            out=out,
            link_mbps=link_mbps,
            int8=quantising if int8 else None,
            threads=threads,
        )
        with ProgressDisplay() as progress:
            report = pack_folder(options, progress)
        terminal.show(report.to_dict(), *_lines(report, out))


def _lines(report: PackReport, out: Path) -> list[str]:
    """Return the report for people."""
    times = report.stored_bytes / report.packed_bytes
    lines = [
        f"packed     {out} ({report.file_bytes:,} bytes)",
        f"tensors    {report.stored_bytes:,} to {report.packed_bytes:,} bytes "
        f"({times:.2f} times smaller); {report.coded} of {report.tensors} coded",
    ]
    if report.int8_bytes is not None:
        times = report.int8_bytes / report.packed_bytes
        lines.append(f"plain INT8 {report.int8_bytes:,} bytes ({times:.2f} times as many)")
        lines.append(f"KL         {report.kl:.4g} nats per token, on validation text")
    return lines
