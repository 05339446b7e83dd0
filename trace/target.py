"""`target`: what each edge did for the logit that was predicted, or for the difference of two.

Hold the attention weights, the scales of the norms and the gates of the MLPs at the values that they had in this run. The
network is then linear, and one sweep from the logit down tells of every state what it did for the logit: a covector
lambda, so that a vector x in that state adds lambda . x. It starts as the row of the head's matrix, seen through the final
norm, and goes down through the transpose of each block, which needs no automatic differentiation:

    lambda_mid = lambda_post + (MLP, frozen, with its norm)^T lambda_post
    lambda_pre = lambda_mid + (attention, frozen, with its norm)^T lambda_mid       at src: the sum over dst and heads
    the edge of head h from src to dst:    a v_src W_O^h . lambda_mid[dst]          no vector of D features is formed for it

The effects are signed, and complete: at every layer, what all positions' states do for the logit, and what the biases
above them do, add up to the logit (`LayerWeights.states` and `.bias`). They are direct effects: why a head attends where
it does (the queries and keys) is held fixed, and so is what the norms and gates make of a change. Cutting an edge
(`verify.py`) says how far that is true. Elhage et al. 2021 split attention into these two circuits, QK and OV; this is OV.
In a feedback model the same sweep goes position by position (`memory.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanokv import ops
from nanokv.config import Config
from nanokv.trace.parts import Array, FrozenNorm, Goal, LayerWeights, TraceLike, frozen_norm, norm_after_attention

SLOPE_AT_0 = {"silu": 0.5, "gelu_tanh": 0.5, "gelu": 0.5, "relu": 0.0}  # what act(x) / x tends to


def target(trace: TraceLike, model: Any, goal: Goal, merged: bool) -> Iterator[LayerWeights]:
    """The effect of every edge on the goal's logit, or difference of two; the last layer first. With heads merged, their
    sum, which is exact. Residual: what went on in the stream; MLP: what the MLP added, its biases included."""
    config, n = trace.config, goal.at + 1
    covector, above = at_the_head(trace, model, goal)  # [n, D], [n]
    for layer in reversed(range(config.n_layers)):
        block = model.weights.blocks[layer]
        before, mid, written = (trace.state(site, layer)[:n] for site in ("resid_pre", "resid_mid", "mlp_out"))
        mlp_effect = dots(covector, written)
        covector, mlp_bias = frozen_mlp(block, mid, config).pull(covector)
        stream = dots(covector, before)
        pattern, values = trace.pattern(layer)[:, :n, :n], trace.values(layer)[:n]
        edges, at_src, heads_bias = pull_heads(block, pattern, values, covector, config)
        below, values_bias = pull_values(block, frozen_norm(before, block.attn_norm, block.attn_norm_bias, config), at_src)
        covector = covector + below
        edges = edges.sum(axis=0, keepdims=True) if merged else edges
        bias = mlp_bias + heads_bias + values_bias + above
        yield LayerWeights(layer, edges, stream, mlp_effect, bias=bias, states=dots(covector, before))
        above = np.zeros(n)


def at_the_head(trace: TraceLike, model: Any, goal: Goal) -> tuple[Array, Array]:
    """The covector [n, D] of the final states, 0 but at the goal's position; and what the final norm's bias does [n]."""
    config, weights, n = trace.config, model.weights, goal.at + 1
    chosen = np.array([goal.token] if goal.against is None else [goal.token, goal.against], np.int32)
    rows = np.asarray(model.ops.embed(chosen, weights.head))  # [1 or 2, D]
    row = rows[0] if goal.against is None else rows[0] - rows[1]
    final = trace.state("resid_post", config.n_layers - 1)[goal.at : n]  # [1, D]
    norm = frozen_norm(final, weights.final_norm, weights.final_norm_bias, config)
    covector, bias = np.zeros((n, config.d_model), np.float32), np.zeros(n)
    covector[goal.at] = norm.pull(row[None])[0]
    if norm.bias is not None:
        bias[goal.at] = dots(row, norm.bias)
    return covector, bias


@dataclass(frozen=True)
class FrozenMLP:
    """An MLP with its norms as the affine map that it was at each position: W_down (gate * (W_up norm(x) + b_up)) + b_down."""

    w_up: Array  # [F, D]
    w_down: Array  # [D, F]
    gate: Array  # [n, F]: act(gate), or act(up) / up where there is no gate
    norm: FrozenNorm
    post_norm: FrozenNorm
    b_up: Array | None
    b_down: Array | None

    def pull(self, covector: Array) -> tuple[Array, Array]:
        """resid_post's covector [n, D] -> resid_mid's; and what the MLP's biases do, [n]."""
        g = self.post_norm.pull(covector)  # [n, D]
        inner = (g @ self.w_down) * self.gate  # [n, F]
        bias = np.zeros(len(g))
        if self.b_down is not None:
            bias += dots(g, self.b_down)
        if self.b_up is not None:
            bias += dots(inner, self.b_up)
        inner = inner @ self.w_up  # [n, D]
        if self.norm.bias is not None:
            bias += dots(inner, self.norm.bias)
        return covector + self.norm.pull(inner), bias


