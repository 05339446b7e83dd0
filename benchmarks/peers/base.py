"""What every peer can be asked to do, whatever program it is. Times are seconds."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np

CHUNK = 512  # the most tokens that a peer is given in one call
FIRST_STEPS = 8
TURN = 32  # tokens decoded at a time, by turns with and without a recorder


class Model(ABC):
    """A model in one program. `cache` below is whatever that program remembers a sequence in."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = np.array(tokens, np.int32)  # [S]: the text that is read
        self._kept: dict[int, Any] = {}

    @abstractmethod
    def empty(self) -> Any:
        """A new cache."""

    @abstractmethod
    def append(self, cache: Any, tokens: np.ndarray) -> int:
        """Append up to CHUNK tokens to the cache; the token of the largest logit that follows them."""

    @abstractmethod
    def keep(self, cache: Any) -> Any:
        """A copy of the cache, to be restored any number of times."""

    @abstractmethod
    def restore(self, kept: Any) -> Any:
        """A cache as it was when it was kept. The caches used before may no longer be valid."""

    @abstractmethod
    def logits(self, tokens: np.ndarray) -> np.ndarray:  # [T] -> [T, V]
        """The logits at each of up to CHUNK positions."""

    def about(self) -> str:
        """What a reader of the results wants to know of this program, in a few words."""
        return ""

    def prepare(self, contexts: list[int]) -> None:
        """Fill caches with so many positions and keep them, then decode from each once."""
        cache, length = self.empty(), 0
        for context in sorted(contexts):
            for start in range(length, context, CHUNK):
                self.append(cache, self.tokens[start : min(start + CHUNK, context)])
            length = context
            self._kept[context] = self.keep(cache)
        for context in contexts:
            self.decode(context, 1)

    def decode(self, context: int, n: int) -> list[float]:
        """Each of n greedy steps from a cache of `context` positions. One more comes first, to wake threads and caches."""
        cache, token, seconds = self.restore(self._kept[context]), int(self.tokens[context]), []
        for _ in range(n + 1):
            began = time.perf_counter()
            token = self.append(cache, np.array([token], np.int32))
            seconds.append(time.perf_counter() - began)
        return seconds[1:]

    def prefill(self, n: int) -> list[float]:
        """One call with the first n tokens, whose last logits alone are asked for."""
        cache = self.empty()
        return [timed(lambda: self.append(cache, self.tokens[:n]))]

    def first_steps(self, n: int) -> float:
        """What a fresh process does first: a prefill, then FIRST_STEPS steps, n tokens in all. The prefill's seconds."""
        cache, prompt = self.empty(), max(n - FIRST_STEPS, 1)
        seconds = timed(lambda: self.append(cache, self.tokens[:prompt]))
        for token in self.tokens[prompt:n]:
            self.append(cache, token[None])
        return seconds

    def save_logits(self, n: int, path: str) -> None:
        """The logits at the first n tokens, into a .npy file."""
        np.save(path, self.logits(self.tokens[:n]))


def timed(work: Callable[[], Any]) -> float:
    """How long it takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def by_turns(ways: dict[str, Callable[[np.ndarray], int]], tokens: np.ndarray, first: int) -> dict[str, float]:
    """The seconds that each of two ways to append takes for all tokens, given one by one, TURN of them at a time.

    first: 0 or 1, which of the two begins.
    """
    seconds = dict.fromkeys(ways, 0.0)
    for turn, start in enumerate(range(0, len(tokens), TURN)):
        for name in list(ways)[:: 1 if (turn + first) % 2 == 0 else -1]:
            began = time.perf_counter()
            for token in tokens[start : start + TURN]:
                ways[name](token[None])
            seconds[name] += time.perf_counter() - began
    return seconds
