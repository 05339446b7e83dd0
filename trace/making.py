"""Trace -> Flow: every edge weighed by a measure, and how much of the prediction passes through it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np

from nanokv.errors import TraceError
from nanokv.trace import measures, memory
from nanokv.trace.blas import one_thread
from nanokv.trace.edges import Pool, check_finite, count_all, memory_edges, sampled_edges, weakest_link
from nanokv.trace.flow import Flow, Tokens
from nanokv.trace.measures import Heads, Measure
from nanokv.trace.parts import Array, Goal, TraceLike, has_feedback
from nanokv.trace.prediction import RUNNER_UP, Prediction, predict
from nanokv.trace.sinks import Sink, find_sinks
from nanokv.trace.spread import Shared, sampled_tops, whole_influence

MOST_EDGES = 1_000_000  # attention edges that a flow keeps; of more, the strongest. Each takes 33 bytes


def flow(trace: TraceLike, model: Any = None, *, measure: str | None = None, at: int = -1, token: int | str | None = None,
         against: int | str | None = None, heads: Heads = "apart", sinks: Sequence[int] | None = None) -> Flow:  # fmt: skip
    """The flow to the prediction at position `at` (from the end if negative), its edges weighed by a measure.

    `measure` is one of `measures.MEASURES`; by default `target`, or `attention` where the trace or a missing model do not
    allow that. `token` and `against`, ids or text, are the predicted token to look at instead of the likeliest, and the one
    whose logit is taken from its own, which only a measure that aims at a logit can do: by default "runner-up", the likeliest
    other token if there is a single one, for what moves all logits alike moves no prediction; None takes the logit alone.
    `heads`: an edge for each, or one for all, by the
    weight of what they bring together ("merged") or the sum of their weights ("summed"). `sinks` are the positions to set
    apart; if None, those that `find_sinks` recognises. The flow of a feedback model needs the model, whatever the measure.
    Raises TraceError for what this trace does not hold.
    """
    chosen = measures.find(measure, trace, model)
    if has_feedback(trace):
        measures.check_model("a flow through feedback memory", trace, model)  # for the shares of its depths
    at = _position(trace, at)
    if heads not in ("apart", "merged", "summed"):
        raise TraceError(f"heads is {heads!r}; it must be 'apart', 'merged' or 'summed'")
    if against not in (None, RUNNER_UP) and not chosen.aimed:
        raise TraceError(
            f"measure {chosen.name!r} is the same whatever is predicted, so there is nothing to take against another token"
        )
    prediction = predict(trace, model, at, token, against if chosen.aimed else None)
    goal = Goal(at, prediction.token_id, prediction.against_id)
    if chosen.aimed and goal.token is None:
        raise TraceError(f"measure {chosen.name!r} aims at a logit, and this trace does not say which token was predicted at "
                         f"position {at}: name one with token=")  # fmt: skip
    with one_thread():
        apart = find_sinks(trace, model if chosen.model else None, at + 1, sinks)
        return _made(trace, model, chosen, goal, heads, apart, prediction)


def _position(trace: TraceLike, at: int) -> int:
    tokens = trace.tokens
    n = len(tokens["text"])
    if not -n <= at < n:
        raise TraceError(f"the trace has no position {at}: it has {n} tokens, at 0 to {n - 1}")
    if "pos" in tokens and tokens["pos"][0] != 0:
        raise TraceError(f"the trace begins at position {tokens['pos'][0]}, so it does not hold what earlier ones left in the "
                         "cache: record the run from its first token on")  # fmt: skip
    return at % n


def _made(trace: TraceLike, model: Any, measure: Measure, goal: Goal, heads: Heads, sinks: Sequence[Sink],
          prediction: Prediction) -> Flow:  # fmt: skip
    n_layers, n, apart, feedback = trace.config.n_layers, goal.at + 1, [sink.pos for sink in sinks], has_feedback(trace)
    sampled = np.flatnonzero(trace.tokens["sampled"][1:n]) + 1
    pool = Pool(apart, heads != "apart", MOST_EDGES)
    parts = (trace, model, measure, goal, heads, sampled, apart, pool)
    states, has_mlp, biases, extra, passing = _by_position(*parts) if feedback else _by_layer(*parts)
    if measure.aimed:
        states[n_layers, goal.at] = prediction.value or 0.0
    if measure.name == "target":
        _check_complete(float(states[0].sum()), biases, prediction)
    edges, influence = pool.close(extra, passing)
    if measure.whole and pool.total > 0:
        influence, pool.total = influence / pool.total, 1.0
    made_of = count_all(trace.config, n, apart, heads != "apart", has_mlp, len(extra), feedback)
    made = Flow(
        edges, influence, np.zeros(len(edges)), states, _tokens(trace, n), n_layers, goal.at, prediction, measure.name,
        heads, tuple(replace(sink, weight=pool.of_sinks[sink.pos]) if measure.whole else sink for sink in sinks),
        windows=tuple(map(trace.config.window_of, range(n_layers))), made=made_of, total=pool.total,
        biases=biases if measure.name == "target" else 0.0, feedback=feedback,
    )  # fmt: skip
    if getattr(trace, "topk", None) is not None:
        made = replace(made, notes=(f"only the {trace.topk} largest weights of each row were recorded",))  # type: ignore[attr-defined]
    link = weakest_link(edges, made.crossing, influence, n_layers, goal.at, feedback)
    return replace(made, link=link).counted()


Part = tuple[Array, bool, float, Array, Array]  # states, whether there are MLP edges, biases, sampled and memory edges, theirs


def _by_layer(trace: TraceLike, model: Any, measure: Measure, goal: Goal, heads: Heads, sampled: Array,
              sinks: Sequence[int], pool: Pool) -> Part:  # fmt: skip
    """A standard model's edges into the pool, one layer after another, the last first."""
    states = np.zeros((trace.config.n_layers + 1, goal.at + 1))
    states[-1] = tops = _tops(trace, model, measure, goal, heads, sampled, sinks)
    shared, has_mlp, biases = Shared(tops, sinks), False, 0.0
    for weights in measure.layers(trace, model, goal, heads):
        has_mlp = weights.mlp is not None
        biases += 0.0 if weights.bias is None else float(weights.bias.sum())
        check_finite(weights)
        influence = whole_influence(weights, sinks) if measure.whole else shared.down(weights)
        pool.add(weights, influence)
        states[weights.layer] = influence.states
    drawn, passing = (states[0, sampled], np.abs(states[0, sampled])) if measure.whole else (1.0, tops[sampled - 1])
    return states, has_mlp, biases, sampled_edges(sampled, drawn), passing


