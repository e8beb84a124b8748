from __future__ import annotations

import copy
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.unicuco.pipeline.conftest import ignore_progress, tiny_options
from unicuco.errors import (
    InfeasibleRequestError,
    ModelError,
    RequestError,
    RunError,
    TextError,
    VariantError,
)
from unicuco.export import read_variant
from unicuco.models import load_model, load_tokenizer, read_site
from unicuco.pipeline import (
    LearnOptions,
    LocalBackend,
    Progress,
    Run,
    compress,
    evaluate_variant,
    prune,
)
from unicuco.pipeline.options import DEFAULT_EVALUATIONS
from unicuco.testing.tiny import tiny_model_folder
from unicuco.types import Plan, Request

HALF = Request.from_dict({"sparsity": 0.5})


@pytest.fixture(scope="module")
def variant(run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan]:
    out = tmp_path_factory.mktemp("variants") / "half"
    return out, prune(run, HALF, out)


def test_a_variant_has_exactly_the_zeros_that_its_plan_says(
    run: Run, variant: tuple[Path, Plan]
) -> None:
    out, plan = variant
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(run.base_folder, dtype=torch.float32)
    drops = run.planner.space.cost.site_drops(plan.strategy.values)
    changed = set()
    for site in run.profile.sites:
        weight, dense = read_site(model, site), read_site(base, site)
        zero = weight == 0
        assert int(zero.sum()) == drops[site.path]
        assert torch.equal(weight[~zero], dense[~zero])
        ranks = run.ranks.ranks[site.path]
        for row in range(site.num_rows):  # the first of each row went, rows differ by at most one
            dropped = ranks[row][zero[row]]
            assert dropped.sort().values.tolist() == list(range(len(dropped)))
        assert int(zero.sum(1).max() - zero.sum(1).min()) <= 1
        changed.add(f"{site.path}.weight")
    for name, tensor in base.state_dict().items():
        if name not in changed:
            assert torch.equal(model.state_dict()[name], tensor), name
    assert sum(drops.values()) == plan.total_params - plan.kept_params


def test_a_variant_says_what_it_was_cut_from(run: Run, variant: tuple[Path, Plan]) -> None:
    out, plan = variant
    document = json.loads((out / "strategy.json").read_text(encoding="utf-8"))
    assert {name: document[name] for name in plan.to_dict()} == plan.to_dict()
    assert document["run"] == run.digest
    assert document["seed"] == run.manifest["seed"]
    assert document["base_model"]["digest"] == run.profile.digest
    assert read_variant(out)


def test_the_same_request_gives_the_same_tensors(
    run: Run, variant: tuple[Path, Plan], tmp_path: Path
) -> None:
    assert prune(Run.open(run.folder), HALF, tmp_path / "again") == variant[1]
    for path in variant[0].glob("*.safetensors"):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_refusals_leave_nothing_behind(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InfeasibleRequestError):
        prune(run, Request.from_dict({"sparsity": 0.95}), out)
    other = tiny_model_folder(tmp_path / "other", seed=5, tied=True)
    with pytest.raises(RunError, match="is not the model"):
        prune(Run.open(run.folder, base=str(other)), HALF, out)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(VariantError):
        prune(run, HALF, out)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


# --- evaluating ---------------------------------------------------------------------------------


@torch.no_grad()
def slow_report(folder: Path, reference: Path, text: Path, tokens: int) -> tuple[float, float]:
    """Perplexity and KL by single windows in float64."""
    from unicuco.pipeline.texts import test_windows

    tokenizer = load_tokenizer(folder)
    model, dense = load_model(folder).model, load_model(reference).model
    windows = test_windows(tokenizer, text, tokens=tokens, context=64).ids
    nll = kl = 0.0
    for window in windows:
        q = model(input_ids=window[None]).logits[0].double().log_softmax(-1)
        p = dense(input_ids=window[None]).logits[0].double().log_softmax(-1)
        nll -= sum(float(q[t, window[t + 1]]) for t in range(len(window) - 1))
        kl += float((p.exp() * (p - q)).sum())
    return math.exp(nll / (windows.numel() - len(windows))), kl / windows.numel()


def test_a_variant_is_measured_as_a_loop_over_windows_measures_it(
    run: Run, variant: tuple[Path, Plan], tiny_text_file: Path
) -> None:
    out, plan = variant
    told: list[Progress] = []
    report = evaluate_variant(
        out,
        reference=str(run.base_folder),
        text=tiny_text_file,
        tokens=320,
        progress=told.append,
    )
    perplexity, kl = slow_report(out, run.base_folder, tiny_text_file, 320)
    assert report.perplexity == pytest.approx(perplexity, rel=1e-4)
    assert report.kl == pytest.approx(kl, rel=1e-4, abs=1e-6)
    assert report.sparsity == plan.sparsity
    assert (report.tokens, report.context) == (320, 64)
    assert told[-1].done == told[-1].total


