"""A profile's sites and blocks in a loaded model. Needs torch alone, so learners stay small."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from unicuco.types import ModelProfile, Site


def site_module(model: nn.Module, site: Site) -> nn.Module:
    """Return the module that holds the site's matrix as ``weight``."""
    return model.get_submodule(site.path)


def read_site(model: nn.Module, site: Site) -> Tensor:
    """Return the site's matrix as an ``o x i`` view: writing into it changes the model."""
    weight = cast(Tensor, site_module(model, site).weight).detach()
    return weight.T if site.transposed else weight


def block_module(model: nn.Module, profile: ModelProfile, block: int) -> nn.Module:
    """Return transformer block ``block``."""
    return model.get_submodule(profile.block_paths[block])
