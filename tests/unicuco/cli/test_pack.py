from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def packed(trained_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from unicuco.pipeline import PackOptions, pack

    file = tmp_path_factory.mktemp("cli") / "model.pack"
    pack(PackOptions(model=str(trained_folder), out=file))
    return file


def test_pack_and_unpack_give_one_document_each_and_the_folder_back(
    unicuco, trained_folder: Path, tmp_path: Path
) -> None:
    file, out = tmp_path / "file", tmp_path / "out"
    result = unicuco("pack", trained_folder, "--out", file, "--json")
    assert result.code == 0
    document = json.loads(result.stdout)
    assert document["file_bytes"] == file.stat().st_size
    assert document["ratio"] > 1
    assert document["ratio_to_int8"] is document["validation_kl"] is None
    result = unicuco("unpack", file, "--out", out, "--base", trained_folder, "--json")
    assert result.code == 0
    assert json.loads(result.stdout)["int8"] is None
    for path in trained_folder.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()


def test_int8_and_people(unicuco, trained_folder: Path, tiny_text_file: Path, tmp_path) -> None:
    file = tmp_path / "file"
    options = ("--max-kl", 0.05, "--calibration", tiny_text_file, "--tokens", 512)
    result = unicuco("pack", trained_folder, "--out", file, "--int8", *options)
    assert result.code == 0
    assert "times as many" in result.stdout
    assert "on validation text" in result.stdout
    result = unicuco("generate", "--packed", file, "--prompt", "def ", "--max-tokens", 4, "--json")
    assert result.code == 0
    document = json.loads(result.stdout)
    assert set(document) == {"text", "token_ids", "finish_reason", "weights"}
    assert document["weights"]["decoded"] == 0


@pytest.mark.parametrize("command", [("unpack",), ("generate", "--prompt", "x", "--packed")])
def test_bad_containers_end_with_1_and_one_line(
    unicuco, packed: Path, tiny_llama: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    out = ("--out", tmp_path / "out") if command[0] == "unpack" else ()
    cut, altered = tmp_path / "cut", tmp_path / "altered"
    data = packed.read_bytes()
    cut.write_bytes(data[:-1])
    altered.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    for file, word in ((cut, "cut short"), (altered, "was altered"), (tiny_llama, "can't be read")):
        result = unicuco(*command, file, *out, "--json")
        assert result.code == 1
        assert result.stdout == ""
        (line,) = result.stderr.splitlines()
        assert line.startswith("error: ")
        assert word in line
    result = unicuco(*command, packed, *out, "--base", tiny_llama, "--json")
    assert result.code == 1
    assert "was packed from base model" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_kl_that_can_t_be_met_ends_with_3(
    unicuco, trained_folder: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    options = ("--sparsity", 0.9, "--calibration", tiny_text_file, "--tokens", 256)
    file = tmp_path / "file"
    result = unicuco(
        "pack", trained_folder, "--out", file, "--int8", "--max-kl", 1e-6, *options, "--json"
    )
    assert result.code == 3
    assert "ask for that or more" in result.stderr
    assert not file.exists()


def test_bits_tells_what_every_scheme_costs(
    unicuco, trained_folder: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    plot = tmp_path / "bits.png"
    texts = ("--calibration", tiny_text_file, "--text", tiny_text_file, "--tokens", 512)
    words = ("bits", trained_folder, *texts, "--group", 16, "--plot", plot)
    result = unicuco(*words, "--sparsity", "0,0.5", "--json")
    assert result.code == 0
    rows = {(r["scheme"], r["sparsity"]): r for r in json.loads(result.stdout)["results"]}
    assert len(rows) == 2 * 8
    for row in rows.values():
        assert row["entropy_bits"] < row["plain_bits"]
        assert row["entropy_bits"] <= row["coded_bits"] < 1.3 * row["entropy_bits"]
    for sparsity in (0.0, 0.5):
        steps = [rows[f"int8 aware {kl}", sparsity] for kl in ("0.003", "0.01", "0.03")]
        bits = [row["coded_bits"] for row in steps]
        assert bits == sorted(bits, reverse=True)
    assert rows["bf16", 0.0]["kl"] < rows["int8 channel", 0.0]["kl"]
    assert rows["int4 group", 0.0]["kl"] > rows["int8 group", 0.0]["kl"]
    assert rows["int8 channel", 0.5]["entropy_bits"] < rows["int8 channel", 0.0]["entropy_bits"]
    # Trained or not, weights are near enough to normal for the formula.
    row = rows["int8 channel", 0.0]
    assert row["gaussian_bits"] == pytest.approx(row["entropy_bits"], abs=0.3)
    assert plot.read_bytes().startswith(b"\x89PNG")
