"""A learned run, as a document for scripts and in words for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unicuco.pipeline import Run


def run_document(run: Run) -> dict[str, object]:
    """Return what ``learn --json`` prints: the folder and its manifest."""
    return {"run": str(run.folder), "manifest": run.manifest}


def describe_run(run: Run) -> str:
    """Return what to do next with a run."""
    from rich.markup import escape

    folder = escape(str(run.folder))
    return (
        f"run written to [bold]{folder}[/bold]; try\n"
        f"  unicuco plan {folder} --sparsity 0.6\n"
        f"  unicuco front {folder} --plot front.png\n"
        f"  unicuco prune {folder} --sparsity 0.6 --out VARIANT"
    )
