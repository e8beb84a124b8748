from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from unicuco.calibration import token_windows
from unicuco.evaluate import LocalEvaluator
from unicuco.evaluate.arrays import pack_model
from unicuco.importance.modegpt import (
    LEVERAGE_RIDGE,
    leverage_order,
    pair_order,
    stillness,
    value_bases,
)
from unicuco.importance.unit_rivals import modegpt_units, sliced_units
from unicuco.importance.units import UnitStore, fit_columns
from unicuco.models import load_tokenizer
from unicuco.space import Narrowing
from unicuco.testing.cases import EvaluationCase, make_evaluation_case, random_tokens
from unicuco.testing.tiny import tiny_model_folder
from unicuco.types import Strategy

GROUPS, HEADS, SIZE, HIDDEN, TOKENS = 2, 3, 8, 12, 300  # query heads per group
DIMENSIONS = ("width", "low_rank")


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


@pytest.fixture(scope="module")
def inputs() -> Tensor:
    """Inputs that depend on each other and differ in size; the last is 1, as for a bias."""
    x = drawn(TOKENS, HIDDEN, seed=0) @ (drawn(HIDDEN, HIDDEN, seed=1) ** 3)
    return torch.cat([x, torch.ones(TOKENS, 1)], dim=1)


@pytest.fixture(scope="module")
def moment(inputs: Tensor) -> Tensor:
    return inputs.T @ inputs / TOKENS


# --- Nyström ------------------------------------------------------------------------------------


def test_channels_go_by_their_ridge_leverage(moment: Tensor) -> None:
    ridge = LEVERAGE_RIDGE * moment.diagonal().mean() * torch.eye(len(moment))
    leverage = [float((moment @ torch.linalg.inv(moment + ridge))[k, k]) for k in range(13)]
    assert leverage_order(moment).tolist() == sorted(range(13), key=leverage.__getitem__)


def test_the_closed_form_is_least_squares(inputs: Tensor, moment: Tensor) -> None:
    weight, kept = drawn(5, 13, seed=2), torch.tensor([0, 3, 4, 9, 12])
    # Damping is as much more text, in which every input is active alone.
    damping = math.sqrt(0.01 * float(moment.diagonal().mean()) * TOKENS)
    x = torch.cat([inputs, damping * torch.eye(13)])
    best = torch.linalg.lstsq(x[:, kept], x @ weight.T).solution.T
    torch.testing.assert_close(fit_columns(weight, moment, kept), best)


