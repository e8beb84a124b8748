from __future__ import annotations

from pathlib import Path

import pytest

from unicuco.cli import demo
from unicuco.cli.demo_requests import NUM_REQUESTS, demo_requests
from unicuco.cli.demo_rivals import SearchCost
from unicuco.engines import ENGINES
from unicuco.testing.echo import EchoEngine
from unicuco.types import Target


def test_the_64_requests_differ_and_are_of_every_kind_that_masks_answer() -> None:
    requests = demo_requests(total_params=7_000_000, site_params=5_000_000, num_bytes=14_000_000)
    assert len(set(requests)) == len(requests) == NUM_REQUESTS == 64
    others = {Target.MAX_TOTAL_BYTES, Target.MAX_PACKED_BYTES, Target.MAX_LATENCY_MS}
    assert {request.target for request in requests[:5]} == set(Target) - others


def test_a_search_is_scaled_from_what_was_timed() -> None:
    cost = SearchCost(timed_units=10.0, timed_s=4.0, units=300)
    assert cost.seconds == 120.0
    assert "10 units timed at 4.0 s" in cost.describe()


def test_a_folder_that_no_demo_made_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    assert demo.main(["--out", str(tmp_path)]) == 1
    assert (tmp_path / "thesis.txt").exists()
    assert "--out" in capsys.readouterr().err


@pytest.mark.slow
def test_the_demo_runs_through_and_ends_with_its_summary(
    tiny_llama: Path,
    tiny_text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(ENGINES, "vllm", EchoEngine)  # type: ignore[misc]  # vLLM has tests of its own
    out = tmp_path / "demo"
    words = ["--out", out, "--model", tiny_llama, "--calibration", tiny_text_file]
    words += ["--text", tiny_text_file, "--evaluations", 4, "--tokens", 256, "--test-tokens", 512]
    assert demo.main([str(word) for word in words]) == 0
    summary = capsys.readouterr().out.split(" summary ")[1]
    for name in ("dense", "uniform", "fisher", "stratnet", "break-even", "per request", "vLLM"):
        assert name in summary
    for name in ("run/front.png", "run/strategies.png", "variant-60/strategy.json"):
        assert (out / name).is_file()
