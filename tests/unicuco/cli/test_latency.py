from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from unicuco.cli.latency_check import describe_check
from unicuco.objectives import LatencyModel
from unicuco.pipeline import LatencyCheck
from unicuco.pipeline.latency_file import save_latency

pytestmark = pytest.mark.xdist_group("shapes")


@pytest.fixture(scope="module")
def run(shape_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run of shapes with a latency model that was made by hand."""
    folder = shutil.copytree(shape_run, tmp_path_factory.mktemp("latency") / "run")
    digest = json.loads((folder / "run.json").read_text())["base_model"]["digest"]
    model = LatencyModel(batches=(1, 8), coefficients=((1, 0, 1e-3, 0, 1e-3), (2, 0, 0.01, 0, 0)))
    save_latency(folder, model, base_digest=digest, measured={"machine": {"threads": 1}})
    return folder


@pytest.mark.slow
def test_a_latency_is_planned_and_cut_by_its_bound(
    unicuco, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = json.loads(unicuco("plan", run, "--sparsity", 0, "--json").stdout)
    whole = dense["predicted"]["latency"]
    assert whole["ms_per_token"] == whole["dense_ms_per_token"]
    bound = round(0.8 * whole["ms_per_token"], 3)
    asked = ("--max-latency-ms", bound, "--batch", 1)
    plan = json.loads(unicuco("plan", run, *asked, "--json").stdout)
    assert plan["request"] == {"max_latency_ms": bound, "batch": 1}
    assert plan["served_as"] == "shrink"
    latency = plan["predicted"]["latency"]
    assert latency["batch"] == 1
    assert latency["ms_per_token"] <= bound < latency["dense_ms_per_token"]
    assert "ms per token" in unicuco("plan", run, *asked).stdout
    cut = unicuco("prune", run, *asked, "--no-check", "--out", tmp_path / "one", "--json")
    assert json.loads(cut.stdout) == {**plan, "out": str(tmp_path / "one")}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # no vLLM
    cut = unicuco("prune", run, *asked, "--out", tmp_path / "two", "--json")
    assert "not installed" in json.loads(cut.stdout)["measured"]["latency"]["error"]
    assert (tmp_path / "two" / "config.json").is_file()


@pytest.mark.slow
def test_requests_in_a_file_may_be_of_latency(unicuco, run: Path, tmp_path: Path) -> None:
    lines = ['{"max_latency_ms": 1000}', '{"max_latency_ms": 0.001, "batch": 8}']
    (tmp_path / "asked.jsonl").write_text("\n".join(lines))
    result = unicuco("plan", run, "--requests", tmp_path / "asked.jsonl", "--json")
    first, second = json.loads(result.stdout)["answers"]
    assert first["sparsity"] == 0
    assert "the smallest variant of this run takes" in second["error"]["message"]
    assert second["error"]["nearest"] > 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (("plan", "--max-latency-ms", 0.5), 3, "the smallest variant of this run takes"),
        (("plan", "--max-latency-ms", 5, "--batch", 9), 3, "batch 9 lies outside what was measur"),
        (("plan", "--max-latency-ms", 0), 2, "must be above 0 ms per token"),
        (("plan", "--max-latency-ms", 5, "--context", 9), 2, "context goes with max_total_bytes"),
        (("plan", "--sparsity", 0.5, "--batch", 9), 2, "max_total_bytes or max_latency_ms"),
        (("latency", "--batches", "1,x"), 2, "--batches takes numbers with commas between"),
        (("latency", "--batches", "1.5"), 2, "--batches takes whole numbers"),
        (("latency", "--batches", "4,1"), 2, "batches must differ and rise"),
    ],
)
def test_what_can_not_be_done_is_said_in_one_line(
    unicuco, run: Path, words: tuple[object, ...], code: int, line: str
) -> None:
    command, *rest = words
    result = unicuco(command, run, *rest)
    assert result.code == code
    assert line in " ".join(result.stderr.split())
    assert result.stdout == ""


def test_masks_have_no_latency_of_their_own(unicuco, tiny_run: Path) -> None:
    for words in (("latency", tiny_run), ("plan", tiny_run, "--max-latency-ms", 5)):
        result = unicuco(*words)
        assert result.code == 3
        assert "masks, which are as fast as the dense model" in result.stderr


def test_predicted_and_measured_stand_in_one_line() -> None:
    check = LatencyCheck(batch=4, predicted_ratio=0.61, measured_ratio=0.634, ms=3.17, dense_ms=5.0)
    assert describe_check(check) == (
        "time per token at batch 4: predicted 0.610 of the dense model's, measured 0.634 "
        "(3.17 of 5 ms)"
    )
