"""A model in stages: contiguous ranges of its blocks, each of which alone holds its own weights.

Runs without Ray; `cluster` puts every stage into a process of its own.
"""

from __future__ import annotations
