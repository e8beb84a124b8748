from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from unicuco.bits import round_matrix
from unicuco.dimensions import ByteCost
from unicuco.errors import InfeasibleRequestError, ModelError, RequestError, UnicucoError
from unicuco.models import load_model, read_site
from unicuco.pipeline import LearnOptions, LocalBackend, Run, evaluate_variant, learn, prune
from unicuco.testing import tiny_model_folder
from unicuco.types import Plan, Request, ServedAs

pytestmark = pytest.mark.slow


def learned(model: Path, text: Path, out: Path, **changes: Any) -> Run:
    options = LearnOptions(
        **{"model": str(model), "out": out, "calibration": text, "tokens": 256, **changes}
    )
    return learn(options, backend=LocalBackend(), progress=lambda step: None)


@pytest.fixture(scope="module")
def run(tiny_bits_run: Path) -> Run:
    """A run that decides zeros, weight bits and KV bits together."""
    return Run.open(tiny_bits_run)


@pytest.fixture(scope="module")
def cost(run: Run) -> ByteCost:
    cost = run.planner.space.cost
    assert isinstance(cost, ByteCost)
    return cost


def plan(run: Run, **request: float | str) -> Plan:
    (answer,) = run.plan([Request.from_dict(request)])
    if isinstance(answer, UnicucoError):
        raise answer
    return answer


def bits(answer: Plan, dimension: str) -> list[float]:
    return [value for name, value in answer.strategy.settings if name.startswith(f"{dimension}/")]


def coarsest_step(cost: ByteCost, answer: Plan, dimensions: tuple[str, ...], tokens: int) -> int:
    """The most bytes that one step back of one axis takes, from where the answer is."""
    values = list(answer.strategy.values)

    def size() -> int:
        return cost.num_bytes(values) + cost.kv_bytes(values, tokens)

    steps, before = [], size()
    for a, axis in enumerate(cost_axes(cost)):
        if values[a] > 0 and axis.name.split("/")[0] in dimensions:
            was = values[a]
            values[a] = was - 1 / axis.num_steps
            steps.append(size() - before)
            values[a] = was
    return min(steps)


def cost_axes(cost: ByteCost) -> list[Any]:
    return [a for d in cost.dimensions for a in d.axes(cost.profile, cost.granularity)]


def test_stored_bytes_are_met_to_one_step_and_what_is_cut_has_so_many(
    run: Run, cost: ByteCost, tiny_bits_model: Path, tmp_path: Path
) -> None:
    dense = run.profile.total_bytes
    for share in (0.9, 0.8, 0.7):
        answer = plan(run, max_bytes=int(share * dense))
        assert answer.served_as is ServedAs.QUANTISED
        assert answer.num_bytes <= share * dense
        assert answer.num_bytes + coarsest_step(cost, answer, ("weight_bits",), 0) > share * dense
        assert answer.sparsity == 0  # stored zeros save nothing
    prune(run, answer.request, tmp_path / "variant")
    tensors = load_file(tmp_path / "variant" / "model.safetensors")
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == answer.num_bytes
    document = json.loads((tmp_path / "variant" / "strategy.json").read_text())
    assert document["served_as"] == "quantised"
    stored = document["precision"]["weight_bits"]
    assert stored.keys() == {site.path for site in run.profile.sites}
    assert min(stored.values()) < 16
    report = evaluate_variant(tmp_path / "variant", reference=str(tiny_bits_model), tokens=512)
    assert report.kl is not None
    assert report.kl > 0


def test_total_bytes_count_weights_and_the_cache_of_the_context_and_batch(
    run: Run, cost: ByteCost
) -> None:
    for context, batch in ((64, 1), (48, 40)):
        tokens = context * batch
        most = run.profile.total_bytes + cost.kv_bytes([0.0] * len(cost_axes(cost)), tokens)
        budget = int(0.7 * most)
        answer = plan(run, max_total_bytes=budget, context=context, batch=batch)
        document = answer.to_dict()
        assert answer.kv_bytes == cost.kv_bytes(answer.strategy.values, tokens)
        assert document["total_bytes"] == answer.num_bytes + answer.kv_bytes <= budget
        step = coarsest_step(cost, answer, ("weight_bits", "kv_bits"), tokens)
        assert answer.num_bytes + answer.kv_bytes + step > budget
    assert any(bits(answer, "kv_bits"))  # most of the bytes are the cache's here


def below_bits(run: Run) -> int:
    """A packed size that bits alone don't reach."""
    with pytest.raises(InfeasibleRequestError) as caught:
        plan(run, max_bytes=1000)
    assert caught.value.nearest is not None
    return int(caught.value.nearest) - 1500


def test_packed_bytes_are_met_by_zeros_and_bits_together(run: Run, cost: ByteCost) -> None:
    dense = run.profile.total_bytes
    for budget in (int(0.85 * dense), int(0.7 * dense), below_bits(run)):
        answer = plan(run, max_packed_bytes=budget)
        assert answer.packed_bytes is not None
        if answer.sparsity:  # a weight is two bytes at most
            assert budget - 1 <= answer.packed_bytes <= budget
        else:
            step = coarsest_step(cost, answer, ("weight_bits",), 0)
            assert budget - step < answer.packed_bytes <= budget
        assert not any(bits(answer, "kv_bits"))
    assert any(bits(answer, "weight_bits"))
    assert answer.sparsity > 0


def test_zeros_alone_are_met_to_the_weight(run: Run) -> None:
    answer = plan(run, sparsity=0.4)
    sites = run.profile.num_site_weights
    assert 0.4 <= answer.sparsity < 0.4 + 1 / sites
    assert answer.num_bytes == run.profile.total_bytes
    assert not any(bits(answer, "weight_bits"))


