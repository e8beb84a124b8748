"""``strategy.json``: what a variant is, where it comes from and what its files must be.

It is the plan document plus ``format``, ``base_model``, ``run``, ``seed``, ``versions``,
``dropped_weights`` (site path -> weights set to zero or not stored any more), ``site_weights`` (of
all sites of the base model; of smaller shapes alone), ``precision`` (of fewer bits alone: those of
every site, what runs them, and what the engine receives for keys and values) and ``files`` (name ->
sha256). What this module does not know: how a variant is cut.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from unicuco.errors import VariantError
from unicuco.files import file_digest
from unicuco.types import Plan, PredictedLatency, Prediction, Request, ServedAs, Strategy

DOCUMENT_NAME: Final = "strategy.json"
FORMAT: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRef:
    """A written variant: its folder, (name, sha256) pairs of its files, and what it is."""

    path: Path
    sha256: tuple[tuple[str, str], ...]
    strategy_key: str
    served_as: ServedAs


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantDocument:
    """A variant's manifest.

    ``base_digest`` is `model_digest` of the model it was cut from, ``base_path`` where that lay
    then (a hint); ``run`` the digest of the run; ``dropped_weights`` (site path, weights set to
    zero or gone) pairs; ``site_weights`` those of all sites of the base (0: as many as are here);
    ``files`` (name, sha256) pairs; ``precision`` is JSON, empty but for fewer bits.
    """

    plan: Plan
    base_digest: str
    base_path: str
    run: str
    seed: int
    versions: tuple[tuple[str, str], ...]
    dropped_weights: tuple[tuple[str, int], ...]
    files: tuple[tuple[str, str], ...]
    site_weights: int = 0
    precision: Mapping[str, object] = field(default_factory=dict)

    @property
    def kv_cache_dtype(self) -> str:
        """The engine's flag for keys and values: auto unless KV bits were decided."""
        cache = self.precision.get("kv_cache")
        flags = cache.get("engine_flag") if isinstance(cache, Mapping) else None
        return str(flags["kv_cache_dtype"]) if isinstance(flags, Mapping) else "auto"

    def to_json(self) -> str:
        """Return the file's text; `parse` gives an equal document back."""
        document = {
            **self.plan.to_dict(),
            "format": FORMAT,
            "base_model": {"digest": self.base_digest, "path": self.base_path},
            "run": self.run,
            "seed": self.seed,
            "versions": dict(self.versions),
            "dropped_weights": dict(self.dropped_weights),
            **({"site_weights": self.site_weights} if self.site_weights else {}),
            **({"precision": dict(self.precision)} if self.precision else {}),
            "files": dict(self.files),
        }
        return json.dumps(document, indent=1, allow_nan=False) + "\n"

    @classmethod
    def parse(cls, text: str) -> VariantDocument:
        """Read the file's text.

        Raises:
            ValueError: it is no such document, or of a newer format.
        """
        d: Any = json.loads(text)  # Any: JSON; every field is checked by what it is turned into
        if not isinstance(d, dict) or d.get("format") != FORMAT:
            raise ValueError(f"format must be {FORMAT}")
        try:
            return cls(
                plan=_parse_plan(d),
                base_digest=_text(d["base_model"]["digest"]),
                base_path=_text(d["base_model"]["path"]),
                run=_text(d["run"]),
                seed=int(d["seed"]),
                versions=tuple((name, _text(value)) for name, value in d["versions"].items()),
                dropped_weights=tuple((k, int(v)) for k, v in d["dropped_weights"].items()),
                files=tuple((name, _text(digest)) for name, digest in d["files"].items()),
                site_weights=int(d.get("site_weights", 0)),
                precision=dict(d.get("precision", {})),
            )
        except KeyError as error:
            raise ValueError(f"{error} is missing") from None
        except (TypeError, AttributeError) as error:
            raise ValueError(str(error)) from None


def read_variant(folder: Path, *, verify: bool = True) -> VariantDocument:
    """Read and check a variant folder.

    Args:
        folder: the variant.
        verify: also read every file and compare its sha256; without it only presence is checked.

    Raises:
        VariantError: one line that names the file that is missing, altered, unlisted or unreadable.
    """
    path = folder / DOCUMENT_NAME
    try:
        document = VariantDocument.parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise VariantError(f"{folder} is no variant: it holds no {DOCUMENT_NAME}") from None
    except (OSError, ValueError) as error:
        raise VariantError(f"{path} can't be read: {error}; cut the variant again") from None
    listed = dict(document.files)
    for name, digest in listed.items():
        _check_file(folder / name, digest if verify else None)
    # An engine loads every weight file it finds, listed or not.
    for extra in sorted(folder.glob("*.safetensors")):
        if extra.name not in listed:
            raise VariantError(f"{extra} does not belong to the variant; remove it")
    return document


def _check_file(path: Path, digest: str | None) -> None:
    try:
        if digest is None:
            path.stat()
            return
        found = file_digest(path)
    except OSError as error:
        raise VariantError(f"{path} is missing or can't be read: {error.strerror}") from None
    if found != digest:
        raise VariantError(f"{path} was altered after the variant was written; cut it again")


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _parse_plan(d: Mapping[str, Any]) -> Plan:
    settings = d["strategy"]["settings"]
    kl, latency = d["predicted"]["kl"], d["predicted"].get("latency")
    return Plan(
        request=Request.from_dict(d["request"]),
        strategy=Strategy(settings=tuple((k, float(v)) for k, v in settings.items())),
        sparsity=float(d["sparsity"]),
        kept_params=int(d["kept_params"]),
        total_params=int(d["total_params"]),
        num_bytes=int(d["bytes"]),
        served_as=ServedAs(d["served_as"]),
        packed_bytes=None if "packed_bytes" not in d else int(d["packed_bytes"]),
        kv_bytes=None if "kv_bytes" not in d else int(d["kv_bytes"]),
        kl=Prediction(mean=float(kl["mean"]), lo95=float(kl["lo95"]), hi95=float(kl["hi95"])),
        latency=None if latency is None else _parse_latency(latency),
    )


def _parse_latency(d: Mapping[str, Any]) -> PredictedLatency:
    return PredictedLatency(
        batch=int(d["batch"]),
        ms=float(d["ms_per_token"]),
        dense_ms=float(d["dense_ms_per_token"]),
    )
