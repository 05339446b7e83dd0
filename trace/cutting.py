"""`nanokv cut`: what is predicted before and after some attention edges are cut."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from nanokv.errors import TraceError
from nanokv.trace import labels
from nanokv.trace.flow import Flow
from nanokv.trace.knockout import EDITS, Edge, How, Replay
from nanokv.trace.prediction import probability_of

SHOWN = 5  # tokens before, and after


def parsed(text: str) -> Edge:
    """(layer, head, dst, src) of an edge written so, LAYER:HEAD:DST:SRC; head -1 is all heads, written *."""
    match = re.fullmatch(r"(\d+):(\d+|\*):(\d+):(\d+)", text)
    if match is None:
        raise TraceError(f"{text!r} is no edge: write LAYER:HEAD:DST:SRC, such as 23:3:13:9, with * for all heads")
    layer, head, dst, src = match.groups()
    return int(layer), -1 if head == "*" else int(head), int(dst), int(src)


def strongest(flow: Flow, n: int) -> list[Edge]:
    """The n edges between positions that speak most for the prediction."""
    if n < 1:
        raise TraceError(f"strongest is {n}; it is how many edges to cut, 1 or more")
    edges = flow.edges[flow.crossing]
    order = np.argsort(-edges["weight"], kind="stable")[:n]
    return [(int(e["layer"]), int(e["head"]), int(e["dst"]), int(e["src"])) for e in edges[order] if e["weight"] > 0]


def report(model: Any, tokens: Any, edges: Sequence[Edge], how: How) -> Iterator[str]:
    """The edges, and the likeliest tokens at the end of `tokens` before and after they are cut, in words. Raises TraceError or
    EditError for an edge that is not there."""
    for layer, head, dst, src in edges:
        if dst >= len(tokens):
            raise TraceError(f"edge {layer}:{'*' if head < 0 else head}:{dst}:{src} leads to position {dst}, and those up to "
                             f"the prediction are 0 to {len(tokens) - 1}")  # fmt: skip
    replay = Replay(model, tokens)
    edits = [EDITS[how](layer, dst, src, None if head < 0 else head) for layer, head, dst, src in edges]
    after = replay.edited(edits)
    what = "what they bring is taken away" if how == "value-zero" else "they are not read, and the others share their weight"
    yield f"{labels.several(len(edges), 'attention edge')} cut: {what} ({how})"
    for layer, head, dst, src in edges:
        names = (f"{labels.phrase(replay.text(int(replay.tokens[pos])))} {pos}" for pos in (src, dst))
        yield f"  layer {layer} {'all heads' if head < 0 else f'head {head}'}: {' -> '.join(names)}"
    best = [np.argsort(-logits, kind="stable")[:SHOWN].tolist() for logits in (replay.logits, after)]
    listed = list(dict.fromkeys([*best[0], *best[1]]))
    width = max(len(labels.visible(replay.text(token))) for token in listed)
    yield f"{'token':<{width}}  {'logit before':>12}  {'after':>7}  {'change':>7}  {'p before':>8}  {'after':>7}"
    for token in listed:
        logits = [x[token] for x in (replay.logits, after)]
        chances = [probability_of(x, token) for x in (replay.logits, after)]
        yield (f"{labels.visible(replay.text(token)):<{width}}  {logits[0]:>12.2f}  {logits[1]:>7.2f}  "
               f"{logits[1] - logits[0]:>+7.2f}  {chances[0]:>8.3f}  {chances[1]:>7.3f}")  # fmt: skip
    before, now = (labels.phrase(replay.text(tokens[0])) for tokens in best)
    yield f"the answer was {before} and " + ("stays so" if best[0][0] == best[1][0] else f"becomes {now}")
