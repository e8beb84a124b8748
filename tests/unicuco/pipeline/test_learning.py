from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.unicuco.pipeline.conftest import ignore_progress, tiny_options
from unicuco.errors import (
    AllocationError,
    ModelError,
    RequestError,
    RunError,
    SurrogateError,
    TextError,
)
from unicuco.evaluate import LocalEvaluator
from unicuco.pipeline import LearnOptions, LocalBackend, Progress, Run, learn, learning
from unicuco.pipeline.files import save_json
from unicuco.pipeline.report import learning_curve, write_report
from unicuco.ranks import RankStore
from unicuco.search.screening import ALTERNATIVES
from unicuco.store import EvaluationStore
from unicuco.surrogate import TextForecast
from unicuco.testing.tiny import tiny_model_folder
from unicuco.types import Evaluation, Plan, Request, Strategy, Target

Learn = Callable[..., Run]


def recorded(folder: Path) -> list[tuple[Strategy, Any]]:
    with EvaluationStore.open(folder / "evaluations.db", create=False) as store:
        return [(ask.strategy, outcome) for ask, outcome in store.read()]


def values(folder: Path) -> list[tuple[str, float, Any]]:
    """What must be equal between runs: everything but times."""
    return [(s.key, outcome.kl, outcome.gradient) for s, outcome in recorded(folder)]


@pytest.fixture
def learn_tiny(tiny_llama: Path, tiny_text_file: Path, tmp_path: Path, quick: None) -> Learn:
    def act(progress: Callable[[Progress], None] = ignore_progress, **changes: object) -> Run:
        model, text = changes.pop("model", tiny_llama), changes.pop("calibration", tiny_text_file)
        assert isinstance(model, Path)
        assert isinstance(text, Path)
        options = tiny_options(model, tmp_path / "run", text, **changes)
        return learn(options, backend=LocalBackend(), progress=progress)

    return act


# --- what a finished run is ---------------------------------------------------------------------


def test_a_run_folder_holds_what_it_says(run: Run) -> None:
    names = {path.name for path in run.folder.iterdir()}
    assert names >= {
        "run.json",
        "evaluations.db",
        "ranks",
        "stratnet.safetensors",
        "surrogate.safetensors",
        "fisher.safetensors",
        "front.json",
        "front.png",
        "strategies.png",
    }
    assert not [name for name in names if name.startswith(".")], "no temporary file is left"
    for picture in ("front.png", "strategies.png"):
        with Image.open(run.folder / picture) as image:
            assert min(image.size) > 300


def test_the_manifest_names_model_data_versions_seed_and_options(
    run: Run, tiny_llama: Path
) -> None:
    manifest = run.manifest
    assert manifest["base_model"]["digest"] == run.profile.digest
    assert Path(manifest["base_model"]["path"]) == tiny_llama.resolve()
    assert len({manifest["data"][name] for name in manifest["data"]}) == 4
    assert manifest["seed"] == 3
    assert manifest["options"]["pruner"] == "wanda"
    assert manifest["options"]["context"] == 32
    assert set(manifest["versions"]) >= {"unicuco", "torch", "transformers", "gpytorch"}
    assert (manifest["evaluations"], manifest["failed"]) == (6, 0)
    assert manifest == json.loads((run.folder / "run.json").read_text(encoding="utf-8"))


def test_every_evaluation_is_recorded_once_with_its_cost(run: Run) -> None:
    results = recorded(run.folder)
    assert len({strategy.key for strategy, _ in results}) == len(results) == 6
    for strategy, outcome in results:
        assert isinstance(outcome, Evaluation)
        assert outcome.strategy_key == strategy.key
        assert outcome.kl > 0
        assert outcome.gradient is not None
        assert len(outcome.gradient) == run.planner.space.num_axes
        assert outcome.tokens == 256
        assert outcome.text_digest == run.manifest["data"]["search"]


