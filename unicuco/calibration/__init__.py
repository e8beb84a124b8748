"""Calibration: text to token windows, which windows, and the statistics that metrics need of them.

What this package does not know: which of the four texts it is given.
"""

from unicuco.calibration.sampling import Sampling, sample_clustered
from unicuco.calibration.windows import (
    TokenSet,
    check_vocabulary,
    collect_input_norms,
    measure_input_norms,
    read_text,
    token_windows,
    watch_inputs,
)

__all__ = [
    "Sampling",
    "TokenSet",
    "check_vocabulary",
    "collect_input_norms",
    "measure_input_norms",
    "read_text",
    "sample_clustered",
    "token_windows",
    "watch_inputs",
]
