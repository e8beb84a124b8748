"""Runs commands of this project in memory that is their modules' and so many bytes more.

``python -m tests.cluster.capped BYTES MODULES PROGRAM COMMANDS REPORT``: MODULES (with commas) are
those that the commands import anyway, PROGRAM is the module whose ``main`` runs them one after the
other, COMMANDS are lists of words as JSON. The limit, RLIMIT_DATA, is on private memory, be it
touched or not, and every process started meanwhile is under it too. The file REPORT gets it and the
exit codes, as JSON.

Ray's actors get limits of their own, as many bytes beyond what each of their processes takes when
it has imported what a shard needs (`cap_worker`).
"""

from __future__ import annotations

import json
import os
import resource
import sys
from importlib import import_module
from pathlib import Path
from typing import Final

import psutil
import torch

_ALLOWANCE: Final = "CAPPED_BYTES"
_HOOK: Final = "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR"  # Ray runs what it names in each worker
_SHARDS: Final = "unicuco.shards.evaluator,transformers.models.llama.modeling_llama"


def main(allowance: str, modules: str, program: str, commands: str, report: str) -> None:
    os.environ |= {_ALLOWANCE: allowance, _HOOK: f"{__spec__.name}.{cap_worker.__name__}"}
    limit = cap(allowance, f"{modules},{program}")
    codes = [sys.modules[program].main(words) for words in json.loads(commands)]
    Path(report).write_text(json.dumps({"limit": limit, "codes": codes}), encoding="utf-8")


def cap_worker() -> None:
    """Limit one of Ray's processes."""
    cap(os.environ[_ALLOWANCE], _SHARDS)


def cap(allowance: str, modules: str) -> int:
    """Import modules, then limit this process to so many bytes more; return the limit."""
    for name in modules.split(","):
        import_module(name)
    torch.ones(64, 64) @ torch.ones(64, 64)  # what the library takes for itself at first use
    limit = psutil.Process().memory_info().data + int(allowance)
    inherited = resource.getrlimit(resource.RLIMIT_DATA)[1]
    if inherited != resource.RLIM_INFINITY:
        limit = min(limit, inherited)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    return limit


if __name__ == "__main__":
    main(*sys.argv[1:])