def test_every_pass_over_the_model_is_counted(run: Run) -> None:
    with EvaluationStore.open(run.folder / "evaluations.db", create=False) as store:
        measured = store.measurements()
    costs = {m.purpose: m for m in measured if not m.purpose.startswith("validation")}
    assert {name: m.cost_units for name, m in costs.items()} == {
        "calibration": 1.0,
        "fisher": 3.0,
        "dense search": 1.0,
        "dense validation": 1.0,
    }
    for name, text in [
        ("calibration", "calibration"),
        ("fisher", "calibration"),
        ("dense search", "search"),
        ("dense validation", "validation"),
    ]:
        assert costs[name].text_digest == run.manifest["data"][text]
    validation = [m for m in measured if m.purpose.startswith("validation")]
    assert len(validation) == 16 + 3 + 3
    total = 6 * 3 + sum(m.cost_units for m in measured)
    assert run.manifest["cost_units"] == total == 18 + 6 + 22


def test_progress_tells_every_stage_to_its_end(learned: tuple[Run, list[Progress]]) -> None:
    told = learned[1]
    stages = list(dict.fromkeys(step.stage for step in told))
    assert stages[:3] == ["load", "rank", "fisher"]
    assert stages.index("evaluate") < stages.index("train") < stages.index("validate")
    last = {step.stage: step for step in told}
    assert all(step.done == step.total for step in last.values()), last
    evaluated = [step.done for step in told if step.stage == "evaluate"]
    assert evaluated == sorted(evaluated)
    assert evaluated[-1] == 6


def test_the_front_document_keeps_predicted_and_measured_apart(run: Run) -> None:
    document = json.loads((run.folder / "front.json").read_text(encoding="utf-8"))
    assert {len(point["kl"]) for point in document["predicted"]} == {3}
    assert document["measured_on_validation"].keys() == {"stratnet", "uniform", "fisher"}
    front = run.front()
    assert [point.sparsity for point in front] == sorted(point.sparsity for point in front)
    assert all(0 <= point.kl.lo95 <= point.kl.mean <= point.kl.hi95 for point in front)


def test_a_run_reopens_to_the_same_answers(run: Run) -> None:
    requests = [Request.from_dict({"sparsity": 0.6}), Request.from_dict({"max_kl": 0.5})]
    assert Run.open(run.folder).plan(requests) == run.plan(requests)


def test_the_same_seed_learns_the_same(run: Run, learn_tiny: Learn) -> None:
    again = learn_tiny()
    assert values(again.folder) == values(run.folder)


