"""Ways through the graph: the strongest, how many there are, and the longest.

A way leads from a token's embedding to the prediction. In each layer it stays in its position or is read by a later one;
from the top it may go on to the bottom of the next position if that was sampled. What an MLP or a head's look at its own
position adds runs beside the residual edge, so these count as staying.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nanokv.errors import TraceError
from nanokv.trace import labels
from nanokv.trace.edges import Kind, sweep

if TYPE_CHECKING:
    from nanokv.trace.flow import Flow

Array = np.ndarray


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
    rows = [(int(edges["layer"][i]) % (flow.n_layers + 1), int(edges["src"][i]), int(i)) for i in moves]
    order = {int(edge): rank for rank, group in enumerate(sweep(edges[moves])) for edge in moves[group]}
    for _, pos, i in sorted(rows, key=lambda row: (order[row[2]], row[2])):
        ahead = _ahead(best, int(edges["layer"][i]) + 1, int(edges["dst"][i]), flow.n_layers)
        link = np.inf if edges["kind"][i] == Kind.SAMPLED else float(passes[i])
        state = (int(edges["layer"][i]) % (flow.n_layers + 1), pos)
        more = [(min(link, strength), (i, *way)) for strength, way in ahead]
        best[state] = _best(best.get(state, []) + more, n)
    ways = [way for (_, _), there in best.items() for way in there if way[1] and np.isfinite(way[0])]
    return [_way(small, strength, way) for strength, way in _best(ways, n)]


def _ahead(best: dict[Any, list[Any]], row: int, pos: int, n_layers: int) -> list[Any]:
    """The ways that go on from a state, staying in its position for none or more layers."""
    return [way for above in range(row, n_layers + 1) for way in best.get((above, pos), [])]


def _best(ways: list[Any], n: int) -> list[Any]:
    return sorted(ways, key=lambda way: (-way[0], len(way[1]), way[1]))[:n]


def _way(flow: Flow, strength: float, way: Sequence[int]) -> Way:
    edges = flow.edges[list(way)]
    positions = [int(edges["src"][0]), *edges["dst"].tolist()]
    return Way(edges, strength, tuple(f"{labels.phrase(flow.tokens.text[pos])} {pos}" for pos in positions))


def count(flow: Flow) -> Array:
    """How many ways lead from each state to the prediction, by attention, residual and sampled edges: object [L + 1, n].

    Exact integers, whatever their size. In a full graph of L layers, with one head or heads merged, there are C(d + L - 1,
    L - 1) from a token that lies d > 0 before the prediction, if a position's look at itself is left out.
    """
    edges, ways = flow.edges, np.zeros((flow.n_layers + 1, flow.at + 1), object)
    ways[-1, flow.at] = 1
    counted = np.isin(edges["kind"], (Kind.ATTENTION, Kind.RESIDUAL, Kind.SAMPLED))
    for group in sweep(edges):
        for layer, dst, src in edges[group][counted[group]][["layer", "dst", "src"]].tolist():
            ways[layer, src] += ways[layer + 1, dst]
    return ways


def longest(flow: Flow) -> Way:
    """A way to the prediction with the most attention and sampled edges, of equals the strongest. It cannot have more than L
    attention edges between two sampled ones: width is not depth."""
    edges, best = flow.edges, dict[tuple[int, int], tuple[int, float, tuple[int, ...]]]()
    best[flow.n_layers, flow.at] = (0, np.inf, ())
    used = np.isin(edges["kind"], (Kind.ATTENTION, Kind.RESIDUAL, Kind.SAMPLED))
    for group in sweep(edges):
        for i in group[used[group]].tolist():
            _, layer, _, dst, src, _ = edges[i].item()
            ahead = best.get((layer + 1, dst))
            if ahead is None:
                continue
            length, strength, way = ahead
            if edges["kind"][i] == Kind.ATTENTION:
                here = (length + 1, min(strength, float(flow.influence[i])), (i, *way))
            else:
                here = (length + 1, strength, (i, *way)) if edges["kind"][i] == Kind.SAMPLED else ahead
            state = (layer % (flow.n_layers + 1), src)
            if state not in best or here[:2] > best[state][:2]:
                best[state] = here
    length, strength, way = max(best.values(), key=lambda found: found[:2])
    if not length:
        raise TraceError("the flow has no edge between positions, so no way is longer than staying in one")
    return _way(flow, strength if np.isfinite(strength) else 0.0, way)
