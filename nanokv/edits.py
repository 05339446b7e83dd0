"""Interventions: change one thing in a forward pass, and see what follows. Pass them as `forward(..., edits=[...])`.

An edit is checked against the call that it is given to: what a past position read, or what was added to its state, was
settled in the call that computed it. The cache keeps what it held before the call, whatever is replaced during it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from nanokv.cache import KVCache
from nanokv.config import Config
from nanokv.errors import EditError

SITES = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")


@dataclass(frozen=True)
class Cut:
    """Knock out an attention edge: in a layer, position dst does not read position src. Its score becomes -inf, so that
    the weight is exactly 0 and the others of the row share what it had (attention knockout, Geva et al. 2023)."""

    layer: int
    dst: int
    src: int
    head: int | None = None  # None: in every head


@dataclass(frozen=True)
class ZeroValue:
    """Take away what an attention edge brings: its weight becomes 0 after the softmax, the others keep theirs. The state
    of dst changes by exactly what the edge added to it."""

    layer: int
    dst: int
    src: int
    head: int | None = None


@dataclass(frozen=True, eq=False)
class Replace:
    """Put another key, value or both in a layer's slot while the call runs, [G, hd] each; see `transplant`."""

    layer: int
    pos: int
    k: np.ndarray | None = None  # after RoPE, as cached
    v: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Add:
    """Add a vector [D] to a position's state at a site: resid_pre, attn_out, resid_mid, mlp_out or resid_post."""

    site: str
    layer: int
    pos: int
    vector: np.ndarray


Edit = Cut | ZeroValue | Replace | Add


def transplant(cache: KVCache, layer: int, pos: int) -> Replace:
    """The replacement of a layer's slot by what it holds in the cache of another run."""
    return Replace(layer, pos, cache.keys(layer)[pos].copy(), cache.values(layer)[pos].copy())


@dataclass(frozen=True)
class Edits:
    """The edits of one call, sorted by where they act."""

    edges: dict[int, np.ndarray] = field(default_factory=dict)  # layer: int64 [n, 4] of (head, dst, src, 1 if ZeroValue)
    entries: dict[int, list[Replace]] = field(default_factory=dict)  # layer: what its slots shall hold
    states: dict[tuple[str, int], list[Add]] = field(default_factory=dict)  # (site, layer): what is added


def sorted_edits(edits: Sequence[Edit], config: Config, start: int, n: int) -> Edits:
    """The edits by layer and site, each checked; EditError names one that this call cannot make."""
    found = Edits()
    rows: dict[int, list[tuple[int, int, int, int]]] = {}
    for edit in edits:
        _check_layer(edit, config)
        if isinstance(edit, Cut | ZeroValue):
            _check_edge(edit, config, start, n)
            heads = range(config.n_heads) if edit.head is None else (edit.head,)
            zeroed = int(isinstance(edit, ZeroValue))
            rows.setdefault(edit.layer, []).extend((head, edit.dst, edit.src, zeroed) for head in heads)
        elif isinstance(edit, Replace):
            _check_entry(edit, config, start + n)
            found.entries.setdefault(edit.layer, []).append(edit)
        else:
            _check_state(edit, config, start, n)
            found.states.setdefault((edit.site, edit.layer), []).append(edit)
    found.edges.update({layer: np.array(edges, np.int64) for layer, edges in rows.items()})
    return found


def added(x: np.ndarray, adds: Sequence[Add], start: int) -> np.ndarray:  # [T, D] -> [T, D]
    """x with the vectors added at their positions; a new array."""
    x = x.copy()
    for add in adds:
        x[add.pos - start] += add.vector
    return x


def _check_layer(edit: Edit, config: Config) -> None:
    if not isinstance(edit, Cut | ZeroValue | Replace | Add):
        raise EditError(f"{edit!r} is no edit: it must be a Cut, a ZeroValue, a Replace or an Add")
    if not 0 <= edit.layer < config.n_layers:
        raise EditError(f"{edit}: layers are 0 to {config.n_layers - 1}")


def _check_edge(edge: Cut | ZeroValue, config: Config, start: int, n: int) -> None:
    if edge.head is not None and not 0 <= edge.head < config.n_heads:
        raise EditError(f"{edge}: heads are 0 to {config.n_heads - 1}")
    _check_position(edge, edge.dst, start, n)
    window = config.window_of(edge.layer)
    if not max(0, edge.dst + 1 - (window or edge.dst + 1)) <= edge.src <= edge.dst:
        raise EditError(f"{edge}: position {edge.dst} does not read position {edge.src} in layer {edge.layer} anyway")


def _check_entry(edit: Replace, config: Config, length: int) -> None:
    if not 0 <= edit.pos < length:
        raise EditError(f"a Replace of position {edit.pos}: the cache holds positions 0 to {length - 1} in this call")
    for name, x in (("k", edit.k), ("v", edit.v)):
        if x is not None and x.shape != (config.n_kv_heads, config.head_dim):
            expected = [config.n_kv_heads, config.head_dim]
            raise EditError(f"a Replace of position {edit.pos}: {name} has shape {list(x.shape)}; expected {expected}")


def _check_state(edit: Add, config: Config, start: int, n: int) -> None:
    _check_position(edit, edit.pos, start, n)
    if edit.site not in SITES:
        raise EditError(f"an Add at {edit.site!r}: the site must be one of {', '.join(SITES)}")
    if edit.vector.shape != (config.d_model,):
        raise EditError(f"an Add of a vector of shape {list(edit.vector.shape)}; expected [{config.d_model}]")


def _check_position(edit: Edit, pos: int, start: int, n: int) -> None:
    if not start <= pos < start + n:
        raise EditError(f"{edit}: this call computes positions {start} to {start + n - 1}; what became of position {pos} was "
                        "settled in the call that computed it, so give the edit to that call")  # fmt: skip
