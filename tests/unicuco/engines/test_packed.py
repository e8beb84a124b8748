from __future__ import annotations

from pathlib import Path

import pytest
import torch

from unicuco.engines import Sampling
from unicuco.engines.packed import PackedModel
from unicuco.errors import ContainerError, EngineError, RequestError
from unicuco.models import load_model, load_tokenizer
from unicuco.pipeline import Int8Options, PackOptions, pack, unpack
from unicuco.testing.tiny import tiny_model_folder

PROMPT = "def add_1("


@pytest.fixture(scope="module")
def int8(trained_folder: Path, tiny_text_file: Path, tmp_path_factory) -> tuple[Path, Path]:
    """A container of 8-bit weights, and what it unpacks to."""
    folder = tmp_path_factory.mktemp("packed")
    options = Int8Options(max_kl=0.05, calibration=tiny_text_file, tokens=512)
    pack(PackOptions(model=str(trained_folder), out=folder / "file", int8=options))
    unpack(folder / "file", folder / "unpacked")
    return folder / "file", folder / "unpacked"


def logits(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens]), use_cache=False).logits


@pytest.mark.parametrize("memory_mb", [None, 100.0])
def test_it_says_what_the_unpacked_model_says(
    int8: tuple[Path, Path], memory_mb: float | None
) -> None:
    file, unpacked = int8
    packed = PackedModel(file, max_memory_mb=memory_mb)
    loaded = load_model(unpacked)
    tokens = load_tokenizer(unpacked).encode(PROMPT, add_special_tokens=False)
    assert torch.allclose(logits(packed.model, tokens), logits(loaded.model, tokens), atol=1e-4)
    answer = packed.generate(PROMPT, Sampling(max_tokens=12))
    whole = loaded.model.generate(
        torch.tensor([tokens]), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    expected = [t for t in whole[0, len(tokens) :].tolist() if t != 0]
    assert list(answer.token_ids) == expected


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen2"])
@pytest.mark.parametrize("link_mbps", [None, 1e9])
def test_lossless_containers_of_every_family_give_the_same_logits(
    family: str, link_mbps: float | None, tmp_path: Path
) -> None:
    folder = tiny_model_folder(tmp_path / "model", family, hidden_size=64, dtype=torch.bfloat16)
    pack(PackOptions(model=str(folder), out=tmp_path / "file", link_mbps=link_mbps))
    packed = PackedModel(tmp_path / "file")
    tokens = list(range(20, 40))
    reference = logits(load_model(folder).model, tokens)
    assert torch.allclose(logits(packed.model, tokens), reference, atol=1e-4, rtol=1e-4)
    assert packed.memory.matrices > 4


def test_a_family_whose_files_name_tensors_otherwise_is_refused(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / "model", "llava", hidden_size=64)
    pack(PackOptions(model=str(folder), out=tmp_path / "file"))
    with pytest.raises(EngineError, match="unpack it and load the folder instead"):
        PackedModel(tmp_path / "file")


def test_the_limit_decides_how_much_stays_decoded(int8: tuple[Path, Path]) -> None:
    least = PackedModel(int8[0]).memory
    most = PackedModel(int8[0], max_memory_mb=100).memory
    middle_mb = (least.peak_bytes + most.peak_bytes) / 2 / 2**20
    middle = PackedModel(int8[0], max_memory_mb=middle_mb).memory
    assert least.decoded == 0
    assert 0 < middle.decoded < most.decoded == most.matrices
    assert least.peak_bytes < middle.peak_bytes <= middle_mb * 2**20 < most.peak_bytes
    with pytest.raises(EngineError, match=r"allow .* MiB or pack the model smaller"):
        PackedModel(int8[0], max_memory_mb=0.5 * least.peak_bytes / 2**20)


def test_a_damaged_container_is_refused_before_anything_is_built(
    int8: tuple[Path, Path], tmp_path: Path
) -> None:
    data = bytearray(int8[0].read_bytes())
    data[-10] ^= 1
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(ContainerError, match="was altered"):
        PackedModel(tmp_path / "file")


def test_drawn_text_is_the_seed_s_and_leaves_other_draws_alone(int8: tuple[Path, Path]) -> None:
    packed = PackedModel(int8[0])
    state = torch.random.get_rng_state()
    one, two, other = (
        packed.generate(PROMPT, Sampling(max_tokens=16, temperature=5.0, seed=seed))
        for seed in (1, 1, 2)
    )
    assert one == two != other
    assert torch.equal(torch.random.get_rng_state(), state)


def test_prompts_without_room_are_refused(int8: tuple[Path, Path]) -> None:
    packed = PackedModel(int8[0])
    with pytest.raises(RequestError, match="is empty"):
        packed.generate("", Sampling())
    with pytest.raises(RequestError, match="share a context"):
        packed.generate("x" * 5000, Sampling())
