"""The difference of two runs as a flow of its own: a clean prompt and one in which something was changed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from nanokv.errors import TraceError
from nanokv.trace import labels
from nanokv.trace.edges import count, weakest_link

if TYPE_CHECKING:
    from nanokv.trace.flow import Flow

Array = np.ndarray
_KEYS = ["kind", "layer", "head", "dst", "src"]


def difference(flow: Flow, other: Flow) -> Flow:
    """The first flow's edges with their weights less those of the other's; what only one of them has counts as 0 there.

    Both must be unpruned, or pruned alike, of the same length and measure. Where a weight became less, the difference is for
    the first run, and drawn so. Tokens and prediction are those of the first; a changed token reads "clean|changed".
    """
    _check(flow, other)
    table, index = np.unique(np.concatenate([flow.edges[_KEYS], other.edges[_KEYS]]), return_inverse=True)
    weight = np.zeros(len(table))
    np.add.at(weight, index[: len(flow.edges)], flow.edges["weight"])
    np.subtract.at(weight, index[len(flow.edges) :], other.edges["weight"])
    edges = np.empty(len(table), flow.edges.dtype)
    for key in _KEYS:
        edges[key] = table[key]
    edges["weight"] = weight
    edges = edges[np.lexsort((edges["src"], edges["dst"], edges["head"], edges["kind"], edges["layer"]))]
    sinks = tuple({sink.pos: replace(sink, weight=None) for sink in (*other.sinks, *flow.sinks)}.values())
    texts = (flow.tokens.text, other.tokens.text)
    changed = tuple(a if a == b else f"{a}|{b}" for a, b in zip(*texts, strict=True))
    made = replace(
        flow, edges=edges, influence=np.zeros(len(edges)), link=np.zeros(len(edges)), states=flow.states - other.states,
        tokens=replace(flow.tokens, text=changed), prediction=replace(flow.prediction, value=None), sinks=sinks, proof=None,
        whole=None, words={}, biases=flow.biases - other.biases, measure=f"{flow.measure}, difference",
        notes=(*flow.notes, f"this run less one {_predicting(flow, other)}"),
    )  # fmt: skip
    size = np.where(made.from_sinks, 0, np.abs(edges["weight"].astype(np.float64)))
    total = float(size[made.crossing].sum())
    size = size / total if total > 0 else size
    link = weakest_link(edges, made.crossing, size, flow.n_layers, flow.at, flow.feedback)
    same = {sink.pos for sink in flow.sinks} == {sink.pos for sink in other.sinks}
    here = flow.made if same else count(edges, [sink.pos for sink in sinks])
    return replace(made, influence=size, link=link, total=1.0 if total > 0 else 0.0, made=here).counted()


def _predicting(flow: Flow, other: Flow) -> str:
    """What the other run makes of the prediction, in words."""
    word, chance = labels.phrase(other.prediction.text), other.prediction.probability
    if other.prediction.token_id != flow.prediction.token_id or chance is None:
        return f"that is to predict {word}"
    return f"in which {word} has p = {chance:.2g}"


def _check(flow: Flow, other: Flow) -> None:
    for name in ("n_layers", "at", "measure", "heads", "feedback"):
        a, b = getattr(flow, name), getattr(other, name)
        if a != b:
            raise TraceError(f"two flows can be compared that have the same {name}; these have {a!r} and {b!r}")
