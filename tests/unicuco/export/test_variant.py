from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from unicuco.dimensions import build_space
from unicuco.errors import ModelError, VariantError
from unicuco.export import read_variant
from unicuco.export.names import match_sites
from unicuco.models import load_model, read_site
from unicuco.ranks import keep_mask
from unicuco.rows import RowRule
from unicuco.testing.tiny import FAMILIES, tiny_model_folder
from unicuco.testing.variants import VariantCase, make_plan, make_variant_case
from unicuco.types import ModelProfile, ServedAs, Site


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    return {n: t for f in folder.glob("*.safetensors") for n, t in load_file(f).items()}


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Bit for bit, so that -0.0 differs from 0.0."""
    return left.dtype == right.dtype and torch.equal(
        left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8)
    )


def check_tensors(case: VariantCase, out: Path) -> None:
    """Every loaded site has zeros exactly where the store says; nothing else differs by a bit."""
    dtype = next(iter(stored_tensors(case.folder).values())).dtype
    dense, cut = load_model(case.folder, dtype=dtype).model, load_model(out, dtype=dtype).model
    weights = {f"{site.path}.weight" for site in case.profile.sites}
    for (name, before), (_, after) in zip(
        dense.named_parameters(), cut.named_parameters(), strict=True
    ):
        assert name in weights or same_bits(before, after), name
    for site in case.profile.sites:
        before, after = read_site(dense, site), read_site(cut, site)
        keep = keep_mask(case.ranks.ranks[site.path], case.drops[site.path])
        assert int((~keep).sum()) == case.drops[site.path]
        assert same_bits(after, torch.where(keep, before, torch.zeros_like(before)))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_cut_exactly_and_loads(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("unicuco.export.variant._write_through_model")  # names must suffice
    case = make_variant_case(tiny_model_folder(tmp_path / "base", family))
    case.write(tmp_path / "out")
    check_tensors(case, tmp_path / "out")
    auto = AutoModelForImageTextToText if family == "llava" else AutoModelForCausalLM
    auto.from_pretrained(tmp_path / "out", local_files_only=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_tied_models_keep_their_type_and_files(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = tiny_model_folder(tmp_path / "base", family, tied=True, dtype=dtype)
    case = make_variant_case(folder, dtype=dtype)
    case.write(tmp_path / "out")
    check_tensors(case, tmp_path / "out")
    before, after = stored_tensors(folder), stored_tensors(tmp_path / "out")
    assert {n: (t.dtype, t.shape) for n, t in before.items()} == {
        n: (t.dtype, t.shape) for n, t in after.items()
    }


def test_the_header_and_its_metadata_stay_as_they_were(llama: VariantCase, tmp_path: Path) -> None:
    llama.write(tmp_path / "out")
    before, after = (f / "model.safetensors" for f in (llama.folder, tmp_path / "out"))
    assert before.stat().st_size == after.stat().st_size
    with safe_open(before, "pt") as left, safe_open(after, "pt") as right:
        assert left.metadata() == right.metadata()
        assert list(left.keys()) == list(right.keys())


def test_a_sharded_base_gives_the_same_shards_and_index(tmp_path: Path) -> None:
    case = make_variant_case(tiny_model_folder(tmp_path / "base", max_shard_size=8000))
    assert len(list(case.folder.glob("*.safetensors"))) > 2
    case.write(tmp_path / "out")
    check_tensors(case, tmp_path / "out")
    index = "model.safetensors.index.json"
    assert (tmp_path / "out" / index).read_bytes() == (case.folder / index).read_bytes()
    read_variant(tmp_path / "out")


def test_weights_that_are_zero_in_the_dense_model_stay_and_are_not_counted(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name][::2, ::3] = 0.0
    tensors[name][1::2, ::3] = -0.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    case = make_variant_case(folder)
    case.write(tmp_path / "out")
    check_tensors(case, tmp_path / "out")
    after = stored_tensors(tmp_path / "out")[name]
    already = tensors[name] == 0
    keep = keep_mask(case.ranks.ranks[name.removesuffix(".weight")], case.drops[name[:-7]])
    assert int((after == 0).sum()) == case.drops[name[:-7]] + int((already & keep).sum())


def rename_tensors(folder: Path, rename: Callable[[str], str]) -> None:
    tensors = load_file(folder / "model.safetensors")
    renamed = {rename(name): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


def test_names_without_the_modules_prefix_are_matched(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / "base", "gpt2", tied=True)
    rename_tensors(folder, lambda name: name.removeprefix("transformer."))
    assert "h.0.attn.c_attn.weight" in stored_tensors(folder)
    case = make_variant_case(folder)
    case.write(tmp_path / "out")
    assert stored_tensors(tmp_path / "out").keys() == stored_tensors(folder).keys()
    check_tensors(case, tmp_path / "out")


def test_the_language_tower_is_told_from_the_vision_tower_by_its_name() -> None:
    site = Site(block=0, path="model.language_model.layers.0.mlp.fc1", num_rows=4, num_columns=2)
    profile = ModelProfile(
        digest="", architecture="", sites=(site,), block_paths=("model.language_model.layers.0",),
        block_params=(8,), block_bytes=(8,), total_params=8, total_bytes=8, vocabulary_size=2,
        max_context=8,
    )  # fmt: skip
    text = "language_model.model.layers.0.mlp.fc1.weight"
    vision = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"
    assert match_sites(profile, {vision: (4, 2), text: (4, 2)}) == {site.path: text}
    assert match_sites(profile, {vision: (4, 2), text: (2, 4)}) == {site.path: vision}
    assert (
        match_sites(
            profile, {"a.layers.0.mlp.fc1.weight": (4, 2), "b.layers.0.mlp.fc1.weight": (4, 2)}
        )
        is None
    )
    assert match_sites(profile, {"layers.0.mlp.fc1.bias": (4, 2)}) is None


def test_a_base_whose_names_fit_nothing_is_cut_through_the_model(
    llama: VariantCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unicuco.export.variant.match_sites", lambda profile, shapes: None)
    llama.write(tmp_path / "out")
    check_tensors(llama, tmp_path / "out")
    read_variant(tmp_path / "out")


def test_code_pickles_and_strangers_are_not_copied(llama: VariantCase, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(llama.folder, base)
    for name in ("modeling.py", "pytorch_model.bin", "extra.safetensors", "notes.md"):
        (base / name).write_bytes(b"x")
    (base / "LICENSE").write_text("free")
    config = json.loads((base / "config.json").read_text()) | {"sparsity_config": {"targets": []}}
    (base / "config.json").write_text(json.dumps(config))
    llama.write(tmp_path / "out", base=base)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not names & {"modeling.py", "pytorch_model.bin", "extra.safetensors", "notes.md"}
    assert "LICENSE" in names
    assert "sparsity_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_a_plan_that_is_no_mask_or_contradicts_itself_is_refused(
    llama: VariantCase, tmp_path: Path
) -> None:
    for plan, reason in (
        (replace(llama.plan, served_as=ServedAs.SHRINK), "ask for mask"),
        (replace(llama.plan, kept_params=llama.plan.kept_params + 1), "plan again"),
    ):
        with pytest.raises(VariantError, match=reason):
            llama.write(tmp_path / "out", plan=plan)
    assert not list(tmp_path.iterdir())


def test_removed_blocks_are_refused(llama: VariantCase, tmp_path: Path) -> None:
    space = build_space(llama.profile, ("sparsity", "depth"))
    strategy = space.decode(torch.ones(1, space.num_axes))[0]
    plan = make_plan(llama.profile, space, strategy)
    with pytest.raises(VariantError, match="block"):
        replace(llama, space=space, plan=plan).write(tmp_path / "out")


def test_a_base_that_is_cut_short_is_named_and_leaves_nothing(
    llama: VariantCase, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(llama.folder, base)
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors") as caught:
        llama.write(tmp_path / "out", base=base)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_cutting_the_same_plan_again_gives_the_same_bytes(
    llama: VariantCase, tmp_path: Path
) -> None:
    first, second = llama.write(tmp_path / "a"), llama.write(tmp_path / "b")
    assert first.sha256 == second.sha256
    assert (tmp_path / "a" / "strategy.json").read_bytes() == (
        tmp_path / "b" / "strategy.json"
    ).read_bytes()


def test_a_row_rule_is_cut_and_kept_beside_the_weights(tmp_path: Path) -> None:
    case = make_variant_case(tiny_model_folder(tmp_path / "base", "llama"))
    site = case.profile.sites[1]
    counts = torch.zeros(site.num_rows, dtype=torch.int64)
    left = case.drops[site.path]
    for row in range(site.num_rows):  # the first rows lose all
        counts[row] = min(left, site.num_columns)
        left -= int(counts[row])
    rule = RowRule.from_counts({site.path: counts})
    case.write(tmp_path / "out", rows=rule)
    case.write(tmp_path / "plain")
    cut, plain = (load_model(tmp_path / name).model for name in ("out", "plain"))
    assert torch.equal((read_site(cut, site) == 0).sum(1), counts)
    for other in case.profile.sites:
        if other is not site:
            assert same_bits(read_site(cut, other), read_site(plain, other))
    document = read_variant(tmp_path / "out")
    assert "rows.json" in dict(document.files)
    stored = RowRule.from_dict(json.loads((tmp_path / "out" / "rows.json").read_text()))
    assert stored.digest == rule.digest
