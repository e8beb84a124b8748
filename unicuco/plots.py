"""The pictures: of a run (front, strategies, learning, predictions), of comparisons and of bits.

PNG or SVG, as the file's name ends. Drawn without pyplot, so that nothing global is touched and any
thread may draw. Matplotlib takes a second to import, so that happens at the first drawing. What it
does not know: runs and models; it is given numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

from unicuco.files import replace_with
from unicuco.types import Prediction

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

_BLUE: Final = "#0b6bcb"  # Okabe-Ito-like tones, told apart by colour-blind readers and in grey
_GREY: Final = "#6b7280"
_ORANGE: Final = "#d97706"
_PALETTE: Final = (_GREY, _ORANGE, "#059669", "#be185d", "#7c3aed", "#b45309", "#0e7490")
_STYLES: Final = ("--", "-.", ":")
_INK: Final = "#1f2937"
_DPI: Final = 160
_FLOOR: Final = 1e-6  # a logarithmic axis has no zero; no measured KL is that small
_MOST_LABELLED_ROWS: Final = 80


class PredictedPoint(Protocol):
    """One point of a front: what a variant of this sparsity is predicted to cost."""

    @property
    def sparsity(self) -> float:
        """Fraction of site weights dropped, in [0, 1)."""
        ...

    @property
    def kl(self) -> Prediction:
        """Predicted KL in nats per token, with its 95% interval."""
        ...


Curve = Sequence[tuple[float, float]]
"""Points (sparsity, KL in nats per token)."""


def plot_front(
    path: Path,
    front: Sequence[PredictedPoint],
    measured: Curve,
    uniform: Curve,
    *,
    fisher: Curve = (),
    caption: str = "",
) -> None:
    """Draw KL (logarithmic) against sparsity: prediction with 95% band, measured points, rivals.

    Args:
        path: the file to write; replaced as a whole.
        front: predicted points, in any order.
        measured: what the run's own strategies measured, one point each.
        uniform: measured KL of uniform pruning.
        fisher: measured KL of allocation by Fisher curves, if any.
        caption: where the numbers come from (model, evaluations, tokens, seed), printed small
            below.

    Raises:
        StorageError: the file can't be written; nothing is left behind.
    """
    figure = _figure(7.2, 4.6)
    axes = figure.add_subplot()
    _draw_curve(axes, uniform, label="uniform", color=_GREY, style="--")
    _draw_curve(axes, fisher, label="Fisher allocation", color=_ORANGE, style="-.")
    _draw_prediction(axes, front)
    if measured:
        x, y = _columns(measured)
        axes.scatter(
            x, y, s=14, color=_INK, alpha=0.55, linewidths=0, zorder=4, label="StratNet, measured"
        )
    _finish_front(axes, [*measured, *uniform, *fisher, *((p.sparsity, p.kl.mean) for p in front)])
    _caption(figure, caption)
    _save(figure, path)


def plot_comparison(path: Path, curves: Mapping[str, Curve], *, caption: str = "") -> None:
    """Draw KL (logarithmic) against sparsity, one line per allocator; StratNet's stands out.

    Args:
        path: the file to write; replaced as a whole.
        curves: measured points by allocator.
        caption: where the numbers come from, printed small below.

    Raises:
        StorageError: the file can't be written; nothing is left behind.
    """
    figure = _figure(7.2, 4.6)
    axes = figure.add_subplot()
    for index, (name, curve) in enumerate(curves.items()):
        color = _BLUE if name == "stratnet" else _PALETTE[index % len(_PALETTE)]
        style = "-" if name == "stratnet" else _STYLES[index // len(_PALETTE) % len(_STYLES)]
        _draw_curve(axes, curve, label=name, color=color, style=style)
    _finish_front(axes, [point for curve in curves.values() for point in curve])
    _caption(figure, caption)
    _save(figure, path)


def plot_strategies(
    path: Path,
    targets: Sequence[float],
    sites: Sequence[str],
    sparsity: NDArray[np.floating],
    *,
    caption: str = "",
) -> None:
    """Draw how a target sparsity is spread over sites, and how far from the target each one is.

    Args:
        path: the file to write; replaced as a whole.
        targets: ``t`` target sparsities, ascending, in [0, 1).
        sites: ``l`` short site names ``block.site``, in model order, e.g. ``3.q_proj``.
        sparsity: ``l x t``, fraction dropped of each site at each target.
        caption: where the numbers come from, printed small below.

    Raises:
        ValueError: the shapes do not fit together.
        StorageError: the file can't be written; nothing is left behind.
    """
    if sparsity.shape != (len(sites), len(targets)):
        raise ValueError(f"need {len(sites)} x {len(targets)} sparsities, got {sparsity.shape}")
    # Rows must stay readable, and a picture of a large model must still fit a screen.
    height = min(max(0.14 * len(sites) + 1.3, 3.2), 14.0)
    figure = _figure(9.6, height)
    left, right = figure.subplots(1, 2, sharey=True)
    edges = _edges(targets)
    rows = np.arange(len(sites) + 1) - 0.5

    mesh = left.pcolormesh(edges, rows, sparsity, cmap="viridis_r", vmin=0.0, vmax=1.0)
    figure.colorbar(mesh, ax=left, label="fraction dropped", shrink=0.6, aspect=30)
    left.set_title("sparsity of each site", fontsize=10, color=_INK, loc="left")

    away = sparsity - np.asarray(targets)[None, :]
    reach = max(float(np.abs(away).max(initial=0.0)), 0.05)
    mesh = right.pcolormesh(edges, rows, away, cmap="RdBu", vmin=-reach, vmax=reach)
    figure.colorbar(mesh, ax=right, label="site − target", shrink=0.6, aspect=30)
    right.set_title(
        "kept more (red) or less (blue) than uniform", fontsize=10, color=_INK, loc="left"
    )

    _label_rows(left, sites)
    for axes in (left, right):
        _finish_heat_map(axes, sites)
    _caption(figure, caption)
    _save(figure, path)


def plot_learning(path: Path, curve: Curve) -> None:
    """Draw how far learning had come, against what had been spent.

    Args:
        path: the file to write; replaced as a whole.
        curve: points (units, hypervolume), units rising.

    Raises:
        StorageError: the file can't be written; nothing is left behind.
    """
    figure = _figure(7.2, 3.4)
    axes = figure.add_subplot()
    axes.step(
        [x for x, _ in curve], [y for _, y in curve], color=_BLUE, linewidth=2.0, where="post"
    )
    axes.set_xlabel("units spent", color=_INK)
    axes.set_ylabel("hypervolume", color=_INK)
    _finish(axes)
    _save(figure, path)


def plot_predictions(
    path: Path, predictions: Sequence[Prediction], measured: Sequence[float]
) -> None:
    """Draw predicted KL with its 95% interval against measured KL, both logarithmic.

    Args:
        path: the file to write; replaced as a whole.
        predictions: ``n`` of them, in nats per token.
        measured: ``n`` KLs of the same strategies.

    Raises:
        StorageError: the file can't be written; nothing is left behind.
    """
    figure = _figure(5.2, 4.6)
    axes = figure.add_subplot()
    x = np.maximum(measured, _FLOOR)
    low, mean, high = (
        np.maximum([getattr(p, name) for p in predictions], _FLOOR)
        for name in ("lo95", "mean", "hi95")
    )
    ends = [min(x.min(), low.min()), max(x.max(), high.max())]
    axes.plot(ends, ends, "--", color=_GREY, linewidth=1.0)
    errors = np.stack([mean - low, high - mean])
    axes.errorbar(x, mean, yerr=errors, fmt="o", color=_BLUE, markersize=4, elinewidth=1.2)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("measured KL, nats per token", color=_INK)
    axes.set_ylabel("predicted KL, with 95% interval", color=_INK)
    _finish(axes)
    _save(figure, path)


def plot_bits(path: Path, curves: Mapping[str, Curve], *, caption: str = "") -> None:
    """Draw KL (logarithmic) against coded bits per weight, one line per scheme.

    Args:
        path: the file to write; replaced as a whole.
        curves: points (coded bits per weight, KL in nats per token) by scheme.
        caption: where the numbers come from, printed small below.

    Raises:
        StorageError: the file can't be written; nothing is left behind.
    """
    figure = _figure(7.2, 4.6)
    axes = figure.add_subplot()
    for index, (name, curve) in enumerate(curves.items()):
        color, style = _PALETTE[index % len(_PALETTE)], _STYLES[index % len(_STYLES)]
        _draw_curve(axes, curve, label=name, color=color, style=style)
    axes.set_yscale("log")
    axes.set_xlabel("coded bits per weight, scales counted", color=_INK)
    axes.set_ylabel("KL(dense ‖ quantised), nats per token", color=_INK)
    _finish(axes)
    axes.legend(frameon=False, fontsize=8)
    _caption(figure, caption)
    _save(figure, path)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=_DPI, layout="constrained")


def _draw_prediction(axes: Axes, front: Sequence[PredictedPoint]) -> None:
    if not front:
        return
    points = sorted(front, key=lambda point: point.sparsity)
    x = np.array([point.sparsity for point in points])
    low, mean, high = (
        np.maximum([getattr(point.kl, name) for point in points], _FLOOR)
        for name in ("lo95", "mean", "hi95")
    )
    axes.fill_between(x, low, high, color=_BLUE, alpha=0.16, linewidth=0, label="95% interval")
    axes.plot(x, mean, color=_BLUE, linewidth=2.0, zorder=5, label="StratNet, predicted")


def _draw_curve(axes: Axes, curve: Curve, *, label: str, color: str, style: str) -> None:
    if curve:
        x, y = _columns(sorted(curve))
        marker = "o" if len(x) < 12 else None
        axes.plot(
            x,
            y,
            style,
            color=color,
            linewidth=1.4,
            marker=marker,
            markersize=3.5,
            zorder=3,
            label=label,
        )


def _finish_front(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    if points:
        kls = [max(kl, _FLOOR) for _, kl in points]
        # A sparsity near 0 predicts next to nothing; below a ten-thousandth of the worst it is all
        # the same.
        floor = max(min(kls), max(kls) * 1e-4)
        axes.set_ylim(floor / 1.5, max(kls) * 1.8)
        sparsities = [sparsity for sparsity, _ in points]
        axes.set_xlim(max(min(sparsities) - 0.02, 0.0), min(max(sparsities) + 0.02, 1.0))
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("sparsity (fraction of site weights dropped)", color=_INK)
    axes.set_ylabel("KL(dense ‖ variant), nats per token", color=_INK)
    _finish(axes)
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda index: not labels[index].startswith("StratNet"))
    axes.legend([handles[i] for i in order], [labels[i] for i in order], frameon=False)


def _finish(axes: Axes) -> None:
    axes.grid(visible=True, which="major", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _finish_heat_map(axes: Axes, sites: Sequence[str]) -> None:
    axes.set_ylim(len(sites) - 0.5, -0.5)  # the first block on top
    for row in _block_starts(sites)[1:]:
        axes.axhline(row - 0.5, color="#9ca3af", linewidth=0.8)
    axes.set_xlabel("target sparsity", color=_INK)
    axes.tick_params(length=2, labelsize=8, colors=_INK)
    axes.tick_params(axis="y", length=0, labelsize=6.5)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _label_rows(axes: Axes, sites: Sequence[str]) -> None:
    if len(sites) <= _MOST_LABELLED_ROWS:
        axes.set_yticks(range(len(sites)), list(sites))
        return
    starts = _block_starts(sites)
    step = max(1, len(starts) // 40)
    axes.set_yticks(starts[::step], [f"block {_block(sites[row])}" for row in starts[::step]])


def _block(site: str) -> str:
    return site.split(".", 1)[0]


def _block_starts(sites: Sequence[str]) -> list[int]:
    return [
        row for row in range(len(sites)) if not row or _block(sites[row]) != _block(sites[row - 1])
    ]


def _edges(centres: Sequence[float]) -> NDArray[np.floating]:
    """Return the ``t + 1`` borders of columns around ``t`` ascending centres."""
    x = np.asarray(centres, dtype=float)
    if len(x) == 1:
        return np.array([x[0] - 0.05, x[0] + 0.05])
    middle = (x[1:] + x[:-1]) / 2
    return np.concatenate([[2 * x[0] - middle[0]], middle, [2 * x[-1] - middle[-1]]])


def _columns(curve: Curve) -> tuple[list[float], list[float]]:
    return [x for x, _ in curve], [max(y, _FLOOR) for _, y in curve]


def _caption(figure: Figure, caption: str) -> None:
    if caption:
        figure.supxlabel(caption, fontsize=7.5, color=_GREY, x=0.01, ha="left")


def _save(figure: Figure, path: Path) -> None:
    kind = path.suffix.lower().removeprefix(".")
    kind = kind if kind in {"png", "svg"} else "png"
    replace_with(path, lambda target: figure.savefig(target, format=kind, facecolor="white"))
