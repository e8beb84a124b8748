"""Passes over a model block by block give the numbers of the whole one, to the bit."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import unicuco
from unicuco.errors import ModelError
from unicuco.evaluate import dense_reference
from unicuco.importance import METRICS
from unicuco.models import load_model
from unicuco.shards.profile import load_ghost
from unicuco.shards.streaming import StreamedModel
from unicuco.testing.cases import EvaluationCase, make_evaluation_case, random_tokens
from unicuco.testing.tiny import FAMILIES, tiny_model_folder


def streamed(folder: Path) -> StreamedModel:
    ghost = load_ghost(folder)
    return StreamedModel(folder, ghost.model.config.to_json_string(), ghost.profile)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_profile_needs_no_weights(family: str, tmp_path: Path) -> None:
    for tied in (False, True):
        folder = tiny_model_folder(
            tmp_path / str(tied), family, num_blocks=3, tied=tied, dtype=torch.bfloat16
        )
        loaded = load_model(folder)
        ghost = load_ghost(folder)
        assert ghost.profile == loaded.profile
        assert ghost.model.config.to_json_string() == loaded.model.config.to_json_string()


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "gpt2"])
def test_every_pass_is_the_whole_models(family: str, tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / "model", family, num_blocks=3, tied=True)
    case = make_evaluation_case(folder)
    model = streamed(folder)
    model.check_causal()
    ranks = model.build_ranks(METRICS["wanda"], case.calibration, tmp_path).ranks
    assert ranks.keys() == case.ranks.keys()
    assert all(torch.equal(ranks[path], case.ranks[path]) for path in ranks)
    fisher = model.fisher_rank_sums(ranks, case.calibration, tmp_path, seed=0)
    assert list(fisher) == list(case.fisher)
    assert all(torch.equal(fisher[path], case.fisher[path]) for path in fisher)
    reference = model.dense_reference(case.tokens.ids)
    expected = dense_reference(case.loaded.model, case.tokens.ids)
    assert torch.equal(reference.probabilities, expected.probabilities)
    assert torch.equal(reference.negative_entropy, expected.negative_entropy)
    strategies = [case.space.uniform(sparsity) for sparsity in (0.0, 0.5, 0.8)]
    drops = [case.space.cost.site_drops(strategy.values) for strategy in strategies]
    found = model.window_kl(drops, case.tokens.ids, reference, ranks)
    whole = case.evaluator()
    for own, strategy in zip(found, strategies, strict=True):
        assert torch.equal(own, whole.window_kl(strategy))


def test_a_pass_leaves_no_weights_behind(case: EvaluationCase) -> None:
    model = streamed(case.loaded.folder)
    model.dense_reference(case.tokens.ids)
    held = sum(
        parameter.untyped_storage().nbytes()
        for parameter in model._skeleton.model.parameters()
        if not parameter.is_meta
    )
    assert held <= 4 * len(model._skeleton.aliases), "ghosts alone"


def test_what_is_wrong_with_a_model_is_one_line(tmp_path: Path, case: EvaluationCase) -> None:
    folder = tiny_model_folder(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    names = ("model.norm.weight", "lm_head.weight")
    save_file(
        {**tensors, **{name: tensors[name] * 1e25 for name in names}}, folder / "model.safetensors"
    )
    with pytest.raises(ModelError, match="predicts NaN or infinity"):
        streamed(folder).check_causal()
    name = "model.layers.1.mlp.down_proj.weight"
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=f"no tensor for {name}"):
        streamed(folder).check_causal()
    known = random_tokens(seed=1)
    unknown = replace(known, ids=known.ids + 1000)
    with pytest.raises(ModelError, match="belongs to"):
        streamed(case.loaded.folder).build_ranks(METRICS["wanda"], unknown, tmp_path)


@pytest.mark.slow
def test_no_pass_needs_memory_for_the_whole_model(tmp_path: Path) -> None:
    folder = tiny_model_folder(
        tmp_path / "model", hidden_size=512, num_blocks=16, num_heads=8, num_kv_heads=4
    )
    size = (folder / "model.safetensors").stat().st_size
    grown = {
        kind: int(
            subprocess.run(
                [sys.executable, "-m", "tests.unicuco.shards.memory_probe", str(folder), kind],
                capture_output=True,
                text=True,
                check=True,
                cwd=Path(unicuco.__file__).parents[1],
            ).stdout
        )
        for kind in ("whole", "blockwise")
    }
    assert grown["whole"] > size
    assert grown["blockwise"] < 0.6 * size, "most of it the library's own"
