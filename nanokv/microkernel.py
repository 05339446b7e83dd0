"""The engine room: the few inner loops that must be vector code in a fixed order, written as LLVM instructions.

numba compiles the loops of `kernels.py` well where neighbouring iterations do not depend on each other, but it has no
fused multiply-add, and its vectoriser may not reorder a sum. So this page says those instructions itself:

    fma, bits, from_bits       single numbers
    tile                       a tile of rows x columns of a matrix product, k strictly ascending in every element
    packed_tile                the same for one row and quantised weights, which are decoded in registers
    row_max, row_sum, row_sum_of_squares    reductions of a row in sixteen lanes

The width of the machine's vectors decides how a tile is cut, never the order of the operations on one element, so every
machine computes the same bits.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any

import llvmlite.binding as llvm
import numba
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.config import CPU_FEATURES, CPU_NAME
from numba.extending import intrinsic

from nanokv.panels import GROUP, PANEL, part_offset, record_bytes

LANES = 16  # of a reduction: element i belongs to lane i % 16

F32, I32, I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)


def _vector_width() -> int:
    """Floats in one vector register of the machine that code is generated for: 16 (AVX-512), 8 (AVX) or 4 (NEON, SSE)."""
    if CPU_NAME:  # set by the user, to compile for another machine
        wide = "avx512" in (CPU_FEATURES or "") or CPU_NAME in ("x86-64-v4", "skylake-avx512", "znver4", "znver5")
        return 16 if wide else 8 if CPU_NAME.startswith(("x86-64-v3", "haswell", "znver")) else 4
    features = llvm.get_host_cpu_features()
    return 16 if features.get("avx512f") else 8 if features.get("avx2") else 4


WIDTH = _vector_width()
VECTORS = 3  # registers side by side in a tile, so that one x serves three multiply-adds
MAX_ROWS = 4 if WIDTH == 8 else 8  # 8 x 3 accumulators fit 32 registers, 4 x 3 fit 16


def _vector(element: ir.Type, n: int) -> ir.VectorType:
    return ir.VectorType(element, n)


def _splat(builder: ir.IRBuilder, scalar: ir.Value, n: int) -> ir.Value:
    """A vector of n times the same number."""
    undefined = ir.Constant(_vector(scalar.type, n), ir.Undefined)
    first = builder.insert_element(undefined, scalar, I32(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_vector(I32, n), [0] * n))


def _declared(builder: ir.IRBuilder, name: str, result: ir.Type, arguments: list[ir.Type]) -> ir.Function:
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)


def _fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """a * b + c, rounded once, of numbers or of vectors."""
    n = a.type.count if isinstance(a.type, ir.VectorType) else 0
    name = f"llvm.fma.v{n}f32" if n else "llvm.fma.f32"
    return builder.call(_declared(builder, name, a.type, [a.type] * 3), [a, b, c])


def _load(builder: ir.IRBuilder, pointer: ir.Value, n: int) -> ir.Value:
    loaded = builder.load(builder.bitcast(pointer, _vector(F32, n).as_pointer()))
    loaded.align = 4
    return loaded


def _load_one(builder: ir.IRBuilder, pointer: ir.Value) -> ir.Value:
    loaded = builder.load(pointer)
    loaded.align = 4
    return loaded


def _store(builder: ir.IRBuilder, value: ir.Value, pointer: ir.Value) -> None:
    stored = builder.store(value, builder.bitcast(pointer, value.type.as_pointer()))
    stored.align = 4


def _data(context: Any, builder: ir.IRBuilder, array_type: Any, array: ir.Value) -> ir.Value:
    """Where an array's first element lies."""
    return context.make_array(array_type)(context, builder, array).data


