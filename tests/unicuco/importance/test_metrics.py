from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from unicuco.calibration import TokenSet, collect_input_norms
from unicuco.importance import METRICS, Magnitude, SiteStats, StatKind, Wanda
from unicuco.models import load_model, read_site, site_module
from unicuco.testing import ImportanceMetricContract, tiny_model_folder


class TestMagnitude(ImportanceMetricContract):
    metric = Magnitude()

    def reference(self, weight: Tensor, stats: SiteStats) -> Tensor:
        scores = torch.zeros(weight.shape, dtype=torch.float64)
        for row in range(weight.shape[0]):
            for column in range(weight.shape[1]):
                scores[row, column] = abs(float(weight[row, column]))
        return scores


class TestWanda(ImportanceMetricContract):
    metric = Wanda()

    def reference(self, weight: Tensor, stats: SiteStats) -> Tensor:
        assert stats.input_norm is not None
        scores = torch.zeros(weight.shape, dtype=torch.float64)
        for row in range(weight.shape[0]):
            for column in range(weight.shape[1]):
                norm = float(stats.input_norm[column])
                scores[row, column] = abs(float(weight[row, column])) * norm
        return scores


def test_every_metric_is_registered_under_its_name_and_has_a_contract_test() -> None:
    assert all(metric.name == name for name, metric in METRICS.items())
    tested = {TestMagnitude.metric.name, TestWanda.metric.name}
    assert set(METRICS) == tested


def test_only_wanda_needs_the_text() -> None:
    assert METRICS["magnitude"].needs == frozenset()
    assert METRICS["wanda"].needs == {StatKind.INPUT_NORM}


@pytest.mark.parametrize("norm", [None, torch.ones(4)])
def test_wanda_refuses_a_missing_or_misfitting_norm(norm: Tensor | None) -> None:
    with pytest.raises(ValueError, match="wanda needs the norm of 5 input columns"):
        Wanda().score(torch.ones(3, 5), SiteStats(input_norm=norm))


def wanda_of_the_paper(layer: nn.Module, batches: list[Tensor]) -> Tensor:
    # Wanda's own running form: scaler_row is the mean of squared norms over samples.
    scaler = torch.zeros(layer.weight.shape[1])
    for samples, inputs in enumerate(batches):
        flat = inputs.reshape(-1, inputs.shape[-1]).t()
        scaler *= samples / (samples + 1)
        scaler += torch.norm(flat, p=2, dim=1) ** 2 / (samples + 1)
    return torch.abs(layer.weight) * torch.sqrt(scaler.reshape(1, -1))


def test_wanda_on_a_model_orders_weights_as_the_published_code_does(tmp_path: Path) -> None:
    loaded = load_model(tiny_model_folder(tmp_path / "m", "llama"))
    ids = torch.randint(1, 257, (5, 20), generator=torch.Generator().manual_seed(1))
    norms = collect_input_norms(loaded.model, loaded.profile, TokenSet.from_ids(ids))
    for site in loaded.profile.sites:
        seen: list[Tensor] = []
        layer = site_module(loaded.model, site)
        handle = layer.register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(args[0]))
        for window in ids:
            loaded.model(input_ids=window[None])
        handle.remove()
        expected = wanda_of_the_paper(layer, seen) * math.sqrt(len(seen))
        scores = Wanda().score(
            read_site(loaded.model, site), SiteStats(input_norm=norms[site.path])
        )
        torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-7)
