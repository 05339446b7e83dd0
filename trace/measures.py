"""How much an edge counts: the measures, each a generator of one layer's edge weights after another, the last first.

- `attention`: the attention weight alone. It needs no model, and says nothing about what was moved: a sink draws much and
  moves little.
- `rollout`: the attention weights multiplied up over the layers, on the way to the prediction (`rollout.py`).
- `norm`: the length of what an edge adds to the stream (Kobayashi et al. 2020, "Attention is Not Only a Weight", arXiv
  2004.10102).
- `proximity`: how much nearer it brings the stream to what it becomes (`proximity.py`).
- `target`: what it does for the predicted logit, or the difference of two, all else held (`target.py`).
- `knockout`, `value-zero`: what the logit, or the difference, loses without it, by running again (`knockout.py`).

The first, third and fourth weigh the edges into a state against each other: how much of that reaches the prediction is
found by sharing it out from the prediction down (`spread.py`). The weights of the others are of the prediction already.

A measure is a function (trace, model, goal, merged) -> iterator of LayerWeights. MEASURES names them. Of a feedback model
`memory.py` takes them, and says what each depth gave to a memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from nanokv.errors import TraceError
from nanokv.trace import schema
from nanokv.trace.knockout import knockout, value_zero
from nanokv.trace.parts import Array, Goal, LayerWeights, TraceLike, attention_parts
from nanokv.trace.proximity import proximity
from nanokv.trace.rollout import rollout
from nanokv.trace.target import target

Heads = Literal["apart", "merged", "summed"]
Weights = Callable[[TraceLike, Any, Goal, bool], Iterator[LayerWeights]]


@dataclass(frozen=True)
class Measure:
    """A measure, what it needs, and how a picture names it."""

    name: str
    weights: Weights
    needs: Literal["writes", "weights", "vectors", "states"]  # the lowest level of trace that it can be taken of
    model: bool  # whether it needs the model's weights
    unit: str  # what an attention edge's weight is, in words
    stream: str = ""  # what a residual edge's weight is, if anything
    whole: bool = False  # whether a weight is of the whole prediction, rather than of the state that the edge leads to
    aimed: bool = False  # whether the weights depend on the goal's token; then they are signed, for and against

    def layers(self, trace: TraceLike, model: Any, goal: Goal, heads: Heads) -> Iterator[LayerWeights]:
        """The weights, the last layer first. merged: the heads' parts are added up, then weighed; summed: the other way."""
        for weights in self.weights(trace, model, goal, heads == "merged"):
            if heads == "summed":
                weights = replace(weights, attention=weights.attention.sum(axis=0, keepdims=True))
            yield weights


def attention(trace: TraceLike, model: Any, goal: Goal, merged: bool) -> Iterator[LayerWeights]:
    """The attention weight a itself; with heads merged, its mean over the heads.

    The residual edge counts as much as all the heads of its layer together (H, or 1 when merged), as in the attention
    rollout of Abnar and Zuidema 2020: attention says nothing about its size. It says nothing about the MLP, so there
    are no MLP edges.
    """
    n = goal.at + 1
    for layer in reversed(range(trace.config.n_layers)):
        pattern = trace.pattern(layer)[:, :n, :n]  # [H, n, n]
        weights = pattern.mean(axis=0, keepdims=True) if merged else pattern
        yield LayerWeights(layer, weights, np.full(n, len(weights), np.float32))


def norm(trace: TraceLike, model: Any, goal: Goal, merged: bool) -> Iterator[LayerWeights]:
    """The Euclidean length of what an edge adds to the stream: |a| * ||v_j W_O^h||; with heads merged, ||sum over h||.

    The length of the sum is not the sum of the lengths: heads that cancel each other count as nothing. Residual edges
    have the length of resid_pre, MLP edges that of mlp_out. A norm after the attention (Gemma) is folded in as the
    linear map that it was in this run. The output bias bo is nobody's part.
    """
    n, config = goal.at + 1, trace.config
    for layer in reversed(range(config.n_layers)):
        pattern = trace.pattern(layer)[:, :n, :n]  # [H, n, n]
        outputs, scale, bias = attention_parts(pattern, trace.values(layer)[:n], model.weights.blocks[layer], config)
        weights = _merged_norm(pattern, outputs)[None] if merged else np.abs(pattern) * lengths(outputs)[:, None, :]
        stream, mlp = (lengths(trace.state(site, layer)[:n]) for site in ("resid_pre", "mlp_out"))
        yield LayerWeights(layer, weights * scale[:, None], stream, mlp, bias=lengths(bias))


