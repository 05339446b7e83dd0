"""The key/value cache: what every position left behind for the positions after it, and nothing else passes between them.

An entry is written once and never changes. A call appends: it writes its T new slots layer by layer, reads what its mask
allows, and commits; a call that raises leaves the cache as it was. Slot s holds position s.

How it lies in memory is this page's business (and that of `kernels.attention`, which reads it in place):

    key   of slot s, key/value head g, feature i:  key_blocks[layer][g, s // BLOCK, i, s % BLOCK]
    value of slot s, key/value head g, feature i:  value_strips[layer][g, i // BLOCK, s, i % BLOCK]

A block of BLOCK keys lies feature by feature, so that one vector instruction scores neighbouring slots; a strip of BLOCK
features of the values lies slot by slot, so that one instruction adds neighbouring features. Example: of slot 70, feature
35, the key is [g, 2, 35, 6] and the value is [g, 1, 70, 3].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nanokv import safetensors_file
from nanokv.config import Config
from nanokv.errors import CacheError, ContextFullError, FileFormatError, UnwrittenSlotError

if TYPE_CHECKING:
    from nanokv.edits import Replace
    from nanokv.transformer import Transformer

BLOCK = 32  # slots in a block of keys, features in a strip of values: whole vectors on every machine


@dataclass(frozen=True)
class Ranges:
    """Of T positions, the slots that each reads: position t of them those from first[t] to stop[t] - 1."""

    first: np.ndarray  # int32 [T]
    stop: np.ndarray  # int32 [T]

    @cached_property
    def ends(self) -> np.ndarray:
        """int64 [T + 1]: how many pairs of a position and a slot there are before each position, and R, how many in all."""
        return np.cumsum(np.r_[0, self.stop - self.first], dtype=np.int64)


@dataclass(frozen=True)
class Slots:
    """What one attention call asks the cache for: the T positions from `start` on read ranges of slots of a layer."""

    layer: int
    start: int
    kv_head: np.ndarray  # int32 [H]: the key/value head that each query head reads
    ranges: Ranges  # the same object in all layers that read alike

    @property
    def first(self) -> np.ndarray:
        """int32 [T]: the first slot that each position reads."""
        return self.ranges.first

    @property
    def stop(self) -> np.ndarray:
        """int32 [T]: the slot after the last."""
        return self.ranges.stop

    @property
    def count(self) -> int:
        """R: how many pairs of a position and a slot that it reads."""
        return int(self.ranges.ends[-1])

    def mask(self) -> np.ndarray:
        """bool [T, S]: which slots each of the T positions reads."""
        slot = np.arange(self.stop.max())
        return (self.first[:, None] <= slot) & (slot < self.stop[:, None])


class KVCache:
    """Keys and values of one sequence, with its token ids and its last logits, so that generation can go on from it."""

    def __init__(self, config: Config, dtype: np.dtype | type = np.float32) -> None:
        self.config = config
        self.dtype = np.dtype(dtype)
        self.tokens = np.zeros(0, np.int32)  # int32 [S]
        self.last_logits: np.ndarray | None = None  # float32 [V]: what the last position predicts
        self.wrote = np.zeros(0, np.int32)  # [S]: the call that wrote each slot, from 0
        self.steps = 0  # calls so far
        self._written = [0] * config.n_layers  # slots written so far; ahead of length inside a call
        strips = -(-config.head_dim // BLOCK)
        self._ranges: dict[tuple[int, int, int | None], Ranges] = {}
        self.key_blocks = np.zeros((config.n_layers, config.n_kv_heads, 0, config.head_dim, BLOCK), dtype)
        self.value_strips = np.zeros((config.n_layers, config.n_kv_heads, strips, 0, BLOCK), dtype)

    @property
    def length(self) -> int:
        """S: the positions in the cache."""
        return len(self.tokens)

    def keys(self, layer: int) -> np.ndarray:
        """[S, G, hd], read-only: the keys of a layer, after RoPE."""
        blocks, s = self.key_blocks[layer], self._written[layer]
        keys = blocks[:, : -(-s // BLOCK)].transpose(1, 3, 0, 2)
        return _read_only(keys.reshape(-1, *keys.shape[2:])[:s])

    def values(self, layer: int) -> np.ndarray:
        """[S, G, hd], read-only: the values of a layer."""
        strips = self.value_strips[layer, :, :, : self._written[layer]].transpose(2, 0, 1, 3)
        features = strips.shape[2] * BLOCK
        return _read_only(strips.reshape(*strips.shape[:2], features)[..., : self.config.head_dim])

    @contextmanager
    def step(self, n_new: int) -> Iterator[int]:
        """One call: makes room for n_new positions and gives the first of them; without a commit all is undone."""
        start = self.length
        if start + n_new > self.config.n_ctx:
            raise ContextFullError(f"{start} positions are in the cache and {n_new} more were given, but the model's context "
                                   f"has {self.config.n_ctx}: give fewer tokens, or begin a new cache")  # fmt: skip
        self._reserve(start + n_new)
        self._ranges.clear()
        try:
            yield start
        finally:
            self._written = [self.length] * self.config.n_layers

    def write(self, layer: int, start: int, k: np.ndarray, v: np.ndarray) -> None:
        """Append k and v [T, G, hd] as slots start to start + T - 1 of a layer: the next ones, each once."""
        n = len(k)
        if start != self._written[layer]:
            raise CacheError(f"layer {layer}: slot {start} was given to write, but {self._written[layer]} is the next; "
                             "an entry is written once, in order, and never again")  # fmt: skip
        if start + n > self.value_strips.shape[3]:
            raise ContextFullError(f"layer {layer}: slots up to {start + n - 1} were given to write, past the end of the cache")
        if n == 1:
            self.key_blocks[layer, :, start // BLOCK, :, start % BLOCK] = k[0]
        else:
            self._write_keys(layer, start, k)
        self._write_values(layer, start, v)
        self._written[layer] = start + n

    def _write_values(self, layer: int, start: int, v: np.ndarray) -> None:
        for strip in range(self.value_strips.shape[2]):
            part = v[:, :, strip * BLOCK : (strip + 1) * BLOCK].transpose(1, 0, 2)  # [G, slots, features]
            self.value_strips[layer, :, strip, start : start + len(v), : part.shape[2]] = part

    def _write_keys(self, layer: int, start: int, k: np.ndarray) -> None:
        end = start + len(k)
        for block in range(start // BLOCK, -(-end // BLOCK)):
            low, high = max(start, block * BLOCK), min(end, (block + 1) * BLOCK)
            part = k[low - start : high - start].transpose(1, 2, 0)  # [G, hd, slots]
            self.key_blocks[layer, :, block, :, low - block * BLOCK : high - block * BLOCK] = part

    def read(self, layer: int, start: int, n: int, kv_head: np.ndarray, window: int | None = None) -> Slots:
        """The slots that positions start to start + n - 1 read: all up to their own, or the last `window` of these."""
        if start + n > self._written[layer]:
            raise UnwrittenSlotError(f"layer {layer}: slot {start + n - 1} was to be read, but only {self._written[layer]} "
                                     "slots are written: write a call's keys and values before reading them")  # fmt: skip
        if (start, n, window) not in self._ranges:  # the same for every layer of a call
            stop = np.arange(start + 1, start + n + 1, dtype=np.int32)
            first = np.zeros_like(stop) if window is None else np.maximum(stop - window, 0)
            self._ranges[start, n, window] = Ranges(first, stop)
        return Slots(layer, start, kv_head, self._ranges[start, n, window])

    @contextmanager
    def holding(self, layer: int, entries: Sequence[Replace]) -> Iterator[None]:
        """Let slots of a layer hold other keys or values for a while: an intervention. What they held comes back."""
        blocks, strips = self.key_blocks[layer], self.value_strips[layer]
        before = [(e.pos, blocks[:, e.pos // BLOCK, :, e.pos % BLOCK].copy(), strips[:, :, e.pos].copy()) for e in entries]
        try:
            for entry in entries:
                if entry.k is not None:
                    blocks[:, entry.pos // BLOCK, :, entry.pos % BLOCK] = entry.k
                if entry.v is not None:
                    self._write_values(layer, entry.pos, entry.v[None])
            yield
        finally:
            for pos, key, value in reversed(before):
                blocks[:, pos // BLOCK, :, pos % BLOCK], strips[:, :, pos] = key, value

    def commit(self, tokens: np.ndarray, last_logits: np.ndarray) -> None:
        """End a call well: its positions stay."""
        expected = self.length + len(tokens)
        if any(written != expected for written in self._written):
            raise CacheError(f"a call of {len(tokens)} tokens must write slots up to {expected - 1} in every layer")
        self.tokens = np.concatenate([self.tokens, tokens])
        self.wrote = np.concatenate([self.wrote, np.full(len(tokens), self.steps, np.int32)])
        self.last_logits = last_logits.copy()
        self.steps += 1

    def copy(self) -> KVCache:
        """An independent cache with the same contents."""
        other = KVCache(self.config, self.dtype)
        other.tokens, other.steps, other._written = self.tokens.copy(), self.steps, list(self._written)
        other.wrote, other.last_logits = self.wrote.copy(), None if self.last_logits is None else self.last_logits.copy()
        other.key_blocks, other.value_strips = self.key_blocks.copy(), self.value_strips.copy()
        return other

    def save(self, path: str | Path, model: Transformer) -> None:
        """Write the cache to one safetensors file, which names the model by its hash; whole or not at all."""
        arrays = {"tokens": self.tokens, "wrote": self.wrote}
        if self.last_logits is not None:
            arrays["last_logits"] = self.last_logits
        for layer in range(self.config.n_layers):
            arrays[f"keys.{layer}"] = np.ascontiguousarray(self.keys(layer))
            arrays[f"values.{layer}"] = np.ascontiguousarray(self.values(layer))
        safetensors_file.save(path, arrays, {"format": _FORMAT, "model": model.fingerprint, "steps": str(self.steps)})

    @staticmethod
    def load(path: str | Path, model: Transformer) -> KVCache:
        """Read a saved cache back. CacheError if another model made it, FileFormatError if it is no such file."""
        arrays, metadata = safetensors_file.load(path, _FORMAT)
        if metadata.get("model") != model.fingerprint:
            raise CacheError(f"{path} holds the cache of another model (its hash begins {metadata.get('model', '')[:12]}, "
                             f"this model's {model.fingerprint[:12]}): load the model that made it")  # fmt: skip
        cache = model.new_cache()
        _check_saved(path, arrays, metadata, cache)
        with cache.step(len(arrays["tokens"])):
            for layer in range(cache.config.n_layers):
                cache.write(layer, 0, arrays[f"keys.{layer}"], arrays[f"values.{layer}"])
            cache.commit(arrays["tokens"], arrays.get("last_logits", np.zeros(0, cache.dtype)))
        cache.last_logits, cache.wrote, cache.steps = arrays.get("last_logits"), arrays["wrote"], int(metadata["steps"])
        return cache

    def __repr__(self) -> str:
        c = self.config
        return (f"<KVCache: {self.length} of {c.n_ctx} positions, written in {self.steps} calls; for each, keys and values "
                f"[L, G, hd] = [{c.n_layers}, {c.n_kv_heads}, {c.head_dim}] in {self.dtype}>")  # fmt: skip

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        """What a notebook shows: what was written where, by which call."""
        from nanokv.trace import notebook

        return notebook.of_cache(self)

    def _reserve(self, n: int) -> None:
        """Room for n slots: doubled when it runs out, so that growing costs each slot one copy on average."""
        have = self.key_blocks.shape[2]
        need = -(-n // BLOCK)
        if need <= have:
            return
        blocks = max(need, 2 * have, 4)
        layers, g, _, hd, _ = self.key_blocks.shape
        old_keys, old_values = self.key_blocks, self.value_strips
        self.key_blocks = np.empty((layers, g, blocks, hd, BLOCK), self.dtype)  # a slot is written before it is read
        self.key_blocks[:, :, :have] = old_keys
        self.value_strips = np.empty((layers, g, old_values.shape[2], blocks * BLOCK, BLOCK), self.dtype)
        self.value_strips[:, :, :, : have * BLOCK] = old_values


_FORMAT = "nanokv cache 1"


def _check_saved(path: str | Path, arrays: dict[str, np.ndarray], metadata: dict[str, str], cache: KVCache) -> None:
    """FileFormatError unless a file has what `save` writes of a cache like this one."""
    c, n = cache.config, len(arrays.get("tokens", ()))
    expected: dict[str, tuple[tuple[int, ...], str]] = {"tokens": ((n,), "int32"), "wrote": ((n,), "int32")}
    if "last_logits" in arrays:
        expected["last_logits"] = ((c.vocab_size,), str(cache.dtype))
    for layer in range(c.n_layers):
        expected |= {f"{kind}.{layer}": ((n, c.n_kv_heads, c.head_dim), str(cache.dtype)) for kind in ("keys", "values")}
    found = {name: (array.shape, str(array.dtype)) for name, array in arrays.items()}
    for name in expected | found:
        if found.get(name) != expected.get(name):
            raise FileFormatError(f"{path}: {name} is {found.get(name, 'missing')}; expected {expected.get(name, 'none')}: the "
                                  "file is damaged. Save the cache again")  # fmt: skip
    if not metadata.get("steps", "").isdecimal() or ((arrays["tokens"] < 0) | (arrays["tokens"] >= c.vocab_size)).any():
        raise FileFormatError(f"{path}: its number of calls or a token is out of range: the file is damaged")


def _read_only(x: np.ndarray) -> np.ndarray:
    x.flags.writeable = False
    return x
