"""What an evaluation costs beside the forward pass, and against a straightforward loop.

- ``outside``: the share of an evaluation's time that is no forward pass: cutting and the KL;
- ``rate``: matrix products inside the forward pass, relative to this machine's measured peak: the
  same products alone, at the model's own shapes, over and over;
- ``products``: the time that they take alone as a share of the whole forward pass; the rest of it
  is mostly attention;
- ``loop``: an evaluation against copying the model, pruning it by sorting, and running the same
  tokens; dense predictions are cached for both; ``largest_gap`` is the largest relative difference
  of the two KL.

Strategies are random ones around a sparsity of 0.6, each cut from the one before; one thread,
medians of interleaved repeats: five, and more of short texts, whose share varies most.

``python -m benchmarks.evaluation [--tokens 512,3072,65536]``; results go to
``benchmarks/results/evaluation.json``.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.common import Bench, save, table
from benchmarks.speed import median_s
from unicuco.calibration import collect_input_norms
from unicuco.importance.wanda import wanda_scores
from unicuco.models import read_site, site_module
from unicuco.types import Strategy

_SPARSITY = 0.6
_SCATTER = 1.0  # of the axes' logits
_REPEATS, _REPEATED_TOKENS = 5, 20_480  # at least so many, and at least of so many tokens


def strategies(bench: Bench, count: int) -> list[Strategy]:
    """Return random strategies of one size, each at exactly the budget."""
    space = bench.space
    generator = torch.Generator().manual_seed(0)
    unit = torch.sigmoid(_SCATTER * torch.randn(count, space.num_axes, generator=generator))
    return space.decode_exact(unit, [space.kept_for_sparsity(_SPARSITY)] * count)


class Loop:
    """The straightforward way: a copy, a sort per row, a pass, the KL from whole predictions."""

    def __init__(self, bench: Bench) -> None:
        loaded = bench.prepared.loaded
        self._cost = bench.space.cost
        self._model, self._sites = loaded.model, loaded.profile.sites
        self._norms = collect_input_norms(
            loaded.model, loaded.profile, bench.prepared.texts.calibration
        )
        self._ids = bench.prepared.texts.search.ids
        self._dense = self._predict(self._model)

    def evaluate(self, strategy: Strategy) -> float:
        """Return the mean KL per token of a strategy that drops whole numbers per row."""
        model = copy.deepcopy(self._model)
        drops = self._cost.site_drops(strategy.values)
        for site in self._sites:
            weight = read_site(model, site)
            scores = wanda_scores(weight, self._norms[site.path])
            order = scores.argsort(dim=1, stable=True)
            each, more = divmod(drops[site.path], site.num_rows)
            for row in range(site.num_rows):
                weight[row, order[row, : each + (row < more)]] = 0.0
        log_q = self._predict(model)
        pairs = zip(self._dense, log_q, strict=True)
        return sum(float((p.exp() * (p - q)).sum()) for p, q in pairs) / self._ids.numel()

    @torch.no_grad()
    def _predict(self, model: torch.nn.Module) -> list[Tensor]:
        return [
            model(input_ids=window[None], use_cache=False).logits[0].float().log_softmax(-1)
            for window in self._ids
        ]


def product_seconds(bench: Bench, repeats: int) -> float:
    """Return what the sites' and the head's matrix products take alone, for the whole text."""
    profile, ids = bench.prepared.loaded.profile, bench.prepared.texts.search.ids
    width = int(read_site(bench.prepared.loaded.model, profile.sites[0]).shape[1])
    shapes = Counter((site.num_rows, site.num_columns) for site in profile.sites)
    shapes[profile.vocabulary_size, width] += 1
    total = 0.0
    for (rows, columns), count in shapes.items():
        x, weight = torch.randn(ids.shape[1], columns), torch.randn(rows, columns)
        total += count * median_s(lambda x=x, w=weight: torch.nn.functional.linear(x, w), repeats)
    return total * len(ids)


@torch.no_grad()
def run(model: PreTrainedModel, ids: Tensor) -> None:
    """Run every window through a model."""
    for window in ids.split(1):
        model(input_ids=window, use_cache=False)


class Products:
    """Times the matrix products of the sites and the head inside forward passes."""

    def __init__(self, bench: Bench, model: PreTrainedModel) -> None:
        self.seconds = self._started = 0.0
        head = model.get_output_embeddings()
        sites = [site_module(model, site) for site in bench.prepared.loaded.profile.sites]
        self._hooks = [
            hook
            for module in [*sites, head]
            for hook in (
                module.register_forward_pre_hook(self._start),
                module.register_forward_hook(self._stop),
            )
        ]

    def __enter__(self) -> Products:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _start(self, *_: object) -> None:
        self._started = time.perf_counter()

    def _stop(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._started


def measure(model: str, tokens: int, repeats: int) -> dict[str, float | str]:
    """Measure all at one number of tokens."""
    bench = Bench(model, tokens=tokens, test_tokens=512)
    ids = bench.prepared.texts.search.ids
    judge, loop = bench.search_judge, Loop(bench)
    asked = strategies(bench, 2 * repeats)
    whole, forward, straight, gaps, inside = [], [], [], [], []
    for before, strategy in zip(asked[::2], asked[1::2], strict=True):
        judge.evaluate(before)  # searches evaluate one after the other; the loop clears the caches
        started = time.perf_counter()
        kl = judge.evaluate(strategy).kl
        whole.append(time.perf_counter() - started)
        cut = judge.model_at(strategy)
        started = time.perf_counter()
        run(cut, ids)
        forward.append(time.perf_counter() - started)
        with Products(bench, cut) as products:
            run(cut, ids)
        inside.append(products.seconds)
        started = time.perf_counter()
        expected = loop.evaluate(strategy)
        straight.append(time.perf_counter() - started)
        gaps.append(abs(kl - expected) / expected)
    own, passes = statistics.median(whole), statistics.median(forward)
    alone = product_seconds(bench, 10 * repeats)
    return {
        "tokens": ids.numel(),
        "evaluation_s": own,
        "outside": 1 - statistics.median(f / w for f, w in zip(forward, whole, strict=True)),
        "rate": alone / statistics.median(inside),
        "products": alone / passes,
        "loop": statistics.median(s / w for s, w in zip(straight, whole, strict=True)),
        "largest_gap": f"{max(gaps):.1e}",
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description="Measure what evaluations cost.")
    parser.add_argument("--model", default="reference")
    parser.add_argument("--tokens", default="512,3072,65536")
    parser.add_argument("--repeats", type=int, help="default: 5, or 20,480 tokens' worth")
    values = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = [
        measure(values.model, tokens, values.repeats or max(_REPEATS, _REPEATED_TOKENS // tokens))
        for tokens in map(int, values.tokens.split(","))
    ]
    print(table(list(rows[0]), [list(row.values()) for row in rows]))
    print("saved to", save("evaluation", {"model": values.model, "rows": rows}))


if __name__ == "__main__":
    main()
