"""The forward pass: one path for a prefill, an appended chunk, and a single token, for every family of models.

    x = embed(tokens)                          each position by itself
    for each layer:
        x = x + attention(norm(x))             positions meet here, and only here, through the cache
        x = x + mlp(norm(x))                   each position by itself
    logits = head(norm(x))                     each position by itself

So the state of position p in layer l can use what other positions had come to at the entrance of layer l, and no more: the
only way from the top of the stack back to the bottom is the sampled token (Vaswani et al. 2017; the thread's "pyramid").
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from nanokv.cache import KVCache, Slots
from nanokv.config import Config, Rope
from nanokv.edits import Edit, Edits, added, sorted_edits
from nanokv.errors import ConfigError, EmptyPromptError, TokenError
from nanokv.gguf_file import FileTensor
from nanokv.weights import BlockWeights, Weights, check

if TYPE_CHECKING:
    from nanokv.tokenizer import Tokenizer, WordTokenizer

Array = np.ndarray


class Observer(Protocol):
    """What a forward pass reports to. Arrays are handed over, not copied: neither side changes them afterwards."""

    def begin(self, step: int, tokens: Array, start: int) -> None: ...

    def wants(self, site: str) -> bool: ...

    def write(self, layer: int, start: int, k: Array, v: Array) -> None: ...

    def read(self, layer: int, start: int, slots: Slots, scores: Array | None, weights: Array | None) -> None: ...

    def state(self, site: str, layer: int, start: int, x: Array) -> None: ...

    def end(self, logits: Array) -> None: ...

    def abort(self) -> None: ...


class Unobserved:
    """The observer of a pass that nobody watches."""

    def begin(self, step: int, tokens: Array, start: int) -> None: ...

    def wants(self, site: str) -> bool:
        return False

    def write(self, layer: int, start: int, k: Array, v: Array) -> None: ...

    def read(self, layer: int, start: int, slots: Slots, scores: Array | None, weights: Array | None) -> None: ...

    def state(self, site: str, layer: int, start: int, x: Array) -> None: ...

    def end(self, logits: Array) -> None: ...

    def abort(self) -> None: ...


@dataclass(frozen=True)
class Call:
    """What every layer of one forward call shares."""

    cache: KVCache
    start: int  # the first of the T new positions
    rotations: dict[Rope, tuple[Array, Array]]  # cos and sin, [T, hd/2] each, of every Rope that the model uses
    edits: Edits
    observer: Observer

    def state(self, site: str, layer: int, x: Array) -> Array:
        """Report a state of the T positions, after what an edit adds to it."""
        adds = self.edits.states.get((site, layer))
        if adds is not None:
            x = added(x, adds, self.start)
        self.observer.state(site, layer, self.start, x)
        return x


class Transformer:
    """A model: its config, its weights, its tokenizer, and the module that computes (`ops` or `kernels`)."""

    def __init__(
        self,
        config: Config,
        weights: Weights,
        *,
        tokenizer: Tokenizer | WordTokenizer | None = None,
        ops: str = "numba",
        packed: bool = False,
        name: str = "",
    ) -> None:
        check(weights, config)
        self.config = config
        self.tokenizer = tokenizer
        self.name = name
        self.ops: Any = _ops_module(ops)
        self.weights: Weights = self.ops.prepare(weights, packed)
        self._stored = {name: array for name, array in weights.items() if isinstance(array, FileTensor)}
        self.dtype: np.dtype = np.asarray(self.ops.embed(np.zeros(1, np.int32), self.weights.embed)).dtype
        self.kv_head = np.arange(config.n_heads, dtype=np.int32) // (config.n_heads // config.n_kv_heads)

    def new_cache(self) -> KVCache:
        """An empty cache for this model."""
        return KVCache(self.config, self.dtype)

    def forward(
        self,
        tokens: Sequence[int] | Array,
        cache: KVCache | None = None,
        *,
        observer: Observer | None = None,
        edits: Sequence[Edit] = (),
        last_logits_only: bool = False,
    ) -> Array:
        """Append tokens to the cache and return the logits of each, [T, V], or of the last alone, [1, V].

        Raises TokenError for an id outside the vocabulary, EmptyPromptError for no token, ContextFullError past n_ctx,
        EditError for an edit that cannot be made. After any error the cache is as it was.
        """
        config, ops, weights = self.config, self.ops, self.weights
        tokens = checked_tokens(tokens, config.vocab_size)  # [T]
        cache = self.new_cache() if cache is None else cache
        observer = Unobserved() if observer is None else observer
        with cache.step(len(tokens)) as start:
            sorted_ = sorted_edits(edits, config, start, len(tokens))
            call = Call(cache, start, self._rotations(start, len(tokens)), sorted_, observer)
            if hasattr(observer, "attach"):
                observer.attach(self, cache)
            observer.begin(cache.steps, tokens, start)
            if edits and hasattr(observer, "edited"):
                observer.edited(edits)
            try:
                x = self._blocks(self._embedded(tokens, start), call)  # [T, D]
                if last_logits_only:
                    x = x[-1:]  # [1, D]
                if observer.wants("final_scale"):
                    observer.state("final_scale", config.n_layers, start + len(tokens) - len(x), self._scale(x))
                h = self.norm(x, weights.final_norm, weights.final_norm_bias)  # [T, D]
                logits = ops.linear(h, weights.head)  # [T, V]
                observer.end(logits)  # first: if it cannot be recorded, it shall not have happened
                cache.commit(tokens, logits[-1])
            except BaseException:
                observer.abort()
                raise
        return logits

    def norm(self, x: Array, w: Array | None, b: Array | None) -> Array:
        """The config's norm of each row, with its weights."""
        if self.config.norm == "none":
            return x
        if self.config.norm == "rms":
            return self.ops.rms_norm(x, w, self.config.norm_eps)
        return self.ops.layer_norm(x, w, b, self.config.norm_eps)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the config and of every weight in the form that its file gives it: the same, whatever computes."""
        digest = hashlib.sha256(repr(sorted(asdict(self.config).items())).encode())
        for name, array in self.weights.items():
            stored = self._stored.get(name)
            data = np.ascontiguousarray(array, np.float32) if stored is None else stored.raw
            digest.update(f"{name} {'F32' if stored is None else stored.kind}".encode())
            digest.update(data.reshape(-1).view(np.uint8).data)
        return digest.hexdigest()

    def _embedded(self, tokens: Array, start: int) -> Array:
        x = self.ops.embed(tokens, self.weights.embed)  # [T, D]
        if self.config.embed_scale != 1:
            x = x * self.dtype.type(self.config.embed_scale)  # [T, D]
        if self.weights.pos_embed is not None:
            x = self.ops.add(x, self.weights.pos_embed[start : start + len(tokens)])  # [T, D]
        return x

    def _blocks(self, x: Array, call: Call) -> Array:
        for layer, block in enumerate(self.weights.blocks):
            x = attention_sublayer(self, block, layer, x, call)  # [T, D]
            x = mlp_sublayer(self, block, layer, x, call)  # [T, D]
        return x

    def _rotations(self, start: int, n: int) -> dict[Rope, tuple[Array, Array]]:
        ropes = {rope for rope in map(self.config.rope_of, range(self.config.n_layers)) if rope is not None}
        return {rope: self.ops.rope_table(rope, self.config.head_dim, start, n, self.dtype) for rope in ropes}

    def _scale(self, x: Array) -> Array:
        if self.config.norm == "none":
            return np.ones(len(x), x.dtype)
        scale = self.ops.layer_scale if self.config.norm == "layer" else self.ops.rms_scale
        return scale(x, self.config.norm_eps)


def attention_sublayer(model: Transformer, w: BlockWeights, layer: int, x: Array, call: Call) -> Array:
    """x + attention(norm(x)): each position writes its key and value to the cache, then reads those that its mask allows."""
    config, ops, cache, observer = model.config, model.ops, call.cache, call.observer
    x = call.state("resid_pre", layer, x)  # [T, D]
    h = model.norm(x, w.attn_norm, w.attn_norm_bias)  # [T, D]
    q, k, v = ops.linears(h, (w.wq, w.wk, w.wv), (w.bq, w.bk, w.bv))  # [T, H*hd], [T, G*hd], [T, G*hd]
    q = q.reshape(-1, config.n_heads, config.head_dim)  # [T, H, hd]
    k = k.reshape(-1, config.n_kv_heads, config.head_dim)  # [T, G, hd]
    v = v.reshape(-1, config.n_kv_heads, config.head_dim)  # [T, G, hd]
    if config.qk_norm:
        q = ops.rms_norm(q, w.q_norm, config.norm_eps)  # [T, H, hd]
        k = ops.rms_norm(k, w.k_norm, config.norm_eps)  # [T, G, hd]
    rope = config.rope_of(layer)
    if rope is not None:
        q = ops.rope(q, *call.rotations[rope], config.rope_pairs)  # [T, H, hd]
        k = ops.rope(k, *call.rotations[rope], config.rope_pairs)  # [T, G, hd]
    observer.state("q", layer, call.start, q)
    cache.write(layer, call.start, k, v)
    observer.write(layer, call.start, k, v)

    slots = cache.read(layer, call.start, len(x), model.kv_head, config.window_of(layer))
    return attend(model, w, x, q, slots, call)


_AS_IT_IS = nullcontext()


def attend(model: Transformer, w: BlockWeights, x: Array, q: Array, slots: Slots, call: Call) -> Array:
    """x + what the heads find in these slots of the cache; nothing if there are none."""
    config, ops, cache, observer, layer = model.config, model.ops, call.cache, call.observer, slots.layer
    weights, scores = (
        np.empty((config.n_heads, slots.count), x.dtype) if observer.wants(site) else None for site in ("pattern", "scores")
    )
    entries = call.edits.entries.get(layer)
    with cache.holding(layer, entries) if entries else _AS_IT_IS:
        z = ops.attention(q, cache, slots, config.attn_scale, call.edits.edges.get(layer), weights, scores)  # [T, H, hd]
    observer.read(layer, call.start, slots, scores, weights)
    observer.state("z", layer, call.start, z)

    attn_out = ops.linear(z.reshape(len(x), -1), w.wo, w.bo)  # [T, D]
    if config.post_norms:
        attn_out = model.norm(attn_out, w.post_attn_norm, None)  # [T, D]
    attn_out = call.state("attn_out", layer, attn_out)  # [T, D]
    return ops.add(x, attn_out)


def mlp_sublayer(model: Transformer, w: BlockWeights, layer: int, x: Array, call: Call) -> Array:
    """x + mlp(norm(x)): each position by itself."""
    config, ops = model.config, model.ops
    x = call.state("resid_mid", layer, x)  # [T, D]
    h = model.norm(x, w.mlp_norm, w.mlp_norm_bias)  # [T, D]
    if config.gated_mlp:
        gate, up = ops.linears(h, (w.w_gate, w.w_up), (w.b_gate, w.b_up))  # [T, F], [T, F]
        a = ops.activate(up, config.activation, gate)  # [T, F]
    else:
        a = ops.activate(ops.linear(h, w.w_up, w.b_up), config.activation)  # [T, F]
    mlp_out = ops.linear(a, w.w_down, w.b_down)  # [T, D]
    if config.post_norms:
        mlp_out = model.norm(mlp_out, w.post_mlp_norm, None)  # [T, D]
    mlp_out = call.state("mlp_out", layer, mlp_out)  # [T, D]
    return call.state("resid_post", layer, ops.add(x, mlp_out))


def checked_tokens(tokens: Sequence[int] | Array, vocab_size: int) -> Array:
    """The tokens as int32 [T]; TokenError, naming the first bad one, unless each is an id of the vocabulary."""
    ids = np.asarray(tokens)
    if ids.ndim != 1 or not (ids.size == 0 or np.issubdtype(ids.dtype, np.integer)):
        raise TokenError(f"tokens must be a list of whole numbers, not {ids.dtype} of shape {list(ids.shape)}")
    if ids.size == 0:
        raise EmptyPromptError("there is no token to process: give at least one")
    bad = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if bad.size:
        raise TokenError(
            f"token {ids[bad[0]]} at index {bad[0]} is not in the vocabulary of {vocab_size} (0 to {vocab_size - 1})"
        )
    return ids.astype(np.int32)


def _ops_module(ops: str) -> Any:
    modules = {"numpy": "nanokv.ops", "numba": "nanokv.kernels"}
    if ops not in modules:
        raise ConfigError(f"ops is {ops!r}; it must be one of {sorted(modules)}")
    return import_module(modules[ops])
