"""The acceptance tests of every allocation method, as measured: one table, one file.

`python -m benchmarks.acceptance` measures what is asked of each method and prints Markdown. The
tests hold the same relations; this says by how much. More methods join by one line in `PARTS`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Final

from benchmarks import (
    acceptance_allocators,
    acceptance_pruners,
    acceptance_reference,
    acceptance_searches,
)
from benchmarks.common import Finding, save, table

PARTS: Final[dict[str, Callable[[], list[Finding]]]] = {
    "pruners": acceptance_pruners.findings,
    "allocators": acceptance_allocators.findings,
    "searches": acceptance_searches.findings,
    "reference": acceptance_reference.findings,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    options = parser.parse_args(arguments)
    found = [finding for part in options.parts for finding in PARTS[part]()]
    rows = [
        (item.method, item.test, f"{item.figure:.4g}", item.bound, item.verdict) for item in found
    ]
    print(table(("method", "test", "figure", "wanted", ""), rows))
    if list(options.parts) == list(PARTS):
        save(
            "acceptance", {"findings": [{**asdict(item), "passed": item.passed} for item in found]}
        )


if __name__ == "__main__":
    main()
