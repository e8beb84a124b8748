from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unicuco.calibration import TokenSet, collect_input_norms, read_text, token_windows
from unicuco.errors import ModelError, TextError
from unicuco.models import LoadedModel, load_model, read_site, site_module
from unicuco.testing import FAMILIES, tiny_model_folder
from unicuco.testing.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def text_of(num_tokens: int) -> str:
    return "".join(chr(ord("a") + n % 26) for n in range(num_tokens))


def random_tokens(windows: int, context: int) -> TokenSet:
    generator = torch.Generator().manual_seed(3)
    return TokenSet.from_ids(torch.randint(1, 257, (windows, context), generator=generator))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(tiny_model_folder(tmp_path_factory.mktemp("llama"), "llama"))


def test_text_comes_back_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes("grüße\nline two ✓".encode())
    assert read_text(tmp_path / "t.txt") == "grüße\nline two ✓"


@pytest.mark.parametrize("content", [b"", b" \n\t "])
def test_an_empty_text_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(TextError, match="is empty"):
        read_text(tmp_path / "t.txt")


def test_bytes_that_are_no_utf8_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(b"good \xff bad")
    with pytest.raises(TextError, match=r"is not UTF-8 text \(byte 5\)"):
        read_text(tmp_path / "t.txt")


def test_a_missing_text_and_a_folder_are_refused_in_one_line(tmp_path: Path) -> None:
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(TextError, match="can't be read") as error:
            read_text(path)
        assert "\n" not in str(error.value)


def test_windows_reach_from_the_first_token_to_the_last() -> None:
    text = text_of(1000)
    ids = torch.tensor(TOKENIZER.encode(text))
    windows = token_windows(TOKENIZER, text, tokens=256, context=64).ids
    assert windows.shape == (4, 64)
    assert windows.dtype == torch.int64
    assert torch.equal(windows[0], ids[:64])
    assert torch.equal(windows[-1], ids[-64:])


@settings(max_examples=200, deadline=None)
@given(available=st.integers(1, 700), tokens=st.integers(1, 700), context=st.integers(1, 300))
def test_windows_are_full_disjoint_evenly_spaced_and_no_more_than_asked(
    available: int, tokens: int, context: int
) -> None:
    # Every token is its own position, so windows show where they were cut.
    class Counting:
        def encode(self, text: str, **_: object) -> list[int]:
            return list(range(len(text)))

    cut = "x" * available
    if available < tokens:
        with pytest.raises(TextError, match=f"has {available} tokens and {tokens} are needed"):
            token_windows(Counting(), cut, tokens=tokens, context=context)  # type: ignore[arg-type]
        return
    windows = token_windows(Counting(), cut, tokens=tokens, context=context).ids  # type: ignore[arg-type]
    num_windows, width = windows.shape
    assert width <= context
    assert tokens - num_windows < num_windows * width <= tokens
    assert (windows[:, 1:] - windows[:, :-1] == 1).all()
    gaps = windows[1:, 0] - windows[:-1, 0]
    assert (gaps >= width).all()
    assert len(gaps) == 0 or int(gaps.max() - gaps.min()) <= 1
    if tokens % context == 0:
        assert width == context


def test_without_a_number_every_full_window_is_taken() -> None:
    assert token_windows(TOKENIZER, text_of(200), tokens=None, context=64).ids.shape == (3, 64)
    assert token_windows(TOKENIZER, text_of(50), tokens=None, context=64).ids.shape == (1, 50)


def test_an_empty_text_has_too_few_tokens() -> None:
    for tokens in (1, None):
        with pytest.raises(TextError, match="the text has 0 tokens"):
            token_windows(TOKENIZER, "", tokens=tokens, context=64)


@pytest.mark.parametrize(("tokens", "context"), [(0, 4), (4, 0), (-1, 4)])
def test_numbers_below_one_are_a_wrong_use(tokens: int, context: int) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        token_windows(TOKENIZER, "abc", tokens=tokens, context=context)


