"""The comparison's table and plots, from the files that its parts wrote."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import table
from benchmarks.jobs import TRAINED_PER_REQUEST, kind_of
from benchmarks.ledger import Ledger, Setting, result_file
from benchmarks.tasks import accuracy_table, known_accuracies

REQUESTS = (1, 8, 64, 512)
PUBLISHED_ONE_SHOT = ("uniform", "owl", "alphapruning", "dsa", "layerif", "trim")
_WHAT_COUNTS = (
    "Seconds are CPU seconds of one thread. Units are passes that prepare the model (ranks, Fisher,"
    " dense: 5, the same for all) and evaluate strategies; what a method computes besides"
    " (influence, training) is in its seconds."
)
_COLORS = ("#0b6bcb", "#6b7280", "#d97706", "#059669", "#be185d", "#7c3aed", "#b45309", "#0e7490")
_MARKERS = "osD^vP*X"


class Method:
    """One method's results over seeds, as medians."""

    def __init__(self, name: str, ledger: Ledger, uniform: dict[float, float]) -> None:
        self.name = name
        self.kind = kind_of(name)
        self._ledger = ledger
        self._uniform = uniform
        self.sparsities = sorted({record.sparsity for record in ledger.records})
        self.seeds = sorted({record.seed for record in ledger.records})
        self.once_s = statistics.median(item.seconds for item in ledger.once)
        self.once_units = statistics.median(item.units for item in ledger.once)
        self.request_s = statistics.fmean(record.seconds for record in ledger.records)
        self.request_units = statistics.fmean(record.units for record in ledger.records)

    def values(self, sparsity: float, field: str = "kl") -> list[float]:
        """Return a field of every seed."""
        found = [r for r in self._ledger.records if r.sparsity == sparsity]
        return [float(getattr(record, field)) for record in found]

    def kl(self, sparsity: float) -> float:
        """Return the median KL over seeds."""
        return statistics.median(self.values(sparsity))

    def ratio(self, sparsity: float) -> str:
        """Return median and spread of KL as ratios to uniform's."""
        base = self._uniform.get(sparsity, math.nan)
        low, middle, high = (
            pick(self.values(sparsity)) / base for pick in (min, statistics.median, max)
        )
        return f"{middle:.3f}" if high - low < 5e-4 else f"{middle:.3f} ({low:.3f}–{high:.3f})"

    def total_s(self, requests: int) -> float:
        """Return CPU seconds for so many requests, preparation and learning counted in."""
        return self.once_s + requests * self.request_s

    def curves(self, sparsity: float) -> list[list[list[float]]]:
        """Return the curve of every seed."""
        found = [r.curve for r in self._ledger.records if r.sparsity == sparsity]
        return [curve for curve in found if curve]

    def crossing(self, sparsity: float, target: float) -> float | None:
        """Return the median units at which its curve on the search text reaches ``target``.

        None where half of the seeds never do.
        """
        found = [
            min((units for units, kl in curve if kl <= target), default=math.inf)
            for curve in self.curves(sparsity)
        ]
        middle = statistics.median_high(found) if found else math.inf
        return middle if math.isfinite(middle) else None


def load_methods(setting: Setting, names: Sequence[str]) -> dict[str, Method]:
    """Return every method that has results."""
    ledgers = {name: Ledger(setting, name, kind_of(name)) for name in names}
    ledgers = {name: ledger for name, ledger in ledgers.items() if ledger.records}
    uniform: dict[float, float] = {}
    if "uniform" in ledgers:
        base = Method("uniform", ledgers["uniform"], {})
        uniform = {sparsity: base.kl(sparsity) for sparsity in base.sparsities}
    return {name: Method(name, ledger, uniform) for name, ledger in ledgers.items()}


def report(setting: Setting, names: Sequence[str]) -> None:
    """Print the tables, write them beside the results, and draw the plots."""
    methods = load_methods(setting, names)
    if not methods:
        print(f"nothing was measured yet for {setting.tag}")
        return
    sparsities = sorted({s for method in methods.values() for s in method.sparsities})
    folder = result_file(setting, "report").parent
    text = "\n\n".join(
        [
            f"Model {setting.tag.rsplit('-', 1)[0]}, {setting.tokens:,} search tokens,"
            f" {setting.test_tokens:,} test tokens. {_WHAT_COUNTS}",
            quality_table(methods, sparsities),
            cost_table(methods),
            claims(methods, sparsities),
            *task_tables(setting),
        ]
    )
    print(text)
    (folder / "report.md").write_text(text + "\n")
    for sparsity in sparsities:
        plot_totals(folder / f"totals-{sparsity:g}.png", methods, sparsity)
    plot_curves(folder / "curves.png", methods, sparsities)


def quality_table(methods: dict[str, Method], sparsities: Sequence[float]) -> str:
    """Return KL as ratios to uniform's (median and spread over seeds) and median perplexity."""
    rows = []
    for method in methods.values():
        cells = [method.ratio(s) if s in method.sparsities else "–" for s in sparsities]
        perplexities = [
            f"{statistics.median(method.values(s, 'perplexity')):.2f}"
            if s in method.sparsities
            else "–"
            for s in sparsities
        ]
        rows.append([method.name, method.kind, len(method.seeds), *cells, *perplexities])
    header = ["method", "kind", "seeds"]
    header += [f"KL / uniform's at {s:g}" for s in sparsities]
    header += [f"perplexity at {s:g}" for s in sparsities]
    return table(header, rows)


