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
        mlp_effect = _dots(covector, written)
        covector, mlp_bias = frozen_mlp(block, mid, config).pull(covector)
        stream = _dots(covector, before)
        attention = FrozenAttention(block, trace.pattern(layer)[:, :n, :n], trace.values(layer)[:n], before, config)
        edges, covector, attention_bias = attention.pull(covector)
        edges = edges.sum(axis=0, keepdims=True) if merged else edges
        bias = mlp_bias + attention_bias + above
        yield LayerWeights(layer, edges, stream, mlp_effect, bias=bias, states=_dots(covector, before))
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
        bias[goal.at] = _dots(row, norm.bias)
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
            bias += _dots(g, self.b_down)
        if self.b_up is not None:
            bias += _dots(inner, self.b_up)
        inner = inner @ self.w_up  # [n, D]
        if self.norm.bias is not None:
            bias += _dots(inner, self.norm.bias)
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


class FrozenAttention:
    """Attention with its norms as the affine map that it was: the weights of every head held."""

    def __init__(self, block: Any, pattern: Array, values: Array, x: Array, config: Config) -> None:
        """For pattern [H, n, n], values [n, G, hd] and resid_pre x [n, D]."""
        self.block, self.pattern, self.values, self.config = block, pattern, values, config
        self.wo, self.wv = np.asarray(block.wo), np.asarray(block.wv)
        self.norm = frozen_norm(x, block.attn_norm, block.attn_norm_bias, config)
        self.kv_head = np.arange(config.n_heads) // (config.n_heads // config.n_kv_heads)

    def pull(self, covector: Array) -> tuple[Array, Array, Array]:
        """resid_mid's covector [n, D] -> each edge's effect [H, n, n]; resid_pre's covector; what the biases do [n]."""
        config, block, n = self.config, self.block, len(covector)
        g = norm_after_attention(block, self._written(), config).pull(covector) if config.post_norms else covector  # [n, D]
        at_dst = (g @ self.wo).reshape(n, config.n_heads, config.head_dim)  # [n, H, hd]
        at_src = np.zeros(self.values.shape, g.dtype)  # [n, G, hd]
        edges = np.empty_like(self.pattern)
        for head, kv in enumerate(self.kv_head.tolist()):
            np.matmul(at_dst[:, head], self.values[:, kv].T, out=edges[head])
            edges[head] *= self.pattern[head]
            at_src[:, kv] += self.pattern[head].T @ at_dst[:, head]
        at_src = at_src.reshape(n, -1)
        bias = np.zeros(n)
        for covectors, vector in ((g, block.bo), (at_src, block.bv)):
            if vector is not None:
                bias += _dots(covectors, vector)
        below = at_src @ self.wv  # [n, D]
        if self.norm.bias is not None:
            bias += _dots(below, self.norm.bias)
        return edges, covector + self.norm.pull(below), bias

    def _written(self) -> Array:
        """What the heads and the output bias wrote, before a norm on it: [n, D]."""
        z = np.stack([self.pattern[head] @ self.values[:, kv] for head, kv in enumerate(self.kv_head)], axis=1)
        return ops.linear(z.reshape(len(z), -1), self.wo, self.block.bo)


def _dots(a: Array, b: Array) -> Array:
    """The inner products of the rows, summed in float64: what cancels in them must not leave float32's rounding."""
    return np.asarray(np.sum(a * b, axis=-1, dtype=np.float64))
