"""``unicuco serve``: the HTTP service on Ray Serve."""

from __future__ import annotations

import logging
import os
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from unicuco.cli.latency_check import CheckOption
from unicuco.cli.terminal import DebugOption, JsonOption, open_terminal

_HOST_AND_PORT = re.compile(r"[^/\s]+:\d{1,5}")
_OBJECTS_BYTES = 64 * 2**20  # Serve passes bodies and answers, never weights


def serve(
    ctx: typer.Context,
    runs: Annotated[list[str], typer.Argument(help="Runs, made by learn: folders or URLs.")],
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port to listen on.")] = 8000,
    data: Annotated[Path, typer.Option("--data", help="Where variants and jobs are kept.")] = Path(
        "unicuco-data"
    ),
    store: Annotated[
        str, typer.Option("--store", help="Database URL of the jobs; SQLite in --data if left out.")
    ] = "",
    engines: Annotated[
        int, typer.Option("--engines", min=0, help="vLLM engines at most; 0: no completions.")
    ] = 1,
    scratch: Annotated[
        str,
        typer.Option(
            "--scratch", help="A fast disk to unpack models to that lie packed; else in --data."
        ),
    ] = "",
    pruners: Annotated[int, typer.Option("--pruners", min=1, help="Pruning replicas at most.")] = 4,
    check: CheckOption = True,
    address: Annotated[
        str,
        typer.Option(
            "--address",
            help="local: a Ray of its own; auto or HOST:PORT: a running one that has a node here.",
        ),
    ] = "local",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Serve strategies, compression jobs and variants until stopped.

    Other than loopback is listened on only with keys: set UNICUCO_API_KEYS=KEY,KEY,….
    """
    with open_terminal(ctx, as_json=as_json, debug=debug) as terminal:
        from serve.config import KEYS_VARIABLE, EngineOptions, PruningOptions, ServeConfig
        from unicuco.errors import RequestError
        from unicuco.pipeline.run_copy import copy_of_run

        config = ServeConfig.of_runs(
            [copy_of_run(run).need_all() for run in runs],
            data=data,
            store=store,
            api_keys=os.environ.get(KEYS_VARIABLE, ""),
            host=host,
            port=port,
            engines=EngineOptions(max_engines=engines, scratch=scratch),
            pruning=PruningOptions(max_replicas=pruners, check_latency=check),
        )
        if address not in ("local", "auto") and not _HOST_AND_PORT.fullmatch(address):
            raise RequestError(f"--address must be local, auto or HOST:PORT, got {address!r}")
        from cluster.local_ray import connect, local_ray
        from serve.proxy import ENVIRONMENT
        from serve.running import run_app
        from unicuco.pipeline import Run

        for _, folder in config.runs:  # one line here instead of a replica's trace
            Run.open(Path(folder))
        if not debug:
            logging.getLogger("ray.serve").setLevel(logging.ERROR)

        def tell(url: str) -> None:
            document = {"url": url, "runs": [name for name, _ in config.runs]}
            terminal.show(document, f"[bold]{url}[/bold] answers; docs at {url}/docs")

        os.environ.update(ENVIRONMENT)
        with local_ray(_OBJECTS_BYTES) if address == "local" else nullcontext():
            if address != "local":
                connect(address=address, runtime_env={"env_vars": ENVIRONMENT})
            run_app(config, on_ready=tell)
