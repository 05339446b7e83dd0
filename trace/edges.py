"""The edges of a flow as a table: how it is made, and which of them lie on strong ways to the prediction.

Layer l's edges lead from row l of states to row l + 1. A sampled edge leads from the last row of one position to row 0
of the next; it has layer -1, so that for every edge `layer` is the row it comes from (-1: the last) and `layer + 1` the
row it leads to. With feedback memory there is a row more, L + 1: a memory for each position, to which memory edges lead from
all depths of that position (their `layer` is the depth), and from which all attention edges come (theirs is the layer that
reads).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from typing import Any

import numpy as np

from nanokv.config import Config
from nanokv.errors import TraceError
from nanokv.trace.parts import LayerWeights
from nanokv.trace.spread import Influence


class Kind(IntEnum):
    """What an edge is."""

    ATTENTION = 0  # a head reads another position
    SELF = 1  # a head reads its own position
    RESIDUAL = 2  # the stream goes on
    MLP = 3  # what the MLP adds
    SAMPLED = 4  # a prediction, drawn, becomes the next position's embedding
    MEMORY = 5  # a depth's part of what a position leaves for those after it, in a feedback model


EDGE = np.dtype([
    ("kind", "i1"),  # a Kind
    ("layer", "i2"),  # -1 for sampled
    ("head", "i2"),  # -1 where there is none, or heads are merged
    ("dst", "i4"),  # the position that reads
    ("src", "i4"),  # the position read
    ("weight", "f4"),  # in the unit of the measure
])  # fmt: skip


def layer_edges(weights: LayerWeights, influence: Influence, floor: float, merged: bool) -> tuple[np.ndarray, np.ndarray]:
    """One layer's edges and their influence: residual, MLP, then attention by head, dst and src.

    What is of weight 0 makes no edge, but the stream goes on even where it is 0. Nor do attention edges make one whose
    influence is not above the floor (-1: all do).
    """
    positions = np.arange(len(weights.residual))
    parts = [_table(Kind.RESIDUAL, weights.layer, -1, positions, positions, weights.residual)]
    passes = [influence.residual]
    if weights.mlp is not None and influence.mlp is not None:
        adds = np.flatnonzero(weights.mlp)
        parts.append(_table(Kind.MLP, weights.layer, -1, adds, adds, weights.mlp[adds]))
        passes.append(influence.mlp[adds])
    head, dst, src = np.nonzero(weights.attention if floor < 0 else influence.attention > floor)
    kinds = np.where(dst == src, Kind.SELF, Kind.ATTENTION)
    parts.append(_table(kinds, weights.layer, -1 if merged else head, dst, src, weights.attention[head, dst, src]))
    passes.append(influence.attention[head, dst, src])
    return np.concatenate(parts), np.concatenate(passes)


def check_finite(weights: LayerWeights) -> None:
    """TraceError unless all weights are numbers."""
    given = [w for w in (weights.attention, weights.residual, weights.mlp) if w is not None]
    if not all(np.isfinite(w).all() for w in given):
        raise TraceError(f"the edge weights of layer {weights.layer} are not all finite, so no flow can be made of this trace")


@dataclass(frozen=True)
class Count:
    """Numbers of edges."""

    crossing: int = 0  # attention from one position to another, sinks aside
    sinks: int = 0  # attention from sinks to other positions
    selves: int = 0  # attention of positions to themselves
    others: int = 0  # residual, MLP, sampled, memory

    @property
    def attention(self) -> int:
        """All attention edges."""
        return self.crossing + self.sinks + self.selves


def count(edges: np.ndarray, sinks: Sequence[int]) -> Count:
    """How many edges there are of each sort."""
    attention, selves = edges["kind"] == Kind.ATTENTION, int((edges["kind"] == Kind.SELF).sum())
    from_sinks = int((attention & np.isin(edges["src"], list(sinks))).sum())
    crossing = int(attention.sum()) - from_sinks
    return Count(crossing, from_sinks, selves, len(edges) - crossing - from_sinks - selves)


def count_all(config: Config, n: int, sinks: Sequence[int], merged: bool, mlp: bool, extra: int, feedback: bool) -> Count:
    """How many edges there are among the first n positions, whatever they weigh: an attention edge for each read. `extra`:
    how many sampled and memory edges."""
    dst, per_layer, total = np.arange(n), 1 if merged else config.n_heads, Count()
    for layer in range(config.n_layers):
        first = np.maximum(dst + 1 - (config.window_of(layer) or n), 0)
        reads = int((dst - first).sum())
        from_sinks = sum(int(((first <= pos) & (pos < dst)).sum()) for pos in sinks)
        others = n * (2 if mlp else 1)
        selves = 0 if feedback else per_layer * n
        there = Count(per_layer * (reads - from_sinks), per_layer * from_sinks, selves, others)
        total = Count(*(getattr(total, f.name) + getattr(there, f.name) for f in fields(Count)))
    return replace(total, others=total.others + extra)


class Pool:
    """Takes a flow's edges layer by layer, the last first; of more attention edges than `most`, it keeps the strongest."""

    def __init__(self, sinks: Sequence[int], merged: bool, most: int) -> None:
        self.sinks, self.merged, self.most = list(sinks), merged, most
        self.total = 0.0  # influence of the crossing edges
        self.of_sinks = dict.fromkeys(self.sinks, 0.0)  # what the weights of the edges from each to others sum to
        self._floor = -1.0  # of influence, below which there are `most` stronger ones
        self._tables: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, weights: LayerWeights, influence: Influence) -> None:
        """One layer more."""
        self._tables.append(layer_edges(weights, influence, self._floor, self.merged))
        crossing = influence.attention.sum(axis=0)  # [dst, src]
        np.fill_diagonal(crossing, 0)  # edges from sinks have none
        self.total += float(crossing.sum())
        for pos in self.sinks:
            self.of_sinks[pos] += float(weights.attention[:, pos + 1 :, pos].sum(dtype=np.float64))
        if sum(len(edges) for edges, _ in self._tables) > 2 * self.most:
            self._squeeze()

    def close(self, extra: np.ndarray, extra_influence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The edges, layer by layer upwards, then the extra ones; and their influence."""
        self._squeeze()
        tables = [*reversed(self._tables), (extra, extra_influence)]
        return np.concatenate([edges for edges, _ in tables]), np.concatenate([passes for _, passes in tables])

    def _squeeze(self) -> None:
        """Let go of the weakest attention edges; of equal ones, of those of lower layers, higher heads and positions."""
        attention = [(edges["kind"] == Kind.ATTENTION) | (edges["kind"] == Kind.SELF) for edges, _ in self._tables]
        strengths = np.concatenate([passes[mask] for (_, passes), mask in zip(self._tables, attention, strict=True)])
        if len(strengths) <= self.most:
            return
        self._floor = float(-np.partition(-strengths, self.most)[self.most])
        room = self.most - int((strengths > self._floor).sum())
        for i, ((edges, passes), mask) in enumerate(zip(self._tables, attention, strict=True)):
            equal = np.flatnonzero(mask & (passes == self._floor))[:room]
            room -= len(equal)
            keep = ~mask | (passes > self._floor)
            keep[equal] = True
            self._tables[i] = edges[keep], passes[keep]


def sampled_edges(positions: np.ndarray, weights: Any = 1.0) -> np.ndarray:
    """The edges into positions whose token was drawn from the prediction before: the only ones into their embeddings."""
    return _table(Kind.SAMPLED, -1, -1, positions, positions - 1, weights)


def memory_edges(weights: np.ndarray, there: np.ndarray) -> np.ndarray:
    """The edges from each depth of a position to its memory, where `there` is one: both [L + 1, n]."""
    pos, depth = np.nonzero(there.T)
    return _table(Kind.MEMORY, depth, -1, pos, pos, weights[depth, pos])


def _table(kind: Any, layer: Any, head: Any, dst: np.ndarray, src: np.ndarray, weight: Any) -> np.ndarray:
    edges = np.empty(len(dst), EDGE)
    for name, column in zip(EDGE.names or (), (kind, layer, head, dst, src, weight), strict=True):
        edges[name] = column
    return edges


def ends(edges: np.ndarray, n_layers: int, feedback: bool) -> tuple[np.ndarray, np.ndarray]:
    """The rows of states that each edge leads from and to, [E] each."""
    below, above = edges["layer"] % (n_layers + 1), edges["layer"] + 1
    if feedback:
        below = np.where(edges["kind"] == Kind.ATTENTION, n_layers + 1, below)
        above = np.where(edges["kind"] == Kind.MEMORY, n_layers + 1, above)
    return below, above


def sweep(edges: np.ndarray, n_layers: int, feedback: bool) -> Iterator[np.ndarray]:
    """Groups of edge indices, from the prediction back: when a group comes, all edges that lead on from it have been.

    Within a run of positions that were not sampled one from another, all that leads to a row is one group. A sampled edge
    comes from the top of the run before, so the runs follow each other, the last one first. A memory is read by later
    positions in all rows, so that with feedback each position is a run.
    """
    starts = np.full(int(edges["dst"].max(initial=0)) + 1, int(feedback))
    starts[edges["dst"][edges["kind"] == Kind.SAMPLED]] = 1
    rank = np.cumsum(starts)[edges["dst"]] * (n_layers + 2) + ends(edges, n_layers, feedback)[1]
    order = np.argsort(rank, kind="stable")  # upwards, as the table is for the most part already
    groups = np.split(order, np.flatnonzero(np.diff(rank[order])) + 1)
    yield from (group for group in reversed(groups) if len(group))


def weakest_link(edges: np.ndarray, crossing: np.ndarray, influence: np.ndarray, n_layers: int, at: int,
                 feedback: bool) -> np.ndarray:  # fmt: skip
    """How weak the weakest link is on the strongest way from each crossing edge to the prediction: [E] float64.

    The links are the crossing edges on the way, the edge itself among them; the strongest way is the one whose weakest
    link has the most influence. Ways within a position, and sampled edges, are free. 0 for edges that do not cross.
    """
    best = np.zeros((n_layers + 1 + feedback, at + 1))  # the same of each state
    best[n_layers, at] = np.inf
    link, (below, above) = np.zeros(len(edges)), ends(edges, n_layers, feedback)
    for group in sweep(edges, n_layers, feedback):
        edge, crosses = edges[group], crossing[group]
        ahead = best[above[group], edge["dst"]]
        link[group] = np.where(crosses, np.minimum(influence[group], ahead), 0)
        free = (edge["src"] == edge["dst"]) | (edge["kind"] == Kind.SAMPLED)
        np.maximum.at(best, (below[group], edge["src"]), np.where(free, ahead, link[group]))
    return link


def on_the_way(edges: np.ndarray, kept: np.ndarray, strong: np.ndarray, n_layers: int, at: int,
               feedback: bool) -> np.ndarray:  # fmt: skip
    """Which edges to keep beside the kept crossing ones: [E] bool.

    Residual and memory edges that lie on a way from a token to the prediction; self-attention and MLP edges there if
    `strong` [E]; sampled edges there if strong, or if their source is a position that has kept edges as well.
    """
    busy = np.zeros(at + 1, bool)
    busy[[at, *edges["src"][kept], *edges["dst"][kept]]] = True
    # The states from which a kept way leads to the prediction, or a kept edge.
    live = np.zeros((n_layers + 1 + feedback, at + 1), bool)
    live[n_layers, at] = True
    result, (below, above) = np.zeros(len(edges), bool), ends(edges, n_layers, feedback)
    looked_at = np.flatnonzero(kept | (edges["kind"] != Kind.ATTENTION))
    for group in sweep(edges[looked_at], n_layers, feedback):
        these = looked_at[group]
        edge = edges[these]
        leads, goes_on = live[above[these], edge["dst"]], np.isin(edge["kind"], (Kind.RESIDUAL, Kind.MEMORY))
        joins = (edge["kind"] == Kind.SAMPLED) & busy[edge["src"]]
        result[these] = leads & ~kept[these] & (goes_on | joins | strong[these])
        np.logical_or.at(live, (below[these], edge["src"]), kept[these] | (leads & result[these]))
    return result
