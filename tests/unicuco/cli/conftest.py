"""Running commands in this process, with their exit code and both streams."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from unicuco.cli import main


@dataclass(frozen=True, slots=True)
class Result:
    """How a command ended and what it printed."""

    code: int
    stdout: str
    stderr: str


Runner = Callable[..., Result]


@pytest.fixture(autouse=True)
def _environment_restored() -> Iterator[None]:
    # Commands quieten libraries through the environment of their process.
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def unicuco(capfd: pytest.CaptureFixture[str]) -> Runner:
    """Run ``unicuco`` with the given words."""

    def run(*words: object) -> Result:
        capfd.readouterr()
        code = main([str(word) for word in words])
        captured = capfd.readouterr()
        return Result(code=code, stdout=captured.out, stderr=captured.err)

    return run
