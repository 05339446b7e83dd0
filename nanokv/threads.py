"""How many threads the kernels use. Results do not depend on it."""

from __future__ import annotations

import os

from nanokv.errors import NanokvError


def set_threads(n: int) -> None:
    """Use n threads from the next call on, at least 1 and at most as many as `NUMBA_NUM_THREADS` (or the machine's cores)."""
    from nanokv import kernels

    most = kernels.max_threads()
    if not 1 <= n <= most:
        raise NanokvError(f"{n} threads were asked for; this process can use 1 to {most} "
                          f"(cores: {os.cpu_count()}; NUMBA_NUM_THREADS sets the most)")  # fmt: skip
    kernels.set_threads(n)
