from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from unicuco.errors import RunError
from unicuco.pipeline import Run
from unicuco.testing.tiny import tiny_model_folder
from unicuco.types import Request, Target


@pytest.fixture
def copy(run: Run, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run.folder, tmp_path / "copy"))


def test_a_run_can_be_moved(copy: Path, run: Run) -> None:
    request = Request(target=Target.SPARSITY, value=0.5)
    assert Run.open(copy).plan([request]) == run.plan([request])
    assert Run.open(copy).base_folder == run.base_folder


def test_a_path_without_a_run_says_how_to_learn_one(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is no run folder; learn one with: unicuco learn MODEL"):
        Run.open(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"is no finished run: run\.json is missing"):
        Run.open(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="is no run folder"):
        Run.open(tmp_path / "file")


def test_a_half_written_run_says_how_to_finish_it(copy: Path) -> None:
    (copy / "run.json").unlink()
    with pytest.raises(RunError, match=r"unfinished run; finish it with: .* --resume"):
        Run.open(copy)


@pytest.mark.parametrize(
    "name", ["stratnet.safetensors", "surrogate.safetensors", "fisher.safetensors"]
)
def test_an_altered_or_missing_file_is_refused(copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[-1] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(RunError, match=f"{name} was altered"):
        Run.open(copy)
    (copy / name).unlink()
    with pytest.raises(RunError, match=f"{name} is missing"):
        Run.open(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", "nonsense", '{"format": 2}', '{"format": null}'])
def test_a_damaged_manifest_is_refused_in_one_line(copy: Path, text: str) -> None:
    (copy / "run.json").write_text(text)
    with pytest.raises(RunError) as caught:
        Run.open(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("profile", {}),
        ("profile", None),
        ("sparsity_range", [0.1]),
        ("options", {"dimensions": ["width"], "granularity": "layer", "preset": "default"}),
        ("options", {"dimensions": ["sparsity"], "granularity": "row", "preset": "default"}),
        ("options", {"dimensions": ["sparsity"], "granularity": "block", "preset": "default"}),
        ("options", {"dimensions": ["sparsity"], "granularity": "layer", "preset": "best"}),
        ("intervals", {"bias": 0.0}),
        ("intervals", {"means": [], "residuals": [], "deviations": []}),
        ("validation", {}),
        ("seed", "first"),
        ("base_model", 3),
        ("files", 3),
    ],
)
def test_a_manifest_with_a_wrong_field_is_refused_in_one_line(
    copy: Path, field: str, value: object
) -> None:
    manifest = json.loads((copy / "run.json").read_text())
    manifest[field] = value
    (copy / "run.json").write_text(json.dumps(manifest))
    with pytest.raises(RunError) as caught:
        Run.open(copy)
    assert "\n" not in str(caught.value)


def test_a_run_of_another_format_is_refused(copy: Path) -> None:
    manifest = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(manifest | {"format": 1}))
    with pytest.raises(RunError, match="format 1; this version reads 2"):
        Run.open(copy)


def test_altered_ranks_are_refused(copy: Path) -> None:
    path = sorted((copy / "ranks").iterdir())[0]
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(RunError, match="altered"):
        _ = Run.open(copy).ranks


def test_another_base_model_is_refused(run: Run, tmp_path: Path) -> None:
    other = tiny_model_folder(tmp_path / "other", seed=5, tied=True)
    with pytest.raises(RunError, match=r"is not the model that .* was learned for"):
        _ = Run.open(run.folder, base=str(other)).base_folder
    with pytest.raises(RunError, match="name it with --base"):
        _ = Run.open(run.folder, base=str(tmp_path / "nothing")).base_folder
    same = shutil.copytree(run.base_folder, tmp_path / "same")
    assert Run.open(run.folder, base=str(same)).base_folder == same


def test_planning_needs_neither_base_model_nor_ranks(copy: Path) -> None:
    manifest = json.loads((copy / "run.json").read_text())
    manifest["base_model"]["path"] = "/nowhere"
    (copy / "run.json").write_text(json.dumps(manifest))
    shutil.rmtree(copy / "ranks")
    (answer,) = Run.open(copy).plan([Request(target=Target.SPARSITY, value=0.5)])
    assert not isinstance(answer, Exception)
