"""``unicuco unpack``: a packed model as a folder again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unicuco.cli.progress import ProgressDisplay
from unicuco.cli.terminal import DebugOption, JsonOption, open_terminal

BaseOption = Annotated[
    str | None,
    typer.Option("--base", help="Refuse a packed model that was not made of this base model."),
]


def unpack(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `unicuco pack` made.")],
    out: Annotated[Path, typer.Option("--out", help="The folder to make.")],
    base: BaseOption = None,
    threads: Annotated[
        int, typer.Option("--threads", min=0, help="That decode; 0: one per core.")
    ] = 0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Unpack to the folder that was packed; 8-bit weights come back in the model's own type."""
    with open_terminal(ctx, as_json=as_json, debug=debug) as terminal:
        from unicuco.pipeline import unpack as unpack_file

        with ProgressDisplay() as progress:
            header = unpack_file(file, out, base=base, threads=threads, progress=progress)
        num_bytes = sum(entry.num_bytes for entry in header.entries)
        terminal.show(
            {
                "out": str(out),
                "bytes": num_bytes,
                "tensors": len(header.tensors),
                "base_model": header.base_digest,
                "int8": header.facts["int8"],
            },
            f"unpacked {len(header.tensors)} tensors, {num_bytes:,} bytes, to {out}",
        )
