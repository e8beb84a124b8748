from __future__ import annotations

from pathlib import Path

import pytest

from unicuco.pipeline import (
    LearnOptions,
    LocalBackend,
    Progress,
    Run,
    evaluation,
    learn,
    learning,
)


def tiny_options(model: Path, out: Path, text: Path, **changes: object) -> LearnOptions:
    """Options of the smallest run worth the name."""
    fields: dict[str, object] = {
        "model": str(model),
        "out": out,
        "calibration": text,
        "tokens": 256,
        "context": 32,
        "evaluations": 6,
        "seed": 3,
    }
    return LearnOptions(**{**fields, **changes})  # type: ignore[arg-type]


def ignore_progress(step: Progress) -> None:
    """Tell nobody."""


@pytest.fixture(scope="session")
def learned(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_text_file: Path
) -> tuple[Run, list[Progress]]:
    """A run of six evaluations on the tiny model, with what was told while it was learned."""
    out = tmp_path_factory.mktemp("runs") / "tiny-run"
    told: list[Progress] = []
    options = tiny_options(tiny_llama, out, tiny_text_file)
    return learn(options, backend=LocalBackend(), progress=told.append), told


@pytest.fixture(scope="session")
def run(learned: tuple[Run, list[Progress]]) -> Run:
    """The run. Read it, never write into its folder."""
    return learned[0]


@pytest.fixture(scope="session")
def shapes(shape_run: Path) -> Run:
    """The run of shapes. Read it, never write into its folder."""
    return Run.open(shape_run)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last training and reports in a moment, for tests of everything around them."""
    monkeypatch.setattr(learning, "_FINAL_STEPS", 20)
    monkeypatch.setattr(learning, "_VALIDATION_POINTS", 4)
    monkeypatch.setattr(evaluation, "DEFAULT_TOKENS", 1024)
