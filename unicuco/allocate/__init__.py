"""Allocators: a size request -> a strategy, without evaluating anything.

Add one: write ``allocate/x.py`` with a class that implements `Allocator`, and add one line to
`ALLOCATORS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from unicuco.allocate.adapmtl import AdapMtl
from unicuco.allocate.alphapruning import AlphaPruning
from unicuco.allocate.base import AllocationContext, Allocator, RowAllocator
from unicuco.allocate.besa import Besa
from unicuco.allocate.curves import AxisCurves
from unicuco.allocate.dsa import DSA
from unicuco.allocate.evidence import Evidence, TextPart, TextSource
from unicuco.allocate.fisher import Fisher
from unicuco.allocate.layerif import LayerIF
from unicuco.allocate.lua import Lua
from unicuco.allocate.owl import OWL
from unicuco.allocate.trim import Trim
from unicuco.allocate.uniform import Uniform

ALLOCATORS: Final[dict[str, Callable[[AllocationContext], Allocator]]] = {
    "uniform": Uniform,
    "fisher": Fisher,
    "owl": OWL,
    "alphapruning": AlphaPruning,
    "besa": Besa,
    "lua": Lua,
    "adapmtl": AdapMtl,
    "dsa": DSA,
    "layerif": LayerIF,
    "trim": Trim,
}

__all__ = [
    "ALLOCATORS",
    "DSA",
    "OWL",
    "AdapMtl",
    "AllocationContext",
    "Allocator",
    "AlphaPruning",
    "AxisCurves",
    "Besa",
    "Evidence",
    "Fisher",
    "LayerIF",
    "Lua",
    "RowAllocator",
    "TextPart",
    "TextSource",
    "Trim",
    "Uniform",
]
