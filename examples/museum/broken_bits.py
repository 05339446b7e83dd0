"""Bugs that change the last bits alone: the order of docs/arithmetic.md in plain NumPy, with switches.

Within tolerances a model with one of these is right, and yet prefill no longer equals decode bit for bit, or this port
that one. The profile `exact` of the suite finds them. Everything is slow here, one position and one head at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import numpy as np

from nanokv import ops as plain
from nanokv.cache import KVCache, Slots
from nanokv.config import Rope
from nanokv.trace import arithmetic
from nanokv.trace.arithmetic import fma

Array = np.ndarray
F = np.float32


def _fma_twice(a: Array, b: Array, c: Array) -> Array:
    """a * b + c by way of float64, which rounds the sum twice."""
    return (np.float64(a) * np.float64(b) + np.float64(c)).astype(F)


def _no_fma(a: Array, b: Array, c: Array) -> Array:
    return a * b + c


def _one_lane(x: Array, first: int = 0, squares: bool = False) -> Any:
    total = F(0)
    for element in x:
        total = fma(element, element, total) if squares else total + element
    return total


def _padded_lanes(x: Array, first: int = 0, squares: bool = False) -> Any:
    """Sixteen lanes, added up one after the other."""
    lanes = np.zeros(16, F)
    for i, element in enumerate(x):
        lane = (first + i) % 16
        lanes[lane] = fma(element, element, lanes[lane]) if squares else lanes[lane] + element
    return np.cumsum(lanes, dtype=F)[-1]


def _some_lanes(n: int, neighbours: bool = False) -> Callable[..., Any]:
    """A sum in n lanes, which are added up in halves or neighbour by neighbour."""

    def total(x: Array, first: int = 0, squares: bool = False) -> Any:
        lanes = np.zeros(n, F)
        for i, element in enumerate(x):
            lane = (first + i) % n
            lanes[lane] = fma(element, element, lanes[lane]) if squares else lanes[lane] + element
        while len(lanes) > 1:
            half = len(lanes) // 2
            lanes = lanes[::2] + lanes[1::2] if neighbours else lanes[:half] + lanes[half:]
        return lanes[0]

    return total


def _plain_squares(x: Array, first: int = 0, squares: bool = False) -> Any:
    return arithmetic.tree_sum(_in_lanes(x * x if squares else x, first))


def _in_lanes(x: Array, first: int) -> Array:
    lanes = np.zeros(16, F)
    for i, element in enumerate(x):
        lanes[(first + i) % 16] += element
    return lanes


def _four_lanes(x: Array, w: Array, b: Array | None = None) -> Array:  # [K], [N, K], [N] -> [N]
    lanes = np.zeros((4, len(w)), F)
    for k in range(len(x)):
        lanes[k % 4] = fma(x[k], w[:, k], lanes[k % 4])
    y = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3])
    return y if b is None else y + b


def _in_float64(x: Array, w: Array, b: Array | None = None) -> Array:  # [K], [N, K], [N] -> [N]
    y = np.zeros(len(w))
    for k in range(len(x)):
        y = y + np.float64(x[k]) * np.float64(w[:, k])
    return y.astype(F) if b is None else y.astype(F) + b


def _rounded(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """The float32 nearest to a function's value, which the best libraries give nearly always."""
    return lambda x: function(np.asarray(x, np.float64)).astype(F)


# bug -> (a function of nanokv.trace.arithmetic, what it is instead)
REPLACED: dict[str, tuple[str, Callable[..., Any]]] = {
    "FmaRoundedTwice": ("fma", _fma_twice),
    "MultiplyThenAdd": ("fma", _no_fma),
    "ProductsInFourLanes": ("linear", _four_lanes),
    "ProductsInFloat64": ("linear", _in_float64),
    "LibraryExp": ("exp", _rounded(np.exp)),
    "LibraryTanh": ("tanh", _rounded(np.tanh)),
    "SumInOneLane": ("lane_sum", _one_lane),
    "SumInEightLanes": ("lane_sum", _some_lanes(8)),
    "LanesAddedInOrder": ("lane_sum", _padded_lanes),
    "LanesAddedByNeighbours": ("lane_sum", _some_lanes(16, neighbours=True)),
    "SquaresWithoutFma": ("lane_sum", _plain_squares),
}


