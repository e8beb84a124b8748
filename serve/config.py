"""What whoever starts the service decides, checked before anything starts; defaults in one place.

Everything here is frozen and picklable and travels whole to every replica. Keys travel as digests
only, so no log, no status page and no replica ever holds one. What this module does not know: Ray.
"""

from __future__ import annotations

import functools
import hashlib
import ipaddress
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from unicuco.errors import RequestError

KEYS_VARIABLE: Final = "UNICUCO_API_KEYS"
RUN_ID: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
SUFFIX: Final = re.compile(r"[a-z0-9-]{1,40}")

_SHORTEST_KEY: Final = 8  # a typing error in the list of keys must not become a key


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What one caller, or all of them together, may ask for.

    ``max_in_flight`` are requests inside one ingress replica, beyond which it answers 503;
    ``max_active_jobs`` jobs queued and running, beyond which it answers 429; ``max_packings``
    packed forms that it waits for, beyond which it answers 503.
    """

    max_body_bytes: int = 1 << 20
    max_requests: int = 1024
    max_page: int = 100
    max_in_flight: int = 1024
    max_active_jobs: int = 10_000
    max_streams: int = 256
    max_packings: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategyOptions:
    """The deployment that answers requests with strategies."""

    num_cpus: float = 0.1
    max_replicas: int = 2
    max_batch: int = 64
    batch_wait_s: float = 0.002


@dataclass(frozen=True, slots=True, kw_only=True)
class PruningOptions:
    """The deployment that cuts variants.

    Cutting waits for the disk as much as for the processor, so a replica asks for a part of one.
    ``lease_s`` is how long a replica may be silent before another takes its job over;
    ``max_attempts`` how many replicas one job may use up. ``check_latency``: a variant that was
    asked for by its latency is timed in vLLM beside its base before its job ends, one variant at a
    time; a minute or two, with two engines where the replica is.
    """

    num_cpus: float = 0.25
    min_replicas: int = 1
    max_replicas: int = 4
    jobs_per_replica: int = 4
    lease_s: float = 30.0
    poll_s: float = 0.2
    downscale_delay_s: float = 10.0
    max_attempts: int = 3
    check_latency: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """The deployment that talks: vLLM engines. ``max_engines`` 0 leaves it out.

    ``num_cpus`` and ``num_gpus`` are asked of Ray per engine; ``threads`` an engine computes with,
    0 = its share of the cores. ``slots`` are sequences that run at once on one engine;
    ``max_queued`` sequences may wait, beyond which the answer is 429; ``max_sequences`` may one
    call have. ``longest_wait_s`` is how long a variant waits before it claims an engine from
    another. ``min_engines`` start with the service, on the first run's dense model, and the service
    is ready once one has; the others start when there is more to do than the running ones can, and
    end after ``idle_stop_s`` with nothing to do. ``scratch`` is a folder, best on a fast disk of
    the engines' node, that models are held in while they are served, those that lie packed
    unpacked; empty: inside the service's data.
    """

    min_engines: int = 1
    max_engines: int = 1
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    threads: int = 0
    max_model_len: int | None = None
    slots: int = 32
    max_queued: int = 256
    max_sequences: int = 32
    max_tokens: int = 1024
    start_timeout_s: float = 300.0
    longest_wait_s: float = 10.0
    idle_stop_s: float = 600.0
    scratch: str = ""


_BOUNDS: Final = Bounds()
_STRATEGIES: Final = StrategyOptions()
_PRUNING: Final = PruningOptions()
_ENGINES: Final = EngineOptions()


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """The whole service.

    Attributes:
        runs: (run id, folder) pairs, ids unique.
        data: the folder that holds variants and, by default, the jobs' database.
        store: database URL or path of the jobs; empty: ``jobs.db`` inside ``data``.
        host: address to listen on; other than loopback only with keys.
        port: to listen on.
        key_digests: sha256 of every key that may call, in hexadecimal; none: everybody may.
        ingress_replicas: processes that speak HTTP.

    Raises:
        RequestError: an id or an option that means nothing, or an open service without keys.
    """

    runs: tuple[tuple[str, str], ...]
    data: str
    store: str = ""
    host: str = "127.0.0.1"
    port: int = 8000
    key_digests: tuple[str, ...] = field(default=(), repr=False)
    ingress_replicas: int = 1
    bounds: Bounds = _BOUNDS
    strategies: StrategyOptions = _STRATEGIES
    pruning: PruningOptions = _PRUNING
    engines: EngineOptions = _ENGINES

    def __post_init__(self) -> None:
        if not self.runs:
            raise RequestError("serve needs at least one run")
        seen: set[str] = set()
        for run_id, folder in self.runs:
            if not RUN_ID.fullmatch(run_id):
                raise RequestError(
                    f"a run's id is its folder's name and must match {RUN_ID.pattern}; "
                    f"got {run_id!r} ({folder})"
                )
            if run_id in seen:
                raise RequestError(f"two runs are called {run_id!r}; rename one folder")
            seen.add(run_id)
        if not 1 <= self.port <= 65_535:
            raise RequestError(f"port must be in [1, 65535], got {self.port}")
        if not self.key_digests and not is_loopback(self.host):
            raise RequestError(
                f"host {self.host} can be reached from elsewhere: set {KEYS_VARIABLE} to the keys"
                " that may call, or listen on 127.0.0.1"
            )

    @classmethod
    def of_runs(
        cls,
        folders: Sequence[Path | str],
        *,
        data: Path | str,
        api_keys: str = "",
        host: str = "127.0.0.1",
        port: int = 8000,
        store: str = "",
        bounds: Bounds = _BOUNDS,
        strategies: StrategyOptions = _STRATEGIES,
        pruning: PruningOptions = _PRUNING,
        engines: EngineOptions = _ENGINES,
        ingress_replicas: int = 1,
    ) -> ServeConfig:
        """Return the configuration for run folders; a run's id is its folder's name.

        Args:
            folders: of the runs.
            data: see the class.
            api_keys: keys with commas between, as in ``UNICUCO_API_KEYS``.
            host: see the class.
            port: see the class.
            store: see the class.
            bounds: see the class.
            strategies: see the class.
            pruning: see the class.
            engines: see the class.
            ingress_replicas: see the class.
        """
        paths = [Path(folder).expanduser().absolute() for folder in folders]
        return cls(
            runs=tuple((path.name, str(path)) for path in paths),
            data=str(Path(data).expanduser().absolute()),
            store=store,
            host=host,
            port=port,
            key_digests=digest_keys(api_keys.split(",")),
            ingress_replicas=ingress_replicas,
            bounds=bounds,
            strategies=strategies,
            pruning=pruning,
            engines=engines,
        )

    @property
    def jobs_location(self) -> str:
        """Path or URL of the jobs' database."""
        return self.store or str(Path(self.data) / "jobs.db")

    @property
    def scratch_folder(self) -> Path:
        """Where this service's engines hold what they serve; nothing else is in there."""
        if not self.engines.scratch:
            return Path(self.data) / "engines"
        digest = hashlib.sha256(self.data.encode()).hexdigest()
        return Path(self.engines.scratch) / f"unicuco-{digest[:12]}"


def digest_keys(keys: Iterable[str]) -> tuple[str, ...]:
    """Return the digests of keys, empty ones left out.

    Raises:
        RequestError: a key that is too short to be one.
    """
    words = [key.strip() for key in keys if key.strip()]
    if any(len(word) < _SHORTEST_KEY for word in words):
        raise RequestError(f"a key in {KEYS_VARIABLE} needs at least {_SHORTEST_KEY} letters")
    return tuple(hashlib.sha256(word.encode()).hexdigest() for word in words)


@functools.lru_cache(maxsize=1024)  # asked for every request
def is_loopback(host: str) -> bool:
    """Say whether an address is reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
