from __future__ import annotations

import importlib.util
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Return the tool on a machine with nothing on its path."""
    spec = importlib.util.spec_from_file_location("browser_tool", ROOT / "tools" / "browser.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "FOLDER", tmp_path / ".venv" / "browser")
    monkeypatch.delenv("UNICUCO_BROWSER", raising=False)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return module


def program(path: Path, text: str = "#!/bin/sh\n") -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_without_a_browser_and_npm_it_is_one_line_that_says_what_to_install(
    browser: types.ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert browser.main() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "install node and npm" in line
    assert "UNICUCO_BROWSER" in line


def test_a_named_browser_comes_first_and_must_exist(
    browser: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path / "bin" / "chromium")
    assert browser.find() == (tmp_path / "bin" / "chromium", {})
    mine = program(tmp_path / "mine")
    monkeypatch.setenv("UNICUCO_BROWSER", str(mine))
    assert browser.find() == (mine, {})
    monkeypatch.setenv("UNICUCO_BROWSER", str(tmp_path / "nothing"))
    with pytest.raises(browser.BrowserError, match="can't be run"):
        browser.find()


def test_a_fetched_browser_brings_its_own_libraries_and_fonts(
    browser: types.ModuleType, tmp_path: Path
) -> None:
    browser.FOLDER.mkdir(parents=True)
    program(browser.FOLDER / "chromium")
    path, more = browser.find()
    assert path == browser.FOLDER / "chromium"
    assert more["LD_LIBRARY_PATH"].startswith(str(browser.FOLDER))
    assert more["FONTCONFIG_FILE"].startswith(str(browser.FOLDER))
    assert browser.main() == 0  # nothing is fetched again


def test_an_npm_that_fails_is_one_line_and_leaves_nothing(
    browser: types.ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program(tmp_path / "bin" / "npm", "#!/bin/sh\necho no registry >&2\nexit 1\n")
    program(tmp_path / "bin" / "node")
    assert browser.main() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "no registry" in line
    assert list((tmp_path / ".venv").iterdir()) == []
