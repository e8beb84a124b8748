from __future__ import annotations

import json
from pathlib import Path

import pytest

from unicuco.testing import tiny_model_folder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bits-cli") / "model"
    return tiny_model_folder(folder, hidden_size=64, num_heads=2, num_kv_heads=1)


def document(result) -> dict:
    assert result.code == 0, result.stderr
    return json.loads(result.stdout)


def test_bits_from_the_command_line(
    unicuco, model: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    learning = ("--calibration", tiny_text_file, "--tokens", 256, "--evaluations", 8)
    bits = ("--dimensions", "weight_bits,kv_bits", "--granularity", "block", "--address", "none")
    assert unicuco("learn", model, "--out", run, *learning, *bits).code == 0
    asked = ("--max-total-bytes", 300_000, "--context", 64, "--batch", 4)
    plan = document(unicuco("plan", run, *asked, "--json"))
    assert plan["request"] == {"max_total_bytes": 300_000, "context": 64, "batch": 4}
    assert plan["served_as"] == "quantised"
    assert plan["total_bytes"] == plan["bytes"] + plan["kv_bytes"] <= 300_000
    out = tmp_path / "variant"
    cut = document(unicuco("prune", run, *asked, "--out", out, "--json"))
    assert cut == {**plan, "out": str(out)}
    assert document(unicuco("evaluate", out, "--reference", model, "--tokens", 512, "--json"))["kl"]
    small = unicuco("plan", run, "--max-total-bytes", 10, "--context", 64)
    assert small.code == 3
    assert "max_total_bytes 10 can't be met; the nearest that can is" in small.stderr
    for words, code, line in (
        (("--sparsity", 0.5, "--context", 8), 2, "context goes with max_total_bytes"),
        (("--max-total-bytes", 300_000, "--batch", 0), 2, "batch must be a whole number above 0"),
        (("--max-packed-bytes", 1.5), 2, "max_packed_bytes must be a whole number"),
        (("--sparsity", 0.5), 3, "did not learn sparsity"),
    ):
        result = unicuco("plan", run, *words)
        assert result.code == code
        assert line in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--dimensions", "weight_bits,width"), "not learned together"),
        (("--dimensions", "sparsity", "--rounding", "gptq"), "rounding is of weight_bits"),
        (("--dimensions", "weight_bits", "--rounding", "down"), "rounding must be one of"),
    ],
)
def test_wrong_words_end_with_2_and_no_folder(
    unicuco, model: Path, tmp_path: Path, words: tuple[str, ...], line: str
) -> None:
    result = unicuco("learn", model, "--out", tmp_path / "run", *words)
    assert result.code == 2
    assert line in " ".join(result.stderr.split())
    assert not (tmp_path / "run").exists()
