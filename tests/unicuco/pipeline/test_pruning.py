"""What a process that only cuts has in memory; what it cuts is tested with the variants."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.slow
def test_planning_and_cutting_load_no_transformers() -> None:
    code = (
        "import sys; from unicuco.pipeline import Run, prune; "
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
