"""How much an edge counts: the measures, each a generator of one layer's edge weights after another.

A head h that reads position j for position i adds the part u = a v_j W_O^h to the residual stream, where a is the
attention weight and v_j the cached value. The measures differ in what of this they look at:

- `attention`: a alone. It needs no model, and says nothing about what was moved: a sink draws much and moves little.
- `norm`: the length of u (Kobayashi et al. 2020, "Attention is Not Only a Weight", arXiv 2004.10102).

A measure is a function (trace, model, goal, merged) -> iterator of LayerWeights, in any order of layers; one that needs
a sweep from the prediction down yields the last layer first. MEASURES names them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from nanokv.config import Config
from nanokv.errors import TraceError
from nanokv.trace import schema


class TraceLike(Protocol):
    """What a measure asks of a trace. S positions."""

    @property
    def config(self) -> Config: ...
    @property
    def level(self) -> str: ...
    @property
    def tokens(self) -> Mapping[str, np.ndarray]: ...
    def pattern(self, layer: int) -> np.ndarray: ...  # [H, S, S]: rows dst, columns src
    def values(self, layer: int) -> np.ndarray: ...  # [S, G, hd]
    def state(self, site: str, layer: int) -> np.ndarray: ...  # [S, D]
    def logits(self, pos: int) -> np.ndarray | None: ...  # [V]


@dataclass(frozen=True)
class Goal:
    """What the flow is to explain: the prediction at a position, and the logit or difference of two to aim at."""

    at: int  # the position whose prediction it is
    token: int | None = None  # the id that is predicted; None where the trace holds no logits
    against: int | None = None  # the id whose logit is subtracted


@dataclass(frozen=True)
class LayerWeights:
    """One layer's edge weights among the n positions up to the goal's."""

    layer: int
    attention: np.ndarray  # [H, n, n], or [1, n, n] with heads merged: rows dst, columns src; the diagonal is self-attention
    residual: np.ndarray  # [n]
    mlp: np.ndarray | None  # [n]; None where the measure knows nothing of the MLP
    received: np.ndarray  # [n] attention that a position draws from those after it, the next one aside: mean over heads and dst
    moved: np.ndarray | None = None  # [H, n] length of v_j W_O^h, where known


@dataclass(frozen=True)
class Measure:
    """A measure, what it needs, and how a picture names it."""

    name: str
    weights: Callable[[TraceLike, Any, Goal, bool], Iterator[LayerWeights]]
    needs: Literal["weights", "vectors", "states"]  # the lowest level of trace that it can be taken of
    model: bool  # whether it needs the model's weights
    unit: str  # what an attention edge's weight is, in words
    stream: str  # what a residual edge's weight is
    aimed: bool = False  # whether the weights depend on the goal's token; then they are signed, for and against


def attention(trace: TraceLike, model: Any, goal: Goal, merged: bool) -> Iterator[LayerWeights]:
    """The attention weight a itself; with heads merged, its mean over the heads.

    The residual edge counts as much as all the heads of its layer together (H, or 1 when merged), as in the attention
    rollout of Abnar and Zuidema 2020: attention says nothing about its size. It says nothing about the MLP, so there
    are no MLP edges.
    """
    n = goal.at + 1
    for layer in range(trace.config.n_layers):
        pattern = trace.pattern(layer)[:, :n, :n]  # [H, n, n]
        weights = pattern.mean(axis=0, keepdims=True) if merged else pattern
        yield LayerWeights(layer, weights, np.full(n, len(weights), np.float32), None, received(pattern))


def norm(trace: TraceLike, model: Any, goal: Goal, merged: bool) -> Iterator[LayerWeights]:
    """The Euclidean length of what an edge adds to the stream: |a| * ||v_j W_O^h||; with heads merged, ||sum over h||.

    The length of the sum is not the sum of the lengths: heads that cancel each other count as nothing. Residual edges
    have the length of resid_pre, MLP edges that of mlp_out. A norm after the attention (Gemma) is folded in as the
    linear map that it was in this run. The output bias bo is nobody's part.
    """
    n, config = goal.at + 1, trace.config
    for layer in range(config.n_layers):
        block = model.weights.blocks[layer]
        pattern = trace.pattern(layer)[:, :n, :n]  # [H, n, n]
        outputs = head_outputs(trace.values(layer)[:n], np.asarray(block.wo), config.n_heads)  # [H, n, D]
        scale = np.ones(n, np.float32)
        if config.post_norms and config.norm != "none":
            outputs, scale = _through_norm(pattern, outputs, block, config)
        moved = np.linalg.norm(outputs, axis=-1)  # [H, n]
        weights = _merged_norm(pattern, outputs)[None] if merged else np.abs(pattern) * moved[:, None, :]
        lengths = [np.linalg.norm(trace.state(site, layer)[:n], axis=-1) for site in ("resid_pre", "mlp_out")]
        yield LayerWeights(layer, weights * scale[:, None], lengths[0], lengths[1], received(pattern), moved)


def head_outputs(values: np.ndarray, wo: np.ndarray, n_heads: int) -> np.ndarray:
    """v_j W_O^h for every head h and position j: values [n, G, hd] and wo [D, H*hd] -> [H, n, D]."""
    _, n_kv_heads, head_dim = values.shape
    by_head = np.ascontiguousarray(wo.T).reshape(n_heads, head_dim, -1)  # [H, hd, D]
    return np.ascontiguousarray(values.transpose(1, 0, 2)).repeat(n_heads // n_kv_heads, axis=0) @ by_head


def received(pattern: np.ndarray) -> np.ndarray:
    """Attention that each position draws from those at least two after it, mean over heads and dst: [H, n, n] -> [n].

    The next position is left out: a head that always reads the token before makes no sink of it.
    """
    n = pattern.shape[-1]
    readers = np.maximum(n - 2 - np.arange(n), 1)
    return np.tril(pattern.mean(axis=0), -2).sum(axis=0) / readers


def _through_norm(pattern: np.ndarray, outputs: np.ndarray, block: Any, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """The norm after the attention as the linear map that it was.

    Returns what it makes of the heads' outputs [H, n, D], but for a factor at each dst, and that factor [n].
    """
    written = (pattern @ outputs).sum(axis=0) + (0 if block.bo is None else block.bo)  # [n, D]
    if config.norm == "layer":
        outputs, written = (x - x.mean(axis=-1, keepdims=True) for x in (outputs, written))
    scale = 1 / np.sqrt((written * written).mean(axis=-1) + config.norm_eps)  # [n]
    return outputs * block.post_attn_norm, scale


def _merged_norm(pattern: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """||sum over h of a_hij v_j W_O^h||: [H, n, n] and [H, n, D] -> [n, n].

    From the inner products of the heads' outputs at each src, so that no [n, n, D] is formed.
    """
    squares = np.zeros(pattern.shape[1:], np.float32)
    for h in range(len(pattern)):
        for other in range(h + 1):
            inner = (outputs[h] * outputs[other]).sum(axis=-1) * (1 if other == h else 2)  # [src]
            squares += pattern[h] * pattern[other] * inner
    return np.sqrt(np.maximum(squares, 0))


MEASURES = {
    "attention": Measure("attention", attention, "weights", False, "attention weight", ""),
    "norm": Measure("norm", norm, "states", True, "length of what a head moves, ‖a·v·W_O‖", "its length"),
}


def find(name: str, trace: TraceLike, model: Any) -> Measure:
    """The measure of that name, if this trace and model allow it; otherwise a TraceError that says what is missing."""
    if name not in MEASURES:
        raise TraceError(f"there is no measure {name!r}; there are: {', '.join(MEASURES)}")
    measure = MEASURES[name]
    if not schema.holds(trace.level, measure.needs):
        raise TraceError(
            f"measure {name!r} needs a trace of level {measure.needs!r}; this one has level {trace.level!r}. Record it "
            f"again with Recorder(level={measure.needs!r})"
        )
    if measure.model and model is None:
        raise TraceError(f"measure {name!r} needs the model whose trace this is: trace.flow(model, measure={name!r})")
    if measure.model and model.config != trace.config:
        raise TraceError(f"measure {name!r} was given another model than the one that was traced: their configs differ")
    return measure
