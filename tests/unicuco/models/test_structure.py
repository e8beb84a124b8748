from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertLMHeadModel,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from unicuco.errors import ModelError
from unicuco.models import (
    LoadedModel,
    block_module,
    load_model,
    profile_model,
    read_site,
    site_module,
)
from unicuco.testing import FAMILIES, tiny_model_folder

HIDDEN = 16
_ATTENTION = {"q_proj": (16, 16), "k_proj": (8, 16), "v_proj": (8, 16), "o_proj": (16, 16)}
_LLAMA_SITES = {
    **{f"self_attn.{name}": shape for name, shape in _ATTENTION.items()},
    "mlp.gate_proj": (32, 16),
    "mlp.up_proj": (32, 16),
    "mlp.down_proj": (16, 32),
}
# Output rows by input columns of every matrix in a block, as the published architectures have them.
EXPECTED_SITES: dict[str, tuple[str, dict[str, tuple[int, int]]]] = {
    "gpt2": (
        "transformer.h",
        {
            "attn.c_attn": (48, 16),
            "attn.c_proj": (16, 16),
            "mlp.c_fc": (64, 16),
            "mlp.c_proj": (16, 64),
        },
    ),
    "gpt_neo": (
        "transformer.h",
        {
            **{f"attn.attention.{n}": (16, 16) for n in ("q_proj", "k_proj", "v_proj", "out_proj")},
            "mlp.c_fc": (64, 16),
            "mlp.c_proj": (16, 64),
        },
    ),
    "gpt_neox": (
        "gpt_neox.layers",
        {
            "attention.query_key_value": (48, 16),
            "attention.dense": (16, 16),
            "mlp.dense_h_to_4h": (32, 16),
            "mlp.dense_4h_to_h": (16, 32),
        },
    ),
    "llama": ("model.layers", _LLAMA_SITES),
    "llava": ("model.language_model.layers", _LLAMA_SITES),
    "mistral": ("model.layers", _LLAMA_SITES),
    "opt": (
        "model.decoder.layers",
        {
            **{f"self_attn.{n}": (16, 16) for n in ("q_proj", "k_proj", "v_proj", "out_proj")},
            "fc1": (32, 16),
            "fc2": (16, 32),
        },
    ),
    "qwen2": ("model.layers", _LLAMA_SITES),
}


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def loaded(family: str, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(tiny_model_folder(tmp_path_factory.mktemp(family), family))


def llama(tmp_path: Path, *, tied: bool = False) -> PreTrainedModel:
    return load_model(tiny_model_folder(tmp_path / "llama", "llama", tied=tied)).model


def test_every_family_of_the_project_is_expected_here() -> None:
    assert set(EXPECTED_SITES) == set(FAMILIES)


def test_sites_are_the_matrices_inside_the_blocks_of_the_language_tower(
    family: str, loaded: LoadedModel
) -> None:
    blocks, sites = EXPECTED_SITES[family]
    found = {site.path: (site.num_rows, site.num_columns) for site in loaded.profile.sites}
    expected = {f"{blocks}.{b}.{path}": shape for b in (0, 1) for path, shape in sites.items()}
    assert found == expected
    assert loaded.profile.block_paths == (f"{blocks}.0", f"{blocks}.1")
    assert [s.block for s in loaded.profile.sites] == [0] * len(sites) + [1] * len(sites)


def test_only_gpt2_stores_its_matrices_the_other_way_round(
    family: str, loaded: LoadedModel
) -> None:
    assert {site.transposed for site in loaded.profile.sites} == {family == "gpt2"}


def test_a_read_site_is_a_view_that_maps_inputs_to_outputs(loaded: LoadedModel) -> None:
    site = loaded.profile.sites[0]
    module = site_module(loaded.model, site)
    weight = read_site(loaded.model, site)
    assert weight.shape == (site.num_rows, site.num_columns)
    assert weight.data_ptr() == module.weight.data_ptr()
    inputs = torch.randn(3, site.num_columns)
    bias = 0 if module.bias is None else module.bias
    torch.testing.assert_close(module(inputs), inputs @ weight.T + bias)


def test_block_counts_hold_sites_biases_and_norms_and_the_total_everything_once(
    loaded: LoadedModel,
) -> None:
    profile = loaded.profile
    for block in range(profile.num_blocks):
        module = block_module(loaded.model, profile, block)
        assert profile.block_params[block] == sum(p.numel() for p in module.parameters())
        assert profile.block_bytes[block] == 4 * profile.block_params[block]
    assert profile.total_params == sum(p.numel() for p in loaded.model.parameters())
    assert profile.total_bytes == 4 * profile.total_params
    assert profile.num_site_weights <= sum(profile.block_params) < profile.total_params


def test_the_profile_knows_vocabulary_and_context(loaded: LoadedModel) -> None:
    assert loaded.profile.vocabulary_size == 260
    assert loaded.profile.max_context == 64
    assert len(loaded.profile.digest) == 64


def test_tied_embeddings_are_counted_once_and_are_no_sites(family: str, tmp_path: Path) -> None:
    tied = load_model(tiny_model_folder(tmp_path / "tied", family, tied=True)).profile
    free = load_model(tiny_model_folder(tmp_path / "free", family, tied=False)).profile
    assert free.total_params - tied.total_params == 260 * HIDDEN
    assert tied.sites == free.sites


def test_bytes_are_counted_as_the_model_stores_them(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / "m", "llama", dtype=torch.bfloat16)
    profile = load_model(folder, dtype=torch.bfloat16).profile
    assert profile.total_bytes == 2 * profile.total_params
    assert profile.block_bytes == tuple(2 * n for n in profile.block_params)


def test_a_matrix_shared_by_two_blocks_is_one_site_and_counted_once(tmp_path: Path) -> None:
    model = llama(tmp_path)
    assert isinstance(model, LlamaForCausalLM)
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    profile = profile_model(model, digest="0")
    paths = [site.path for site in profile.sites]
    assert "model.layers.0.mlp.up_proj" in paths
    assert "model.layers.1.mlp.up_proj" not in paths
    assert profile.block_params[0] - profile.block_params[1] == 32 * HIDDEN


def test_a_block_that_is_another_block_again_is_refused(tmp_path: Path) -> None:
    model = llama(tmp_path)
    assert isinstance(model, LlamaForCausalLM)
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(ModelError, match="block 1 has no matrix of its own; looked for a causal"):
        profile_model(model, digest="0")


def test_an_encoder_is_refused_by_what_it_does() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=99,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    model = BertLMHeadModel(config).eval()
    with pytest.raises(ModelError, match=r"BertLMHeadModel is not causal.*looked for a causal"):
        profile_model(model, digest="0")


def test_experts_fused_into_one_tensor_are_refused() -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=99,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=64,
        num_local_experts=4,
    )
    with pytest.raises(ModelError, match=r"only .* of the .* parameters of block 0"):
        profile_model(MixtralForCausalLM(config).eval(), digest="0")


