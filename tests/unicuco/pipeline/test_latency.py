from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from unicuco.dimensions import Granularity, build_space
from unicuco.errors import (
    EngineError,
    InfeasibleRequestError,
    RequestError,
    RunError,
    UnicucoError,
)
from unicuco.export import read_variant
from unicuco.objectives import LatencyModel, dense_features, latency_features
from unicuco.pipeline import LatencyOptions, LearnOptions, LocalBackend, Run, compress, prune
from unicuco.pipeline import latency as measuring
from unicuco.pipeline.latency_design import design, random_strategies
from unicuco.pipeline.latency_file import LATENCY, save_latency
from unicuco.space import Narrowing
from unicuco.types import Plan, Request

pytestmark = pytest.mark.xdist_group("shapes")


# Milliseconds: of every step, of an attention, of its parameters, of an MLP, of its parameters.
BATCHES = (1, 4, 16)
COEFFICIENTS = tuple((1.0, 0.2, 1e-4 * b**0.5, 0.1, 3e-4 * b**0.5) for b in BATCHES)


def keep(run: Path, **changes: Any) -> None:
    model = LatencyModel(batches=BATCHES, coefficients=COEFFICIENTS)
    digest = json.loads((run / "run.json").read_text())["base_model"]["digest"]
    fields = {"base_digest": digest, "measured": {"machine": {"threads": 1}}, **changes}
    save_latency(run, model, **fields)


@pytest.fixture(scope="module")
def folder(shape_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run of shapes with a latency model that was made by hand."""
    folder = shutil.copytree(shape_run, tmp_path_factory.mktemp("latency") / "run")
    keep(folder)
    return folder


@pytest.fixture(scope="module")
def timed(folder: Path) -> Run:
    return Run.open(folder)


def ask(run: Run, **request: object) -> Plan:
    (answer,) = run.plan([Request.from_dict(request)])
    if isinstance(answer, UnicucoError):
        raise answer
    return answer


def by_hand(run: Run, plan: Plan, batch: int) -> float:
    """The time of a plan's shape, part by part."""
    shape, parts = run.planner.space.cost.shape(plan.strategy.values), run.profile.parts
    constant, *own = COEFFICIENTS[BATCHES.index(batch)]
    ms = constant
    for p, part in enumerate(parts):
        if p not in shape.parts:
            present, each = own[:2] if part.path.endswith("self_attn") else own[2:]
            units = dict(shape.narrowed).get(p, Narrowing()).units
            weights = sum(site.num_weights for site in run.profile.sites if site.path in part.sites)
            ms += present + each * weights * (1 - units / part.num_units)
    return ms


@pytest.mark.parametrize("batch", BATCHES)
def test_a_bound_on_latency_is_never_exceeded_and_a_lower_one_never_keeps_more(
    timed: Run, batch: int
) -> None:
    dense = ask(timed, sparsity=0.0)
    highest = by_hand(timed, dense, batch)
    lowest = by_hand(timed, ask(timed, sparsity=0.9), batch)
    bounds = [lowest + (highest - lowest) * k / 40 for k in range(41)]
    fields = [{"max_latency_ms": bound, "batch": batch} for bound in bounds]
    plans = [p for p in timed.plan(list(map(Request.from_dict, fields))) if isinstance(p, Plan)]
    for bound, plan in zip(bounds, plans, strict=True):
        assert plan.latency is not None
        assert plan.latency.batch == batch
        assert plan.latency.ms <= bound
        assert plan.latency.ms == pytest.approx(by_hand(timed, plan, batch))
        assert plan.latency.dense_ms == pytest.approx(highest)
    kept = [plan.kept_params for plan in plans]
    assert kept == sorted(kept)
    assert len(set(kept)) > 5
    assert ask(timed, max_latency_ms=highest * 1.01, batch=batch).strategy == dense.strategy


def test_the_answer_is_the_largest_of_the_front_within_the_bound(timed: Run) -> None:
    budgets = [int(timed.profile.total_params * share / 10) for share in range(5, 10)]
    for plan in timed.plan([Request.from_dict({"max_params": budget}) for budget in budgets]):
        assert isinstance(plan, Plan)
        bound = by_hand(timed, plan, 4) * (1 + 1e-9)
        answer = ask(timed, max_latency_ms=bound, batch=4)
        assert answer.kept_params >= plan.kept_params - timed.profile.num_site_weights // 200


def test_every_plan_says_its_latency_and_the_batch_is_the_smallest_unless_given(timed: Run) -> None:
    for request in ({"sparsity": 0.5}, {"max_latency_ms": 1e3}, {"preference": 0.5}):
        document = ask(timed, **request).to_dict()
        assert document["predicted"]["latency"]["batch"] == 1  # type: ignore[index]
    between = ask(timed, max_latency_ms=1e3, batch=6).latency
    assert between is not None
    low, high = (by_hand(timed, ask(timed, sparsity=0.0), b) for b in (4, 16))
    assert between.ms == pytest.approx(low + (high - low) * 2 / 12)


def test_what_no_variant_can_do_is_refused_with_what_the_smallest_takes(timed: Run) -> None:
    with pytest.raises(InfeasibleRequestError, match="the smallest variant of this run takes") as e:
        ask(timed, max_latency_ms=0.5, batch=4)
    nearest = e.value.nearest
    assert nearest is not None
    assert f"takes {nearest:g} ms per token at batch 4" in str(e.value)
    met = ask(timed, max_latency_ms=nearest, batch=4).latency
    assert met is not None
    assert nearest * (1 - 1e-3) < met.ms <= nearest
    with pytest.raises(InfeasibleRequestError, match=r"batch 17 lies outside .* 1 to 16") as e:
        ask(timed, max_latency_ms=5, batch=17)
    assert e.value.nearest == 16


def test_runs_that_cannot_answer_say_what_to_do(shapes: Run, run: Run) -> None:
    with pytest.raises(InfeasibleRequestError, match="unicuco latency RUN"):
        ask(shapes, max_latency_ms=5)
    with pytest.raises(InfeasibleRequestError, match=r"masks, .* --dimensions depth,width"):
        ask(run, max_latency_ms=5)
    with pytest.raises(InfeasibleRequestError, match="masks"):
        measuring.measure_run(run, LatencyOptions(), lambda step: None)
    assert ask(shapes, sparsity=0.5).latency is None


def test_a_variant_carries_its_prediction(timed: Run, tmp_path: Path) -> None:
    request = Request.from_dict({"max_latency_ms": by_hand(timed, ask(timed, sparsity=0.4), 1)})
    plan = prune(timed, request, tmp_path / "out")
    assert read_variant(tmp_path / "out").plan == plan
    assert plan.latency is not None


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"base_digest": "0" * 64}, "another base model"),
        ({"measured": {}}, "machine"),
    ],
)
def test_a_latency_file_of_something_else_is_refused(
    folder: Path, tmp_path: Path, changes: dict[str, Any], line: str
) -> None:
    own = shutil.copytree(folder, tmp_path / "run")
    keep(own, **changes)
    with pytest.raises(RunError, match=line) as caught:
        Run.open(own)
    assert f"unicuco latency {own}" in str(caught.value)


