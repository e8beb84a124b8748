from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    DistilBertConfig,
    DistilBertModel,
    GPT2Model,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from unicuco.errors import ModelError
from unicuco.models import build_skeleton, load_model, load_tokenizer
from unicuco.testing import FAMILIES, tiny_model_folder

IDS = torch.tensor([[5, 17, 200, 31, 99, 4]])


def change_weights(folder: Path, name: str, value: float) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[name].flatten()[3] = value
    save_file(tensors, path, metadata={"format": "pt"})


def save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        answer: Tensor = model(input_ids=IDS).logits
    return answer


def test_a_loaded_model_asks_for_no_gradients_and_drops_nothing_out(tmp_path: Path) -> None:
    loaded = load_model(tiny_model_folder(tmp_path / "m", "gpt2"))
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert torch.equal(logits(loaded.model), logits(loaded.model))


def test_the_name_may_be_text_or_a_path(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / "m", "llama")
    assert load_model(str(folder)).profile == load_model(folder).profile
    assert load_model(folder).folder == folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_come_in_the_dtype_asked_for(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = tiny_model_folder(tmp_path / "m", "llama", dtype=torch.bfloat16)
    model = load_model(folder, dtype=dtype).model
    assert {p.dtype for p in model.parameters()} == {dtype}
    stored = load_file(folder / "model.safetensors")["lm_head.weight"]
    assert torch.equal(model.get_parameter("lm_head.weight"), stored.to(dtype))


def test_shards_load_like_one_file(tmp_path: Path) -> None:
    whole = load_model(tiny_model_folder(tmp_path / "whole", "llama"))
    shards = load_model(tiny_model_folder(tmp_path / "shards", "llama", max_shard_size=20_000))
    assert torch.equal(logits(whole.model), logits(shards.model))
    assert whole.profile.sites == shards.profile.sites


def test_a_headless_gpt2_loads_since_its_head_is_its_embedding(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / "m", "gpt2", tied=True)
    whole = load_model(folder)
    headless = GPT2Model.from_pretrained(folder)
    assert isinstance(headless, GPT2Model)
    again = load_model(save(headless, tmp_path / "headless"))
    assert torch.equal(logits(whole.model), logits(again.model))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_no_number_is_named(tmp_path: Path, value: float) -> None:
    folder = tiny_model_folder(tmp_path / "m", "llama")
    name = "model.layers.1.mlp.up_proj.weight"
    change_weights(folder, name, value)
    with pytest.raises(ModelError, match=f"{name} holds NaN or infinite") as error:
        load_model(folder)
    assert "\n" not in str(error.value)


def test_an_encoder_saved_for_masked_words_is_refused(tmp_path: Path) -> None:
    folder = save(BertForMaskedLM(tiny_bert()), tmp_path / "bert")
    with pytest.raises(ModelError, match="causal") as error:
        load_model(folder)
    assert "\n" not in str(error.value)


def test_an_encoder_saved_with_a_causal_head_is_refused_by_what_it_does(tmp_path: Path) -> None:
    folder = save(BertLMHeadModel(tiny_bert()), tmp_path / "bert")
    with pytest.raises(ModelError, match="is not causal: changing the last token"):
        load_model(folder)


def test_an_encoder_without_a_causal_class_is_refused(tmp_path: Path) -> None:
    config = DistilBertConfig(vocab_size=99, dim=16, n_layers=1, n_heads=2, hidden_dim=32)
    folder = save(DistilBertModel(config), tmp_path / "distilbert")
    with pytest.raises(ModelError, match="is no causal language model"):
        load_model(folder)


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    config = T5Config(vocab_size=99, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    folder = save(T5ForConditionalGeneration(config), tmp_path / "t5")
    with pytest.raises(ModelError, match="is an encoder-decoder"):
        load_model(folder)


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / "m", "llama")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights .* model\.layers\.0\.mlp\.up_proj"):
        load_model(folder)


def test_weights_that_do_not_fit_the_configuration_are_refused(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / "m", "llama")
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**document, "intermediate_size": 48}))
    with pytest.raises(ModelError, match=r"can't be loaded|does not fit config\.json") as error:
        load_model(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("model_type", ["no-such-family", None])
def test_an_unknown_family_is_refused(tmp_path: Path, model_type: str | None) -> None:
    folder = tiny_model_folder(tmp_path / "m", "llama")
    document = json.loads((folder / "config.json").read_text())
    document["model_type"] = model_type
    (folder / "config.json").write_text(json.dumps(document))
    with pytest.raises(ModelError, match=r"can't use its config\.json") as error:
        load_model(folder)
    assert "\n" not in str(error.value)


def test_a_quantised_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / "m", "llama")
    document = json.loads((folder / "config.json").read_text())
    document["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(document))
    with pytest.raises(ModelError, match="already quantised"):
        load_model(folder)


def test_loading_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tiny_model_folder(tmp_path / "m", "llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(folder)
        load_tokenizer(folder)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_skeleton_given_the_parameters_predicts_the_same(
    tmp_path: Path, family: str, tied: bool
) -> None:
    loaded = load_model(tiny_model_folder(tmp_path / "m", family, tied=tied))
    skeleton = build_skeleton(json.loads((loaded.folder / "config.json").read_text()))
    own = dict(skeleton.named_parameters())
    given = dict(loaded.model.named_parameters())
    assert own.keys() == given.keys()
    for name, parameter in given.items():
        own[name].copy_(parameter)
    assert torch.equal(logits(skeleton), logits(loaded.model))
    assert not skeleton.training


def test_a_skeleton_of_a_shrunk_configuration_has_its_shapes(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / "m", "llama")
    document = json.loads((folder / "config.json").read_text())
    model = build_skeleton({**document, "num_hidden_layers": 1}, dtype=torch.bfloat16)
    expected = AutoModelForCausalLM.from_pretrained(folder).config.vocab_size
    assert model.get_input_embeddings().weight.shape == (expected, 16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert sum("up_proj" in name for name, _ in model.named_parameters()) == 1


@pytest.mark.parametrize("config", [{}, {"model_type": "no-such"}, {"model_type": "distilbert"}])
def test_a_skeleton_of_no_causal_model_is_refused(config: dict[str, str]) -> None:
    with pytest.raises(ModelError):
        build_skeleton(config)


def test_the_tokenizer_beside_a_model_reads_and_writes_bytes(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_model_folder(tmp_path / "m", "llama"))
    text = "naïve\n\tcode == 1 ✓"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_code_beside_a_tokenizer_never_runs_and_nobody_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model_folder(tmp_path / "m", "llama")
    trace = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass Evil: pass\n")
    config = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    asked: list[object] = []
    monkeypatch.setattr("builtins.input", lambda *words: asked.append(words) or "y")
    with contextlib.suppress(ModelError):  # the files may be read without that class, or refused
        load_tokenizer(folder)
    assert not asked
    assert not trace.exists()


def test_a_missing_tokenizer_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / "m", "llama")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError, match="holds no tokenizer that can be read") as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value)


def test_a_damaged_tokenizer_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / "m", "llama")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="holds no tokenizer that can be read") as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value)


def tiny_bert() -> BertConfig:
    torch.manual_seed(0)
    return BertConfig(
        vocab_size=99,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )


@pytest.mark.slow
def test_models_load_without_what_only_assisted_generation_wants() -> None:
    code = (
        "import sys; from unicuco.models import load_model; import transformers.utils as utils;"
        "print('sklearn' in sys.modules, 'pandas' in sys.modules, utils.is_sklearn_available())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert out.stdout.split() == ["False", "False", "True"]
