"""Strategies and the unit cube: axes, costs, projection onto budgets."""

from __future__ import annotations

from unicuco.space.axis import Axis, CostModel, Narrowing, Shape
from unicuco.space.strategy_space import StrategySpace

__all__ = ["Axis", "CostModel", "Narrowing", "Shape", "StrategySpace"]
