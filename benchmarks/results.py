"""Everything that a run found, as it is written to results.json and read back."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.plan import Plan
from benchmarks.ratios import Sample


@dataclass(frozen=True)
class Fresh:
    """What a process that was started anew did. Seconds and bytes."""

    peer: str
    imports: float
    load: float
    first_prefill: float  # the first call, whatever it compiles or allocates included
    loaded_bytes: int  # the most memory up to here
    peak_bytes: int  # and after a prefill and some steps


@dataclass(frozen=True)
class Recording:
    """The same work with and without keeping the attention weights. Seconds and bytes."""

    round: int
    peer: str
    what: str  # "prefill" or "decode"
    plain: float
    recorded: float
    bytes: int
    close: float = 0.0  # of a recorder, until all is on the disk

    @property
    def ratio(self) -> float:
        """The time of recording, without closing, over that of not recording."""
        return self.recorded / self.plain


@dataclass(frozen=True)
class Drawn:
    """A picture made in a process of its own."""

    round: int
    what: str  # such as "target@256", or "graph@30000"; "dot@30000" is graphviz's own layout of that graph
    seconds: dict[str, float]  # by part of the work
    peak_bytes: int  # the most memory that the process had; 0 where it is not what was looked at
    ended: bool = True  # or else it was stopped after so many seconds

    @property
    def whole(self) -> float:
        """Seconds of all parts."""
        return sum(self.seconds.values())


@dataclass
class Results:
    """A run."""

    date: str
    command: str
    plan: Plan
    model: str
    kind: str  # of most of the file's matrices
    n_weights: int
    n_bytes: dict[str, int]  # of all weights, by group
    machine: dict[str, str]
    versions: dict[str, str]
    about: dict[str, str] = field(default_factory=dict)  # what a peer says of itself
    skipped: dict[str, str] = field(default_factory=dict)  # peers that could not be measured, or not to the end, and why
    notes: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    fresh: list[Fresh] = field(default_factory=list)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)  # by peer: max, rms; same: 1 for nanokv float32's bits
    recordings: list[Recording] = field(default_factory=list)
    levels: dict[str, float] = field(default_factory=dict)  # bytes on disk for a position of a prefill, by level
    commands: dict[str, list[float]] = field(default_factory=dict)  # seconds: "import nanokv", "first token"
    drawings: list[Drawn] = field(default_factory=list)
    minutes: float = 0.0  # that it took

    def save(self, path: Path) -> None:
        """Write it as JSON, numbers to six digits."""
        lines = json.dumps(_rounded(asdict(self)), separators=(",", ":")).replace('{"round"', '\n{"round"')  # one a sample
        path.write_text(lines + "\n")

    @staticmethod
    def load(path: Path) -> Results:
        """Read it back."""
        said = json.loads(path.read_text())
        said["plan"] = Plan(**{**said["plan"], "contexts": tuple(said["plan"]["contexts"])})
        for name, make in (("samples", Sample), ("fresh", Fresh), ("recordings", Recording), ("drawings", Drawn)):
            said[name] = [make(**each) for each in said.get(name, [])]
        return Results(**said)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, (list, tuple)) else value
