"""How much of what reaches the prediction passes through each edge: its influence.

Where a measure weighs the edges into a state against each other, the prediction's 1 is shared out from the last row of
states down: each state hands on what reached it, to each edge by its part of |weight|. That needs one layer's weights at a
time. A sampled token joins the bottom of its position to the top of the one before, so what is handed down there begins
again at a top; `sampled_tops` finds how much that is, beforehand.

Where a measure speaks of the whole prediction (`Measure.whole`), an edge's |weight| itself is its influence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from nanokv.trace.parts import Array, LayerWeights


@dataclass(frozen=True)
class Influence:
    """The influence of one layer's edges, shaped as their weights are; and of the states that enter the layer [n]."""

    attention: Array  # [H, n, n]; edges from sinks get nothing
    residual: Array  # [n]
    mlp: Array | None  # [n]
    states: Array  # [n]


class Shared:
    """Shares out what reaches the prediction; give it the layers from the last one down."""

    def __init__(self, tops: Array, sinks: Sequence[int]) -> None:
        """tops [n]: what begins at each position's last state, 1 at the prediction's."""
        self.reaching, self.sinks = tops.astype(np.float64), list(sinks)

    def down(self, weights: LayerWeights) -> Influence:
        """What reaches the states above the layer, shared out to its edges and to the states below."""
        attention, residual, mlp = self.shares(weights)
        edges, stream = attention * self.reaching[:, None], residual * self.reaching
        mlp_edges = None if mlp is None else mlp * self.reaching
        self.reaching = edges.sum(axis=(0, 1)) + stream
        return Influence(edges, stream, mlp_edges, self.reaching)

    def shares(self, weights: LayerWeights) -> tuple[Array, Array, Array | None]:
        """Each edge's part of its state: attention [H, n, n], residual [n], MLP [n].

        An MLP reads what attention and residual have just brought, so its part is measured beside theirs, and what comes
        through it goes on to them.
        """
        attention, residual = np.abs(weights.attention.astype(np.float64)), np.abs(weights.residual.astype(np.float64))
        attention[:, :, self.sinks] *= np.eye(len(residual))[:, self.sinks]  # self-attention of a sink counts
        brought = attention.sum(axis=(0, 2)) + residual  # [n]
        mlp = weights.mlp_share
        if mlp is None and weights.mlp is not None:
            mlp = part(np.abs(weights.mlp.astype(np.float64)), brought + np.abs(weights.mlp))
        return part(attention, brought[:, None]), part(residual, brought), mlp


def whole_influence(weights: LayerWeights, sinks: Sequence[int]) -> Influence:
    """The weights' sizes as the influence; `states` are those of the measure, or else what its edges from there come to."""
    attention, residual = np.abs(weights.attention.astype(np.float64)), np.abs(weights.residual.astype(np.float64))
    attention[:, :, list(sinks)] *= np.eye(len(residual))[:, list(sinks)]
    mlp = None if weights.mlp is None else np.abs(weights.mlp.astype(np.float64))
    states = attention.sum(axis=(0, 1)) + residual if weights.states is None else weights.states
    return Influence(attention, residual, mlp, states)


def sampled_tops(layers: Iterable[LayerWeights], at: int, sampled: Sequence[int], sinks: Sequence[int]) -> Array:
    """What begins at each position's last state, [n]: 1 at `at`; and before each sampled position, what it hands down.

    R is what the whole stack makes of it: of 1 at the top of i, R[i, j] arrives at the bottom of j. A sampled position p
    hands its bottom to the top of p - 1, and nothing arrives at p but from p on, so the last one is settled first.
    """
    shared, whole = Shared(np.zeros(at + 1), sinks), np.eye(at + 1)
    for weights in layers:
        attention, residual, _ = shared.shares(weights)
        step = attention.sum(axis=0)
        step[np.diag_indices(at + 1)] += residual
        whole = whole @ step
    tops = np.zeros(at + 1)
    tops[at] = 1
    for pos in sorted(sampled, reverse=True):
        tops[pos - 1] += tops @ whole[:, pos]
    return tops


def part(size: Array, whole: Array) -> Array:
    """size / whole, and 0 where the whole is 0."""
    return np.divide(size, whole, out=np.zeros_like(size), where=whole > 0)