@pytest.mark.parametrize(
    "changes",
    [{"granularity": "block"}, {"pruner": "magnitude"}, {"preset": "paper", "evaluations": 10}],
)
@pytest.mark.slow
def test_other_options_learn_too(
    learn_tiny: Learn, changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    from unicuco.search import paper

    monkeypatch.setattr(paper, "_STEPS", 20)
    learned = learn_tiny(**changes)
    assert learned.manifest["options"] | changes == learned.manifest["options"]
    assert math.isfinite(learned.front()[5].kl.mean)
    axes = 2 if changes.get("granularity") == "block" else 14
    assert learned.planner.space.num_axes == axes


# --- what is measured on the validation text ----------------------------------------------------


def answers_measured(run: Run) -> list[str]:
    with EvaluationStore.open(run.folder / "evaluations.db", create=False) as store:
        return [m.strategy_key for m in store.measurements() if m.purpose == "validation stratnet"]


def test_an_answer_to_several_targets_is_measured_once(
    learn_tiny: Learn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning, "_VALIDATION_POINTS", 16)
    run = learn_tiny(dimensions=("depth",), evaluations=4)
    keys = answers_measured(run)
    assert len(set(keys)) == len(keys) == len(run.validation["stratnet"])
    assert 2 <= len(keys) < 16, "there are few ways to drop layers of so few"


def test_a_short_range_is_validated_within_it(learn_tiny: Learn, tmp_path: Path) -> None:
    run = learn_tiny(max_sparsity=0.12)
    low, high = run.sparsity_range
    targets = [sparsity for sparsity, _ in run.validation["stratnet"]]
    assert low < targets[0] < targets[-1] == pytest.approx(high) == 0.12
    write_report(run, tmp_path / "report.html")
    assert "predicted KL" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_what_overflows_on_the_validation_text_is_left_out(
    learn_tiny: Learn, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = LocalEvaluator.window_kl
    calls = itertools.count()
    overflow = {0, 9}  # one of StratNet's four, and the last of Fisher's

    def window_kl(self: LocalEvaluator, strategy: Strategy, **options: Any) -> torch.Tensor:
        kl = judged(self, strategy, **options)
        return kl * math.nan if next(calls) in overflow else kl

    monkeypatch.setattr(LocalEvaluator, "window_kl", window_kl)
    run = learn_tiny()
    assert {name: len(curve) for name, curve in run.validation.items()} == {
        "stratnet": 3, "uniform": 3, "fisher": 2,
    }  # fmt: skip
    (plan,) = run.plan([Request(target=Target.SPARSITY, value=0.5)])
    assert isinstance(plan, Plan)
    assert 0 <= plan.kl.lo95 <= plan.kl.hi95 < math.inf
    shutil.rmtree(run.folder)
    overflow.update(range(10, 20))
    with pytest.raises(AllocationError, match="lower max-sparsity"):
        learn_tiny()


# --- resuming -----------------------------------------------------------------------------------


class _Stop(BaseException):
    """What ends a process from outside, as KeyboardInterrupt does."""


def stop_at(stage: str, done: int) -> Callable[[Progress], None]:
    def sink(step: Progress) -> None:
        if (step.stage, step.done) == (stage, done):
            raise _Stop

    return sink


@pytest.mark.parametrize(
    ("stage", "done"), [("evaluate", 2), ("evaluate", 6), ("train", 0), ("validate", 3)]
)
@pytest.mark.slow
def test_an_interrupted_run_goes_on_and_becomes_the_same(
    learn_tiny: Learn, run: Run, tmp_path: Path, stage: str, done: int
) -> None:
    with pytest.raises(_Stop):
        learn_tiny(stop_at(stage, done))
    before = values(tmp_path / "run")
    with pytest.raises(RunError, match="unfinished run; finish it with"):
        Run.open(tmp_path / "run")
    with pytest.raises(RunError, match="unfinished run; add --resume"):
        learn_tiny()
    resumed = learn_tiny(resume=True)
    assert values(resumed.folder)[: len(before)] == before
    assert values(resumed.folder) == values(run.folder)
    with EvaluationStore.open(resumed.folder / "evaluations.db", create=False) as store:
        measured = store.measurements()
    assert len({(m.purpose, m.strategy_key) for m in measured}) == len(measured)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"seed": 4}, "seed"),
        ({"tokens": 128}, "data and tokens"),
        ({"pruner": "magnitude"}, "pruner"),
        ({"granularity": "block"}, "granularity"),
        ({"preset": "paper"}, "preset"),
        ({"max_sparsity": 0.8}, "max_sparsity"),
        ({"context": 16}, "data and context"),
    ],
)
@pytest.mark.slow
def test_an_interrupted_run_is_not_continued_with_other_options(
    learn_tiny: Learn, tmp_path: Path, changes: dict[str, object], name: str
) -> None:
    with pytest.raises(_Stop):
        learn_tiny(stop_at("evaluate", 2))
    before = values(tmp_path / "run")
    with pytest.raises(RunError, match=f"was begun with another {name}; resume it with the same"):
        learn_tiny(resume=True, **changes)
    assert values(tmp_path / "run") == before


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_an_interrupted_run_is_not_continued_with_another_model_or_text(
    learn_tiny: Learn, tmp_path: Path, family: str
) -> None:
    with pytest.raises(_Stop):
        learn_tiny(stop_at("evaluate", 2))
    other = tiny_model_folder(tmp_path / "other", family, seed=9)
    with pytest.raises(RunError, match="was begun with another base_model"):
        learn_tiny(resume=True, model=other)
    text = tmp_path / "other.txt"
    text.write_text("what else is there to say? " * 200, encoding="utf-8")
    with pytest.raises(RunError, match="was begun with another data"):
        learn_tiny(resume=True, calibration=text)


