from __future__ import annotations

from pathlib import Path

import pytest
import torch

from unicuco.calibration import token_windows
from unicuco.importance.fisher import backward_of_own_labels
from unicuco.models import LoadedModel, load_model, load_tokenizer
from unicuco.packing import Measured, measure
from unicuco.testing.tiny import tiny_model_folder

SEED = 3


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("sensitivity") / "model"
    return load_model(tiny_model_folder(folder, tied=request.param))


@pytest.fixture(scope="module")
def tokens(loaded: LoadedModel, tiny_text_file: Path):
    text = tiny_text_file.read_text(encoding="utf-8")
    return token_windows(load_tokenizer(loaded.folder), text, tokens=96, context=24)


@pytest.fixture(scope="module")
def measured(loaded: LoadedModel, tokens) -> Measured:
    before = {name: p.clone() for name, p in loaded.model.named_parameters()}
    result = measure(loaded, tokens, seed=SEED)
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, before[name])
    return result


def fisher_of(loaded: LoadedModel, tokens, name: str) -> torch.Tensor:
    """Square every token's own gradient of one parameter: slow, and by definition."""
    end = name.removesuffix(".weight")
    generator = torch.Generator().manual_seed(SEED)
    total = torch.zeros_like(dict(loaded.model.named_parameters())[name], dtype=torch.float64)
    seen: dict[str, torch.Tensor] = {}

    def watch(module, inputs, output):
        seen["x"] = inputs[0].detach()[0]
        output.register_hook(lambda gradient: seen.update(g=gradient[0]))

    for window in tokens.ids.split(1):
        heads = {"lm_head"} if end == "model.embed_tokens" else {end}
        tied = loaded.model.config.tie_word_embeddings
        modules = heads if tied or end != "model.embed_tokens" else set()
        handles = [loaded.model.get_submodule(m).register_forward_hook(watch) for m in modules]
        embedded = backward_of_own_labels(loaded.model, window, generator)
        for handle in handles:
            handle.remove()
        if modules:
            for x, g in zip(seen["x"], seen["g"], strict=True):
                total += torch.outer(g, x).double().square()
        if end == "model.embed_tokens":
            for token, gradient in zip(window[0], embedded, strict=True):
                total[token] += gradient.double().square()
    return total / tokens.num_tokens


def test_margins_are_those_of_the_fisher_diagonal(
    loaded: LoadedModel, tokens, measured: Measured
) -> None:
    names = {"model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"}
    if not loaded.model.config.tie_word_embeddings:
        names.add("lm_head.weight")
    assert names <= set(measured.sensitivities)
    for name in names:
        fisher = fisher_of(loaded, tokens, name)
        sensitivity = measured.sensitivities[name]
        ours = torch.outer(sensitivity.rows, sensitivity.columns)
        assert torch.allclose(ours.sum(1), fisher.sum(1), rtol=1e-3, atol=1e-12)
        if sensitivity.factor is None:
            assert torch.allclose(ours.sum(0), fisher.sum(0), rtol=1e-3, atol=1e-12)


def test_every_site_and_both_embeddings_are_there(loaded: LoadedModel, measured: Measured) -> None:
    matrices = {name for name, p in loaded.model.named_parameters() if p.dim() == 2}
    assert set(measured.sensitivities) == matrices
    assert set(measured.peaks) == {f"{site.path}.weight" for site in loaded.profile.sites}


def test_peaks_are_the_largest_inputs(loaded: LoadedModel, tokens, measured: Measured) -> None:
    seen = []
    module = loaded.model.get_submodule("model.layers.0.mlp.down_proj")
    handle = module.register_forward_hook(
        lambda m, inputs, out: seen.append(inputs[0].flatten(0, 1))
    )
    with torch.no_grad():
        loaded.model(input_ids=tokens.ids, use_cache=False)
    handle.remove()
    peaks = measured.peaks["model.layers.0.mlp.down_proj.weight"]
    assert torch.allclose(peaks, torch.cat(seen).abs().amax(0), rtol=1e-5)
