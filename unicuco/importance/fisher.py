"""Fisher curves: what removing the n first weights of each site costs, for all n, from one pass.

One forward and backward pass of the summed negative log likelihood of labels drawn from the model
itself at every position (DESIGN.md section 8, finding 1). With inputs x and output gradients g of a
site, per token, the Fisher diagonal of weight (o, i) is F = E_t[x_i^2 g_o^2], and dropping it adds
w^2 F / 2 to the KL, to second order and without cross terms. Sums over the rows of one rank are all
that is kept: the curve over n and the one-sided derivatives of `unicuco.evaluate` both follow from
them.

Notation: o rows, i columns (= ranks), t tokens, w weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from unicuco.calibration import TokenSet
from unicuco.models import read_site, site_module
from unicuco.types import ModelProfile


def fisher_rank_sums(
    model: nn.Module,
    profile: ModelProfile,
    ranks: Mapping[str, Tensor],
    tokens: TokenSet,
    *,
    seed: int,
) -> dict[str, Tensor]:
    """Sum w^2 F / 2 over the rows at every rank of every site.

    Args:
        model: the dense model; its weights are left as they are.
        profile: its profile.
        ranks: site path -> ``o x i`` drop order within each row.
        tokens: calibration windows.
        seed: draws the labels.

    Returns:
        Site path -> ``i`` float64 sums, index = rank within the row, in nats per token.
    """
    generator = torch.Generator().manual_seed(seed)

    def run() -> None:
        for window in tokens.ids.split(1):
            backward_of_own_labels(model, window, generator)

    return measure_rank_sums(model, profile, ranks, tokens.num_tokens, run)


def measure_rank_sums(
    model: nn.Module,
    profile: ModelProfile,
    ranks: Mapping[str, Tensor],
    num_tokens: int,
    run: Callable[[], None],
) -> dict[str, Tensor]:
    """Sum w^2 F / 2 over the rows of a profile's sites while ``run`` goes there and back.

    The gradients must be those of the summed loss of labels drawn from the model (`own_label_loss`)
    over ``num_tokens`` tokens. Returns what `fisher_rank_sums` does.
    """
    diagonals = {site.path: torch.zeros(site.num_rows, site.num_columns) for site in profile.sites}
    with _collecting(model, profile, diagonals):
        run()
    sums: dict[str, Tensor] = {}
    for site in profile.sites:
        effect = read_site(model, site).float().square() * diagonals[site.path] / (2 * num_tokens)
        rank = ranks[site.path].long()
        sums[site.path] = torch.zeros(site.num_columns, dtype=torch.float64).scatter_add_(
            0, rank.flatten(), effect.double().flatten()
        )
    return sums


def backward_of_own_labels(model: nn.Module, window: Tensor, generator: torch.Generator) -> Tensor:
    """Run one window and its backward pass of the summed loss of labels drawn from the model.

    Args:
        model: all weights may be frozen.
        window: ``1 x t`` tokens.
        generator: draws the labels.

    Returns:
        The gradient of the token embeddings, ``t x h``.
    """
    with torch.enable_grad():
        # The embeddings get a gradient so that the graph reaches every site though all weights are
        # frozen.
        embedded = model.get_input_embeddings()(window).detach().requires_grad_(True)  # type: ignore[operator]
        own_label_loss(model(inputs_embeds=embedded).logits[0], generator).backward()
    gradient: Tensor = embedded.grad[0]
    return gradient


def own_label_loss(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Return the summed loss of labels drawn from ``t x v`` logits themselves."""
    logits = logits.float()
    labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")


@contextmanager
def _collecting(
    model: nn.Module, profile: ModelProfile, diagonals: dict[str, Tensor]
) -> Iterator[None]:
    """Add x^2 g^2 of every token to ``diagonals`` while a backward pass runs inside."""
    handles = [
        site_module(model, site).register_forward_hook(_watch(diagonals[site.path]))
        for site in profile.sites
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch(diagonal: Tensor) -> Callable[[nn.Module, Any, Tensor], None]:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        x = inputs[0].detach().flatten(0, -2).float()  # (t, i)

        def collect(gradient: Tensor) -> None:
            g = gradient.detach().flatten(0, -2).float()  # (t, o)
            diagonal.addmm_(g.square().T, x.square())

        output.register_hook(collect)

    return hook
