"""Where everything in the picture of a flow goes: x is the token, y is the layer.

Positions are known, so nothing is laid out by a solver. What is empty is folded: rows of states that no kept attention
edge touches, and, if the tokens would not fit on a page, runs of tokens that none touches.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from nanokv.trace import captions, labels
from nanokv.trace.flow import Flow, Kind
from nanokv.trace.scene import (
    AGAINST,
    FOR,
    MLP,
    NAMES,
    SOFT,
    STREAM,
    Box,
    Column,
    Dot,
    Grid,
    Point,
    Scene,
    Stroke,
    Text,
    state_id,
    straight,
)

WIDTH = 360.0  # points: a shorter row of tokens is stretched to this
PAGE = 900.0  # points: a row of tokens longer than this is folded where nothing happens, then set smaller
FOLD = 30.0  # the height of folded layers
MANY = 2000  # attention edges: with more, arrowheads, head labels and tooltips would only be noise
LABELS = 200  # attention edges, at most, that are labelled with their head
DOT = 5.0  # the diameter of a state


def arrange(flow: Flow, *, basic: bool = False, title: str | None = None) -> Scene:
    """The picture of this flow. `basic` writes out the characters that graphviz-pure cannot draw in a PNG."""
    scene, places = Scene(), grid(flow, basic)
    _streams(flow, scene, places)
    for kind, side, color in ((Kind.MLP, 1, MLP), (Kind.SELF, -1, FOR)):
        scene.strokes += _bars(flow, places, kind, side, color)
    scene.strokes += _sampled(flow, places)
    edges = _crossing(flow)
    curves = _curves(flow, places, edges)
    scene.strokes += curves
    if len(curves) <= MANY and edges["head"].max(initial=0) > 0:
        scene.texts += _head_labels(edges["head"], curves, scene)
    captions.add(flow, scene, places, basic=basic, title=title)
    return scene


def _crossing(flow: Flow) -> np.ndarray:
    """The attention edges to draw, the weakest first, so that the strongest lies on top."""
    edges = flow.edges[flow.crossing]
    return edges[np.argsort(np.abs(edges["weight"]), kind="stable")]


def grid(flow: Flow, basic: bool) -> Grid:
    """Fold what is empty, and give everything else its place."""
    edges, sampled = _crossing(flow), flow.edges[flow.edges["kind"] == Kind.SAMPLED]
    rows = {flow.n_layers, *edges["layer"].tolist(), *(edges["layer"] + 1).tolist(), *([0] if len(sampled) else [])}
    used = {flow.at, *(sink.pos for sink in flow.sinks)}
    for touched in (edges, sampled):
        used |= {*touched["src"].tolist(), *touched["dst"].tolist()}
    columns, size = _columns(flow, used, basic)
    stretch = max(WIDTH / sum(column.width for column in columns), 1.0)
    columns = tuple(replace(column, width=stretch * column.width) for column in columns)
    x: dict[int, float] = {}
    right = NAMES
    for column in columns:
        x |= dict.fromkeys(range(column.first, column.last + 1), right + column.width / 2)
        right += column.width
    crowd = np.bincount(edges["layer"], minlength=flow.n_layers) if len(edges) <= MANY else np.zeros(flow.n_layers)
    y, folds = _rows(sorted(rows), min(max(0.6 * right / len(rows), 26.0), 72.0) + np.minimum(1.5 * crowd, 40))
    return Grid(columns, x, y, folds, 0.0, right, size)


def _columns(flow: Flow, used: set[int], basic: bool) -> tuple[tuple[Column, ...], float]:
    """The tokens in the largest type in which they fit on a page, folded only if they must be."""
    columns: tuple[Column, ...] = ()
    for size, longest_run, room in ((13, len(flow.tokens), 100), (13, 2, 100), (11, 2, 86), (9, 1, 72)):
        columns = tuple(_set_tokens(flow, used, basic, size, longest_run, room))
        if sum(column.width for column in columns) <= PAGE:
            break
    return columns, size


def _set_tokens(flow: Flow, used: set[int], basic: bool, size: float, longest_run: int, room: float) -> Iterator[Column]:
    pos, n = 0, len(flow.tokens)
    while pos < n:
        end = next((p for p in range(pos, n) if p in used), n)
        if end - pos > longest_run:
            yield Column(pos, end - 1, ("…",), max(26.0, labels.width(f"{pos}–{end - 1}", 8) + 6))
            pos = end
            continue
        lines = labels.wrap(labels.units(flow.tokens.text[pos][:200], basic=basic), size, room, 2)
        yield Column(pos, pos, lines, max(26.0, *(labels.width(line, size) + 0.8 * size for line in lines)))
        pos += 1


def _rows(rows: Sequence[int], heights: np.ndarray) -> tuple[dict[int, float], tuple[tuple[int, int, float], ...]]:
    """Heights of the rows that are shown, `heights` [L] apart where they are neighbours; and the folds between."""
    y: dict[int, float] = {}
    folds: list[tuple[int, int, float]] = []
    top, before = 0.0, -1
    for row in rows:
        if row > before + 1:
            folds.append((before + 1, row - 1, top + FOLD / 2))
            top += FOLD
        else:
            top += float(heights[row - 1]) if row else 16.0
        y[row], before = top, row
    return y, tuple(folds)


def _streams(flow: Flow, scene: Scene, places: Grid) -> None:
    """The residual columns, as wide as the stream is long (on a scale of their own), and the states on them."""
    length, pens = _stream_pens(flow)
    busy = _busy(flow)
    for pos in sorted({pos for _, pos in busy} | set(np.flatnonzero(~np.isnan(length).all(axis=0)).tolist())):
        x, below, row_below = places.x[pos], places.base, -1
        for row, y in places.y.items():
            first, last = max(row_below, 0), max(row - 1, 0)  # the layers between; below row 0, the embedding
            size, pen = length[first : last + 1, pos].mean(), pens[first : last + 1, pos].mean()
            if np.isnan(size) and (row, pos) not in busy:
                break
            tip = "" if np.isnan(size) else f"residual stream of {_token(flow, pos)}, layers {first} to {last}: {size:.4g}"
            ends = (state_id(row_below, pos), state_id(row, pos)) if row_below >= 0 else None
            line = Stroke(straight((x, below), (x, y)), float(pen), STREAM, ends=ends, tip=tip)
            folded = row - row_below > 1
            scene.strokes.append(replace(line, pen=1.6, style="dotted") if folded else line)
            size = DOT if (row, pos) in busy else 0.0
            scene.dots.append(Dot((x, y), row, pos, size, f"{state_id(row, pos)} {_token(flow, pos)}"))
            below, row_below = y, row


def _stream_pens(flow: Flow) -> tuple[np.ndarray, np.ndarray]:
    """The weights of the residual edges, [L, n], nan where none was kept; and how wide to draw them."""
    residual = flow.edges[flow.edges["kind"] == Kind.RESIDUAL]
    length = np.full((flow.n_layers, len(flow.tokens)), np.nan)
    length[residual["layer"], residual["src"]] = residual["weight"]
    usual = np.delete(length, [sink.pos for sink in flow.sinks if sink.pos != flow.at], axis=1)  # a sink's may be a hundredfold
    most, least = float(np.nanmax(usual, initial=0)) or 1.0, float(np.nanmin(usual, initial=np.inf))
    if not least < most:  # the measure knows nothing of it
        return length, np.full_like(length, 3.0)
    pens = 1.5 + 5.5 * np.sqrt(np.minimum(length / most, 1.0))
    return length, np.where(np.isnan(pens), np.nanmean(pens), pens)


def _busy(flow: Flow) -> set[tuple[int, int]]:
    """The states (row, pos) at which an edge between positions begins or ends, and the last one."""
    edges = flow.edges[flow.crossing | (flow.edges["kind"] == Kind.SAMPLED)]
    rows = flow.n_layers + 1
    sources = zip((edges["layer"] % rows).tolist(), edges["src"].tolist(), strict=True)
    return {(flow.n_layers, flow.at), *sources, *zip((edges["layer"] + 1).tolist(), edges["dst"].tolist(), strict=True)}


def _bars(flow: Flow, places: Grid, kind: Kind, side: int, color: str) -> Iterator[Stroke]:
    """Bars along the columns, on a scale of their own: what MLP or self-attention add there."""
    parts: dict[tuple[int, int], list[tuple[int, float]]] = defaultdict(list)
    edges = flow.edges[flow.edges["kind"] == kind]
    for layer, head, pos, weight in edges[["layer", "head", "dst", "weight"]].tolist():
        if layer in places.y and layer + 1 in places.y:
            parts[layer, pos].append((head, weight))
    most = max((sum(abs(w) for _, w in heads) for heads in parts.values()), default=0.0) or 1.0
    for (layer, pos), heads in parts.items():
        part = sum(abs(w) for _, w in heads) / most
        pen = 0.7 + 2.8 * part**0.5
        x, y, end = places.x[pos] + side * (4.6 + pen / 2), places.y[layer] + 1, places.y[layer + 1] - 1
        numbers = ", ".join(f"{f'head {head} ' if head >= 0 else ''}{weight:.4g}" for head, weight in heads)
        tip = f"layer {layer} {kind.name.lower()} at {_token(flow, pos)}: {numbers}"
        ends = state_id(layer, pos), state_id(layer + 1, pos)
        yield Stroke(straight((x, y), (x, end)), pen, color, 0.4 + 0.5 * part, ends=ends, tip=tip)


def _curves(flow: Flow, places: Grid, edges: np.ndarray) -> list[Stroke]:
    """The attention edges. Those of several heads that join the same two states lie beside each other."""
    most, many = float(np.abs(edges["weight"]).max(initial=0)) or 1.0, len(edges) > MANY
    joins = edges[["layer", "dst", "src"]].tolist()
    strands, drawn, curves = Counter(joins), Counter[tuple[int, int, int]](), []
    for (_, layer, head, dst, src, weight), join in zip(edges.tolist(), joins, strict=True):
        spread = (drawn[join] - (strands[join] - 1) / 2) / max(strands[join] - 1, 1)  # -0.5..0.5 among its strands
        drawn[join] += 1
        part = min(abs(weight) / most, 1.0)
        path = _reach((places.x[src], places.y[layer]), (places.x[dst], places.y[layer + 1]), spread)
        by = f"layer {layer}{f' head {head}' if head >= 0 else ''}"
        tip = "" if many else f"{by}: {_token(flow, src)} -> {_token(flow, dst)}\n{flow.measure} {weight:.4g}"
        pen, head_size = 0.7 + 4.3 * part**0.75, 0.0 if many else 5 + 5 * part
        color, alpha = FOR if weight >= 0 else AGAINST, 0.3 + 0.7 * part**0.6
        ends = state_id(layer, src), state_id(layer + 1, dst)
        curves.append(Stroke(path, pen, color, alpha, head=head_size, ends=ends, tip=tip))
    return curves


def _reach(a: Point, b: Point, spread: float) -> tuple[Point, ...]:
    """From a state to one further right and a row up: out of its row, along between the rows, in from below left."""
    dx, dy = b[0] - a[0], b[1] - a[1]
    c1 = a[0] + 0.16 * dx, a[1] + (0.55 + 0.5 * spread) * dy
    c2 = b[0] - 0.34 * dx, b[1] - (0.22 - 0.5 * spread) * dy
    short = (DOT / 2 + 1) / float(np.hypot(b[0] - c2[0], b[1] - c2[1]))  # the tip touches the rim of the state
    return a, c1, c2, (b[0] - short * (b[0] - c2[0]), b[1] - short * (b[1] - c2[1]))


def _sampled(flow: Flow, places: Grid) -> Iterator[Stroke]:
    """From the top of a position down to the bottom of the next, between their columns."""
    for edge in flow.edges[flow.edges["kind"] == Kind.SAMPLED]:
        src, dst = int(edge["src"]), int(edge["dst"])
        (ax, ay), (bx, by) = (places.x[src], places.y[flow.n_layers]), (places.x[dst], places.y[0])
        x, bend = (ax + bx) / 2, min(18.0, (ay - by) / 3)
        sides = straight((x, ay - bend), (x, by + bend))
        path = ((ax, ay), (x, ay), (x, ay), *sides, (x, by), (x, by), (bx - DOT / 2 - 1, by))
        tip = f"sampled: the prediction at {_token(flow, src)} became {_token(flow, dst)}"
        yield Stroke(path, 0.9, SOFT, 0.7, "dashed", 5.0, (state_id(flow.n_layers, src), state_id(0, dst)), tip)


def _token(flow: Flow, pos: int) -> str:
    return f"{labels.phrase(flow.tokens.text[pos])} {pos}"


def _head_labels(heads: np.ndarray, curves: Sequence[Stroke], scene: Scene) -> list[Text]:
    """The head's number beside each of the strongest curves where there is room."""
    spots = [_along(curve.points) for curve in curves]  # [161, 2] each
    dashes = [_along(stroke.points[3:7]) for stroke in scene.strokes if stroke.style == "dashed"]
    every, whose = np.concatenate(spots + dashes), np.repeat(np.arange(len(spots) + len(dashes)), 161)
    order = np.argsort(every[:, 0], kind="stable")
    every, whose = every[order], whose[order]
    columns = sorted({dot.at[0] for dot in scene.dots})
    texts: list[Text] = []
    for i in list(reversed(range(len(curves))))[:LABELS]:
        for text in _candidates(f"h{heads[i]}", curves[i], spots[i]):
            left, _, right, _ = text.box
            near = slice(*np.searchsorted(every[:, 0], (left - 1, right + 1)).tolist())
            others = every[near][whose[near] != i]
            if _is_free(text.box, [other.box for other in texts], others, columns):
                texts.append(text)
                break
    return texts


