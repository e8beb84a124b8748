"""Results on disk: one file per part and setting, written after every finished job, and resumed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, provenance
from unicuco.files import replace_bytes

WORK = Path(__file__).parent.parent / "out" / "benchmarks"  # ignored by git


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What every number of a table has in common."""

    model: str
    tokens: int
    test_tokens: int

    @property
    def tag(self) -> str:
        """A name for folders and files."""
        return f"{Path(self.model).name}-{self.tokens}"


@dataclass(frozen=True, kw_only=True)
class Record:
    """One method at one sparsity with one seed.

    ``kl`` and ``perplexity`` on test text, ``search_kl`` on the text that searches see; ``seconds``
    of CPU time of one thread and ``wall_s`` for this request alone; ``units`` of forward passes
    likewise; ``curve`` the best KL on the search text against units.
    """

    seed: int
    sparsity: float
    kl: float
    perplexity: float
    search_kl: float
    seconds: float
    wall_s: float
    units: float
    evaluations: int
    curve: list[list[float]]


@dataclass(frozen=True, kw_only=True)
class Once:
    """What a method costs once for all requests: preparation, and learning if it learns."""

    seed: int
    seconds: float
    wall_s: float
    units: float


def result_file(setting: Setting, part: str) -> Path:
    """Return where a part's results are kept."""
    return RESULTS / "quality" / setting.tag / f"{part}.json"


class Ledger:
    """The results of one part."""

    def __init__(self, setting: Setting, part: str, kind: str) -> None:
        self._setting = setting
        self._part = part
        self._kind = kind
        self.path = result_file(setting, part)
        self.records: list[Record] = []
        self.once: list[Once] = []
        if self.path.exists():
            document = json.loads(self.path.read_text())
            if document["setting"] == asdict(setting):
                self.records = [Record(**fields) for fields in document["records"]]
                self.once = [Once(**fields) for fields in document["once"]]

    def has(self, seed: int, sparsities: tuple[float, ...]) -> bool:
        """Whether all of a job's results are there."""
        there = {record.sparsity for record in self.records if record.seed == seed}
        return there >= set(sparsities)

    def add(self, records: list[Record], once: Once) -> None:
        """Take the results of a job, in place of older ones, and write the file."""
        new = {(record.seed, record.sparsity) for record in records}
        kept = [record for record in self.records if (record.seed, record.sparsity) not in new]
        self.records = sorted([*kept, *records], key=lambda r: (r.seed, r.sparsity))
        others = [item for item in self.once if item.seed != once.seed]
        self.once = sorted([*others, once], key=lambda item: item.seed)
        write(
            self.path,
            {
                "part": self._part,
                "kind": self._kind,
                "setting": asdict(self._setting),
                "records": [asdict(record) for record in self.records],
                "once": [asdict(item) for item in self.once],
            },
        )


# Any: JSON
def write(path: Path, document: dict[str, Any]) -> None:
    """Write a document with its provenance, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"provenance": provenance(), **document}, indent=1) + "\n"
    replace_bytes(path, text.encode())
