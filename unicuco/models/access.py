"""A profile's sites and blocks in a loaded model. Needs torch alone, so learners stay small."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

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


def silence(module: nn.Module) -> RemovableHandle:
    """Make a module whose output is added to the residual stream add nothing, until removed."""
    return module.register_forward_hook(_zeroed)


def gate(module: nn.Module, factor: Tensor) -> RemovableHandle:
    """Multiply what a module adds to the residual stream by a scalar, until removed."""

    # Any: as below.
    def scaled(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] * factor, *output[1:])
        return output * factor

    return module.register_forward_hook(scaled)


# Any: a module returns a tensor or a tuple that starts with it, whatever the family.
def _zeroed(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    if isinstance(output, tuple):
        return (output[0].new_zeros(output[0].shape), *output[1:])
    return output.new_zeros(output.shape)
