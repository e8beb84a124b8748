from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from unicuco.engines import VllmOptions
from unicuco.models import load_model
from unicuco.testing.cases import make_evaluation_case
from unicuco.testing.tiny import tiny_model_folder
from unicuco.testing.variants import write_shrunk_case

pytestmark = pytest.mark.xdist_group("vllm")

ROOT = Path(__file__).parents[3]
GROUP = "vllm.general_plugins"
ATTENTION, MLP = "model.layers.{}.self_attn", "model.layers.{}.mlp"
PROMPTS = [[5, 17, 99, 140, 23], [200, 7], [31] * 40, [88, 12, 250, 3, 3, 61, 9, 40]]
NEW_TOKENS = 24
KINDS: dict[str, dict[str, float]] = {
    "widths": {f"width/{MLP.format(0)}": 0.5, f"width/{MLP.format(2)}": 0.25},
    "heads": {f"width/{ATTENTION.format(1)}": 0.5},
    "parts missing": {f"depth/{ATTENTION.format(0)}": 1, f"depth/{MLP.format(2)}": 1},
    "block missing": {f"depth/{ATTENTION.format(1)}": 1, f"depth/{MLP.format(1)}": 1},
    "mixed": {
        f"depth/{ATTENTION.format(0)}": 1,
        f"depth/{MLP.format(1)}": 1,
        f"width/{ATTENTION.format(2)}": 0.5,
        f"width/{MLP.format(2)}": 0.75,
        "sparsity/model.layers.2.mlp.up_proj": 0.5,
    },
}
INSIDE_HEADS = {
    f"depth/{ATTENTION.format(0)}": 1,
    f"width/{ATTENTION.format(1)}": 0.5,
    f"low_rank/{ATTENTION.format(1)}.pairs": 0.5,
    f"low_rank/{ATTENTION.format(1)}.ranks": 0.25,
    f"low_rank/{ATTENTION.format(2)}.ranks": 0.5,
}
# Every kind of Llama; of Qwen2, which has biases, what has them all.
CASES = [*(("llama", kind) for kind in KINDS), ("qwen2", "mixed"), ("qwen2", "inside heads")]


def entry_points() -> dict[str, str]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        points: dict[str, str] = tomllib.load(file)["project"]["entry-points"][GROUP]
    return points


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that makes the project's entry points known, as an installation does."""
    folder = tmp_path_factory.mktemp("installed")
    info = folder / "unicuco_plugin-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: unicuco-plugin\nVersion: 0\n")
    lines = [f"{name} = {target}" for name, target in entry_points().items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines]) + "\n")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    root = tmp_path_factory.mktemp("shrunk")
    written: dict[tuple[str, str], Path] = {}
    for family in ("llama", "qwen2"):
        base = tiny_model_folder(  # vLLM's CPU attention knows head sizes from 32 on
            root / family, family, num_blocks=3, hidden_size=128, context=128, tied=True
        )
        masked = make_evaluation_case(base, dimensions=("sparsity", "depth", "width"))
        for name, kind in CASES:
            if name == family:
                case, settings = masked, KINDS.get(kind, INSIDE_HEADS)
                if kind not in KINDS:
                    case = make_evaluation_case(base, dimensions=("depth", "width", "low_rank"))
                written[name, kind] = root / f"{family}-{kind.replace(' ', '-')}"
                write_shrunk_case(case, settings, written[name, kind])
    return written


def transformers_greedy(folder: Path) -> list[list[int]]:
    """The tokens of a plain greedy loop over the float32 logits of Transformers' class."""
    model = load_model(folder).model
    answers = []
    for prompt in PROMPTS:
        ids = list(prompt)
        while len(ids) < len(prompt) + NEW_TOKENS:
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        answers.append(ids[len(prompt) :])
    return answers


@pytest.mark.slow
def test_stock_vllm_says_what_transformers_says_of_every_kind_of_variant(
    folders: dict[tuple[str, str], Path], installed: Path
) -> None:
    question = {
        "folders": [str(folder) for folder in folders.values()],
        "prompts": PROMPTS,
        "max_tokens": NEW_TOKENS,
    }
    path = os.pathsep.join([str(installed), str(ROOT)])
    process = subprocess.run(
        [sys.executable, "-P", str(Path(__file__).with_name("stock_vllm.py"))],
        input=json.dumps(question),
        env={**os.environ, **VllmOptions(threads=1).environment(), "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    answers = json.loads(process.stdout.splitlines()[-1])
    expected = {case: transformers_greedy(folder) for case, folder in folders.items()}
    assert dict(zip(folders, answers, strict=True)) == expected
    assert len({json.dumps(tokens) for tokens in answers}) == len(CASES)


@pytest.mark.slow
def test_the_plugin_needs_nothing_that_vllm_does_not_bring(installed: Path) -> None:
    (target,) = entry_points().values()
    module = target.split(":")[0]
    heavy = ("ray", "gpytorch", "fastapi", "sqlalchemy", "typer", "sklearn")
    code = (
        f"import sys, {module}; from importlib.metadata import entry_points as e; "
        f"names = [p.name for p in e(group={GROUP!r})]; "
        f"print(names, [m for m in {heavy!r} if m in sys.modules])"
    )
    path = os.pathsep.join([str(installed), str(ROOT)])
    process = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "unicuco" in process.stdout
    assert process.stdout.strip().endswith("[]")
