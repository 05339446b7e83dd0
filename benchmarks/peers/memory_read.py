"""The physical limit of decoding: reading as many bytes as the weights have, with as many threads, and adding them up."""

from __future__ import annotations

import time

import numba
import numpy as np


@numba.njit(parallel=True, fastmath=True)
def _sum(x):  # type: ignore[no-untyped-def]  # [N] -> the sum
    # This plain form becomes vector code; numba makes one addition at a time of loops over parts of x, six times slower.
    s = np.float32(0)
    for i in numba.prange(len(x)):
        s += x[i]
    return s


class MemoryRead:
    """A float32 array of n_bytes, read from end to end."""

    def __init__(self, tokens: list[int], threads: int, n_bytes: int) -> None:
        numba.set_num_threads(threads)
        self.x = np.ones(n_bytes // 4, np.float32)

    def about(self) -> str:
        return f"{self.x.nbytes / 1e6:.1f} MB"

    def prepare(self, contexts: list[int]) -> None:
        _sum(self.x)

    def decode(self, context: int, n: int) -> list[float]:
        """The seconds of n reads, after one more; the context makes no difference."""
        seconds = []
        for _ in range(n + 1):
            began = time.perf_counter()
            _sum(self.x)
            seconds.append(time.perf_counter() - began)
        return seconds[1:]
