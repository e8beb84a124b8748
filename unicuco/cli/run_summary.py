"""A learned run, as a document for scripts and in words for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unicuco.pipeline import Run


def run_document(run: Run, place: str) -> dict[str, object]:
    """Return what ``learn --json`` prints: where the run is, and its manifest."""
    return {"run": place, "manifest": run.manifest}


def describe_run(place: str) -> str:
    """Return what to do next with a run, by its folder or URL."""
    from rich.markup import escape

    name = escape(place)
    return (
        f"run written to [bold]{name}[/bold]; try\n"
        f"  unicuco plan {name} --sparsity 0.6\n"
        f"  unicuco front {name} --plot front.png\n"
        f"  unicuco prune {name} --sparsity 0.6 --out VARIANT"
    )
