"""A model in stages measures what the whole one does, reading no more than it needs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from unicuco.dimensions import Granularity
from unicuco.errors import EvaluationError, ModelError, RequestError
from unicuco.headers import read_header
from unicuco.models import weight_files
from unicuco.models.reading import TensorReader
from unicuco.models.weights import WeightFile, WeightSource, folder_source
from unicuco.shards.evaluator import (
    ShardedEvaluator,
    StageEvaluator,
    stage_arrays,
    stage_configs,
)
from unicuco.shards.plan import ShardPlan
from unicuco.testing.cases import EvaluationCase, make_evaluation_case
from unicuco.testing.tiny import tiny_model_folder
from unicuco.types import Ask, Evaluation, Strategy

WHOLE = ShardPlan(stages=(range(3),))
TWO = ShardPlan(stages=(range(1), range(1, 3)))
THREE = ShardPlan(stages=(range(1), range(1, 2), range(2, 3)))


def random_strategy(case: EvaluationCase, sparsity: float, seed: int = 0) -> Strategy:
    generator = torch.Generator().manual_seed(seed)
    unit = torch.rand(1, case.space.num_axes, generator=generator)
    return case.space.decode_exact(unit, [case.space.kept_for_sparsity(sparsity)])[0]


def assert_same(found: Evaluation, expected: Evaluation) -> None:
    assert found.kl == pytest.approx(expected.kl, rel=1e-5)
    assert found.gradient == (
        None if expected.gradient is None else pytest.approx(expected.gradient, rel=1e-4)
    )
    for own, other in zip(found.tasks, expected.tasks, strict=True):
        assert (own.task, own.kl) == (other.task, pytest.approx(other.kl, rel=1e-5))
        assert own.gradient == pytest.approx(other.gradient, rel=1e-4)
    others = {"kl": 0.0, "gradient": None, "wall_s": 0.0, "tasks": ()}
    assert replace(found, **others) == replace(expected, **others)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> EvaluationCase:
    folder = tmp_path_factory.mktemp("deep") / "model"
    return make_evaluation_case(tiny_model_folder(folder, num_blocks=3, tied=True))


@pytest.mark.parametrize(
    ("family", "tied"),
    [
        ("llama", False), ("llama", True), ("qwen2", False), ("opt", True), ("gpt2", True),
        ("gpt2", False), ("gpt_neox", False), ("gpt_neo", True), ("mistral", False),
        ("llava", False),
    ],
)  # fmt: skip
def test_stages_measure_what_the_whole_model_does(family: str, tied: bool, tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / "model", family, num_blocks=3, tied=tied)
    case = make_evaluation_case(folder)
    whole = case.evaluator()
    for plan in (WHOLE, THREE):
        stages = ShardedEvaluator(case.config, plan, case.arrays)
        for seed, derivatives in enumerate((False, True, True)):
            strategy = random_strategy(case, 0.3 + 0.2 * seed, seed)
            expected = whole.evaluate(strategy, derivatives=derivatives)
            assert_same(stages.evaluate(strategy, derivatives=derivatives), expected)


def test_fidelities_tasks_and_block_axes_are_the_whole_models(deep: EvaluationCase) -> None:
    strategy = random_strategy(deep, 0.5)
    width = deep.tokens.context
    for tokens, changes in (
        (5, {}),
        (width + 1, {}),
        (None, {"tasks": ("code", "prose")}),
        (width, {"tasks": ("code", "prose")}),
    ):
        case = replace(deep, config=replace(deep.config, **changes))
        stages = ShardedEvaluator(case.config, TWO, case.arrays)
        found = stages.evaluate(strategy, tokens=tokens, derivatives=True)
        assert_same(found, case.evaluator().evaluate(strategy, tokens=tokens, derivatives=True))
    blocks = make_evaluation_case(deep.loaded.folder, granularity=Granularity.BLOCK)
    uniform = blocks.space.uniform(0.6)
    assert_same(
        ShardedEvaluator(blocks.config, TWO, blocks.arrays).evaluate(uniform, derivatives=True),
        blocks.evaluator().evaluate(uniform, derivatives=True),
    )


def test_weights_stay_as_they_are_stored(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / "model", num_blocks=3, dtype=torch.bfloat16)
    case = make_evaluation_case(folder)
    stages = ShardedEvaluator(case.config, THREE, case.arrays)
    for stage in stages.stages:
        assert {tensor.dtype for tensor in stage.stage.dense.values()} == {torch.bfloat16}
    strategy = random_strategy(case, 0.5)
    assert_same(
        stages.evaluate(strategy, derivatives=True),
        case.evaluator().evaluate(strategy, derivatives=True),
    )


def test_several_strategies_are_under_way_at_once(deep: EvaluationCase) -> None:
    stages = ShardedEvaluator(deep.config, TWO, deep.arrays).stages
    asks = [
        Ask(
            round=0,
            position=k,
            strategy=random_strategy(deep, 0.3 + 0.2 * k, k),
            derivatives=k != 1,
        )
        for k in range(3)
    ]
    ahead = [stages[0].forward(ask, None) for ask in asks]
    turned = [stages[1].forward(ask, relay) for ask, relay in zip(asks, ahead, strict=True)]
    whole = deep.evaluator()
    for k, ask in reversed(list(enumerate(asks))):
        found = stages[0].backward(ask, turned[k]) if ask.derivatives else turned[k]
        expected = whole.evaluate(ask.strategy, derivatives=ask.derivatives)
        assert_same(found, expected)
    assert not any(stage._received for stage in stages)


@dataclass(frozen=True)
class Watched:
    """A source that notes what is read of it: file, first byte, bytes."""

    genuine: WeightSource
    reads: list[tuple[str, int, int]]

    @property
    def files(self) -> tuple[WeightFile, ...]:
        return self.genuine.files

    @property
    def place(self) -> str:
        return self.genuine.place

    def check(self, file: WeightFile) -> None:
        self.genuine.check(file)

    def read_into(self, file: WeightFile, begin: int, target: memoryview) -> None:
        self.reads.append((file.name, begin, len(target)))
        self.genuine.read_into(file, begin, target)


def test_a_stage_reads_its_own_tensors_and_no_others(deep: EvaluationCase) -> None:
    assert deep.config.weights is not None
    watched = Watched(deep.config.weights, [])
    (header,) = map(read_header, weight_files(deep.loaded.folder))
    names = {
        (header.path.name, header.data_offset + entry.begin, entry.end - entry.begin): entry.name
        for entry in header.entries
    }
    names[header.path.name, 0, header.data_offset] = ""
    configs = stage_configs(replace(deep.config, weights=watched), THREE)
    read: list[str] = []
    for number, config in enumerate(configs):
        StageEvaluator(config, stage_arrays(config, deep.arrays))
        found = [names[place] for place in watched.reads]
        watched.reads.clear()
        assert found.count("") == 1, "a header is read once"
        own = {name for name in found if ".layers." in name}
        assert own == {name for name in own if f".layers.{number}." in name} != set()
        read += filter(None, found)
    blocks = [name for name in read if ".layers." in name]
    assert len(blocks) == len(set(blocks)), "nothing of a block is read twice"
    others = [name for name in read if ".layers." not in name]
    # The embedding is the head too: the first and the last stage hold it.
    assert sorted(others) == [
        "model.embed_tokens.weight", "model.embed_tokens.weight", "model.norm.weight"
    ]  # fmt: skip


def test_what_is_not_a_stages_own_takes_no_memory(deep: EvaluationCase) -> None:
    _, middle, _ = ShardedEvaluator(deep.config, THREE, deep.arrays).stages
    held = {
        name
        for name, parameter in middle.stage.skeleton.model.named_parameters()
        if not parameter.is_meta and parameter.untyped_storage().nbytes() > 4
    }
    assert held == {
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.post_attention_layernorm.weight",
    }
    assert set(middle.stage.dense) == {
        site.path for site in deep.loaded.profile.sites if site.block == 1
    }


def test_a_pruned_model_that_overflows_is_an_error_and_leaves_nothing_behind(
    tmp_path: Path,
) -> None:
    folder = tiny_model_folder(tmp_path / "model", num_blocks=3)
    case = make_evaluation_case(folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    for factor in (torch.inf, 1e38):
        broken = {**tensors, name: tensors[name] * factor}
        save_file(broken, folder / "model.safetensors", metadata={"format": "pt"})
        if factor == torch.inf:
            with pytest.raises(ModelError, match="NaN or infinite"):
                ShardedEvaluator(case.config, TWO, case.arrays)
    stages = ShardedEvaluator(case.config, TWO, case.arrays)
    with pytest.raises(EvaluationError, match="overflows"):
        stages.evaluate(case.space.uniform(0.2), derivatives=True)
    assert not any(stage._received for stage in stages.stages)


def test_what_stages_can_not_do_is_one_line(deep: EvaluationCase, tmp_path: Path) -> None:
    mixed = replace(deep.config, dimensions=("sparsity", "depth"))
    with pytest.raises(RequestError, match="sparsity alone"):
        ShardedEvaluator(mixed, TWO, deep.arrays)
    reader = TensorReader(folder_source(deep.loaded.folder), deep.loaded.model)
    with pytest.raises(ModelError, match="holds no tensor for lm_tail"):
        reader.read(["lm_tail"], (1,))
    with pytest.raises(ModelError, match="does not fit"):
        reader.read(["model.norm.weight"], (1,))
    with pytest.raises(ModelError, match="no model folder"):
        folder_source(tmp_path / "nothing")