def test_the_digest_follows_tokens_and_shape() -> None:
    ids = torch.arange(12)
    flat, other = TokenSet.from_ids(ids.view(1, 12)), TokenSet.from_ids(ids.view(3, 4))
    assert flat.digest != other.digest
    assert flat.digest == TokenSet.from_ids(ids.view(1, 12).to(torch.int32)).digest
    assert flat.num_tokens == other.num_tokens == 12
    assert (other.context, len(list(other.batches(8)))) == (4, 2)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_norms_are_those_of_the_inputs_of_every_site(tmp_path: Path, family: str) -> None:
    loaded = load_model(tiny_model_folder(tmp_path / "m", family))
    tokens = random_tokens(3, 17)
    norms = collect_input_norms(loaded.model, loaded.profile, tokens)
    assert list(norms) == [site.path for site in loaded.profile.sites]
    for site in loaded.profile.sites:
        seen: list[Tensor] = []
        module = site_module(loaded.model, site)
        handle = module.register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(args[0]))
        for window in tokens.ids:
            loaded.model(input_ids=window[None])
        handle.remove()
        inputs = torch.cat([part.flatten(0, -2) for part in seen]).double()
        assert norms[site.path].dtype == torch.float32
        assert norms[site.path].shape == (site.num_columns,)
        torch.testing.assert_close(norms[site.path].double(), inputs.norm(dim=0), rtol=1e-5, atol=0)


def test_the_whole_text_counts_however_it_is_batched(llama: LoadedModel) -> None:
    tokens = random_tokens(70, 64)  # more than two batches
    parts = [
        collect_input_norms(llama.model, llama.profile, TokenSet.from_ids(part))
        for part in tokens.ids.split(7)
    ]
    for path, norm in collect_input_norms(llama.model, llama.profile, tokens).items():
        total = sum(part[path].double().square() for part in parts)
        assert isinstance(total, Tensor)
        torch.testing.assert_close(norm.double().square(), total, rtol=1e-5, atol=0)


def test_collecting_changes_neither_weights_nor_hooks(llama: LoadedModel) -> None:
    before = [parameter.clone() for parameter in llama.model.parameters()]
    collect_input_norms(llama.model, llama.profile, random_tokens(1, 8))
    after = list(llama.model.parameters())
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert not any(module._forward_pre_hooks for module in llama.model.modules())


def test_inputs_that_are_no_numbers_are_refused_and_named(tmp_path: Path) -> None:
    loaded = load_model(tiny_model_folder(tmp_path / "m", "llama"))
    up = next(site for site in loaded.profile.sites if site.path.endswith("up_proj"))
    read_site(loaded.model, up)[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"inputs of model\.layers\.0\.mlp\.down_proj are NaN"):
        collect_input_norms(loaded.model, loaded.profile, random_tokens(1, 8))


def test_a_tokenizer_of_another_model_is_refused(llama: LoadedModel) -> None:
    tokens = TokenSet.from_ids(torch.tensor([[1, 2, 260]]))
    with pytest.raises(ModelError, match="token 260, but the model knows 260"):
        collect_input_norms(llama.model, llama.profile, tokens)


def test_a_site_that_never_runs_is_refused(tmp_path: Path) -> None:
    loaded = load_model(tiny_model_folder(tmp_path / "m", "llama"))
    idle = torch.nn.Linear(16, 16)
    loaded.model.get_submodule("model.layers.0").register_module("idle", idle)
    site = loaded.profile.sites[0]
    profile = load_model(loaded.folder).profile
    changed = type(site)(block=0, path="model.layers.0.idle", num_rows=16, num_columns=16)
    with pytest.raises(ModelError, match=r"model\.layers\.0\.idle received no input"):
        collect_input_norms(loaded.model, replace(profile, sites=(changed,)), random_tokens(1, 8))
