"""Columns of tokens and rows of layers: what is shown, what is folded, and how far apart.

Positions are known, so nothing is laid out by a solver. What is empty is folded: rows of states that no kept attention edge
touches, and, if the tokens would not fit on a page, runs of tokens that none touches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from nanokv.trace import labels, lanes
from nanokv.trace.flow import Flow, Kind
from nanokv.trace.look import Look, Sizes
from nanokv.trace.scene import Column, Grid

WIDTH = 360.0  # points: a shorter row of tokens is stretched to this
PAGE = 900.0  # points: a row of tokens longer than this is folded where nothing happens, then set smaller
BARS = 5.0  # points right of the columns, for the bars beside the last one
MANY = 2000  # attention edges: with more, arrowheads, head labels and tooltips would only be noise

Array = np.ndarray


def shown(flow: Flow) -> Array:
    """The attention edges to draw, the weakest first, so that the strongest lies on top."""
    edges = flow.edges[flow.crossing]
    return edges[np.argsort(np.abs(edges["weight"]), kind="stable")]


def pens(edges: Array, sizes: Sizes) -> Array:
    """How wide to draw each of the shown edges."""
    size = np.abs(edges["weight"].astype(np.float64))
    return 0.7 + (sizes.pen - 0.7) * (size / (float(size.max(initial=0)) or 1.0)) ** 0.75


def fitting(flow: Flow, look: Look) -> Flow:
    """The flow cut down to so many of its strongest edges that its columns fit the width that was asked for."""
    n = int(flow.crossing.sum())
    while look.room and n:
        columns, _ = _columns(flow, look)
        if sum(column.width for column in columns) <= look.room - look.sizes.names - BARS:
            break
        n = min(n - 1, int(0.8 * n))
        smaller = flow.prune(1.0, top_k=n)
        before = [note for note in flow.notes if "do not fit" not in note]
        notes = (*before, f"only the {n} strongest edges, for more do not fit this width")
        flow = replace(smaller, notes=notes, proof=flow.proof, words=flow.words)
    return flow


def grid(flow: Flow, look: Look) -> Grid:
    """Fold what is empty, and give everything else its place."""
    edges, sampled = shown(flow), flow.edges[flow.edges["kind"] == Kind.SAMPLED]
    rows = {flow.n_layers, *edges["layer"].tolist(), *([0] if len(sampled) else [])}
    for between in (flow.crossing, flow.edges["kind"] == Kind.MEMORY):
        rows |= {row for ends in flow.ends for row in ends[between].tolist()}
    columns, size = _columns(flow, look)
    sizes, left = look.sizes, look.sizes.names
    wide = look.room - left - BARS if look.room else WIDTH
    stretch = max(wide / sum(column.width for column in columns), 1.0)
    columns = tuple(replace(column, width=stretch * column.width) for column in columns)
    x: dict[int, float] = {}
    right = left
    for column in columns:
        x |= dict.fromkeys(range(column.first, column.last + 1), right + column.width / 2)
        right += column.width
    least, most = sizes.row
    usual = min(max(0.4 * right / len(rows), least), most)
    if len(edges) > MANY:
        y, folds = _rows(sorted(rows), np.full(flow.rows - 1, usual), least)
        return Grid(columns, x, y, folds, 0.0, right, size, left, ())
    below, high = lanes.assign(edges, pens(edges, sizes) + sizes.lane, x, flow.n_layers)
    squeeze = np.minimum(1, sizes.lanes / np.maximum(high, 1))  # [L]
    between = np.maximum(usual, lanes.CLEAR + squeeze * high + 0.3 * least)  # [L]
    y, folds = _rows(sorted(rows), np.append(between, usual), least)
    layers = edges["layer"].tolist()
    heights = [y[layer + 1] - lanes.CLEAR - squeeze[layer] * depth for layer, depth in zip(layers, below, strict=True)]
    return Grid(columns, x, y, folds, 0.0, right, size, left, tuple(map(float, heights)))


def _columns(flow: Flow, look: Look) -> tuple[tuple[Column, ...], float]:
    """The tokens in the largest type in which they fit on a page, folded only if they must be."""
    edges, used = flow.edges[flow.crossing], {flow.at, *(sink.pos for sink in flow.sinks)}
    for touched in (edges, flow.edges[flow.edges["kind"] == Kind.SAMPLED]):
        used |= {*touched["src"].tolist(), *touched["dst"].tolist()}
    page = look.room - look.sizes.names - BARS if look.room else PAGE
    columns: tuple[Column, ...] = ()
    size = 0.0
    for size, longest_run, room in look.sizes.tokens:
        columns = tuple(_set_tokens(flow, used, look, size, longest_run or len(flow.tokens), room))
        if sum(column.width for column in columns) <= page:
            break
    return columns, size


def _set_tokens(flow: Flow, used: set[int], look: Look, size: float, longest_run: int, room: float) -> Iterator[Column]:
    pos, n, least = 0, len(flow.tokens), look.sizes.column
    while pos < n:
        end = next((p for p in range(pos, n) if p in used), n)
        if end - pos > longest_run:
            yield Column(pos, end - 1, ("…",), max(least, labels.width(f"{pos}–{end - 1}", look.sizes.tiny) + 4))
            pos = end
            continue
        lines = labels.balanced(labels.units(flow.tokens.text[pos][:200], basic=look.basic), size, room, 2)
        yield Column(pos, pos, lines, max(least, *(labels.width(line, size) + 0.8 * size for line in lines)))
        pos += 1


def _rows(rows: Sequence[int], heights: Array, fold: float) -> tuple[dict[int, float], tuple[tuple[int, int, float], ...]]:
    """Heights of the rows that are shown, `heights` [L] apart where they are neighbours; and the folds between."""
    y: dict[int, float] = {}
    folds: list[tuple[int, int, float]] = []
    top, before = 0.0, -1
    for row in rows:
        if row > before + 1:
            folds.append((before + 1, row - 1, top + fold / 2))
            top += fold
        else:
            top += float(heights[row - 1]) if row else 0.6 * fold
        y[row], before = top, row
    return y, tuple(folds)


def least_size(sizes: Sizes) -> float:
    """The smallest type that a picture of these sizes has."""
    return min(sizes.tiny, sizes.legend, sizes.facts, *(size for size, _, _ in sizes.tokens))
