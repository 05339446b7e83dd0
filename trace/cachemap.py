"""The cache as a picture: a cell for what a position left in a layer; its colour says who wrote it, its strength how much was
read of it since."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from nanokv.trace import labels, schema
from nanokv.trace.look import Look, look
from nanokv.trace.maps import Array, bins, entry_bytes, head_and_foot, shown_bytes, strength
from nanokv.trace.scene import AGAINST, FOR, INK, MLP, SOFT, Rect, Scene, Stroke, Text, straight
from nanokv.trace.store import Trace

COLORS = {"user": FOR, "model": AGAINST, "system": MLP, "tool": SOFT}
MOST = 96  # columns


def read_since(trace: Trace) -> Array:
    """How much of each entry was read by later positions: [L, S], the mean over heads and those positions of the attention
    weight. 1 where the trace's level does not hold weights."""
    n, layers = trace.length, range(trace.config.n_layers)
    if not schema.holds(trace.level, "weights"):
        return np.ones((len(layers), n))
    readers = np.maximum(n - 1 - np.arange(n), 1)
    return np.stack([np.tril(trace.pattern(layer).mean(axis=0), -1).sum(axis=0) / readers for layer in layers])


def arrange(trace: Trace, seen: Look) -> Scene:
    """The picture of what the trace's run left in the cache."""
    n_layers, left = trace.config.n_layers, 46.0 if seen.sizes.tiny > 6 else 22.0
    room = (seen.room or 860) - left
    drawn, tokens, groups = read_since(trace), trace.tokens, bins(trace.length, min(MOST, int(room / 3)))
    wide = min(room / len(groups), 44.0)
    high = min(max(300.0 / n_layers, 5), 22)
    scene, alpha = Scene(), strength(drawn)
    weighed = schema.holds(trace.level, "weights")
    for column, (a, b) in enumerate(groups):
        color = COLORS[str(tokens["role"][a])]
        for layer in range(n_layers):
            share = float(alpha[layer, a : b + 1].max())
            box = (left + column * wide + 0.3, layer * high + 0.3, left + (column + 1) * wide - 0.3, (layer + 1) * high - 0.3)
            tip = _tip(trace, tokens, layer, a, b, float(drawn[layer, a : b + 1].mean()) if weighed else None)
            name = f"layer{layer}.pos{tokens['pos'][a]}.kv" if a == b else ""
            scene.rects.append(Rect(box, color, 0.1 + 0.9 * share if weighed else 0.6, tip, name))
    bottom = _axis(scene, tokens, groups, left, wide, seen)
    step = max(1, round(12 / high))
    for layer in [*range(0, n_layers - step, step), n_layers - 1]:
        name = f"layer {layer}" if seen.sizes.tiny > 6 else f"L{layer}"
        scene.texts.append(Text((0, (layer + 0.5) * high), (name,), seen.sizes.tiny, SOFT, left=True))
    config, n = trace.config, trace.length
    entries = n * n_layers * config.n_kv_heads
    title = "What is in the cache, and who read it?"
    facts = [f"{entries:,} keys and as many values: {n} positions, {n_layers} layers, {config.n_kv_heads} key/value heads; "
             f"{shown_bytes(n * entry_bytes(config, np.dtype(trace.about.dtype).itemsize))}"]  # fmt: skip
    foot = [" ".join(_legend(tokens, groups, weighed, drawn))]
    head_and_foot(scene, seen, title, facts, foot, (0, bottom, left + wide * len(groups), n_layers * high))
    return scene


def _tip(trace: Trace, tokens: dict[str, Array], layer: int, a: int, b: int, share: float | None) -> str:
    first, last = tokens["pos"][[a, b]].tolist()
    where = f"position {first}" if a == b else f"positions {first} to {last}"
    text = labels.phrase("".join(tokens["text"][a : b + 1]), limit=60)
    turn = f"turn {tokens['turn'][a]} ({tokens['role'][a]}), step {tokens['step'][a]}"
    read = "" if share is None else f"\nlater positions gave it {share:.1%} of their attention"
    return f"layer {layer}, {where}: {text}\nwritten in {turn}{read}"


def _axis(scene: Scene, tokens: dict[str, Array], groups: list[tuple[int, int]], left: float, wide: float, seen: Look) -> float:
    """Tokens where there is room, else positions; a bracket for each turn; returns how far down they reach."""
    tiny, y = seen.sizes.tiny, -9.0
    named = all(labels.width(labels.visible(str(text)[:40]), tiny) <= wide + 2 for text in tokens["text"]) and len(groups) < 97
    texts = [labels.visible(str(tokens["text"][a])[:40], basic=seen.basic) if named else str(tokens["pos"][a])
             for a, _ in groups]  # fmt: skip
    every = 1 if named else max(1, int(np.ceil(26 / wide)))
    for column in range(0, len(groups), every):
        scene.texts.append(Text((left + (column + 0.5) * wide, y), (texts[column],), tiny, SOFT))
    y -= 0.8 * tiny
    column = 0
    for (turn, role), run in groupby(groups, key=lambda group: (int(tokens["turn"][group[0]]), str(tokens["role"][group[0]]))):
        length = len(list(run))
        a, b = left + column * wide + 1, left + (column + length) * wide - 1
        column += length
        scene.strokes.append(Stroke(straight((a, y - 4), (b, y - 4)), 1.6, COLORS[role]))
        fitting = (words for words in (f"turn {turn}: {role}", f"turn {turn}", f"{turn}") if labels.width(words, tiny) <= b - a)
        if words := next(fitting, ""):
            scene.texts.append(Text(((a + b) / 2, y - 8 - 0.5 * tiny), (words,), tiny, INK))
    return y - 10 - 1.2 * tiny


def _legend(tokens: dict[str, Array], groups: list[tuple[int, int]], weighed: bool, drawn: Array) -> Iterator[str]:
    names = {FOR: "blue", AGAINST: "orange", MLP: "purple", SOFT: "grey"}
    roles = dict.fromkeys(map(str, tokens["role"]))
    yield "Written by: " + ", ".join(f"{role} ({names[COLORS[role]]})" for role in roles) + "."
    if weighed:
        yield (f"The stronger a cell, the more was read of it since: at most {drawn.max():.0%} of the attention of later "
               "positions, mean over heads.")  # fmt: skip
    if groups[0][1] > groups[0][0]:
        yield f"A cell holds {groups[0][1] + 1} positions, and shows the one most read."


def render(trace: Trace, path: str | Path, **options: Any) -> Path:
    """Draw the cache that the trace's run left into a file; options as of `Flow.render`, but for kind."""
    from nanokv.trace import draw

    return draw.render_scene(lambda seen: arrange(trace, seen), Path(path), look(options))


