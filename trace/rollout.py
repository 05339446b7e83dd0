"""`rollout`: what attention alone makes of the tokens, multiplied up over the layers (Abnar & Zuidema 2020, arXiv 2005.00928).

A layer's mixture is A = (mean over heads of the attention weights + I) / 2, the I for the residual stream; what a state is
mixed of is R_l = A_l ... A_1, a matrix [n, n] whose rows sum to 1. As the weights do not say what was moved, nor what a
later layer does with it, a rollout is no more than a guess: on the hand-made induction model it credits a position that
changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from nanokv.trace.parts import Goal, LayerWeights, TraceLike


class Rollout:
    """The mixtures of all states, grown position by position as the cache is: a row, once made, never changes.

    rows[l][i, j] is how much of the state that enters layer l at position i is mixed of the token at j; l = L is the last.
    """

    def __init__(self, n_layers: int) -> None:
        self.rows = [np.zeros((0, 0), np.float32)] * (n_layers + 1)  # L + 1 of [n, n]

    def extend(self, trace: TraceLike) -> Rollout:
        """Add the positions that the trace has more than these rows; costs O(S^2) each and layer."""
        known, n = len(self.rows[0]), len(trace.tokens["text"])
        grown = [np.eye(n, dtype=np.float32), *(np.zeros((n, n), np.float32) for _ in self.rows[1:])]
        for old, new in zip(self.rows, grown, strict=True):
            new[:known, :known] = old
        for layer in range(len(self.rows) - 1):
            mean = trace.pattern(layer).mean(axis=0)  # [n, n]
            for i in range(known, n):
                below = grown[layer][: i + 1, : i + 1]
                grown[layer + 1][i, : i + 1] = (mean[i, : i + 1] @ below + below[i]) / 2
        self.rows = grown
        return self


def rollout(trace: TraceLike, model: Any, goal: Goal, merged: bool) -> Iterator[LayerWeights]:
    """How much of the prediction, as the rollout has it, passed through each edge: the share of its final state that came
    by there. The heads count alike, the residual stream as much as all of them; of the MLP it knows nothing."""
    n = goal.at + 1
    reaching = np.zeros(n)  # how much of the prediction's final state passed through each position's state
    reaching[goal.at] = 1
    for layer in reversed(range(trace.config.n_layers)):
        pattern = trace.pattern(layer)[:, :n, :n]  # [H, n, n]
        mixed = pattern.mean(axis=0, keepdims=True) if merged else pattern / len(pattern)
        edges, stream = mixed * (reaching / 2)[:, None], reaching / 2
        reaching = edges.sum(axis=(0, 1)) + stream
        yield LayerWeights(layer, edges, stream, states=reaching)
