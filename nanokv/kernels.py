"""The operations of `ops.py`, compiled: same names, same signatures, and one fixed order for every sum and product.

Every state, key, value, weight and logit of a position has the same 32 bits however the tokens were split into calls and
however many threads ran, because the order in which one number is computed never depends on how many are computed beside
it. Each operation's docstring says its order. `fma` rounds once; everything else rounds once per operation; nothing is
contracted or reassociated. No BLAS: its order depends on the number of rows.

How matrices lie in memory, as float32 or quantised, stands in `panels.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from operator import is_
from typing import Any

import numba
import numpy as np
from numba import prange

from nanokv.cache import BLOCK, KVCache, Slots
from nanokv.microkernel import (
    MAX_ROWS,
    MAX_THREADS,
    bits,
    fma,
    from_bits,
    kernel,
    named,
    packed_tile,
    row_max,
    row_sum,
    row_sum_of_squares,
    specialised,
    tile,
)
from nanokv.ops import rope_table as rope_table  # the same table: its entries are defined, not computed in an order
from nanokv.panels import GROUP, PANEL, Panels, n_panels, panel_size, place
from nanokv.weights import Weights

Array = np.ndarray
TILE = 16  # positions that attention computes together
F = np.float32
U = np.uint64  # an index that cannot count from the end: the test for that would keep a loop from becoming vector code
OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "boundscheck": False}
F1, F2, F3, F4, I1, I2 = "f4[::1]", "f4[:,::1]", "f4[:,:,::1]", "f4[:,:,:,::1]", "i4[::1]", "i8[:,::1]"


# Weights in panels


@dataclass(frozen=True, eq=False)
class Job:
    """Matrices of one kind that multiply the same x in one go."""

    little: Callable[..., None]  # the kernel for little work
    much: Callable[..., None]  # and that for much
    weights: Array  # the array in which the panels lie
    table: Array  # int64 [panels, 4]: where it lies, outputs of earlier matrices, its first output, its matrix's outputs


@dataclass(frozen=True, eq=False)
class Group:
    """Matrices that multiply the same x."""

    ws: Sequence[Panels]
    bs: Sequence[Array | None]
    jobs: tuple[Job, ...]
    bias: Array  # float32 [all outputs], or empty
    ends: tuple[int, ...]  # 0, and where the outputs of each matrix end


def prepare(weights: Weights, packed: bool = False) -> Weights:
    """The weights as these operations want them: matrices in panels, vectors as float32 of their own.

    packed: quantised matrices stay as their file has them; else they become float32. The results have the same bits.
    """
    matrices = {id(array): array for _, array in weights.items() if len(array.shape) == 2 and array is not weights.pos_embed}
    placed = place(list(matrices.values()), packed)
    for panels in placed.values():
        _linears_of(panels.kind)  # compiled now, not in the first call
    return weights.map(lambda array: placed[id(array)] if id(array) in placed else np.array(array, F))


def _group(ws: Sequence[Panels], bs: Sequence[Array | None]) -> Group:
    """What is needed to multiply by these matrices, remembered with the first of them."""
    group = ws[0].group
    if group is None or group.ws != ws or not all(map(is_, group.bs, bs)):
        outputs = [w.shape[0] for w in ws]
        before = np.cumsum([0, *outputs]).tolist()
        jobs = [_job(kind, ws, before) for kind in dict.fromkeys(w.kind for w in ws)]
        bias = [np.zeros(n, F) if b is None else b for n, b in zip(outputs, bs, strict=True)]
        none = all(b is None for b in bs)
        group = Group(ws, bs, tuple(jobs), np.zeros(0, F) if none else np.concatenate(bias), tuple(before))
        ws[0].group = group
    return group


def _job(kind: str, ws: Sequence[Panels], before: Sequence[int]) -> Job:
    rows = [
        (w.at + p * panel_size(kind, w.shape[1]), before[m], p * PANEL, w.shape[0])
        for m, w in enumerate(ws)
        for p in range(n_panels(w.shape[0]))
        if w.kind == kind
    ]
    arena = ws[0].arena
    weights = arena.floats if kind == "F32" else arena.packed
    little, much = _linears_of(kind)
    return Job(little, much, weights, np.array(rows, np.int64).reshape(-1, 4))


# Single numbers


@numba.njit(inline="always", **OPTIONS)
def exp(x):
    """e^x, within 0.9 units in the last place. n = round(x / ln 2) by adding and taking away 1.5 * 2^23; r = x - n ln 2 in
    two fma; a polynomial of degree 6 in r; then times 2^(n >> 1) and 2^(n - (n >> 1)). 0 below -104."""
    x = F(-105) if x < F(-105) else x
    x = F(89) if x > F(89) else x
    t = fma(x, F(1.44269504), F(12582912.0))
    n = t - F(12582912.0)
    r = fma(n, F(-0.693147182), x)
    r = fma(n, F(1.90465421e-9), r)
    p = F(0.00138140086)
    p = fma(p, r, F(0.00836900063))
    p = fma(p, r, F(0.0416684151))
    p = fma(p, r, F(0.166665182))
    p = fma(p, r, F(0.49999994))
    p = fma(p, r, F(1.0))
    p = fma(p, r, F(1.0))
    whole = bits(t) - bits(F(12582912.0))
    half = whole >> np.int32(1)
    return p * from_bits((half + np.int32(127)) << np.int32(23)) * from_bits((whole - half + np.int32(127)) << np.int32(23))


@numba.njit(inline="always", **OPTIONS)
def _with_sign_of(a, x):
    """a, which is not negative, with x's sign bit."""
    return from_bits(bits(a) | (bits(x) & np.int32(-(2**31))))


