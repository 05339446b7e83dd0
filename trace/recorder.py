"""Recorder: the observer that writes down what a forward pass did to the cache, and what it made of it.

During a call it only keeps references to the arrays that it is handed; at the call's end it makes one step of them and
hands that to its trace. A call that raises leaves no step.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from nanokv.cache import KVCache, Slots
from nanokv.errors import TraceError
from nanokv.trace.schema import LEVELS, ROLES, SITES, holds
from nanokv.trace.store import Trace, TraceWriter

if TYPE_CHECKING:
    from nanokv.transformer import Transformer

Array = np.ndarray
NEEDED = {"pattern": "weights", "scores": "vectors", "final_scale": "states"}  # the level from which a site is wanted


class Recorder:
    """Records forward calls, into a folder or (path None) in memory. Use it in a `with` block, or call close().

    level: what is kept, one of `schema.LEVELS`, each with all before it. After the block, and also within, `trace` is what
    was recorded so far.
    """

    def __init__(self, path: str | Path | None = None, level: str = "weights") -> None:
        if level not in LEVELS:
            raise TraceError(f"the level is {level!r}; it must be one of {', '.join(LEVELS)}")
        self.level = level
        self._writer = TraceWriter(path, level)
        self._model: Transformer | None = None
        self._turn, self._role, self._sampled, self._chunk = -1, 0, False, 0
        self._step: dict[str, list[Any]] = {}
        self.turn("user")

    @property
    def trace(self) -> Trace:
        """What was recorded so far."""
        return self._writer.trace()

    def turn(self, role: str, sampled: bool = False) -> None:
        """Whose tokens come next. sampled: that they are chosen from the predictions, each from the one before it."""
        if role not in ROLES:
            raise TraceError(f"the role is {role!r}; it must be one of {', '.join(ROLES)}")
        if self._turn < 0 or self._chunk > 0:  # a turn without a token is none
            self._turn += 1
        self._role, self._sampled, self._chunk = ROLES.index(role), sampled, 0

    def attach(self, model: Transformer, cache: KVCache) -> None:
        """Called by the model before a call: whose call it is."""
        if self._model is not None and self._model is not model:
            raise TraceError("this recorder has recorded another model: use one recorder for each model")
        if self._model is None:
            self._writer.open(model)
            self._model = model

    def begin(self, step: int, tokens: Array, start: int) -> None:
        n = len(tokens)
        texts = [self._text(token).encode("utf-8", "backslashreplace") for token in tokens.tolist()]
        self._step = {
            "token_id": [tokens],
            "text": [np.frombuffer(b"".join(texts), np.uint8)],
            "text_end": [np.cumsum([len(text) for text in texts], dtype=np.int32)],
            "turn": [np.full(n, self._turn, np.int32)],
            "role": [np.full(n, self._role, np.uint8)],
            "chunk": [np.full(n, self._chunk, np.int32)],
            "sampled": [np.full(n, self._sampled, np.uint8)],
        }
        self._started = (step, start)

    def wants(self, site: str) -> bool:
        return holds(self.level, NEEDED.get(site, "states"))

    def write(self, layer: int, start: int, k: Array, v: Array) -> None:
        self._keep("write_slot", np.array([start], np.int32))
        self._keep("k", k)
        self._keep("v", v)

    def read(self, layer: int, start: int, slots: Slots, scores: Array | None, weights: Array | None) -> None:
        self._keep("read_layer", np.array([slots.layer], np.int32))
        self._keep("read_kv_head", slots.kv_head)
        self._keep("read_first", slots.first)
        self._keep("read_stop", slots.stop)
        if weights is not None:
            self._keep("weight", weights)
        if scores is not None:
            self._keep("score", scores)

    def state(self, site: str, layer: int, start: int, x: Array) -> None:
        if self.level == "states" and (site in SITES or site == "final_scale"):
            self._keep(site, x)

    def end(self, logits: Array) -> None:
        if self.level == "states":
            self._keep("logits", logits)
        keys, values = np.stack(self._step.pop("k")), np.stack(self._step.pop("v"))  # [L, T, G, hd]
        self._step["k_hash"], self._step["v_hash"] = ([hash_words(x)] for x in (keys, values))
        self._step["k_norm"], self._step["v_norm"] = ([np.sqrt(np.sum(x * x, axis=-1))] for x in (keys, values))
        if holds(self.level, "vectors"):
            self._step["k"], self._step["v"] = [keys], [values]
        self._writer.add(*self._started, self._step)
        self._chunk += 1
        self._step = {}

    def abort(self) -> None:
        self._step = {}

    def close(self) -> None:
        """End the trace: what was recorded is on the disk."""
        self._writer.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self.close()

    def _keep(self, name: str, array: Array) -> None:
        self._step.setdefault(name, []).append(array)

    def _text(self, token: int) -> str:
        tokenizer = self._model.tokenizer if self._model is not None else None
        return str(token) if tokenizer is None else tokenizer.piece(token)


def hash_words(x: Array) -> Array:  # [..., hd] -> [...]
    """FNV-1a-64 of each row, over its 32-bit words: h = (h xor word) * prime, from the offset basis on."""
    words = np.ascontiguousarray(x).view(np.uint32).astype(np.uint64)
    hashes = np.full(x.shape[:-1], 0xCBF29CE484222325, np.uint64)
    with np.errstate(over="ignore"):  # the product is taken modulo 2^64
        for i in range(x.shape[-1]):
            hashes = (hashes ^ words[..., i]) * np.uint64(0x100000001B3)
    return hashes
