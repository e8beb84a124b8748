"""The derivative of the KL along axes that take units or parts away, from one backward pass.

What the units of a part compute meets in its last matrix W: the model with fewer units is the one
in which the columns of those that went are zero in W and the others fitted anew, with all else as
it was. So with G the gradient of the mean-token KL to W at the present strategy, D what W changes
by in a step, and c(D) = tr(D H D^T) / 2 the curvature's part, a step changes the KL by <G, D> +
c(D). For this what is gone runs on, behind zeros: the gradients of its columns say what it would do
if it came back. The derivative is taken between the steps before and behind,

    dKL/dv = (<G, D+ - D-> + c(D+) - c(D-)) / (distance of the two),

in which the curvature nearly cancels where steps cost alike. The ends have one neighbour. There the
KL alone is taken to be a square of v. At the dense end its derivative is then 0, and what others
make of it, <G, D+>, is left; at the other end <G, D-> is all of it if the axis is a single step d,
and the curvature counts for 1 - d of c(D-) otherwise.

A part as a whole is behind a gate on what it adds to the residual stream, 1 while it is there and 0
when it is gone, and dKL/dv is minus the derivative to the gate.

What it does not know: the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from unicuco.dimensions import ProductCost
from unicuco.space import Axis, Shape


@dataclass(frozen=True, slots=True)
class Change:
    """What the KL does as a matrix changes, in nats per token: the first and the second order."""

    first: float
    second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbours:
    """The shapes one step before and behind a strategy's own along an axis; none past its ends.

    ``size`` is that of a step, ``share`` how much of the axis' range it is.
    """

    own: Shape
    below: Shape | None
    above: Shape | None
    size: float
    share: float


def neighbours(cost: ProductCost, values: Sequence[float], position: int, axis: Axis) -> Neighbours:
    """Return a strategy's neighbours along an axis of shapes.

    Args:
        cost: gives the shapes.
        values: settings of the strategy, in axis order.
        position: of the axis.
        axis: of shapes.
    """
    step = round(values[position] * axis.num_steps)

    def shape_at(other: int) -> Shape:
        moved = [*values]
        moved[position] = other / axis.num_steps
        return cost.shape(tuple(moved))

    return Neighbours(
        own=cost.shape(tuple(values)),
        below=shape_at(step - 1) if step > 0 else None,
        above=shape_at(step + 1) if step < axis.max_step else None,
        size=1 / axis.num_steps,
        share=1 / axis.max_step,
    )


def shape_slope(
    steps: Neighbours,
    gates: Mapping[int, Tensor],
    change: Callable[[int, Shape, Shape], Change],
) -> float:
    """Return dKL/dv along an axis of shapes, in nats per token.

    Args:
        steps: neighbours along the axis.
        gates: position of a part -> its gate, with its gradient.
        change: what the KL does as a part's last matrix goes from one shape's to another's.
    """
    with_less, with_more = steps.below or steps.own, steps.above or steps.own
    gone = with_more.parts - with_less.parts
    if gone:
        return -sum(float(factor.grad) for p in gone if (factor := gates[p]).grad is not None)
    slope = 0.0
    for p in _changed(with_less, with_more):
        if steps.below is None:
            slope += change(p, steps.own, with_more).first / steps.size
            continue
        back = change(p, steps.own, steps.below)
        if steps.above is None:
            slope -= (back.first + (1 - steps.share) * back.second) / steps.size
            continue
        on = change(p, steps.own, steps.above)
        slope += (on.first + on.second - back.first - back.second) / (2 * steps.size)
    return slope


def _changed(one: Shape, other: Shape) -> list[int]:
    """Return the parts that two shapes narrow differently."""
    mine, theirs = dict(one.narrowed), dict(other.narrowed)
    return [p for p in sorted({*mine, *theirs}) if mine.get(p) != theirs.get(p)]
