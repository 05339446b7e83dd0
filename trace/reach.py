"""What could reach what, by the architecture alone: the pyramid, beside which the measured flow is a part.

In a standard decoder the state that enters layer l at position i can use what other positions had come to one layer below,
and no more: nothing that took more than l layers of work is in it, however many tokens came before. That is the pyramid.
A sliding window narrows it. A feedback transformer (Fan et al. 2020, arXiv 2002.09402) lets every layer read
what all layers of earlier positions had come to, so that depth grows with the position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from nanokv.errors import TraceError

Array = np.ndarray
Architecture = Literal["standard", "feedback"]


def reads(n: int, windows: Sequence[int | None]) -> Array:
    """Which positions a position may read in each layer, its own among them: bool [L, dst, src]."""
    dst, src = np.indices((n, n))
    return np.stack([(src <= dst) & (src > dst - (window or n)) for window in windows])


def cone(n: int, windows: Sequence[int | None], layer: int, pos: int, *, direction: Literal["down", "up"] = "down",
         architecture: Architecture = "standard", sampled: Sequence[int] = ()) -> Array:  # fmt: skip
    """The states that can have reached the state layer{layer}.pos{pos} (down), or that it can reach (up): bool [L + 1, n].

    `windows` [L]: how many positions one may read in a layer, itself included, None for all. `sampled`: positions whose
    token was chosen by the position before, which joins the last row to the next position's first.
    """
    _check(n, windows, layer, pos, architecture)
    may, inside = reads(n, windows), np.zeros((len(windows) + 1, n), bool)
    inside[layer, pos] = True
    step = _below if direction == "down" else _above
    while True:  # a round for each time that the way goes back to the bottom, or to another layer
        before = inside.copy()
        step(inside, may, architecture == "feedback", sampled)
        if (before == inside).all():
            return inside


def depth(n: int, windows: Sequence[int | None], *, architecture: Architecture = "standard",
          sampled: Sequence[int] = ()) -> Array:  # fmt: skip
    """The most blocks of work, one after another, that can lie behind each state: int [L + 1, n], exact.

    Standard: l at layer l, whatever the position. With feedback memory, or where every token was sampled, it grows by L
    with each position.
    """
    _check(n, windows, 0, 0, architecture)
    n_layers, drawn = len(windows), set(sampled)
    most = np.zeros((n_layers + 1, n), np.int64)
    for pos in range(n):
        if pos in drawn:
            most[0, pos] = most[n_layers, pos - 1]
        for layer in range(n_layers):
            first = max(0, pos + 1 - (windows[layer] or n))
            before = most[:, first:pos] if architecture == "feedback" else most[layer : layer + 1, first:pos]
            most[layer + 1, pos] = 1 + max(int(most[layer, pos]), int(before.max(initial=0)))
    return most


def _below(inside: Array, may: Array, feedback: bool, sampled: Sequence[int]) -> None:
    """Adds to the states inside [L + 1, n], from the top down, those that lead to them in one step."""
    for pos in sampled:
        inside[-1, pos - 1] |= inside[0, pos]
    for layer in reversed(range(len(may))):
        above, read = inside[layer + 1], may[layer]
        if feedback:
            inside[layer] |= above
            inside |= (read & ~np.eye(len(read), dtype=bool))[above].any(axis=0)
        else:
            inside[layer] |= read[above].any(axis=0)


def _above(inside: Array, may: Array, feedback: bool, sampled: Sequence[int]) -> None:
    """Adds to the states inside [L + 1, n], from the bottom up, those to which they lead in one step."""
    for pos in sampled:
        inside[0, pos] |= inside[-1, pos - 1]
    for layer in range(len(may)):
        read = may[layer]
        if feedback:
            remembered = (read & ~np.eye(len(read), dtype=bool))[:, inside.any(axis=0)].any(axis=1)
            inside[layer + 1] |= inside[layer] | remembered
        else:
            inside[layer + 1] |= read[:, inside[layer]].any(axis=1)


def _check(n: int, windows: Sequence[int | None], layer: int, pos: int, architecture: str) -> None:
    if architecture not in ("standard", "feedback"):
        raise TraceError(f"architecture is {architecture!r}; it must be 'standard' or 'feedback'")
    if not (0 <= layer <= len(windows) and 0 <= pos < n):
        raise TraceError(f"there is no state layer{layer}.pos{pos}: layers are 0 to {len(windows)}, positions 0 to {n - 1}")
