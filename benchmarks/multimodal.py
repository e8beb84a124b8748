"""OptSpa where it comes from: on the language tower of a multimodal model, end to end.

The model is LLaVA's architecture with the embedded reference model as its language tower; vision
tower and projector are small and random, since nothing is pruned there and no image is shown. So
what is found must lie on the language tower alone, and equal sparsity must cost what it costs the
reference model itself. What this does not know: how answers about images suffer.

``python -m benchmarks.multimodal``; the same by hand is ``unicuco compare FOLDER --allocators
uniform,optspa``. Writes ``benchmarks/results/multimodal.json``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from benchmarks.common import save, table
from unicuco.models import load_model, load_tokenizer, quiet_transformers, resolve_model
from unicuco.pipeline import CompareOptions, Comparison, LocalBackend, compare
from unicuco.testing.tiny import llava_around

ALLOCATORS: Final = ("uniform", "optspa")
SPARSITIES: Final = (0.5, 0.7)


def write_multimodal(folder: Path, language: Path) -> Path:
    """Write a LLaVA-style model around a language model of the Llama family.

    Args:
        folder: of the model to make.
        language: the folder of the language model.
    """
    config = llava_around(AutoConfig.from_pretrained(language))
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the library's initialiser takes no generator
        # Any: `from_config` and the towers' names are untyped.
        model: Any = AutoModelForImageTextToText.from_config(config)
        tower: Any = AutoModelForCausalLM.from_pretrained(language, dtype=torch.float32)
        model.model.language_model.load_state_dict(tower.model.state_dict())
        model.tie_weights()
        model.save_pretrained(folder)
    load_tokenizer(language).save_pretrained(folder)
    return folder


def measure(
    model: str, allocators: Sequence[str], *, tokens: int, test_tokens: int
) -> list[Comparison]:
    """Compare allocators on a model, as ``unicuco compare`` does."""
    options = CompareOptions(
        model=model,
        allocators=tuple(allocators),
        sparsities=SPARSITIES,
        tokens=tokens,
        test_tokens=test_tokens,
    )
    report = compare(options, backend_factory=LocalBackend, progress=lambda step: None)
    return list(report.results)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1024, help="per trial")
    parser.add_argument("--test-tokens", type=int, default=4096)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    sizes = {"tokens": options.tokens, "test_tokens": options.test_tokens}
    language = resolve_model("reference")
    with TemporaryDirectory() as made:
        folder = write_multimodal(Path(made) / "llava", language)
        paths = [site.path for site in load_model(folder).profile.sites]
        found = measure(str(folder), ALLOCATORS, **sizes)
    alone = measure("reference", ("uniform",), **sizes)
    rows = [
        (name, r.allocator, r.sparsity, r.kl, r.perplexity, r.evaluations)
        for name, results in (("multimodal", found), ("its language tower", alone))
        for r in results
    ]
    print(table(("model", "allocator", "sparsity", "KL", "perplexity", "evaluations"), rows))
    outside = [path for path in paths if "language_model" not in path]
    print(f"{len(paths)} sites, {len(outside)} outside the language tower")
    save(
        "multimodal",
        {
            **sizes,
            "sites": len(paths),
            "sites_outside_the_language_tower": len(outside),
            "multimodal": [asdict(result) for result in found],
            "language_tower": [asdict(result) for result in alone],
        },
    )


if __name__ == "__main__":
    main()
