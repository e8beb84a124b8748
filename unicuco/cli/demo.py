"""The main job in one go: ``python -m unicuco.cli.demo`` (what ``make demo`` runs).

Learns a run of the reference model on a Ray of its own, answers 64 requests in one batch, cuts
variants, measures on the test text what they are worth beside the one-shot rivals, and lets vLLM
talk with one. Every number that it prints was measured in this very process, or is derived from
such numbers and then says how.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.markup import escape

from unicuco.cli.demo_requests import demo_requests
from unicuco.cli.demo_tables import answers_table, quality_table
from unicuco.cli.plan_table import refusals
from unicuco.cli.progress import ProgressDisplay
from unicuco.cli.terminal import make_console, silence_libraries
from unicuco.cli.waiting import waiting
from unicuco.errors import VariantError
from unicuco.failure import describe_failure
from unicuco.types import Request, Target

if TYPE_CHECKING:
    from rich.console import Console

    from unicuco.cli.demo_rivals import Rivals, SearchCost
    from unicuco.engines import Generation
    from unicuco.pipeline import EvaluationReport, LearnOptions, Run

COMPARED: Final = 0.6  # sparsity of the comparison with the rivals
SIZES: Final = (0.5, COMPARED, 0.7)
MAX_REPLICAS: Final = 4
_MARK: Final = ".unicuco-demo"
_PROMPT: Final = "def read_lines(path):\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """What the demo works on; the defaults are the demo that README promises."""

    out: Path = Path("out/demo")
    model: str = "reference"
    calibration: Path | None = None
    text: Path | None = None
    evaluations: int | None = None
    tokens: int = 3072
    test_tokens: int = 16_384

    def learn_options(self) -> LearnOptions:
        """Return the options of the run that it learns."""
        from unicuco.pipeline import LearnOptions

        return LearnOptions(
            model=self.model,
            out=self.out / "run",
            calibration=self.calibration,
            evaluations=self.evaluations,
            tokens=self.tokens,
            replicas=min(len(os.sched_getaffinity(0)), MAX_REPLICAS),
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo and return its exit code."""
    options = _read(arguments)
    silence_libraries()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # in step with stderr, also into a file
    try:
        run_demo(options, make_console(sys.stdout))
    except (Exception, KeyboardInterrupt) as error:
        failure = describe_failure(error)
        print(failure.line, file=sys.stderr)
        return failure.exit_code
    return 0


def run_demo(options: DemoOptions, console: Console) -> None:
    """Do the whole job, telling what happens, and end with the summary."""
    started = time.perf_counter()
    _clear(options.out)
    learn_options = options.learn_options()
    console.rule("1  learn, once")
    run, learn_s = _learn(learn_options)
    console.print(
        f"{run.manifest['evaluations']} strategies evaluated on {learn_options.replicas} Ray actors"
        f" and a network trained in {learn_s:.0f} s: {run.folder}"
    )
    console.rule("2  answer 64 requests")
    answer_s = _answer(run, console)
    console.rule("3  cut variants")
    variants = _cut(run, options.out, console)
    console.rule("4  measure on the test text")
    rivals = _rivals(learn_options, run)
    reports = _measure(rivals, variants[COMPARED], options)
    search = rivals.time_search(COMPARED)
    console.rule("5  let vLLM talk")
    generation = _generate(variants[COMPARED])
    console.rule("summary")
    console.print(quality_table(reports, COMPARED))
    console.print(_economy(learn_s, answer_s, search))
    for name in ("front.png", "strategies.png"):
        console.print(f"plot: {run.folder / name}")
    console.print(f"the whole demo took {time.perf_counter() - started:.0f} s")
    console.print(f"vLLM, from the variant at {COMPARED}:")
    console.print(f"[dim]{escape(_PROMPT)}[/dim]{escape(generation.text)}")


def _read(arguments: Sequence[str] | None) -> DemoOptions:
    default = DemoOptions()
    parser = argparse.ArgumentParser(prog="python -m unicuco.cli.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=default.out)
    parser.add_argument("--model", default=default.model)
    parser.add_argument("--calibration", type=Path, help="UTF-8 text to learn from")
    parser.add_argument("--text", type=Path, help="UTF-8 text to measure on")
    parser.add_argument("--evaluations", type=int)
    parser.add_argument("--tokens", type=int, default=default.tokens)
    parser.add_argument("--test-tokens", type=int, default=default.test_tokens)
    return DemoOptions(**vars(parser.parse_args(arguments)))


def _clear(folder: Path) -> None:
    """Remove what an earlier demo left; a folder that no demo made is left alone."""
    if folder.exists() and any(folder.iterdir()):
        if not (folder / _MARK).exists():
            raise VariantError(f"{folder} holds something else; choose another place: --out DIR")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MARK).touch()