def test_a_latency_file_that_was_altered_is_refused(folder: Path, tmp_path: Path) -> None:
    own = shutil.copytree(folder, tmp_path / "run")
    text = (own / LATENCY).read_text()
    for damaged in (text.replace("0.2", "0.1"), text[:40], "[]"):
        (own / LATENCY).write_text(damaged)
        with pytest.raises(RunError, match="can't be used") as caught:
            Run.open(own)
        assert "\n" not in str(caught.value)


def test_latency_is_asked_of_dimensions_that_have_one_before_anything_is_learned(
    tiny_llama: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    options = LearnOptions(model=str(tiny_llama), out=tmp_path / "run", calibration=tiny_text_file)
    with pytest.raises(InfeasibleRequestError, match="--dimensions depth,width"):
        compress(
            options,
            Request.from_dict({"max_latency_ms": 5}),
            tmp_path / "out",
            backend_factory=LocalBackend,
            progress=lambda step: None,
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"batches": ()}, "batches must lie in"),
        ({"batches": (0, 4)}, "batches must lie in"),
        ({"batches": (1, 257)}, "batches must lie in"),
        ({"batches": (4, 1)}, "batches must differ and rise"),
        ({"batches": (1, 1)}, "batches must differ and rise"),
        ({"shapes": 1}, "at least 2 shapes"),
        ({"rounds": 0}, "at least 1 round"),
        ({"threads": -1}, "0 or more threads"),
    ],
)
def test_measuring_in_ways_that_mean_nothing_is_refused(fields: dict[str, Any], line: str) -> None:
    with pytest.raises(RequestError, match=line):
        LatencyOptions(**fields)


@pytest.mark.parametrize(
    ("dimensions", "granularity"),
    [
        (("depth", "width", "sparsity"), Granularity.LAYER),
        (("width",), Granularity.LAYER),
        (("width", "low_rank"), Granularity.LAYER),
        (("depth",), Granularity.BLOCK),
    ],
)
def test_few_chosen_shapes_tell_all_that_a_latency_model_can_know(
    timed: Run, dimensions: tuple[str, ...], granularity: Granularity
) -> None:
    space = build_space(timed.profile, dimensions, granularity)
    chosen = design(space, 12, seed=0)
    assert chosen == design(space, 12, seed=0)
    features = latency_features(space.cost, chosen)
    assert torch.equal(features[:1], dense_features(space.cost))
    assert len({tuple(row) for row in features.tolist()}) == len(chosen) <= 12
    assert bool((features[:, 1::2] > 0).all()), "an engine needs a part of every kind"
    true = torch.tensor(COEFFICIENTS[1], dtype=torch.float64)[:, None]
    model = LatencyModel.fit(features, features @ true, (4,))
    others = latency_features(space.cost, random_strategies(space, 50, seed=1))
    assert len(others) > 10
    assert model.predict(others, 4).tolist() == pytest.approx((others @ true)[:, 0].tolist())


def test_every_shape_that_is_measured_has_a_configuration_without_weights(
    timed: Run, tmp_path: Path
) -> None:
    space = timed.planner.space
    chosen = design(space, 6, seed=0)
    folders = measuring._write_configs(timed.profile, space, chosen, timed.base_folder, tmp_path)
    features = latency_features(space.cost, chosen)
    for place, row in zip(folders, features.tolist(), strict=True):
        config = AutoConfig.from_pretrained(place)
        shapes = getattr(config, "block_shapes", None)
        if shapes is None:
            groups = config.num_key_value_heads
            width = config.intermediate_size
            shapes = config.num_hidden_layers * [
                {"key_value_heads": groups, "intermediate_size": width}
            ]
        assert sum(shape["key_value_heads"] > 0 for shape in shapes) == row[1]
        assert sum(shape["intermediate_size"] > 0 for shape in shapes) == row[3]
        channels = sum(shape["intermediate_size"] for shape in shapes)
        assert 3 * config.hidden_size * channels == row[4]
    assert math.prod(len(list(place.iterdir())) for place in folders) == 1


def test_a_variant_is_not_timed_where_its_request_was_not_of_latency(
    timed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert measuring.check_cut(timed, ask(timed, sparsity=0.5), tmp_path) is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EngineError, match="vLLM is not installed"):
        measuring.check_cut(timed, ask(timed, max_latency_ms=1e3), tmp_path)
