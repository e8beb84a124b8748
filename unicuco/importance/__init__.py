"""Importance metrics: which weights of a row go first. A new one is a file and a registry line."""

from typing import Final

from unicuco.importance.base import ImportanceMetric, SiteStats, StatKind
from unicuco.importance.magnitude import Magnitude
from unicuco.importance.wanda import Wanda

METRICS: Final[dict[str, ImportanceMetric]] = {
    "magnitude": Magnitude(),
    "wanda": Wanda(),
}

__all__ = ["METRICS", "ImportanceMetric", "Magnitude", "SiteStats", "StatKind", "Wanda"]
