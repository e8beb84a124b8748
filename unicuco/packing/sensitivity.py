"""How much errors in a model's matrices matter: inputs and output gradients on calibration text.

The matrices are the sites and the embeddings at both ends, one matrix where they are tied: those
hold nearly all weights of any model. Everything that is kept is a vector or a Hessian.

Notation: o rows, i columns, t tokens, x inputs, g output gradients of the summed loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from unicuco.calibration import TokenSet, watch_inputs
from unicuco.importance.fisher import backward_of_own_labels
from unicuco.importance.hessian import collect_hessians
from unicuco.importance.sparsegpt import InverseFactor
from unicuco.models import LoadedModel, site_module
from unicuco.packing.int8 import Sensitivity
from unicuco.types import Site

_TINY: Final = 1e-30  # of a matrix that no gradient reaches: nothing matters there


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What calibration text says of a model's matrices, by the names of their parameters.

    ``peaks``: largest absolute input of each column of a site, ``i`` float32.
    """

    sensitivities: dict[str, Sensitivity]
    peaks: dict[str, Tensor]


def measure(
    loaded: LoadedModel,
    tokens: TokenSet,
    *,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Measured:
    """Run calibration text through the model, forward twice and backward once.

    Args:
        loaded: the dense model; its weights are left as they are.
        tokens: calibration windows.
        seed: draws the labels.
        progress: told the windows done and their number.

    Raises:
        ModelError: inputs of a site are NaN or infinite.
    """
    sums = _Sums(loaded)
    generator = torch.Generator().manual_seed(seed)
    with sums.collecting():
        for done, window in enumerate(tokens.ids.split(1)):
            progress(done, len(tokens.ids))
            gradient = backward_of_own_labels(loaded.model, window, generator)
            sums.add_embedded(window[0], gradient)
    hessians = collect_hessians(loaded, loaded.profile.sites, tokens)
    sensitivities = {
        name: _of_embedding(sums.rows[name], sums.columns[name], tokens.num_tokens)
        for name in sums.embeddings.values()
    }
    for site in loaded.profile.sites:
        # Half of H is the second moment; the factor of H itself is smaller by the root of two.
        moment = hessians.pop(site.path) / 2
        rows = sums.rows[weight_name(site)] / tokens.num_tokens / moment.diagonal().sum().double()
        sensitivities[weight_name(site)] = Sensitivity(
            rows=rows.clamp_min(_TINY),
            columns=moment.diagonal().double().clamp_min(_TINY),
            factor=InverseFactor.of(moment),
        )
    progress(len(tokens.ids), len(tokens.ids))
    return Measured(sensitivities=sensitivities, peaks=_peaks(loaded, tokens))


def weight_name(site: Site) -> str:
    """Return the parameter's name of a site's matrix."""
    return f"{site.path}.weight"


def embedding_names(model: nn.Module) -> dict[str, str]:
    """Return which parameter each end's embedding is: "input", "output" -> name, equal if tied.

    An end that is no plain matrix is left out.
    """
    # Any: transformers' own accessors, missing on no causal model, untyped on modules.
    ends: dict[str, Any] = {
        "input": model.get_input_embeddings(),  # type: ignore[operator]
        "output": model.get_output_embeddings(),  # type: ignore[operator]
    }
    first = {id(p): name for name, p in model.named_parameters()}  # tied ones once
    found = {}
    for end, module in ends.items():
        if isinstance(module, nn.Embedding | nn.Linear) and id(module.weight) in first:
            found[end] = first[id(module.weight)]
    return found


class _Sums:
    """Sums over tokens: of g² |x|² by row and x² |g|² by column, of every matrix."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._model = loaded.model
        self.embeddings = embedding_names(loaded.model)
        self._modules = {weight_name(s): site_module(loaded.model, s) for s in loaded.profile.sites}
        if "output" in self.embeddings:
            self._modules[self.embeddings["output"]] = loaded.model.get_output_embeddings()
        self.rows: dict[str, Tensor] = {}
        self.columns: dict[str, Tensor] = {}
        if "input" in self.embeddings:
            rows, columns = cast(Tensor, loaded.model.get_input_embeddings().weight).shape
            self.rows[self.embeddings["input"]] = torch.zeros(rows, dtype=torch.float64)
            self.columns[self.embeddings["input"]] = torch.zeros(columns, dtype=torch.float64)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Collect of every backward pass that runs inside."""
        with ExitStack() as hooks:
            for name, module in self._modules.items():
                hooks.callback(module.register_forward_hook(self._watch(name)).remove)
            yield

    def add_embedded(self, tokens: Tensor, gradient: Tensor) -> None:
        """Add a window's gradients of its token embeddings, ``t x h``: one-hot inputs."""
        name = self.embeddings.get("input")
        if name is not None:
            squares = gradient.double().square()
            self.rows[name].index_add_(0, tokens, squares.sum(1))
            self.columns[name].add_(squares.sum(0))

    def _watch(self, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            x = inputs[0].detach().flatten(0, -2).float().square()  # (t, i)

            def collect(gradient: Tensor) -> None:
                g = gradient.detach().flatten(0, -2).float().square()  # (t, o)
                rows, columns = (g.T @ x.sum(1)).double(), (x.T @ g.sum(1)).double()
                self.rows[name] = self.rows.get(name, 0.0) + rows
                self.columns[name] = self.columns.get(name, 0.0) + columns

            output.register_hook(collect)

        return hook


def _of_embedding(rows: Tensor, columns: Tensor, num_tokens: int) -> Sensitivity:
    """Return the sensitivity of a matrix whose Fisher diagonal has these margins."""
    width, height = len(columns), len(rows)
    total = columns.sum().clamp_min(_TINY)
    return Sensitivity(
        rows=(rows / num_tokens / width).clamp_min(_TINY),
        columns=(columns / total * width).clamp_min(_TINY * height),
    )


@torch.no_grad()
def _peaks(loaded: LoadedModel, tokens: TokenSet) -> dict[str, Tensor]:
    peaks: dict[str, Tensor] = {}

    def observe(site: Site, inputs: Tensor) -> None:
        largest = inputs.flatten(0, -2).float().abs().amax(0)
        name = weight_name(site)
        peaks[name] = torch.maximum(peaks[name], largest) if name in peaks else largest

    with watch_inputs(loaded.model, loaded.profile, observe):
        for batch in tokens.batches():
            loaded.model(input_ids=batch.to(loaded.model.device), use_cache=False)
    return peaks
