"""The graph in the picture of a flow: x is the token, y is the layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from nanokv.trace import captions, labels, lanes, marks
from nanokv.trace.flow import Flow, Kind
from nanokv.trace.grid import fitting, grid, pens, shown
from nanokv.trace.look import Look
from nanokv.trace.scene import AGAINST, FOR, MLP, SOFT, STREAM, Dot, Grid, Point, Scene, Stroke, state_id, straight

DOT = 5.0  # the diameter of a state

Array = np.ndarray


def arrange(flow: Flow, look: Look | None = None) -> Scene:
    """The picture of this flow as a graph."""
    look = Look() if look is None else look
    flow = fitting(flow, look)
    scene, places = Scene(), grid(flow, look)
    _streams(flow, scene, places)
    for kind, at in ((Kind.SELF, 5.0), (Kind.MLP, 9.0)):
        scene.strokes += _bars(flow, places, kind, at)
    scene.strokes += _sampled(flow, places)
    edges = shown(flow)
    curves = list(_curves(flow, places, edges, look))
    scene.strokes += curves
    if places.lanes or not curves:
        marks.add(flow, scene, edges, curves, look)
    captions.add(flow, scene, places, look)
    return scene


def _streams(flow: Flow, scene: Scene, places: Grid) -> None:
    """The residual columns, as wide as the stream is strong (on a scale of their own), and the states on them."""
    length, pens = _stream_pens(flow)
    busy = _busy(flow)
    for pos in sorted({pos for _, pos in busy} | set(np.flatnonzero(~np.isnan(length).all(axis=0)).tolist())):
        x, below, row_below = places.x[pos], places.base, -1
        for row, y in places.y.items():
            first, last = max(row_below, 0), max(row - 1, 0)  # the layers between; below row 0, the embedding
            size, pen = length[first : last + 1, pos].mean(), pens[first : last + 1, pos].mean()
            if np.isnan(size) and not any((above, pos) in busy for above in places.y if above >= row):
                break
            tip = "" if np.isnan(size) else f"residual stream of {_token(flow, pos)}, layers {first} to {last}: {size:.4g}"
            ends = (state_id(row_below, pos), state_id(row, pos)) if row_below >= 0 else None
            line = Stroke(straight((x, below), (x, y)), float(pen), STREAM, ends=ends, tip=tip)
            folded = row - row_below > 1
            scene.strokes.append(replace(line, pen=1.6, style="dotted") if folded else line)
            scene.dots.append(_state(flow, row, pos, (x, y), DOT if (row, pos) in busy else 0.0))
            below, row_below = y, row


def _state(flow: Flow, row: int, pos: int, at: Point, size: float) -> Dot:
    says = ""
    if state_id(row, pos) in flow.words:
        word, chance = flow.words[state_id(row, pos)]
        says = f"\nit would predict {labels.phrase(word)}, p = {chance:.2g}"
    counts = f"\n{flow.measure} of all that it did: {flow.states[row, pos]:.4g}" if flow.states[row, pos] else ""
    return Dot(at, size, f"{state_id(row, pos)} {_token(flow, pos)}{counts}{says}", state_id(row, pos))


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
    """The states (row, pos) at which an edge between positions begins or ends, and the last one."""
    edges = flow.edges[flow.crossing | (flow.edges["kind"] == Kind.SAMPLED)]
    rows = flow.n_layers + 1
    sources = zip((edges["layer"] % rows).tolist(), edges["src"].tolist(), strict=True)
    return {(flow.n_layers, flow.at), *sources, *zip((edges["layer"] + 1).tolist(), edges["dst"].tolist(), strict=True)}


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


def _curves(flow: Flow, places: Grid, edges: Array, look: Look) -> Iterator[Stroke]:
    """The attention edges, in their lanes; if there are very many, on straight ways."""
    most, many, wide = float(np.abs(edges["weight"]).max(initial=0)) or 1.0, not places.lanes, pens(edges, look.sizes).tolist()
    for i, (_, layer, head, dst, src, weight) in enumerate(edges.tolist()):
        part = min(abs(weight) / most, 1.0)
        a, b = (places.x[src], places.y[layer]), (places.x[dst], places.y[layer + 1])
        points = _reach(a, b) if many else lanes.path(a, b, places.lanes[i])
        by = f"layer {layer}{f' head {head}' if head >= 0 else ''}"
        sign = "+" if flow.signed else ""
        tip = "" if many else f"{by}: {_token(flow, src)} -> {_token(flow, dst)}\n{flow.measure} {weight:{sign}.4g}"
        head_size = 0.0 if many else 4.5 + 4 * part
        color, alpha = FOR if weight >= 0 else AGAINST, 0.35 + 0.65 * part**0.6
        ends = state_id(layer, src), state_id(layer + 1, dst)
        yield Stroke(points, wide[i], color, alpha, head=head_size, bar=weight < 0, ends=ends, tip=tip)


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

