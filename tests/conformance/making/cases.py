"""What a case is while it is being made: its inputs as arrays, and no expected values yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

SINCE = "1.0.0"  # the version that brought all cases that say nothing else
OPERATIONS = [2e-6, 1e-5]  # atol, rtol of one operation: sums over fewer than a hundred numbers of size one
RUNS = [3e-5, 3e-5]  # of blocks and runs of the small models: five times the largest error of the kernels and of NumPy


def case(
    id_: str,
    op: str,
    inputs: Mapping[str, Any],
    comment: str = "",
    *,
    tol: Sequence[float] = OPERATIONS,
    since: str = SINCE,
    want: Sequence[str] = (),
    optional: Sequence[str] = (),
    **more: Any,
) -> dict[str, Any]:
    """A case without its expected values. Its rules are those of SPEC.md that name it.

    want: the outputs to ask for, where a request must name them. optional: those that a port may leave out.
    since: the version of the suite that brought it.
    more: error, profiles, inexact (outputs that are compared within the tolerance in either profile).
    """
    made: dict[str, Any] = {"id": id_, "since": since, "rules": [], "comment": comment, "op": op}
    made |= {"inputs": {name: as_input(value) for name, value in inputs.items()}, "tol": list(tol)}
    made |= {"want": list(want), "optional": list(optional), **more}
    return made


UNSAID = {"inf": "Infinity", "-inf": "-Infinity", "nan": "NaN"}  # as most languages parse them


def as_input(value: Any) -> Any:
    """Arrays as {"shape", "f32"}; anything else as it is."""
    if isinstance(value, np.ndarray):
        return {"shape": list(value.shape), "f32": decimals(value)}
    return value


def decimals(array: np.ndarray) -> list[Any]:
    """Numbers of nine significant digits, enough to give any float32 back; what JSON lacks, as text."""
    return [float(f"{x:.9g}") if np.isfinite(x) else UNSAID[str(float(x))] for x in array.reshape(-1).tolist()]


def hexadecimal(array: np.ndarray) -> str:
    """The bits of float32 numbers, eight digits each, with spaces between them."""
    return " ".join(f"{word:08x}" for word in np.ascontiguousarray(array, np.float32).reshape(-1).view(np.uint32).tolist())
