"""Progress on stderr: bars with rate and time left at a terminal, a line now and then elsewhere.

What it does not know: what is being done; it shows the stages that it is told of.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Final, Protocol, Self

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

_LINE_EVERY_S: Final = 10.0


class ProgressStep(Protocol):
    """What a stage says of itself; ``total`` 0 means that it does not know how much there is."""

    @property
    def stage(self) -> str: ...  # noqa: D102
    @property
    def done(self) -> int: ...  # noqa: D102
    @property
    def total(self) -> int: ...  # noqa: D102
    @property
    def detail(self) -> str: ...  # noqa: D102


class ProgressDisplay:
    """A progress sink: call it with every step. Used as a context manager around the work."""

    def __init__(self) -> None:
        self._bars: Bars | None = _make_bars() if sys.stderr.isatty() else None
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, tuple[float, int]] = {}
        self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, step: ProgressStep) -> None:
        """Show a stage's present state."""
        if self._bars is not None:
            self._update_bar(self._bars, step)
        else:
            self._print_line(step)

    def _update_bar(self, bars: Bars, step: ProgressStep) -> None:
        if step.stage not in self._tasks:
            # What a resumed stage finds done already must not count into its rate.
            self._tasks[step.stage] = bars.add_task(
                step.stage, total=step.total or None, completed=step.done, detail=""
            )
        bars.update(
            self._tasks[step.stage],
            total=step.total or None,
            completed=step.done,
            detail=step.detail,
        )

    def _print_line(self, step: ProgressStep) -> None:
        now = time.monotonic()
        started, first = self._started.setdefault(step.stage, (now, step.done))
        finished = step.total > 0 and step.done >= step.total
        due = now - self._last_line >= _LINE_EVERY_S
        announced = getattr(step, "announce", False)  # optional in what a sink is told
        if not (announced or due or (finished and now - started > _LINE_EVERY_S)):
            return
        self._last_line = now
        print(
            describe_step(step, done_here=step.done - first, seconds=now - started), file=sys.stderr
        )


def describe_step(step: ProgressStep, *, done_here: int, seconds: float) -> str:
    """Return one line about a stage, e.g. ``learn: 34/110, 1.2/s, 63 s left``.

    Args:
        step: the stage's present state.
        done_here: steps done since the stage began in this process.
        seconds: time since then.
    """
    parts = [f"{step.done}/{step.total}" if step.total else f"{step.done}"]
    if done_here > 0 and seconds > 0:
        rate = done_here / seconds
        parts.append(f"{rate:.3g}/s")
        if step.total > step.done:
            parts.append(f"{(step.total - step.done) / rate:.0f} s left")
    if step.detail:
        parts.append(step.detail)
    return f"{step.stage}: {', '.join(parts)}"


def _make_bars() -> Bars:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        SpinnerColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class RateColumn(ProgressColumn):
        """Steps per second."""

        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{speed:.3g}/s", style="progress.data.speed")

    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        RateColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[detail]}"),
        console=Console(stderr=True),
        speed_estimate_period=120.0,
        redirect_stdout=False,
    )
