"""Runs commands of this project in memory that is their modules' and so many bytes more.

``python -m tests.cluster.capped BYTES MODULES PROGRAM COMMANDS REPORT``: MODULES (with commas) are
those that the commands import anyway, PROGRAM is the module whose ``main`` runs them one after the
other, COMMANDS are lists of words as JSON. The limit, RLIMIT_DATA, is on private memory, be it
touched or not, and every process started meanwhile is under it too. The file REPORT gets it and the
exit codes, as JSON.
"""

from __future__ import annotations

import json
import resource
import sys
from importlib import import_module
from pathlib import Path

import psutil
import torch


def main(allowance: str, modules: str, program: str, commands: str, report: str) -> None:
    for name in (*modules.split(","), program):
        import_module(name)
    torch.ones(64, 64) @ torch.ones(64, 64)  # what the library takes for itself at first use
    limit = psutil.Process().memory_info().data + int(allowance)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    codes = [sys.modules[program].main(words) for words in json.loads(commands)]
    Path(report).write_text(json.dumps({"limit": limit, "codes": codes}), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
