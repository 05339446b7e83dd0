"""The words around the graph in a picture of a flow: tokens, layers, the prediction, and the legend."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby

import numpy as np

from nanokv.trace import labels
from nanokv.trace.flow import Flow, Kind
from nanokv.trace.look import Look
from nanokv.trace.marks import numbered
from nanokv.trace.measures import MEASURES
from nanokv.trace.scene import (
    AGAINST,
    FAINT,
    FOR,
    INK,
    MLP,
    RULE,
    SOFT,
    STREAM,
    Grid,
    Scene,
    Stroke,
    Text,
    straight,
)
from nanokv.trace.verify import goal_in_words

BAR = 24.0  # the height of the longest bar below a token
DIFFERENCE = ", difference"  # how the measure's name ends in the difference of two runs
BESIDE = {Kind.SELF: "self-attention", Kind.MLP: "MLP"}  # bars right of a stream


def add(flow: Flow, scene: Scene, places: Grid, look: Look) -> None:
    """Put all words and rules into the scene, and cut the paper to it."""
    margin = look.sizes.margin
    bottom = _tokens(flow, scene, places, look)
    _layers(flow, scene, places, look)
    left, right = 0.0, max(places.right, look.room)
    top = _heading(flow, scene, places, look, right)
    if not look.room:
        left = min(left, *(text.box[0] for text in scene.texts))
        right = max(right, *(text.box[2] for text in scene.texts))
    bottom = _legend(flow, scene, places, look, left, right, bottom - 0.9 * margin)
    scene.paper = left - margin, bottom - margin, right + margin, top + margin


def _tokens(flow: Flow, scene: Scene, places: Grid, look: Look) -> float:
    """The tokens, their positions, effects, sinks and turns below the graph; returns how far down they reach."""
    edges = flow.edges[flow.crossing | (flow.edges["kind"] == Kind.SAMPLED)]
    used, tiny = {flow.at, *edges["src"].tolist(), *edges["dst"].tolist()}, look.sizes.tiny
    line = 1.2 * places.size
    floor = places.base - 4 - line * max(len(column.lines) for column in places.columns)
    for column in places.columns:
        x, pos = places.x[column.first], column.first
        color = INK if pos in used and not column.folded else FAINT
        middle = places.base - 4 - line * len(column.lines) / 2
        tip = _token_tip(flow, column.first, column.last, look.basic)
        scene.texts.append(Text((x, middle), column.lines, places.size, color, tip=tip))
        number = f"{pos}–{column.last}" if column.folded else f"{pos}"
        scene.texts.append(Text((x, floor - 0.75 * tiny), (number,), tiny, FAINT))
    bottom = _effects(flow, scene, places, floor - 1.6 * tiny, look)
    return _turns(flow, scene, places, bottom, look)


def _effects(flow: Flow, scene: Scene, places: Grid, y: float, look: Look) -> float:
    """A bar below each token: what its embedding counted for in all; returns how far down they reach."""
    counts = [float(flow.states[0, column.first : column.last + 1].sum()) for column in places.columns]
    most = max(map(abs, counts))
    if most == 0:
        return _sinks(flow, scene, places, dict.fromkeys(places.x, y), look)
    tiny, high = look.sizes.tiny, BAR if look.sizes.tiny > 6 else 14.0
    up, down = max(0.0, *counts) / most * high, -min(0.0, *counts) / most * high
    zero = y - up - (1.3 * tiny if up else 2)
    for column, value in zip(places.columns, counts, strict=True):
        x, size = places.x[column.first], value / most * high
        wide = min(11.0, column.width - 6)
        if abs(size) > 0.4:
            tip = f"{_name(flow, column.first, column.last)}: {_effect_words(flow)} {_number(flow, value)}"
            color = FOR if value > 0 else AGAINST
            scene.strokes.append(Stroke(straight((x, zero), (x, zero + size)), wide, color, 0.85, tip=tip))
        text = _number(flow, value)
        if abs(value) > 0.035 * most and labels.width(text, tiny) <= column.width + 4:
            scene.texts.append(Text((x, zero + size + np.sign(value) * 0.65 * tiny), (text,), tiny, INK))
    scene.strokes.append(Stroke(straight((places.left, zero), (places.right, zero)), 0.5, FAINT))
    free = {column.first: zero + min(value / most * high, 0) - (1.3 * tiny if value < 0 else 1)
            for column, value in zip(places.columns, counts, strict=True)}  # fmt: skip
    below = _sinks(flow, scene, places, free, look)
    lines = labels.wrap_words(_effect_words(flow), tiny, places.left - 8)
    scene.texts.append(Text((0, zero + (up - down) / 2), lines, tiny, SOFT, left=True))
    return min(below, zero - max(down + (1.3 * tiny if down else 2), 0.6 * tiny * len(lines)))


def _number(flow: Flow, value: float) -> str:
    return signed(value) if flow.signed else f"{value:.0%}"


def signed(value: float, digits: int = 2) -> str:
    """A number with its sign, a minus as wide as a plus."""
    return f"{value:+.{digits}f}".replace("-", "−")


def _effect_words(flow: Flow) -> str:
    return "effect of the word" if flow.signed else "share of the word"


def _name(flow: Flow, first: int, last: int) -> str:
    return f"positions {first} to {last}" if last > first else f"{labels.phrase(flow.tokens.text[first])} {first}"


def _token_tip(flow: Flow, first: int, last: int, basic: bool) -> str:
    text = labels.phrase("".join(flow.tokens.text[first : last + 1]), basic=basic, limit=200)
    if first < last:
        return f"positions {first} to {last}: {text}"
    tokens = flow.tokens
    drawn = ", sampled" if tokens.sampled[first] else ""
    turn = f"turn {tokens.turn[first]} ({tokens.role[first]}{drawn})"
    return f"position {first}, token {tokens.token_id[first]}, {turn}: {text}"


def _sinks(flow: Flow, scene: Scene, places: Grid, free: Mapping[int, float], look: Look) -> float:
    """Marks the sinks, from where each column is free downwards; returns how far down that reaches."""
    size, columns = min(7.0, look.sizes.tiny), {column.first for column in places.columns if not column.folded}
    bottom = min(free.values())
    for sink in flow.sinks:
        if sink.pos in columns:
            middle = free[sink.pos] - 1.2 * size
            scene.texts.append(Text((places.x[sink.pos], middle), ("sink", f"{sink.share:.0%}"), size, SOFT))
            bottom = min(bottom, middle - 1.2 * size)
    return bottom


def _turns(flow: Flow, scene: Scene, places: Grid, y: float, look: Look) -> float:
    """A bracket under each turn, if there is more than one; returns how far down they reach."""
    turns = [(key, len(list(run))) for key, run in groupby(zip(flow.tokens.turn, flow.tokens.role, strict=True))]
    if len(turns) < 2:
        return y
    first, tiny = 0, look.sizes.tiny
    for (_, role), length in turns:
        columns = [column for column in places.columns if first <= column.first < first + length]
        first += length
        if not columns:  # within a fold that began in the turn before
            continue
        left = places.x[columns[0].first] - columns[0].width / 2 + 3
        right = places.x[columns[-1].first] + columns[-1].width / 2 - 3
        scene.strokes.append(Stroke(straight((left, y - 4), (right, y - 4)), 0.8, FAINT))
        words = labels.wrap(labels.units(role), tiny, right - left + 4, 1)
        scene.texts.append(Text(((left + right) / 2, y - 5 - 0.75 * tiny), words, tiny, SOFT))
    return y - 6 - 1.4 * tiny


def _layers(flow: Flow, scene: Scene, places: Grid, look: Look) -> None:
    """The names of the rows on the left, and faint rules along them."""
    rules, wide = [], look.sizes.tiny > 6
    last = ("final", "memory") if wide else ("end", "mem")
    for row, y in places.y.items():
        name = last[row - flow.n_layers] if row >= flow.n_layers else f"layer {row}" if wide else f"L{row}"
        scene.texts.append(Text((0, y), (name,), look.sizes.facts - 0.5, SOFT, left=True))
        rules.append(Stroke(straight((places.left - 8, y), (places.right, y)), 0.6, RULE))
    for first, end, y in places.folds:
        hidden = f"{first}–{end}" if end > first else f"{first}"
        scene.texts.append(Text((0, y), (f"… {hidden}",), look.sizes.tiny, FAINT, left=True))
    scene.strokes[:0] = rules


def _heading(flow: Flow, scene: Scene, places: Grid, look: Look, right: float) -> float:
    """The prediction above its column, the question and its answer on the left; returns how far up they reach."""
    y = max(places.y.values())
    texts = list(_prediction(flow, places, look, y))
    left = min(text.box[0] for text in texts)
    top = max(text.box[3] for text in texts)
    lines = list(_heading_lines(flow, look))
    room = left - 18
    beside = room > 240 and labels.width(lines[0][0], lines[0][1]) <= room if lines else True
    room = room if beside else right
    height = sum(1.35 * size * len(labels.wrap_words(line, size, room)) for line, size, _ in lines)
    edge = max(top, y + 14 + height) if beside else top + 8 + height
    at = edge
    for line, size, color in lines:
        for part in labels.wrap_words(line, size, room):
            at -= 1.35 * size
            texts.append(Text((0, at + 0.6 * size), (part,), size, color, left=True))
    scene.texts += texts
    return edge


def _prediction(flow: Flow, places: Grid, look: Look, y: float) -> Iterator[Text]:
    """The word, its probability and its logit, above the column where it is predicted."""
    x, sizes, chance = places.x[flow.at], look.sizes, flow.prediction.probability
    unders = ["predicted" if chance is None else f"p = {chance:.2f}" if chance >= 0.005 else f"p = {chance:.0e}"]
    if flow.prediction.against is not None and flow.prediction.value is not None:
        other = labels.isolated(labels.visible(flow.prediction.against[:20], basic=look.basic))
        unders.append(f"logit {signed(flow.prediction.value)} over {other}")
    room = 0.8 * look.room or 200.0

    def middle(line: str, size: float) -> float:
        """That of the column, or further left if the line would not end on the paper."""
        return min(x, look.room - labels.width(line, size) / 2) if look.room else x

    at = y + 6 + sizes.facts * 0.6
    for line in reversed(unders):
        (line,) = labels.wrap(line, sizes.facts, room, 1)
        yield Text((middle(line, sizes.facts), at), (line,), sizes.facts, SOFT)
        at += 1.3 * sizes.facts
    (word,) = labels.wrap(labels.units(flow.prediction.text[:60], basic=look.basic), sizes.prediction, room, 1)
    place = middle(word, sizes.prediction), at - 0.6 * sizes.facts + 0.62 * sizes.prediction
    yield Text(place, (word,), sizes.prediction, FOR)


def _heading_lines(flow: Flow, look: Look) -> Iterator[tuple[str, float, str]]:
    """The question, what cutting has shown, and what is drawn: each with its size and colour."""
    sizes, basic = look.sizes, look.basic
    if look.title != "":
        yield labels.sentence(look.title) if look.title else question(flow, basic), sizes.title, INK
    if flow.proof is not None:
        yield proven(flow, basic), sizes.facts + 1, INK
    kept, held = int(flow.crossing.sum()), f"{flow.share:.0%}" if flow.share < 0.995 else "all"
    yield (f"Shown: {kept:,} of {flow.made.attention:,} attention edges, with {held} of the influence between positions. "
           f"{measured(flow, basic)}"), sizes.facts, SOFT  # fmt: skip


def measured(flow: Flow, basic: bool) -> str:
    """The measure, and what an edge's weight is, in a sentence."""
    name, difference, _ = flow.measure.partition(DIFFERENCE)
    unit = MEASURES[name].unit.replace("the logit", goal_in_words(flow, basic)) if name in MEASURES else ""
    return f"Measure {name}{f': {unit}' if unit else ''}{'; in this run less in the other' if difference else ''}."


