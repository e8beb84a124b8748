"""What learning believes about strategies it has not measured."""

from __future__ import annotations

from unicuco.surrogate.gp import GaussianProcess, Observations, SurrogateOptions
from unicuco.surrogate.intervals import Intervals, Measured
from unicuco.surrogate.mean import EPSILON, CurveMean
from unicuco.surrogate.prior import Prior
from unicuco.surrogate.tasks import (
    Forecast,
    Surrogate,
    TaskForecast,
    TaskSurrogates,
    TextForecast,
)

__all__ = [
    "EPSILON",
    "CurveMean",
    "Forecast",
    "GaussianProcess",
    "Intervals",
    "Measured",
    "Observations",
    "Prior",
    "Surrogate",
    "SurrogateOptions",
    "TaskForecast",
    "TaskSurrogates",
    "TextForecast",
]
