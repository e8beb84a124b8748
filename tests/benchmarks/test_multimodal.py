"""The LLaVA-style model of the benchmark."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.multimodal import write_multimodal
from unicuco.models import load_model, read_site


def test_a_multimodal_model_has_its_language_model_as_its_only_sites(
    tiny_llama: Path, tmp_path: Path
) -> None:
    alone = load_model(tiny_llama)
    made = load_model(write_multimodal(tmp_path / "llava", tiny_llama))
    assert made.profile.architecture == "LlavaForConditionalGeneration"
    pairs = list(zip(made.profile.sites, alone.profile.sites, strict=True))
    assert all("language_model" in site.path for site, _ in pairs)
    for site, own in pairs:
        assert torch.equal(read_site(made.model, site), read_site(alone.model, own).float())
    ids = torch.arange(12)[None]
    with torch.no_grad():
        logits = [loaded.model(input_ids=ids).logits.float() for loaded in (made, alone)]
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=1e-5)
