"""What is written beside the edges and states of a graph, where there is room: heads, numbered cuts, words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nanokv.trace import labels
from nanokv.trace.flow import Flow
from nanokv.trace.look import Look
from nanokv.trace.scene import INK, PAPER, Box, Dot, Point, Scene, Stroke, Text

if TYPE_CHECKING:
    from nanokv.trace.verify import Proof

Array = np.ndarray
LABELS = 200  # attention edges, at most, that are labelled with their head
NUMBERED = 20  # cuts, at most, that are numbered
SPOTS = 161  # points of a curve that are looked at


@dataclass
class Room:
    """What takes up room in the picture."""

    points: Array  # [P, 2] of the curves, by x
    whose: Array  # [P]: the index of the curve, or more for one that has no label
    columns: list[float]
    boxes: list[Box]

    def apart(self, box: Box) -> bool:
        """Whether it lies over no other box."""
        left, bottom, right, top = box[0] - 1, box[1] - 1, box[2] + 1, box[3] + 1
        return not any(left < b[2] and b[0] < right and bottom < b[3] and b[1] < top for b in self.boxes)

    def has(self, box: Box, but: int = -1, beside: float = 8.5) -> bool:
        """Whether a box with nothing in it but curve `but` is free, and so far from the columns."""
        left, bottom, right, top = box[0] - 1, box[1] - 1, box[2] + 1, box[3] + 1
        if not self.apart(box):
            return False
        if any(left - beside < x < right + beside for x in self.columns):  # with the bars beside it
            return False
        near = slice(*np.searchsorted(self.points[:, 0], (left, right)).tolist())
        height = self.points[near, 1][self.whose[near] != but]
        return not ((height > bottom) & (height < top)).any()


def add(flow: Flow, scene: Scene, edges: Array, curves: Sequence[Stroke], look: Look) -> None:
    """Numbers on the edges whose cutting changed the answer, the head's number beside others, words beside states."""
    dashes = [stroke.points[3:7] for stroke in scene.strokes if stroke.style == "dashed"]
    spots = [along(points) for points in (*(curve.points for curve in curves), *dashes)]
    points = np.concatenate(spots) if spots else np.zeros((0, 2))
    order = np.argsort(points[:, 0], kind="stable")
    whose = np.repeat(np.arange(len(spots)), SPOTS)
    room = Room(points[order], whose[order], sorted({dot.at[0] for dot in scene.dots}), [])
    numbers = _numbered(flow, edges)
    for i in sorted(numbers, key=lambda i: numbers[i]):
        name = f"h{edges['head'][i]} " if edges["head"].max(initial=0) > 0 else ""
        _number(numbers[i], f"{name}{edges['weight'][i]:+.2f}", curves[i], spots[i], scene, room, i, look)
    if edges["head"].max(initial=0) > 0:
        for i in [i for i in reversed(range(len(curves))) if i not in numbers][:LABELS]:
            _head(f"h{edges['head'][i]}", curves[i], spots[i], scene, room, i, look)
    for dot in scene.dots:
        _word(flow, dot, scene, room, look)


def numbered(proof: Proof) -> bool:
    """Whether the edges that it cut together are numbered."""
    return proof.flips and len(proof.steps) <= NUMBERED


def _numbered(flow: Flow, edges: Array) -> dict[int, int]:
    """The number of each edge, by its index, among those that were cut together until the answer was another."""
    if flow.proof is None or not numbered(flow.proof):
        return {}
    order = np.argsort(-edges["weight"], kind="stable")[: flow.proof.steps[-1].n]
    return {int(i): number for number, i in enumerate(order, 1)}


