"""Traces of given numbers, for tests of flows and their pictures."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from nanokv.config import Config
from nanokv.trace.flow import Flow
from nanokv.trace.making import flow


class Given:
    """What a flow asks of a trace. Patterns [L, H, n, n]; values [L, n, G, hd]; states by site, [L, n, D]; logits [V]."""

    def __init__(self, patterns: Any, texts: Sequence[str] = (), *, sampled: Sequence[int] = (), level: str = "weights",
                 values: Any = None, states: dict[str, Any] | None = None, logits: Any = None) -> None:  # fmt: skip
        self._patterns = np.asarray(patterns, np.float32)
        n_layers, n_heads, n, _ = self._patterns.shape
        kv_heads, head_dim = (n_heads, 2) if values is None else np.shape(values)[2:]
        self.config = Config(n_layers, n_heads, kv_heads, head_dim, 4, 4, 50, 2000)
        self.level, self._values, self._states, self._logits = level, values, states or {}, logits
        column = np.empty(n, object)
        column[:] = list(texts) or [f" t{pos}" for pos in range(n)]
        drawn = np.isin(np.arange(n), sampled)
        role = np.empty(n, object)
        role[:] = ["model" if is_drawn else "user" for is_drawn in drawn]
        self.tokens = {
            "token_id": np.arange(n) % 50,
            "text": column,
            "turn": drawn.astype(np.int32),
            "role": role,
            "sampled": drawn,
        }

    def pattern(self, layer: int) -> np.ndarray:
        return self._patterns[layer]

    def values(self, layer: int) -> np.ndarray:
        return np.asarray(self._values[layer], np.float32)

    def state(self, site: str, layer: int) -> np.ndarray:
        return np.asarray(self._states[site][layer], np.float32)

    def logits(self, pos: int) -> np.ndarray | None:
        return None if self._logits is None else np.asarray(self._logits, np.float32)


def random_patterns(seed: int, n_layers: int, n_heads: int, n: int, sharpness: float = 2.0) -> np.ndarray:
    """Attention as a softmax of normal scores: [L, H, n, n], rows that sum to 1, nothing above the diagonal."""
    scores = sharpness * np.random.default_rng(seed).standard_normal((n_layers, n_heads, n, n))
    weights = np.tril(np.exp(scores))
    return weights / weights.sum(axis=-1, keepdims=True)


def random_flow(seed: int = 0, n_layers: int = 2, n_heads: int = 2, n: int = 5, *, texts: Sequence[str] = (),
                sampled: Sequence[int] = (), **options: Any) -> Flow:  # fmt: skip
    """A flow by attention on random patterns, with logits that predict token 7."""
    trace = Given(random_patterns(seed, n_layers, n_heads, n), texts, sampled=sampled, level="states", logits=np.eye(50)[7])
    return flow(trace, measure="attention", **options)


def weights_of(wo: Any, **extra: Any) -> SimpleNamespace:
    """Blocks that hold an output matrix, [L, D, H*hd], and nothing else that counts."""
    blocks = [SimpleNamespace(wo=np.asarray(matrix, np.float32), bo=None, post_attn_norm=None, **extra) for matrix in wo]
    return SimpleNamespace(blocks=blocks)
