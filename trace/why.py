"""Why a number is what it is: its arithmetic, operation by operation, with its actual operands.

What stands in the trace is taken from there. What it does not hold (queries, normed states, the MLP's units) is computed
from that with the model's weights. A number's own arithmetic is told; its operands can be asked for in turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from nanokv.errors import TraceError
from nanokv.trace import schema
from nanokv.trace.arithmetic import F
from nanokv.trace.ids import SITES, Id, at_position, held, parse, reads, recorded, shape_at
from nanokv.trace.recompute import Operands, check_model, rerun
from nanokv.trace.store import Trace
from nanokv.trace.tellers import TELLERS, WITHOUT_A_MODEL
from nanokv.trace.telling import Stage, Telling, lines

if TYPE_CHECKING:
    from nanokv.transformer import Transformer

Array = np.ndarray
_STREAM = "feature {i} of {meaning}, at {dst} in layer {layer}"
SUBJECTS = {
    "pattern": "of all that {dst} reads in layer {layer} head {head}, the part that it reads of {src}",
    "scores": "the score that {dst} gives to {src} in layer {layer} head {head}",
    "q": "feature {i} of the query of {dst} in layer {layer} head {head}",
    "k": "feature {i} of the key of {dst} in layer {layer} key/value head {head}",
    "v": "feature {i} of the value of {dst} in layer {layer} key/value head {head}",
    "z": "feature {i} of what {dst} found in layer {layer} head {head}",
    "memory": "feature {i} of the memory of {dst}",
    "final_scale": "what the final norm multiplies the last state of {dst} by",
    "ln_final": "feature {i} of the last state of {dst}, normed",
    "logits": "the logit of token {i} in the prediction at {dst}",
}


@dataclass(frozen=True)
class Explanation:
    """One number's arithmetic."""

    name: str  # as asked for
    at: Id  # as layer{l}.pos{p}.site[...]
    subject: str  # what it is, in words
    value: F  # as the trace holds it, or as computed
    recorded: bool  # whether the trace holds it
    computed: F | None  # what the arithmetic gives; None where operands are missing
    stages: list[Stage]
    further: list[str]  # ids of operands, those that count most first
    notes: list[str]
    edited: bool = False  # whether the run was intervened on

    def lines(self, everything: bool = False) -> Iterator[str]:
        """In print; everything: no run of equations is folded."""
        also = f"   (= {self.at})" if str(self.at) != self.name else ""
        yield f"{self.name} = {self.value!s}{also}"
        yield self.subject
        yield from self.notes
        yield from lines(self.stages, everything)
        yield ""
        if self.computed is None:
            yield "its arithmetic takes numbers that the trace does not hold, such as weights: give the model (--model)"
        elif not self.recorded:
            yield f"{self.at} is not in the trace, but follows from what is"
        elif same_bits(self.computed, self.value):
            yield "the trace holds the same 32 bits"
        else:
            away = abs(np.float64(self.value) - np.float64(self.computed))
            cause = "an edit of this run changed it, or it was" if self.edited else "it was"
            yield f"the trace holds {self.value!s}, {away:.2g} away: {cause} computed in another order or by another program"
        if self.further:
            yield f"its operands in turn: {', '.join(dict.fromkeys(self.further[:4]))}"
        if self.stages:
            yield "fma(a, b, c) is a * b + c rounded once; (L1) and the like are rules of docs/arithmetic.md"


def why(trace: Trace, name: str, model: Transformer | None = None, *, everything: bool = False) -> Iterator[str]:
    """The arithmetic of one number in lines of text; see `explain`. everything: no run of equations is folded."""
    yield from explain(trace, name, model).lines(everything)


def explain(trace: Trace, name: str, model: Transformer | None = None) -> Explanation:
    """The arithmetic of the number that an id and indices name, such as layer1.pos5.mlp_out[7].

    With the model it goes as far as the weights, and a trace of a level below `states` will do, for the run is repeated.
    TraceError for an id that names no single number, for another model, or where the trace holds too little.
    """
    at, notes = at_position(trace, parse(name)), []
    if trace.about.dtype != "float32":
        raise TraceError(f"the trace is of a model in {trace.about.dtype}; docs/arithmetic.md orders float32")
    if len(at.index) != len(shape_at(trace, at)):
        axes = SITES[at.site].axes
        example = f"{name.split('[')[0]}[{','.join('0' * (len(axes) - len(at.index) + name.count(',') + ('[' in name)))}]"
        raise TraceError(f"{name} is more than one number: at a position, {at.site} is {list(axes)} = "
                         f"{list(shape_at(trace, at))}; choose one, as in {example}")  # fmt: skip
    source, known = trace, _known(trace, at)
    if model is not None:
        check_model(trace, model)
        if not (known and schema.holds(trace.level, "states")):
            source, other = rerun(trace, model, at.pos or 0)
            notes.append(f"the trace, of level {trace.level}, lacks operands: they come from running its tokens again")
            if other is not None:
                notes.append(f"but the cache of position {other} is not the one recorded, by its hashes: it was computed in "
                             "another order, or edited")  # fmt: skip
    operands, told, computed = Operands(source, model), Telling(), None
    if model is not None or (known and at.site in WITHOUT_A_MODEL):
        with np.errstate(all="ignore"):
            computed = TELLERS[at.site](told, operands, at)
    value = recorded(trace, at)[at.index] if held(trace, at.site) else computed
    if value is None:
        raise TraceError(f"the trace does not hold {at.site}: give the model (--model), and it is computed")
    further = told.further[::-1] if at.site.startswith("resid") else told.further
    return Explanation(name, at, _subject(trace, at), F(value), held(trace, at.site), computed, told.stages, further, notes,
                       bool(len(trace.edits["kind"])))  # fmt: skip


def _known(trace: Trace, at: Id) -> bool:
    """Whether the trace holds what the arithmetic of a site starts from. topk keeps some scores only, and a trace made
    from another program's run may have NaN for what that did not tell."""
    if at.site in ("scores", "pattern", "z"):
        if not held(trace, "scores"):
            return False
        first, stop = reads(trace._step_of(at.pos or 0), at.layer or 0, at.pos or 0)
        return not np.isnan(recorded(trace, replace(at, site="scores", index=()))[at.index[0], first:stop]).any()
    return schema.holds(trace.level, "states")


def same_bits(a: Array | F, b: Array | F) -> bool:
    """Whether two float32 arrays are equal in every bit, where NaN equals NaN."""
    a, b = np.asarray(a, F), np.asarray(b, F)
    return a.shape == b.shape and bool(np.all((a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))))


def _subject(trace: Trace, at: Id) -> str:
    origin, tokens = trace.steps[0].start, trace.tokens
    head, i = (at.index[0], at.index[-1]) if len(at.index) == 2 else (None, at.index[-1] if at.index else None)

    def token(pos: int) -> str:
        if pos < origin:
            return f"position {pos}"
        row = pos - origin
        return f"{tokens['text'][row]!r} ({pos}; step {tokens['step'][row]}, {tokens['role'][row]})"

    form = SUBJECTS.get(at.site, _STREAM)
    src = token(i) if at.site in ("pattern", "scores") and i is not None else ""
    return form.format(i=i, head=head, layer=at.layer, dst=token(at.pos or 0), src=src, meaning=SITES[at.site].meaning)
