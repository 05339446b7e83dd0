"""One thread for NumPy's matrix products, while the kernels' own threads may be waiting for work.

OpenBLAS's threads and those of the kernels spin while they wait, each against the other: on two cores a flow of 242 tokens
took 46 s right after a forward pass, and takes 5 s with one thread.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import product
from pathlib import Path

import numpy as np


@contextmanager
def one_thread() -> Iterator[None]:
    """Run the block's matrix products on one thread, if NumPy's library is an OpenBLAS that can be told so."""
    controls = _controls()
    if controls is None:
        yield
        return
    get, put = controls
    before = get()
    put(1)
    try:
        yield
    finally:
        put(before)


@lru_cache
def _controls() -> tuple[Callable[[], int], Callable[[int], None]] | None:
    """The library's functions that get and set its number of threads; None if there is no such library."""
    home = Path(np.__file__).parent
    for path in (*home.parent.glob("numpy.libs/*openblas*"), *home.glob(".dylibs/*openblas*")):
        library = ctypes.CDLL(str(path))  # NumPy has loaded it, so this is the same one
        for prefix, suffix in product(("scipy_openblas", "openblas"), ("64_", "", "_64")):
            get, put = (getattr(library, f"{prefix}_{verb}_num_threads{suffix}", None) for verb in ("get", "set"))
            if get is not None and put is not None:
                return get, put
    return None
