"""The logit lens: what each state would predict, were it the last one (nostalgebraist 2020)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from nanokv.trace.edges import Kind
from nanokv.trace.measures import check_model
from nanokv.trace.parts import TraceLike
from nanokv.trace.prediction import probability_of, text_of
from nanokv.trace.scene import state_id

if TYPE_CHECKING:
    from nanokv.trace.flow import Flow

ROWS = 64  # states that are read together: a row of logits has as many numbers as the vocabulary


def lens(flow: Flow, trace: TraceLike, model: Any) -> dict[str, tuple[str, float]]:
    """By its id, the word and its probability of every state at which a shown attention or sampled edge begins or ends.

    The state goes through the final norm and the head, as if no layer came after. Needs a trace of level `states`.
    """
    check_model("the logit lens", trace, model)
    kept = flow.crossing | np.isin(flow.edges["kind"], (Kind.SAMPLED, Kind.MEMORY))
    edges, (below, above) = flow.edges[kept], (rows[kept] for rows in flow.ends)
    begins = zip(below.tolist(), edges["src"].tolist(), strict=True)
    ends = zip(above.tolist(), edges["dst"].tolist(), strict=True)
    places = sorted({state for state in {(flow.n_layers, flow.at), *begins, *ends} if state[0] <= flow.n_layers})
    words = {}
    for first in range(0, len(places), ROWS):
        part = places[first : first + ROWS]
        x = np.stack([_entering(trace, row)[pos] for row, pos in part])  # [R, D]
        h = model.norm(x, model.weights.final_norm, model.weights.final_norm_bias)  # [R, D]
        for (row, pos), logits in zip(part, model.ops.linear(h, model.weights.head), strict=True):
            token = int(np.argmax(logits))
            words[state_id(row, pos)] = text_of(trace, model, token), probability_of(logits, token)
    return words


def _entering(trace: TraceLike, row: int) -> np.ndarray:
    """The states [S, D] that enter a layer, or leave the last."""
    last = trace.config.n_layers
    return trace.state("resid_post", last - 1) if row == last else trace.state("resid_pre", row)
