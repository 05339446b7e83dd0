"""Attention edges between two rows, each in a lane of its own where they would lie over each other, as on a railway map."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from nanokv.trace.scene import Point, straight

Array = np.ndarray
CLEAR = 8.0  # points between the highest lane and the row above
GAP = 4.0  # between the end of an edge and the middle of the stream


def assign(edges: Array, room: Array, x: Mapping[int, float], n_layers: int) -> tuple[Array, Array]:
    """How far below the highest lane each edge's lane lies; and how high all lanes of each layer are, [L].

    `room` [E] is the height that an edge needs; a lane has that of its first one.

    The longer an edge, the higher it goes; of equally long ones, the heavier. Edges that do not overlap share a lane.
    """
    below, high = np.zeros(len(edges)), np.zeros(n_layers)
    columns = np.array([x[pos] for pos in range(len(x))])
    begins, ends = columns[edges["src"]], columns[edges["dst"]]
    order = np.lexsort((edges["head"], -np.abs(edges["weight"]), begins, begins - ends, edges["layer"]))
    taken: list[list[tuple[float, float]]] = []
    depths: list[float] = []
    layer = -1
    for i in order.tolist():
        if edges["layer"][i] != layer:
            layer, taken, depths = int(edges["layer"][i]), [], []
        begin, end = float(begins[i]), float(ends[i])
        free = (n for n, spans in enumerate(taken) if all(end <= a or b <= begin for a, b in spans))
        lane = next(free, len(taken))
        if lane == len(taken):
            taken.append([])
            depths.append(high[layer] + room[i] / 2)
            high[layer] += room[i]
        taken[lane].append((begin, end))
        below[i] = depths[lane]
    return below, high


def path(a: Point, b: Point, height: float) -> tuple[Point, ...]:
    """From a state up, or from a memory down, into a lane at that height, and along it to the stream of a later position: two
    curves, seven points.

    It ends below the row of b, where attention adds to the stream: between the state read and the one it makes.
    """
    (x0, y0), x1 = a, b[0] - GAP
    out = min(0.6 * (x1 - x0), 9 + 0.6 * abs(height - y0))
    rise = (x0 + 0.15 * out, y0 + 0.7 * (height - y0)), (x0 + 0.45 * out, height)
    if height < y0:  # past the rows between, and beside its own column
        rise = (x0 + 0.5 * out, y0 + 0.3 * (height - y0)), (x0 + 0.3 * out, height)
    return (a, *rise, *straight((x0 + out, height), (x1, height)))
