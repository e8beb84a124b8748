"""One run of several tasks: its texts, its evaluations, and answers under any weighting."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.unicuco.pipeline.conftest import ignore_progress
from unicuco.errors import InfeasibleRequestError, RequestError, RunError, TextError
from unicuco.evaluate import LocalEvaluator
from unicuco.pipeline import LearnOptions, LocalBackend, Run, learn
from unicuco.pipeline.options import parse_tasks
from unicuco.pipeline.preparation import Prepared, prepare
from unicuco.store import EvaluationStore
from unicuco.testing.cases import trained_model_folder
from unicuco.types import Evaluation, Plan, Request

SPARSITY = 0.6

pytestmark = pytest.mark.slow  # a run of some twenty seconds stands behind most of them
NAMES = ("code", "prose")


def code_text(seed: int) -> str:
    draw = random.Random(seed)
    lines = []
    for _ in range(500):
        name, left, right = (draw.choice(["add", "mul", "row", "key"]) for _ in range(3))
        lines.append(
            f"def {name}_{draw.randint(0, 99)}({left}, {right}): return {left} * {right}\n"
        )
    return "".join(lines)


def prose_text(seed: int) -> str:
    draw = random.Random(seed)
    words = ["THE SEA", "OLD MEN", "A QUIET SHIP", "SAILED ON", "WENT HOME", "AT DAWN", "AND SLEPT"]
    return "".join(
        f"{' '.join(draw.choice(words) for _ in range(5))}; {draw.choice(words)}.\n"
        for _ in range(500)
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("task-texts")
    texts = {"code": code_text(1), "prose": prose_text(1)}
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.txt" for name in texts}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that can do both: trained on lines of either text in turn."""
    lines = zip(
        code_text(2).splitlines(keepends=True), prose_text(2).splitlines(keepends=True), strict=True
    )
    mixed = "".join(a * 2 + b * 2 for a, b in lines)
    folder = tmp_path_factory.mktemp("two-texts") / "llama"
    return trained_model_folder(folder, mixed, steps=300)


