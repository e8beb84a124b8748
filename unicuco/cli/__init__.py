"""The command line: `main` runs ``unicuco``. Commands import what they need when they run."""

from __future__ import annotations

from unicuco.cli.app import main

__all__ = ["main"]
