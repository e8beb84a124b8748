"""A model's profile without its weights: sites and blocks found by running its code on ghosts.

Ghosts are zeros of the right shape that take four bytes. Which blocks and matrices run depends on
the code alone, so all that `profile_model` finds is found here too, except that nothing can be seen
of what predictions depend on: that the model is causal is checked where its weights are.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from unicuco.memory import give_back_freed
from unicuco.models import LoadedModel, model_digest, profile_model, weight_files
from unicuco.models.load import build_on_meta
from unicuco.models.stored import with_stored_bytes


def load_ghost(folder: Path) -> LoadedModel:
    """Return what `load_model` does of a folder, with ghosts for parameters.

    Of the files only the headers are looked at, and all of them are read through for their digest.
    Whoever calls this counts on little memory: from now on the process gives back what it frees.

    Raises:
        ModelError: no usable model is there, or it is of an unknown shape.
    """
    give_back_freed()
    model = build_on_meta(folder)
    ghosts = {
        parameter: nn.Parameter(torch.zeros(()).expand(parameter.shape), requires_grad=False)
        for parameter in model.parameters()  # tied ones once
    }
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = ghosts[parameter]
    profile = profile_model(model, digest=model_digest(folder))
    profile = with_stored_bytes(profile, model, weight_files(folder))
    return LoadedModel(model=model, profile=profile, folder=folder)
