from __future__ import annotations

import io
from dataclasses import dataclass

import pytest

from unicuco.cli.progress import ProgressDisplay, describe_step
from unicuco.cli.waiting import waiting


@dataclass(frozen=True)
class Step:
    stage: str
    done: int
    total: int
    detail: str = ""


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_tells_rate_and_time_left() -> None:
    line = describe_step(Step("learn", 34, 110, "KL 0.2"), done_here=30, seconds=15.0)
    assert line == "learn: 34/110, 2/s, 38 s left, KL 0.2"


def test_a_stage_of_unknown_length_tells_what_is_done() -> None:
    assert describe_step(Step("train", 7, 0), done_here=0, seconds=0.0) == "train: 7"


def test_short_stages_print_nothing_where_no_terminal_is(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with ProgressDisplay() as progress:
        for done in range(5):
            progress(Step("learn", done, 4))
    with waiting("starting"):
        pass
    assert capsys.readouterr() == ("", "")


def test_long_stages_print_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr("unicuco.cli.progress.time.monotonic", lambda: float(next(clock)))
    with ProgressDisplay() as progress:
        for done in range(7):
            progress(Step("learn", done, 100))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "learn: 2/100, 0.25/s, 392 s left",
        "learn: 5/100, 0.25/s, 380 s left",
    ]


def test_a_terminal_gets_bars_with_rate_and_eta(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeTerminal()
    monkeypatch.setattr("sys.stderr", fake)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with ProgressDisplay() as progress:
        progress(Step("evaluate", 0, 10))
        progress(Step("evaluate", 5, 10, "best 0.1"))
        progress(Step("train", 1, 0))
        with waiting("saving"):
            pass
    shown = fake.getvalue()
    for words in ("evaluate", "5/10", "ETA", "best 0.1", "train"):
        assert words in shown


def test_what_is_announced_is_said_even_where_stages_are_short(
    capsys: pytest.CaptureFixture[str],
) -> None:
    @dataclass(frozen=True)
    class Announced(Step):
        announce: bool = True

    with ProgressDisplay() as progress:
        progress(Announced("levels", 0, 4, "12.0 MB on disk"))
        progress(Step("levels", 1, 4))
    assert capsys.readouterr().err == "levels: 0/4, 12.0 MB on disk\n"
