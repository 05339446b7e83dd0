"""The pyramid: which states can have reached the prediction, and how much work can lie behind each, by architecture; and on
the panel of the model's own, what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nanokv.trace import captions, labels, reach
from nanokv.trace.flow import Flow
from nanokv.trace.look import SMALL, Look
from nanokv.trace.maps import Array, bins, head_and_foot, runs
from nanokv.trace.scene import FOR, INK, RULE, SOFT, Dot, Point, Rect, Scene, Text, state_id

MOST = 64  # columns of a panel
GAP = 26.0


@dataclass(frozen=True)
class Panel:
    """One architecture: which states can have reached the prediction, and the most work behind each, both [L + 1, n]."""

    name: str
    inside: Array
    depth: Array
    own: bool  # whether it is the model's


def panels(flow: Flow, window: int | None = None) -> list[Panel]:
    """The model's own architecture; one with a sliding window in every layer, if it has none; and one with feedback memory, or
    for a model that has it, without."""
    n, own = len(flow.tokens), flow.windows or (None,) * flow.n_layers
    sampled = [pos for pos in range(1, n) if flow.tokens.sampled[pos]]
    if flow.feedback:
        mine = _panel(flow, "this model: feedback memory", own, sampled, True, "feedback")
        return [mine, _panel(flow, "standard", own, sampled, False)]
    slides = any(width is not None for width in own)
    made = [_panel(flow, "this model: standard" if not slides else "this model: sliding window", own, sampled, True)]
    if not slides:
        width = window or max(2, n // 6)
        made.append(_panel(flow, f"sliding window of {width} in every layer", (width,) * flow.n_layers, sampled, False))
    made.append(_panel(flow, "feedback memory", (None,) * flow.n_layers, sampled, False, "feedback"))
    return made


def _panel(flow: Flow, name: str, windows: Sequence[int | None], sampled: Sequence[int], own: bool,
           architecture: reach.Architecture = "standard") -> Panel:  # fmt: skip
    n = len(flow.tokens)
    inside = reach.cone(n, windows, flow.n_layers, flow.at, architecture=architecture, sampled=sampled)
    return Panel(name, inside, reach.depth(n, windows, architecture=architecture, sampled=sampled), own)


def arrange(flow: Flow, look: Look) -> Scene:
    """The panels beside each other; in a narrow picture, one below the other."""
    shown, groups, sizes = panels(flow), bins(len(flow.tokens), MOST), look.sizes
    narrow, rows, first = sizes is SMALL, flow.n_layers + 1, 20.0 if sizes is SMALL else 30.0
    across = 1 if narrow else len(shown)
    room = (look.room or 780.0) - GAP * (across - 1) - first
    wide, high = room / across / len(groups), min(max(round(2 * (110 if narrow else 260) / rows) / 2, 3), 18)
    deepest = max(int(panel.depth.max()) for panel in shown)
    names = [labels.wrap_words(panel.name, sizes.facts, room / across) for panel in shown]
    head = (0.5 + 1.2 * max(map(len, names))) * sizes.facts
    scene, below = Scene(), rows * high + 5 * sizes.legend + head
    for number, panel in enumerate(shown):
        left, bottom = (first, -number * below) if narrow else (first + number * (wide * len(groups) + GAP), 0.0)
        _cells(scene, panel, groups, (left, bottom), wide, high, deepest)
        if panel.own:
            _measured(flow, scene, groups, (left, bottom), wide, high)
        above = bottom + rows * high + (0.25 + 0.6 * len(names[number])) * sizes.facts
        scene.texts.append(Text((left, above), names[number], sizes.facts, INK, left=True))
        behind = int(panel.depth[flow.n_layers, flow.at])
        words = f"behind it: at most {labels.several(behind, 'block')} of work, one after another"
        lines = labels.wrap_words(words, sizes.legend, room / across)
        scene.texts.append(Text((left, bottom - (1 + 0.6 * len(lines)) * sizes.legend), lines, sizes.legend, SOFT, left=True))
        if number == 0 or narrow:
            for row, name in ((0, "L0"), (flow.n_layers, "final" if sizes.tiny > 6 else "end")):
                scene.texts.append(Text((0, bottom + (row + 0.5) * high), (name,), sizes.tiny, SOFT, left=True))
    facts = ["Each column is a token, each row a layer. Tinted: states that can have reached the prediction, top right; darker "
             "with more blocks of work behind them."]  # fmt: skip
    foot = [f"Dots: what was measured ({flow.measure}), in size by what each state counts for. Width is not depth: however "
            "many ways lead to it, none is longer."]  # fmt: skip
    right = first + room + GAP * (across - 1)
    title = f"What could have led to {captions.phrase(flow.prediction.text, look.basic)}?"
    lowest = min(text.box[1] for text in scene.texts) - 0.4 * sizes.legend
    head_and_foot(scene, look, title, facts, foot, (0, lowest, right, rows * high + head))
    return scene


def _cells(scene: Scene, panel: Panel, groups: list[tuple[int, int]], at: Point, wide: float, high: float,
           deepest: int) -> None:  # fmt: skip
    """Runs of cells that are alike. Each reaches to the right edge, under those after it: so no seam shows between two."""
    (left, bottom), (rows, _), end = at, panel.inside.shape, at[0] + len(groups) * wide
    scene.rects.append(Rect((left - 1, bottom - 0.5, end + 1, bottom + rows * high + 0.5), RULE))
    for row in range(rows):
        depth = [int(panel.depth[row, a : b + 1].max()) if panel.inside[row, a : b + 1].any() else -1 for a, b in groups]
        for first, _, behind in runs(depth):
            box = (left + first * wide, bottom + row * high + 0.5, end, bottom + (row + 1) * high - 0.5)
            work = f"at most {labels.several(int(behind), 'block')} of work behind"
            tip = "cannot have reached it" if behind < 0 else f"row {row}: {work}"
            alpha = 0.0 if behind < 0 else 0.1 + 0.45 * float(np.log1p(behind) / np.log1p(max(deepest, 1)))
            scene.rects.append(Rect(box, SOFT, alpha, tip))


def _measured(flow: Flow, scene: Scene, groups: list[tuple[int, int]], corner: Point, wide: float, high: float) -> None:
    """The states' dots on the panel whose lower left corner is given."""
    left, bottom = corner
    counts = np.abs(flow.states)
    counts[:, [sink.pos for sink in flow.sinks]] = 0
    most = float(counts.max(initial=0)) or 1.0
    for row in range(flow.n_layers + 1):
        for column, (a, b) in enumerate(groups):
            part = float(counts[row, a : b + 1].sum()) / most
            size = min(wide, high, 12) * min(part, 1.0) ** 0.5
            if size > 0.8:
                at = (left + (column + 0.5) * wide, bottom + (row + 0.5) * high)
                name = state_id(row, a) if a == b else ""
                scene.dots.append(Dot(at, size, f"{state_id(row, a)}: {flow.states[row, a : b + 1].sum():.4g}", name, FOR))
