"""What the one-shot methods reach on the trained reference model: figures without a bound."""

from __future__ import annotations

from typing import Final

from benchmarks.common import Bench, Finding
from unicuco.allocate import ALLOCATORS, Trim
from unicuco.evaluate import LocalEvaluator
from unicuco.importance.hessian import collect_hessians
from unicuco.importance.sparsegpt import InverseFactor, prune_with_update
from unicuco.models import read_site
from unicuco.types import Strategy

_SPARSITIES: Final = (0.5, 0.6, 0.7, 0.8)
_NAMES: Final = ("fisher", "owl", "alphapruning", "dsa", "layerif")


def findings() -> list[Finding]:
    """Measure the KL on test text relative to uniform Wanda."""
    bench = Bench("reference", test_tokens=8192)
    uniform = bench.test_kl([bench.space.uniform(s) for s in _SPARSITIES])
    found = []
    for name in _NAMES:
        kls = bench.test_kl(ALLOCATORS[name](bench.context).allocate(_SPARSITIES))
        found += [
            _finding(name, s, kl / u) for s, kl, u in zip(_SPARSITIES, kls, uniform, strict=True)
        ]
    trim = Trim(bench.context)
    for s, strategy, u in zip(_SPARSITIES, trim.allocate(_SPARSITIES), uniform, strict=True):
        kl = bench.test_judge.evaluate(strategy, rows=trim.row_rule(strategy)).kl
        found.append(_finding("trim on owl", s, kl / u))
    updated = _sparsegpt(bench, [bench.space.uniform(s) for s in _SPARSITIES])
    found += [
        _finding("sparsegpt, uniform", s, kl / u)
        for s, kl, u in zip(_SPARSITIES, updated, uniform, strict=True)
    ]
    return found


def _finding(name: str, sparsity: float, ratio: float) -> Finding:
    return Finding(name, f"reference model, test KL at {sparsity} relative to uniform", ratio, "")


def _sparsegpt(bench: Bench, strategies: list[Strategy]) -> list[float]:
    """Return the test KL of strategies that SparseGPT cuts, its levels made for just them."""
    loaded = bench.prepared.loaded
    sites = loaded.profile.sites
    hessians = collect_hessians(loaded, sites, bench.prepared.texts.calibration)
    factors = {site.path: InverseFactor.of(hessians.pop(site.path)) for site in sites}
    dense = bench.space.uniform(0.0)
    text = {name: a for name, a in bench.test_arrays.items() if name.startswith("text/")}
    found = []
    for strategy in strategies:
        drops = bench.space.cost.site_drops(strategy.values)
        arrays = {**bench.arrays, **text}
        for site in sites:
            weight = read_site(loaded.model, site)
            pruned = prune_with_update(weight, factors[site.path], drops[site.path])
            matrix = pruned.T if site.transposed else pruned
            arrays[f"state/{site.path}.weight"] = matrix.contiguous().numpy()
        found.append(LocalEvaluator(bench.test_judge.config, arrays).evaluate(dense).kl)
    return found
