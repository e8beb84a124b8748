"""What an actor's process holds in memory."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.slow
def test_a_learner_loads_no_transformers() -> None:
    code = "import sys, cluster.actors, unicuco.search; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
