from __future__ import annotations

from pathlib import Path

import pytest
import torch

from unicuco.engines.sketch import NUM_SUMS, Sketch, first_difference, folded, signs, sketch_of
from unicuco.models import load_model
from unicuco.testing import tiny_model_folder


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "gpt2"])
def test_every_tensor_is_in_it_and_any_changed_weight_is_found(family: str, tmp_path: Path) -> None:
    model = load_model(tiny_model_folder(tmp_path / "model", family)).model
    before = sketch_of(model)
    assert set(before.sums) == set(dict(model.named_parameters(remove_duplicate=False)))
    assert first_difference(before, sketch_of(model)) is None
    for name, tensor in model.named_parameters():
        kept = tensor.data.clone()
        place = tuple(size // 2 for size in tensor.shape)
        tensor.data[place] += kept.std() if tensor.numel() > 1 and kept.std() > 0 else 1.0
        found = first_difference(before, sketch_of(model))
        assert found is not None, name
        tensor.data = kept
    assert first_difference(before, sketch_of(model)) is None


def test_it_is_the_product_with_the_fixed_signs_however_the_matrix_is_stored() -> None:
    linear = torch.nn.Linear(5, 130).requires_grad_(False)
    vector = signs(5, linear.weight)
    assert set(vector.tolist()) <= {-1.0, 1.0}
    sums = [
        sum(float(linear.weight[row] @ vector) for row in range(group, 130, NUM_SUMS))
        for group in range(NUM_SUMS)
    ]
    assert sketch_of(linear).sums[".weight"] == pytest.approx(sums, abs=1e-5)
    assert sum(folded(torch.arange(130.0))) == 129 * 130 / 2


def test_order_of_addition_is_no_difference_and_nan_is() -> None:
    matrix = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    vector = signs(512, matrix)
    one = Sketch(1e-7, {"a": folded(matrix @ vector)})
    other = Sketch(1e-7, {"a": folded((matrix.double() @ vector.double()).float()), "b": [1.0]})
    assert first_difference(one, other) is None
    coarse = Sketch(0.0078, {"a": folded((matrix.bfloat16() @ vector.bfloat16()).float())})
    assert first_difference(one, coarse) is None
    assert first_difference(one, Sketch(1e-7, {"a": [float("nan")] * NUM_SUMS})) == "a"
    assert first_difference(Sketch(1e-7, {"a": [0.0] * NUM_SUMS}), one) == "a"
