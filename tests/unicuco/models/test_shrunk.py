from __future__ import annotations

import subprocess
import sys

import pytest

from unicuco.models.block_shapes import BlockShape, read_shapes

SHAPE = {"attention_heads": 4, "key_value_heads": 2, "intermediate_size": 8}

# Ways in which a program may come to both; the classes are known in each.
ORDERS = {
    "ours first": "import unicuco; from transformers import AutoConfig, AutoModelForCausalLM",
    "ours last": "from transformers import AutoConfig, AutoModelForCausalLM; import unicuco",
    "a family first": "import unicuco; from transformers import LlamaForCausalLM; "
    "from transformers import AutoConfig, AutoModelForCausalLM",
}


@pytest.mark.parametrize("order", ORDERS)
def test_automatic_classes_know_shrunk_models_once_unicuco_is_imported(order: str) -> None:
    code = (
        f"{ORDERS[order]}\n"
        "config = AutoConfig.for_model('shrunk_qwen2', hidden_size=16, num_attention_heads=4,"
        " num_key_value_heads=2, intermediate_size=8, vocab_size=9, num_hidden_layers=1,"
        f" block_shapes=[{SHAPE!r}])\n"
        "print(type(AutoModelForCausalLM.from_config(config)).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "ShrunkQwen2ForCausalLM"


def test_importing_unicuco_loads_nothing() -> None:
    heavy = ("torch", "transformers", "ray", "gpytorch", "numpy")
    code = f"import sys, unicuco; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def test_shapes_are_read_back_as_they_were_written() -> None:
    shapes = (BlockShape(**SHAPE), BlockShape(**{**SHAPE, "intermediate_size": 0}))
    assert read_shapes([shape.to_dict() for shape in shapes], 2) == shapes


@pytest.mark.parametrize(
    "change",
    [
        {"attention_heads": 3},
        {"attention_heads": 0},
        {"attention_heads": 0, "key_value_heads": 0, "intermediate_size": 0},
        {"intermediate_size": -1},
        {"intermediate_size": 8.0},
        {"intermediate_size": True},
        {"unknown": 1},
    ],
)
def test_impossible_shapes_are_refused_by_block(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"block_shapes\[1\]"):
        read_shapes([SHAPE, {**SHAPE, **change}], 2)