def cost_table(methods: dict[str, Method]) -> str:
    """Return what is paid once and per request, and totals."""
    rows = [
        [
            method.name,
            method.kind,
            f"{method.once_units:.0f}",
            f"{method.once_s:.1f}",
            "trains" if method.name in TRAINED_PER_REQUEST else f"{method.request_units:.0f}",
            f"{method.request_s:.4f}",
            *(f"{method.total_s(n):,.1f}" for n in REQUESTS),
        ]
        for method in methods.values()
    ]
    header = ["method", "kind", "units once", "s once", "units per request", "s per request"]
    return table([*header, *(f"s for {n}" for n in REQUESTS)], rows)


def claims(methods: dict[str, Method], sparsities: Sequence[float]) -> str:
    """Return how StratNet stands to the best one-shot method and to the searches."""
    own = methods.get("stratnet")
    if own is None:
        return "StratNet was not measured."
    rows: list[list[object]] = []
    for sparsity in own.sparsities:
        rivals = {n: m.kl(sparsity) for n, m in methods.items() if sparsity in m.sparsities}
        one_shot = {n: kl for n, kl in rivals.items() if n in PUBLISHED_ONE_SHOT}
        best = min(one_shot, key=one_shot.__getitem__, default="")
        winner = min(rivals, key=rivals.__getitem__)
        row: list[object] = [f"{sparsity:g}", winner]
        row.append(f"{own.kl(sparsity) / one_shot[best]:.3f} ({best})" if best else "–")
        for name in ("evopress", "optspa", "atp", "descent"):
            row.append(own.kl(sparsity) / rivals[name] if name in rivals else "–")
        row.append(_crossing(methods, sparsity))
        rows.append(row)
    header = ["sparsity", "best KL", "StratNet / best published one-shot"]
    header += [f"StratNet / {name}" for name in ("evopress", "optspa", "atp", "descent")]
    header.append("units at which EvoPress reaches StratNet")
    lines = [table(header, rows)]
    for name in ("evopress", "optspa"):
        if name in methods:
            factor = methods[name].total_s(64) / own.total_s(64)
            lines.append(f"64 requests: {factor:.1f} times {name}'s speed, learning counted in.")
    return "\n\n".join(lines)


def task_tables(setting: Setting) -> list[str]:
    """Return the table of task accuracies, where tasks were measured."""
    known = known_accuracies(setting)
    return [accuracy_table(known)] if known else []


def _crossing(methods: dict[str, Method], sparsity: float) -> str:
    rival = methods.get("evopress")
    if rival is None or sparsity not in rival.sparsities:
        return "–"
    target = statistics.median(methods["stratnet"].values(sparsity, "search_kl"))
    units = rival.crossing(sparsity, target)
    return f"not within {rival.request_units:.0f}" if units is None else f"{units:.0f}"


def plot_totals(path: Path, methods: dict[str, Method], sparsity: float) -> None:
    """Draw median KL against total CPU seconds for 1, 8, 64 and 512 requests."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), dpi=130, layout="constrained")
    shown = [method for method in methods.values() if sparsity in method.sparsities]
    for axes, requests in zip(figure.subplots(2, 2).flat, REQUESTS, strict=True):
        for index, method in enumerate(shown):
            values = method.values(sparsity)
            middle = statistics.median(values)
            axes.errorbar(
                method.total_s(requests),
                middle,
                yerr=[[middle - min(values)], [max(values) - middle]],
                marker=_MARKERS[(index + index // len(_COLORS)) % len(_MARKERS)],
                color=_COLORS[index % len(_COLORS)],
                markersize=9 if method.name == "stratnet" else 6,
                linestyle="none",
                label=f"{method.name} ({method.kind})",
            )
        axes.set(xscale="log", title=f"{requests} request{'s' if requests > 1 else ''}")
        axes.set_xlabel("total CPU seconds, preparation and learning included")
        axes.set_yscale("log")
        axes.set_ylabel("KL on test text, nats per token")
        axes.grid(visible=True, color="#e5e7eb")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    figure.suptitle(f"sparsity {sparsity:g}: quality against total time (median, range over seeds)")
    figure.savefig(path)


def plot_curves(path: Path, methods: dict[str, Method], sparsities: Sequence[float]) -> None:
    """Draw the searches' best KL on the search text against units, one line per seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), dpi=130, layout="constrained")
    columns = max(1, math.ceil(len(sparsities) / 2))
    panels = figure.subplots(2, columns, squeeze=False).flat
    for axes, sparsity in zip(panels, sparsities, strict=False):
        for index, method in enumerate(methods.values()):
            color = _COLORS[index % len(_COLORS)]
            if method.kind != "per request":
                if method.name == "stratnet":
                    level = statistics.median(method.values(sparsity, "search_kl"))
                    axes.axhline(level, color=color, linestyle="--", label="stratnet (once)")
                continue
            for number, record in enumerate(method.curves(sparsity)):
                label = method.name if number == 0 else None
                axes.step(*zip(*record, strict=True), where="post", color=color, label=label)
        axes.set(xscale="log", title=f"sparsity {sparsity:g}", xlabel="units for this request")
        axes.set_ylabel("best KL so far on the search text")
        axes.grid(visible=True, color="#e5e7eb")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)
