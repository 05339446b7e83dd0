"""The pyramid: which states can have reached the prediction, and how much work can lie behind each, by architecture; and on
the panel of the model's own, what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nanokv.trace import captions, reach
from nanokv.trace.flow import Flow
from nanokv.trace.look import Look
from nanokv.trace.maps import Array, bins, head_and_foot, runs
from nanokv.trace.scene import FOR, INK, PAPER, RULE, SOFT, Dot, Rect, Scene, Text, state_id

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
    """The model's own architecture, one with a sliding window in every layer if it has none, and one with feedback memory."""
    n, own = len(flow.tokens), flow.windows or (None,) * flow.n_layers
    sampled = [pos for pos in range(1, n) if flow.tokens.sampled[pos]]
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
    """The panels beside each other."""
    shown, groups = panels(flow), bins(len(flow.tokens), MOST)
    room = (look.room or 780.0) - GAP * (len(shown) - 1) - 30
    wide, high = room / len(shown) / len(groups), min(max(260.0 / (flow.n_layers + 1), 4), 18)
    deepest = max(int(panel.depth.max()) for panel in shown)
    scene, top = Scene(), (flow.n_layers + 1) * high
    for number, panel in enumerate(shown):
        left = 30 + number * (wide * len(groups) + GAP)
        _cells(scene, panel, groups, left, wide, high, deepest)
        if panel.own:
            _measured(flow, scene, groups, left, wide, high)
        scene.texts.append(Text((left, top + 8), (panel.name,), look.sizes.facts, INK, left=True))
        behind = int(panel.depth[flow.n_layers, flow.at])
        size = look.sizes.legend
        words = (f"at most {behind:,} blocks of work,", "one after another, lie behind it")
        scene.texts.append(Text((left, -2.2 * size), words, size, SOFT, left=True))
    for row in (0, flow.n_layers):
        name = "final" if row else "L0"
        scene.texts.append(Text((0, (row + 0.5) * high), (name,), look.sizes.tiny, SOFT, left=True))
    facts = ["Each column is a token, each row a layer. Tinted: states that can have reached the prediction, top right; darker "
             "with more blocks of work behind them."]  # fmt: skip
    foot = [f"Dots: what was measured ({flow.measure}), in size by what each state counts for. Width is not depth: however "
            "many ways lead to it, none is longer."]  # fmt: skip
    right = 30 + room + GAP * (len(shown) - 1)
    title = f"What could have led to {captions.phrase(flow.prediction.text, look.basic)}?"
    head_and_foot(scene, look, title, facts, foot, (0, -3.6 * look.sizes.legend, right, top + 16))
    return scene


def _cells(scene: Scene, panel: Panel, groups: list[tuple[int, int]], left: float, wide: float, high: float,
           deepest: int) -> None:  # fmt: skip
    rows, _ = panel.inside.shape
    border = (left - 1, -0.5, left + len(groups) * wide + 1, rows * high + 0.5)
    scene.rects.append(Rect(border, RULE))
    for row in range(rows):
        depth = [int(panel.depth[row, a : b + 1].max()) if panel.inside[row, a : b + 1].any() else -1 for a, b in groups]
        for first, last, behind in runs(depth):
            box = (left + first * wide, row * high + 0.5, left + (last + 1) * wide, (row + 1) * high - 0.5)
            tip = "cannot have reached it" if behind < 0 else f"row {row}: at most {behind:,} blocks of work behind"
            alpha = 0.0 if behind < 0 else 0.1 + 0.45 * float(np.log1p(behind) / np.log1p(max(deepest, 1)))
            scene.rects += [Rect(box, PAPER), Rect(box, SOFT, alpha, tip)]


def _measured(flow: Flow, scene: Scene, groups: list[tuple[int, int]], left: float, wide: float, high: float) -> None:
    counts = np.abs(flow.states)
    counts[:, [sink.pos for sink in flow.sinks]] = 0
    most = float(counts.max(initial=0)) or 1.0
    for row in range(flow.n_layers + 1):
        for column, (a, b) in enumerate(groups):
            part = float(counts[row, a : b + 1].sum()) / most
            size = min(wide, high, 12) * min(part, 1.0) ** 0.5
            if size > 0.8:
                at = (left + (column + 0.5) * wide, (row + 0.5) * high)
                name = state_id(row, a) if a == b else ""
                scene.dots.append(Dot(at, size, f"{state_id(row, a)}: {flow.states[row, a : b + 1].sum():.4g}", name, FOR))
