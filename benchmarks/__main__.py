"""Run every benchmark, one after the other."""

from __future__ import annotations

from benchmarks import quality, serve, speed


def main() -> None:
    """Run all parts with their default options."""
    quality.main([])
    speed.main([])
    serve.main([])


if __name__ == "__main__":
    main()
