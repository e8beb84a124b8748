from __future__ import annotations

from pathlib import Path

import pytest

from unicuco.testing.cases import EvaluationCase, make_evaluation_case, trained_model_folder


@pytest.fixture(scope="session")
def case(tiny_llama: Path) -> EvaluationCase:
    """The tiny random Llama at layer granularity. Build evaluators of it, change nothing."""
    return make_evaluation_case(tiny_llama)


@pytest.fixture(scope="session")
def trained_folder(tmp_path_factory: pytest.TempPathFactory, tiny_text_file: Path) -> Path:
    """A tiny Llama trained for seconds on the text file: 3 blocks, 21 sites."""
    folder = tmp_path_factory.mktemp("trained") / "llama"
    return trained_model_folder(folder, tiny_text_file.read_text(encoding="utf-8"))
