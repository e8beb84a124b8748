"""What learning believes about strategies it has not measured."""

from __future__ import annotations

from unicuco.surrogate.gp import GaussianProcess, Observations, SurrogateOptions
from unicuco.surrogate.intervals import Intervals
from unicuco.surrogate.mean import EPSILON, CurveMean

__all__ = [
    "EPSILON",
    "CurveMean",
    "GaussianProcess",
    "Intervals",
    "Observations",
    "SurrogateOptions",
]
