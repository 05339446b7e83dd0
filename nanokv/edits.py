"""Interventions: change one thing in a forward pass, and see what follows. Pass them as `forward(..., edits=[...])`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from nanokv.config import Config
from nanokv.errors import EditError


@dataclass(frozen=True)
class Cut:
    """Knock out attention edges: in a layer, position dst does not read position src. Its score becomes -inf, so that the
    weight is exactly 0 and the others of the row share what it had (attention knockout, Geva et al. 2023)."""

    layer: int
    dst: int
    src: int
    head: int | None = None  # None: in every head


Edit = Cut  # what `edits` may hold


def cuts_by_layer(edits: Sequence[Edit], config: Config, start: int, n: int) -> dict[int, np.ndarray]:
    """{layer: int64 [m, 3] of (head, dst, src)} of all cuts, checked; EditError names one that cannot be made."""
    rows: dict[int, list[tuple[int, int, int]]] = {}
    for edit in edits:
        _check(edit, config, start, n)
        heads: Iterable[int] = range(config.n_heads) if edit.head is None else (edit.head,)
        rows.setdefault(edit.layer, []).extend((head, edit.dst, edit.src) for head in heads)
    return {layer: np.array(cuts, np.int64) for layer, cuts in rows.items()}


def _check(cut: Cut, config: Config, start: int, n: int) -> None:
    if not 0 <= cut.layer < config.n_layers:
        raise EditError(f"{cut}: layers are 0 to {config.n_layers - 1}")
    if cut.head is not None and not 0 <= cut.head < config.n_heads:
        raise EditError(f"{cut}: heads are 0 to {config.n_heads - 1}")
    if not start <= cut.dst < start + n:
        raise EditError(f"{cut}: this call computes positions {start} to {start + n - 1}; what position {cut.dst} read was "
                        "settled in the call that computed it, so give the edit to that call")  # fmt: skip
    window = config.window_of(cut.layer)
    if not max(0, cut.dst + 1 - (window or cut.dst + 1)) <= cut.src <= cut.dst:
        raise EditError(f"{cut}: position {cut.dst} does not read position {cut.src} in layer {cut.layer} anyway")
