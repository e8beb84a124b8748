from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from unicuco.dimensions import Granularity
from unicuco.errors import VariantError
from unicuco.export import read_variant
from unicuco.models import load_model
from unicuco.pipeline.predicting import WholePredictor
from unicuco.testing.cases import EvaluationCase, make_evaluation_case
from unicuco.testing.tiny import tiny_model_folder
from unicuco.testing.variants import write_shrunk_case

DIMENSIONS = ("sparsity", "depth", "width")
ATTENTION = "model.layers.{}.self_attn"
MLP = "model.layers.{}.mlp"
FEW_MATRICES = "model.layers.2.mlp.up_proj", "model.layers.2.mlp.down_proj"
# Kind of variant -> settings, and whether the family's own configuration can describe it.
KINDS: dict[str, tuple[dict[str, float], bool]] = {
    "widths": ({f"width/{MLP.format(0)}": 0.5, f"width/{MLP.format(2)}": 0.25}, False),
    "heads": ({f"width/{ATTENTION.format(1)}": 0.5}, False),
    "parts missing": ({f"depth/{ATTENTION.format(0)}": 1, f"depth/{MLP.format(2)}": 1}, False),
    "block missing": ({f"depth/{ATTENTION.format(1)}": 1, f"depth/{MLP.format(1)}": 1}, True),
    "alike": ({f"width/{MLP.format(block)}": 0.5 for block in range(3)}, True),
    "mixed": (
        {
            f"depth/{ATTENTION.format(0)}": 1,
            f"depth/{MLP.format(1)}": 1,
            f"width/{ATTENTION.format(2)}": 0.5,
            f"width/{MLP.format(2)}": 0.75,
            f"sparsity/{FEW_MATRICES[0]}": 0.5,
            f"sparsity/{FEW_MATRICES[1]}": 0.25,
        },
        False,
    ),
}


def prepared(folder: Path, family: str) -> EvaluationCase:
    model = tiny_model_folder(folder, family, num_blocks=3, tied=True)
    return make_evaluation_case(model, dimensions=DIMENSIONS)


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> EvaluationCase:
    return prepared(tmp_path_factory.mktemp("shrunk") / request.param, request.param)


