from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from unicuco.errors import TextError
from unicuco.reference import corpus
from unicuco.reference.corpus import (
    HELD_OUT,
    TEXT_NAMES,
    digest,
    held_out_text,
    standard_library,
    training_texts,
)


def test_the_four_texts_share_no_module() -> None:
    assert set(HELD_OUT) == set(TEXT_NAMES) == {"calibration", "search", "validation", "test"}
    for one, other in itertools.combinations(TEXT_NAMES, 2):
        assert not set(HELD_OUT[one]) & set(HELD_OUT[other])


def test_the_four_texts_share_no_passages_but_a_licence_and_a_docstring() -> None:
    def passages(name: corpus.TextName) -> set[str]:
        lines = [line.strip() for line in held_out_text(name).splitlines() if line.strip()]
        return {"\n".join(lines[k : k + 8]) for k in range(len(lines) - 8)}

    for one, other in itertools.combinations(TEXT_NAMES, 2):
        shared = passages(one) & passages(other)
        assert len(shared) < 0.002 * len(passages(one)), (one, other)


@pytest.mark.parametrize("name", TEXT_NAMES)
def test_every_text_is_there_and_long_enough(name: corpus.TextName) -> None:
    text = held_out_text(name)
    assert len(text) > 100_000
    assert "def " in text
    assert digest(text) == digest(held_out_text(name))
    assert len({digest(held_out_text(other)) for other in TEXT_NAMES}) == 4


def test_no_held_out_module_and_no_test_package_is_trained_on() -> None:
    root = standard_library()
    held_out = {m: (root / m).read_text("utf-8", "replace") for ms in HELD_OUT.values() for m in ms}
    training = set(training_texts())
    assert len(training) > 300
    assert sum(map(len, training)) > 3_000_000
    for module, text in held_out.items():
        assert text not in training, module
    tests = [p for p in root.rglob("test_*.py") if {"test", "tests", "idle_test"} & {*p.parts}]
    assert not [p for p in tests[:50] if p.read_text("utf-8", "replace") in training]


def test_training_texts_come_in_the_same_order_every_time() -> None:
    assert [digest(text) for text in training_texts()] == [
        digest(text) for text in training_texts()
    ]


def test_a_python_without_the_modules_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "standard_library", lambda: tmp_path)
    with pytest.raises(TextError, match=r"test text needs argparse\.py.*use a complete Python"):
        held_out_text("test")


def test_the_corpus_needs_no_torch() -> None:
    code = (
        "import sys; from unicuco.reference.corpus import held_out_text; held_out_text('test');"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