@numba.njit(inline="always", **OPTIONS)
def tanh(x):
    """tanh x, within 1.4 units in the last place. With a = |x| < 0.6: a + a s P(s), s = a^2; else 1 - 2 / (exp(2a) + 1)."""
    a = abs(x)
    large = F(1.0) - F(2.0) / (exp(a + a) + F(1.0))
    s = a * a
    p = F(-0.00589515036)
    p = fma(p, s, F(0.0207959637))
    p = fma(p, s, F(-0.0537838265))
    p = fma(p, s, F(0.133319244))
    p = fma(p, s, F(-0.333332986))
    small = fma(p * s, a, a)
    return _with_sign_of(small if a < F(0.6) else large, x)


@numba.njit(inline="always", **OPTIONS)
def erf(x):
    """erf x, within 1.2 units in the last place. With a = |x| < 0.92: a + a P(a^2); else 1 - exp(-Q(a)); 1 from 4 on."""
    a = abs(x)
    a = F(4.0) if a > F(4.0) else a
    s = a * a
    p = F(8.31677244e-05)
    p = fma(p, s, F(-0.000813001185))
    p = fma(p, s, F(0.00519990642))
    p = fma(p, s, F(-0.0268589407))
    p = fma(p, s, F(0.112836875))
    p = fma(p, s, F(-0.376126319))
    p = fma(p, s, F(0.128379166))
    small = fma(p, a, a)
    q = F(7.37456389e-07)
    q = fma(q, a, F(1.13113501e-05))
    q = fma(q, a, F(-0.000378849683))
    q = fma(q, a, F(0.0039941012))
    q = fma(q, a, F(-0.0247745123))
    q = fma(q, a, F(0.107858211))
    q = fma(q, a, F(0.633663297))
    q = fma(q, a, F(1.12938178))
    q = fma(q, a, F(-0.000150613705))
    large = F(1.0) - exp(-q)
    return _with_sign_of(small if a < F(0.92) else large, x)


@numba.njit(inline="always", **OPTIONS)
def silu(x):
    """x / (1 + exp(-x))."""
    return x / (F(1.0) + exp(-x))


@numba.njit(inline="always", **OPTIONS)
def gelu_tanh(x):
    """(x / 2) (1 + tanh(x fma(0.0356774081, x^2, 0.797884561))); the constants are 0.044715 sqrt(2/pi) and sqrt(2/pi)."""
    return F(0.5) * x * (F(1.0) + tanh(x * fma(F(0.0356774081), x * x, F(0.797884561))))


@numba.njit(inline="always", **OPTIONS)
def gelu(x):
    """(x / 2) (1 + erf(x * 0.707106781))."""
    return F(0.5) * x * (F(1.0) + erf(x * F(0.707106781)))


# Matrix products


