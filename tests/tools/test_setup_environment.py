from __future__ import annotations

import importlib.util
import subprocess
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Return the set-up step, working on a checkout of its own and with pip only recorded."""
    spec = importlib.util.spec_from_file_location(
        "setup_environment", ROOT / "tools" / "setup_environment.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text("x")
    venv = tmp_path / ".venv"
    paths = {"ROOT": tmp_path, "VENV": venv, "PYTHON": venv / "bin" / "python"}
    for name, path in (*paths.items(), ("STAMP", venv / ".unicuco-setup")):
        monkeypatch.setattr(module, name, path)
    inputs = (tmp_path / "pyproject.toml", tmp_path / "constraints.txt")
    monkeypatch.setattr(module, "INPUTS", inputs)
    monkeypatch.setattr(module, "has_nvidia_gpu", lambda: False)
    module.calls = []  # type: ignore[attr-defined]

    def pip(*arguments: str) -> int:
        module.calls.append(arguments)
        return 0

    def run(command: list[str], trouble: str) -> None:
        (venv / "bin").mkdir(parents=True)
        (venv / "bin" / "python").write_text("#!/bin/sh\n")
        (venv / "bin" / "python").chmod(0o755)

    monkeypatch.setattr(module, "pip", pip)
    monkeypatch.setattr(module, "run", run)
    monkeypatch.setattr(module, "installed_torch", lambda: "2.13.0+cpu")
    return module


def test_it_works_once_and_again_only_when_an_input_or_the_place_changes(setup) -> None:
    assert setup.main() == 0
    assert setup.calls
    setup.calls.clear()
    assert setup.main() == 0
    assert setup.calls == []
    (setup.ROOT / "constraints.txt").write_text("y")
    assert setup.main() == 0
    assert setup.calls


def test_a_failed_install_is_tried_again(setup, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(setup, "pip", lambda *arguments: 1)
    assert setup.main() == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not setup.is_current()


def test_without_a_gpu_the_companions_built_for_cuda_go(setup) -> None:
    setup.main()
    assert ("uninstall", "-y", "-q", "torchvision", "torchaudio", "torchcodec") in setup.calls
    assert any(".[cpu,bench,dev]" in call for call in setup.calls)


def test_with_a_gpu_nothing_is_removed(setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "has_nvidia_gpu", lambda: True)
    setup.main()
    assert not any(call[0] == "uninstall" for call in setup.calls)
    assert any(".[gpu,bench,dev]" in call for call in setup.calls)


def test_no_other_index_is_asked_where_pip_finds_a_cpu_build(
    setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "resolved_torch", lambda: "2.13.0+cpu")
    setup.install_torch(cpu_build=True)
    assert not any("--extra-index-url" in call for call in setup.calls)
    monkeypatch.setattr(setup, "resolved_torch", lambda: "2.13.0")
    setup.install_torch(cpu_build=True)
    assert any(setup.TORCH_CPU_INDEX in call for call in setup.calls)


def test_a_cuda_build_where_a_cpu_build_is_needed_is_refused(
    setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "resolved_torch", lambda: "2.13.0")
    monkeypatch.setattr(setup, "installed_torch", lambda: "2.13.0+cu130")
    with pytest.raises(setup.SetupError, match="CPU wheel index"):
        setup.install_torch(cpu_build=True)


def test_another_python_gets_one_line(setup, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(setup, "sys", types.SimpleNamespace(version_info=(3, 13), stderr=None))
    with pytest.raises(setup.SetupError, match=r"needs Python 3\.11"):
        setup.make()


def test_make_says_in_one_line_that_python_is_missing() -> None:
    command = ["make", "-C", str(ROOT), "PYTHON=", "venv"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stderr.splitlines()[0].startswith("Python 3.11 is needed and was not found")
