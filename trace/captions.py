"""The words around the graph in a picture of a flow: tokens, layers, the prediction, and the legend."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import numpy as np

from nanokv.trace import labels
from nanokv.trace.flow import Flow, Kind
from nanokv.trace.measures import MEASURES
from nanokv.trace.scene import (
    FAINT,
    FOR,
    INK,
    MARGIN,
    MLP,
    NAMES,
    RULE,
    SOFT,
    STREAM,
    Grid,
    Scene,
    Stroke,
    Text,
    straight,
)

SMALL, TINY = 8.5, 8.0  # type sizes of the legend, and of numbers


def add(flow: Flow, scene: Scene, places: Grid, *, basic: bool, title: str | None) -> None:
    """Put all words and rules into the scene, and cut the paper to it."""
    bottom = _tokens(flow, scene, places, basic)
    _layers(scene, places)
    top = _prediction(flow, scene, places, basic, title)
    left = min(text.box[0] for text in scene.texts) - MARGIN
    right = max(places.right, *(text.box[2] for text in scene.texts)) + MARGIN
    bottom = _legend(flow, scene, places, left + MARGIN, right - MARGIN, bottom - 14, basic) - MARGIN
    scene.paper = left, bottom, right, top + MARGIN


def _tokens(flow: Flow, scene: Scene, places: Grid, basic: bool) -> float:
    """The tokens, their positions, sinks and turns below the graph; returns how far down they reach."""
    edges = flow.edges[flow.crossing | (flow.edges["kind"] == Kind.SAMPLED)]
    used = {flow.at, *edges["src"].tolist(), *edges["dst"].tolist()}
    sinks = {sink.pos: f"{sink.share:.0%}" for sink in flow.sinks}
    line = 1.2 * places.size
    floor = places.base - 4 - line * max(len(column.lines) for column in places.columns)
    for column in places.columns:
        x, pos = places.x[column.first], column.first
        color = INK if pos in used and not column.folded else FAINT
        middle = places.base - 4 - line * len(column.lines) / 2
        scene.texts.append(
            Text((x, middle), column.lines, places.size, color, tip=_token_tip(flow, column.first, column.last, basic))
        )
        number = f"{pos}–{column.last}" if column.folded else f"{pos}"
        scene.texts.append(Text((x, floor - 6), (number,), TINY, FAINT))
        if pos in sinks and not column.folded:
            scene.texts.append(Text((x, floor - 21), ("sink", sinks[pos]), 7, SOFT))
    return _turns(flow, scene, places, floor - (32 if sinks else 13))


def _token_tip(flow: Flow, first: int, last: int, basic: bool) -> str:
    text = labels.phrase("".join(flow.tokens.text[first : last + 1]), basic=basic, limit=200)
    if first < last:
        return f"positions {first} to {last}: {text}"
    tokens = flow.tokens
    drawn = ", sampled" if tokens.sampled[first] else ""
    turn = f"turn {tokens.turn[first]} ({tokens.role[first]}{drawn})"
    return f"position {first}, token {tokens.token_id[first]}, {turn}: {text}"


def _turns(flow: Flow, scene: Scene, places: Grid, y: float) -> float:
    """A bracket under each turn, if there is more than one; returns how far down they reach."""
    turns = [(key, len(list(run))) for key, run in groupby(zip(flow.tokens.turn, flow.tokens.role, strict=True))]
    if len(turns) < 2:
        return y
    first = 0
    for (_, role), length in turns:
        columns = [column for column in places.columns if first <= column.first < first + length]
        first += length
        if not columns:  # within a fold that began in the turn before
            continue
        left = places.x[columns[0].first] - columns[0].width / 2 + 3
        right = places.x[columns[-1].first] + columns[-1].width / 2 - 3
        scene.strokes.append(Stroke(straight((left, y - 4), (right, y - 4)), 0.8, FAINT))
        scene.texts.append(
            Text(((left + right) / 2, y - 11), labels.wrap(labels.units(role), TINY, right - left, 1), TINY, SOFT)
        )
    return y - 17


def _layers(scene: Scene, places: Grid) -> None:
    """The names of the rows on the left, and faint rules along them."""
    last, rules = max(places.y), []
    for row, y in places.y.items():
        scene.texts.append(Text((MARGIN, y), ("final" if row == last else f"layer {row}",), 9, SOFT, left=True))
        rules.append(Stroke(straight((NAMES - 8, y), (places.right, y)), 0.6, RULE))
    for first, end, y in places.folds:
        hidden = f"{first}–{end}" if end > first else f"{first}"
        scene.texts.append(Text((MARGIN, y), (f"… {hidden}",), TINY, FAINT, left=True))
    scene.strokes[:0] = rules


def _prediction(flow: Flow, scene: Scene, places: Grid, basic: bool, title: str | None) -> float:
    """The prediction above its column, the heading on the left; returns how far up they reach."""
    x, y = places.x[flow.at], places.y[flow.n_layers]
    chance = flow.prediction.probability
    under = "predicted" if chance is None else f"p = {chance:.2f}" if chance >= 0.005 else f"p = {chance:.0e}"
    word = labels.wrap(labels.units(flow.prediction.text[:60], basic=basic), 17, 200, 1)
    texts = [Text((x, y + 15), (under,), 9, SOFT), Text((x, y + 33), word, 17, FOR)]
    what = flow.prediction.text if flow.prediction.token_id is not None else flow.tokens.text[flow.at]
    after = "" if flow.prediction.token_id is not None else "what follows "
    question = title if title is not None else f"What led to {after}{labels.phrase(what, basic=basic)}?"
    kept, held = int(flow.crossing.sum()), f"{flow.share:.0%}" if flow.share < 0.995 else "all"
    facts = f"Measure {flow.measure}: {kept:,} of {flow.made.crossing:,} attention edges, with {held} of their influence"
    room = min(text.box[0] for text in texts) - 20 - MARGIN
    raised = max(labels.width(question, 15), labels.width(facts, 9)) > room
    height = y + (72 if raised else 35)
    texts += [
        Text((MARGIN, height), (question,), 15, INK, left=True),
        Text((MARGIN, height - 17), (facts,), 9, SOFT, left=True),
    ]
    scene.texts += texts
    return max(text.box[3] for text in texts)


def _legend(flow: Flow, scene: Scene, places: Grid, left: float, right: float, y: float, basic: bool) -> float:
    """What the strokes mean, and what was dropped; returns how far down it reaches."""
    x = left
    for color, pen, style, words in _keys(flow):
        wide = 23 + labels.width(words, SMALL)
        if x > left and x + wide > right:
            x, y = left, y - 13
        scene.strokes.append(Stroke(straight((x, y), (x + 18, y)), pen, color, style=style))
        scene.texts.append(Text((x + 23, y), (words,), SMALL, SOFT, left=True))
        x += wide + 14
    for line in labels.wrap_words(" ".join(_sentences(flow, places, basic)), SMALL, right - left):
        y -= 13
        scene.texts.append(Text((left, y), (line,), SMALL, SOFT, left=True))
    return y - 6


def _keys(flow: Flow) -> Iterator[tuple[str, float, str, str]]:
    """Colour, pen, style and meaning of each sort of stroke."""
    kinds, sizes = set(flow.edges["kind"].tolist()), np.abs(flow.edges["weight"][flow.crossing])
    span = ", " + " to ".join(dict.fromkeys(f"{size:.3g}" for size in (sizes.min(), sizes.max()))) if len(sizes) else ""
    measure, heads = MEASURES[flow.measure], "each head" if flow.heads == "apart" else "heads merged"
    yield FOR, 3.0, "solid", f"attention, {heads}: {measure.unit}{span}"
    yield STREAM, 5.0, "solid", f"residual stream: {measure.stream}" if measure.stream else "residual stream"
    if Kind.SELF in kinds:
        yield FOR, 1.4, "solid", "left of it: self-attention"
    if Kind.MLP in kinds:
        yield MLP, 1.4, "solid", "right of it: MLP"
    if Kind.SAMPLED in kinds:
        yield SOFT, 1.0, "dashed", "sampled token"


def _sentences(flow: Flow, places: Grid, basic: bool) -> Iterator[str]:
    if flow.dropped.crossing or flow.dropped.others:
        yield (
            f"Dropped: {flow.dropped.crossing:,} attention edges, with {1 - flow.share:.0%} of the influence that "
            f"passes between positions, and {flow.dropped.others:,} edges of other kinds."
        )
    for sink in flow.sinks:
        name = labels.phrase(flow.tokens.text[sink.pos], basic=basic)
        yield f"Set apart: {name} {sink.pos}, a sink, which draws {sink.share:.0%} of the attention."
    folds = [name for name, folded in (("layers", places.folds), ("tokens", any(c.folded for c in places.columns))) if folded]
    if folds:
        yield f"…: {' and '.join(folds)} folded, where no kept attention edge begins or ends."
