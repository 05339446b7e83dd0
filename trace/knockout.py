"""`knockout` and `value-zero`: what the goal's logit, or the difference of two, loses without an edge, by running again.

- `knockout`: the edge's score becomes -inf, so that dst does not read src and the rest of the row shares its weight
  (attention knockout, Geva et al. 2023, arXiv 2304.14767).
- `value-zero`: what the edge brings is taken away, the other weights stay.

Both answer by doing; `target` answers value-zero's question without it, to first order. A rerun computes the positions
from the edge's dst on; those before it lie in a cache, so that cutting an edge into the last position costs one decode step.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from nanokv.cache import KVCache
from nanokv.edits import Add, Cut, Edit, Replace, ZeroValue
from nanokv.trace.parts import Array, Goal, LayerWeights, TraceLike, has_feedback
from nanokv.transformer import Observer

How = Literal["value-zero", "knockout"]
Edge = tuple[int, int, int, int]  # layer, head, dst, src; head -1: all heads
EDITS: dict[How, type[Cut] | type[ZeroValue]] = {"value-zero": ZeroValue, "knockout": Cut}
MANY = 50  # runs, from which on they are counted on a terminal


class Replay:
    """A run of given tokens that can be run again with edits, from the first position that they touch."""

    def __init__(self, model: Any, tokens: Sequence[int] | Array, observer: Observer | None = None) -> None:
        self.model, self.tokens = model, np.asarray(tokens, np.int32)
        self.cache = model.new_cache()
        self.logits = model.forward(self.tokens, self.cache, observer=observer, last_logits_only=True)[0]  # [V] of the last
        self._before: tuple[int, KVCache] = (0, model.new_cache())  # the cache of the positions before the last edit's first

    def edited(self, edits: Sequence[Edit]) -> Array:
        """The logits [V] of the last position after these edits."""
        if not edits:
            return self.logits
        first = min(map(self._begins, edits))
        if self._before[0] != first:
            self._before = first, beginning(self.cache, first)
        return self.model.forward(self.tokens[first:], self._before[1].copy(), edits=edits, last_logits_only=True)[0]

    def text(self, token: int) -> str:
        """How a token reads."""
        tokenizer = self.model.tokenizer
        return f"#{token}" if tokenizer is None else str(tokenizer.piece(token))

    def _begins(self, edit: Edit) -> int:
        """The first position to compute anew: what another one had read by then cannot change."""
        if isinstance(edit, Add):
            return edit.pos
        return 0 if isinstance(edit, Replace) else edit.dst


def beginning(cache: KVCache, n: int) -> KVCache:
    """A cache of the first n positions alone."""
    part = KVCache(cache.config, cache.dtype)
    if n:
        with part.step(n):
            for layer in range(cache.config.n_layers):
                part.write(layer, 0, cache.keys(layer)[:n], cache.values(layer)[:n])
            part.commit(cache.tokens[:n], np.zeros(0, cache.dtype))
    return part


def effects(replay: Replay, goal: Goal, edges: Iterable[Edge], how: How) -> Iterator[float]:
    """What the goal loses without each edge (layer, head, dst, src) alone; head -1: all heads. Quickest in order of dst."""
    whole = goal.value(replay.logits)
    for layer, head, dst, src in edges:
        edit = EDITS[how](layer, dst, src, None if head < 0 else head)
        yield whole - goal.value(replay.edited([edit]))


def knockout(trace: TraceLike, model: Any, goal: Goal, merged: bool) -> Iterator[LayerWeights]:
    """What the goal loses if the edge is not read: its score becomes -inf. With heads merged: in every head at once."""
    return _all(trace, model, goal, merged, "knockout")


def value_zero(trace: TraceLike, model: Any, goal: Goal, merged: bool) -> Iterator[LayerWeights]:
    """What the goal loses without what the edge brings. With heads merged: without what every head brings from there."""
    return _all(trace, model, goal, merged, "value-zero")


def _all(trace: TraceLike, model: Any, goal: Goal, merged: bool, how: How) -> Iterator[LayerWeights]:
    """A run for every edge; there are H n (n + 1) / 2 a layer. Residual edges and MLPs are not cut, and count as nothing."""
    config, n = trace.config, goal.at + 1
    replay = Replay(model, trace.tokens["token_id"][:n])
    weights = np.zeros((config.n_layers, 1 if merged else config.n_heads, n, n), np.float32)
    edges = list(_edges(config, n, merged, has_feedback(trace)))  # in order of dst
    for edge, effect in zip(edges, counted(effects(replay, goal, edges, how), len(edges)), strict=True):
        layer, head, dst, src = edge
        weights[layer, max(head, 0), dst, src] = effect
    for layer in reversed(range(config.n_layers)):
        yield LayerWeights(layer, weights[layer], np.zeros(n, np.float32))


def _edges(config: Any, n: int, merged: bool, feedback: bool) -> Iterator[Edge]:
    """(layer, head, dst, src) of every edge that may count: in the last layer nothing but what the last position reads, unless
    what the others come to there is read, too, as in a feedback model, where no position reads itself."""
    for dst in range(n):
        for layer in range(config.n_layers if feedback or dst == n - 1 else config.n_layers - 1):
            window = config.window_of(layer) or n
            for head in (-1,) if merged else range(config.n_heads):
                yield from ((layer, head, dst, src) for src in range(max(0, dst + 1 - window), dst + 1 - feedback))


def counted(runs: Iterator[float], total: int) -> Iterator[float]:
    """The same, counted on a terminal if there are many."""
    if total < MANY or not sys.stderr.isatty():
        return runs
    from tqdm import tqdm

    return iter(tqdm(runs, total=total, unit="cut", leave=False))
