from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from unicuco.errors import VariantError
from unicuco.export import read_variant
from unicuco.testing.variants import PROVENANCE, VariantCase


def test_the_document_reads_back_equal_and_rederives_the_strategy(
    llama: VariantCase, tmp_path: Path
) -> None:
    ref = llama.write(tmp_path / "out")
    document = read_variant(tmp_path / "out")
    assert document.plan == llama.plan
    assert document.plan.strategy.key == ref.strategy_key == llama.plan.strategy.key
    assert dict(document.dropped_weights) == llama.drops
    assert document.base_digest == llama.profile.digest
    assert (document.run, document.seed) == (PROVENANCE["run"], 7)
    plain = json.loads((tmp_path / "out" / "strategy.json").read_text())
    assert plain.items() >= llama.plan.to_dict().items()
    assert plain["format"] == 1
    assert plain["versions"].keys() >= {"unicuco", "torch", "transformers"}
    for name, digest in plain["files"].items():
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == digest
    present = {path.name for path in (tmp_path / "out").iterdir()}
    assert present == {*plain["files"], "strategy.json"}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= present


def test_an_altered_missing_or_foreign_file_is_named(llama: VariantCase, tmp_path: Path) -> None:
    out = tmp_path / "out"
    llama.write(out)
    weights = out / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(VariantError, match=r"model\.safetensors was altered"):
        read_variant(out)
    read_variant(out, verify=False)
    weights.unlink()
    with pytest.raises(VariantError, match=r"model\.safetensors is missing"):
        read_variant(out, verify=False)
    weights.write_bytes(whole)
    (out / "more.safetensors").write_bytes(whole)
    with pytest.raises(VariantError, match=r"more\.safetensors does not belong"):
        read_variant(out)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "can't be read"),
        ("[]", "format must be 1"),
        ('{"format": 2}', "format must be 1"),
        ('{"format": 1}', "is missing"),
    ],
)
def test_a_damaged_document_is_refused_in_one_line(
    llama: VariantCase, tmp_path: Path, text: str, reason: str
) -> None:
    llama.write(tmp_path / "out")
    (tmp_path / "out" / "strategy.json").write_text(text)
    with pytest.raises(VariantError, match=reason) as caught:
        read_variant(tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert "strategy.json" in str(caught.value)


def test_every_field_of_the_document_is_checked(llama: VariantCase, tmp_path: Path) -> None:
    llama.write(tmp_path / "out")
    path = tmp_path / "out" / "strategy.json"
    whole = json.loads(path.read_text())
    for name in whole:
        for wrong in ({k: v for k, v in whole.items() if k != name}, whole | {name: [None]}):
            path.write_text(json.dumps(wrong))
            with pytest.raises(VariantError, match=r"strategy\.json"):
                read_variant(tmp_path / "out")


def test_a_folder_that_is_no_variant_is_refused(llama: VariantCase, tmp_path: Path) -> None:
    for folder in (llama.folder, tmp_path / "nothing"):
        with pytest.raises(VariantError, match="is no variant"):
            read_variant(folder)
