"""How a matrix lies in memory for the kernels: in panels of 48 outputs, as float32 or in a GGUF file's own blocks.

Vector lanes run over the outputs of a panel, so that each output adds its products strictly in the order k = 0, 1, 2, ...
whatever the width of the machine's vectors. A float32 panel is [K][PANEL].

A quantised panel is one record for every 32 k, and a record holds what the file's blocks hold, output by output:

    scales    one or two numbers for each output, in the order that PARTS says
    high      for 5 and 6 bits: dwords of high bits; bit k of an output's dword, or bits 2k and 2k + 1 of its two dwords
    quants    4 low bits: dwords [4][PANEL]; byte j of an output's dword r holds q[8r + 2j] below q[8r + 2j + 1]
              8 bits: bytes [32][PANEL];  16-bit floats: [32][PANEL]

so a thread reads one stream, its scales included. A weight is float32 q * s + m, rounded once: s and m are exact there, since
a block's scale is a half-precision number (11 bits) times at most 8 bits. That is, to the bit, what dequantising the file
gives, and no activation is ever quantised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanokv.gguf_file import FileTensor

Array = np.ndarray
PANEL = 48  # outputs of a panel: whole vectors on every machine
GROUP = 32  # inputs of a record

# Bytes for each output of a record, part by part. d and m are halves, s and n small integers: the scales that multiply.
PARTS: dict[str, tuple[tuple[str, int], ...]] = {
    "Q8_0": (("d", 2), ("quants", 32)),  # d q
    "Q4_0": (("d", 2), ("quants", 16)),  # d (q - 8)
    "Q4_1": (("d", 2), ("m", 2), ("quants", 16)),  # d q + m
    "Q5_0": (("d", 2), ("high", 4), ("quants", 16)),  # d (q - 16)
    "Q5_1": (("d", 2), ("m", 2), ("high", 4), ("quants", 16)),  # d q + m
    "Q4_K": (("d", 2), ("m", 2), ("s", 1), ("n", 1), ("quants", 16)),  # (d s) q - (m n)
    "Q5_K": (("d", 2), ("m", 2), ("s", 1), ("n", 1), ("high", 4), ("quants", 16)),  # (d s) q - (m n)
    "Q6_K": (("d", 2), ("s", 1), ("n", 1), ("high", 8), ("quants", 16)),  # (d s) (q - 32) for k < 16, (d n) (q - 32) after
    "F16": (("quants", 64),),
    "BF16": (("quants", 64),),
}


def record_bytes(kind: str) -> int:
    """Bytes of a record: one panel's outputs, GROUP inputs."""
    return PANEL * sum(size for _, size in PARTS[kind])


def part_offset(kind: str, part: str) -> int:
    """Where a part begins in a record, in bytes."""
    names = [name for name, _ in PARTS[kind]]
    return PANEL * sum(size for _, size in PARTS[kind][: names.index(part)])


@dataclass(frozen=True, eq=False)
class Arena:
    """The arrays in which all panels of a model lie, and the jobs that its matrices are used for."""

    floats: Array  # float32
    packed: Array  # uint8; three bytes longer than its panels, for a load of a dword may begin at its last byte


@dataclass(eq=False)
class Panels:
    """A matrix [N, K] in an arena, from `at` on (in floats for kind F32, else in bytes); outputs past N are 0."""

    arena: Arena
    kind: str
    at: int
    shape: tuple[int, int]
    group: Any = None  # what the kernels remember of it

    def __array__(self, dtype: Any = None, copy: Any = None) -> Array:
        n, k = self.shape
        panels = float_panels(self)
        return panels.transpose(0, 2, 1).reshape(len(panels) * PANEL, k)[:n].astype(dtype or np.float32)


def float_panels(panels: Panels) -> Array:
    """The panels as float32 [panels, K, PANEL]."""
    n, k = panels.shape
    if panels.kind == "F32":
        return panels.arena.floats[panels.at : panels.at + n_panels(n) * k * PANEL].reshape(n_panels(n), k, PANEL)
    from nanokv.kernels import unpacked

    return unpacked(panels)


