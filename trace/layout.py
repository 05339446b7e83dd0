"""The graph in the picture of a flow: x is the token, y is the layer."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from nanokv.trace import captions, labels, lanes, marks
from nanokv.trace.flow import Flow, Kind
from nanokv.trace.grid import MANY, fitting, grid, pens, shown
from nanokv.trace.look import Look
from nanokv.trace.scene import AGAINST, FOR, MLP, SOFT, STREAM, Dot, Grid, Point, Scene, Stroke, state_id, straight

DOT = 5.0  # the diameter of a state
BUNDLE, ALIKE = 20, 1.02  # where there are very many edges, so many are drawn as one stroke, if no wider than the first by more

Array = np.ndarray


def arrange(flow: Flow, look: Look | None = None) -> Scene:
    """The picture of this flow as a graph."""
    look = Look() if look is None else look
    flow = fitting(flow, look)
    scene, places = Scene(), grid(flow, look)
    _streams(flow, scene, places)
    for kind, at in ((Kind.SELF, 5.0), (Kind.MLP, 9.0)):
        scene.strokes += _bars(flow, places, kind, at)
    scene.strokes += _memories(flow, places)
    scene.strokes += _sampled(flow, places)
    edges = shown(flow)
    curves = list(_curves(flow, places, edges, look))
    if len(edges) > MANY:
        curves = list(_bundles(curves))
    scene.strokes += curves
    if places.lanes or not curves:
        marks.add(flow, scene, edges, curves, look)
    captions.add(flow, scene, places, look)
    return scene


def _streams(flow: Flow, scene: Scene, places: Grid) -> None:
    """The residual columns, as wide as the stream is strong (on a scale of their own), and the states on them."""
    length, pens = _stream_pens(flow)
    busy, many = _busy(flow), int(flow.crossing.sum()) > MANY
    highest = {pos: row for row, pos in sorted(busy)}
    for pos in sorted({pos for _, pos in busy} | set(np.flatnonzero(~np.isnan(length).all(axis=0)).tolist())):
        x, below, row_below = places.x[pos], places.base, -1
        for row, y in places.y.items():
            if row > flow.n_layers:
                scene.dots += [_state(flow, row, pos, (x, y), DOT)] if (row, pos) in busy else []
                break
            first, last = max(row_below, 0), max(row - 1, 0)  # the layers between; below row 0, the embedding
            size, pen = (
                float(table[first, pos] if first == last else table[first : last + 1, pos].mean()) for table in (length, pens)
            )
            if math.isnan(size) and row > highest.get(pos, -1):
                break
            says = f"residual stream of {_token(flow, pos)}, layers {first} to {last}: {size:.4g}"
            tip = "" if many or math.isnan(size) else says
            ends = (flow.name(row_below, pos), flow.name(row, pos)) if row_below >= 0 else None
            line = Stroke(straight((x, below), (x, y)), pen, STREAM, ends=ends, tip=tip)
            folded = row - row_below > 1
            scene.strokes.append(replace(line, pen=1.6, style="dotted") if folded else line)
            scene.dots.append(_state(flow, row, pos, (x, y), DOT if (row, pos) in busy else 0.0))
            below, row_below = y, row


def _state(flow: Flow, row: int, pos: int, at: Point, size: float) -> Dot:
    says, name = "", flow.name(row, pos)
    if name in flow.words:
        word, chance = flow.words[name]
        says = f"\nit would predict {labels.phrase(word)}, p = {chance:.2g}"
    counts = f"\n{flow.measure} of all that it did: {flow.states[row, pos]:.4g}" if flow.states[row, pos] else ""
    return Dot(at, size, f"{name} {_token(flow, pos)}{counts}{says}", name)


def _stream_pens(flow: Flow) -> tuple[Array, Array]:
    """The weights of the residual edges, [L, n], nan where none was kept; and how wide to draw them."""
    residual = flow.edges[flow.edges["kind"] == Kind.RESIDUAL]
    length = np.full((flow.n_layers, len(flow.tokens)), np.nan)
    length[residual["layer"], residual["src"]] = residual["weight"]
    usual = np.delete(np.abs(length), [sink.pos for sink in flow.sinks if sink.pos != flow.at], axis=1)  # a sink's may be huge
    most, least = float(np.nanmax(usual, initial=0)) or 1.0, float(np.nanmin(usual, initial=np.inf))
    if not least < most:  # the measure knows nothing of it
        return length, np.full_like(length, 3.0)
    pens = 1.2 + 5.3 * np.sqrt(np.minimum(np.abs(length) / most, 1.0))
    return length, np.where(np.isnan(pens), np.nanmean(pens), pens)


def _busy(flow: Flow) -> set[tuple[int, int]]:
    """The states (row, pos) at which an edge between positions or into a memory begins or ends, and the last one."""
    between = flow.crossing | np.isin(flow.edges["kind"], (Kind.SAMPLED, Kind.MEMORY))
    edges, (below, above) = flow.edges[between], (rows[between].tolist() for rows in flow.ends)
    sources, ends = (zip(rows, edges[name].tolist(), strict=True) for rows, name in ((below, "src"), (above, "dst")))
    return {(flow.n_layers, flow.at), *sources, *ends}


def _bars(flow: Flow, places: Grid, kind: Kind, beside: float) -> Iterator[Stroke]:
    """Bars along the columns, right of them, on a scale of their own: what MLP or self-attention add there."""
    parts: dict[tuple[int, int], list[tuple[int, float]]] = defaultdict(list)
    edges = flow.edges[flow.edges["kind"] == kind]
    for layer, head, pos, weight in edges[["layer", "head", "dst", "weight"]].tolist():
        if layer in places.y and layer + 1 in places.y:
            parts[layer, pos].append((head, weight))
    most = max((sum(abs(w) for _, w in heads) for heads in parts.values()), default=0.0) or 1.0
    for (layer, pos), heads in parts.items():
        part, sign = sum(abs(w) for _, w in heads) / most, sum(w for _, w in heads)
        pen = 0.7 + 2.3 * part**0.5
        x, y, end = places.x[pos] + beside + pen / 2, places.y[layer] + 1, places.y[layer + 1] - 1
        numbers = ", ".join(f"{f'head {head} ' if head >= 0 else ''}{weight:.4g}" for head, weight in heads)
        tip = f"layer {layer} {kind.name.lower()} at {_token(flow, pos)}: {numbers}"
        color = AGAINST if sign < 0 else FOR if flow.signed or kind == Kind.SELF else MLP
        ends = state_id(layer, pos), state_id(layer + 1, pos)
        yield Stroke(straight((x, y), (x, end)), pen, color, 0.25 + 0.45 * part, ends=ends, tip=tip)


def _memories(flow: Flow, places: Grid) -> Iterator[Stroke]:
    """From each depth to its position's memory: straight from the top, else past the left of the column."""
    edges = flow.edges[flow.edges["kind"] == Kind.MEMORY]
    most = float(np.abs(edges["weight"]).max(initial=0)) or 1.0
    for _, depth, _, pos, _, weight in edges.tolist():
        part, high = min(abs(weight) / most, 1.0), places.y[flow.n_layers + 1]
        x, low, aside = places.x[pos], places.y[depth], 0 if depth == flow.n_layers else 6 + 2.2 * (flow.n_layers - depth)
        path = (x, low), (x - aside, low + 0.3 * (high - low)), (x - aside, high - 0.3 * (high - low)), (x, high - DOT / 2)
        color = AGAINST if weight < 0 else FOR if flow.signed else SOFT
        sign = "+" if flow.signed else ""
        tip = f"depth {depth} -> memory of {_token(flow, pos)}\n{flow.measure} {weight:{sign}.4g}"
        ends = flow.name(depth, pos), flow.name(flow.n_layers + 1, pos)
        yield Stroke(path, 0.6 + 2.4 * part, color, 0.3 + 0.5 * part, ends=ends, tip=tip)


