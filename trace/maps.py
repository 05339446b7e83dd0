"""What pictures made of cells share: bins of positions, runs of like cells, sizes in bytes, the paper around them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from nanokv.config import Config
from nanokv.trace import labels
from nanokv.trace.look import Look
from nanokv.trace.scene import INK, SOFT, Scene, Text

Array = np.ndarray


def bins(n: int, most: int) -> list[tuple[int, int]]:
    """The first and the last of each run of positions that share a cell, so that there are at most `most` cells."""
    size = max(-(-n // most), 1)
    return [(first, min(first + size, n) - 1) for first in range(0, n, size)]


def runs(values: Sequence[float]) -> Iterator[tuple[int, int, float]]:
    """The first and the last index of each run of equal values, and the value."""
    first = 0
    for i in range(1, len(values) + 1):
        if i == len(values) or values[i] != values[first]:
            yield first, i - 1, values[first]
            first = i


def strength(values: Array) -> Array:
    """Values as the opacity of a cell, 0 to 1: the root of their size beside the greatest."""
    size = np.abs(values)
    return np.sqrt(size / (float(size.max(initial=0)) or 1.0))


def entry_bytes(config: Config, itemsize: int) -> int:
    """Bytes of what one position leaves in the cache: a key and a value for each key/value head of each layer."""
    return 2 * config.n_layers * config.n_kv_heads * config.head_dim * itemsize


def shown_bytes(n: float) -> str:
    """A number of bytes in three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 999.5:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"


def head_and_foot(scene: Scene, look: Look, title: str, facts: Sequence[str], foot: Sequence[str],
                  box: tuple[float, float, float, float]) -> None:  # fmt: skip
    """A title and facts above the box, sentences below it; then cuts the paper to all."""
    left, bottom, right, top = box
    sizes, at = look.sizes, bottom - look.sizes.margin * 0.6
    right = max(right, left + look.room, *(text.box[2] for text in scene.texts)) if not look.room else left + look.room
    right = max(right, left + 240) if not look.room else right
    for sentence in (*foot, *([labels.sentence(look.caption)] if look.caption else [])):
        for line in labels.wrap_words(sentence, sizes.legend, right - left):
            scene.texts.append(Text((left, at - 0.5 * sizes.legend), (line,), sizes.legend, SOFT, left=True))
            at -= 1.5 * sizes.legend
    heading = [] if look.title == "" else [(labels.sentence(look.title) if look.title else title, sizes.title, INK)]
    heading += [(fact, sizes.facts, SOFT) for fact in facts]
    lines = [(line, size, color) for words, size, color in heading for line in labels.wrap_words(words, size, right - left)]
    y = top + sizes.margin * 0.6 + sum(1.35 * size for _, size, _ in lines)
    edge = y
    for line, size, color in lines:
        y -= 1.35 * size
        scene.texts.append(Text((left, y + 0.6 * size), (line,), size, color, left=True))
    margin = sizes.margin
    scene.paper = left - margin, at - margin * 0.4, right + margin, edge + margin
