"""`python -m cluster.learn --config FILE.yaml`: learning as a job, e.g. under `ray job submit`.

The YAML has the option names of `unicuco learn`. Prints the options in effect once, then a line
now and then, and at the end where the run is. What this module does not know: what the options
mean.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Final, NoReturn

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from unicuco.errors import RequestError, StorageError
from unicuco.failure import describe_failure

if TYPE_CHECKING:
    from unicuco.pipeline import Backend, LearnOptions, Progress

_LINE_EVERY_S: Final = 10.0


class LearnConfig(BaseModel):
    """A job's YAML file; fields as in `unicuco.pipeline.LearnOptions`, and where to run.

    ``address`` left out means the cluster that the job runs on, if it runs on one, else a Ray of
    its own; "none" is without Ray. ``threads`` and ``gpus`` are those of each replica, or of
    each of its shards (no ``gpus``: what there is, shared).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model: str
    out: str
    pruner: str = "wanda"
    granularity: str = "layer"
    dimensions: list[str] | str = "sparsity"
    preset: str = "default"
    evaluations: int | None = None
    round_size: int | None = None
    screen_tokens: int | None = None
    warm_from: str = ""
    replicas: int = 1
    shards: int = 1
    threads: int = 1
    gpus: float | None = None
    calibration: str | None = None
    calibration_sampling: str = "even"
    rounding: str = "nearest"
    tasks: list[str] | None = None
    tokens: int = 3072
    context: int | None = None
    seed: int = 0
    resume: bool = False
    max_sparsity: float = 0.9
    store: str = ""
    address: str | None = None

    @classmethod
    def read(cls, path: Path) -> LearnConfig:
        """Read a YAML file.

        Raises:
            StorageError: it can't be read.
            RequestError: no YAML, an unknown option or a value of the wrong kind.
        """
        try:
            document = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise StorageError(f"{path} can't be read: {error.strerror or error}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise RequestError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
        if not isinstance(document, dict):
            raise RequestError(f"{path} must name options, one a line, e.g. `model: reference`")
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            reason = first["msg"]
            if first["type"] == "extra_forbidden":
                reason = f"is no option; options: {', '.join(cls.model_fields)}"
            raise RequestError(f"{path}: {name}: {reason}") from error

    def to_domain(self) -> LearnOptions:
        """Return the options of learning.

        Raises:
            RequestError: a value out of its range.
        """
        from unicuco.pipeline import LearnOptions
        from unicuco.pipeline.options import parse_tasks
        from unicuco.pipeline.publishing import run_place

        folder, publish_to = run_place(self.out)
        given = self.dimensions
        names = given.split(",") if isinstance(given, str) else given
        return LearnOptions(
            model=self.model,
            out=folder,
            publish_to=publish_to,
            store=self.store,
            pruner=self.pruner,
            granularity=self.granularity,
            dimensions=tuple(name.strip() for name in names),
            preset=self.preset,
            evaluations=self.evaluations,
            round_size=self.round_size,
            screen_tokens=self.screen_tokens,
            warm_from=self.warm_from,
            replicas=self.replicas,
            shards=self.shards,
            calibration=None if self.calibration is None else Path(self.calibration),
            calibration_sampling=self.calibration_sampling,
            rounding=self.rounding,
            tasks=parse_tasks(self.tasks or ()),
            tokens=self.tokens,
            context=self.context,
            seed=self.seed,
            resume=self.resume,
            max_sparsity=self.max_sparsity,
        )

    def backend(self) -> Backend:
        """Return the backend that the address names.

        Raises:
            RequestError: replicas, shards, threads or GPUs that a process without Ray does not
                have.
        """
        if self.effective_address == "none":
            if max(self.replicas, self.shards, self.threads) > 1 or self.gpus:
                raise RequestError(
                    "replicas, shards, threads and gpus need Ray; leave out `address: none`"
                )
            from unicuco.pipeline import LocalBackend

            return LocalBackend()
        from cluster.driver import RayBackend

        return RayBackend(
            self.effective_address, self.replicas, self.threads, self.shards, gpus=self.gpus
        )

    @property
    def effective_address(self) -> str:
        """Where to run, with the default filled in."""
        if self.address is not None:
            return self.address
        return "auto" if os.environ.get("RAY_ADDRESS") else "local"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a job; return its exit code: 0 done, 2 wrong use, 1 anything else, as `unicuco learn`."""
    parser = argparse.ArgumentParser(prog="python -m cluster.learn", description="Learn a run.")
    parser.add_argument("--config", type=Path, required=True, help="YAML, as `unicuco learn`.")
    parser.add_argument("--debug", action="store_true", help="Show tracebacks.")
    given = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _learn(LearnConfig.read(given.config))
    except KeyboardInterrupt:
        print("stopped: `resume: true` goes on from here", file=sys.stderr)
        return 1
    except Exception as error:
        if given.debug:
            traceback.print_exc()
        failure = describe_failure(error)
        print(failure.line, file=sys.stderr)
        return failure.exit_code


def _learn(config: LearnConfig) -> int:
    from unicuco.store.database import display_name

    options = config.to_domain()
    effective = config.model_dump() | {
        "evaluations": options.num_evaluations,
        "address": config.effective_address,
        "store": display_name(config.store),
    }
    print(f"options {json.dumps(effective)}", flush=True)
    from unicuco.pipeline import learn

    learn(options, backend=config.backend(), progress=_Lines())
    print(f"learned {options.place}", flush=True)
    return 0


class _Lines:
    """Prints where each stage begins and ends, and a line every ten seconds between."""

    def __init__(self) -> None:
        self._stage = ""
        self._printed_at = 0.0

    def __call__(self, step: Progress) -> None:
        now = time.monotonic()
        is_edge = step.stage != self._stage or step.done == step.total
        if is_edge or now - self._printed_at >= _LINE_EVERY_S:
            self._stage, self._printed_at = step.stage, now
            print(
                f"{step.stage} {step.done}/{step.total or '?'} {step.detail}".rstrip(), flush=True
            )


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
