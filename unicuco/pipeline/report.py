"""``unicuco report``: everything a run knows of itself, as one HTML page that can be sent around.

The page needs nothing beside itself: pictures are SVG within it, and no script runs. Measured and
predicted numbers stand apart, and so does what was interpolated. What it does not know: test text.
It repeats what the run measured of its search and validation texts, and runs no model.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Final

from unicuco.files import replace_with
from unicuco.pipeline.pictures import draw_front, draw_strategies
from unicuco.pipeline.run import DATABASE, MANIFEST, Run
from unicuco.plots import plot_learning, plot_predictions
from unicuco.search.hypervolume import WORST_KL, quality_volume
from unicuco.store import EvaluationStore
from unicuco.surrogate import EPSILON
from unicuco.types import Evaluation, FailedEvaluation, Plan, Prediction, Request, Target

_ASKED: Final = tuple(k / 10 for k in range(1, 10))  # sparsities of the first table
_STYLE: Final = """
:root { color-scheme: light dark; --ink: #1f2937; --soft: #6b7280; --line: #e5e7eb; --page: #fff }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e5e7eb; --soft: #9ca3af; --line: #374151; --page: #111827 }
  figure { background: #fff; padding: .5rem; border-radius: .4rem }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; margin-bottom: 0 } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem }
p { max-width: 46rem } .soft, figcaption { color: var(--soft) }
figure { margin: .8rem 0; overflow-x: auto } svg { max-width: 100%; height: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line) }
th:first-child, td:first-child { text-align: left } td { overflow-wrap: anywhere }
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningPoint:
    """Where learning stood after an evaluation.

    ``units`` were spent by then, preparation included; ``hypervolume`` is the area of (kept
    fraction, log KL on the search text) that is dominated up to the dense size and 3 nats.
    """

    units: float
    hypervolume: float


def write_report(run: Run, path: Path) -> None:
    """Write the page; what stood at ``path`` is replaced as a whole.

    Raises:
        StorageError: the disk refused, or the store can't be read.
        RunError: the store is damaged.
    """
    run.copy.need(DATABASE)
    page = _page(run)
    replace_with(path, lambda target: _write(target, page))


def learning_curve(run: Run) -> list[LearningPoint]:
    """Return how the search went, one point per evaluation in the order asked."""
    with EvaluationStore.open(run.folder / DATABASE, create=False) as store:
        before = sum(item.cost_units for item in store.measurements() if not item.strategy_key)
        results = [(ask, one) for ask, one in store.read() if isinstance(one, Evaluation)]
    spent = accumulate((outcome.cost_units for _, outcome in results), initial=before)
    next(spent)
    points: list[tuple[float, float]] = []
    curve: list[LearningPoint] = []
    for (ask, outcome), units in zip(results, spent, strict=True):
        if ask.tokens is None:
            points.append((outcome.kept_fraction, outcome.kl))
            curve.append(LearningPoint(units=units, hypervolume=quality_volume(points)))
    return curve


def _write(target: Path, page: str) -> None:
    target.write_text(page, encoding="utf-8")


def _page(run: Run) -> str:
    manifest = run.manifest
    low, high = run.sparsity_range
    name = escape(run.folder.resolve().name)
    body = "\n".join(
        [
            f"<h1>{name}</h1>",
            f'<p class="soft">How {escape(str(manifest["base_model"]["path"]))} '
            f"({run.profile.total_params:,} parameters, {len(run.profile.sites)} sites) "
            f"compresses, learned once from {manifest['evaluations']} evaluations "
            f"({manifest['cost_units']:.0f} units). It answers any request from sparsity "
            f"{low:g} to {high:g}. KL is in nats per token throughout.</p>",
            *_sections(run),
        ]
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _sections(run: Run) -> Iterator[str]:
    yield "<h2>What a request gets</h2>"
    yield _answers(run)
    yield "<h2>The front</h2>"
    yield _figure(
        lambda path: draw_front(run, path),
        "Predicted with its 95% interval, and what was measured on the validation text.",
    )
    yield "<h2>The strategies</h2>"
    yield _figure(
        lambda path: draw_strategies(run, path), "Where StratNet drops weights, for every target."
    )
    yield "<h2>Predictions against measurements</h2>"
    yield from _calibration(run)
    yield "<h2>Learning</h2>"
    curve = learning_curve(run)
    yield _figure(
        lambda path: plot_learning(path, [(p.units, p.hypervolume) for p in curve]),
        "Hypervolume of (kept fraction, log KL on the search text) up to the dense size and "
        f"{WORST_KL:g} nats, against the units spent; a unit is one forward pass over the search "
        "text.",
    )
    yield "<h2>What each step is worth</h2>"
    yield _steps(run)
    yield "<h2>What it cost</h2>"
    yield _costs(run)
    yield "<h2>Where it comes from</h2>"
    yield _provenance(run)


def _answers(run: Run) -> str:
    low, high = run.sparsity_range
    asked = [sparsity for sparsity in _ASKED if low <= sparsity <= high] or [high]
    plans = run.plan([Request(target=Target.SPARSITY, value=sparsity) for sparsity in asked])
    rows = [
        (
            f"{plan.sparsity:.2f}",
            f"{plan.kept_params:,}",
            f"{plan.kl.mean:.4g}",
            f"{plan.kl.lo95:.4g} … {plan.kl.hi95:.4g}",
        )
        for plan in plans
        if isinstance(plan, Plan)
    ]
    return _table(("sparsity", "kept parameters", "predicted KL", "95% interval"), rows)


def _calibration(run: Run) -> Iterator[str]:
    measured = run.validation["stratnet"]
    predictions = _predictions(run, [sparsity for sparsity, _ in measured])
    pairs = [(p, kl) for p, (_, kl) in zip(predictions, measured, strict=True)]
    inside = sum(prediction.lo95 <= kl <= prediction.hi95 for prediction, kl in pairs)
    yield _figure(
        lambda path: plot_predictions(path, [p for p, _ in pairs], [kl for _, kl in pairs]),
        f"{inside} of {len(pairs)} measurements lie within their interval. They are the ones the "
        "intervals were calibrated on, so this shows the fit; it is no test of it.",
    )


def _predictions(run: Run, sparsities: Sequence[float]) -> list[Prediction]:
    plans = run.plan([Request(target=Target.SPARSITY, value=value) for value in sparsities])
    predictions = [plan.kl for plan in plans if isinstance(plan, Plan)]
    assert len(predictions) == len(plans), "they were measured, so they lie inside what was learned"
    return predictions


def _steps(run: Run) -> str:
    curves = run.validation
    fisher = dict(curves["fisher"])
    rows = []
    for sparsity, uniform in curves["uniform"]:
        learned = _interpolated(curves["stratnet"], sparsity)
        rows.append(
            (
                f"{sparsity:.2f}",
                f"{uniform:.4g}",
                f"{fisher[sparsity]:.4g}" if sparsity in fisher else "",
                f"{fisher[sparsity] / uniform:.2f}" if sparsity in fisher else "",
                "" if learned is None else f"{learned / uniform:.2f}",
            )
        )
    header = (
        "sparsity",
        "uniform, measured",
        "Fisher, measured",
        "Fisher / uniform",
        "StratNet / uniform (interpolated)",
    )
    return _table(header, rows)


def _interpolated(curve: Sequence[tuple[float, float]], sparsity: float) -> float | None:
    """Return the KL between two measured points, linear in its logarithm; none outside them."""
    points = sorted(curve)
    for (left, low), (right, high) in pairwise(points):
        if left <= sparsity <= right:
            share = (sparsity - left) / (right - left)
            logs = math.log(low + EPSILON), math.log(high + EPSILON)
            return math.exp(logs[0] + share * (logs[1] - logs[0])) - EPSILON
    return None


def _costs(run: Run) -> str:
    with EvaluationStore.open(run.folder / DATABASE, create=False) as store:
        measurements = store.measurements()
        results = list(store.read())
    done = [(ask, outcome) for ask, outcome in results if isinstance(outcome, Evaluation)]
    groups: dict[str, list[tuple[float, float]]] = {}
    for item in measurements:
        groups.setdefault(item.purpose, []).append((item.cost_units, item.seconds))
    for ask, outcome in done:
        kind = "search, with derivatives" if outcome.gradient else "search, values only"
        kind = kind if ask.tokens is None else "search, alternatives on few tokens"
        groups.setdefault(kind, []).append((outcome.cost_units, outcome.wall_s))
    rows = [
        (escape(name), str(len(parts)), f"{_sum(parts, 0):.1f}", f"{_sum(parts, 1):.1f}")
        for name, parts in groups.items()
    ]
    failed = sum(isinstance(outcome, FailedEvaluation) for _, outcome in results)
    note = f'<p class="soft">{failed} evaluations failed.</p>' if failed else ""
    return _table(("for", "passes", "units", "seconds"), rows) + note


def _sum(parts: Sequence[tuple[float, float]], index: int) -> float:
    return sum(part[index] for part in parts)


def _provenance(run: Run) -> str:
    manifest = run.manifest
    rows = [("run", run.digest), ("base model", str(manifest["base_model"]["digest"]))]
    for group in ("options", "versions", "data"):
        rows += [(f"{group}: {key}", _words(value)) for key, value in manifest[group].items()]
    escaped = [(escape(name), escape(value)) for name, value in rows]
    return _table(("what", f"as in {MANIFEST}"), escaped)


def _words(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; cells are HTML already."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"


def _figure(draw: Callable[[Path], None], caption: str) -> str:
    """Return a drawing as inline SVG with its caption."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "drawing.svg"
        draw(path)
        svg = path.read_text(encoding="utf-8")
    return f"<figure>{svg[svg.index('<svg') :]}<figcaption>{escape(caption)}</figcaption></figure>"
