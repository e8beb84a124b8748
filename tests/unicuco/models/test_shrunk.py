from __future__ import annotations

import subprocess
import sys

import pytest

from unicuco.models.block_shapes import BlockShape, held_lines, read_pairs, read_shapes

SHAPE = {"attention_heads": 4, "key_value_heads": 2, "intermediate_size": 8}

# Ways in which a program may come to both; the classes are known in each.
ORDERS = {
    "ours first": "import unicuco; from transformers import AutoConfig, AutoModelForCausalLM",
    "ours last": "from transformers import AutoConfig, AutoModelForCausalLM; import unicuco",
    "a family first": "import unicuco; from transformers import LlamaForCausalLM; "
    "from transformers import AutoConfig, AutoModelForCausalLM",
}


@pytest.mark.slow
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


def test_lines_that_are_held_are_whole_pairs_and_first_ranks() -> None:
    shape = BlockShape(**SHAPE, query_key_size=4, value_size=3)  # of 6; 2 query heads per group
    (pairs,) = read_pairs([[[0, 2], [1, 2]]], [shape], 6)
    lines = held_lines(shape, pairs, 6)
    assert lines["key"] == [0, 2, 3, 5, 7, 8, 10, 11]
    assert lines["query"] == [0, 2, 3, 5, 6, 8, 9, 11, 13, 14, 16, 17, 19, 20, 22, 23]
    assert lines["value"] == [0, 1, 2, 6, 7, 8]
    assert lines["output"] == [0, 1, 2, 6, 7, 8, 12, 13, 14, 18, 19, 20]


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (None, "rotary_pairs.0. must give 2 lists of 2"),
        ([None], "must give 2 lists"),
        ([[[0, 1]]], "must give 2 lists"),
        ([[[0, 1], [1, 1]]], "must give 2 lists"),
        ([[[0, 1], [1, 3]]], "below 3"),
        ([[[0, 1], [1, True]]], "must give 2 lists"),
        ([[[0, 1], [1, 2]]] * 2, "list of 1 blocks"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(given: object, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        read_pairs(given, [BlockShape(**SHAPE, query_key_size=4)], 6)


def test_heads_hold_no_more_than_they_have() -> None:
    with pytest.raises(ValueError, match="more than head_dim = 6"):
        read_pairs(None, [BlockShape(**SHAPE, value_size=7)], 6)


@pytest.mark.parametrize(
    "change",
    [
        {"value_size": 0},
        {"query_key_size": 3},
        {"attention_heads": 0, "key_value_heads": 0, "value_size": 2},
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