def _curves(flow: Flow, places: Grid, edges: Array, look: Look) -> Iterator[Stroke]:
    """The attention edges, in their lanes; if there are very many, on straight ways."""
    most, many, wide = float(np.abs(edges["weight"]).max(initial=0)) or 1.0, not places.lanes, pens(edges, look.sizes).tolist()
    sign = "+" if flow.signed else ""
    for i, (_, layer, head, dst, src, weight) in enumerate(edges.tolist()):
        part, below = min(abs(weight) / most, 1.0), flow.n_layers + 1 if flow.feedback else layer
        a, b = (places.x[src], places.y[below]), (places.x[dst], places.y[layer + 1])
        points = _reach(a, b) if many else lanes.path(a, b, places.lanes[i])
        by = f"layer {layer}{f' head {head}' if head >= 0 else ''}"
        tip = "" if many else f"{by}: {_token(flow, src)} -> {_token(flow, dst)}\n{flow.measure} {weight:{sign}.4g}"
        head_size = 0.0 if many else 4.5 + 4 * part
        color, alpha = FOR if weight >= 0 else AGAINST, 0.35 + 0.65 * part**0.6
        ends = flow.name(below, src), flow.name(layer + 1, dst)
        yield Stroke(points, wide[i], color, alpha, head=head_size, bar=weight < 0, ends=ends, tip=tip)


def _bundles(curves: Sequence[Stroke]) -> Iterator[Stroke]:
    """A few at a time as one stroke, if they are of one colour and nearly one width: they come in order of weight."""
    first = 0
    while first < len(curves):
        after = first + 1
        while after < min(first + BUNDLE, len(curves)) and curves[after].pen < ALIKE * curves[first].pen:
            after += 1
        for color in (AGAINST, FOR):
            if alike := [curve for curve in curves[first:after] if curve.color == color]:
                yield replace(alike[0], more=tuple(curve.points for curve in alike[1:]), ends=None)
        first = after


def _reach(a: Point, b: Point) -> tuple[Point, ...]:
    """From a state to one further right and a row up: out of its row, along between the rows, in from below left."""
    dx, dy = b[0] - a[0], b[1] - a[1]
    return a, (a[0] + 0.16 * dx, a[1] + 0.55 * dy), (b[0] - 0.34 * dx, b[1] - 0.22 * dy), b


def _sampled(flow: Flow, places: Grid) -> Iterator[Stroke]:
    """From the top of a position down to the bottom of the next, between their columns."""
    for edge in flow.edges[flow.edges["kind"] == Kind.SAMPLED]:
        src, dst = int(edge["src"]), int(edge["dst"])
        (ax, ay), (bx, by) = (places.x[src], places.y[flow.n_layers]), (places.x[dst], places.y[0])
        x, bend = (ax + bx) / 2, min(18.0, (ay - by) / 3)
        sides = straight((x, ay - bend), (x, by + bend))
        path = ((ax, ay), (x, ay), (x, ay), *sides, (x, by), (x, by), (bx - DOT / 2 - 1, by))
        tip = f"sampled: the prediction at {_token(flow, src)} became {_token(flow, dst)}"
        ends = state_id(flow.n_layers, src), state_id(0, dst)
        yield Stroke(path, 0.9, SOFT, 0.7, "dashed", 5.0, ends=ends, tip=tip)


def _token(flow: Flow, pos: int) -> str:
    return f"{labels.phrase(flow.tokens.text[pos])} {pos}"

