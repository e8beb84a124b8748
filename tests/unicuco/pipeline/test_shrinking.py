from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from unicuco.errors import InfeasibleRequestError, RequestError, UnicucoError, VariantError
from unicuco.pipeline import LearnOptions, LocalBackend, Run, evaluate_variant, learn, prune
from unicuco.testing import tiny_model_folder
from unicuco.types import Plan, Request, ServedAs

pytestmark = pytest.mark.xdist_group("shapes")


def learned(model: Path, text: Path, out: Path, **changes: Any) -> Run:
    options = LearnOptions(
        **{"model": str(model), "out": out, "calibration": text, "tokens": 256, **changes}
    )
    return learn(options, backend=LocalBackend(), progress=lambda step: None)


@pytest.fixture(scope="module")
def run(shapes: Run) -> Run:
    """A run of everything together: parts that go, parts that are narrowed, weights that go."""
    return shapes


@pytest.fixture(scope="module")
def model(shape_run: Path) -> Path:
    return shape_run.with_name("model")


def plan(run: Run, **request: float | str) -> Plan:
    (answer,) = run.plan([Request.from_dict(request)])
    if isinstance(answer, UnicucoError):
        raise answer
    return answer


def test_one_budget_over_all_dimensions_is_met_to_the_weight(run: Run) -> None:
    total = run.profile.total_params
    for share in (0.9, 0.7, 0.5):
        answer = plan(run, max_params=int(share * total))
        assert answer.served_as is ServedAs.SHRINK
        assert answer.kept_params == int(share * total)
    for sparsity in (0.1, 0.3, 0.6):
        sites = run.profile.num_site_weights
        assert sparsity <= plan(run, sparsity=sparsity).sparsity < sparsity + 2 / sites


def test_bytes_are_bounded_and_a_bound_below_the_smallest_names_the_nearest(run: Run) -> None:
    dense = run.profile.total_bytes
    assert plan(run, max_bytes=dense).sparsity == 0
    answer = plan(run, max_bytes=int(0.8 * dense))
    assert answer.num_bytes <= 0.8 * dense
    with pytest.raises(InfeasibleRequestError, match="max_bytes") as caught:
        plan(run, max_bytes=1000)
    assert caught.value.nearest is not None
    assert plan(run, max_bytes=int(caught.value.nearest)).num_bytes <= caught.value.nearest
    with pytest.raises(InfeasibleRequestError, match="smaller shapes only"):
        plan(run, sparsity=0.3, served_as="mask")


def test_what_is_cut_is_what_was_planned(run: Run, model: Path, tmp_path: Path) -> None:
    answer = prune(run, Request.from_dict({"max_bytes": int(0.7 * run.profile.total_bytes)}),
                   tmp_path / "out")  # fmt: skip
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    assert sum(t.numel() * t.element_size() for t in tensors) == answer.num_bytes
    document = json.loads((tmp_path / "out" / "strategy.json").read_text())
    assert document["served_as"] == "shrink"
    report = evaluate_variant(tmp_path / "out", reference=str(model), tokens=512)
    assert report.sparsity == answer.sparsity
    assert report.kl is not None
    assert report.kl > 0


@pytest.mark.slow
def test_what_is_inside_heads_is_learned_with_units_and_parts(
    model: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    dimensions = ("depth", "width", "low_rank")
    learned(model, tiny_text_file, tmp_path / "run", dimensions=dimensions, evaluations=12)
    run = Run.open(tmp_path / "run")  # units and the heads' size come from its files
    answer = prune(run, Request.from_dict({"sparsity": 0.45}), tmp_path / "out")
    assert answer.sparsity >= 0.45
    assert any(v for n, v in answer.strategy.settings if n.startswith("low_rank/"))
    report = evaluate_variant(tmp_path / "out", reference=str(model), tokens=512)
    assert report.sparsity == answer.sparsity


@pytest.mark.slow
def test_depth_alone_is_learned_and_never_exceeds_a_budget(
    model: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    run = learned(model, tiny_text_file, tmp_path / "run", dimensions=("depth",), evaluations=12)
    assert {evaluation for evaluation in run.manifest["options"]["dimensions"]} == {"depth"}
    answers = run.plan([Request.from_dict({"sparsity": s / 20}) for s in range(15)])
    plans = [answer for answer in answers if isinstance(answer, Plan)]
    assert len(plans) == len(answers)
    for sparsity, answer in zip(range(15), plans, strict=True):
        assert answer.sparsity >= sparsity / 20
        assert set(answer.strategy.values) <= {0.0, 1.0}
    assert [p.kept_params for p in plans] == sorted((p.kept_params for p in plans), reverse=True)


@pytest.mark.parametrize(
    ("family", "changes", "error", "line"),
    [
        ("gpt2", {"dimensions": ("depth",)}, VariantError, "granularity block"),
        ("gpt2", {"dimensions": ("width",)}, RequestError, "can't be narrowed"),
        ("gpt2", {"dimensions": ("low_rank",)}, RequestError, "heads of GPT2LMHeadModel can't be"),
        (
            "gpt_neo",
            {"dimensions": ("depth",), "granularity": "block"},
            VariantError,
            "attention_types",
        ),
    ],
)
def test_families_that_cannot_be_shrunk_so_are_refused_before_anything_is_learned(
    family: str,
    changes: dict[str, Any],
    error: type[UnicucoError],
    line: str,
    tiny_text_file: Path,
    tmp_path: Path,
) -> None:
    folder = tiny_model_folder(tmp_path / family, family)
    with pytest.raises(error, match=line) as caught:
        learned(folder, tiny_text_file, tmp_path / "run", evaluations=8, **changes)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