class BitOps:
    """nanokv.kernels in plain NumPy, with switches."""

    prepare, embed, add = (staticmethod(getattr(plain, name)) for name in ("prepare", "embed", "add"))

    def __init__(self, bug: str) -> None:
        self.bug = bug

    @contextmanager
    def switched(self) -> Iterator[None]:
        """The time in which a function of the arithmetic is replaced."""
        if self.bug not in REPLACED:
            yield
            return
        name, function = REPLACED[self.bug]
        with mock.patch.object(arithmetic, name, function):
            yield

    def linear(self, x: Array, w: Array, b: Array | None = None) -> Array:  # [T, K], [N, K], [N] -> [T, N]
        if self.bug == "BlasOrder":
            return plain.linear(x, w, b)
        with self.switched():
            if self.bug == "BiasFirst" and b is not None:
                y = np.stack([_from(b, row, w) for row in x])
            else:
                y = np.stack([arithmetic.linear(row, w, b) for row in x])
        return np.where(np.abs(y) < np.finfo(F).tiny, F(0), y) if self.bug == "FlushToZero" else y

    def linears(self, x: Array, ws: Sequence[Array], bs: Sequence[Array | None]) -> list[Array]:
        return [self.linear(x, w, b) for w, b in zip(ws, bs, strict=True)]

    def rms_scale(self, x: Array, eps: float) -> Array:  # [T, K] -> [T]
        with self.switched():
            return np.array([arithmetic.scale_of(row, eps) for row in x], F)

    def rms_norm(self, x: Array, w: Array, eps: float) -> Array:  # [..., K], [K] -> [..., K]
        rows = x.reshape(-1, x.shape[-1])
        r = self.rms_scale(rows, eps)[:, None]
        if self.bug == "NormDivides":
            roots = [np.sqrt(arithmetic.lane_sum(row, squares=True) / F(len(row)) + F(eps)) for row in rows]
            return (rows / np.array(roots)[:, None] * w).reshape(x.shape)
        if self.bug == "ScaleTimesWeightFirst":
            return (rows * (r * w)).reshape(x.shape)
        return (rows * r * w).reshape(x.shape)

    def layer_scale(self, x: Array, eps: float) -> Array:  # [T, K] -> [T]
        return self.rms_scale(self.centred(x), eps)

    def centred(self, x: Array) -> Array:  # [T, K] -> [T, K]
        with self.switched():
            if self.bug == "MeanTimesInverse":
                return np.stack([row - arithmetic.lane_sum(row) * (1 / F(len(row))) for row in x])
            return np.stack([arithmetic.centred(row) for row in x])

    def layer_norm(self, x: Array, w: Array, b: Array, eps: float) -> Array:  # [T, K], [K], [K] -> [T, K]
        centred = self.centred(x)
        r = self.rms_scale(centred, eps)[:, None]
        if self.bug == "ContractedByTheCompiler":
            return fma(centred * r, w, b)
        return centred * r * w + b

    def rope_table(self, rope: Rope, head_dim: int, start: int, n: int, dtype: np.dtype) -> tuple[Array, Array]:
        if self.bug != "FrequencyByPow":
            return plain.rope_table(rope, head_dim, start, n, dtype)
        powers = rope.base ** (np.arange(0, head_dim, 2) / -head_dim) / np.array(rope.divisors or 1.0)
        angles = np.arange(start, start + n)[:, None] * powers
        return np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)

    def rope(self, x: Array, cos: Array, sin: Array, pairs: str) -> Array:  # [T, N, hd] -> [T, N, hd]
        if self.bug in ("RopeOtherProducts", "RopeOtherProductInY0"):
            first, second = arithmetic.pair_slices(x.shape[-1], pairs)
            y, x0, x1, cos, sin = np.empty_like(x), x[..., first], x[..., second], cos[:, None], sin[:, None]
            y[..., first] = fma(-x1, sin, x0 * cos)
            y[..., second] = fma(x1, cos, x0 * sin) if self.bug == "RopeOtherProducts" else fma(x0, sin, x1 * cos)
            return y
        with self.switched():
            return np.stack([arithmetic.rope(*row, pairs) for row in zip(x, cos, sin, strict=True)])

    def activate(self, up: Array, kind: str, gate: Array | None = None) -> Array:  # [T, F], [T, F] -> [T, F]
        with self.switched():
            act = _silu_by_sigmoid if self.bug == "SiluBySigmoid" and kind == "silu" else partial(arithmetic.activate, kind)
            return act(up) if gate is None else act(gate) * up

    def attention(
        self, q: Array, cache: KVCache, slots: Slots, scale: float, cuts: Array | None = None,
        weights_out: Array | None = None, scores_out: Array | None = None,
    ) -> Array:  # [T, H, hd] -> [T, H, hd]  # fmt: skip
        keys, values, z = cache.keys(slots.layer), cache.values(slots.layer), np.empty_like(q)
        cut = {tuple(row[:3]) for row in cuts.tolist()} if cuts is not None else set()
        at = 0
        for t, (first, stop) in enumerate(zip(slots.first.tolist(), slots.stop.tolist(), strict=True)):
            for h, g in enumerate(slots.kv_head.tolist()):
                with self.switched():
                    scaled = (q[t, h] * F(scale), F(1)) if self.bug == "QueryScaledFirst" else (q[t, h], scale)
                    scores = arithmetic.scores(scaled[0], keys[first:stop, g], scaled[1])
                scores[[(h, slots.start + t, first + i) in cut for i in range(stop - first)]] = -np.inf
                z[t, h], weights = self._mix(scores, values[:, g], first, stop)
                for out, row in ((weights_out, weights), (scores_out, scores)):
                    if out is not None:
                        out[h, at : at + stop - first] = row
            at += stop - first
        return z

    def _mix(self, scores: Array, v: Array, first: int, stop: int) -> tuple[Array, Array]:
        """z [hd] and the weights of one row."""
        with self.switched():
            _, e, total = arithmetic.softmax(scores, first)
            if self.bug == "DividedFirst":
                return arithmetic.weighted(e / total, v[first:stop], scores, F(1)), e / total
            if self.bug == "MaskedTimesZero":
                whole, known = np.zeros(len(v), F), np.zeros(len(v), F)
                whole[first:stop], known[first:stop] = e, scores
                return arithmetic.weighted(whole, v, known, total), e / total
            if self.bug == "CutTimesZero":
                return arithmetic.weighted(e, v[first:stop], np.zeros_like(e), total), e / total
            return arithmetic.weighted(e, v[first:stop], scores, total), e / total


def _silu_by_sigmoid(x: Array) -> Array:
    with np.errstate(over="ignore"):
        return x * (1 / (1 + arithmetic.exp(-x)))


def _from(start: Array, x: Array, w: Array) -> Array:
    """y[n] by L1, but beginning at the bias."""
    y = start
    for k in range(len(x)):
        y = fma(x[k], w[:, k], y)
    return y


def numbers(bug: str) -> dict[str, Callable[..., Any]]:
    """The functions of a number, and of a vector, for the suite's adapter."""
    ops = BitOps(bug)

    def switched(name: str, **options: Any) -> Callable[..., Any]:
        def run(*inputs: Any, **named: Any) -> Any:
            with ops.switched():
                return getattr(arithmetic, name)(*inputs, **named, **options)

        return run

    return {
        "fma": switched("fma"),
        "exp": switched("exp"),
        "tanh": switched("tanh"),
        "erf": switched("erf"),
        "sum": switched("lane_sum"),
        "sum_of_squares": switched("lane_sum", squares=True),
        "maximum": lambda x, first: np.fmax.reduce(x),
    }
