"""``unicuco report``: one page that needs nothing beside itself and says what the run says."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from unicuco.pipeline import Run
from unicuco.pipeline.report import learning_curve
from unicuco.types import Plan, Request, Target


class Page(HTMLParser):
    """Tags, attribute values that name something elsewhere, and the cells of all tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.cells: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in {"src", "href"}]
        if tag == "td":
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.cells and self.lasttag == "td":
            self.cells[-1] += data.strip()


@pytest.fixture(scope="module")
def page(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    from unicuco.pipeline import write_report

    path = tmp_path_factory.mktemp("report") / "page.html"
    write_report(Run.open(tiny_run), path)
    return path.read_text(encoding="utf-8")


def test_the_page_needs_nothing_beside_itself(page: str) -> None:
    parsed = Page(page)
    assert parsed.tags.count("svg") == 4
    assert not {"script", "link", "iframe", "img", "object"} & set(parsed.tags)
    assert all(link.startswith("#") for link in parsed.links)  # glyphs and clips of the drawings
    assert not re.search(r"url\((?!#)", page)


def test_its_numbers_are_the_runs(page: str, tiny_run: Path) -> None:
    run = Run.open(tiny_run)
    (plan,) = run.plan([Request(target=Target.SPARSITY, value=0.6)])
    assert isinstance(plan, Plan)
    cells = Page(page).cells
    at = cells.index(f"{plan.kept_params:,}")
    assert cells[at + 1] == f"{plan.kl.mean:.4g}"
    assert run.digest in cells
    uniform = dict(run.validation["uniform"])
    assert f"{uniform[0.5]:.4g}" in cells


def test_learning_never_loses_what_it_dominates(tiny_run: Path) -> None:
    curve = learning_curve(Run.open(tiny_run))
    assert len(curve) == 6
    assert all(a.units < b.units for a, b in pairwise(curve))
    assert all(a.hypervolume <= b.hypervolume for a, b in pairwise(curve))


def test_the_command_writes_beside_the_run_unless_told_otherwise(
    unicuco: Any, tiny_run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run<b>"
    shutil.copytree(tiny_run, folder)
    result = unicuco("report", folder, "--json")
    assert result.code == 0, result.stderr
    written = folder / "report.html"
    document = json.loads(result.stdout)
    assert document == {"report": str(written), "bytes": written.stat().st_size}
    assert "<title>run&lt;b&gt;</title>" in written.read_text(encoding="utf-8")
    Run.open(folder)  # one more file does no harm


def test_a_place_that_does_not_exist_is_one_line(
    unicuco: Any, tiny_run: Path, tmp_path: Path
) -> None:
    result = unicuco("report", tiny_run, "--out", tmp_path / "none" / "page.html")
    assert result.code == 1
    (line,) = result.stderr.splitlines()
    assert "can't be written" in line
    assert list(tmp_path.iterdir()) == []
