"""SparseGPT from learning to variants, on a tiny trained model that is stored in bfloat16."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.unicuco.pipeline.conftest import ignore_progress, tiny_options
from unicuco.dimensions import build_space
from unicuco.errors import RequestError, RunError, StorageError
from unicuco.export import write_variant
from unicuco.levels import LevelDatabase
from unicuco.models import load_model, load_tokenizer, quiet_transformers
from unicuco.pipeline import (
    CompareOptions,
    LocalBackend,
    Progress,
    Run,
    compare,
    evaluate_variant,
    learn,
    levelling,
    prune,
)
from unicuco.ranks import RankStore
from unicuco.store import EvaluationStore
from unicuco.types import Evaluation, Plan, Request, Target

HALF = Request(target=Target.SPARSITY, value=0.5)


@pytest.fixture(scope="session")
def half_precision(trained_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "half"
    with quiet_transformers():
        load_model(trained_folder, dtype=torch.bfloat16).model.save_pretrained(folder)
    load_tokenizer(trained_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def learned(
    half_precision: Path, tiny_text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Run, list[Progress]]:
    out = tmp_path_factory.mktemp("runs") / "levels-run"
    told: list[Progress] = []
    options = tiny_options(
        half_precision, out, tiny_text_file, pruner="sparsegpt", evaluations=9, tokens=512
    )
    return learn(options, backend=LocalBackend(), progress=told.append), told


@pytest.fixture(scope="session")
def run(learned: tuple[Run, list[Progress]]) -> Run:
    return learned[0]


@pytest.fixture(scope="session")
def variant(run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path]:
    out = tmp_path_factory.mktemp("variants") / "half"
    return prune(run, HALF, out), out


# --- learning -----------------------------------------------------------------------------------


def test_the_manifest_says_pruner_levels_and_that_there_are_no_derivatives(run: Run) -> None:
    manifest = run.manifest
    assert manifest["options"]["pruner"] == "sparsegpt"
    assert manifest["derivatives"] is False
    database = LevelDatabase(run.folder / "levels")
    assert database.plan.model_digest == run.profile.digest
    assert database.plan.data_digest == manifest["data"]["calibration"]
    assert manifest["levels"]["step"] == database.plan.step
    assert manifest["levels"]["digest"] == database.digest(run.profile)
    files = list((run.folder / "levels").rglob("*.safetensors"))
    stored = sum(path.stat().st_size for path in files)
    assert stored == pytest.approx(manifest["levels"]["bytes"], rel=0.2)
    assert {load_file(path)["weight"].dtype for path in files[:3]} == {torch.bfloat16}


def test_the_size_on_disk_is_said_before_anything_is_built(
    learned: tuple[Run, list[Progress]],
) -> None:
    run, told = learned
    levels = [step for step in told if step.stage == "levels"]
    assert levels[0].announce
    assert [(step.done, step.total) for step in levels] == [(0, 3), (1, 3), (2, 3), (3, 3)]
    said = levelling.megabytes(run.manifest["levels"]["bytes"])
    assert levels[0].detail == f"{said} on disk"
    assert told.index(levels[0]) < [step.stage for step in told].index("rank")


def test_values_alone_are_asked_at_a_third_of_the_cost_and_building_is_counted(run: Run) -> None:
    with EvaluationStore.open(run.folder / "evaluations.db", create=False) as store:
        results = list(store.read())
        costs = {m.purpose: m.cost_units for m in store.measurements()}
    assert len(results) == 9
    for ask, outcome in results:
        assert not ask.derivatives
        assert isinstance(outcome, Evaluation)
        assert (outcome.gradient, outcome.cost_units) == (None, 1.0)
    for block in range(3):
        assert costs[f"levels of block {block}"] == 1.0


def test_strategies_meet_their_budgets_at_levels_but_for_one_site(run: Run) -> None:
    space, step = run.planner.space, run.manifest["levels"]["step"]
    with EvaluationStore.open(run.folder / "evaluations.db", create=False) as store:
        strategies = [ask.strategy for ask, _ in store.read()]
    for sparsity in (0.07, 0.5, 0.61, 0.9):
        (plan,) = run.plan([Request(target=Target.SPARSITY, value=sparsity)])
        assert isinstance(plan, Plan)
        assert plan.kept_params == space.kept_for_sparsity(sparsity)
        strategies.append(plan.strategy)
    for strategy in strategies:
        drops = space.cost.site_drops(strategy.values)
        assert sum(count % step > 0 for count in drops.values()) <= 1


def test_levels_know_values_only_and_are_judged_more_often_by_default(
    tmp_path: Path,
) -> None:
    options = tiny_options(tmp_path, tmp_path, tmp_path, evaluations=None)
    levels = replace(options, pruner="sparsegpt")
    assert levels.num_evaluations > 3 * options.num_evaluations, "one with derivatives costs three"
    assert replace(levels, preset="paper").num_evaluations == 110
    with pytest.raises(RequestError, match="magnitude, wanda, sparsegpt; got 'obc'"):
        replace(options, pruner="obc")


# --- variants -----------------------------------------------------------------------------------


def test_a_variant_has_exactly_the_zeros_it_names_and_updated_weights(
    variant: tuple[Plan, Path], run: Run, half_precision: Path
) -> None:
    plan, out = variant
    document = json.loads((out / "strategy.json").read_text())
    drops = run.planner.space.cost.site_drops(plan.strategy.values)
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    dense = AutoModelForCausalLM.from_pretrained(half_precision, dtype="auto")
    assert document["sparsity"] == pytest.approx(0.5, abs=1e-4)
    for site in run.profile.sites:
        weight = model.get_submodule(site.path).weight
        before = dense.get_submodule(site.path).weight
        assert weight.dtype == torch.bfloat16
        assert int((weight == 0).sum()) == drops[site.path]
        kept = weight != 0
        if drops[site.path] >= run.manifest["levels"]["step"]:
            assert not torch.equal(weight[kept], before[kept]), "what stays makes up for the rest"
    assert torch.equal(model.model.norm.weight, dense.model.norm.weight)


def test_a_variant_is_what_learning_judged(variant: tuple[Plan, Path], run: Run) -> None:
    levels = run.levels
    assert levels is not None
    plan, out = variant
    loaded = load_model(out)
    step = levels.plan.step
    drops = run.planner.space.cost.site_drops(plan.strategy.values)
    on_level = [s for s in run.profile.sites if drops[s.path] and drops[s.path] % step == 0]
    assert len(on_level) > len(run.profile.sites) / 2
    for site in on_level:
        stored = levels.read(site, drops[site.path]).float()
        assert torch.equal(loaded.model.get_submodule(site.path).weight, stored)


def test_the_same_request_gives_the_same_bits(
    variant: tuple[Plan, Path], run: Run, tmp_path: Path
) -> None:
    plan, out = variant
    again = Run.open(run.folder)
    assert prune(again, HALF, tmp_path / "again").strategy == plan.strategy
    for path in out.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_a_variant_loses_less_than_uniform_wanda_at_the_same_sparsity(
    variant: tuple[Plan, Path], run: Run, half_precision: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    plan, out = variant
    space = build_space(run.profile)
    write_variant(
        tmp_path / "wanda",
        base=half_precision,
        profile=run.profile,
        ranks=RankStore.load(run.folder / "ranks"),
        space=space,
        plan=replace(plan, strategy=space.uniform(0.5)),
        provenance={"run": run.digest, "seed": 0},
    )
    own, wanda = (
        evaluate_variant(folder, reference=str(half_precision), text=tiny_text_file, tokens=4096)
        for folder in (out, tmp_path / "wanda")
    )
    assert own.sparsity == wanda.sparsity
    assert own.kl is not None
    assert wanda.kl is not None
    assert own.kl < 0.8 * wanda.kl


def test_altered_and_missing_levels_are_noticed_before_anything_is_written(
    run: Run, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder)
    site = run.profile.sites[0]
    path = folder / "levels" / "sites" / f"{site.path}.json"
    document = json.loads(path.read_text())
    first, *_, last = document["levels"]
    document["levels"][first] = document["levels"][last]
    path.write_text(json.dumps(document))
    with pytest.raises(RunError, match="levels was altered"):
        prune(Run.open(folder), HALF, tmp_path / "out")
    path.unlink()
    with pytest.raises(RunError, match="lacks the levels of"):
        prune(Run.open(folder), HALF, tmp_path / "out")
    shutil.rmtree(folder / "levels")
    with pytest.raises(RunError, match="holds no levels"):
        prune(Run.open(folder), HALF, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert isinstance(Run.open(folder).plan([HALF])[0], Plan), "planning needs no levels"


# --- stops and refusals -------------------------------------------------------------------------

_KILLED = """
import os, signal, sys
from pathlib import Path
from unicuco.pipeline import LearnOptions, LocalBackend, learn

