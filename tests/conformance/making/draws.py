"""Random arrays for inputs and weights, the same on every machine: drawn with nanokv's own generator, named by a text."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from nanokv.generate import PCG32


def normal(name: str, *shape: int, scale: float = 1.0, around: float = 0.0) -> np.ndarray:
    """float32, about normal: the sum of four uniform numbers, with standard deviation `scale`."""
    random = PCG32(zlib.crc32(name.encode()))
    n = int(np.prod(shape))
    words = np.array([random.next() for _ in range(4 * n)], np.float64).reshape(n, 4) / 2**32
    return ((words.sum(axis=1) - 2) * 3**0.5 * scale + around).astype(np.float32).reshape(shape)


def whole(name: str, n: int, below: int) -> list[int]:
    """n whole numbers from 0 to below - 1."""
    random = PCG32(zlib.crc32(name.encode()))
    return [random.next() * below >> 32 for _ in range(n)]


def blocks(name: str, n_bytes: int, halves: Sequence[int] = (), block: int = 1, half: float = 0.01) -> bytes:
    """Random bytes for quantised blocks; at the given offsets of each block stand half-precision numbers of this size."""
    data = bytearray(whole(name, n_bytes, 256))
    for start in range(0, n_bytes, block):
        for i, offset in enumerate(halves):
            value = normal(f"{name} {start} {i}", 1, scale=half).astype("<f2").tobytes()
            data[start + offset : start + offset + 2] = value
    return bytes(data)
