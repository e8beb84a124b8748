"""Run every benchmark, one after the other."""

from __future__ import annotations

from benchmarks import acceptance, bits, cluster, quality, serve, serve_models, speed


def main() -> None:
    """Run all parts with their default options."""
    acceptance.main([])
    quality.main([])
    speed.main([])
    cluster.main([])
    bits.main([])
    serve.main([])
    serve_models.main([])


if __name__ == "__main__":
    main()
