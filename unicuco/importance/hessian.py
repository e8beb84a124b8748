"""Hessians of the sites' squared output errors, from one pass over the calibration text.

Inputs are those of the dense model, for one set of levels has to serve every strategy.

Notation: N tokens, i input columns of a site.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor
from torch.nn.functional import pad

from unicuco.calibration import TokenSet, watch_inputs
from unicuco.errors import ModelError
from unicuco.importance.sparsegpt import InverseFactor
from unicuco.types import Site

if TYPE_CHECKING:
    from unicuco.models import LoadedModel


FACTORS: Final = "factors.safetensors"  # the file of a run folder


def collect_factors(loaded: LoadedModel, tokens: TokenSet) -> dict[str, Tensor]:
    """Return U of every site's damped Hessian, ``i x i`` float32 (`InverseFactor`), for GPTQ.

    One pass per block, so that one block's Hessians are in memory; of all factors together that is
    i² numbers of 4 bytes per site.

    Raises:
        ModelError: inputs are NaN, infinite or too large.
    """
    factors: dict[str, Tensor] = {}
    for block in range(loaded.profile.num_blocks):
        sites = [site for site in loaded.profile.sites if site.block == block]
        for path, hessian in collect_hessians(loaded, sites, tokens).items():
            factors[path] = InverseFactor.of(hessian).upper.float()
    return factors


@torch.no_grad()
def collect_hessians(
    loaded: LoadedModel, sites: Sequence[Site], tokens: TokenSet, *, with_constant: bool = False
) -> dict[str, Tensor]:
    """Run the text through the model and sum H = 2/N X^T X of some sites.

    Args:
        loaded: the dense model.
        sites: of it; memory is i² numbers of 4 bytes for each.
        tokens: the calibration text.
        with_constant: take one more input that is always 1, which a bias is the column of.

    Returns:
        Site path to ``i x i`` float32.

    Raises:
        ModelError: inputs are NaN or infinite.
    """
    paths = {site.path for site in sites}
    sizes = {site.path: site.num_columns + with_constant for site in sites}
    sums = {path: torch.zeros(size, size) for path, size in sizes.items()}

    def observe(site: Site, inputs: Tensor) -> None:
        if site.path in paths:
            x = inputs.flatten(0, -2).float()
            x = pad(x, (0, 1), value=1.0) if with_constant else x
            sums[site.path].addmm_(x.T, x, alpha=2 / tokens.num_tokens)

    with watch_inputs(loaded.model, loaded.profile, observe):
        for batch in tokens.batches():
            loaded.model(input_ids=batch.to(loaded.model.device), use_cache=False)
    for path, hessian in sums.items():
        if not bool(torch.isfinite(hessian).all()):
            raise ModelError(f"the inputs of {path} are NaN or infinite on the calibration text")
    return sums