def test_matrices_that_wait_for_an_encoder_are_refused() -> None:
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=99,
        d_model=16,
        decoder_layers=2,
        decoder_attention_heads=2,
        decoder_ffn_dim=32,
        max_position_embeddings=32,
    )
    with pytest.raises(ModelError, match=r"8 matrices .*encoder_attn.* do not run"):
        profile_model(BartForCausalLM(config).eval(), digest="0")


def test_a_model_without_a_list_of_blocks_is_refused(tmp_path: Path) -> None:
    model = llama(tmp_path)
    assert isinstance(model, LlamaForCausalLM)
    model.model.layers = nn.ModuleList()
    with pytest.raises(ModelError, match=r"no such list of blocks; looked for a causal decoder"):
        profile_model(model, digest="0")


def test_a_model_with_two_lists_of_blocks_is_refused(tmp_path: Path) -> None:
    model = llama(tmp_path)
    assert isinstance(model, LlamaForCausalLM)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.more = nn.ModuleList([nn.Linear(HIDDEN, HIDDEN)])

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden + self.more[0](hidden)

    model.model.norm = Twice()
    with pytest.raises(ModelError, match=r"2 such lists \(model.layers, model.norm.more\)"):
        profile_model(model, digest="0")


def test_a_model_that_predicts_nan_is_refused(tmp_path: Path) -> None:
    model = llama(tmp_path)
    assert isinstance(model, LlamaForCausalLM)
    model.model.norm.weight.fill_(float("inf"))
    with pytest.raises(ModelError, match="predicts NaN or infinity"):
        profile_model(model, digest="0")


def test_a_model_that_tokens_alone_do_not_run_is_refused(tmp_path: Path) -> None:
    model = llama(tmp_path)
    assert isinstance(model, LlamaForCausalLM)
    del model.model.layers[0].mlp.up_proj
    with pytest.raises(ModelError, match=r"can't run on tokens alone \(AttributeError"):
        profile_model(model, digest="0")


def test_profiling_leaves_no_hooks_behind(loaded: LoadedModel) -> None:
    assert not any(module._forward_pre_hooks for module in loaded.model.modules())
