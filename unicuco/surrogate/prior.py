"""What another run's surrogate says of a model, as the prior of this model's own.

The other model has other axes: points of this one are read there through a matrix. Its mean
function's parameters become the centre of the prior of this one's; and what its process knows
beyond its mean function, how axes act together, is added to this one's, as far as measurements
bear it out. So where the two models are one, everything is known before anything is measured; where
they are not, measurements correct both parts.

The other run may have had a prior itself: every generation costs a surrogate's memory, and time at
every prediction. What it does not know: which run, and whether the two are alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from unicuco.tensors import named_under

_OTHER: Final = "other/"
_PLACES: Final = "places"
_CENTRE: Final = "centre"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prior:
    """Another run's surrogate.

    Attributes:
        other: its `GaussianProcess.state`.
        places: ``d x d'``: a unit point here times this is the point there.
        centre: ``2 d + 2`` parameters of its mean function (`CurveMean.parameters`), carried over.
    """

    other: Mapping[str, Tensor]
    places: Tensor
    centre: Tensor

    def state(self) -> dict[str, Tensor]:
        """Return it as named tensors; `restore` reads them."""
        named = {_OTHER + name: tensor for name, tensor in self.other.items()}
        return {**named, _PLACES: self.places, _CENTRE: self.centre}

    @classmethod
    def restore(cls, state: Mapping[str, Tensor]) -> Prior:
        """Rebuild a prior from `state`."""
        other = named_under(_OTHER, state)
        return cls(other=other, places=state[_PLACES], centre=state[_CENTRE])