@intrinsic
def fma(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c of float32, rounded once."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return _fma(builder, *args)

    return types.float32(types.float32, types.float32, types.float32), generate


@intrinsic
def bits(typing_context: Any, x: Any) -> Any:
    """The 32 bits of a float32 as an int32."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.bitcast(args[0], I32)

    return types.int32(types.float32), generate


@intrinsic
def from_bits(typing_context: Any, x: Any) -> Any:
    """The float32 with the 32 bits of an int32."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.bitcast(args[0], F32)

    return types.float32(types.int32), generate


@intrinsic(prefer_literal=True)
def tile(typing_context: Any, rows: Any, columns: Any, x: Any, x_at: Any, x_row: Any, w: Any, w_at: Any, w_row: Any,
          n_k: Any, y: Any, y_at: Any, y_row: Any) -> Any:  # fmt: skip
    """y[r, c] = fma(x[r, k], w[k, c], y[r, c]) for k = 0, 1, ..., n_k - 1, for r < rows and c < columns.

    rows and columns are literal numbers. Element [r, k] of x lies x_at + r * x_row + k floats after x's beginning, and so on.
    """
    if not isinstance(rows, types.IntegerLiteral) or not isinstance(columns, types.IntegerLiteral):
        return None
    n_rows, n_columns = rows.literal_value, columns.literal_value
    n_vectors = VECTORS if n_columns % (VECTORS * WIDTH) == 0 else 2
    i64 = types.int64
    signature = types.void(rows, columns, x, i64, i64, w, i64, i64, i64, y, i64, i64)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        _, _, x, x_at, x_row, w, w_at, w_row, n_k, y, y_at, y_row = args
        kinds = signature.args
        x_data = builder.gep(_data(context, builder, kinds[2], x), [x_at])
        w_data = builder.gep(_data(context, builder, kinds[5], w), [w_at])
        y_data = builder.gep(_data(context, builder, kinds[9], y), [y_at])
        x_rows = [builder.gep(x_data, [builder.mul(x_row, I64(r))]) for r in range(n_rows)]
        y_rows = [builder.gep(y_data, [builder.mul(y_row, I64(r))]) for r in range(n_rows)]
        for strip in range(0, n_columns, n_vectors * WIDTH):
            columns = [I64(strip + v * WIDTH) for v in range(n_vectors)]
            _strip(builder, x_rows, builder.gep(w_data, [I64(strip)]), w_row, n_k, y_rows, columns)
        return context.get_dummy_value()

    return signature, generate


def _strip(builder: ir.IRBuilder, x_rows: list[ir.Value], w: ir.Value, w_row: ir.Value, n_k: ir.Value,
           y_rows: list[ir.Value], columns: list[ir.Value]) -> None:  # fmt: skip
    """One strip of a tile, as wide as the accumulators that fit the registers."""
    places = [builder.gep(y, [c]) for y in y_rows for c in columns]

    def multiply_add(k: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        w_k = builder.gep(w, [builder.mul(k, w_row)])
        loaded = [_load(builder, builder.gep(w_k, [I64(v * WIDTH)]), WIDTH) for v in range(len(columns))]
        added = []
        for r, x in enumerate(x_rows):
            spread = _splat(builder, _load_one(builder, builder.gep(x, [k])), WIDTH)
            added += [_fma(builder, spread, loaded[v], sums[r * len(columns) + v]) for v in range(len(columns))]
        return added

    before = [_load(builder, place, WIDTH) for place in places]
    for result, place in zip(_loop(builder, I64(0), n_k, 1, before, multiply_add), places, strict=True):
        _store(builder, result, place)


Body = Callable[[ir.Value, list[ir.Value]], list[ir.Value]]


def _loop(
    builder: ir.IRBuilder, first: ir.Value, end: ir.Value, step: int, carried: list[ir.Value], body: Body
) -> list[ir.Value]:
    """carried = body(at, carried) for at = first, first + step, ... below end; what is carried in the end."""
    head, repeat, done = builder.block, builder.append_basic_block("repeat"), builder.append_basic_block("done")
    builder.cbranch(builder.icmp_signed("<", first, end), repeat, done)

    builder.position_at_end(repeat)
    at, before = builder.phi(I64), [builder.phi(value.type) for value in carried]
    after = body(at, before)
    following = builder.add(at, I64(step))
    for phi, start, next_ in zip([at, *before], [first, *carried], [following, *after], strict=True):
        phi.add_incoming(start, head)
        phi.add_incoming(next_, repeat)
    builder.cbranch(builder.icmp_signed("<", following, end), repeat, done)

    builder.position_at_end(done)
    results = [builder.phi(value.type) for value in carried]
    for phi, start, last in zip(results, carried, after, strict=True):
        phi.add_incoming(start, head)
        phi.add_incoming(last, repeat)
    return results


def packed_tile(kind: str, one_row: bool) -> Any:
    """An intrinsic for a panel of quantised weights, as `panels.py` lays them out.

    one_row: f(x, x_at, packed, at, n_records, y, y_at): y[c] = fma(x[k], w[k, c], y[c]) for k = 0, 1, ...
    else:    f(packed, at, n_records, y, y_at): y[k, c] = w[k, c], the panel in float32.
    """

    def generate(builder: ir.IRBuilder, kinds: Any, context: Any, args: Any) -> ir.Value:
        *x, packed, at, n_records, y, y_at = args
        n = len(x)
        records = builder.gep(_data(context, builder, kinds[n], packed), [at])
        y_data = builder.gep(_data(context, builder, kinds[n + 3], y), [y_at])
        x_data = builder.gep(_data(context, builder, kinds[0], x[0]), [x[1]]) if one_row else None
        for strip in range(0, PANEL, VECTORS * WIDTH):
            _packed_strip(builder, _DECODERS[kind], kind, x_data, records, strip, n_records, y_data)
        return context.get_dummy_value()

    i64 = types.int64
    if one_row:

        @intrinsic
        def dot(typing_context: Any, x: Any, x_at: Any, packed: Any, at: Any, n_records: Any, y: Any, y_at: Any) -> Any:
            return types.void(x, i64, packed, i64, i64, y, i64), lambda c, b, s, a: generate(b, s.args, c, a)

        return dot

    @intrinsic
    def unpack(typing_context: Any, packed: Any, at: Any, n_records: Any, y: Any, y_at: Any) -> Any:
        return types.void(packed, i64, i64, y, i64), lambda c, b, s, a: generate(b, s.args, c, a)

    return unpack


def _packed_strip(builder: ir.IRBuilder, decoder: Any, kind: str, x: ir.Value | None, records: ir.Value, strip: int,
                  n_records: ir.Value, y: ir.Value) -> None:  # fmt: skip
    """A strip of VECTORS vectors through all records: GROUP weights of each lane are decoded and used at once."""
    columns = [strip + v * WIDTH for v in range(VECTORS)]

    def decode(i: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        record = builder.gep(records, [builder.mul(i, I64(record_bytes(kind)))])
        weights = [decoder(_Record(builder, kind, record, c)) for c in columns]
        first_k = builder.mul(i, I64(GROUP))
        for k in range(GROUP):
            at_k = builder.add(first_k, I64(k))
            loaded = [weight(k) for weight in weights]
            if x is None:
                row = builder.gep(y, [builder.mul(at_k, I64(PANEL))])
                for c, value in zip(columns, loaded, strict=True):
                    _store(builder, value, builder.gep(row, [I64(c)]))
            else:
                spread = _splat(builder, _load_one(builder, builder.gep(x, [at_k])), WIDTH)
                sums = [_fma(builder, spread, value, total) for value, total in zip(loaded, sums, strict=True)]
        return sums

    before = [] if x is None else [_load(builder, builder.gep(y, [I64(c)]), WIDTH) for c in columns]
    results = _loop(builder, I64(0), n_records, 1, before, decode)
    for c, result in zip(columns[: len(results)], results, strict=True):
        _store(builder, result, builder.gep(y, [I64(c)]))


class _Record:
    """Reads WIDTH neighbouring outputs of one record, part by part."""

    def __init__(self, builder: ir.IRBuilder, kind: str, record: ir.Value, column: int) -> None:
        self.builder, self.kind, self.record, self.column = builder, kind, record, column

    def load(self, part: str, element: ir.Type, size: int, row: int = 0, shift: int = 0) -> ir.Value:
        """Elements of `size` bytes of a row of a part, from `shift` bytes further on."""
        at = part_offset(self.kind, part) + (row * PANEL + self.column) * size + shift
        vector = _vector(element, WIDTH)
        pointer = self.builder.bitcast(self.builder.gep(self.record, [I64(at)]), vector.as_pointer())
        loaded = self.builder.load(pointer)
        loaded.align = 1
        return loaded

    def half(self, part: str, row: int = 0) -> ir.Value:
        return self.builder.fpext(self.load(part, ir.HalfType(), 2, row), _vector(F32, WIDTH))

    def small(self, part: str, signed: bool) -> ir.Value:
        extend = self.builder.sext if signed else self.builder.zext
        return self.builder.sitofp(extend(self.load(part, ir.IntType(8), 1), _vector(I32, WIDTH)), _vector(F32, WIDTH))

    def constant(self, value: float) -> ir.Constant:
        return ir.Constant(_vector(F32, WIDTH), [float(value)] * WIDTH)

    def integer(self, value: int) -> ir.Constant:
        return ir.Constant(_vector(I32, WIDTH), [value] * WIDTH)

    def quants(self, high_bits: int) -> Callable[[int], tuple[ir.Value, bool]]:
        """q(k) as int32 lanes; with the flag, 16 q: the high half of a byte is left where it stands, which saves a shift.

        A load that begins j bytes further on has byte j at the bottom of each lane; what is above it is masked away.
        """
        builder, dwords = self.builder, {}
        high = [self.load("high", I32, 4, row) for row in range(max(1, high_bits))] if high_bits else []

        def quant(k: int) -> tuple[ir.Value, bool]:
            row, byte, odd = k // 8, k % 8 // 2, k % 2
            if (row, byte) not in dwords:
                dwords[row, byte] = self.load("quants", I32, 4, row, byte)
            low = dwords[row, byte]
            if not high:
                return builder.and_(low, self.integer(0xF0 if odd else 0x0F)), bool(odd)
            if odd:
                low = builder.lshr(low, self.integer(4))
            per_dword = GROUP // len(high)
            shift = high_bits * (k % per_dword) - 4
            above = high[k // per_dword]
            above = builder.lshr(above, self.integer(shift)) if shift >= 0 else builder.shl(above, self.integer(-shift))
            bits_above = builder.and_(above, self.integer(((1 << high_bits) - 1) << 4))
            return builder.or_(builder.and_(low, self.integer(0x0F)), bits_above), False

        return quant


Decoder = Callable[[_Record], Callable[[int], ir.Value]]


def _scaled(record: _Record, q: ir.Value, times16: bool, bias: int, s: ir.Value) -> ir.Value:
    """(q - bias) * s, exact."""
    b = record.builder
    q = b.sub(q, record.integer(bias * 16 if times16 else bias)) if bias else q
    scale = b.fmul(s, record.constant(1 / 16)) if times16 else s
    return b.fmul(b.sitofp(q, _vector(F32, WIDTH)), scale)


def _biased(bias: int, high_bits: int) -> Decoder:
    """d (q - bias): Q4_0, Q5_0; and Q6_K, whose d is d s for the first half of the inputs and d n for the second."""

    def decode(record: _Record) -> Callable[[int], ir.Value]:
        d, quant = record.half("d"), record.quants(high_bits)
        halves = [d, d]
        if high_bits == 2:
            halves = [record.builder.fmul(d, record.small(part, signed=True)) for part in ("s", "n")]
        return lambda k: _scaled(record, *quant(k), bias, halves[k // 16])

    return decode


def _affine(high_bits: int, small_scales: bool) -> Decoder:
    """fma(q, d, m): Q4_1, Q5_1; and Q4_K, Q5_K, where d is d s and m is -(m n)."""

    def decode(record: _Record) -> Callable[[int], ir.Value]:
        b = record.builder
        d, m, quant = record.half("d"), record.half("m"), record.quants(high_bits)
        if small_scales:
            d = b.fmul(d, record.small("s", signed=False))
            m = b.fneg(b.fmul(m, record.small("n", signed=False)))
        d16 = b.fmul(d, record.constant(1 / 16))

        def weight(k: int) -> ir.Value:
            q, times16 = quant(k)
            return _fma(b, _to_float(record, q, high_bits, times16), d16 if times16 else d, m)

        return weight

    return decode


def _to_float(record: _Record, q: ir.Value, high_bits: int, times16: bool) -> ir.Value:
    """Lanes of whole numbers as floats. On AVX-512, numbers below 16 are looked up in a table: conversion and multiplication
    share two of a core's four vector pipes, and a permutation has a third."""
    if WIDTH == 16 and not high_bits and not times16:
        table = ir.Constant(_vector(F32, 16), [float(i) for i in range(16)])
        lookup = _declared(record.builder, "llvm.x86.avx512.permvar.sf.512", table.type, [table.type, q.type])
        return record.builder.call(lookup, [table, q])
    return record.builder.sitofp(q, _vector(F32, WIDTH))


def _bytes(record: _Record) -> Callable[[int], ir.Value]:
    """d q: Q8_0."""
    b, d = record.builder, record.half("d")

    def weight(k: int) -> ir.Value:
        q = b.sext(record.load("quants", ir.IntType(8), 1, k), _vector(I32, WIDTH))
        return b.fmul(b.sitofp(q, _vector(F32, WIDTH)), d)

    return weight


def _bfloat16(record: _Record) -> Callable[[int], ir.Value]:
    """The upper halves of float32 numbers."""
    b = record.builder

    def weight(k: int) -> ir.Value:
        upper = b.zext(record.load("quants", ir.IntType(16), 2, k), _vector(I32, WIDTH))
        return b.bitcast(b.shl(upper, record.integer(16)), _vector(F32, WIDTH))

    return weight


_DECODERS: dict[str, Decoder] = {
    "Q8_0": _bytes,
    "Q4_0": _biased(8, high_bits=0),
    "Q4_1": _affine(high_bits=0, small_scales=False),
    "Q5_0": _biased(16, high_bits=1),
    "Q5_1": _affine(high_bits=1, small_scales=False),
    "Q4_K": _affine(high_bits=0, small_scales=True),
    "Q5_K": _affine(high_bits=1, small_scales=True),
    "Q6_K": _biased(32, high_bits=2),
    "F16": lambda record: partial(record.half, "quants"),
    "BF16": _bfloat16,
}


def _row_reduction(name: str, neutral: float, combine: Any, what: str) -> Any:
    """An intrinsic name(x, at, low, high): `combine` over elements low to high - 1 of the row that begins `at` floats after x.

    Lane i of sixteen takes the elements whose index is i mod 16, in ascending order, from `neutral` on; then lane i is
    combined with lane i + 8, the result's with i + 4, i + 2, i + 1.
    """

    def reduction(typing_context: Any, x: Any, at: Any, low: Any, high: Any) -> Any:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            x, at, low, high = args
            row = builder.gep(_data(context, builder, signature.args[0], x), [at])
            lanes = _lanes(builder, row, low, high, neutral, combine)
            while lanes.type.count > 1:
                half = lanes.type.count // 2
                low_half, high_half = (
                    builder.shuffle_vector(lanes, lanes, ir.Constant(_vector(I32, half), list(range(i, i + half))))
                    for i in (0, half)
                )
                lanes = combine(builder, low_half, high_half, last=True)
            return builder.extract_element(lanes, I32(0))

        return types.float32(x, types.int64, types.int64, types.int64), generate

    reduction.__name__ = name
    reduction.__doc__ = what
    return intrinsic(reduction)


def _lanes(builder: ir.IRBuilder, row: ir.Value, low: ir.Value, high: ir.Value, neutral: float, combine: Any) -> ir.Value:
    """The sixteen lanes after all elements; a block of sixteen that low or high cuts is loaded under a mask."""
    start = ir.Constant(_vector(F32, LANES), [neutral] * LANES)
    index = ir.Constant(_vector(I64, LANES), list(range(LANES)))

    def take(at: ir.Value, lanes: list[ir.Value]) -> list[ir.Value]:
        element = builder.add(_splat(builder, at, LANES), index)
        mask = builder.and_(
            builder.icmp_signed(">=", element, _splat(builder, low, LANES)),
            builder.icmp_signed("<", element, _splat(builder, high, LANES)),
        )
        loaded = _masked_load(builder, builder.gep(row, [at]), mask, start)
        return [combine(builder, lanes[0], loaded, last=False)]

    return _loop(builder, builder.and_(low, I64(-LANES)), high, LANES, [start], take)[0]


def _masked_load(builder: ir.IRBuilder, pointer: ir.Value, mask: ir.Value, otherwise: ir.Value) -> ir.Value:
    """The floats at pointer where the mask is set, `otherwise` elsewhere; memory outside the mask is not touched."""
    vector = otherwise.type
    name = f"llvm.masked.load.v{vector.count}f32.p0"
    load = _declared(builder, name, vector, [vector.as_pointer(), I32, mask.type, vector])
    return builder.call(load, [builder.bitcast(pointer, vector.as_pointer()), I32(4), mask, otherwise])


def _larger(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, last: bool) -> ir.Value:
    return builder.select(builder.fcmp_ordered(">", b, a), b, a)


def _sum(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, last: bool) -> ir.Value:
    return builder.fadd(a, b)


def _sum_of_squares(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, last: bool) -> ir.Value:
    return builder.fadd(a, b) if last else _fma(builder, b, b, a)


row_max = _row_reduction("row_max", float("-inf"), _larger, "The largest element; a NaN is passed over.")
row_sum = _row_reduction("row_sum", 0.0, _sum, "The sum.")
row_sum_of_squares = _row_reduction("row_sum_of_squares", 0.0, _sum_of_squares, "The sum of squares, s = fma(x, x, s).")


def cache_folder() -> Path:
    """Where compiled kernels are kept: one folder for each content of the sources, versions, flags and processor.

    numba's own check sees only the file in which a function stands, not a helper's, an intrinsic's or a flag's change.
    """
    here = Path(__file__).parent
    sources = [(here / name).read_bytes() for name in ("panels.py", "microkernel.py", "kernels.py")]
    target = (numba.__version__, llvm.llvm_version_info, platform.machine(), CPU_NAME or llvm.get_host_cpu_name(),
              CPU_FEATURES or llvm.get_host_cpu_features().flatten())  # fmt: skip
    key = hashlib.sha256(b"".join(sources) + repr(target).encode()).hexdigest()[:16]
    base = os.environ.get("NANOKV_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nanokv"
    for folder in (Path(base) / key, Path(tempfile.gettempdir()) / f"nanokv-{os.getuid()}" / key):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    raise OSError(f"no folder to keep compiled kernels in: set NANOKV_CACHE to one that can be written (tried {base})")


FOLDER = cache_folder()


def kernel(signature: str, parallel: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile a function for one signature, ahead of its first call, and keep the result on disk."""

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        before = numba.config.CACHE_DIR
        numba.config.CACHE_DIR = str(FOLDER)
        try:
            with _announced(function):
                return numba.njit(signature, cache=True, parallel=parallel, nogil=True, error_model="numpy")(function)
        finally:
            numba.config.CACHE_DIR = before

    return compiled


def specialised(function: Callable[..., Any], name: str, **names: Any) -> Callable[..., Any]:
    """The function with some of its names bound, under a name of its own. (numba keeps no closures over compiled functions.)"""
    bound = FunctionType(function.__code__, function.__globals__ | names, f"{function.__name__}_{name}")
    bound.__qualname__, bound.__module__ = bound.__name__, function.__module__
    return bound


def named(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A name of its own for a function that is made several times over, each time bound to other things.

    Compiled code is kept on the disk, and that of several processes is linked by name. Of two functions of one name, which
    two processes compiled, only one would be called. Names beside this differ by a count that starts anew in each process.
    """

    def renamed(function: Callable[..., Any]) -> Callable[..., Any]:
        function.__name__ = function.__qualname__ = f"{function.__name__}_{name}"
        return function

    return renamed


@contextmanager
def _announced(function: Callable[..., Any]) -> Iterator[None]:
    """On a terminal, say what takes so long: a kernel that is not kept yet."""
    name, line = function.__name__, function.__code__.co_firstlineno
    shown = sys.stderr.isatty() and not any(FOLDER.glob(f"**/*.{name}-{line}.*.nbi"))
    if shown:
        print(f"nanokv: compiling for this machine, once: {name.strip('_')}", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def start_threads() -> int:
    """Load the library that runs parallel loops, and return the most threads that it can use.

    OpenMP's threads wait for the next loop by spinning, by default for several milliseconds, in which they are in the way of
    everything else; a third of a millisecond bridges the gaps within a forward pass. The library reads its setting when
    it is loaded, so it stands in the environment just then.
    """
    most = int(numba.config.NUMBA_NUM_THREADS)
    wanted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    spinning = {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "0"}
    said = "OMP_WAIT_POLICY" in os.environ
    ours = {} if said else {name: value for name, value in spinning.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        if numba.config.THREADING_LAYER == "default":
            numba.config.THREADING_LAYER = "omp" if _has_openmp() else "workqueue"
        numba.set_num_threads(min(int(wanted), most) if wanted.isdigit() and int(wanted) > 0 else most)
    finally:
        for name in ours:
            del os.environ[name]
    return most


def _has_openmp() -> bool:
    try:
        from numba.np.ufunc import omppool  # type: ignore[attr-defined]  # noqa: F401
    except ImportError:
        warnings.warn("no OpenMP library (libgomp) was found: nanokv runs, but its threads take longer to wake", stacklevel=2)
        return False
    return True


MAX_THREADS = start_threads()  # before a parallel kernel is compiled or read, which loads the library