# --- CR -----------------------------------------------------------------------------------------


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary embedding of ``t x n x d`` by ``t x d/2`` angles, one pair at a time."""
    out, half = x.clone(), x.shape[-1] // 2
    for p in range(half):
        cos, sin = angles[:, None, p].cos(), angles[:, None, p].sin()
        out[..., p] = x[..., p] * cos - x[..., p + half] * sin
        out[..., p + half] = x[..., p + half] * cos + x[..., p] * sin
    return out


def test_pairs_go_by_the_norms_of_what_is_embedded(inputs: Tensor, moment: Tensor) -> None:
    query, key = drawn(GROUPS * HEADS * SIZE, 13, seed=3), drawn(GROUPS * SIZE, 13, seed=4)
    order = pair_order(query, key, moment, GROUPS)
    angles = drawn(TOKENS, SIZE // 2, seed=5)
    q = turned((inputs @ query.T).view(TOKENS, -1, SIZE), angles)
    k = turned((inputs @ key.T).view(TOKENS, -1, SIZE), angles)
    for group in range(GROUPS):
        of_group = q[:, group * HEADS : (group + 1) * HEADS]
        norms = [
            float(of_group[..., [p, p + SIZE // 2]].norm() * k[:, group, [p, p + SIZE // 2]].norm())
            for p in range(SIZE // 2)
        ]
        assert order[group].tolist() == sorted(range(SIZE // 2), key=norms.__getitem__)


def test_scores_of_the_pairs_that_stay_are_nearer_than_those_of_the_largest_weights(
    inputs: Tensor, moment: Tensor
) -> None:
    query, key = drawn(GROUPS * HEADS * SIZE, 13, seed=3), drawn(GROUPS * SIZE, 13, seed=4)
    half = SIZE // 2
    by_weight = pair_order(query, key, torch.eye(13), GROUPS)
    angles = drawn(TOKENS, half, seed=5)
    q = turned((inputs @ query.T).view(TOKENS, -1, SIZE), angles)
    k = turned((inputs @ key.T).view(TOKENS, -1, SIZE), angles)

    def error(order: Tensor, lost: int) -> float:
        total = 0.0
        for head in range(GROUPS * HEADS):
            gone = order[head // HEADS, :lost]
            lines = torch.cat([gone, gone + half])
            total += float((q[:, head, lines] @ k[:, head // HEADS, lines].T).square().sum())
        return total

    ours = pair_order(query, key, moment, GROUPS)
    errors = [(error(ours, lost), error(by_weight, lost)) for lost in range(1, half)]
    assert all(own <= other for own, other in errors)
    assert errors[-1][0] < 0.9 * errors[-1][1]


def test_what_all_keys_have_in_common_is_not_counted(inputs: Tensor, moment: Tensor) -> None:
    query, key = drawn(GROUPS * HEADS * SIZE, 13, seed=3), drawn(GROUPS * SIZE, 13, seed=4)
    frequencies = torch.tensor([1.0, 0.1, 0.01, 0.0])
    still = stillness(frequencies, 100)
    key[:, -1] = 1e4  # a bias
    order = pair_order(query, key, moment, GROUPS, still=still)
    q = (inputs @ query.T).view(TOKENS, -1, SIZE)
    mean, around = (key @ moment[:, -1]), inputs - inputs.mean(0)
    for group in range(GROUPS):
        scores = []
        for p in range(SIZE // 2):
            lines = [p, p + SIZE // 2]
            norm = q[:, group * HEADS : (group + 1) * HEADS][..., lines].square().sum()
            own = (around @ key[[group * SIZE + line for line in lines]].T).square().mean(0).sum()
            constant = mean[[group * SIZE + line for line in lines]]
            turning = turned(
                torch.cat([constant[:1], constant[1:]]).expand(100, 1, 2),
                torch.arange(100.0).double()[:, None] * frequencies[p],
            )
            scores.append(float(norm * (own + turning.var(0, correction=0).sum())))
        assert order[group].tolist() == sorted(range(SIZE // 2), key=scores.__getitem__)


# --- SVD ----------------------------------------------------------------------------------------


def test_the_first_coordinates_of_every_head_are_the_best_of_their_rank(moment: Tensor) -> None:
    value, output = drawn(GROUPS * SIZE, 13, seed=6), drawn(HIDDEN, GROUPS * HEADS * SIZE, seed=7)
    bases = value_bases(value, output, moment, GROUPS)
    root = torch.linalg.cholesky(moment)
    for group in range(GROUPS):
        v = value[group * SIZE : (group + 1) * SIZE]
        heads = range(group * HEADS, (group + 1) * HEADS)
        outputs = [output[:, head * SIZE : (head + 1) * SIZE] for head in heads]
        whole = torch.cat(outputs) @ v @ root
        spectrum = torch.linalg.svdvals(whole)
        for rank in range(1, SIZE + 1):
            left = torch.cat([own @ bases[1, group, :, :rank] for own in outputs])
            found = (whole - left @ bases[0, group, :rank] @ v @ root).norm()
            least = spectrum[rank:SIZE].norm()
            # The ridge, for text that was not seen, costs a little of what was.
            assert float(least) - 1e-9 <= float(found) <= 1.001 * float(least) + 1e-9
            sliced = (whole - torch.cat(outputs)[:, :rank] @ v[:rank] @ root).norm()
            assert rank == SIZE or float(found) < float(sliced)


def test_values_that_are_never_read_make_no_trouble() -> None:
    bases = value_bases(torch.zeros(8, 13), torch.zeros(12, 24), torch.zeros(13, 13), 1)
    assert bool(torch.isfinite(bases).all())


# --- on models ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(trained_folder: Path, tiny_text_file: Path) -> EvaluationCase:
    """A trained model and text of the kind that it was trained on."""
    tokenizer = load_tokenizer(trained_folder)
    lines = tiny_text_file.read_text(encoding="utf-8")
    halves = [
        token_windows(tokenizer, text, tokens=1024, context=64)
        for text in (lines[: len(lines) // 2], lines[len(lines) // 2 :])
    ]
    return make_evaluation_case(
        trained_folder, tokens=halves[0], calibration=halves[1], dimensions=DIMENSIONS
    )


def kl(case: EvaluationCase, units: UnitStore, settings: Callable[[str], float]) -> float:
    state = {name: p.detach() for name, p in case.loaded.model.named_parameters()}
    arrays = {**case.arrays, **pack_model(state, case.ranks, case.fisher, units)}
    names = case.space.names
    return (
        LocalEvaluator(case.config, arrays)
        .evaluate(Strategy(settings=tuple((n, settings(n)) for n in names)))
        .kl
    )


@pytest.mark.parametrize("module", [".ranks", ".mlp"])
def test_modules_are_better_than_slicing_as_much(trained: EvaluationCase, module: str) -> None:
    assert trained.units is not None
    published = modegpt_units(trained.loaded, trained.calibration, trained.units)
    for share in (0.25, 0.5):

        def settings(name: str, share: float = share) -> float:
            return share * name.endswith(module)

        sliced = kl(trained, sliced_units(trained.loaded), settings)
        for units in (trained.units, published):
            assert 0 < kl(trained, units, settings) < sliced


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_nothing_lost_is_the_dense_model(family: str, tmp_path: Path) -> None:
    case = make_evaluation_case(tiny_model_folder(tmp_path / family, family), dimensions=DIMENSIONS)
    evaluator, names, ids = case.evaluator(), case.space.names, random_tokens(seed=3).ids
    dense = case.loaded.model(input_ids=ids).logits

    def logits(share: float) -> Tensor:
        model = evaluator.model_at(Strategy(settings=tuple((n, share) for n in names)))
        found: Tensor = model(input_ids=ids).logits
        return found

    before, narrowed, after = logits(0.0), logits(0.5), logits(0.0)
    assert torch.equal(before, after)
    assert torch.allclose(before, dense, atol=1e-6)
    assert not torch.allclose(narrowed, dense, atol=1e-2)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_whole_basis_changes_nothing_but_the_coordinates(family: str, tmp_path: Path) -> None:
    case = make_evaluation_case(tiny_model_folder(tmp_path / family, family), dimensions=DIMENSIONS)
    assert case.units is not None
    model, by_path = case.loaded.model, {site.path: site for site in case.loaded.profile.sites}
    for part in (part for part in case.loaded.profile.parts if part.head_size):
        values, outputs = (by_path[path] for path in part.sites[2:])
        v, o = (model.get_submodule(site.path).weight for site in (values, outputs))
        basis = case.units.bases[part.path].double()
        turned = (basis[0] @ v.double().unflatten(0, (part.num_units, -1))).flatten(0, 1)
        assert not torch.allclose(turned, v.double(), atol=1e-2)
        heads = o.double().unflatten(1, (part.num_units, -1, part.head_size))
        back = torch.einsum("ogmd,gdr->ogmr", heads, basis[1])  # (o, g, m, r)
        product = torch.einsum("ogmr,gri->ogmi", back, turned.unflatten(0, (part.num_units, -1)))
        dense = torch.einsum("ogmd,gdi->ogmi", heads, v.double().unflatten(0, (part.num_units, -1)))
        torch.testing.assert_close(product, dense, rtol=1e-4, atol=1e-4)
        less = Narrowing(pairs=1, ranks=1)
        for site in (by_path[path] for path in part.sites[:3]):
            bias = torch.arange(float(site.num_rows))
            rows, own = case.units.narrowed_bias(part, less, site, bias)
            assert rows is not None
            assert len(own) == len(rows) < site.num_rows
