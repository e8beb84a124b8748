"""The comparison benchmark end to end on a tiny model: files, going on, report, tasks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import common, jobs, ledger, quality, second_model, tasks
from benchmarks.ledger import Ledger, Once, Record, Setting
from benchmarks.report import Method, claims, load_methods
from unicuco.models import load_model
from unicuco.models.structure import profile_model

WORDS = ("--tokens", "256", "--test-tokens", "512", "--sparsity", "0.5,0.7", "--seeds", "1")


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(ledger, "RESULTS", tmp_path / "results")
    for module in (jobs, ledger, second_model, tasks):
        monkeypatch.setattr(module, "WORK", tmp_path / "work")
    jobs.arena.cache_clear()
    return tmp_path / "results" / "quality" / "tiny-256"


def record(seed: int, sparsity: float, kl: float, **fields: object) -> Record:
    values: dict[str, object] = {
        "seed": seed,
        "sparsity": sparsity,
        "kl": kl,
        "perplexity": 10.0,
        "search_kl": kl,
        "seconds": 2.0,
        "wall_s": 4.0,
        "units": 300.0,
        "evaluations": 300,
        "curve": [],
    }
    return Record(**{**values, **fields})  # type: ignore[arg-type]


@pytest.mark.slow
def test_parts_are_measured_once_kept_in_files_and_reported(
    tiny_llama: Path, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("uniform", "fisher", "descent", "report", "--model", str(tiny_llama), *WORDS)
    quality.main(words)
    document = json.loads((results / "descent.json").read_text())
    assert document["kind"] == "per request"
    assert {(r["seed"], r["sparsity"]) for r in document["records"]} == {(0, 0.5), (0, 0.7)}
    assert all(r["units"] == 36 and r["curve"] for r in document["records"])
    assert document["once"][0]["units"] == pytest.approx(5, abs=0.1)
    assert (results / "totals-0.5.png").is_file()
    assert (results / "curves.png").is_file()
    assert "| descent | per request |" in (results / "report.md").read_text()
    capsys.readouterr()
    quality.main(words)
    assert "seed 0" not in capsys.readouterr().out, "nothing is measured again"


@pytest.mark.slow
def test_tasks_are_measured_on_kept_strategies_and_the_dense_model(
    tiny_llama: Path, results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--model", str(tiny_llama), *WORDS, "--items", "6", "--tasks", "continuation")
    quality.main(("uniform", "tasks", *words))
    found = json.loads((results / "tasks.json").read_text())["accuracy"]
    assert set(found) == {
        f"continuation/{label}/seed0" for label in ("dense", "uniform-0.5", "uniform-0.7")
    }
    assert all(0 <= value <= 1 for value in found.values())
    assert "| uniform-0.5 |" in capsys.readouterr().out

    def on_another_machine() -> None:
        shutil.rmtree(tmp_path / "work")
        jobs.arena.cache_clear()

    records = (results / "uniform.json").read_bytes()
    on_another_machine()
    (results / "tasks.json").unlink()
    quality.main(("uniform", "tasks", "report", *words))
    assert json.loads((results / "tasks.json").read_text())["accuracy"] == found
    assert (results / "uniform.json").read_bytes() == records
    assert "| uniform-0.5 |" in (results / "report.md").read_text()
    on_another_machine()
    capsys.readouterr()
    quality.main(("uniform", "tasks", *words))
    assert "seed 0 uniform" not in capsys.readouterr().out, "nothing is found again for nothing"


@pytest.mark.parametrize(
    ("words", "said"),
    [(("evopres",), "no part evopres"), (("--tasks", "mmlu"), "no task mmlu")],
)
def test_unknown_parts_and_tasks_are_one_line(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(SystemExit, match=said):
        quality.main(words)


def test_what_is_no_multiple_choice_is_refused_in_one_line_that_names_the_task() -> None:
    from benchmarks.harness import LocalModel

    model = LocalModel(None, None, 8)  # type: ignore[arg-type]  # neither is looked at
    request = SimpleNamespace(task_name="gsm8k")
    with pytest.raises(SystemExit, match=r"task gsm8k asks for generated text.* multiple_choice"):
        model.generate_until([request])
    with pytest.raises(SystemExit, match="likelihood of whole texts"):
        model.loglikelihood_rolling([request])


def test_a_ledger_of_another_setting_is_begun_anew(results: Path) -> None:
    setting = Setting(model="tiny", tokens=256, test_tokens=512)
    once = Once(seed=0, seconds=1.0, wall_s=1.0, units=5.0)
    Ledger(setting, "x", "one-shot").add([record(0, 0.5, 1.0)], once)
    assert Ledger(setting, "x", "one-shot").has(0, (0.5,))
    assert not Ledger(setting, "x", "one-shot").has(0, (0.5, 0.6))
    other = Setting(model="tiny", tokens=256, test_tokens=1024)
    assert not Ledger(other, "x", "one-shot").has(0, (0.5,))


def test_totals_count_what_is_paid_once_and_a_curve_says_where_it_crosses(results: Path) -> None:
    setting = Setting(model="tiny", tokens=256, test_tokens=512)
    rows: dict[str, tuple[list[Record], float]] = {
        "stratnet": ([record(s, 0.5, 0.4, seconds=0.0, units=0.0) for s in range(3)], 100.0),
        "owl": ([record(0, 0.5, 0.8)], 1.0),
        "uniform": ([record(0, 0.5, 1.0)], 1.0),
        "evopress": (
            [record(s, 0.5, 0.35, curve=[[1, 1.0], [90 + s, 0.4], [200, 0.35]]) for s in range(3)],
            1.0,
        ),
    }
    for name, (records, seconds) in rows.items():
        for seed in {r.seed for r in records}:
            own = [r for r in records if r.seed == seed]
            once = Once(seed=seed, seconds=seconds, wall_s=seconds, units=5.0)
            Ledger(setting, name, "").add(own, once)
    methods = load_methods(setting, list(rows))
    assert isinstance(methods["stratnet"], Method)
    assert methods["stratnet"].total_s(64) == 100.0
    assert methods["evopress"].total_s(64) == 1.0 + 64 * 2.0
    assert methods["evopress"].crossing(0.5, 0.4) == 91
    assert methods["evopress"].crossing(0.5, 0.3) is None
    text = claims(methods, [0.5])
    assert "| 0.5 | evopress | 0.500 (owl) |" in text
    assert "| 91 |" in text
    assert "1.3 times evopress's speed" in text


@pytest.mark.slow
def test_the_second_model_is_trained_from_local_text_and_profiled(
    tmp_path: Path, tiny_text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "train.txt").write_text(3 * tiny_text_file.read_text())
    monkeypatch.setattr(second_model, "_TEXTS", texts)
    second_model.train(second_model.SECOND, tmp_path / "model", minutes=1.0, steps=2)
    profile = load_model(tmp_path / "model").profile
    assert profile.architecture == "Qwen2ForCausalLM"
    assert (profile.num_blocks, len(profile.sites)) == (6, 42)
    assert 1e6 < profile.total_params < 3e6


def test_the_smaller_model_has_the_reference_model_s_kinds_of_sites() -> None:
    smaller = profile_model(second_model.build(second_model.SMALLER, 0).eval(), digest="")
    reference = load_model("reference").profile
    kinds = [{site.path.split(".", 3)[3] for site in one.sites} for one in (smaller, reference)]
    assert kinds[0] == kinds[1]
    assert (smaller.num_blocks, len(smaller.sites)) == (4, 28)
    assert smaller.total_params < 0.3 * reference.total_params


def test_the_second_model_without_its_text_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(second_model, "_TEXTS", tmp_path / "none")
    with pytest.raises(SystemExit, match="WikiText-2"):
        second_model.resolve(second_model.SECOND)


def test_provenance_names_no_place() -> None:
    assert "/" not in json.dumps(common.provenance())