def n_panels(n: int) -> int:
    """Panels of a matrix with n outputs."""
    return -(-n // PANEL)


def panel_size(kind: str, k: int) -> int:
    """Size of a panel with k inputs: in floats for kind F32, else in bytes."""
    return k * PANEL if kind == "F32" else k // GROUP * record_bytes(kind)


def kind_of(matrix: Any, packed: bool) -> str:
    """The form in which a matrix is kept: its file's, if that is wanted and known, else float32."""
    known = packed and isinstance(matrix, FileTensor) and matrix.kind in PARTS and matrix.shape[1] % GROUP == 0
    return matrix.kind if known else "F32"


def fill(panels: Panels, matrix: Any) -> None:
    """Write a matrix into its place in the arena."""
    n, k = panels.shape
    size = n_panels(n) * panel_size(panels.kind, k)
    if panels.kind == "F32":
        _fill_floats(np.asarray(matrix, np.float32), float_panels(panels))
        return
    out = panels.arena.packed[panels.at : panels.at + size].reshape(n_panels(n), k // GROUP, record_bytes(panels.kind))
    rows_at_a_time = max(1, (1 << 22) // k // PANEL) * PANEL  # few enough to stay in the processor's cache
    for start in range(0, n, rows_at_a_time):
        part = matrix.rows(start, min(start + rows_at_a_time, n))
        _fill_records(part, out[start // PANEL :][: n_panels(part.shape[0])])
    matrix.forget()  # what was read of the file need not stay in memory


def _fill_floats(w: Array, panels: Array) -> None:  # [N, K], [panels, K, PANEL]
    n, k = w.shape
    whole = n // PANEL
    panels[:whole] = w[: whole * PANEL].reshape(whole, PANEL, k).transpose(0, 2, 1)
    if n % PANEL:
        panels[whole] = 0
        panels[whole, :, : n % PANEL] = w[whole * PANEL :].T


def _fill_records(part: FileTensor, out: Array) -> None:  # -> uint8 [panels, K / GROUP, record bytes]
    n, k = part.shape
    kind, panels = part.kind, len(out)
    raw = part.raw.reshape(n, -1)
    if n % PANEL:  # zero blocks are zero weights, but for Q4_0 and the like, whose scale is then 0
        raw = np.concatenate([raw, np.zeros((panels * PANEL - n, raw.shape[1]), np.uint8)])
    for name, pieces in _READERS[kind](raw, k).items():
        at, size = part_offset(kind, name), dict(PARTS[kind])[name] * PANEL
        # pieces: [outputs, K / GROUP, rows, unit], where a record holds [rows][PANEL][unit]
        rows, unit = pieces.shape[2:]
        sorted_ = pieces.reshape(panels, PANEL, k // GROUP, rows, unit).transpose(0, 2, 3, 1, 4)
        out[:, :, at : at + size].reshape(panels, k // GROUP, rows, PANEL, unit)[:] = sorted_


Reader = Callable[[Array, int], dict[str, Array]]


def _pieces(x: Array, groups: int, rows: int = 1) -> Array:
    return np.ascontiguousarray(x).view(np.uint8).reshape(len(x), groups, rows, -1)


def _nibbles(q: Array) -> Array:  # uint8 [outputs, groups, GROUP] -> [outputs, groups, 4, 4]
    pairs = q.reshape(*q.shape[:2], 4, 4, 2)
    return (pairs[..., 0] & 15) | (pairs[..., 1] << 4)


def _high_bits(bits: Array) -> Array:  # bool [outputs, groups, GROUP] -> [outputs, groups, 1, 4]
    return np.packbits(bits, axis=-1, bitorder="little")[:, :, None]


def _halves_of_bytes(packed: Array) -> Array:
    """GGUF's order of 4-bit quants: the low halves of all bytes, then the high halves."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _read_q8_0(raw: Array, k: int) -> dict[str, Array]:
    blocks = raw.reshape(len(raw), k // 32, 34)
    return {"d": blocks[..., None, :2], "quants": blocks[..., 2:, None]}


def _read_simple(scales: str, five_bits: bool) -> Reader:
    """Q4_0, Q4_1, Q5_0, Q5_1: blocks of 32 with halves for scales, high bits if there are five, and nibbles."""

    def read(raw: Array, k: int) -> dict[str, Array]:
        n = 2 * len(scales)
        blocks = raw.reshape(len(raw), k // 32, n + (4 if five_bits else 0) + 16)
        found = {name: blocks[..., None, 2 * i : 2 * i + 2] for i, name in enumerate(scales)}
        if five_bits:
            found["high"] = blocks[..., None, n : n + 4]
        return found | {"quants": _nibbles(_halves_of_bytes(blocks[..., -16:]))}

    return read


def _read_k(five_bits: bool) -> Reader:
    """Q4_K, Q5_K: blocks of 256 with two halves, eight pairs of 6-bit scales in 12 bytes, high bits, and nibbles."""

    def read(raw: Array, k: int) -> dict[str, Array]:
        blocks = raw.reshape(len(raw), k // 256, 144 + (32 if five_bits else 0))
        d, m = (np.repeat(blocks[..., at : at + 2], 8, axis=1) for at in (0, 2))
        s, n = _six_bit_pairs(blocks[..., 4:16])
        low = blocks[..., -128:].reshape(len(raw), -1, 4, 32)
        q = np.stack([low & 15, low >> 4], axis=3)  # 32 low halves, then their 32 high halves, four times
        groups = k // GROUP
        found = {
            "d": _pieces(d, groups), "m": _pieces(m, groups), "s": _pieces(s, groups), "n": _pieces(n, groups),
            "quants": _nibbles(q.reshape(len(raw), groups, GROUP)),
        }  # fmt: skip
        if five_bits:
            planes = blocks[..., None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1  # bit i belongs to group i
            found["high"] = _high_bits(planes.reshape(len(raw), groups, GROUP))
        return found

    return read


def _six_bit_pairs(packed: Array) -> tuple[Array, Array]:  # uint8 [outputs, blocks, 12] -> two of [outputs, blocks * 8]
    a, b, c = (packed[..., i : i + 4] for i in (0, 4, 8))
    s = np.concatenate([a & 63, (c & 15) | (a >> 6 << 4)], axis=-1)
    n = np.concatenate([b & 63, (c >> 4) | (b >> 6 << 4)], axis=-1)
    return s.reshape(len(packed), -1), n.reshape(len(packed), -1)


def _read_q6_k(raw: Array, k: int) -> dict[str, Array]:
    """Blocks of 256: 128 bytes of nibbles, 64 of pairs of high bits, sixteen int8 scales, a half."""
    blocks = raw.reshape(len(raw), k // 256, 210)
    groups = k // GROUP
    low = blocks[..., :128].reshape(len(raw), -1, 2, 64)
    q = np.stack([low & 15, low >> 4], axis=3).reshape(len(raw), groups, GROUP)
    high = blocks[..., 128:192].reshape(len(raw), -1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    pairs = high.reshape(len(raw), groups, 8, 4) << np.array([0, 2, 4, 6], np.uint8)
    scales = blocks[..., 192:208].reshape(len(raw), groups, 2)
    return {
        "d": _pieces(np.repeat(blocks[..., 208:210], 8, axis=1), groups),
        "s": scales[..., None, :1], "n": scales[..., None, 1:],
        "high": np.bitwise_or.reduce(pairs, axis=-1).reshape(len(raw), groups, 2, 4),
        "quants": _nibbles(q),
    }  # fmt: skip


def _read_halves(raw: Array, k: int) -> dict[str, Array]:
    return {"quants": raw.reshape(len(raw), k // GROUP, GROUP, 2)}


_READERS: dict[str, Reader] = {
    "Q8_0": _read_q8_0,
    "Q4_0": _read_simple("d", five_bits=False),
    "Q4_1": _read_simple("dm", five_bits=False),
    "Q5_0": _read_simple("d", five_bits=True),
    "Q5_1": _read_simple("dm", five_bits=True),
    "Q4_K": _read_k(five_bits=False),
    "Q5_K": _read_k(five_bits=True),
    "Q6_K": _read_q6_k,
    "F16": _read_halves,
    "BF16": _read_halves,
}


def place(matrices: Sequence[Any], packed: bool) -> dict[int, Panels]:
    """An arena with every matrix in it, by id. Matrices are read one after the other, so that few are in memory twice."""
    at = {"F32": 0, "": 0}
    places = []
    for matrix in matrices:
        kind = kind_of(matrix, packed)
        n, k = matrix.shape
        space = "F32" if kind == "F32" else ""
        places.append((matrix, kind, at[space]))
        at[space] += n_panels(n) * panel_size(kind, k)
    arena = Arena(np.empty(at["F32"], np.float32), np.empty(at[""] + 3, np.uint8))
    placed = {}
    for matrix, kind, where in places:
        placed[id(matrix)] = Panels(arena, kind, where, tuple(matrix.shape))
        fill(placed[id(matrix)], matrix)
    return placed
