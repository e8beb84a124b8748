"""The package as others see it: what it offers, what importing it costs, what may import what."""

from __future__ import annotations

import ast
import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import unicuco

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CONTRACTS = PROJECT["tool"]["importlinter"]["contracts"]
PARTS = sorted(module.name for module in pkgutil.iter_modules(unicuco.__path__))
# In the order of the design, bottom to top; plots stand between export and those who draw.
LAYERS = [
    *("errors", "files", "headers", "tensors", "memory", "remote", "types", "bits", "space"),
    *("models", "reference", "calibration"),
    "importance",
    *("rows", "ranks", "levels", "pruners"),
    *("dimensions", "objectives", "allocate", "evaluate", "shards", "surrogate"),
    *("stratnet", "search", "store", "export", "plots", "packing", "engines", "pipeline"),
    *("testing", "failure", "cli"),
]


def packages() -> list[str]:
    names = []
    for top in ("unicuco", "cluster", "serve"):
        package = importlib.import_module(top)
        names.append(top)
        found = pkgutil.walk_packages(package.__path__, prefix=f"{top}.")
        names += [module.name for module in found if module.ispkg]
    return names


def test_importing_unicuco_loads_nothing_heavy() -> None:
    code = (
        "import sys, unicuco, unicuco.types, unicuco.errors; "
        "print(*{'torch', 'ray', 'gpytorch', 'transformers', 'vllm', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("name", packages())
def test_what_a_package_declares_is_there_and_sorted(name: str) -> None:
    module = importlib.import_module(name)
    declared = getattr(module, "__all__", None)
    if declared is None:
        tree = ast.parse(Path(str(module.__file__)).read_text())
        assert not [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        return
    assert sorted(declared, key=sort_key) == list(declared)
    for attribute in declared:
        assert hasattr(module, attribute), f"{name}.{attribute}"


def sort_key(name: str) -> tuple[int, str]:
    """Constants, classes, functions: the order in which ruff sorts a public list."""
    return (0 if name.isupper() else 1 if name[:1].isupper() else 2, name)


def test_the_layers_of_the_design_are_held_by_a_contract() -> None:
    (layers,) = [contract for contract in CONTRACTS if contract.get("containers") == ["unicuco"]]
    names = [name.strip("()") for name in reversed(layers["layers"])]
    assert names == LAYERS
    assert layers["exhaustive"] is True
    assert set(PARTS) <= set(names)


def test_ray_and_vllm_are_forbidden_to_every_other_part() -> None:
    forbidden = {
        frozenset(contract["forbidden_modules"]): set(contract["source_modules"])
        for contract in CONTRACTS
        if contract["type"] == "forbidden"
    }
    parts = {f"unicuco.{name}" for name in PARTS}
    ray = forbidden[frozenset({"ray", "fastapi", "cluster", "serve"})]
    assert parts - {"unicuco.cli"} <= ray
    vllm = forbidden[frozenset({"vllm"})]
    assert parts - {"unicuco.engines"} <= vllm
    assert {"cluster", "serve"} <= vllm


def test_cluster_and_serve_are_forbidden_to_each_other() -> None:
    assert any("cluster | serve" in contract.get("layers", ()) for contract in CONTRACTS)


def test_every_direct_dependency_is_pinned_by_the_constraints() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pinned = {normal(name): version for name, version in pins.items()}
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *extras["cpu"], *extras["dev"]]
    names = {normal(re.split(r"[\[<>=]", requirement)[0]) for requirement in wanted}
    assert names <= set(pinned)
    assert pinned["torch"] == "2.13.0"
    assert not {"torchvision", "torchaudio", "torchcodec"} & set(pinned)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_typing_information_ships_with_every_package() -> None:
    for top in ("unicuco", "cluster", "serve"):
        assert (ROOT / top / "py.typed").exists()
        assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"][top]


def test_nothing_is_ever_pickled_to_disk() -> None:
    # Safetensors, JSON and SQL only; weights_only=True is torch.load's safe half and is not used.
    found = []
    for top in ("unicuco", "cluster", "serve"):
        for path in (ROOT / top).rglob("*.py"):
            if "testing" in path.parts:  # contracts pickle in memory, as Ray does
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                names = {alias.name for alias in node.names} if isinstance(node, ast.Import) else ()
                if {"pickle", "cloudpickle", "dill", "joblib"} & set(names):
                    found.append(path)
    assert found == []


@pytest.mark.slow
def test_a_built_wheel_runs_in_an_empty_folder(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("pyproject.toml", "README.md", "LICENSE", "unicuco", "cluster", "serve"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        source.mkdir(exist_ok=True)
        copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path)]
    subprocess.run([*build, str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    empty = tmp_path / "empty"
    empty.mkdir()
    code = "import unicuco.cli as cli, unicuco; print(unicuco.__file__); cli.main(['--help'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=empty,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(str(site))
    shipped = {str(path.relative_to(site)) for path in site.rglob("*") if path.is_file()}
    wanted = {
        str(path.relative_to(ROOT))
        for top in ("unicuco", "cluster", "serve")
        for path in (ROOT / top).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }
    assert wanted <= shipped
    entry_points = next(site.glob("*.dist-info/entry_points.txt")).read_text()
    assert "unicuco = unicuco.cli:main" in entry_points
