"""The edges of a flow as a table, and the arithmetic of influence on it.

Layer l's edges lead from row l of states to row l + 1. A sampled edge leads from the last row of one position to row 0
of the next; it has layer -1, so that for every edge `layer` is the row it comes from (-1: the last) and `layer + 1` the
row it leads to.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from typing import Any

import numpy as np

from nanokv.errors import TraceError
from nanokv.trace.measures import LayerWeights


class Kind(IntEnum):
    """What an edge is."""

    ATTENTION = 0  # a head reads another position
    SELF = 1  # a head reads its own position
    RESIDUAL = 2  # the stream goes on
    MLP = 3  # what the MLP adds
    SAMPLED = 4  # a prediction, drawn, becomes the next position's embedding


EDGE = np.dtype([
    ("kind", "i1"),  # a Kind
    ("layer", "i2"),  # -1 for sampled
    ("head", "i2"),  # -1 where there is none, or heads are merged
    ("dst", "i4"),  # the position that reads
    ("src", "i4"),  # the position read
    ("weight", "f4"),  # in the unit of the measure
])  # fmt: skip


def layer_edges(weights: LayerWeights, merged: bool) -> np.ndarray:
    """One layer's edges: residual, MLP, then attention by head, dst and src. What is of weight 0 makes
    no edge, but the stream goes on even where it is 0."""
    given = [w for w in (weights.attention, weights.residual, weights.mlp) if w is not None]
    if not all(np.isfinite(w).all() for w in given):
        raise TraceError(f"the edge weights of layer {weights.layer} are not all finite, so no flow can be made of this trace")
    head, dst, src = np.nonzero(weights.attention)
    positions = np.arange(len(weights.residual))
    parts = [_table(Kind.RESIDUAL, weights.layer, -1, positions, positions, weights.residual)]
    if weights.mlp is not None:
        adds = np.flatnonzero(weights.mlp)
        parts.append(_table(Kind.MLP, weights.layer, -1, adds, adds, weights.mlp[adds]))
    kinds = np.where(dst == src, Kind.SELF, Kind.ATTENTION)
    parts.append(_table(kinds, weights.layer, -1 if merged else head, dst, src, weights.attention[head, dst, src]))
    return np.concatenate(parts)


def sampled_edges(positions: np.ndarray) -> np.ndarray:
    """The edges into positions whose token was drawn from the prediction before: the only ones there, of weight 1."""
    return _table(Kind.SAMPLED, -1, -1, positions, positions - 1, 1.0)


def _table(kind: Any, layer: int, head: Any, dst: np.ndarray, src: np.ndarray, weight: Any) -> np.ndarray:
    edges = np.empty(len(dst), EDGE)
    for name, column in zip(EDGE.names or (), (kind, layer, head, dst, src, weight), strict=True):
        edges[name] = column
    return edges


def sweep(edges: np.ndarray) -> Iterator[np.ndarray]:
    """Groups of edge indices, from the prediction back: when a group comes, all edges that lead on from it have been.

    Within a run of positions that were not sampled one from another, a whole layer is one group. A sampled edge comes
    from the top of the run before, so the runs follow each other, the last one first.
    """
    starts = np.zeros(int(edges["dst"].max(initial=0)) + 1, np.int64)
    starts[edges["dst"][edges["kind"] == Kind.SAMPLED]] = 1
    rank = np.cumsum(starts)[edges["dst"]] * (int(edges["layer"].max(initial=0)) + 2) + edges["layer"]
    order = np.argsort(rank, kind="stable")  # upwards, as the table is for the most part already
    groups = np.split(order, np.flatnonzero(np.diff(rank[order])) + 1)
    yield from (group for group in reversed(groups) if len(group))


def influence(edges: np.ndarray, left_out: np.ndarray, n_layers: int, at: int) -> np.ndarray:
    """How much of what reaches the prediction at position `at` passes through each edge: [E] float64, 0..1.

    Each state's incoming edges are weighed against each other by |weight|, and the prediction's 1 is shared out by
    that, from the last row down; edges marked in `left_out` [E] get nothing. An MLP reads what attention and residual
    have just brought, so its share is measured beside theirs, and what comes through it goes on to them.
    """
    weight = np.where(left_out, 0, np.abs(edges["weight"].astype(np.float64)))
    reaching = np.zeros((n_layers + 1, at + 1))  # [row, pos]
    reaching[-1, at] = 1
    result = np.zeros(len(edges))
    for group in sweep(edges):
        edge, size = edges[group], weight[group]
        brings = edge["kind"] != Kind.MLP
        brought, whole = (np.bincount(edge["dst"], part, at + 1) for part in (size * brings, size))
        base = np.where(brings, brought[edge["dst"]], whole[edge["dst"]])
        share = np.divide(size, base, out=np.zeros(len(group)), where=base > 0)
        result[group] = share * reaching[edge["layer"] + 1, edge["dst"]]
        reaching[edge["layer"][0]] += np.bincount(edge["src"], result[group] * brings, at + 1)
    return result


def weakest_link(edges: np.ndarray, crossing: np.ndarray, influence: np.ndarray, n_layers: int, at: int) -> np.ndarray:
    """How weak the weakest link is on the strongest way from each crossing edge to the prediction: [E] float64.

    The links are the crossing edges on the way, the edge itself among them; the strongest way is the one whose weakest
    link has the most influence. Ways within a position, and sampled edges, are free. 0 for edges that do not cross.
    """
    best = np.zeros((n_layers + 1, at + 1))  # the same of each state
    best[-1, at] = np.inf
    link = np.zeros(len(edges))
    for group in sweep(edges):
        edge, crosses = edges[group], crossing[group]
        ahead = best[edge["layer"] + 1, edge["dst"]]
        link[group] = np.where(crosses, np.minimum(influence[group], ahead), 0)
        free = (edge["src"] == edge["dst"]) | (edge["kind"] == Kind.SAMPLED)
        np.maximum.at(best[edge["layer"][0]], edge["src"], np.where(free, ahead, link[group]))
    return link


def on_the_way(edges: np.ndarray, kept: np.ndarray, strong: np.ndarray, n_layers: int, at: int) -> np.ndarray:
    """Which edges to keep beside the kept crossing ones: [E] bool.

    Residual edges that lie on a way from a token to the prediction; self-attention and MLP edges there if `strong` [E];
    sampled edges there if strong, or if their source is a position that has kept edges as well.
    """
    busy = np.zeros(at + 1, bool)
    busy[[at, *edges["src"][kept], *edges["dst"][kept]]] = True
    live = np.zeros((n_layers + 1, at + 1), bool)  # the states from which a kept way leads to the prediction
    live[-1, at] = True
    result = np.zeros(len(edges), bool)
    looked_at = np.flatnonzero(kept | (edges["kind"] != Kind.ATTENTION))
    for group in sweep(edges[looked_at]):
        these = looked_at[group]
        edge = edges[these]
        leads, residual = live[edge["layer"] + 1, edge["dst"]], edge["kind"] == Kind.RESIDUAL
        joins = (edge["kind"] == Kind.SAMPLED) & busy[edge["src"]]
        result[these] = leads & ~kept[these] & (residual | joins | strong[these])
        np.logical_or.at(live[edge["layer"][0]], edge["src"], leads & (kept[these] | result[these]))
    return result
