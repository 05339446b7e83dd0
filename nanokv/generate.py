"""Decoding: choose a token from the last logits, append it, go on. The only way from the top of the stack to its bottom.

Everything is written out, the random generator too, so that a port in any language can draw the same tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np

from nanokv.cache import KVCache
from nanokv.errors import EmptyPromptError, NanokvError, TokenError
from nanokv.transformer import Transformer, checked_tokens


class PCG32:
    """The generator PCG-XSH-RR 64/32 (O'Neill 2014), as in its reference code: pcg32_srandom(seed, stream)."""

    def __init__(self, seed: int, stream: int = 0) -> None:
        self._increment = (2 * stream + 1) % 2**64
        self._state = 0
        self.next()
        self._state = (self._state + seed) % 2**64
        self.next()

    def next(self) -> int:
        """The next 32 random bits."""
        state = self._state
        self._state = (state * 6364136223846793005 + self._increment) % 2**64
        word, turn = ((state >> 18) ^ state) >> 27 & 0xFFFFFFFF, state >> 59
        return (word >> turn | word << (32 - turn) % 32) & 0xFFFFFFFF

    def uniform(self) -> float:
        """The next number in [0, 1): 32 random bits over 2^32."""
        return self.next() / 2**32


def greedy(logits: np.ndarray) -> int:
    """The token of the largest logit [V]; of equal ones, the lowest id."""
    return int(np.argmax(logits))


def sample(
    logits: np.ndarray, random: PCG32, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> int:
    """Draw a token from softmax(logits / temperature), [V], cut to the top_k and then to the top_p likeliest.

    Tokens stand in order of falling logit, equal ones by rising id; all in float64. top_k keeps the first k. top_p keeps
    the fewest first tokens whose probabilities, which sum to 1 over those that top_k kept, reach p (Holtzman et al. 2020).
    One number u of the generator picks the first token whose cumulative probability exceeds u times the kept sum.
    """
    order = np.argsort(-logits, kind="stable")[:top_k]
    scaled = (logits[order].astype(np.float64) - np.float64(logits[order[0]])) / temperature
    cumulative = np.cumsum(np.exp(scaled))
    if top_p is not None:
        kept = int(np.searchsorted(cumulative, top_p * cumulative[-1], side="left")) + 1
        cumulative = cumulative[:kept]
    choice = np.searchsorted(cumulative, random.uniform() * cumulative[-1], side="right")
    return int(order[min(int(choice), len(cumulative) - 1)])


def generate(
    model: Transformer,
    tokens: Sequence[int] | np.ndarray | None = None,
    *,
    cache: KVCache | None = None,
    max_new_tokens: int = 50,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: Collection[int] | None = None,
    observer: Any = None,
) -> Iterator[int]:
    """Yield new token ids, each after it was appended to the cache, until max_new_tokens or a stop id (not yielded).

    Starts from what the cache holds; `tokens`, if given, must begin with the cache's ids, and what is new of them is
    processed first. temperature 0 is greedy. stop: ids that end the text (None: those that the tokenizer names). An
    observer that has `turn` is told when the model's own turn begins. Bad arguments raise at once, not at the first token.
    """
    _check_sampling(max_new_tokens, temperature, top_k, top_p, seed)
    cache = model.new_cache() if cache is None else cache
    new = _new_tokens(model, tokens, cache)
    if stop is None:
        stop = () if model.tokenizer is None else model.tokenizer.stop_ids
    random = PCG32(seed)

    def choose(logits: np.ndarray) -> int:
        if temperature == 0:
            return greedy(logits)
        return sample(logits, random, temperature=temperature, top_k=top_k, top_p=top_p)

    def tokens_of_the_model() -> Iterator[int]:
        if len(new):
            model.forward(new, cache, observer=observer, last_logits_only=True)
        if hasattr(observer, "turn"):
            observer.turn("model", sampled=True)
        for _ in range(max_new_tokens):
            token = choose(_known(cache.last_logits))
            if token in stop:
                return
            model.forward([token], cache, observer=observer)
            yield token

    return tokens_of_the_model()


def _new_tokens(model: Transformer, tokens: Sequence[int] | np.ndarray | None, cache: KVCache) -> np.ndarray:
    if tokens is None or len(tokens) == 0:
        if cache.last_logits is None:
            raise EmptyPromptError("there is nothing to go on from: give tokens, or a cache that holds some")
        return np.zeros(0, np.int32)
    ids = checked_tokens(tokens, model.config.vocab_size)
    if not np.array_equal(ids[: cache.length], cache.tokens):
        raise TokenError(f"the cache holds {cache.length} tokens, and those given do not begin with them: give the whole "
                         "text so far, or no tokens to go on from the cache, or a new cache")  # fmt: skip
    return ids[cache.length :]


def _known(logits: np.ndarray | None) -> np.ndarray:
    if logits is None:
        raise EmptyPromptError("the cache holds no logits to choose a token from: process a token first")
    return logits


def _check_sampling(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None, seed: int) -> None:
    wrong = (
        (max_new_tokens < 0, f"max_new_tokens is {max_new_tokens}; it must be 0 or more"),
        (not 0 <= temperature < float("inf"), f"temperature is {temperature}; it must be 0 (greedy) or a positive number"),
        (top_k is not None and top_k < 1, f"top_k is {top_k}; it must be 1 or more"),
        (top_p is not None and not 0 < top_p <= 1, f"top_p is {top_p}; it must be above 0 and at most 1"),
        (not 0 <= seed < 2**64, f"seed is {seed}; it must be a whole number from 0 to 2^64 - 1"),
    )
    for is_wrong, message in wrong:
        if is_wrong:
            raise NanokvError(message)