def test_the_dense_model_measures_as_itself(run: Run, tiny_text_file: Path) -> None:
    base = str(run.base_folder)
    report = evaluate_variant(base, reference=base, text=tiny_text_file, tokens=128)
    assert report.kl == pytest.approx(0.0, abs=1e-6)
    assert report.sparsity == 0.0
    assert evaluate_variant(base, text=tiny_text_file, tokens=128).kl is None


def test_a_short_text_is_read_whole(run: Run, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("x = 1\n" * 25, encoding="utf-8")
    report = evaluate_variant(run.base_folder, text=text)
    assert report.tokens == 128  # two windows of 64, all that 150 bytes hold
    text.write_text("", encoding="utf-8")
    with pytest.raises(TextError):
        evaluate_variant(run.base_folder, text=text)


def test_an_altered_variant_is_not_measured(
    variant: tuple[Path, Plan], tmp_path: Path, tiny_text_file: Path
) -> None:
    altered = Path(shutil.copytree(variant[0], tmp_path / "altered"))
    path = next(altered.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(VariantError, match=path.name):
        evaluate_variant(altered, text=tiny_text_file, tokens=64)


def test_a_reference_of_another_vocabulary_means_nothing(
    variant: tuple[Path, Plan], tmp_path: Path, tiny_text_file: Path
) -> None:
    other = tiny_model_folder(tmp_path / "other")
    model = load_model(other).model
    config = copy.deepcopy(model.config)
    config.vocab_size = 270
    larger = AutoModelForCausalLM.from_config(config)
    shutil.rmtree(tmp_path / "other")
    larger.save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="another vocabulary"):
        evaluate_variant(
            variant[0], reference=str(tmp_path / "other"), text=tiny_text_file, tokens=64
        )


# --- the one call -------------------------------------------------------------------------------


def no_backend() -> LocalBackend:
    raise AssertionError("nothing is to be learned")


def test_compress_uses_the_run_that_is_there(
    run: Run, tiny_text_file: Path, tmp_path: Path, quick: None
) -> None:
    told: list[Progress] = []
    report = compress(
        tiny_options(run.base_folder, run.folder, tiny_text_file),
        HALF,
        tmp_path / "out",
        backend_factory=no_backend,
        progress=told.append,
    )
    assert report.run == run.folder
    assert report.measured.sparsity == report.plan.sparsity
    document = json.loads(json.dumps(report.to_dict()))
    assert document["measured"]["kl"] > 0
    assert document["sparsity"] == report.plan.sparsity
    assert told[-1].done == told[-1].total


def test_compress_refuses_a_taken_folder_before_any_work(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(VariantError):
        compress(
            LearnOptions(model=str(run.base_folder), out=tmp_path / "out.run"),
            HALF,
            tmp_path / "out",
            backend_factory=no_backend,
            progress=ignore_progress,
        )
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_compress_learns_a_run_where_there_is_none_and_uses_it_the_next_time(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    monkeypatch.setitem(DEFAULT_EVALUATIONS, "default", 4)
    learning = LearnOptions(model=str(tiny_llama), out=tmp_path / "run", granularity="block")
    first = compress(
        learning,
        HALF,
        tmp_path / "out",
        backend_factory=LocalBackend,
        progress=ignore_progress,
    )
    assert first.run == tmp_path / "run"
    assert Run.open(first.run).manifest["evaluations"] == 4
    assert Run.open(first.run).manifest["options"]["granularity"] == "block"
    second = compress(
        learning,
        HALF,
        tmp_path / "again",
        backend_factory=no_backend,
        progress=ignore_progress,
    )
    assert second.plan == first.plan
    assert second.measured == first.measured


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("pruner", "sparsegpt", "--pruner"),
        ("evaluations", 99, "--evaluations"),
        ("max_sparsity", 0.8, "--max-sparsity"),
        ("calibration_sampling", "clustered", "--calibration-sampling"),
    ],
)
def test_compress_refuses_a_run_that_was_learned_otherwise(
    run: Run, tmp_path: Path, option: str, value: object, said: str
) -> None:
    plain = LearnOptions(model=str(run.base_folder), out=run.folder)
    with pytest.raises(RequestError, match=f"learned with another {said}: leave it out"):
        compress(
            replace(plain, **{option: value}),  # type: ignore[arg-type]
            HALF,
            tmp_path / "out",
            backend_factory=no_backend,
            progress=ignore_progress,
        )
    assert list(tmp_path.iterdir()) == []


def test_compress_refuses_a_run_of_another_text(
    run: Run, tmp_path: Path, tiny_text_file: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text(tiny_text_file.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    with pytest.raises(RequestError, match="learned with another --calibration: leave it out"):
        compress(
            tiny_options(run.base_folder, run.folder, other),
            HALF,
            tmp_path / "out",
            backend_factory=no_backend,
            progress=ignore_progress,
        )
