"""What a notebook shows of a trace and of a cache: a table, and above it a picture where there is a program to draw it.

The picture stands in an <img>, where no script can run and no name can clash with that of another picture. Of a flow a
notebook shows the picture, or else its table: `draw.for_notebook`.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TypeVar

import numpy as np

from nanokv.cache import KVCache
from nanokv.errors import DrawError
from nanokv.trace import cachemap, draw, labels
from nanokv.trace.look import Look
from nanokv.trace.maps import Array, bins, entry_bytes, head_and_foot, shown_bytes, strength
from nanokv.trace.scene import AGAINST, FOR, INK, SOFT, Rect, Scene, Stroke, Text, straight
from nanokv.trace.store import Trace

MOST_ROWS = 20  # of a table; of more, the first and the last are shown
MOST_TEXT = 60  # characters of a cell
Row = tuple[str, ...]
T = TypeVar("T")


def of_trace(trace: Trace) -> dict[str, str]:
    """By MIME type: whose turns were recorded, what they left in the cache, and who read it since."""
    if not len(trace.steps):
        return {"text/plain": repr(trace)}
    recorded = shown_bytes(sum(step.nbytes for step in trace.steps))
    kept = "" if trace.topk is None else f", the {trace.topk} largest weights of each row"
    facts = f"{recorded} recorded{kept}; architecture {trace.about.architecture}, {trace.about.dtype}"
    names = ("turn", "role", "calls", "positions", "keys and values", "text")
    return _bundle(trace, facts, names, [*_turns(trace)], lambda look: cachemap.arrange(trace, look))


def _turns(trace: Trace) -> Iterator[Row]:
    """A row for each turn."""
    tokens, entry = trace.tokens, entry_bytes(trace.config, np.dtype(trace.about.dtype).itemsize)
    for (turn, role), run in _runs(list(zip(tokens["turn"].tolist(), tokens["role"].tolist(), strict=True))):
        step, pos = (tokens[name][run].tolist() for name in ("step", "pos"))
        text = " ".join(labels.visible(text[:MOST_TEXT]) for text in tokens["text"][run][:MOST_TEXT].tolist())
        yield f"{turn}", role, _span(step), _span(pos), shown_bytes(len(pos) * entry), _cut(text)


def of_cache(cache: KVCache) -> dict[str, str]:
    """By MIME type: which calls wrote which slots, of what tokens, and how long the values there are."""
    if not cache.length:
        return {"text/plain": repr(cache)}
    facts = f"{shown_bytes(cache.length * entry_bytes(cache.config, cache.dtype.itemsize))} of keys and values"
    return _bundle(cache, facts, ("calls", "positions", "keys and values", "token ids"), [*_calls(cache)],
                   lambda look: arrange(cache, look))  # fmt: skip


def _calls(cache: KVCache) -> Iterator[Row]:
    """A row for each call of several positions, and one for neighbouring calls of one."""
    entry = entry_bytes(cache.config, cache.dtype.itemsize)
    for _, run in _runs(_writers(cache)):
        positions, ids = range(cache.length)[run], cache.tokens[run][:MOST_TEXT].tolist()
        calls, size = _span(cache.wrote[run].tolist()), shown_bytes(len(positions) * entry)
        yield calls, _span(positions), size, _cut(" ".join(map(str, ids)))


def _writers(cache: KVCache) -> list[int]:
    """Of each slot the call that wrote it; -1 for all calls of one position."""
    sizes = np.bincount(cache.wrote)
    return np.where(sizes[cache.wrote] > 1, cache.wrote, -1).tolist()


def arrange(cache: KVCache, look: Look) -> Scene:
    """The cache as a picture: a cell for what a position left in a layer, stronger with the length of its values."""
    config, n, writers = cache.config, cache.length, _writers(cache)
    groups, left = bins(n, cachemap.MOST), 46.0
    wide, high = min(max((860 - left) / len(groups), 3.0), 44.0), min(max(300.0 / config.n_layers, 5), 22)
    scene = Scene()
    for layer, lengths in enumerate(value_lengths(cache)):
        alpha = strength(lengths)
        for column, (a, b) in enumerate(groups):
            box = (left + column * wide + 0.3, layer * high + 0.3, left + (column + 1) * wide - 0.3, (layer + 1) * high - 0.3)
            color = AGAINST if writers[a] < 0 else FOR
            scene.rects.append(Rect(box, color, 0.1 + 0.9 * float(alpha[a : b + 1].max())))
    _axis(scene, look, groups, writers, cache.wrote, left, wide)
    step = max(1, round(12 / high))
    for layer in [*range(0, config.n_layers - step, step), config.n_layers - 1]:
        scene.texts.append(Text((0, (layer + 0.5) * high), (f"layer {layer}",), look.sizes.tiny, SOFT, left=True))
    facts = [f"{n} of {config.n_ctx} positions in {config.n_layers} layers"]
    foot = ("Blue: written in a call of several positions; orange: in one of its own. The stronger a cell, the longer the "
            "values in it, beside the longest of its layer (mean over heads).")  # fmt: skip
    if (size := groups[0][1] + 1) > 1:
        foot += f" A cell holds {size} positions, and shows the longest."
    box = (0.0, -26.0 - 2 * look.sizes.tiny, left + wide * len(groups), config.n_layers * high)
    head_and_foot(scene, look, "What is in the cache, and which call wrote it?", facts, [foot], box)
    return scene


def value_lengths(cache: KVCache) -> Array:
    """The Euclidean length of each slot's values, mean over key/value heads: [L, S]."""
    values = (cache.values(layer).astype(np.float64) for layer in range(cache.config.n_layers))
    return np.stack([np.sqrt((v * v).sum(axis=-1)).mean(axis=-1) for v in values])


