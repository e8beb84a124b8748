from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from unicuco.engines import VllmEngine, VllmOptions
from unicuco.testing.tiny import tiny_model_folder
from unicuco.testing.variants import make_variant_case

# vLLM's CPU attention knows head sizes from 32 on.
SIZES = {"hidden_size": 128, "num_heads": 4, "num_kv_heads": 2}


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines") / "dense"
    return tiny_model_folder(folder, context=256, tied=True, dtype=torch.bfloat16, **SIZES)


@pytest.fixture(scope="session")
def misfit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines") / "misfit"
    return tiny_model_folder(
        folder, context=256, tied=True, dtype=torch.bfloat16, num_blocks=1, **SIZES
    )


@pytest.fixture(scope="session")
def variant_folder(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("engines") / "variant"
    make_variant_case(model_folder, dtype=torch.bfloat16).write(folder)
    return folder


def _own_state() -> tuple[dict[str, str], bool, int]:
    """What vLLM would change in a process that imports it."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}
    return environment, "vllm" in sys.modules, torch.get_num_threads()


@pytest.fixture(scope="session")
def vllm_engine(model_folder: Path) -> Iterator[VllmEngine]:
    """The one vLLM engine of all tests: a start costs up to a minute."""
    before = _own_state()
    with VllmEngine(VllmOptions(threads=1)) as engine:
        engine.load(model_folder)
        pid = engine.pid
        assert _own_state() == before  # the caller's process is left alone
        yield engine
    assert engine.pid is None
    assert not Path(f"/proc/{pid}").exists()
