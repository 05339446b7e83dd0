"""Ways through the graph: the strongest, how many there are, and the longest.

A way leads from a token's embedding to the prediction. In each layer it stays in its position or is read by a later one;
from the top it may go on to the bottom of the next position if that was sampled. In a feedback model it is read from a
memory, into which it came from any depth. What an MLP or a head's look at its own position adds runs beside the residual
edge, so these count as staying.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nanokv.errors import TraceError
from nanokv.trace import labels
from nanokv.trace.edges import Kind, sweep
from nanokv.trace.reach import Architecture

if TYPE_CHECKING:
    from nanokv.trace.flow import Flow

Array = np.ndarray
LINKS = (Kind.ATTENTION, Kind.RESIDUAL, Kind.SAMPLED, Kind.MEMORY)


@dataclass(frozen=True, eq=False)
class Way:
    """A way from a token to the prediction, as the attention and sampled edges on it, in the order in which it takes them."""

    edges: Array  # [k] of EDGE
    strength: float  # the influence of its weakest attention edge
    tokens: tuple[str, ...]  # in words: where it begins, and whereto each edge leads

    def __str__(self) -> str:
        steps = [self.tokens[0]]
        for edge, token in zip(self.edges, self.tokens[1:], strict=True):
            head = f".{edge['head']}" if edge["head"] >= 0 else ""
            arrow = " ⇢ " if edge["kind"] == Kind.SAMPLED else f" –[{edge['layer']}{head}: {edge['weight']:.3g}]→ "
            steps.append(arrow + token)
        return "".join(steps)

    def __repr__(self) -> str:
        return f"<Way of {len(self.edges)} edges, strength {self.strength:.2%}: {self}>"


def strongest(flow: Flow, n: int = 5) -> list[Way]:
    """The n strongest ways that change position, each as strong as its weakest attention edge; the shorter of equals first.

    Exact: the ways of the strongest n * L edges are all looked at, layer by layer, the best n of each state kept.
    """
    if n < 1:
        raise TraceError(f"n is {n!r}; it is how many ways to find, 1 or more")
    small = flow.prune(1.0, top_k=n * flow.n_layers)
    edges, passes = small.edges, small.influence
    best: dict[tuple[int, int], list[tuple[float, tuple[int, ...]]]] = {(flow.n_layers, flow.at): [(np.inf, ())]}
    moves = np.flatnonzero(small.crossing | (edges["kind"] == Kind.SAMPLED))
    # From the top down, positions of later runs first. What leads on without a change of position is the same way.
    groups, (below, above), deepest = sweep(edges[moves], flow.n_layers, flow.feedback), small.ends, _deepest(small)
    for i in [int(edge) for group in groups for edge in sorted(moves[group])]:
        ahead = _ahead(best, int(above[i]), int(edges["dst"][i]), flow.n_layers, deepest)
        link = np.inf if edges["kind"][i] == Kind.SAMPLED else float(passes[i])
        state = int(below[i]), int(edges["src"][i])
        more = [(min(link, strength), (i, *way)) for strength, way in ahead]
        best[state] = _best(best.get(state, []) + more, n)
    ways = [way for (_, _), there in best.items() for way in there if way[1] and np.isfinite(way[0])]
    return [_way(small, strength, way) for strength, way in _best(ways, n)]


def _deepest(flow: Flow) -> dict[int, int]:
    """The last row of each position that leads to its memory."""
    edges = flow.edges[flow.edges["kind"] == Kind.MEMORY]
    return {pos: int(edges["layer"][edges["src"] == pos].max()) for pos in np.unique(edges["src"]).tolist()}


def _ahead(best: dict[Any, list[Any]], row: int, pos: int, n_layers: int, deepest: dict[int, int]) -> list[Any]:
    """The ways that go on from a state, staying in its position for none or more layers, and then perhaps in its memory."""
    rows = [*range(row, n_layers + 1), *([n_layers + 1] if row <= deepest.get(pos, -1) else [])]
    return [way for above in rows for way in best.get((above, pos), [])]


def _best(ways: list[Any], n: int) -> list[Any]:
    return sorted(ways, key=lambda way: (-way[0], len(way[1]), way[1]))[:n]


def _way(flow: Flow, strength: float, way: Sequence[int]) -> Way:
    edges = flow.edges[list(way)]
    positions = [int(edges["src"][0]), *edges["dst"].tolist()]
    return Way(edges, strength, tuple(f"{labels.phrase(flow.tokens.text[pos])} {pos}" for pos in positions))


def count(flow: Flow) -> Array:
    """How many ways lead from each state to the prediction, by attention, residual, sampled and memory edges: object
    [rows, n].

    Exact integers, whatever their size. In a full graph of L layers, with one head or heads merged, there are C(d + L - 1,
    L - 1) from a token that lies d > 0 before the prediction, if a position's look at itself is left out.
    """
    edges, (below, above), ways = flow.edges, flow.ends, np.zeros((flow.rows, flow.at + 1), object)
    ways[flow.n_layers, flow.at] = 1
    counted = np.isin(edges["kind"], LINKS)
    for group in sweep(edges, flow.n_layers, flow.feedback):
        for i in group[counted[group]]:
            ways[below[i], edges["src"][i]] += ways[above[i], edges["dst"][i]]
    return ways


def longest(flow: Flow) -> Way:
    """A way to the prediction with the most attention and sampled edges, of equals the strongest. It cannot have more than L
    attention edges between two sampled ones: width is not depth. But with feedback memory it may have one to each position."""
    edges, (below, above) = flow.edges, flow.ends
    best: dict[tuple[int, int], tuple[int, float, tuple[int, ...]]] = {(flow.n_layers, flow.at): (0, np.inf, ())}
    used = np.isin(edges["kind"], LINKS)
    for group in sweep(edges, flow.n_layers, flow.feedback):
        for i in group[used[group]].tolist():
            ahead = best.get((int(above[i]), int(edges["dst"][i])))
            if ahead is None:
                continue
            length, strength, way = ahead
            if edges["kind"][i] == Kind.ATTENTION:
                here = (length + 1, min(strength, float(flow.influence[i])), (i, *way))
            else:
                here = (length + 1, strength, (i, *way)) if edges["kind"][i] == Kind.SAMPLED else ahead
            state = int(below[i]), int(edges["src"][i])
            if state not in best or here[:2] > best[state][:2]:
                best[state] = here
    length, strength, way = max(best.values(), key=lambda found: found[:2])
    if not length:
        raise TraceError("the flow has no edge between positions, so no way is longer than staying in one")
    return _way(flow, strength if np.isfinite(strength) else 0.0, way)


def possible(n: int, windows: Sequence[int | None], *, architecture: Architecture = "standard",
             sampled: Sequence[int] = ()) -> Array:  # fmt: skip
    """How many ways the architecture has from each state to the last position's final one: object [L + 1, n], exact.

    `windows` [L] and `sampled` are those of `reach.cone`. In a full flow with heads merged, `count` finds as many, but for a
    position's look at itself. Standard, without windows: C(d + L - 1, L - 1) from a token that lies d > 0 before the last,
    so that there are very many ways, of which none is longer than L blocks (`reach.depth`).
    """
    n_layers, drawn = len(windows), set(sampled)
    ways, memory = np.zeros((n_layers + 1, n), object), np.zeros(n, object)
    for pos in reversed(range(n)):
        readers = [ways[layer + 1, pos + 1 : pos + (windows[layer] or n)].sum() for layer in range(n_layers)]
        memory[pos] = sum(readers) if architecture == "feedback" else 0
        ways[n_layers, pos] = int(pos == n - 1) + (ways[0, pos + 1] if pos + 1 in drawn else 0) + memory[pos]
        for layer in reversed(range(n_layers)):
            ways[layer, pos] = ways[layer + 1, pos] + (memory[pos] if architecture == "feedback" else readers[layer])
    return ways
