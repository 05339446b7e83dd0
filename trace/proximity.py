"""`proximity`: how much nearer each part brings a state to what it becomes (Ferrando and others 2022, arXiv 2203.04212; the
"information flow routes" of Ferrando and Voita 2024, arXiv 2403.00824).

A state y is the sum of its parts: what each head brings from each position, what stood there before, and the output bias.
A part p counts by r = max(0, ||y|| - ||y - p||), and contributes c = r / sum of all r. The norm is the sum of absolute
values, as theirs is; unlike in their code, a position that is not read contributes exactly 0, and the bias is a part of
its own rather than nobody's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from nanokv.trace.parts import Array, Goal, LayerWeights, TraceLike, attention_parts


def proximity(trace: TraceLike, model: Any, goal: Goal, merged: bool) -> Iterator[LayerWeights]:
    """The contributions to resid_mid of attention's parts, of resid_pre and of the bias, which sum to 1 at each position;
    and that of mlp_out to resid_post. With heads merged, a position's part is the sum of what they bring from it.

    Made one dst at a time: O(H S D) for each, and never more than [H, S, D] at once.
    """
    config, n = trace.config, goal.at + 1
    for layer in reversed(range(config.n_layers)):
        states = {site: trace.state(site, layer)[:n] for site in ("resid_pre", "resid_mid", "mlp_out", "resid_post")}
        pattern = trace.pattern(layer)[:, :n, :n]  # [H, n, n]
        outputs, scale, bias = attention_parts(pattern, trace.values(layer)[:n], model.weights.blocks[layer], config)
        nearer = _attention(pattern * scale[:, None], outputs, states["resid_mid"], merged)
        stream, constant = (closeness(part, states["resid_mid"]) for part in (states["resid_pre"], bias))
        edges, stream, constant = shares(nearer, stream, constant)
        mlp, rest = (closeness(states[site], states["resid_post"]) for site in ("mlp_out", "resid_mid"))
        share = np.divide(mlp, mlp + rest, out=np.zeros(n, mlp.dtype), where=mlp + rest > 0)
        yield LayerWeights(layer, edges, stream, share, mlp_share=share, bias=constant)


def closeness(parts: Array, whole: Array, order: int = 1) -> Array:  # [..., D], [..., D] -> [...]
    """max(0, ||whole|| - ||whole - part||) for each part, by the norm of that order."""
    size, left = (np.linalg.norm(x, ord=order, axis=-1) for x in (whole, whole - parts))
    return np.maximum(size - left, 0)


def shares(nearer: Array, stream: Array, constant: Array) -> tuple[Array, Array, Array]:
    """Each divided by the sum of all at its dst: [H, n, n], [n], [n]. Where no part brings the state nearer to what it
    became, it is all due to the stream."""
    total = nearer.sum(axis=(0, 2)) + stream + constant  # [n]
    stream = np.where(total > 0, stream, 1)
    total = np.where(total > 0, total, 1)
    return nearer / total[:, None], stream / total, constant / total


def _attention(pattern: Array, outputs: Array, mid: Array, merged: bool) -> Array:
    """closeness of what attention brings to resid_mid [n, D]: from pattern [H, n, n], outputs [H, n, D] to [H or 1, n, n]."""
    n_heads, n, d = outputs.shape
    nearer = np.zeros((1 if merged else n_heads, n, n), np.float32)
    parts, more = np.empty((n, d), np.float32), np.empty((n, d), np.float32)
    ones = np.ones(d, np.float32)
    for dst in range(n):
        whole = mid[dst]
        size = np.abs(whole).sum()
        first = int(np.argmax((pattern[:, dst, : dst + 1] != 0).any(axis=0)))  # a window's beginning
        part, spare = parts[: dst + 1 - first], more[: dst + 1 - first]
        for head in range(n_heads):
            weights, moved = pattern[head, dst, first : dst + 1, None], outputs[head, first : dst + 1]
            np.multiply(weights, moved, out=spare if merged and head else part)
            if merged and head:
                part += spare
            if not merged or head == n_heads - 1:
                np.abs(np.subtract(whole, part, out=part), out=part)
                nearer[0 if merged else head, dst, first : dst + 1] = size - part @ ones
    return np.maximum(nearer, 0) * (np.abs(pattern).max(axis=0) > 0 if merged else pattern != 0)
