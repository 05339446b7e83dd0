"""The order of docs/arithmetic.md in plain NumPy, for one position at a time: what `why` computes with.

`ops.py` says what is computed, `kernels.py` does it fast; this page does it operation by operation in the stated order,
needs no compiler, and agrees with the kernels in every bit. Rules are named as on that page. Everything is float32.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray
F = np.float32
LANES = 16


def fma(a: Array | F, b: Array | F, c: Array | F) -> Array:
    """a * b + c rounded once (N2), elementwise.

    The float64 product of two float32 is exact. Its sum with c is rounded to odd: where the float64 sum is not exact, the
    one of its two neighbours whose last bit is 1. Rounding that to float32 rounds the true sum (Boldo & Melquiond 2008).
    """
    with np.errstate(all="ignore"):
        product, added = np.float64(a) * np.float64(b), np.float64(c)
        total = np.asarray(product + added)
        part = total - product
        lost = (product - (total - part)) + (added - part)  # total + lost is the true sum (Knuth's TwoSum)
        to_odd = np.isfinite(total) & (lost != 0) & (total.view(np.uint64) % 2 == 0)
        return np.where(to_odd, np.nextafter(total, np.copysign(np.inf, lost)), total).astype(F)


# Functions, elementwise. [...] -> [...]


def exp(x: Array) -> Array:
    """F1: e^x."""
    x = np.asarray(x, F)
    x = np.where(x < F(-105), F(-105), np.where(x > F(89), F(89), x))
    n = fma(x, F(1.44269504), F(12582912)) - F(12582912)
    r = fma(n, F(1.90465421e-9), fma(n, F(-0.693147182), x))
    p = _polynomial(r, 0.00138140086, 0.00836900063, 0.0416684151, 0.166665182, 0.49999994, 1, 1)
    whole = np.where(np.isnan(n), 0, n).astype(np.int32)
    half = whole >> 1
    with np.errstate(over="ignore", under="ignore"):
        return p * _power_of_two(half) * _power_of_two(whole - half)


def tanh(x: Array) -> Array:
    """F2."""
    a = np.abs(np.asarray(x, F))
    s = a * a
    p = _polynomial(s, -0.00589515036, 0.0207959637, -0.0537838265, 0.133319244, -0.333332986)
    large = 1 - 2 / (exp(a + a) + 1)
    return np.copysign(np.where(a < F(0.6), fma(p * s, a, a), large), x)


def erf(x: Array) -> Array:
    """F3."""
    a = np.abs(np.asarray(x, F))
    a = np.where(a > 4, F(4), a)
    s = a * a
    p = _polynomial(s, 8.31677244e-05, -0.000813001185, 0.00519990642, -0.0268589407, 0.112836875, -0.376126319, 0.128379166)
    q = _polynomial(
        a, 7.37456389e-07, 1.13113501e-05, -0.000378849683, 0.0039941012, -0.0247745123, 0.107858211, 0.633663297, 1.12938178,
        -0.000150613705,
    )  # fmt: skip
    return np.copysign(np.where(a < F(0.92), fma(p, a, a), 1 - exp(-q)), x)


def _polynomial(x: Array, first: float, *others: float) -> Array:
    p = np.full_like(x, first)
    for coefficient in others:
        p = fma(p, x, F(coefficient))
    return p


def _power_of_two(n: Array) -> Array:
    return ((n + 127) << 23).astype(np.int32).view(F)


def activate(kind: str, x: Array) -> Array:
    """F4 to F7: the activation of a config."""
    with np.errstate(over="ignore", invalid="ignore"):
        if kind == "silu":
            return x / (1 + exp(-x))
        if kind == "gelu_tanh":
            return (F(0.5) * x) * (1 + tanh(x * fma(F(0.0356774081), x * x, F(0.797884561))))
        if kind == "gelu":
            return (F(0.5) * x) * (1 + erf(x * F(0.707106781)))
        return np.where((x > 0) | np.isnan(x), x, F(0))


# Sums


def lane_sum(x: Array, first: int = 0, squares: bool = False) -> F:
    """S1: the sum of a vector, or of its squares, in sixteen lanes; element i goes to lane (first + i) mod 16."""
    lanes = np.zeros(LANES, F)
    # Lanes begin at +0, and adding +0 to what such a lane can hold changes no bit, so rows may be filled up with zeros.
    rows = np.zeros((-(-(first % LANES + len(x)) // LANES), LANES), F)
    rows.reshape(-1)[first % LANES : first % LANES + len(x)] = x
    for row in rows:
        lanes = fma(row, row, lanes) if squares else lanes + row
    return tree_sum(lanes)


def tree_sum(lanes: Array) -> F:
    """S1, its end: lane i and i + 8, then + 4, + 2, + 1."""
    while len(lanes) > 1:
        lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
    return lanes[0]


def linear(x: Array, w: Array, b: Array | None = None) -> Array:  # [K], [N, K], [N] -> [N]
    """L1: y[n] = fma(x[k], w[n, k], y[n]) for k ascending, from +0; then the bias."""
    y = np.zeros(len(w), F)
    for k in range(len(x)):
        y = fma(x[k], w[:, k], y)
    return y if b is None else y + b


# Norms, rotary positions


def scale_of(x: Array, eps: float) -> F:  # [K] -> number
    """M1: r = 1 / sqrt(s / K + eps), s the sum of squares by S1."""
    return F(1) / np.sqrt(lane_sum(x, squares=True) / F(len(x)) + F(eps))


def centred(x: Array) -> Array:  # [K] -> [K]
    """M2: x - mean."""
    return x - lane_sum(x) / F(len(x))


def norm(kind: str, x: Array, w: Array | None, b: Array | None, eps: float) -> Array:  # [K] -> [K]
    """M1 or M2, or x itself where the config has no norm."""
    if kind == "none" or w is None:
        return x
    if kind == "rms":
        return x * scale_of(x, eps) * w
    c = centred(x)
    return c * scale_of(c, eps) * w + (F(0) if b is None else b)


def rope(x: Array, cos: Array, sin: Array, pairs: str) -> Array:  # [N, hd], [P], [P] -> [N, hd]
    """R2."""
    y = np.empty_like(x)
    first, second = pair_slices(x.shape[-1], pairs)
    x0, x1 = x[:, first], x[:, second]
    y[:, first], y[:, second] = fma(x0, cos, -(x1 * sin)), fma(x0, sin, x1 * cos)
    return y


def pair_slices(head_dim: int, pairs: str) -> tuple[slice, slice]:
    """Where the first and the second features of all pairs are."""
    half = head_dim // 2
    return (slice(0, half), slice(half, None)) if pairs == "halves" else (slice(0, None, 2), slice(1, None, 2))


def pair_of(i: int, head_dim: int, pairs: str) -> tuple[int, int, int]:
    """Which pair feature i belongs to, and the pair's two features."""
    pair = i % (head_dim // 2) if pairs == "halves" else i // 2
    first, second = pair_slices(head_dim, pairs)
    return pair, range(head_dim)[first][pair], range(head_dim)[second][pair]


# Attention of one head and one position that reads n slots


def scores(q: Array, k: Array, scale: float) -> Array:  # [hd], [n, hd] -> [n]
    """A2."""
    return linear(q, k) * F(scale)


def softmax(scores: Array, first: int) -> tuple[F, Array, F]:  # [n]
    """A3, A5: the maximum, e = exp(score - maximum) [n], and its sum, slot i being first + i."""
    known = scores[~np.isnan(scores)]  # S3: a NaN is passed over
    top = known.max() if len(known) and known.max() != -np.inf else F(0)
    e = exp(scores - top)
    total = lane_sum(e, first)
    return top, e, total if total != 0 else F(1)


def weighted(e: Array, v: Array, scores: Array, total: F) -> Array:  # [n], [n, hd], [n] -> [hd]
    """A4: z. A cut edge, whose score is -inf, is left out."""
    z = np.zeros(v.shape[1], F)
    for src in np.flatnonzero(~np.isneginf(scores)):
        z = fma(e[src], v[src], z)
    return z / total
