"""Imports Transformers without scikit-learn, SciPy and pandas: 60 MB and a third of a second.

Transformers takes scikit-learn wherever it is installed (GPyTorch brings it) for one threshold of
assisted generation, which nothing here uses. That module is loaded here once while scikit-learn
seems absent, and keeps to its own way of doing without; everything else finds what is there.
"""

from __future__ import annotations

import sys
from importlib import import_module

_MODULE = "transformers.generation.candidate_generator"
_ASKED = "is_sklearn_available"


def import_lean() -> None:
    """Import what of Transformers would load scikit-learn. Once it is there, this does nothing."""
    if _MODULE in sys.modules or "sklearn" in sys.modules:
        return
    names = vars(import_module("transformers.utils"))
    found = names[_ASKED]
    names[_ASKED] = _no
    try:
        import_module(_MODULE)
    finally:
        names[_ASKED] = found


def _no() -> bool:
    return False