def lengths(x: Array) -> Array:  # [..., D] -> [...]
    """The Euclidean length of each row."""
    return np.sqrt((x * x).sum(axis=-1))


def _merged_norm(pattern: Array, outputs: Array) -> Array:
    """||sum over h of a_hij v_j W_O^h||: [H, n, n] and [H, n, D] -> [n, n].

    From the inner products of the heads' outputs at each src, so that no [n, n, D] is formed.
    """
    squares = np.zeros(pattern.shape[1:], np.float32)
    for h in range(len(pattern)):
        for other in range(h + 1):
            inner = (outputs[h] * outputs[other]).sum(axis=-1) * (1 if other == h else 2)  # [src]
            squares += pattern[h] * pattern[other] * inner
    return np.sqrt(np.maximum(squares, 0))


_LOGIT = "effect on the logit"
MEASURES = {
    measure.name: measure
    for measure in (
        Measure("target", target, "states", True, f"{_LOGIT}, all else held", "effect of what it held", True, True),
        Measure("norm", norm, "states", True, "length of what a head moves, ‖a·v·W_O‖", "its length"),
        Measure("proximity", proximity, "states", True, "part of the state, by nearness", "part of the state"),
        Measure("attention", attention, "weights", False, "attention weight"),
        Measure("rollout", rollout, "weights", False, "part of the prediction, by attention alone", "its part", True),
        Measure("knockout", knockout, "writes", True, f"{_LOGIT} lost if it is not read", "", True, True),
        Measure("value-zero", value_zero, "writes", True, f"{_LOGIT} lost with what it brings", "", True, True),
    )
}


def find(name: str | None, trace: TraceLike, model: Any) -> Measure:
    """The measure of that name, if this trace and model allow it; otherwise a TraceError that says what is missing.

    None is the best there is: `target` for a trace of level `states` with its model, else `attention`.
    """
    if name is None:
        whole = schema.holds(trace.level, "states") and getattr(trace, "topk", None) is None
        name = "target" if model is not None and whole else "attention"
    if name not in MEASURES:
        raise TraceError(f"there is no measure {name!r}; there are: {', '.join(MEASURES)}")
    measure = MEASURES[name]
    if not schema.holds(trace.level, measure.needs):
        raise TraceError(
            f"measure {name!r} needs a trace of level {measure.needs!r}; this one has level {trace.level!r}. Record it "
            f"again with Recorder(level={measure.needs!r})"
        )
    topk = getattr(trace, "topk", None)
    if topk is not None and measure.needs != "writes" and name != "attention":
        raise TraceError(f"measure {name!r} needs all weights of a row; this trace keeps the {topk} largest: record it "
                         "again without topk, or use measure 'attention'")  # fmt: skip
    if measure.model:
        check_model(f"measure {name!r}", trace, model)
    return measure


def check_model(what: str, trace: TraceLike, model: Any) -> None:
    """TraceError unless the model is the one that was traced: its config, and its hash where the trace has one."""
    if model is None:
        raise TraceError(f"{what} needs the model whose trace this is, as in trace.flow(model)")
    if model.config != trace.config:
        raise TraceError(f"{what} was given another model than the one that was traced: their configs differ")
    if getattr(trace, "_model", None) is model:
        return
    known = getattr(trace, "model_hash", "")
    if known and model.fingerprint != known:
        raise TraceError(f"{what} was given another model than the one that was traced: its weights hash to "
                         f"{model.fingerprint[:12]}, those of the trace to {known[:12]}")  # fmt: skip