def task_options(model: Path, out: Path, files: dict[str, Path], **changes: object) -> LearnOptions:
    fields: dict[str, object] = {
        "model": str(model),
        "out": out,
        "tasks": tuple(files.items()),
        "tokens": 1024,
        "context": 64,
        "evaluations": 20,
        "seed": 1,
    }
    return LearnOptions(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def task_run(model: Path, files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    options = task_options(model, tmp_path_factory.mktemp("runs") / "tasks", files)
    return learn(options, backend=LocalBackend(), progress=ignore_progress)


@pytest.fixture(scope="module")
def prepared(
    model: Path, files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Prepared:
    out = tmp_path_factory.mktemp("prepared")
    return prepare(task_options(model, out, files), out, ignore_progress)


def plan(run: Run, **fields: object) -> Plan:
    (answer,) = run.plan([Request.from_dict(fields)])
    assert isinstance(answer, Plan), answer
    return answer


# --- texts and evaluations ----------------------------------------------------------------------


def test_every_text_is_equally_many_windows_of_each_task(
    prepared: Prepared, files: dict[str, Path]
) -> None:
    for name in ("calibration", "search", "validation"):
        text = getattr(prepared.texts, name)
        assert text.ids.shape == (16, 64)
    upper = torch.tensor([sum(c.isupper() for c in _decoded(prepared, k)) for k in range(16)])
    assert int(upper[:8].max()) == 0
    assert int(upper[8:].min()) > 20


def _decoded(prepared: Prepared, window: int) -> str:
    return str(prepared.source.tokenizer.decode(prepared.texts.search.ids[window]))


def test_an_evaluation_holds_each_task_s_value_and_their_mean(prepared: Prepared) -> None:
    arrays = {**prepared.model_arrays(), **prepared.text_arrays(prepared.texts.search)}
    strategy = prepared.space.uniform(0.5)
    both = LocalEvaluator(prepared.evaluator, arrays).evaluate(strategy, derivatives=True)
    whole = LocalEvaluator(replace(prepared.evaluator, tasks=()), arrays).evaluate(
        strategy, derivatives=True
    )
    assert [value.task for value in both.tasks] == list(NAMES)
    assert both.tasks[0].kl != both.tasks[1].kl
    assert both.kl == pytest.approx(whole.kl, rel=1e-5)
    assert both.gradient == pytest.approx(whole.gradient, rel=1e-3, abs=1e-5)
    assert both.cost_units == whole.cost_units
    for number, value in enumerate(both.tasks):
        ids = prepared.texts.search.ids[8 * number : 8 * number + 8]
        alone = replace(prepared.texts.search, ids=ids)
        own = {**prepared.model_arrays(), **prepared.text_arrays(alone)}
        single = LocalEvaluator(replace(prepared.evaluator, tasks=()), own)
        measured = single.evaluate(strategy, derivatives=True)
        assert value.kl == pytest.approx(measured.kl, rel=1e-5)
        assert value.gradient == pytest.approx(measured.gradient, rel=1e-3, abs=1e-5)


def test_the_store_keeps_what_every_task_measured(task_run: Run) -> None:
    with EvaluationStore.open(task_run.folder / "evaluations.db", create=False) as store:
        outcomes = [outcome for _, outcome in store.read()]
    assert len(outcomes) == 20
    for outcome in outcomes:
        assert isinstance(outcome, Evaluation)
        assert [value.task for value in outcome.tasks] == list(NAMES)
        assert sum(v.kl for v in outcome.tasks) / 2 == pytest.approx(outcome.kl)


def test_a_stopped_run_of_tasks_goes_on_and_refuses_other_tasks(
    model: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    options = task_options(model, tmp_path / "run", files, evaluations=6, tokens=256)
    learn(options, backend=LocalBackend(), progress=ignore_progress)
    more = replace(options, evaluations=9, resume=True)
    extended = learn(more, backend=LocalBackend(), progress=ignore_progress)
    assert extended.manifest["evaluations"] == 9
    assert extended.tasks == NAMES
    other = replace(more, tasks=(("code", files["code"]), ("other", files["prose"])))
    with pytest.raises(RunError, match="begun with another tasks"):
        learn(other, backend=LocalBackend(), progress=ignore_progress)


# --- answers ------------------------------------------------------------------------------------


def test_extreme_weightings_are_better_on_their_own_texts_than_the_other_on_the_whole(
    task_run: Run, prepared: Prepared
) -> None:
    own = {
        name: [
            plan(task_run, sparsity=sparsity, task_weights={name: 1.0}).strategy
            for sparsity in (0.4, 0.5, 0.6)
        ]
        for name in NAMES
    }
    assert all(a != b for a, b in zip(own["code"], own["prose"], strict=True))
    text = prepared.texts.validation  # fresh: nothing chose strategies by it
    arrays = {**prepared.model_arrays(), **prepared.text_arrays(text)}
    judge = LocalEvaluator(prepared.evaluator, arrays)
    kl = {name: dict.fromkeys(NAMES, 0.0) for name in NAMES}  # sums of logarithms over targets
    for name, strategies in own.items():
        for strategy in strategies:
            for value in judge.evaluate(strategy).tasks:
                kl[name][value.task] += math.log(value.kl)
    assert kl["code"]["code"] < kl["prose"]["code"]
    # What prose needs, code needs nearly as much: there the two differ by a tenth either way, from
    # one machine's arithmetic, which the model was trained by, to another's.
    lost = kl["prose"]["prose"] - kl["code"]["prose"]
    assert lost < (kl["prose"]["code"] - kl["code"]["code"]) / 2


def test_predictions_are_of_the_weighted_kl(task_run: Run) -> None:
    even = plan(task_run, sparsity=SPARSITY)
    same = plan(task_run, sparsity=SPARSITY, task_weights={"code": 0.5, "prose": 0.5})
    assert same.strategy == even.strategy
    assert same.kl == even.kl
    space = task_run.planner.space
    points = space.encode([even.strategy])
    sizes = space.cost.size(space.settings(points))
    forecast = task_run.planner._forecast
    weighted = {
        share: forecast.predict(points, sizes, torch.tensor([[share, 1 - share]]).double())[0].mean
        for share in (0.0, 0.25, 1.0)
    }
    # A mean of KLs, not of their logarithms.
    expected = 0.25 * weighted[1.0] + 0.75 * weighted[0.0]
    assert weighted[0.25] == pytest.approx(expected, rel=1e-6, abs=1e-4)


def test_all_targets_can_be_weighted_and_budgets_are_exact(task_run: Run) -> None:
    cost = task_run.planner.space.cost
    weights = {"code": 0.7, "prose": 0.3}
    kept = task_run.profile.total_params - 1234
    assert plan(task_run, max_params=kept, task_weights=weights).kept_params == kept
    sized = plan(task_run, sparsity=0.7, task_weights=weights)
    assert sized.kept_params == task_run.planner.space.kept_for_sparsity(0.7)
    assert cost.kept_params(sized.strategy.values) == sized.kept_params
    bounded = plan(task_run, max_kl=0.5, task_weights=weights)
    assert bounded.kl.hi95 <= 0.5 * (1 + 1e-5)
    assert plan(task_run, preference=0.5, task_weights=weights).sparsity > 0


def test_a_batch_of_many_weightings_answers_as_one_by_one(task_run: Run) -> None:
    requests = [
        Request.from_dict({"sparsity": 0.5, "task_weights": {"code": w, "prose": 1 - w}})
        for w in (0.0, 0.3, 0.9)
    ] + [Request.from_dict({"max_kl": 0.3}), Request.from_dict({"sparsity": 0.8})]
    together = task_run.plan(requests)
    for request, answer in zip(requests, together, strict=True):
        (alone,) = task_run.plan([request])
        assert isinstance(answer, Plan)
        assert isinstance(alone, Plan)
        assert answer.sparsity == alone.sparsity
        assert answer.kl.mean == pytest.approx(alone.kl.mean, rel=1e-4, abs=1e-6)


def test_the_request_is_echoed_as_it_was_asked(task_run: Run) -> None:
    asked = {"sparsity": 0.6, "task_weights": {"prose": 0.25, "code": 0.75}}
    document = json.loads(json.dumps(plan(task_run, **asked).to_dict()))
    assert document["request"] == asked
    assert Request.from_dict(document["request"]) == Request.from_dict(asked)


def test_a_task_that_the_run_does_not_know_is_refused(task_run: Run) -> None:
    request = Request.from_dict({"sparsity": 0.5, "task_weights": {"code": 0.5, "poems": 0.5}})
    (answer,) = task_run.plan([request])
    assert isinstance(answer, InfeasibleRequestError)
    assert str(answer) == "this run has no task 'poems'; its tasks are code, prose"


def test_a_run_of_one_text_refuses_task_weights(run: Run) -> None:
    (answer,) = run.plan([Request.from_dict({"sparsity": 0.5, "task_weights": {"code": 1.0}})])
    assert isinstance(answer, InfeasibleRequestError)
    assert "no tasks to weigh" in str(answer)
    assert answer.exit_code == 3


def test_runs_of_one_text_know_nothing_of_tasks(run: Run) -> None:
    assert run.tasks == ()
    assert "tasks" not in run.manifest["options"]


# --- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["code"], "task must be NAME=FILE"),
        (["=a.txt"], "task must be NAME=FILE"),
        (["code="], "task must be NAME=FILE"),
        (["Two Words=a.txt"], "task must be NAME=FILE"),
        (["code=a.txt"], "two texts or more"),
        (["code=a.txt", "code=b.txt"], "under a name of its own"),
    ],
)
def test_tasks_that_mean_nothing_are_refused(given: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=words):
        LearnOptions(model="reference", out=tmp_path, tasks=parse_tasks(given))


def test_tasks_exclude_a_calibration_file_and_the_published_preset(tmp_path: Path) -> None:
    tasks = parse_tasks(["code=a.txt", "prose=b=c.txt"])
    assert tasks == (("code", Path("a.txt")), ("prose", Path("b=c.txt")))
    with pytest.raises(RequestError, match="either calibration or task"):
        LearnOptions(model="reference", out=tmp_path, tasks=tasks, calibration=Path("c.txt"))
    with pytest.raises(RequestError, match="learned by preset default"):
        LearnOptions(model="reference", out=tmp_path, tasks=tasks, preset="paper")
    with pytest.raises(RequestError, match="sampling must be even"):
        LearnOptions(model="reference", out=tmp_path, tasks=tasks, calibration_sampling="clustered")


def test_a_task_too_short_for_its_share_is_named_and_leaves_nothing_behind(
    model: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("too short\n")
    short = files | {"prose": tmp_path / "short.txt"}
    options = task_options(model, tmp_path / "run", short)
    with pytest.raises(TextError, match=r"short\.txt is cut into"):
        learn(options, backend=LocalBackend(), progress=ignore_progress)
    assert not (tmp_path / "run").exists()
