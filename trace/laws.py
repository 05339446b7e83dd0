"""Laws: what must hold of every trace, whatever the model; and who breaks them.

The cache reports what it was asked to write and to read, so these are about what happened, not about what was meant. What
an intervention (`nanokv.edits`) did is exempt. The tests themselves stand in `laws_of_memory` and `laws_of_numbers`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from nanokv.errors import TraceError
from nanokv.trace import laws_of_memory as memory
from nanokv.trace import laws_of_numbers as numbers
from nanokv.trace.schema import holds

if TYPE_CHECKING:
    from nanokv.trace.store import Trace

MOST = 1000  # ids that are named of a law


@dataclass(frozen=True)
class Law:
    """Something that must hold. `test` yields each id that breaks it, and what is wrong with it."""

    name: str
    level: str  # from which level on a trace shows it
    says: str
    test: Callable[[Trace], Iterator[tuple[str, str]]]
    whole_rows: bool = False  # whether topk hides it


LAWS = (
    Law("positions", "writes", "each call begins where the one before it ended", memory.positions),
    Law("written once", "writes", "each slot is written exactly once, in every layer, and holds the position of its number",
        memory.written_once),
    Law("unchanged", "writes", "at every audit each slot holds what was written", memory.unchanged),
    Law("read after write", "writes", "no slot is read before it was written", memory.read_after_write),
    Law("mask", "writes", "each position reads exactly the slots that its mask allows", memory.mask),
    Law("heads", "writes", "query head h reads key/value head h // (H/G) of its own layer", memory.heads),
    Law("types", "writes", "every floating array has the trace's type, float32", numbers.types),
    Law("weights", "weights", "the weights of a head and position are not negative and sum to 1", numbers.weights),
    Law("hashes", "vectors", "hashes and lengths are those of the recorded keys and values", numbers.hashes),
    Law("scores", "vectors", "a score is the query times the key of the slot that was read, scaled", numbers.scores),
    Law("softmax", "vectors", "weights are the softmax of the scores", numbers.softmax, whole_rows=True),
    Law("mixture", "vectors", "z is the sum of the values that were read, by weight", numbers.mixture, whole_rows=True),
    Law("residual", "states", "resid_pre + attn_out = resid_mid and resid_mid + mlp_out = resid_post, in bits",
        numbers.residual),
    Law("stream", "states", "resid_post of a layer is resid_pre of the next, in bits", numbers.stream),
)  # fmt: skip


@dataclass(frozen=True)
class Broken:
    """A law that a trace breaks, with the ids that break it (at most MOST), and what is wrong with each."""

    law: str
    ids: tuple[str, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        more = len(self.ids) - 1
        least = "at least " if len(self.ids) == MOST else ""
        return f"{self.law}: {self.ids[0]} {self.notes[0]}" + (f" (and {least}{more} more)" if more else "")


def check(trace: Trace) -> list[Broken]:
    """The laws that the trace breaks; [] if all that it can show hold. TraceError if it holds no call."""
    found = (broken_by(trace, law) for law in LAWS if untested(trace, law) is None)
    return [broken for broken in found if broken is not None]


def broken_by(trace: Trace, law: Law) -> Broken | None:
    """What a trace breaks of one law that it can test. TraceError if it holds no call."""
    if not len(trace.steps):
        raise TraceError("the trace holds no call: there is nothing to check")
    found = list(islice(law.test(trace), MOST))
    return Broken(law.name, tuple(name for name, _ in found), tuple(note for _, note in found)) if found else None


def untested(trace: Trace, law: Law) -> str | None:
    """Why a trace cannot test a law; None if it can."""
    if not holds(trace.level, law.level):
        return f"needs a trace of level {law.level}; this one has level {trace.level}"
    if law.whole_rows and trace.topk is not None:
        return f"needs all weights of a row; this trace keeps {trace.topk}"
    if law.name == "unchanged" and not trace.audits:
        return "needs an audit, which is made every 64 calls and at the end; this trace was cut off before the first"
    return None
