"""Sinks: positions that draw much attention and give little (Xiao and others 2023, arXiv 2309.17453). Pictures set them
apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanokv.trace.parts import Array, TraceLike

LEAST_SHARE = 0.3  # of the attention of later positions, in most layers
LITTLE = 0.5  # of what others move


@dataclass(frozen=True)
class Sink:
    """A position that draws much attention and gives little. The edges from it are set apart."""

    pos: int
    share: float  # of the attention of the positions after it (the next one aside), mean over layers and heads
    weight: float | None = None  # what the edges from it sum to, where the measure speaks of the whole prediction


def find_sinks(trace: TraceLike, model: Any, n: int, chosen: Sequence[int] | None = None) -> tuple[Sink, ...]:
    """The sinks among the first n positions, or the `chosen` ones.

    In most layers they draw more than 0.3 of the attention, and twice what they would if it were spread evenly, on
    average over heads and over the positions after them (the next one aside), of which there must be three. And, if a model
    is given, they move less than half of what others do: the median over layers and heads of ||v_j W_O^h|| over that of
    the median position.
    """
    layers = range(trace.config.n_layers)
    drawn = np.stack([received(trace.pattern(layer)[:, :n, :n]) for layer in layers])  # [L, n]
    if chosen is None:
        evenly = received(np.tri(n)[None] / np.arange(1, n + 1)[:, None])
        often = (drawn > np.maximum(LEAST_SHARE, 2 * evenly)).mean(axis=0) > 0.5  # [n]
        often[-4:] = False
        if often.any() and model is not None:
            often &= _moves(trace, model, n) < LITTLE
        chosen = np.flatnonzero(often).tolist()
    return tuple(Sink(pos, float(drawn[:, pos].mean())) for pos in chosen)


def received(pattern: Array) -> Array:
    """Attention that each position draws from those at least two after it, mean over heads and dst: [H, n, n] -> [n].

    The next position is left out: a head that always reads the token before makes no sink of it.
    """
    n = pattern.shape[-1]
    readers = np.maximum(n - 2 - np.arange(n), 1)
    return np.tril(pattern.mean(axis=0), -2).sum(axis=0) / readers


def _moves(trace: TraceLike, model: Any, n: int) -> Array:
    """||v_j W_O^h|| beside that of the median position, median over layers and heads: [n].

    By the inner products of W_O^h's columns, ||v W||^2 = v (W W^T) v^T, so that no vectors of D features are formed.
    """
    config, moved = trace.config, []
    kv_head = np.arange(config.n_heads) // (config.n_heads // config.n_kv_heads)
    for layer, block in enumerate(model.weights.blocks):
        wo = np.asarray(block.wo).T.reshape(config.n_heads, config.head_dim, -1)  # [H, hd, D]
        values = trace.values(layer)[:n].transpose(1, 0, 2)[kv_head]  # [H, n, hd]
        squares = ((values @ (wo @ wo.transpose(0, 2, 1))) * values).sum(axis=-1)  # [H, n]
        length = np.sqrt(np.maximum(squares, 0))
        moved.append(length / np.maximum(np.median(length, axis=-1, keepdims=True), np.finfo(np.float32).tiny))
    return np.median(np.stack(moved), axis=(0, 1))