def frozen_mlp(block: Any, x: Array, config: Config) -> FrozenMLP:
    """The MLP as it was for resid_mid x [n, D]."""
    norm = frozen_norm(x, block.mlp_norm, block.mlp_norm_bias, config)
    h = norm.push(x)  # [n, D]
    w_up, w_down = np.asarray(block.w_up), np.asarray(block.w_down)
    up = ops.linear(h, w_up, block.b_up)  # [n, F]
    if config.gated_mlp:
        gate = ops.ACTIVATIONS[config.activation](ops.linear(h, block.w_gate, block.b_gate))  # [n, F]
    else:
        slope = np.full_like(up, SLOPE_AT_0[config.activation])
        gate = np.divide(ops.ACTIVATIONS[config.activation](up), up, out=slope, where=up != 0)
    post_norm = FrozenNorm(np.ones(len(x), x.dtype), None, None, False)
    if config.post_norms:
        post_norm = frozen_norm(ops.linear(gate * up, w_down, block.b_down), block.post_mlp_norm, None, config)
    return FrozenMLP(w_up, w_down, gate, norm, post_norm, block.b_up, block.b_down)


def pull_heads(block: Any, pattern: Array, values: Array, covector: Array, config: Config) -> tuple[Array, Array, Array]:
    """From resid_mid's covector [m, D] through the heads, whose weights are held: each edge's effect [H, m, n], the
    covector of the values [n, G, hd], and what the output bias does [m]. For pattern [H, m, n] and values [n, G, hd]."""
    kv_head = np.arange(config.n_heads) // (config.n_heads // config.n_kv_heads)
    g = covector  # [m, D]
    if config.post_norms:
        z = np.stack([weights @ values[:, kv] for weights, kv in zip(pattern, kv_head, strict=True)], axis=1)  # [m, H, hd]
        g = norm_after_attention(block, ops.linear(z.reshape(len(z), -1), block.wo, block.bo), config).pull(covector)
    at_dst = (g @ np.asarray(block.wo)).reshape(len(g), config.n_heads, config.head_dim)  # [m, H, hd]
    at_src = np.zeros(values.shape, g.dtype)  # [n, G, hd]
    edges = np.empty_like(pattern)
    for head, kv in enumerate(kv_head.tolist()):
        np.matmul(at_dst[:, head], values[:, kv].T, out=edges[head])
        edges[head] *= pattern[head]
        at_src[:, kv] += pattern[head].T @ at_dst[:, head]
    return edges, at_src, np.zeros(len(g)) if block.bo is None else dots(g, block.bo)


def pull_values(block: Any, norm: FrozenNorm, at_src: Array) -> tuple[Array, Array]:
    """From the covector of the values [n, G, hd] to that of what they were made of [n, D], through its norm; and what the
    biases do [n]."""
    g = at_src.reshape(len(at_src), -1)  # [n, G*hd]
    below = g @ np.asarray(block.wv)  # [n, D]
    bias = np.zeros(len(g)) if block.bv is None else dots(g, block.bv)
    return norm.pull(below), bias if norm.bias is None else bias + dots(below, norm.bias)


def dots(a: Array, b: Array) -> Array:
    """The inner products of the rows, summed in float64: what cancels in them must not leave float32's rounding."""
    return np.asarray(np.sum(a * b, axis=-1, dtype=np.float64))