@pytest.mark.slow
def test_a_run_interrupted_before_its_first_evaluation_keeps_to_its_options(
    learn_tiny: Learn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        # As if it were killed: nothing is cleared away.
        patch.setattr("unicuco.pipeline.run_folder._empty", lambda folder: None)
        with pytest.raises(_Stop):
            learn_tiny(stop_at("fisher", 0))
    assert RankStore.load(tmp_path / "run" / "ranks").metric == "wanda"
    with pytest.raises(RunError, match="another pruner"):
        learn_tiny(resume=True, pruner="magnitude")
    assert learn_tiny(resume=True).manifest["evaluations"] == 6


def test_a_run_that_never_began_leaves_no_folder(learn_tiny: Learn, tmp_path: Path) -> None:
    with pytest.raises(_Stop):
        learn_tiny(stop_at("rank", 0))
    assert not (tmp_path / "run").exists()


def test_an_empty_folder_stays_empty_and_new_parents_go_when_nothing_began(
    learn_tiny: Learn, tiny_text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(_Stop):
        learn_tiny(stop_at("fisher", 0))
    assert list((tmp_path / "run").iterdir()) == []
    options = tiny_options(tmp_path / "none", tmp_path / "deep" / "er" / "run", tiny_text_file)
    with pytest.raises(ModelError):
        learn(options, backend=LocalBackend(), progress=ignore_progress)
    assert not (tmp_path / "deep").exists()


def test_a_file_in_the_place_of_the_run_is_refused(learn_tiny: Learn, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("x")
    with pytest.raises(RunError, match="is a file"):
        learn_tiny()
    assert (tmp_path / "run").read_text() == "x"


@pytest.mark.slow
def test_the_manifest_comes_last_and_altered_fisher_sums_are_refused(
    learn_tiny: Learn, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(run.folder, tmp_path / "run")
    written: list[str] = []

    def note(path: Path, document: Any) -> None:
        written.append(path.name)
        save_json(path, document)

    monkeypatch.setattr("unicuco.pipeline.learning.save_json", note)
    learn_tiny(resume=True)
    assert written == ["front.json", "run.json"]
    shutil.copy(run.folder / "stratnet.safetensors", tmp_path / "run" / "fisher.safetensors")
    with pytest.raises(RunError, match="does not hold the Fisher sums"):
        learn_tiny(resume=True)


@pytest.mark.slow
def test_a_finished_run_is_extended_by_a_larger_total(
    learn_tiny: Learn, run: Run, tmp_path: Path
) -> None:
    shutil.copytree(run.folder, tmp_path / "run")
    with pytest.raises(RunError, match="already holds a run; add --resume"):
        learn_tiny()
    extended = learn_tiny(resume=True, evaluations=8)
    assert values(extended.folder)[:6] == values(run.folder)
    assert extended.manifest["evaluations"] == len(values(extended.folder)) == 8
    again = learn_tiny(resume=True, evaluations=8)
    assert values(again.folder) == values(extended.folder)


@pytest.mark.slow
def test_alternatives_on_few_tokens_have_their_own_records_and_count_their_share(
    learn_tiny: Learn, run: Run, tmp_path: Path
) -> None:
    learned = learn_tiny(screen_tokens=60, evaluations=8)
    manifest = learned.manifest
    with EvaluationStore.open(learned.folder / "evaluations.db", create=False) as store:
        results = list(store.read())
        units = sum(measured.cost_units for measured in store.measurements())
    whole = [(ask, outcome) for ask, outcome in results if ask.tokens is None]
    cheap = [(ask, outcome) for ask, outcome in results if ask.tokens is not None]
    assert [(a.strategy.key, o.kl) for a, o in whole[:6]] == [v[:2] for v in values(run.folder)]
    assert (len(whole), manifest["evaluations"]) == (8, 8)
    assert 4 <= len(cheap) == manifest["screenings"] <= 2 * ALTERNATIVES
    for _, outcome in cheap:
        assert (outcome.tokens, outcome.cost_units, outcome.gradient) == (64, 64 / 256, None)
    chosen = {ask.strategy.key for ask, _ in whole[6:]}
    assert chosen <= {ask.strategy.key for ask, _ in cheap}
    assert manifest["cost_units"] == units + 8 * 3 + len(cheap) / 4
    curve = learning_curve(learned)
    assert len(curve) == 8
    assert curve[-1].units - curve[5].units == 2 * 3 + len(cheap) / 4
    with pytest.raises(RunError, match="begun with another screen_tokens"):
        learn_tiny(resume=True, screen_tokens=30, evaluations=8)


@pytest.mark.slow
def test_a_run_is_warmed_by_another_which_need_not_stay(
    learn_tiny: Learn, run: Run, tmp_path: Path
) -> None:
    other = shutil.copytree(run.folder, tmp_path / "other")
    before = values(learn_tiny(warm_from=str(other), evaluations=4).folder)
    shutil.rmtree(other)
    again = learn_tiny(warm_from=str(other), resume=True, evaluations=6)
    assert values(again.folder)[:4] == before
    assert again.manifest["options"]["warm_from"] == str(other)
    assert values(again.folder) == values(run.folder), "rounds that know nothing yet are the same"
    forecast, cold = again.forecast(), run.forecast()
    assert isinstance(forecast, TextForecast)
    assert isinstance(cold, TextForecast)
    assert forecast.surrogate.prior is not None
    told = dict(forecast.surrogate.prior.other)
    assert all(torch.equal(told[name], tensor) for name, tensor in cold.surrogate.state().items())
    with pytest.raises(RunError, match="begun with another"):
        learn_tiny(resume=True, evaluations=6)


def test_a_run_of_another_granularity_can_not_warm(
    learn_tiny: Learn, run: Run, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match="only one of the two has"):
        learn_tiny(warm_from=str(run.folder), granularity="block", evaluations=4)
    assert not (tmp_path / "run" / "ranks").exists()


def test_a_run_that_can_not_warm_is_refused_before_anything_is_measured(
    learn_tiny: Learn, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match="is no run folder"):
        learn_tiny(warm_from=str(tmp_path / "none"), evaluations=4)
    assert not (tmp_path / "run" / "ranks").exists()


# --- refusals -----------------------------------------------------------------------------------


def test_a_folder_with_something_else_is_left_alone(learn_tiny: Learn, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match="not empty and holds no run"):
        learn_tiny()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_a_text_that_is_too_short_leaves_nothing_behind(learn_tiny: Learn, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("too short", encoding="utf-8")
    with pytest.raises(TextError, match=r"a third of it is too short.*has 3 tokens"):
        learn_tiny(calibration=text)
    with pytest.raises(TextError, match="context of 65 is too long"):
        learn_tiny(context=65)
    with pytest.raises(ModelError):
        learn_tiny(model=tmp_path / "nothing")
    with pytest.raises(RequestError, match="250 come to the whole search text in windows of 32"):
        learn_tiny(screen_tokens=250)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pruner": "wand"}, "pruner must be one of"),
        ({"granularity": "row"}, "granularity must be one of"),
        ({"preset": "best"}, "preset must be one of"),
        (
            {"dimensions": ("sparcity",)},
            "dimensions must be different names out of sparsity, depth",
        ),
        ({"dimensions": ("sparsity", "sparsity")}, "different names"),
        ({"dimensions": ("sparsity", "depth"), "pruner": "sparsegpt"}, "sparsity alone"),
        ({"shards": 2, "dimensions": ("depth",)}, "no shapes or bits: shards must be 1"),
        ({"shards": 0}, "shards must be at least 1"),
        ({"shards": 2, "pruner": "sparsegpt"}, "levels of whole models: shards must be 1"),
        ({"shards": 2, "calibration_sampling": "clustered"}, "whole model: shards must be 1"),
        ({"evaluations": 3}, "evaluations must be at least 4"),
        ({"round_size": 0}, "round-size must be at least 1"),
        ({"round_size": 8, "preset": "paper"}, "round-size is for preset default"),
        ({"round_size": 8, "dimensions": ("depth",)}, "round-size is for preset default"),
        ({"warm_from": "run", "preset": "paper"}, "warm-from is for preset default"),
        ({"warm_from": "run", "dimensions": ("width",)}, "warm-from is for preset default"),
        ({"screen_tokens": 0}, "screen-tokens must be at least 1"),
        ({"screen_tokens": 3072}, r"screen-tokens must be below tokens \(3072\), got 3072"),
        ({"screen_tokens": 64, "preset": "paper"}, "screen-tokens is for preset default"),
        ({"screen_tokens": 64, "dimensions": ("width",)}, "screen-tokens is for preset default"),
        (
            {"screen_tokens": 64, "tasks": (("a", Path("a")), ("b", Path("b")))},
            "screen-tokens is for preset default and the dimension sparsity, without tasks",
        ),
        ({"replicas": 0}, "replicas must be at least 1"),
        ({"tokens": 1}, "tokens must be at least 2"),
        ({"context": 1}, "context must be at least 2"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"max_sparsity": 0.1}, "max-sparsity must be in"),
        ({"max_sparsity": 0.97}, "max-sparsity must be in"),
    ],
)
def test_options_outside_their_range_are_wrong_use(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(RequestError, match=words):
        LearnOptions(model="reference", out=tmp_path, **changes)


def test_defaults_are_the_budget_that_is_promised(tmp_path: Path) -> None:
    options = LearnOptions(model="reference", out=tmp_path)
    assert options.tokens == 3072
    assert 3 * options.num_evaluations <= 110
    assert LearnOptions(model="m", out=tmp_path, preset="paper").num_evaluations == 110


def test_a_finished_run_whose_store_is_empty_is_not_begun_anew(
    run: Run, learn_tiny: Learn, tmp_path: Path
) -> None:
    shutil.copytree(run.folder, tmp_path / "run")
    (tmp_path / "run" / "evaluations.db").write_bytes(b"")
    with pytest.raises(RunError, match="is damaged: its evaluations"):
        learn_tiny(resume=True)
    Run.open(tmp_path / "run")


def test_a_driver_that_comes_second_leaves_the_firsts_store(
    learn_tiny: Learn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(store: EvaluationStore, owner: str) -> None:
        raise RunError("in use by another driver")

    monkeypatch.setattr(EvaluationStore, "acquire_lease", refuse)
    with pytest.raises(RunError, match="another driver"):
        learn_tiny()
    assert (tmp_path / "run" / "evaluations.db").exists()


@pytest.mark.slow
def test_where_too_little_was_measured_the_line_says_why(
    learn_tiny: Learn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def evaluate(self: LocalEvaluator, strategy: Strategy, **options: object) -> Evaluation:
        raise RuntimeError("no memory left")

    monkeypatch.setattr(LocalEvaluator, "evaluate", evaluate)
    why = r"4 of 4 failed, the last by RuntimeError: no memory left; mend that, then --resume"
    with pytest.raises(SurrogateError, match=why):
        learn_tiny(evaluations=4)
    monkeypatch.undo()
    assert len(recorded(tmp_path / "run")) == 4
    assert learn_tiny(evaluations=8, resume=True).manifest["failed"] == 4