def _rows_of(columns):
    """A function for tiles of so many columns: y[r, c] = fma(x[r, k], w[k, c], y[r, c]), k ascending, for n_rows rows."""

    @numba.njit(**OPTIONS)
    @named(str(columns))
    def rows(x, x_at, x_row, n_rows, w, w_at, w_row, n_k, y, y_at, y_row):
        while n_rows >= MAX_ROWS:
            tile(MAX_ROWS, columns, x, x_at, x_row, w, w_at, w_row, n_k, y, y_at, y_row)
            x_at, y_at, n_rows = x_at + MAX_ROWS * x_row, y_at + MAX_ROWS * y_row, n_rows - MAX_ROWS
        if n_rows >= 4:
            tile(4, columns, x, x_at, x_row, w, w_at, w_row, n_k, y, y_at, y_row)
            x_at, y_at, n_rows = x_at + 4 * x_row, y_at + 4 * y_row, n_rows - 4
        if n_rows == 3:
            tile(3, columns, x, x_at, x_row, w, w_at, w_row, n_k, y, y_at, y_row)
        elif n_rows == 2:
            tile(2, columns, x, x_at, x_row, w, w_at, w_row, n_k, y, y_at, y_row)
        elif n_rows == 1:
            tile(1, columns, x, x_at, x_row, w, w_at, w_row, n_k, y, y_at, y_row)

    return rows


_panel_rows, _block_rows = _rows_of(PANEL), _rows_of(BLOCK)


@numba.njit(**OPTIONS)
def _add_bias(sums, at, n_rows, row, columns, bias, first):
    if len(bias) > 0:
        for i in range(n_rows):
            for c in range(columns):
                sums[at + i * row + c] += bias[first + c]


@numba.njit(**OPTIONS)
def _put_panel(sums, n_rows, job, bias, y):
    """Add the bias to a panel's sums [T, PANEL] and put them in their columns of y [T, N], behind earlier matrices' outputs."""
    _, before, column, n = job
    columns = min(PANEL, n - column)
    _add_bias(sums, 0, n_rows, PANEL, columns, bias, before + column)
    for i in range(n_rows):
        y_at = n_rows * before + i * n + column
        for c in range(columns):
            y[U(y_at + c)] = sums[U(i * PANEL + c)]


@numba.njit(**OPTIONS)
def _float_row(x, weights, at, n_k, y, y_at):
    tile(1, PANEL, x, 0, n_k, weights, at, PANEL, n_k, y, y_at, PANEL)


@numba.njit(**OPTIONS)
def _float_rows(x, weights, at, n_k, n_rows, sums):
    _panel_rows(x, 0, n_k, n_rows, weights, at, PANEL, n_k, sums, 0, PANEL)


