"""Every operation of the forward pass in plain NumPy: its equation, its shapes, and what it mixes.

There is one place where positions meet, `attention`. Everything else treats each position by itself, so what a position
knows of the others came through the cache. `kernels.py` holds the same operations, compiled; this page is for reading, and
for running in float64, since every operation keeps the dtype that it is given.

A def line says the shapes of the array arguments, then those of the result. Letters are those of `config.py`, and K, N
(inputs and outputs of a matrix) and R (reads: the pairs of a position and a slot that it reads).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from nanokv.cache import KVCache, Slots
from nanokv.config import Rope
from nanokv.weights import Matrix, Weights

Array = np.ndarray


def prepare(weights: Weights, packed: bool = False) -> Weights:
    """The weights in the form that these operations want: plain arrays, so none is packed. A tied head stays the embedding."""
    return weights.map(np.asarray)


def embed(tokens: Array, w: Matrix) -> Array:  # [T], [V, D] -> [T, D]
    """x = W[token]. Mixes nothing: each position looks its own token up."""
    return np.asarray(w)[tokens]


def linear(x: Array, w: Matrix, b: Array | None = None) -> Array:  # [T, K], [N, K], [N] -> [T, N]
    """y = x W^T + b. Mixes the features of a position."""
    y = x @ np.asarray(w).T  # [T, N]
    return y if b is None else y + b


def linears(x: Array, ws: Sequence[Matrix], bs: Sequence[Array | None]) -> list[Array]:
    """Several linear maps of the same x: [T, N] for each."""
    return [linear(x, w, b) for w, b in zip(ws, bs, strict=True)]


def rms_norm(x: Array, w: Array, eps: float) -> Array:  # [..., K], [K] -> [..., K]
    """x / sqrt(mean(x^2) + eps) * w (Zhang & Sennrich 2019). Mixes the features of a position, by one number a row."""
    return x * rms_scale(x, eps)[..., None] * w


def rms_scale(x: Array, eps: float) -> Array:  # [..., K] -> [...]
    """1 / sqrt(mean(x^2) + eps): what rms_norm multiplies a row by."""
    return 1 / np.sqrt(np.mean(x * x, axis=-1) + x.dtype.type(eps))


def layer_scale(x: Array, eps: float) -> Array:  # [..., K] -> [...]
    """1 / sqrt(var + eps): what layer_norm multiplies a centred row by."""
    return rms_scale(x - np.mean(x, axis=-1, keepdims=True), eps)


def layer_norm(x: Array, w: Array, b: Array, eps: float) -> Array:  # [..., K], [K], [K] -> [..., K]
    """(x - mean) / sqrt(var + eps) * w + b (Ba et al. 2016). Mixes the features of a position, by two numbers a row."""
    centred = x - np.mean(x, axis=-1, keepdims=True)  # [..., K]
    return rms_norm(centred, w, eps) + b


def rope_table(rope: Rope, head_dim: int, start: int, n: int, dtype: np.dtype) -> tuple[Array, Array]:
    """cos and sin, each [n, hd/2], of the angle by which each pair turns at positions start to start + n - 1.

    The angle is one float64 product; an entry is the nearest number of the dtype to its cos or sin.
    """
    angles = np.outer(np.arange(start, start + n, dtype=np.float64), rope.frequencies(head_dim))
    return np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)


def rope(x: Array, cos: Array, sin: Array, pairs: str) -> Array:  # [T, N, hd], [T, P], [T, P] -> [T, N, hd]
    """Turn each pair of features by its position's angle (Su et al. 2021). Mixes the two features of a pair.

    Pair i is features (i, i + hd/2) for "halves" or (2i, 2i + 1) for "neighbours". After it, q . k depends on the
    distance of the two positions only. At position 0 it changes nothing.
    """
    first, second = _pair_slices(x.shape[-1], pairs)
    x0, x1 = x[..., first], x[..., second]  # [T, N, P], [T, N, P]
    cos, sin = cos[:, None], sin[:, None]  # [T, 1, P], [T, 1, P]
    y = np.empty_like(x)  # [T, N, hd]
    y[..., first] = x0 * cos - x1 * sin
    y[..., second] = x0 * sin + x1 * cos
    return y


def _pair_slices(head_dim: int, pairs: str) -> tuple[slice, slice]:
    half = head_dim // 2
    return (slice(0, half), slice(half, None)) if pairs == "halves" else (slice(0, None, 2), slice(1, None, 2))


def attention(
    q: Array,
    cache: KVCache,
    slots: Slots,
    scale: float,
    cuts: Array | None = None,
    weights_out: Array | None = None,
    scores_out: Array | None = None,
) -> Array:  # [T, H, hd] -> [T, H, hd]
    """z = softmax(q k^T scale) v over the slots that each position reads. The only place where positions meet.

    Query head h reads key/value head slots.kv_head[h] (Ainslie et al. 2023). The keys and values come from the cache
    alone, this call's own among them. cuts, int [n, 4], are (head, dst, src, zeroed): the edge's score becomes -inf or, if
    zeroed is 1, its weight 0. A head whose every score is -inf reads nothing, and its z is 0. weights_out and scores_out,
    each [H, R], are filled if given: the R reads in order of dst, then of src.
    """
    k = cache.keys(slots.layer)[:, slots.kv_head]  # [S, H, hd]
    v = cache.values(slots.layer)[:, slots.kv_head]  # [S, H, hd]
    scores = q.transpose(1, 0, 2) @ k.transpose(1, 2, 0) * q.dtype.type(scale)  # [H, T, S]
    mask = slots.mask()  # [T, S]
    scores[:, ~mask] = -np.inf
    head, t, src, zeroed = _NO_CUTS if cuts is None else (cuts - [0, slots.start, 0, 0]).T
    cut, zeroed = zeroed == 0, zeroed == 1
    scores[head[cut], t[cut], src[cut]] = -np.inf
    weights = softmax(scores)  # [H, T, S]
    weights[head[zeroed], t[zeroed], src[zeroed]] = 0
    if weights_out is not None:
        weights_out[:] = weights[:, mask]
    if scores_out is not None:
        scores_out[:] = scores[:, mask]
    z = weights @ v.transpose(1, 0, 2)  # [H, T, hd]
    return z.transpose(1, 0, 2)


_NO_CUTS = np.zeros((4, 0), np.int64)


def softmax(scores: Array) -> Array:  # [..., S] -> [..., S]
    """exp(s - max s) / sum exp(s - max s); all zero where every score is -inf. Mixes the last axis."""
    top = np.max(scores, axis=-1, keepdims=True, initial=-np.inf)
    e = np.exp(scores - np.where(np.isneginf(top), 0, top))  # [..., S]
    total = np.sum(e, axis=-1, keepdims=True)
    return e / np.where(total == 0, 1, total)


def activate(up: Array, kind: str, gate: Array | None = None) -> Array:  # [T, F], [T, F] -> [T, F]
    """act(up), or act(gate) * up in a gated MLP (Shazeer 2020). Mixes nothing."""
    return ACTIVATIONS[kind](up) if gate is None else ACTIVATIONS[kind](gate) * up


def silu(x: Array) -> Array:  # [T, F] -> [T, F]
    """x / (1 + exp(-x))."""
    with np.errstate(over="ignore"):  # exp(-x) = inf gives the right limit, 0
        return x / (1 + np.exp(-x))


def gelu_tanh(x: Array) -> Array:  # [T, F] -> [T, F]
    """x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2: GPT-2's gelu_new, Gemma's gelu_pytorch_tanh (Hendrycks & Gimpel)."""
    return x * (1 + np.tanh(x.dtype.type(math.sqrt(2 / math.pi)) * (x + x.dtype.type(0.044715) * x * x * x))) / 2


def gelu(x: Array) -> Array:  # [T, F] -> [T, F]
    """x (1 + erf(x / sqrt 2)) / 2, at most 4.7e-4 from gelu_tanh."""
    erf = np.array([math.erf(each) for each in (x / math.sqrt(2)).flat], x.dtype).reshape(x.shape)  # [T, F]
    return x * (1 + erf) / 2


def relu(x: Array) -> Array:  # [T, F] -> [T, F]
    """max(x, 0)."""
    return np.maximum(x, 0)


ACTIVATIONS = {"silu": silu, "gelu_tanh": gelu_tanh, "gelu": gelu, "relu": relu}


def add(x: Array, y: Array) -> Array:  # [T, D], [T, D] -> [T, D]
    """x + y: the residual connection. Mixes nothing."""
    return x + y
