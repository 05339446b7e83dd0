"""What was to be reached on SmolLM2-135M with two threads, said before it was measured.

A race's number is the rival's time over nanokv's in the same round, so that more is better for nanokv.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.plan import GROWN_FROM, GROWN_TO
from benchmarks.ratios import Spread, growth, races, spread
from benchmarks.results import Results

Numbers = Callable[[Results], list[float]]


@dataclass(frozen=True)
class Goal:
    """One row of the table of goals."""

    what: str
    compared: str  # with what
    limit: float
    unit: str  # "x", "MB" or "s"
    numbers: Numbers  # what was measured of it
    at_least: bool = True  # or at most

    def measured(self, results: Results) -> Spread | None:
        """None if it was not measured."""
        return spread(self.numbers(results))

    def met(self, found: Spread) -> bool:
        """Whether the median reaches the limit."""
        return found.median >= self.limit if self.at_least else found.median <= self.limit


def goals() -> list[Goal]:
    """All of them, in the order of the table."""
    return [*_float32(), *_packed(), *_rest()]


def _float32() -> Iterator[Goal]:
    own = "nanokv float32"
    for rival, limit in (("read float32", 0.95), ("llama.cpp F32", 1.5), ("transformers", 4.0)):
        yield Goal("float32 decode, context 16", rival, limit, "x", race("decode@16", own, rival))
    before, after = f"decode@{GROWN_FROM}", f"decode@{GROWN_TO}"
    yield Goal("float32 decode, context 2048", "itself at context 16", 1.3, "x",
               lambda results: growth(results.samples, own, before, after), at_least=False)  # fmt: skip
    for rival in ("llama.cpp F32", "transformers"):
        yield Goal("float32 prefill of 512", rival, 1.2, "x", race("prefill@512", own, rival))


def _packed() -> Iterator[Goal]:
    for kind, limits, prefill in (("Q8_0", (1.35, 1.45, 1.5), 1.1), ("Q4_1", (1.5, 1.7, 1.8), 2.0)):
        own, rival = f"nanokv {kind}", f"llama.cpp {kind}"
        for context, limit in zip((16, 256, 1024), limits, strict=True):
            yield Goal(f"packed {kind} decode, context {context}", rival, limit, "x", race(f"decode@{context}", own, rival))
        yield Goal(f"packed {kind} prefill of 512", rival, prefill, "x", race("prefill@512", own, rival))
    yield Goal("packed Q4_1 peak memory, context 512", "", 350, "MB",
               lambda results: [each.peak_bytes / 1e6 for each in results.fresh if each.peer == "nanokv Q4_1"
                                and results.plan.prefill == 512], at_least=False)  # fmt: skip


def _rest() -> Iterator[Goal]:
    for what, limit in (("prefill", 1.15), ("decode", 1.05)):
        yield Goal(f"{what} recorded to disk, level weights", "unrecorded", limit, "x", recorded(what), at_least=False)
    yield Goal("first token of the command", "", 3.0, "s", lambda r: r.commands.get("first token", []), at_least=False)
    yield Goal("import nanokv", "", 0.3, "s", lambda r: r.commands.get("import nanokv", []), at_least=False)
    yield Goal("picture of 256 tokens by target, from the trace", "", 5.0, "s", drawn("target@256"), at_least=False)
    yield Goal("graph of 30 × 200 states and 30,000 edges, unpruned", "", 2.0, "s", drawn("graph@30000"), at_least=False)
    for measure in ("target", "proximity"):
        yield Goal(f"picture of 1,024 tokens by {measure}, peak memory", "", 2000, "MB", drawn_memory(f"{measure}@1024"),
                   at_least=False)  # fmt: skip


def drawn(what: str) -> Numbers:
    """The seconds of a picture."""
    return lambda results: [each.whole for each in results.drawings if each.what == what]


def drawn_memory(what: str) -> Numbers:
    """The megabytes of a picture."""
    return lambda results: [each.peak_bytes / 1e6 for each in results.drawings if each.what == what]


def race(measure: str, own: str, rival: str) -> Numbers:
    """The ratios of one race."""
    return lambda results: races(results.samples, measure, own, rival)


def recorded(what: str) -> Numbers:
    """What recording costs nanokv, as a ratio of times."""
    return lambda r: [each.ratio for each in r.recordings if each.peer == "nanokv float32" and each.what == what]