def _packed_rows_of(kind):
    """For quantised weights: one row decodes them as it goes, several rows share a panel decoded beforehand."""
    dot, unpack = packed_tile(kind, one_row=True), packed_tile(kind, one_row=False)

    @numba.njit(**OPTIONS)
    @named(kind)
    def packed_row(x, weights, at, n_k, y, y_at):
        dot(x, 0, weights, at, n_k // GROUP, y, y_at)

    @numba.njit(**OPTIONS)
    @named(kind)
    def packed_rows(x, weights, at, n_k, n_rows, sums):
        panel = np.empty(n_k * PANEL, F)
        unpack(weights, at, n_k // GROUP, panel, 0)
        _panel_rows(x, 0, n_k, n_rows, panel, 0, PANEL, n_k, sums, 0, PANEL)

    return packed_row, packed_rows


def _panel_of(kind, one_row, rows):
    """One panel of one job (a row of a Job's table) for all T rows of x; y is flat, a matrix's [T, N] after another's, and
    holds 0 if T is 1, so that a panel can be summed where it belongs."""

    @numba.njit(**OPTIONS)
    @named(kind)
    def panel(x, weights, job, bias, y):
        n_rows, n_k = x.shape
        at, before, column, n = job
        if n_rows == 1 and column + PANEL <= n:
            one_row(x, weights, at, n_k, y, before + column)
            _add_bias(y, before + column, 1, PANEL, PANEL, bias, before + column)
        else:
            sums = np.zeros(n_rows * PANEL, F)
            if n_rows == 1:
                one_row(x, weights, at, n_k, sums, 0)
            else:
                rows(x, weights, at, n_k, n_rows, sums)
            _put_panel(sums, n_rows, job, bias, y)

    return panel


panel: Any = None  # `specialised` binds these two for each kind of matrix
unpack: Any = None


def _linears(x, weights, table, bias, y):
    for p in range(len(table)):
        panel(x, weights, (table[p, 0], table[p, 1], table[p, 2], table[p, 3]), bias, y)


def _linears_parallel(x, weights, table, bias, y):
    for p in prange(len(table)):
        panel(x, weights, (table[p, 0], table[p, 1], table[p, 2], table[p, 3]), bias, y)


@lru_cache
def _linears_of(kind):
    """The kernels for matrices of a kind, for little work and for much; compiled when a model first has that kind."""
    panel = _panel_of(kind, *((_float_row, _float_rows) if kind == "F32" else _packed_rows_of(kind)))
    signature = f"void({F2},{F1 if kind == 'F32' else 'u1[::1]'},{I2},{F1},{F1})"
    much = kernel(signature, parallel=True)(specialised(_linears_parallel, kind, panel=panel))
    return (kernel(signature)(specialised(_linears, kind, panel=panel)) if kind == "F32" else much), much


def _unpack(weights, at, step, n, n_k, y):
    for p in range(n):
        unpack(weights, at + p * step, n_k // GROUP, y, p * n_k * PANEL)


@lru_cache
def _unpack_of(kind):
    return kernel(f"void(u1[::1],i8,i8,i8,i8,{F1})")(specialised(_unpack, kind, unpack=packed_tile(kind, one_row=False)))


def unpacked(panels: Panels, first: int = 0, n: int | None = None) -> Array:
    """Quantised panels `first` to first + n - 1 as float32 [panels, K, PANEL]: the bits of dequantising the file."""
    n = n_panels(panels.shape[0]) - first if n is None else n
    k, size = panels.shape[1], panel_size(panels.kind, panels.shape[1])
    y = np.empty(n * k * PANEL, F)
    _unpack_of(panels.kind)(panels.arena.packed, panels.at + first * size, size, n, k, y)
    return y.reshape(n, k, PANEL)


def linear(x: Array, w: Panels, b: Array | None = None) -> Array:  # [T, K], [N, K], [N] -> [T, N]
    """y = x W^T + b. y[n] starts at 0 and takes fma(x[k], w[n, k], y[n]) for k = 0, 1, ...; then b[n] is added."""
    return linears(x, (w,), (b,))[0]


def linears(x: Array, ws: Sequence[Panels], bs: Sequence[Array | None]) -> list[Array]:
    """Several linear maps of the same x: [T, N] for each."""
    group, t = _group(ws, bs), len(x)
    total = group.ends[-1]
    y = (np.zeros if t == 1 else np.empty)(t * total, F)
    for job in group.jobs:
        (job.much if x.size * total >= PARALLEL_WORK else job.little)(x, job.weights, job.table, group.bias, y)
    if len(ws) == 1:
        return [y.reshape(t, total)]
    return [y[t * first : t * end].reshape(t, end - first) for first, end in pairwise(group.ends)]


PARALLEL_WORK = 1 << 16  # multiply-adds from which a second thread is worth waking


@kernel(f"void({I1},{F1},i8,i8,{F2})")
def _embed(tokens, floats, at, n_k, y):
    for i in range(len(tokens)):
        row = at + (tokens[i] // PANEL) * PANEL * n_k + tokens[i] % PANEL
        for k in range(n_k):
            y[i, k] = floats[row + k * PANEL]


def embed(tokens: Array, w: Panels) -> Array:  # [T], [V, D] -> [T, D]
    """x = W[token]."""
    if w.kind != "F32":
        return np.stack([unpacked(w, token // PANEL, 1)[0, :, token % PANEL] for token in tokens.tolist()])
    y = np.empty((len(tokens), w.shape[1]), F)
    _embed(tokens, w.arena.floats, w.at, w.shape[1], y)
    return y


# Norms and everything else that treats each row by itself


@numba.njit(**OPTIONS)
def _scale(x, at, n, eps):
    return F(1.0) / np.sqrt(row_sum_of_squares(x, at, 0, n) / F(n) + eps)


@numba.njit(**OPTIONS)
def _rms_norm_row(x, i, w, eps, y):
    n = len(w)
    r = _scale(x, i * n, n, eps)
    for j in range(n):
        y[U(i * n + j)] = x[U(i * n + j)] * r * w[j]


@kernel(f"void({F1},{F1},f4,{F1})")
def _rms_norm(x, w, eps, y):
    for i in range(len(x) // len(w)):
        _rms_norm_row(x, i, w, eps, y)


@kernel(f"void({F1},{F1},f4,{F1})", parallel=True)
def _rms_norm_parallel(x, w, eps, y):
    for i in prange(len(x) // len(w)):
        _rms_norm_row(x, i, w, eps, y)


def rms_norm(x: Array, w: Array, eps: float) -> Array:  # [..., K], [K] -> [..., K]
    """(x r) w with r = 1 / sqrt(s / K + eps); s sums squares in sixteen lanes, s = fma(x, x, s)."""
    y = np.empty(x.shape, F)
    (_rms_norm_parallel if x.size >= PARALLEL_SIZE else _rms_norm)(x.reshape(-1), w, eps, y.reshape(-1))
    return y


PARALLEL_SIZE = 1 << 14  # elements from which a second thread is worth waking


@kernel(f"void({F2},f4,{F1})")
def _rms_scale(x, eps, y):
    for i in range(len(x)):
        y[i] = _scale(x, i * x.shape[1], x.shape[1], eps)


def rms_scale(x: Array, eps: float) -> Array:  # [T, K] -> [T]
    """r of rms_norm."""
    y = np.empty(len(x), F)
    _rms_scale(x, eps, y)
    return y


@numba.njit(**OPTIONS)
def _centre(x, i, y):
    n = x.shape[1]
    mean = row_sum(x, i * n, 0, n) / F(n)
    for j in range(n):
        y[i, j] = x[i, j] - mean


@kernel(f"void({F2},f4,{F1})")
def _layer_scale(x, eps, y):
    centred = np.empty_like(x)
    for i in range(len(x)):
        _centre(x, i, centred)
        y[i] = _scale(centred, i * x.shape[1], x.shape[1], eps)


def layer_scale(x: Array, eps: float) -> Array:  # [T, K] -> [T]
    """r of layer_norm."""
    y = np.empty(len(x), F)
    _layer_scale(x, eps, y)
    return y


@kernel(f"void({F2},{F1},{F1},f4,{F2})")
def _layer_norm(x, w, b, eps, y):
    t, n = x.shape
    for i in range(t):
        _centre(x, i, y)
        r = _scale(y, i * n, n, eps)
        for j in range(n):
            y[i, j] = y[i, j] * r * w[j] + b[j]


def layer_norm(x: Array, w: Array, b: Array, eps: float) -> Array:  # [T, K], [K], [K] -> [T, K]
    """((x - mean) r) w + b; the mean and then the squared deviations are summed in sixteen lanes."""
    y = np.empty(x.shape, F)
    _layer_norm(x, w, b, eps, y)
    return y


@kernel(f"void({F3},{F2},{F2},i8,i8,{F3})")
def _rope(x, cos, sin, step, apart, y):
    for t in range(x.shape[0]):
        for h in range(x.shape[1]):
            for i in range(cos.shape[1]):
                x0, x1 = x[t, h, i * step], x[t, h, i * step + apart]
                y[t, h, i * step] = fma(x0, cos[t, i], -(x1 * sin[t, i]))
                y[t, h, i * step + apart] = fma(x0, sin[t, i], x1 * cos[t, i])


def rope(x: Array, cos: Array, sin: Array, pairs: str) -> Array:  # [T, N, hd], [T, P], [T, P] -> [T, N, hd]
    """fma(x0, cos, -(x1 sin)) and fma(x0, sin, x1 cos) for each pair."""
    y = np.empty(x.shape, F)
    step, apart = (1, x.shape[2] // 2) if pairs == "halves" else (2, 1)
    _rope(x, cos, sin, step, apart, y)
    return y


@numba.njit(**OPTIONS)
def _activate_part(kind, x, up, gated, y):
    if kind == 0:
        for j in range(len(x)):
            y[j] = silu(x[j])
    elif kind == 1:
        for j in range(len(x)):
            y[j] = gelu_tanh(x[j])
    elif kind == 2:
        for j in range(len(x)):
            y[j] = gelu(x[j])
    else:
        for j in range(len(x)):
            y[j] = x[j] if x[j] > F(0.0) or x[j] != x[j] else F(0.0)
    if gated:
        for j in range(len(x)):
            y[j] = y[j] * up[j]


@kernel(f"void(i8,{F1},{F1},b1,{F1})")
def _activate(kind, x, up, gated, y):
    _activate_part(kind, x, up, gated, y)


@kernel(f"void(i8,{F1},{F1},b1,{F1})", parallel=True)
def _activate_parallel(kind, x, up, gated, y):
    n = 1 << 12
    for part in prange((len(x) + n - 1) // n):
        at = np.int64(part) * n
        _activate_part(kind, x[at : at + n], up[at : at + n], gated, y[at : at + n])


ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3}


def activate(up: Array, kind: str, gate: Array | None = None) -> Array:  # [T, F], [T, F] -> [T, F]
    """act(up), or act(gate) * up."""
    y = np.empty(up.shape, F)
    x = up if gate is None else gate
    run = _activate_parallel if up.size >= PARALLEL_SIZE else _activate
    run(ACTIVATIONS[kind], x.reshape(-1), up.reshape(-1), gate is not None, y.reshape(-1))
    return y


def add(x: Array, y: Array) -> Array:  # [T, D], [T, D] -> [T, D]
    """x + y."""
    return x + y


# Attention. Rows are pairs of a position and a query head that reads the same key/value head: row (t - t0) * m + r.


@numba.njit(**OPTIONS)
def _scores(queries, n_rows, keys, g, base, low_block, high_block, scores, width):
    """Pass 1: q . k by fma over the features, for the slots of some blocks, from scores of 0 on; column 0 is slot `base`."""
    n_blocks, hd = keys.shape[1], keys.shape[2]
    for b in range(low_block, high_block):
        key_at, score_at = (g * n_blocks + b) * hd * BLOCK, b * BLOCK - base
        _block_rows(queries, 0, hd, n_rows, keys, key_at, BLOCK, hd, scores, score_at, width)


@numba.njit(**OPTIONS)
def _softmax(scores, at, low, high, scale, cut, zeroed, scores_out, weights_out, out_at):
    """Pass 2: in the row that begins at `at`, scores of columns low to high - 1 become exp(score * scale - max); their sum.

    cut: columns whose score is -inf or, where zeroed, whose weight is 0 in the end. The outputs, if
    they are not empty, get the scaled scores and the weights.
    """
    for j in range(low, high):
        scores[U(at + j)] = scores[U(at + j)] * scale
    for i in range(len(cut)):
        if not zeroed[i]:
            scores[at + cut[i]] = -np.inf
    if len(scores_out) > 0:
        for j in range(low, high):
            scores_out[U(out_at + j - low)] = scores[U(at + j)]
    top = row_max(scores, at, low, high)
    if top == F(-np.inf):
        top = F(0.0)
    for j in range(low, high):
        scores[U(at + j)] = exp(scores[U(at + j)] - top)
    total = row_sum(scores, at, low, high)
    if total == F(0.0):
        total = F(1.0)
    for i in range(len(cut)):
        if zeroed[i]:
            scores[at + cut[i]] = F(0.0)
    if len(weights_out) > 0:
        for j in range(low, high):
            weights_out[U(out_at + j - low)] = scores[U(at + j)] / total
    return total


@numba.njit(**OPTIONS)
def _cut_of(cuts, head, dst, base):
    """The columns cut from a row, ascending, and whether by weight. cuts [n, 4] are (head, dst, src, zeroed), ascending."""
    cut, zeroed = np.empty(len(cuts), np.int64), np.empty(len(cuts), np.bool_)
    n = 0
    for i in range(len(cuts)):
        if cuts[i, 0] == head and cuts[i, 1] == dst:
            cut[n], zeroed[n] = cuts[i, 2] - base, cuts[i, 3] == 1
            n += 1
    return cut[:n], zeroed[:n]


@numba.njit(**OPTIONS)
def _weighted(e, at, width, n_rows, values, g, low, high, base, sums, sums_at):
    """Pass 3, a part of it: sums += e v by fma over slots low to high - 1, ascending, for n_rows rows."""
    _, n_strips, n_slots, _ = values.shape
    for strip in range(n_strips if low < high else 0):
        v_at, s_at = ((g * n_strips + strip) * n_slots + low) * BLOCK, sums_at + strip * BLOCK
        _block_rows(e, at + low - base, width, n_rows, values, v_at, BLOCK, high - low, sums, s_at, n_strips * BLOCK)


@numba.njit(**OPTIONS)
def _weighted_rows(e, width, m, t0, t1, first, stop, values, g, base, sums, padded):
    """Pass 3: slots that all positions of the tile read go together, those at the edges of the mask position by position."""
    n = t1 - t0
    low, high = first[t1 - 1], max(first[t1 - 1], stop[t0])
    for part in range(2 * n + 1):  # the edges before what is common, what is common, the edges after it
        t = t0 + (part if part < n else part - n - 1)
        row, n_rows, begin, end = (t - t0) * m, m, first[t], min(low, stop[t])
        if part == n:
            row, n_rows, begin, end = 0, n * m, low, high
        elif part > n:
            begin, end = max(high, first[t]), stop[t]
        _weighted(e, row * width, width, n_rows, values, g, begin, end, base, sums, row * padded)


@numba.njit(**OPTIONS)
def _weighted_uncut(e, width, head0, m, t0, t1, start, first, stop, cuts, values, g, base, sums, padded):
    """Pass 3 where edges are cut: row by row, over the runs of slots between the cut ones."""
    for row in range((t1 - t0) * m):
        t = t0 + row // m
        cut = _cut_of(cuts, head0 + row % m, start + t, base)[0]
        low = np.int64(first[t])
        for i in range(len(cut) + 1):
            high = cut[i] + base if i < len(cut) else np.int64(stop[t])
            _weighted(e, row * width, width, 1, values, g, low, high, base, sums, row * padded)
            low = high + 1


@numba.njit(**OPTIONS)
def _softmax_of(scores, at, head, t, start, first, stop, base, scale, cuts, out_at, scores_out, weights_out):
    """Pass 2 for one query head of the call's position t; the sum of the row."""
    cut, zeroed = _cut_of(cuts, head, start + t, base)
    put = np.int64(0) if len(out_at) == 0 else head * out_at[-1] + out_at[t]
    return _softmax(scores, at, first[t] - base, stop[t] - base, scale, cut, zeroed, scores_out, weights_out, put)


@numba.njit(**OPTIONS)
def _gather_queries(q, head0, m, t0, t1):
    hd = q.shape[2]
    queries = np.empty((t1 - t0) * m * hd, F)
    for t in range(t0, t1):
        for r in range(m):
            at = ((t - t0) * m + r) * hd
            for i in range(hd):
                queries[at + i] = q[t, head0 + r, i]
    return queries


@numba.njit(**OPTIONS)
def _attend(q, keys, values, start, run, t0, t1, first, stop, scale, cuts, out_at, scores_out, weights_out, z):
    """All passes for positions t0 to t1 - 1 and the query heads of a run, (first head, heads, key/value head)."""
    head0, m, g = run
    n_rows, padded = (t1 - t0) * m, values.shape[1] * BLOCK
    low_block, high_block = first[t0] // BLOCK, (stop[t1 - 1] + BLOCK - 1) // BLOCK
    base, width = low_block * BLOCK, (high_block - low_block) * BLOCK
    queries = _gather_queries(q, head0, m, t0, t1)
    scores = np.zeros(n_rows * width, F)
    _scores(queries, n_rows, keys, g, base, low_block, high_block, scores, width)
    totals = np.empty(n_rows, F)
    for row in range(n_rows):
        totals[row] = _softmax_of(scores, row * width, head0 + row % m, t0 + row // m, start, first, stop, base, scale, cuts,
                                  out_at, scores_out, weights_out)  # fmt: skip
    sums = np.zeros(n_rows * padded, F)
    if len(cuts) == 0:
        _weighted_rows(scores, width, m, t0, t1, first, stop, values, g, base, sums, padded)
    else:
        _weighted_uncut(scores, width, head0, m, t0, t1, start, first, stop, cuts, values, g, base, sums, padded)
    for row in range(n_rows):
        for i in range(q.shape[2]):
            z[t0 + row // m, head0 + row % m, i] = sums[row * padded + i] / totals[row]


@kernel(f"void({F3},{F4},{F4},i8,{I2},{I1},{I1},f4,{I2},i8[::1],{F1},{F1},{F3})", parallel=True)
def _attention(q, keys, values, start, runs, first, stop, scale, cuts, out_at, scores_out, weights_out, z):
    n_tiles = (len(q) + TILE - 1) // TILE
    for task in prange(len(runs) * n_tiles):
        j, i = np.int64(task) % len(runs), np.int64(task) // len(runs)
        i = i // 2 if i % 2 == 0 else n_tiles - 1 - i // 2  # short and long rows by turns, so that threads share evenly
        t0 = i * TILE
        run = (runs[j, 0], runs[j, 1], runs[j, 2])
        _attend(q, keys, values, start, run, t0, min(t0 + TILE, len(q)), first, stop, scale, cuts, out_at,
                scores_out, weights_out, z)  # fmt: skip


def attention(
    q: Array,
    cache: KVCache,
    slots: Slots,
    scale: float,
    cuts: Array | None = None,
    weights_out: Array | None = None,
    scores_out: Array | None = None,
) -> Array:  # [T, H, hd] -> [T, H, hd]
    """z = softmax(q k^T scale) v. A score is summed by fma over the features, ascending, then scaled. The maximum is
    subtracted, exp taken, and summed in sixteen lanes by slot mod 16; e v is summed by fma over slots, ascending; the
    division by the sum comes last. A slot outside the mask, or cut, is neither multiplied nor added. Cuts may stand in any
    order, and one twice."""
    z = np.empty(q.shape, F)
    cuts = _NO_CUTS if cuts is None else np.unique(cuts, axis=0)  # ascending, for a row is summed between one cut and the next
    out_at = _NOWHERE if weights_out is None and scores_out is None else slots.ranges.ends
    outs = [_NOTHING if out is None else out.reshape(-1) for out in (scores_out, weights_out)]
    keys, values = cache.key_blocks[slots.layer], cache.value_strips[slots.layer]
    runs = _runs(slots.kv_head.tobytes())
    _attention(q, keys, values, slots.start, runs, slots.first, slots.stop, scale, cuts, out_at, *outs, z)
    return z


_NO_CUTS, _NOTHING, _NOWHERE = np.zeros((0, 4), np.int64), np.zeros(0, F), np.zeros(0, np.int64)


@lru_cache
def _runs(kv_head: bytes) -> Array:
    """int64 [n, 3]: (first query head, how many, key/value head) of neighbouring query heads that read the same one."""
    heads = np.frombuffer(kv_head, np.int32)
    begins = np.flatnonzero(np.diff(heads, prepend=-1))
    counts = np.diff(begins, append=len(heads))
    return np.stack([begins, counts, heads[begins]], axis=1).astype(np.int64)


# Hashes, for the trace


@kernel("void(u4[:,::1], u8[::1])")
def _hash_words(words, hashes):
    for i in range(len(words)):
        h = np.uint64(0xCBF29CE484222325)
        for j in range(words.shape[1]):
            h = (h ^ np.uint64(words[i, j])) * np.uint64(0x100000001B3)
        hashes[i] = h


def hash_words(x: Array) -> Array:  # [..., hd] -> [...]
    """FNV-1a-64 of each row, over its 32-bit words: h = (h xor word) * prime, modulo 2^64, from the offset basis on."""
    words = np.array(x, order="C").view(np.uint32)
    hashes = np.empty(x.shape[:-1], np.uint64)
    _hash_words(words.reshape(-1, words.shape[-1]), hashes.reshape(-1))
    return hashes


@kernel("void(u4[:,:,:,::1], u4[:,:,:,::1], u8[:,:,::1])", parallel=True)
def _hash_entries(keys, values, hashes):
    _, n_heads, n = hashes.shape
    n_blocks = (n + BLOCK - 1) // BLOCK
    for task in prange(n_heads * n_blocks):
        g, b = np.int64(task) // n_blocks, np.int64(task) % n_blocks
        h = np.full((2, BLOCK), np.uint64(0xCBF29CE484222325))
        for i in range(keys.shape[2]):  # a block's slots together, for in one row each product waits for the one before it
            for s in range(BLOCK):
                key, value = keys[g, b, i, s], values[g, i // BLOCK, b * BLOCK + s, i % BLOCK]
                h[0, s] = (h[0, s] ^ np.uint64(key)) * np.uint64(0x100000001B3)
                h[1, s] = (h[1, s] ^ np.uint64(value)) * np.uint64(0x100000001B3)
        for s in range(min(BLOCK, n - b * BLOCK)):
            hashes[0, g, b * BLOCK + s], hashes[1, g, b * BLOCK + s] = h[0, s], h[1, s]


def hash_entries(cache: KVCache, layer: int, n: int) -> tuple[Array, Array]:  # -> [n, G], [n, G]
    """`hash_words` of the keys and of the values of a layer's first n slots, read in place."""
    keys, values = cache.key_blocks[layer].view(np.uint32), cache.value_strips[layer].view(np.uint32)
    hashes = np.empty((2, len(keys), n), np.uint64)
    _hash_entries(keys, values, hashes)
    return hashes[0].T, hashes[1].T


# Threads


def max_threads() -> int:
    """The most threads that this process can use."""
    return MAX_THREADS


def set_threads(n: int) -> None:
    """Use n threads in the kernels that share work."""
    numba.set_num_threads(n)