def _learn(options: LearnOptions) -> tuple[Run, float]:
    """Return the run and the seconds that it took."""
    from cluster.driver import RayBackend
    from unicuco.pipeline import learn

    started = time.perf_counter()
    backend = RayBackend(address="local", replicas=options.replicas)
    with ProgressDisplay() as progress:
        run = learn(options, backend=backend, progress=progress)
    return run, time.perf_counter() - started


def _answer(run: Run, console: Console) -> float:
    """Answer the 64 requests in one batch and return the seconds per request."""
    cost = run.planner.space.cost
    requests = demo_requests(
        total_params=cost.total_params,
        site_params=cost.num_site_weights,
        num_bytes=run.profile.total_bytes,
    )
    run.plan(requests[:1])  # the first call of a process warms up
    started = time.perf_counter()
    answers = run.plan(requests)
    seconds = time.perf_counter() - started
    console.print(answers_table(requests, answers))
    for line in refusals(answers):
        console.print(line)
    each = seconds / len(requests)
    console.print(f"{len(requests)} answers in {1e3 * seconds:.0f} ms: {1e3 * each:.2f} ms each")
    return each


def _cut(run: Run, out: Path, console: Console) -> dict[float, Path]:
    """Cut a variant of each size and return their folders."""
    from unicuco.pipeline import prune

    folders = {}
    for sparsity in SIZES:
        folder = out / f"variant-{round(100 * sparsity)}"
        started = time.perf_counter()
        plan = prune(run, Request(target=Target.SPARSITY, value=sparsity), folder)
        seconds = time.perf_counter() - started
        console.print(
            f"{folder}: sparsity {plan.sparsity:.4f}, {plan.kept_params:,} of"
            f" {plan.total_params:,} parameters kept, cut in {seconds:.2f} s"
        )
        folders[sparsity] = folder
    return folders


def _rivals(options: LearnOptions, run: Run) -> Rivals:
    from unicuco.cli.demo_rivals import Rivals

    with waiting("preparing the rivals"):
        return Rivals.prepare(options, run)


def _measure(rivals: Rivals, variant: Path, options: DemoOptions) -> dict[str, EvaluationReport]:
    """Return what dense, uniform, Fisher and StratNet are worth on the test text."""
    from unicuco.pipeline import Progress, evaluate_variant

    def measure(name: str, folder: str) -> EvaluationReport:
        def show(step: Progress) -> None:
            progress(replace(step, stage=f"measure {name}"))

        return evaluate_variant(
            folder,
            reference=options.model,
            text=options.text,
            tokens=options.test_tokens,
            progress=show,
        )

    folders = {"dense": options.model}
    for name in ("uniform", "fisher"):
        folders[name] = str(rivals.cut(name, COMPARED, options.out / f"rival-{name}"))
    folders["stratnet"] = str(variant)
    with ProgressDisplay() as progress:
        return {name: measure(name, folder) for name, folder in folders.items()}


def _generate(variant: Path) -> Generation:
    from unicuco.engines import ENGINES, Sampling

    with closing(ENGINES["vllm"]()) as engine:
        with waiting("starting vLLM (about a minute without a GPU)"):
            engine.load(variant)
        (generation,) = engine.generate([_PROMPT], Sampling(max_tokens=48))
    return generation


def _economy(learn_s: float, answer_s: float, search: SearchCost) -> str:
    """Return what a request costs here and by searching anew, and from when on learning pays."""
    line = (
        f"per request: {1e3 * answer_s:.2f} ms, against {search.seconds:.0f} s for searching anew"
        f" ({search.describe()})"
    )
    gain = search.seconds - answer_s
    if gain <= 0:
        return f"{line}\nlearning does not pay here: searching is as fast as answering"
    break_even = math.ceil(learn_s / gain)
    return f"{line}\nlearning took {learn_s:.0f} s; break-even number of requests: {break_even}"


if __name__ == "__main__":
    sys.exit(main())
