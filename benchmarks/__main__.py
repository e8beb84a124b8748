"""Run the main benchmarks, one after the other."""

from __future__ import annotations

from benchmarks import (
    acceptance,
    bits,
    bits_joint,
    cluster,
    learning,
    predictions,
    quality,
    scale,
    serve,
    serve_models,
    shrink,
    speed,
)


def main() -> None:
    """Run all parts with their default options."""
    acceptance.main([])
    quality.main([])
    speed.main([])
    cluster.main([])
    scale.main([])
    bits.main([])
    bits_joint.main([])
    shrink.main([])
    predictions.main([])
    learning.main([])
    serve.main([])
    serve_models.main([])


if __name__ == "__main__":
    main()