def sink(step):
    if step.stage == "levels" and step.done == 1:
        os.kill(os.getpid(), signal.SIGKILL)

model, out, text = sys.argv[1:]
options = LearnOptions(
    model=model, out=Path(out), calibration=Path(text), tokens=256, context=32, evaluations=4,
    seed=3, pruner="sparsegpt",
)
learn(options, backend=LocalBackend(), progress=sink)
"""


@pytest.mark.slow
def test_a_build_that_was_killed_goes_on_with_what_is_missing(
    tiny_llama: Path, tiny_text_file: Path, tmp_path: Path, quick: None
) -> None:
    out = tmp_path / "run"
    words = [sys.executable, "-c", _KILLED, tiny_llama, out, tiny_text_file]
    done = subprocess.run(list(map(str, words)), capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    first = {path: path.stat().st_mtime_ns for path in (out / "levels").rglob("*.safetensors")}
    assert first
    leftover = out / "levels" / "sites" / ".half.json.1.tmp"
    leftover.write_text("{")
    options = tiny_options(tiny_llama, out, tiny_text_file, pruner="sparsegpt", evaluations=4)
    with pytest.raises(RunError, match="add --resume"):
        learn(options, backend=LocalBackend(), progress=ignore_progress)
    told: list[Progress] = []
    resumed = learn(replace(options, resume=True), backend=LocalBackend(), progress=told.append)
    assert [step.done for step in told if step.stage == "levels"] == [1, 2]
    assert all(path.stat().st_mtime_ns == then for path, then in first.items())
    assert not leftover.exists()
    whole = learn(
        replace(options, out=tmp_path / "whole"), backend=LocalBackend(), progress=ignore_progress
    )
    assert resumed.manifest["levels"] == whole.manifest["levels"]
    # What is there already is neither built nor needs room again.
    learn(
        replace(options, resume=True, evaluations=5), backend=LocalBackend(), progress=told.append
    )
    assert told[-1].stage == "validate"


def test_a_disk_that_is_too_small_is_one_line_and_leaves_nothing(
    tiny_llama: Path, tiny_text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(levelling.shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    out = tmp_path / "run"
    options = tiny_options(tiny_llama, out, tiny_text_file, pruner="sparsegpt")
    told: list[Progress] = []
    with pytest.raises(StorageError, match=r"the levels need 0\.\d MB .* has 0\.0 MB free") as info:
        learn(options, backend=LocalBackend(), progress=told.append)
    assert "\n" not in str(info.value)
    assert told[-1].announce, "the size was said before it was refused"
    assert not out.exists()


# --- comparing ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_allocators_are_compared_on_levels(
    tiny_llama: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    options = CompareOptions(
        model=str(tiny_llama),
        allocators=("uniform", "fisher"),
        sparsities=(0.5,),
        out=tmp_path / "comparison",
        text=tiny_text_file,
        calibration=tiny_text_file,
        tokens=256,
        test_tokens=512,
        pruner="sparsegpt",
    )
    levels = compare(options, backend_factory=LocalBackend, progress=ignore_progress).results
    plain = replace(options, pruner=None, out=None)
    ranks = compare(plain, backend_factory=LocalBackend, progress=ignore_progress).results
    assert [result.allocator for result in levels] == ["uniform", "fisher"]
    assert levels[0].kl < ranks[0].kl
    again = compare(options, backend_factory=_no_backend, progress=ignore_progress).results
    assert again[0].kl == levels[0].kl, "levels are built once"
    for name in ("trim", "descent"):
        with pytest.raises(RequestError, match=f"{name} .* levels of sparsegpt"):
            compare(
                replace(options, allocators=(name,)),
                backend_factory=_no_backend,
                progress=ignore_progress,
            )
    with pytest.raises(RunError, match="another pruner"):
        compare(
            replace(options, pruner="magnitude"),
            backend_factory=_no_backend,
            progress=ignore_progress,
        )
    with pytest.raises(RequestError, match="pruner must be one of"):
        replace(options, pruner="obc")


def test_a_run_decides_what_cuts_when_its_network_is_compared(run: Run, tmp_path: Path) -> None:
    options = CompareOptions(
        model=run.manifest["base_model"]["path"],
        allocators=("uniform",),
        sparsities=(0.5,),
        run=run.folder,
        pruner="wanda",
    )
    with pytest.raises(RequestError, match="learned with --pruner sparsegpt, not wanda"):
        compare(options, backend_factory=_no_backend, progress=ignore_progress)


def _no_backend() -> LocalBackend:
    raise AssertionError("nothing is evaluated or built")
