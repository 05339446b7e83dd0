"""What is predicted at a flow's end: the token, its probability, and the logit or difference that is aimed at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from nanokv.errors import TraceError
from nanokv.trace import schema
from nanokv.trace.parts import Array, Goal, TraceLike

RUNNER_UP = "runner-up"


@dataclass(frozen=True)
class Prediction:
    """What is predicted at the flow's end."""

    token_id: int | None  # None where neither logits nor a drawn token are recorded
    text: str
    probability: float | None = None  # None where the trace holds no logits
    against_id: int | None = None
    against: str | None = None  # the text of the token that it is compared with
    value: float | None = None  # its logit, or the difference to the other one's; None where there are no logits


def predict(trace: TraceLike, model: Any, at: int, token: int | str | None, against: int | str | None) -> Prediction:
    """The prediction at `at`: the token named, or else the likeliest, or else the one that was drawn there; and the token that
    it is taken against, if any: RUNNER_UP is the likeliest of the others, if there are logits and one of them is."""
    tokens, chosen = trace.tokens, None
    logits = trace.logits(at) if schema.holds(trace.level, "states") else None
    if token is not None:
        chosen = token_id(trace, model, token)
    elif logits is not None:
        chosen = int(np.argmax(logits))
    elif at + 1 < len(tokens["text"]) and tokens["sampled"][at + 1]:
        chosen = int(tokens["token_id"][at + 1])
    if against == RUNNER_UP:
        other = None if logits is None or chosen is None else _runner_up(logits, chosen)
    else:
        other = None if against is None else token_id(trace, model, against)
    probability = value = None
    if logits is not None and chosen is not None:
        probability, value = probability_of(logits, chosen), Goal(at, chosen, other).value(logits)
    text = "?" if chosen is None else text_of(trace, model, chosen)
    return Prediction(chosen, text, probability, other, None if other is None else text_of(trace, model, other), value)


def _runner_up(logits: Array, token: int) -> int | None:
    """The likeliest other token; None if two or more are equally likely."""
    others = logits.copy()
    others[token] = -np.inf
    best = int(np.argmax(others))
    return best if np.count_nonzero(others == others[best]) == 1 else None


def probability_of(logits: Array, token: int) -> float:
    """The softmax of logits [V] at one token."""
    above = np.exp(logits.astype(np.float64) - float(logits.max()))
    return float(above[token] / above.sum())


def token_id(trace: TraceLike, model: Any, token: int | str) -> int:
    """The id of a token given by id or by text; TraceError for a text of several tokens, or an id of none."""
    if isinstance(token, str):
        found = _ids_of(trace, model, token)
        if len(found) != 1:
            raise TraceError(
                f"the text {token!r} is {len(found)} tokens here, and one is needed. A space before it makes another "
                "token of it; an id will do as well"
            )
        token = found[0]
    if not 0 <= token < trace.config.vocab_size:
        raise TraceError(f"token id {token} is outside the vocabulary, 0 to {trace.config.vocab_size - 1}")
    return int(token)


def _ids_of(trace: TraceLike, model: Any, text: str) -> list[int]:
    """The ids of a text: of the one token in the trace that reads so, or else as the tokenizer has it."""
    tokens, tokenizer = trace.tokens, getattr(model, "tokenizer", None)
    seen = np.unique(tokens["token_id"][tokens["text"] == text]).tolist()
    if len(seen) == 1 or tokenizer is None:
        return list(seen)
    begin = len(tokenizer.encode(""))  # what begins every text, such as <bos>, is not meant
    return [int(token) for token in tokenizer.encode(text)[begin:]]


def text_of(trace: TraceLike, model: Any, token: int) -> str:
    """How the token reads: by the tokenizer, or as it stands in the trace, or its number."""
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is not None:
        return str(tokenizer.piece(token))
    tokens = trace.tokens
    seen = np.flatnonzero(tokens["token_id"] == token)
    return str(tokens["text"][seen[0]]) if len(seen) else f"#{token}"
