"""A search and an evaluator small enough to know by heart, for tests of what carries them."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unicuco.errors import ModelError, StorageError
from unicuco.types import Ask, Evaluation, Outcome, Strategy

ARRAYS = {"target": np.array([0.3, 0.7]), "ballast": np.ones(2**18, dtype=np.float32)}


@dataclass(frozen=True)
class BowlConfig:
    """``die_at`` kills the process of whoever evaluates a strategy whose key begins so."""

    seconds: float = 0.0
    die_at: str = "none"
    once_file: str = ""
    refuse: str = ""
    device: str = "cpu"
    dtype: str = "float32"


class Bowl:
    """The KL of a strategy is its squared distance from the array "target"."""

    def __init__(self, config: BowlConfig, arrays: Mapping[str, NDArray[np.generic]]) -> None:
        if config.refuse == "model":
            raise ModelError("the model is none")
        if config.refuse:
            raise ValueError(f"two\nlines of {config.refuse}")
        self._config = config
        self._arrays = arrays

    def evaluate(
        self, strategy: Strategy, *, tokens: int | None = None, derivatives: bool = False
    ) -> Evaluation:
        started = time.perf_counter()
        if strategy.key.startswith(self._config.die_at):
            self._die()
        while time.perf_counter() - started < self._config.seconds:  # busy, as a model is
            pass
        point = np.array(strategy.values)
        if 0.4 < point[0] < 0.5:
            raise RuntimeError("no memory\nleft")
        return Evaluation(
            strategy_key=strategy.key,
            kl=float(((point - self._arrays["target"]) ** 2).sum()),
            kept_fraction=float(1 - point.mean()),
            gradient=tuple(2 * (point - self._arrays["target"])) if derivatives else None,
            tokens=64,
            text_digest=f"{self._config.device} {describe(self._arrays['ballast'])}",
            cost_units=3.0 if derivatives else 1.0,
            wall_s=time.perf_counter() - started,
        )

    def _die(self) -> None:
        once = self._config.once_file
        if once and os.path.exists(once):
            return
        if once:
            open(once, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)


def describe(array: NDArray[np.generic]) -> str:
    """Say whether an array is read-only, and what settings its process has."""
    writeable = "writeable" if array.flags.writeable else "read-only"
    return f"{writeable} threads={os.environ.get('OMP_NUM_THREADS')} pid={os.getpid()}"


class DigestSearch:
    """Asks strategies drawn from a digest of all results that its round may know."""

    def __init__(self, round_size: int) -> None:
        self.round_size = round_size
        self._told: list[list[tuple[Ask, Outcome]]] = []

    def ask(self, round: int) -> list[Ask]:
        known = [
            [getattr(outcome, "kl", None) for _, outcome in results]
            for results in self._told[: max(0, round - 1)]
        ]
        assert len(known) == max(0, round - 1)
        digests = [
            hashlib.sha256(f"{round} {position} {known}".encode()).digest()
            for position in range(self.round_size)
        ]
        return [make_ask(digest, round, position) for position, digest in enumerate(digests)]

    def tell(self, round: int, results: Sequence[tuple[Ask, Outcome]]) -> None:
        assert round == len(self._told)
        self._told.append(list(results))


class DyingSearch(DigestSearch):
    """A search whose process dies while it is asked round 3, unless ``once_file`` is there."""

    def __init__(self, config: tuple[int, str]) -> None:
        super().__init__(config[0])
        self._once_file = config[1]

    def ask(self, round: int) -> list[Ask]:
        if round == 3 and not os.path.exists(self._once_file):
            open(self._once_file, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().ask(round)


class HangingSearch(DigestSearch):
    """A search that is slow in round 2, stopped in round 3, and waits for ever in round 4.

    Each once: ``log`` has a line for every round and process that was asked.
    """

    def __init__(self, config: tuple[int, str, float]) -> None:
        super().__init__(config[0])
        self._log = Path(config[1])
        self._slow_s = config[2]

    def ask(self, round: int) -> list[Ask]:
        with self._log.open("a+") as log:
            log.seek(0)
            before = log.read()
            log.write(f"{round} {os.getpid()}\n")
        if f"\n{round} " not in before:
            self._be_late(round)
        return super().ask(round)

    def _be_late(self, round: int) -> None:
        until = time.monotonic() + self._slow_s
        while round == 2 and time.monotonic() < until:
            pass
        while round == 3:  # whoever else on the machine sends SIGCONT
            os.kill(os.getpid(), signal.SIGSTOP)
        if round == 4:
            threading.Event().wait()


class BreakingSearch(DigestSearch):
    """A search that fails in round 2, as ``error`` says."""

    def __init__(self, error: Exception) -> None:
        super().__init__(4)
        self._error = error

    def ask(self, round: int) -> list[Ask]:
        if round == 2:
            raise self._error
        return super().ask(round)


def make_ask(digest: bytes, round: int = 0, position: int = 0) -> Ask:
    """Return the ask of two axes that a digest stands for."""
    values = (int.from_bytes(digest[:4]) / 2**32, int.from_bytes(digest[4:8]) / 2**32)
    strategy = Strategy(settings=(("sparsity/0", values[0]), ("sparsity/1", values[1])))
    return Ask(round=round, position=position, strategy=strategy, derivatives=position == 0)


class LevelMaker:
    """Leaves a file per block; dies or refuses where it is told to."""

    def __init__(self, folder: Path, *, die: str = "", refuse: bool = False) -> None:
        self._folder = folder
        self._die = die
        self._refuse = refuse

    def start(self) -> None:
        pass

    def build(self, block: int) -> None:
        if self._refuse:
            raise StorageError("the disk is full")
        marker = self._folder / "died"
        if self._die == "always" or (self._die == "once" and block == 1 and not marker.exists()):
            marker.touch()
            os._exit(1)
        (self._folder / f"{block}").write_text(f"{os.getpid()}")