def _candidates(name: str, curve: Stroke, spots: np.ndarray) -> Iterator[Text]:
    """Places beside a curve, its middle first, above before below."""
    for t in (80, 64, 96, 48, 112, 36, 124):
        along = spots[t + 1] - spots[t - 1]
        normal = np.array([-along[1], along[0]]) / (float(np.hypot(*along)) or 1.0)
        for side in (1, -1):
            at = spots[t] + side * normal * (curve.pen / 2 + 4.5)
            yield Text((float(at[0]), float(at[1])), (name,), 6.5, curve.color)


def _along(points: Sequence[Point]) -> np.ndarray:
    """161 points of a cubic, from its beginning to its end."""
    t, p = np.linspace(0, 1, 161)[:, None], np.array(points)
    return (1 - t) ** 3 * p[0] + 3 * (1 - t) ** 2 * t * p[1] + 3 * (1 - t) * t**2 * p[2] + t**3 * p[3]


def _is_free(box: Box, texts: Sequence[Box], spots: np.ndarray, columns: Sequence[float]) -> bool:
    left, bottom, right, top = box[0] - 1, box[1] - 1, box[2] + 1, box[3] + 1
    if any(left < other[2] and other[0] < right and bottom < other[3] and other[1] < top for other in texts):
        return False
    if any(left - 8.5 < x < right + 8.5 for x in columns):  # with the bars beside it
        return False
    inside = (spots[:, 0] > left) & (spots[:, 0] < right) & (spots[:, 1] > bottom) & (spots[:, 1] < top)
    return not inside.any()