def logits(model: torch.nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("kind", KINDS)
def test_a_shrunk_folder_predicts_what_was_judged_and_is_as_small_as_was_said(
    case: EvaluationCase, kind: str, tmp_path: Path
) -> None:
    settings, is_plain = KINDS[kind]
    strategy = write_shrunk_case(case, settings, tmp_path / "out")
    judged = case.evaluator().model_at(strategy)
    loaded = load_model(tmp_path / "out")
    ids = case.tokens.ids
    torch.testing.assert_close(logits(loaded.model, ids), logits(judged, ids), rtol=0, atol=2e-4)
    cost = case.space.cost
    document = read_variant(tmp_path / "out")
    assert document.plan.num_bytes == loaded.profile.total_bytes == stored_bytes(tmp_path / "out")
    zeroed = sum(cost.shape(strategy.values).zeroed)
    assert loaded.profile.total_params - zeroed == cost.kept_params(strategy.values)
    found = WholePredictor(tmp_path / "out").sparsity(document.site_weights)
    assert found == document.plan.sparsity
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert ("block_shapes" not in config) == is_plain
    assert config["model_type"].startswith("shrunk_") != is_plain


INSIDE_HEADS: dict[str, dict[str, float]] = {
    "pairs": {f"low_rank/{ATTENTION.format(1)}.pairs": 0.5},
    "ranks": {f"low_rank/{ATTENTION.format(0)}.ranks": 0.5},
    "all": {
        f"depth/{ATTENTION.format(0)}": 1,
        f"width/{ATTENTION.format(1)}": 0.5,
        f"width/{MLP.format(1)}": 0.5,
        f"low_rank/{ATTENTION.format(1)}.pairs": 0.5,
        f"low_rank/{ATTENTION.format(1)}.ranks": 0.25,
        f"low_rank/{ATTENTION.format(2)}.ranks": 0.75,
    },
}


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def narrow_case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> EvaluationCase:
    folder = tmp_path_factory.mktemp("inside") / request.param
    base = tiny_model_folder(folder, request.param, num_blocks=3, tied=True)
    return make_evaluation_case(base, dimensions=("depth", "width", "low_rank"))


@pytest.mark.parametrize("kind", INSIDE_HEADS)
def test_heads_that_are_narrower_inside_predict_and_generate_what_was_judged(
    narrow_case: EvaluationCase, kind: str, tmp_path: Path
) -> None:
    strategy = write_shrunk_case(narrow_case, INSIDE_HEADS[kind], tmp_path / "out")
    judged = narrow_case.evaluator().model_at(strategy)
    loaded, ids, cost = load_model(tmp_path / "out"), narrow_case.tokens.ids, narrow_case.space.cost
    torch.testing.assert_close(logits(loaded.model, ids), logits(judged, ids), rtol=0, atol=2e-4)
    assert loaded.profile.total_params == cost.kept_params(strategy.values)
    assert stored_bytes(tmp_path / "out") == cost.num_bytes(strategy.values)
    cached = loaded.model.generate(
        ids[:1, :8], max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    plain = ids[:1, :8]
    for _ in range(6):
        plain = torch.cat([plain, logits(judged, plain)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(cached, plain)


def stored_bytes(folder: Path) -> int:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_generating_with_a_cache_says_what_plain_passes_say_without_attention_in_block_0(
    case: EvaluationCase, tmp_path: Path
) -> None:
    write_shrunk_case(case, KINDS["mixed"][0], tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True)
    ids = case.tokens.ids[:1, :8]
    cached = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    for _ in range(12):
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(cached, ids)


def test_names_and_norms_of_what_is_gone_are_absent(case: EvaluationCase, tmp_path: Path) -> None:
    write_shrunk_case(case, KINDS["parts missing"][0], tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert "model.layers.0.input_layernorm.weight" not in names
    assert "model.layers.0.post_attention_layernorm.weight" in names
    assert not any(name.startswith("model.layers.2.mlp") for name in names)
    assert not any(name.startswith("model.layers.0.self_attn") for name in names)


@pytest.mark.parametrize("family", ["gpt2", "opt", "mistral"])
def test_whole_blocks_go_from_any_family(family: str, tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / "base", family, num_blocks=3, max_shard_size="20KB")
    case = make_evaluation_case(folder, dimensions=("depth",), granularity=Granularity.BLOCK)
    strategy = write_shrunk_case(case, {"depth/block.1": 1}, tmp_path / "out")
    loaded = load_model(tmp_path / "out")
    assert loaded.profile.num_blocks == 2
    judged = logits(case.evaluator().model_at(strategy), case.tokens.ids)
    torch.testing.assert_close(logits(loaded.model, case.tokens.ids), judged, rtol=0, atol=1e-4)
    assert loaded.profile.total_params == case.space.cost.kept_params(strategy.values)


def test_what_no_configuration_describes_is_refused_in_one_line(tmp_path: Path) -> None:
    gpt = make_evaluation_case(tiny_model_folder(tmp_path / "gpt2", "gpt2"), dimensions=("depth",))
    with pytest.raises(VariantError, match="granularity block") as caught:
        write_shrunk_case(gpt, {gpt.space.names[0]: 1}, tmp_path / "out")
    assert "\n" not in str(caught.value)
    neo = make_evaluation_case(
        tiny_model_folder(tmp_path / "neo", "gpt_neo"),
        dimensions=("depth",),
        granularity=Granularity.BLOCK,
    )
    with pytest.raises(VariantError, match="attention_types"):
        write_shrunk_case(neo, {"depth/block.0": 1}, tmp_path / "out")
    with pytest.raises(VariantError, match="every block"):
        write_shrunk_case(neo, {"depth/block.0": 1, "depth/block.1": 1}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"block_shapes": []}, "num_hidden_layers = 3"),
        ({"block_shapes": [{"attention_heads": 4}] * 3}, "whole numbers"),
        (
            {
                "block_shapes": [
                    {"attention_heads": 3, "key_value_heads": 2, "intermediate_size": 8}
                ]
                * 3
            },
            "multiple of key and value heads",
        ),
    ],
)
def test_shapes_that_disagree_with_their_folder_are_one_line(
    case: EvaluationCase, tmp_path: Path, change: dict[str, object], line: str
) -> None:
    write_shrunk_case(case, KINDS["widths"][0], tmp_path / "out")
    (tmp_path / "out" / "strategy.json").unlink()
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(Exception, match=line) as caught:
        load_model(tmp_path / "out")
    assert "\n" not in str(caught.value)
