"""``unicuco compare`` for real, on a tiny model."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path

import pytest

from tests.unicuco.cli.test_commands import one_document, one_line

FIELDS = {
    "allocator", "sparsity", "kl", "perplexity", "seconds_per_request", "evaluations", "seed",
}  # fmt: skip


@pytest.fixture
def words(tiny_llama: Path, tiny_text_file: Path) -> tuple[object, ...]:
    texts = ("--calibration", tiny_text_file, "--text", tiny_text_file)
    limits = ("--tokens", 256, "--test-tokens", 512, "--address", "none")
    return ("compare", tiny_llama, *texts, *limits)


def test_every_kind_of_allocator_is_measured_at_every_sparsity(
    unicuco, words, tiny_run: Path, tmp_path: Path
) -> None:
    names = ["uniform", "fisher", "atp", "descent", "stratnet"]
    plot = tmp_path / "plot.png"
    asked = ("--allocators", ",".join(names), "--sparsity", "0.5,0.7", "--run", tiny_run)
    document = one_document(unicuco(*words, *asked, "--plot", plot, "--seed", 4, "--json"))
    assert set(document) == {"results"}
    results = document["results"]
    assert [(r["allocator"], r["sparsity"]) for r in results] == [
        (name, sparsity) for name in names for sparsity in (0.5, 0.7)
    ]
    for result in results:
        assert set(result) == FIELDS
        assert result["kl"] > 0
        assert result["perplexity"] > 1
        assert result["seconds_per_request"] > 0
        assert result["seed"] == 4
    counts = {r["allocator"]: r["evaluations"] for r in results}
    assert counts == {"uniform": 0, "fisher": 0, "atp": 9, "descent": 12, "stratnet": 6}
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_people_get_a_table_that_says_what_it_was_measured_on(unicuco, words) -> None:
    result = unicuco(*words, "--allocators", "uniform,fisher", "--sparsity", "0.5")
    assert result.code == 0, result.stderr
    assert "per request" in result.stdout
    assert "512 tokens of unseen text" in result.stdout


def test_what_is_kept_is_gone_on_with_and_not_evaluated_again(
    unicuco, words, tmp_path: Path
) -> None:
    out = tmp_path / "kept"
    asked = ("--allocators", "descent", "--sparsity", "0.5", "--out", out, "--json")
    first = one_document(unicuco(*words, *asked))["results"]
    finished = _finished_at(out)
    again = one_document(unicuco(*words, *asked))["results"]
    assert _finished_at(out) == finished
    assert len(finished) == 12
    assert [r["kl"] for r in again] == [r["kl"] for r in first]
    other = unicuco(*words, *asked, "--seed", 1)
    assert other.code == 1
    assert "another seed" in one_line(other)


def _finished_at(out: Path) -> list[float]:
    with sqlite3.connect(out / "descent-0.5.db") as database:
        rows = database.execute("SELECT finished_at FROM evaluations ORDER BY round").fetchall()
    return [row[0] for row in rows]


@pytest.mark.slow
def test_without_a_run_one_is_learned_first_and_that_is_said(
    unicuco, words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unicuco.pipeline import learning, options

    monkeypatch.setattr(learning, "_FINAL_STEPS", 20)
    monkeypatch.setitem(options.DEFAULT_EVALUATIONS, "default", 4)  # type: ignore[misc]
    out = tmp_path / "kept"
    asked = ("--allocators", "stratnet", "--sparsity", "0.5", "--out", out)
    assert "learned first" in unicuco(*words, *asked).stdout
    assert (out / "run" / "run.json").is_file()
    document = one_document(unicuco(*words, *asked, "--json"))
    assert document["results"][0]["evaluations"] == 4


def test_a_sparsity_beyond_the_run_or_the_space_ends_with_3(
    unicuco, words, tiny_run: Path, tmp_path: Path
) -> None:
    for name in ("stratnet", "uniform", "atp"):
        asked = ("--allocators", name, "--sparsity", "0.99", "--run", tiny_run, "--json")
        result = unicuco(*words, *asked)
        assert result.code == 3, name
        one_line(result)
    assert list(tmp_path.iterdir()) == []


def test_bad_texts_runs_and_folders_are_one_line_and_leave_nothing(
    unicuco, words, tiny_run: Path, tmp_path: Path
) -> None:
    short, empty, full = tmp_path / "short.txt", tmp_path / "empty.txt", tmp_path / "full"
    short.write_text("x")
    empty.write_text("")
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    broken = tmp_path / "run"
    shutil.copytree(tiny_run, broken)
    manifest = json.loads((broken / "run.json").read_text())
    (broken / "run.json").write_text(json.dumps({**manifest, "format": 99}))
    out = tmp_path / "out"
    for extra, said in (
        (("--text", short), "too short"),
        (("--text", empty), "empty"),
        (("--text", tmp_path / "none.txt"), "none.txt"),
        (("--calibration", short), "too short"),
        (("--run", broken), "format 99"),
        (("--out", full), "not empty"),
    ):
        asked = ("--allocators", "uniform", "--sparsity", "0.5", "--json")
        kept = () if "--out" in extra else ("--out", out)
        result = unicuco(*words, *asked, *kept, *extra)
        assert result.code == 1, extra
        assert said in one_line(result)
        left = list(out.glob("**/*.db")) if out.exists() else []
        assert left == []
    assert [path.name for path in full.iterdir()] == ["mine.txt"]