def _axis(scene: Scene, look: Look, groups: Sequence[tuple[int, int]], writers: Sequence[int], wrote: Array, left: float,
          wide: float) -> None:  # fmt: skip
    """Positions below the cells, and a bracket for each call."""
    tiny = look.sizes.tiny
    for column in range(0, len(groups), max(1, int(np.ceil(26 / wide)))):
        scene.texts.append(Text((left + (column + 0.5) * wide, -9), (str(groups[column][0]),), tiny, SOFT))
    for writer, run in _runs([writers[a] for a, _ in groups]):
        a, b = left + run.start * wide + 1, left + run.stop * wide - 1
        calls = np.unique(wrote[groups[run.start][0] : groups[run.stop - 1][1] + 1]).tolist()
        scene.strokes.append(Stroke(straight((a, -20), (b, -20)), 1.6, AGAINST if writer < 0 else FOR))
        name = "call" if len(calls) == 1 else "calls"
        fitting = (words for words in (f"{name} {_span(calls)}", _span(calls)) if labels.width(words, tiny) <= b - a)
        if words := next(fitting, ""):
            scene.texts.append(Text(((a + b) / 2, -24 - 0.5 * tiny), (words,), tiny, INK))


def _runs(values: Sequence[T]) -> Iterator[tuple[T, slice]]:
    """Each run of equal neighbours: the value, and where it is."""
    first = 0
    for value, run in groupby(values):
        length = len(list(run))
        yield value, slice(first, first + length)
        first += length


def _span(numbers: Sequence[int]) -> str:
    return f"{numbers[0]}" if numbers[0] == numbers[-1] else f"{numbers[0]}–{numbers[-1]}"


def _cut(text: str) -> str:
    return text if len(text) <= MOST_TEXT else text[: MOST_TEXT - 1] + "…"


def _bundle(shown: object, facts: str, names: Row, rows: Sequence[Row], arranged: Callable[[Look], Scene]) -> dict[str, str]:
    """The table as text and as HTML, which has the picture as well."""
    half = MOST_ROWS // 2
    if len(rows) > MOST_ROWS:
        between = ("…", *[""] * (len(names) - 2), f"… {len(rows) - 2 * half} more")
        rows = [*rows[:half], between, *rows[-half:]]
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (names, *rows)]
    head = labels.visible(repr(shown)).replace("·", " ")
    table = _table([head, facts], names, rows)
    return {"text/plain": "\n".join([head, facts, *lines]), "text/html": _picture(arranged) + table}


def _table(above: Sequence[str], names: Row, rows: Sequence[Row]) -> str:
    """An HTML table whose cells are text."""

    def row(cells: Row, tag: str) -> str:
        return "<tr>" + "".join(f'<{tag} style="text-align: left">{html.escape(cell)}</{tag}>' for cell in cells) + "</tr>"

    caption = "<br>".join(map(html.escape, above))
    body = "\n".join(row(cells, "td") for cells in rows)
    return f"<div>{caption}</div>\n<table>\n<thead>{row(names, 'th')}</thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def _picture(arranged: Callable[[Look], Scene]) -> str:
    """The picture as an <img>; "" if no program can draw it. Words for the mouse would not be seen there, and are left out."""

    def silent(look: Look) -> Scene:
        scene = arranged(look)
        scene.rects = [replace(rect, tip="", name="") for rect in scene.rects]
        return scene

    try:
        svg = draw.drawn(silent, "svg", Look())
    except DrawError:
        return ""
    data = base64.b64encode(svg).decode()
    return f'<img alt="the cache, layer by position" style="max-width: 100%" src="data:image/svg+xml;base64,{data}">\n'