def question(flow: Flow, basic: bool) -> str:
    """What the picture answers."""
    if flow.measure.endswith(DIFFERENCE):
        return "Which edges differ between the two runs?"
    prediction = flow.prediction
    word, against = (phrase(text or "", basic) for text in (prediction.text, prediction.against))
    if prediction.token_id is None:
        return f"What led to what follows {labels.phrase(flow.tokens.text[flow.at], basic=basic)}?"
    return f"Why {word} and not {against}?" if prediction.against is not None else f"What led to {word}?"


def proven(flow: Flow, basic: bool) -> str:
    """What the proof found, in a sentence."""
    proof = flow.proof
    if proof is None or not proof.steps:
        return ""
    last, like = proof.steps[-1], proof.like_steps
    answer, before = (phrase(cut.answer, basic) for cut in (last, proof.before))
    what = f"the answer becomes {answer}" if proof.flips else f"the answer is still {before}"
    stays = f"{before} stays" if like.answer == proof.before.answer else f"it becomes {phrase(like.answer, basic)}"
    others = "another" if like.n == 1 else f"{like.n} others"
    control = f" Cut {others} of like attention, and {stays} ({_plain(like.value)})." if like.n else ""
    numbers = f"{_plain(proof.before.value)} → {_plain(last.value)}"
    which = "numbered one" if numbered(proof) else "strongest"
    which = f"the {which}" if last.n == 1 else f"the {last.n} {which}{'s' if numbered(proof) else ''}"
    return f"Cut {which} of {proof.attention:,} attention edges, and {what} ({numbers}).{control}"


