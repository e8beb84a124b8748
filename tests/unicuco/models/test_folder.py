from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from unicuco.errors import ModelError
from unicuco.models import check_model_folder, folder, model_digest, resolve_model, weight_files
from unicuco.testing import tiny_model_folder

INDEX = "model.safetensors.index.json"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_model_folder(tmp_path / "model", "llama")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return tiny_model_folder(tmp_path / "sharded", "llama", max_shard_size=20_000)


def one_line(error: pytest.ExceptionInfo[ModelError]) -> bool:
    return "\n" not in str(error.value)


def test_a_folder_is_its_own_answer(model: Path) -> None:
    assert resolve_model(str(model)) == model


def test_the_shards_of_an_index_are_found_in_order(sharded: Path) -> None:
    files = weight_files(sharded)
    assert len(files) > 2
    assert files == tuple(sorted(sharded.glob("*.safetensors")))
    check_model_folder(sharded)


def test_the_digest_follows_contents_and_names_and_nothing_else(
    model: Path, tmp_path: Path
) -> None:
    first = model_digest(model)
    (model / "README.md").write_text("hello")
    os.utime(model / "model.safetensors", (0, 0))
    assert model_digest(model) == first
    other = tiny_model_folder(tmp_path / "other", "llama", seed=1)
    assert model_digest(other) != first
    assert model_digest(tiny_model_folder(tmp_path / "same", "llama")) == first


def test_the_digest_of_shards_covers_each(sharded: Path) -> None:
    before = model_digest(sharded)
    last = weight_files(sharded)[-1]
    tensors = {name: tensor + 1 for name, tensor in load_file(last).items()}
    save_file(tensors, last, metadata={"format": "pt"})
    assert model_digest(sharded) != before


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model folder at") as error:
        resolve_model(str(tmp_path / "nothing"))
    assert one_line(error)


def test_a_file_is_refused(model: Path) -> None:
    with pytest.raises(ModelError, match="is a file, not a model folder"):
        resolve_model(str(model / "config.json"))


def test_a_folder_without_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"not a model folder: it holds no config\.json"):
        resolve_model(str(tmp_path))


def test_a_name_that_the_hub_does_not_give_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_args: object, **_kwargs: object) -> str:
        raise OSError("no network\nand more lines")

    monkeypatch.setattr(folder, "snapshot_download", refuse)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ModelError, match=r"neither a folder here nor a model that .* no network"
    ) as e:
        resolve_model("someone/some-model")
    assert one_line(e)


def test_only_safe_files_are_fetched_from_the_hub(
    monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path
) -> None:
    asked: list[str] = []

    def give(_name: str, *, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(model)

    monkeypatch.setattr(folder, "snapshot_download", give)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("someone/some-model") == model
    assert "*.safetensors" in asked
    assert not any(pattern.endswith((".bin", ".py", ".pt")) for pattern in asked)


def test_a_missing_reference_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(folder, "files", lambda _package: tmp_path)
    with pytest.raises(ModelError, match=r"embedded reference model is missing .* reinstall"):
        resolve_model("reference")


def test_the_reference_is_the_package_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    inside = tiny_model_folder(tmp_path / "reference" / "model", "llama")
    monkeypatch.setattr(folder, "files", lambda _package: tmp_path)
    assert resolve_model("reference") == inside


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused_unread(model: Path, name: str) -> None:
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(b"not even a pickle")
    with pytest.raises(ModelError, match=r"pickles only .* convert them to safetensors") as error:
        resolve_model(str(model))
    assert name in str(error.value)


def test_pickles_beside_safetensors_are_ignored(model: Path) -> None:
    (model / "pytorch_model.bin").write_bytes(b"not even a pickle")
    assert resolve_model(str(model)) == model


def test_an_adapter_is_refused(model: Path) -> None:
    (model / "model.safetensors").rename(model / "adapter_model.safetensors")
    (model / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="is an adapter, not a model"):
        resolve_model(str(model))


def test_a_folder_without_weights_says_what_was_looked_for(model: Path) -> None:
    (model / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"looked for model\.safetensors or model\.safetensors\.i"):
        resolve_model(str(model))


@pytest.mark.parametrize("kept", [0, 4, 100, 5000])
def test_weights_that_are_cut_off_are_refused(model: Path, kept: int) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"model\.safetensors is cut off or damaged") as error:
        resolve_model(str(model))
    assert one_line(error)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    gone = weight_files(sharded)[1]
    gone.unlink()
    with pytest.raises(ModelError, match=f"lacks the shard {gone.name}"):
        resolve_model(str(sharded))


def test_a_shard_without_a_promised_tensor_is_named(sharded: Path) -> None:
    shard = weight_files(sharded)[0]
    tensors = load_file(shard)
    name, _ = tensors.popitem()
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"lacks the tensor {name}"):
        resolve_model(str(sharded))


@pytest.mark.parametrize("place", ["../elsewhere.safetensors", "/etc/passwd", 7])
def test_an_index_never_leads_out_of_the_folder(sharded: Path, place: object) -> None:
    document = json.loads((sharded / INDEX).read_text())
    document["weight_map"][next(iter(document["weight_map"]))] = place
    (sharded / INDEX).write_text(json.dumps(document))
    with pytest.raises(ModelError, match="no file of this folder"):
        resolve_model(str(sharded))


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "\x00"])
def test_a_damaged_configuration_is_refused(model: Path, text: str) -> None:
    (model / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json") as error:
        resolve_model(str(model))
    assert one_line(error)


@pytest.mark.parametrize("document", [{}, {"weight_map": {}}, {"weight_map": []}])
def test_an_empty_index_is_refused(sharded: Path, document: dict[str, object]) -> None:
    (sharded / INDEX).write_text(json.dumps(document))
    with pytest.raises(ModelError, match="has no weight_map"):
        resolve_model(str(sharded))


def test_nothing_but_headers_is_read_to_check(model: Path) -> None:
    # A tensor full of NaN passes here; loading finds it.
    path = model / "model.safetensors"
    tensors = {name: torch.full_like(t, float("nan")) for name, t in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    check_model_folder(model)
