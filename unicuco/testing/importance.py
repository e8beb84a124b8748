"""The contract of importance metrics: subclass `ImportanceMetricContract`, and its tests run."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from unicuco.importance import METRICS, ImportanceMetric, SiteStats


class ImportanceMetricContract:
    """What every entry of `METRICS` satisfies; subclasses set ``metric`` and give ``reference``."""

    metric: ClassVar[ImportanceMetric]

    def reference(self, weight: Tensor, stats: SiteStats) -> Tensor:
        """Return the scores by the slow, obvious way, in float64."""
        raise NotImplementedError(f"{type(self).__name__} must give its metric's reference")

    def test_is_registered_under_its_name(self) -> None:
        """The key in `METRICS` is the metric's own name."""
        assert type(METRICS[self.metric.name]) is type(self.metric)

    def test_keeps_the_shape_and_scores_in_float32_whatever_the_dtype(self) -> None:
        """Scores are ``o x i`` float32, finite and not negative."""
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            scores = self.metric.score(_weight(7, 5, dtype), _stats(5))
            assert scores.shape == (7, 5)
            assert scores.dtype == torch.float32
            assert bool(torch.isfinite(scores).all())
            assert bool((scores >= 0).all())

    def test_agrees_with_the_reference(self) -> None:
        """Scores equal the slow way to float32 precision."""
        weight, stats = _weight(9, 6, torch.float32), _stats(6)
        expected = self.reference(weight, stats)
        torch.testing.assert_close(
            self.metric.score(weight, stats).double(), expected.double(), rtol=1e-6, atol=0
        )

    def test_scales_with_the_weights_and_leaves_them_alone(self) -> None:
        """Doubling weights doubles no order; the inputs are not written to."""
        weight, stats = _weight(6, 8, torch.float32), _stats(8)
        before = weight.clone()
        order = self.metric.score(weight, stats).argsort(dim=1)
        assert torch.equal(weight, before)
        assert torch.equal(self.metric.score(2 * weight, stats).argsort(dim=1), order)

    def test_takes_a_transposed_view(self) -> None:
        """A Conv1D's matrix arrives as a view with swapped strides and scores like its copy."""
        view, stats = _weight(5, 7, torch.float32).T, _stats(5)
        assert torch.equal(
            self.metric.score(view, stats), self.metric.score(view.contiguous(), stats)
        )


def _weight(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(7)).to(dtype)


def _stats(columns: int) -> SiteStats:
    return SiteStats(input_norm=torch.rand(columns, generator=torch.Generator().manual_seed(8)))
