"""Does the picture tell the truth? Its edges are cut, one by one and together, and others like them as a control.

A control is an edge that the flow does not show, of the same layer and into the same position, with the attention weight
nearest to that of the edge it stands beside: what remains between the two is what the measure has seen in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nanokv.cache import Slots
from nanokv.errors import TraceError
from nanokv.trace import labels
from nanokv.trace.edges import Kind
from nanokv.trace.knockout import EDITS, Edge, How, Replay, counted, effects
from nanokv.trace.parts import Goal
from nanokv.transformer import Unobserved

if TYPE_CHECKING:
    from nanokv.trace.flow import Flow

Array = np.ndarray

MOST = 200  # kept edges that are cut one by one, the strongest
CUT = np.dtype([
    ("layer", "i2"), ("head", "i2"), ("dst", "i4"), ("src", "i4"),
    ("kept", "?"),  # of the flow, or a control
    ("attention", "f4"),  # its weight; the mean over the heads where they are merged
    ("weight", "f4"),  # by the measure: what it is predicted to do, where that aims at a logit
    ("effect", "f8"),  # what the goal loses without it
])  # fmt: skip


@dataclass(frozen=True)
class Together:
    """Some edges cut together."""

    n: int
    value: float  # the goal's logit, or difference, afterwards
    answer: str  # the likeliest token afterwards


@dataclass(frozen=True)
class Proof:
    """What cutting the edges of a flow did."""

    how: How
    measure: str
    goal: str  # the logit or difference in words
    attention: int  # attention edges of the whole run
    before: Together
    steps: tuple[Together, ...]  # the strongest edge for the prediction cut, the strongest two, ... until it flips
    flips: bool  # whether the last step has another answer than the flow's prediction
    all_kept: Together  # all edges that the flow shows
    like_steps: Together  # as many controls as the last step has edges
    cuts: Array  # [C] of CUT: each alone
    correlation: float  # Spearman's, of weight and effect, or of their sizes if the measure is not signed; nan if undefined
    signed: bool

    def lines(self) -> list[str]:
        """What was found, in words."""
        how = "its score becomes -inf" if self.how == "knockout" else "what it brings is taken away"
        found = [f"{self.goal} = {self.before.value:.2f}. An edge is cut: {how} ({self.how})."]
        strongest = f"the {self.steps[-1].n} strongest of {self.attention:,} attention edges" if self.steps else ""
        for name, cut in ((strongest, self.steps[-1] if self.steps else self.before), (f"{self.like_steps.n} others of "
                          "the same layers and positions, with like attention", self.like_steps),
                          (f"all {self.all_kept.n} that the flow shows", self.all_kept)):  # fmt: skip
            if cut.n:
                found.append(f"together, {name}: {self._change(cut)}")
        kept = int(self.cuts["kept"].sum())
        what = "predicted and actual change" if self.signed else f"{self.measure} and size of change"
        ranked = f"rank correlation of {what} {self.correlation:.2f}"
        rank = "too few to rank" if np.isnan(self.correlation) else ranked
        found.append(f"one by one, {kept} shown and {len(self.cuts) - kept} others: {rank}")
        return found

    def _change(self, cut: Together) -> str:
        becomes = "the answer stays" if cut.answer == self.before.answer else "the answer becomes"
        change = cut.value - self.before.value
        return f"{self.before.value:.2f} {change:+.2f} = {cut.value:.2f}, {becomes} {labels.phrase(cut.answer)}"

    def __str__(self) -> str:
        return "\n".join(self.lines())


def verify(flow: Flow, model: Any, how: How = "value-zero") -> Proof:
    """Cut the flow's edges between positions, and as many controls. `how`: "value-zero" or "knockout" (`knockout.py`).

    Raises TraceError if the model does not predict what the flow says it did.
    """
    if how not in EDITS:
        raise TraceError(f"how is {how!r}; it must be one of {', '.join(EDITS)}")
    prediction = flow.prediction
    if prediction.token_id is None:
        raise TraceError("the flow does not say which token was predicted, so there is no logit to watch: name one with token=")
    edges = flow.edges[flow.crossing]
    order = np.argsort(-edges["weight"], kind="stable")
    kept = [_edge(edge) for edge in edges[order]]
    weights = edges["weight"][order]
    rows = _Rows({dst for _, _, dst, _ in kept}, flow.heads != "apart")
    goal = Goal(flow.at, prediction.token_id, prediction.against_id)
    replay = Replay(model, flow.tokens.token_id, rows)
    before = _together(replay, goal, [], how)
    if prediction.value is not None and abs(before.value - prediction.value) > 1e-3:
        raise TraceError(f"the model gives {before.value:.4f} where the flow has {prediction.value:.4f}: it is another model "
                         "than the one that was traced, or the run was edited")  # fmt: skip
    strong = np.argsort(-np.abs(weights), kind="stable")[:MOST].tolist()
    likes = list(_controls([kept[i] for i in strong], set(kept), rows))
    steps = tuple(_steps(replay, goal, [e for e, w in zip(kept, weights, strict=True) if w > 0], how, prediction.token_id))
    n = steps[-1].n if steps else 0
    first = {kept[i]: like for i, like in zip(strong, likes, strict=True)}
    beside = [like for edge in kept[:n] if (like := first.get(edge)) is not None]
    cuts = _cuts(flow, replay, goal, [kept[i] for i in strong], [like for like in likes if like is not None], rows, how)
    signed = flow.signed
    correlation = spearman(*((cuts["weight"], cuts["effect"]) if signed else (np.abs(cuts["weight"]), np.abs(cuts["effect"]))))
    return Proof(
        how, flow.measure, goal_in_words(flow), flow.made.attention, before, steps, _flipped(before, steps),
        _together(replay, goal, kept, how), _together(replay, goal, beside, how), cuts, correlation, signed,
    )  # fmt: skip


def goal_in_words(flow: Flow, basic: bool = False) -> str:
    """The logit, or difference of two, that the flow is to; `basic` as in `labels.visible`."""
    prediction = flow.prediction
    texts = (prediction.text,) if prediction.against is None else (prediction.text, prediction.against)
    return " − ".join(f"logit({labels.isolated(labels.visible(text[:40], basic=basic))})" for text in texts)


def spearman(a: Array, b: Array) -> float:
    """Spearman's rank correlation; equal values share their mean rank. nan where one of them does not vary."""
    ranks = [_ranks(np.asarray(x, np.float64)) for x in (a, b)]
    spreads = [r - r.mean() for r in ranks]
    size = float(np.sqrt((spreads[0] ** 2).sum() * (spreads[1] ** 2).sum()))
    return float((spreads[0] * spreads[1]).sum()) / size if size > 0 else float("nan")