def test_masks_come_first_and_their_zeros_stay_exact(run: Run, tmp_path: Path) -> None:
    request = Request.from_dict({"max_packed_bytes": below_bits(run)})
    answer = prune(run, request, tmp_path / "variant")
    report = evaluate_variant(tmp_path / "variant", tokens=64)
    assert report.sparsity >= answer.sparsity > 0  # rounding makes some more


@pytest.mark.parametrize(
    ("request_", "line"),
    [
        ({"max_bytes": 1000}, "max_bytes 1,000 can't be met; the nearest that can is"),
        ({"max_total_bytes": 1000}, "max_total_bytes 1,000 can't be met"),
        ({"max_packed_bytes": 10}, "max_packed_bytes 10 can't be met"),
        ({"max_total_bytes": 10**9, "context": 65}, "context 65 is longer than this model's, 64"),
        ({"sparsity": 0.2, "served_as": "mask"}, "learned fewer bits only"),
    ],
)
def test_what_cannot_be_met_names_the_nearest(
    run: Run, request_: dict[str, float | str], line: str
) -> None:
    with pytest.raises(InfeasibleRequestError, match=line) as caught:
        plan(run, **request_)
    if "served_as" not in request_:
        name = next(iter(request_))
        assert caught.value.nearest is not None
        fixed = {**request_, name: caught.value.nearest}
        if "context" in request_:
            fixed = {**request_, "context": caught.value.nearest}
        plan(run, **fixed)


def test_quality_and_preference_are_answered_of_all_dimensions(run: Run) -> None:
    assert plan(run, preference=0).kl.mean == 0
    small = plan(run, preference=1)
    assert small.packed_bytes is not None
    assert small.packed_bytes < 0.75 * run.profile.total_bytes
    answer = plan(run, max_kl=float(small.kl.hi95) / 2)
    assert answer.kl.hi95 <= small.kl.hi95 / 2


@pytest.fixture(scope="module")
def gptq_run(
    tiny_bits_model: Path, tiny_text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """A run of weight bits alone, rounded by GPTQ."""
    return learned(
        tiny_bits_model,
        tiny_text_file,
        tmp_path_factory.mktemp("gptq") / "run",
        dimensions=("weight_bits",),
        granularity="block",
        rounding="gptq",
        evaluations=8,
    )


def test_bits_alone_know_no_zeros(gptq_run: Run) -> None:
    assert gptq_run.planner.space.num_axes == 2
    assert plan(gptq_run, max_bytes=int(0.75 * gptq_run.profile.total_bytes)).kl.mean > 0
    assert plan(gptq_run, sparsity=0).strategy.values == (0.0, 0.0)
    with pytest.raises(InfeasibleRequestError, match="did not learn sparsity"):
        plan(gptq_run, sparsity=0.3)
    with pytest.raises(InfeasibleRequestError, match="context 100"):
        plan(gptq_run, max_total_bytes=10**9, context=100)


def test_what_gptq_was_judged_as_is_what_is_written(
    gptq_run: Run, tiny_bits_model: Path, tmp_path: Path
) -> None:
    smallest = gptq_run.planner.space.kept_range()[0]
    prune(gptq_run, Request.from_dict({"max_bytes": smallest}), tmp_path / "variant")
    dense = load_model(tiny_bits_model).model
    variant = load_model(tmp_path / "variant", fewer_bits=True).model
    assert gptq_run.factors is not None
    moved = 0
    for site in gptq_run.profile.sites:
        weight, found = read_site(dense, site), read_site(variant, site)
        upper = gptq_run.factors[site.path]
        expected = round_matrix(weight, 4, torch.bfloat16, upper=upper).dequantise()
        assert torch.equal(found, expected)
        moved += not torch.equal(round_matrix(weight, 4, torch.bfloat16).dequantise(), expected)
    assert moved == len(gptq_run.profile.sites)


@pytest.mark.parametrize(
    ("family", "dimensions", "line"),
    [
        ("gpt2", ("weight_bits",), "stores its matrices transposed"),
        ("llama", ("weight_bits", "width"), "not learned together"),
        ("llama", ("weight_bits", "weight_bits"), "different names"),
        ("llama", ("bits",), "dimensions must be"),
        ("llama", ("kv_bits", "depth"), "not learned together"),
    ],
)
def test_what_cannot_be_learned_is_refused_before_anything_is(
    family: str, dimensions: tuple[str, ...], line: str, tiny_text_file: Path, tmp_path: Path
) -> None:
    folder = tiny_model_folder(tmp_path / family, family)
    with pytest.raises(RequestError, match=line) as caught:
        learned(folder, tiny_text_file, tmp_path / "run", dimensions=dimensions, evaluations=8)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_rounding_is_known_and_of_weight_bits(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="rounding must be one of nearest, gptq"):
        LearnOptions(model="reference", out=tmp_path, dimensions=("weight_bits",), rounding="up")
    with pytest.raises(RequestError, match="rounding is of weight_bits"):
        LearnOptions(model="reference", out=tmp_path, rounding="gptq")
    with pytest.raises(RequestError, match="shards must be 1"):
        LearnOptions(model="reference", out=tmp_path, dimensions=("kv_bits",), shards=2)


def test_a_variant_of_fewer_bits_is_no_model_to_learn_from(
    gptq_run: Run, tiny_text_file: Path, tmp_path: Path
) -> None:
    smallest = gptq_run.planner.space.kept_range()[0]
    prune(gptq_run, Request.from_dict({"max_bytes": smallest}), tmp_path / "variant")
    with pytest.raises(ModelError, match="already quantised"):
        learned(tmp_path / "variant", tiny_text_file, tmp_path / "run", evaluations=8)