def _number(number: int, words: str, curve: Stroke, spots: Array, scene: Scene, room: Room, i: int, look: Look) -> None:
    """A round mark on a curve with the edge's weight beside it, as near to its middle as there is room."""
    size, type_size = max(look.sizes.tiny + 2, 9.3), max(look.sizes.tiny - 1, 6)
    wide = labels.width(words, type_size) + 2
    boxes = [(x - size / 2, y - size / 2, x + size / 2, y + size / 2) for x, y in spots.tolist()]
    both = [(left, bottom + 1.5, right + wide, top - 1.5) for left, bottom, right, top in boxes]
    places = [80, 72, 88, 64, 96, 56, 104, 48, 112, 40, 120, 32, 128]
    flat = [t for t in places if abs(spots[t][1] - spots[min(t + 12, SPOTS - 1)][1]) < 0.3]
    best = next((t for t in flat if room.has(both[t], i, 3)), None)
    if best is not None:
        room.boxes.append(both[best])
        at = boxes[best][2] + wide / 2 - 1, float(spots[best][1])
        scene.texts.append(Text(at, (words,), type_size, curve.color, backed=True))
    else:
        places += [24, 136, 20, 140]
        best = next((t for t in places if room.has(boxes[t], i, 4)), None)
        best = best or next((t for t in places if room.apart(boxes[t])), 80)
        room.boxes.append(boxes[best])
    x, y = spots[best].tolist()
    scene.dots.append(Dot((x, y), size, f"cut {number} of those that changed the answer", color=curve.color))
    scene.texts.append(Text((x, y), (str(number),), 0.65 * size, PAPER))


def _head(name: str, curve: Stroke, spots: Array, scene: Scene, room: Room, i: int, look: Look) -> None:
    """The head's number within its curve, its middle first, or else beside it."""
    size = 6.5 if look.sizes.tiny > 6.5 else 6.0
    for side in (0, 1, -1):
        for t in (80, 64, 96, 48, 112, 36, 124):
            tangent = spots[t + 1] - spots[t - 1]
            normal = np.array([-tangent[1], tangent[0]]) / (float(np.hypot(*tangent)) or 1.0)
            if side == 0 and abs(tangent[1]) > 0.02 * abs(tangent[0]):
                continue  # a label lies on what is straight alone
            at = spots[t] + side * normal * (curve.pen / 2 + 4.5)
            text = Text((float(at[0]), float(at[1])), (name,), size, curve.color, backed=side == 0)
            left, bottom, right, top = text.box
            if room.has((left, bottom + 1, right, top - 1) if side == 0 else text.box, i):
                room.boxes.append(text.box)
                scene.texts.append(text)
                return


def _word(flow: Flow, dot: Dot, scene: Scene, room: Room, look: Look) -> None:
    """What a state would predict, left of it and just below its row, where no lane runs."""
    if dot.size and dot.name in flow.words:
        size = 6.5 if look.sizes.tiny > 6.5 else 6.0
        beside = min(dot.at[0] - 6 - look.sizes.names, 60)  # right of the layers' names
        lines = labels.wrap(labels.units(flow.words[dot.name][0][:40], basic=look.basic), size, max(beside, 1), 1)
        wide = labels.width(lines[0], size)
        text = Text((dot.at[0] - 6 - wide / 2, dot.at[1] - 0.62 * size), lines, size, INK)
        left, bottom, right, top = text.box
        if wide <= beside and room.has((left, bottom + 1.5, right, top - 1.5), beside=-0.5):
            room.boxes.append(text.box)
            scene.texts.append(text)


def along(points: Sequence[Point]) -> Array:
    """SPOTS points of a chain of cubics, evenly from its beginning to its end."""
    t, p = np.linspace(0, 1, SPOTS)[:, None], np.array(points)
    pieces = [
        (1 - t) ** 3 * p[i] + 3 * (1 - t) ** 2 * t * p[i + 1] + 3 * (1 - t) * t**2 * p[i + 2] + t**3 * p[i + 3]
        for i in range(0, len(p) - 1, 3)
    ]
    every = np.concatenate(pieces)
    length = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(every, axis=0).T))])
    at = np.linspace(0, length[-1], SPOTS)
    return np.stack([np.interp(at, length, every[:, axis]) for axis in (0, 1)], axis=1)
