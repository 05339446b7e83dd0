"""What the measures share: the trace that they read, the question that they answer, and the pieces of a block.

A head h that reads position j for position i adds the part u = a v_j W_O^h to the residual stream, where a is the
attention weight and v_j the cached value. Letters are those of `nanokv/config.py`, with n for the positions up to the
prediction's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from nanokv.config import Config

Array = np.ndarray


class TraceLike(Protocol):
    """What a measure asks of a trace. S positions."""

    @property
    def config(self) -> Config: ...
    @property
    def level(self) -> str: ...
    @property
    def tokens(self) -> Mapping[str, Array]: ...
    def pattern(self, layer: int) -> Array: ...  # [H, S, S]: rows dst, columns src
    def values(self, layer: int) -> Array: ...  # [S, G, hd]
    def state(self, site: str, layer: int) -> Array: ...  # [S, D]
    def logits(self, pos: int) -> Array | None: ...  # [V]


def has_feedback(trace: TraceLike) -> bool:
    """Whether it is the run of a feedback model (`nanokv.feedback`), whose layers read one memory of each earlier position."""
    return getattr(getattr(trace, "about", None), "architecture", "standard") == "feedback"


@dataclass(frozen=True)
class Goal:
    """What the flow is to explain: the prediction at a position, and the logit or difference of two to aim at."""

    at: int  # the position whose prediction it is
    token: int | None = None  # the id that is predicted; None where the trace holds no logits
    against: int | None = None  # the id whose logit is subtracted

    def value(self, logits: Array) -> float:
        """The logit that is aimed at, or the difference of two: logits [V]."""
        against = 0.0 if self.against is None else float(logits[self.against])
        return float(logits[self.token]) - against


@dataclass(frozen=True)
class LayerWeights:
    """One layer's edge weights among the n positions up to the goal's."""

    layer: int
    attention: Array  # [H, n, n], or [1, n, n] with heads merged: rows dst, columns src; the diagonal is self-attention
    residual: Array  # [n]
    mlp: Array | None = None  # [n]; None where the measure knows nothing of the MLP
    mlp_share: Array | None = None  # [n] of resid_post, where it is not the MLP's weight beside that of the others
    bias: Array | None = None  # [n] what no edge brings, where the measure says
    states: Array | None = None  # [n] what the state that enters the layer counts for in the prediction, where it says


@dataclass(frozen=True)
class FrozenNorm:
    """A norm as the linear map that it was, at each position, in one run: y = scale w (x - mean x) + b; RMS has no mean."""

    scale: Array  # [n]
    weight: Array | None  # [D]; None: 1
    bias: Array | None  # [D]; None: 0
    centred: bool

    def push(self, x: Array) -> Array:  # [n, D] -> [n, D]
        """The norm's output."""
        y = self.part(x) * self.scale[:, None]
        return y if self.bias is None else y + self.bias

    def part(self, x: Array) -> Array:  # [..., D] -> [..., D]
        """What it makes of a part of its input, but for the scale of the position where the part is added."""
        x = x - x.mean(axis=-1, keepdims=True) if self.centred else x
        return x if self.weight is None else x * self.weight

    def pull(self, covector: Array) -> Array:  # [n, D] -> [n, D]
        """The effect of its input, given that of its output: the transpose of the linear map."""
        g = covector if self.weight is None else covector * self.weight
        g = g * self.scale[:, None]
        return g - g.mean(axis=-1, keepdims=True) if self.centred else g


def frozen_norm(x: Array, weight: Array | None, bias: Array | None, config: Config) -> FrozenNorm:
    """The config's norm, as it was for the inputs x [n, D]."""
    if config.norm == "none":
        return FrozenNorm(np.ones(len(x), x.dtype), None, None, False)
    centred = config.norm == "layer"
    x = x - x.mean(axis=-1, keepdims=True) if centred else x
    scale = 1 / np.sqrt((x * x).mean(axis=-1) + x.dtype.type(config.norm_eps))
    return FrozenNorm(scale, weight, bias, centred)


def norm_after_attention(block: Any, written: Array, config: Config) -> FrozenNorm:
    """The norm on what attention wrote [n, D], before it is added to the stream (Gemma), or the map that changes nothing."""
    if config.post_norms and config.norm != "none":
        return frozen_norm(written, block.post_attn_norm, None, config)
    return FrozenNorm(np.ones(len(written), written.dtype), None, None, False)


def head_outputs(values: Array, wo: Array, n_heads: int) -> Array:
    """v_j W_O^h for every head h and position j: values [n, G, hd] and wo [D, H*hd] -> [H, n, D]."""
    _, n_kv_heads, head_dim = values.shape
    by_head = np.ascontiguousarray(wo.T).reshape(n_heads, head_dim, -1)  # [H, hd, D]
    return np.ascontiguousarray(values.transpose(1, 0, 2)).repeat(n_heads // n_kv_heads, axis=0) @ by_head


def attention_parts(pattern: Array, values: Array, block: Any, config: Config) -> tuple[Array, Array, Array]:
    """The parts of what attention adds to the stream: part (h, i, j) is pattern[h, i, j] * scale[i] * outputs[h, j].

    From pattern [H, n, n] and values [n, G, hd]. Returns outputs [H, n, D] and scale [n], which hold a norm after the
    attention as the linear map that it was; and the output bias's part [n, D], which no head brings.
    """
    outputs = head_outputs(values, np.asarray(block.wo), config.n_heads)  # [H, n, D]
    bias = np.zeros(outputs.shape[1:], outputs.dtype) if block.bo is None else np.tile(block.bo, (outputs.shape[1], 1))
    if not (config.post_norms and config.norm != "none"):
        return outputs, np.ones(len(bias), outputs.dtype), bias
    norm = norm_after_attention(block, (pattern @ outputs).sum(axis=0) + bias, config)
    return norm.part(outputs), norm.scale, norm.part(bias) * norm.scale[:, None]
