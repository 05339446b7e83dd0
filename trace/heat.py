"""A flow as a heat map: who (a row) took how much from whom (a column), over all layers and heads; for where a graph would
be a mat.

The upper triangle is empty, for nobody reads ahead: a token's name stands there, right of its row and above its column.
"""

from __future__ import annotations

import math

import numpy as np

from nanokv.trace import captions, labels
from nanokv.trace.edges import Kind
from nanokv.trace.flow import Flow
from nanokv.trace.look import Look
from nanokv.trace.maps import Array, bins, head_and_foot, strength
from nanokv.trace.measures import MEASURES
from nanokv.trace.scene import AGAINST, FOR, INK, RULE, SOFT, Rect, Scene, Text

MOST = 64  # cells in a row; more tokens share one


def arrange(flow: Flow, look: Look) -> Scene:
    """The picture of this flow as a heat map."""
    n = len(flow.tokens)
    groups = bins(n, MOST if not look.room else min(MOST, int(look.room / 6)))
    cells, k = totals(flow, groups), len(groups)
    names = min(0.25 * look.room, 110) if look.room else 110  # points that the last one may take
    size = min(max(((look.room or 670) - names) / k, 4), 26)
    type_size = min(max(size * 0.62, 6), 10)
    every = math.ceil(1.15 * type_size / size)  # rows, of which one is named
    scene, alpha = Scene(), strength(cells)
    for row in range(k):
        y = -(row + 0.5) * size
        scene.rects.append(Rect((0, y - size / 2, (row + 1) * size, y + size / 2), RULE, 0.6))
        for column in np.flatnonzero(cells[row]).tolist():
            inset = 0.4 if cells[row, column] > 0 else 0.4 + 0.13 * size  # or they would be alike in grey
            box = (column * size + inset, y - size / 2 + inset, (column + 1) * size - inset, y + size / 2 - inset)
            tip = f"{_name(flow, groups[column])} -> {_name(flow, groups[row])}\n{flow.measure} {cells[row, column]:.4g}"
            color = FOR if cells[row, column] > 0 else AGAINST
            scene.rects.append(Rect(box, color, float(0.06 + 0.94 * alpha[row, column]), tip))
        if (k - 1 - row) % every == 0:
            _label(flow, scene, groups[row], ((row + 1) * size + 4, y), type_size, names, row == k - 1, look)
    sinks = {sink.pos for sink in flow.sinks}
    facts = [f"Each row reads from the columns left of it; summed over layers and heads. {captions.measured(flow, look.basic)}"]
    foot = []
    if flow.signed and flow.measure.endswith(captions.DIFFERENCE):
        foot.append("Blue: more than in the other run; orange, in smaller cells: less.")
    elif flow.signed:
        foot.append("Blue: for the prediction; orange, in smaller cells: against it.")
    if groups[0][1] > groups[0][0]:
        foot.append(f"A cell holds up to {groups[0][1] + 1} tokens each way.")
    if sinks:
        foot.append(f"Edges from sinks ({', '.join(map(str, sorted(sinks)))}) are set apart and not shown.")
    if flow.dropped.crossing:
        foot.append(f"Not shown: {labels.several(flow.dropped.crossing, 'attention edge')}, with {1 - flow.share:.0%} of the "
                    "influence that passes between positions.")  # fmt: skip
    head_and_foot(scene, look, captions.question(flow, look.basic), facts, [" ".join(foot)], (0, -k * size, (k + 3) * size, 0))
    return scene


def totals(flow: Flow, groups: list[tuple[int, int]]) -> Array:
    """What the attention edges carry between groups of positions, [k, k]: dst by src. Weights of a measure that speaks of the
    whole prediction, else influence. Sinks aside."""
    edges = (flow.edges["kind"] == Kind.SELF) | flow.crossing
    table = flow.edges[edges]
    measure = MEASURES.get(flow.measure)
    size = table["weight"] if measure is None or measure.whole else flow.influence[edges]
    group = np.zeros(len(flow.tokens), np.int64)
    for i, (first, last) in enumerate(groups):
        group[first : last + 1] = i
    k = len(groups)
    return np.bincount(group[table["dst"]] * k + group[table["src"]], size, k * k).reshape(k, k)


def _name(flow: Flow, group: tuple[int, int]) -> str:
    first, last = group
    return f"positions {first} to {last}" if last > first else f"{labels.phrase(flow.tokens.text[first])} {first}"


def _label(flow: Flow, scene: Scene, group: tuple[int, int], at: tuple[float, float], size: float, room: float, last: bool,
           look: Look) -> None:  # fmt: skip
    first, end = group
    text, number = "".join(flow.tokens.text[first : end + 1]), f"  {first}"
    (words,) = labels.wrap(labels.units(text[:60], basic=look.basic), size, room - 4 - labels.width(number, size), 1)
    scene.texts.append(Text(at, (labels.isolated(words) + number,), size, INK if last else SOFT, left=True))