def phrase(text: str, basic: bool) -> str:
    """A token in a sentence, without the space that begins it."""
    return labels.phrase(text[1:] if text.startswith(" ") and text.strip() else text, basic=basic)


def _plain(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def _legend(flow: Flow, scene: Scene, places: Grid, look: Look, left: float, right: float, y: float) -> float:
    """What the strokes mean, and what was dropped; returns how far down it reaches."""
    x, size = left, look.sizes.legend
    step = 1.55 * size
    for color, pen, style, words, bar in _keys(flow):
        lines = labels.wrap_words(words, size, right - left - 23)
        wide = 23 + max(labels.width(line, size) for line in lines)
        if x > left and x + wide > right:
            x, y = left, y - step
        key = Stroke(straight((x, y), (x + 18, y)), pen, color, style=style, head=6 if bar is not None else 0, bar=bool(bar))
        scene.strokes.append(key)
        for line in lines:
            scene.texts.append(Text((x + 23, y), (line,), size, SOFT, left=True))
            y -= step
        y += step
        x += wide + 14
    paragraphs = [" ".join(_sentences(flow, places, look)), labels.sentence(look.caption or "")]
    for line in (line for text in paragraphs if text for line in labels.wrap_words(text, size, right - left)):
        y -= step
        scene.texts.append(Text((left, y), (line,), size, SOFT, left=True))
    return y - 0.7 * size


def _keys(flow: Flow) -> Iterator[tuple[str, float, str, str, bool | None]]:
    """Colour, pen, style and meaning of each sort of stroke; and its end: an arrow, a bar (True) or none."""
    kinds, weights = set(flow.edges["kind"].tolist()), flow.edges["weight"][flow.crossing]
    name, difference, _ = flow.measure.partition(DIFFERENCE)
    measure = MEASURES.get(name)
    unit, stream = (name, "") if measure is None else (measure.unit, measure.stream)
    each = {"apart": "each head", "merged": "heads merged", "summed": "heads summed"}[flow.heads]
    if flow.signed:
        up, down = ("more than in the other run", "less") if difference else ("for the answer", "against it")
        yield FOR, 3.0, "solid", f"attention, {each}, {up}{_span(weights[weights > 0], '+')}", False
        if (flow.edges["weight"] < 0).any() or (flow.states[0] < 0).any():
            yield AGAINST, 3.0, "solid", f"{down}{_span(weights[weights < 0], '+')}", True
    else:
        yield FOR, 3.0, "solid", f"attention, {each}: {unit}{_span(weights)}", False
    yield STREAM, 5.0, "solid", f"residual stream: {stream}" if stream else "residual stream", None
    for colors in ({Kind.SELF: FOR, Kind.MLP: FOR},) if flow.signed else ({Kind.SELF: FOR}, {Kind.MLP: MLP}):
        if names := [BESIDE[kind] for kind in colors if kind in kinds]:
            yield next(iter(colors.values())), 1.4, "solid", f"beside it: {', then '.join(names)}", None
    if Kind.SAMPLED in kinds:
        yield SOFT, 1.0, "dashed", "sampled token", None
    if Kind.MEMORY in kinds:
        yield FOR if flow.signed else SOFT, 2.0, "solid", "what a depth gave to its position's memory", None


def _span(weights: np.ndarray, sign: str = "") -> str:
    if not len(weights):
        return ""
    ends = sorted((float(weights.min()), float(weights.max())), key=abs)
    return ", " + " to ".join(dict.fromkeys(f"{size:{sign}.3g}".replace("-", "−") for size in ends))


def _sentences(flow: Flow, places: Grid, look: Look) -> Iterator[str]:
    if flow.notes:
        yield f"Shown: {'; '.join(flow.notes)}."
    if flow.dropped.crossing or flow.dropped.others or flow.dropped.selves:
        others = flow.dropped.others + flow.dropped.selves
        crossing = labels.several(flow.dropped.crossing, "attention edge")
        yield (f"Not drawn: {crossing}, with {1 - flow.share:.0%} of the influence that passes between positions, and "
               f"{labels.several(others, 'edge')} of other kinds.")  # fmt: skip
    if flow.signed and flow.states[0].any():
        words = float(flow.states[0].sum())
        more = f"; with the {signed(flow.biases)} of the biases, to {signed(words + flow.biases)}" if flow.biases else ""
        yield f"The effects of all words come to {signed(words)}{more}."
    for sink in flow.sinks:
        name = labels.phrase(flow.tokens.text[sink.pos], basic=look.basic)
        weight = "" if sink.weight is None or not flow.signed else f"; the edges from it come to {signed(sink.weight)}"
        yield f"Set apart: {name} {sink.pos}, a sink, which draws {sink.share:.0%} of the attention{weight}."
    if flow.proof is not None and not np.isnan(flow.proof.correlation):
        what = "predicted and actual change" if flow.proof.signed else "weight and size of the change"
        n = len(flow.proof.cuts)
        yield f"{n} edges cut one by one: rank correlation of {what} {_plain(flow.proof.correlation)}."
    if flow.words and places.lanes:
        yield "Small words at states: what each would predict, were it the last one (the logit lens)."
    folds = [name for name, folded in (("layers", places.folds), ("tokens", any(c.folded for c in places.columns))) if folded]
    if folds:
        yield f"…: {' and '.join(folds)} folded, where no kept attention edge begins or ends."
