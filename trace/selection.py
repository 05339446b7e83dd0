"""Smaller flows: the strongest edges, those of some layers or positions or turns, the cone of a state."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

import numpy as np

from nanokv.errors import TraceError
from nanokv.trace.edges import Kind, on_the_way, sweep
from nanokv.trace.flow import Array, Flow

Which = int | range | tuple[int, int] | Iterable[int]  # one; a range; the first and the last; or any numbers

TURN = np.dtype([("src", "i4"), ("dst", "i4"), ("edges", "i8"), ("weight", "f8"), ("influence", "f8")])


def prune(flow: Flow, share: float = 0.9, threshold: float = 0.0, top_k: int | None = None) -> Flow:
    """The flow cut down to the strongest edges that lead to the prediction.

    Crossing edges are taken until they hold `share` of all influence that passes between positions. They are taken in the
    order of the weakest link on the strongest way from them to the prediction, so that each is connected to it by those
    taken before. None is taken whose way has a link of less influence than `threshold`, nor more than `top_k`. Edges from
    sinks go. Of the rest, what lies on a way from a token to the prediction stays: residual edges, and those of the others
    that have no less influence than the weakest link taken (edges.on_the_way).
    """
    if not 0 <= share <= 1:
        raise TraceError(f"share is {share!r}; it is the part of the influence to keep, from 0 to 1")
    if top_k is not None and top_k < 0:
        raise TraceError(f"top_k is {top_k!r}; it is the most edges to keep, 0 or more")
    order = np.flatnonzero((flow.link > 0) & (flow.link >= threshold))
    # Of equal links the one with the later dst comes first: a way to the prediction leads on to later positions.
    order = order[np.lexsort((order, -flow.edges["dst"][order], -flow.link[order]))][:top_k]
    held = np.concatenate([[0.0], np.cumsum(flow.influence[order])])
    enough = share * flow.total * (1 - 1e-12)  # or else rounding might take one edge too many
    taken = order[: int(np.searchsorted(held, enough))]
    keep = np.zeros(len(flow.edges), bool)
    keep[taken] = True
    strong = flow.influence >= max(threshold, float(flow.link[taken].min(initial=1.0)))
    return flow.only(keep | on_the_way(flow.edges, keep, strong, flow.n_layers, flow.at, flow.feedback))


def select(flow: Flow, *, layers: Which | None = None, heads: Which | None = None, src: Which | None = None,
           dst: Which | None = None, turns: Which | None = None,
           sign: Literal["for", "against"] | None = None) -> Flow:  # fmt: skip
    """Only the attention edges of these layers, heads and positions; `turns`: whose two ends lie in these turns.

    Numbers are one, a range, a pair of the first and the last, or any collection. `sign`: only edges that speak for the
    prediction, or against it. What is left is all there is from then on: shares are of its influence. An edge keeps its
    influence and its link to the prediction, though what joined them may be gone.
    """
    edges, turn = flow.edges, np.array(flow.tokens.turn)
    keep, notes = np.ones(len(edges), bool), []
    for name, which in (("layer", layers), ("head", heads), ("src", src), ("dst", dst)):
        if which is not None:
            keep &= np.isin(edges[name], _numbers(which))
            notes.append(f"{_NAMES[name]} {_said(which)}")
    if turns is not None:
        keep &= np.isin(turn[edges["src"]], _numbers(turns)) & np.isin(turn[edges["dst"]], _numbers(turns))
        notes.append(f"turns {_said(turns)}")
    if sign is not None:
        if sign not in ("for", "against"):
            raise TraceError(f"sign is {sign!r}; it must be 'for' or 'against'")
        keep &= edges["weight"] > 0 if sign == "for" else edges["weight"] < 0
        notes.append(f"edges {sign} the prediction")
    keep |= ~np.isin(edges["kind"], (Kind.ATTENTION, Kind.SELF))
    kept = flow.only(keep, "only " + ", ".join(notes) if notes else "")
    return replace(kept, total=float(kept.influence[kept.crossing].sum()))


_NAMES = {"layer": "layers", "head": "heads", "src": "from positions", "dst": "to positions"}


def _numbers(which: Which) -> list[int]:
    if isinstance(which, int):
        return [which]
    if isinstance(which, tuple) and len(which) == 2:
        return list(range(which[0], which[1] + 1))
    return list(which)


def _said(which: Which) -> str:
    numbers = _numbers(which)
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}–{numbers[-1]}"
    return ", ".join(map(str, numbers))


def cone(flow: Flow, layer: int, pos: int, direction: Literal["up", "down"] = "down") -> Flow:
    """Only the edges by which something reached the state layer{layer}.pos{pos} (down), or by which it went on (up)."""
    if direction not in ("up", "down"):
        raise TraceError(f"direction is {direction!r}; it must be 'up' or 'down'")
    if not (0 <= layer <= flow.n_layers and 0 <= pos <= flow.at):
        raise TraceError(f"there is no state layer{layer}.pos{pos} in this flow: layers are 0 to {flow.n_layers}, positions 0 "
                         f"to {flow.at}")  # fmt: skip
    edges, inside, rows = flow.edges, np.zeros((flow.rows, flow.at + 1), bool), flow.ends
    inside[layer, pos] = True
    keep = np.zeros(len(edges), bool)
    groups = list(sweep(edges, flow.n_layers, flow.feedback))
    for group in groups if direction == "down" else reversed(groups):
        below, above = (rows[0][group], edges["src"][group]), (rows[1][group], edges["dst"][group])
        known, other = (above, below) if direction == "down" else (below, above)
        keep[group] = inside[known]
        np.logical_or.at(inside, other, keep[group])
    words = "what led to" if direction == "down" else "what came of"
    return flow.only(keep, f"only {words} layer{layer}.pos{pos}")


def by_turn(flow: Flow) -> Array:
    """What the crossing edges carry from turn to turn: rows of TURN, by src and then dst; edges, sum of weights, influence."""
    edges, turn = flow.edges[flow.crossing], np.array(flow.tokens.turn, np.int64)
    n = int(turn.max(initial=0)) + 1
    pair = turn[edges["src"]] * n + turn[edges["dst"]]
    columns = [np.bincount(pair, w, n * n) for w in (None, edges["weight"], flow.influence[flow.crossing])]
    there = np.flatnonzero(columns[0])
    table = np.zeros(len(there), TURN)
    table["src"], table["dst"] = np.divmod(there, n)
    for name, column in zip(("edges", "weight", "influence"), columns, strict=True):
        table[name] = column[there]
    return table