def _ranks(x: Array) -> Array:
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


class _Rows(Unobserved):
    """Keeps the attention weights of some positions: {(layer, dst): [H, dst + 1]}, or their mean [1, dst + 1]."""

    def __init__(self, positions: set[int], merged: bool) -> None:
        self.positions, self.merged = positions, merged
        self.weights: dict[tuple[int, int], Array] = {}

    def wants(self, site: str) -> bool:
        return site == "pattern"

    def read(self, layer: int, start: int, slots: Slots, scores: Array | None, weights: Array | None) -> None:
        for dst in self.positions.intersection(range(start, start + len(slots.first))):
            t, ends = dst - start, slots.ranges.ends
            row = np.zeros((len(slots.kv_head), dst + 1), np.float32)
            row[:, slots.first[t] : slots.stop[t]] = weights[:, ends[t] : ends[t + 1]]  # type: ignore[index]
            self.weights[layer, dst] = row.mean(axis=0, keepdims=True) if self.merged else row

    def of(self, edge: Edge) -> float:
        layer, head, dst, src = edge
        return float(self.weights[layer, dst][max(head, 0), src])


def _edge(edge: np.void) -> Edge:
    return int(edge["layer"]), int(edge["head"]), int(edge["dst"]), int(edge["src"])


def _together(replay: Replay, goal: Goal, edges: Sequence[Edge], how: How) -> Together:
    edits = [EDITS[how](layer, dst, src, None if head < 0 else head) for layer, head, dst, src in edges]
    logits = replay.edited(edits)
    return Together(len(edges), goal.value(logits), replay.text(int(np.argmax(logits))))


def _steps(replay: Replay, goal: Goal, edges: Sequence[Edge], how: How, token: int | None) -> Iterator[Together]:
    """The first edge cut, the first two, and so on, until the answer is another one."""
    if int(np.argmax(replay.logits)) != token:
        edges = edges[:0]
    for n in range(1, len(edges) + 1):
        cut = _together(replay, goal, edges[:n], how)
        yield cut
        if token is not None and cut.answer != replay.text(token):
            return


def _flipped(before: Together, steps: Sequence[Together]) -> bool:
    return bool(steps) and steps[-1].answer != before.answer


def _controls(edges: Sequence[Edge], kept: set[Edge], rows: _Rows) -> Iterator[Edge | None]:
    """For each edge one of its layer and dst that is not kept, nor taken yet, with the nearest attention weight."""
    taken = set(kept)
    for edge in edges:
        layer, head, dst, _ = edge
        heads = (-1,) if head < 0 and rows.merged else range(len(rows.weights[layer, dst]))
        others = [(layer, h, dst, src) for h in heads for src in range(dst) if (layer, h, dst, src) not in taken]
        others = [other for other in others if rows.of(other) > 0]
        best = min(others, key=lambda other: abs(rows.of(other) - rows.of(edge)), default=None)
        if best is not None:
            taken.add(best)
        yield best


def _cuts(flow: Flow, replay: Replay, goal: Goal, kept: Sequence[Edge], likes: Sequence[Edge], rows: _Rows,
          how: How) -> Array:  # fmt: skip
    """Each edge cut alone, in order of dst, since a rerun begins there."""
    both = sorted([(edge, True) for edge in kept] + [(edge, False) for edge in likes], key=lambda cut: (cut[0][2], cut))
    weights, lost = _weights(flow), counted(effects(replay, goal, [edge for edge, _ in both], how), len(both))
    rows_of = [(*edge, is_kept, rows.of(edge), weights.get(edge, 0.0), effect)
               for (edge, is_kept), effect in zip(both, lost, strict=True)]  # fmt: skip
    return np.array(rows_of, CUT)


def _weights(flow: Flow) -> dict[Edge, float]:
    """The measure's weights of the kept edges, and of the dropped ones where the flow remembers them."""
    whole = flow if flow.whole is None else flow.whole
    edges = whole.edges[whole.edges["kind"] == Kind.ATTENTION]
    edges = edges[np.isin(edges["dst"], np.unique(flow.edges["dst"][flow.crossing]))]
    return {_edge(edge): float(edge["weight"]) for edge in edges}