def _by_position(trace: TraceLike, model: Any, measure: Measure, goal: Goal, heads: Heads, sampled: Array,
                 sinks: Sequence[int], pool: Pool) -> Part:  # fmt: skip
    """A feedback model's edges into the pool."""
    found = memory.through(trace, model, measure, goal, heads, sampled, sinks)
    has_mlp, biases = found.layers[0][0].mlp is not None, 0.0
    for weights, influence in found.layers:
        check_finite(weights)
        biases += 0.0 if weights.bias is None else float(weights.bias.sum())
        pool.add(weights, influence)
    drawn = found.states[0, sampled] if measure.whole else np.ones(len(sampled))
    extra = np.concatenate([sampled_edges(sampled, drawn), memory_edges(found.memory, found.there)])
    passing = np.concatenate([np.abs(found.states[0, sampled]), found.passing.T[found.there.T]])
    return found.states, has_mlp, biases, extra, passing


def _check_complete(words: float, biases: float, prediction: Prediction) -> None:
    """TraceError unless what the embeddings and the biases did adds up to the logit, or difference."""
    value = prediction.value
    if value is not None and abs(words + biases - value) > 0.01 * max(1.0, abs(value)):
        raise TraceError(f"the effects of the words ({words:.4f}) and of the biases ({biases:.4f}) do not add up to the logit "
                         f"({value:.4f}), so this trace's numbers are not those of one unedited run of this model")  # fmt: skip


def _tops(trace: TraceLike, model: Any, measure: Measure, goal: Goal, heads: Heads, sampled: Array,
          sinks: Sequence[int]) -> Array:  # fmt: skip
    """What begins at each position's last state, [n]."""
    if len(sampled) and not measure.whole:
        return sampled_tops(measure.layers(trace, model, goal, heads), goal.at, sampled.tolist(), sinks)
    tops = np.zeros(goal.at + 1)
    tops[goal.at] = 1
    return tops


def _tokens(trace: TraceLike, n: int) -> Tokens:
    columns = trace.tokens
    return Tokens(**{f.name: tuple(np.asarray(columns[f.name])[:n].tolist()) for f in fields(Tokens)})
