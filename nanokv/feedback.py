"""The feedback transformer of Fan and others (2020, arXiv 2002.09402): every layer reads one memory of all depths.

    for each token, one after the other:
        x = embed(token)
        for each layer:
            x = x + attention(norm(x))             reads the memories of the positions before it
            x = x + mlp(norm(x))
        memory = sum over depths of softmax(w)_l x_l        of the embedding, and of what left each layer
        for each layer:  keys and values of norm(memory) are written

So layer 0 of a position can use what the position before had come to at the top of its stack, and thoughts may grow
longer with every token: a straight line where `transformer.py` has a pyramid. The price: a position's keys are known only
when its last layer is, so that tokens cannot be processed side by side. Blocks, cache, observer, trace and edits are those
of the standard model. An entry is written once and never changes, here too; a position does not read its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from nanokv import ops
from nanokv.cache import KVCache, Ranges, Slots
from nanokv.config import Config
from nanokv.edits import Add, Cut, Edit, Replace, ZeroValue, sorted_edits
from nanokv.errors import ConfigError, ContextFullError, EditError, WeightsError
from nanokv.transformer import Call, Observer, Transformer, attend, checked_tokens, mlp_sublayer
from nanokv.weights import BlockWeights, Weights

Array = np.ndarray
SATURATED = 1000.0  # a layer weight so far above the others, which are 0, that its share is exactly 1


class FeedbackTransformer(Transformer):
    """A Transformer whose layers read a memory: the mean of all depths of a position, by learned shares.

    layer_weights [L + 1]: one number a depth, the embedding's first; their softmax are the shares. None: equal shares.
    shared_kv: block 0's norm, key and value matrices serve all layers, whose entries are then the same. (One copy would do;
    here each layer keeps its own, so that cache and trace are those of the standard model.)
    """

    def __init__(
        self,
        config: Config,
        weights: Weights,
        *,
        layer_weights: Sequence[float] | Array | None = None,
        shared_kv: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(config, weights, **options)
        depths = config.n_layers + 1
        self.layer_weights = np.zeros(depths) if layer_weights is None else np.array(layer_weights, np.float64)
        if self.layer_weights.shape != (depths,) or not np.isfinite(self.layer_weights).all():
            raise WeightsError(f"layer_weights has shape {list(self.layer_weights.shape)}; expected [{depths}] finite numbers: "
                               "one for the embedding, one for what leaves each layer")  # fmt: skip
        if shared_kv and len({config.rope_of(layer) for layer in range(config.n_layers)}) > 1:
            raise ConfigError("shared_kv gives every layer the same keys, but the layers' RoPE differs")
        self.shared_kv = shared_kv
        self.shares = ops.softmax(self.layer_weights).astype(self.dtype)  # one a depth

    @classmethod
    def of(cls, model: Transformer, *, top: bool = False, shared_kv: bool = False, ops: str = "numpy") -> FeedbackTransformer:
        """A standard model's blocks, read as a feedback model; top: the memory is the top of the stack alone."""
        layer_weights = np.zeros(model.config.n_layers + 1)
        layer_weights[-1] = SATURATED if top else 0
        weights = model.weights.map(np.asarray)
        return cls(model.config, weights, layer_weights=layer_weights, shared_kv=shared_kv, tokenizer=model.tokenizer,
                   ops=ops, name=f"{model.name}, feedback")  # fmt: skip

    def forward(
        self,
        tokens: Sequence[int] | Array,
        cache: KVCache | None = None,
        *,
        observer: Observer | None = None,
        edits: Sequence[Edit] = (),
        last_logits_only: bool = False,
    ) -> Array:
        """Append tokens and return the logits, as `Transformer.forward` does: as many calls of one token as there are.

        Each is a call of its own in the cache and in the trace, for one can't begin before the last has ended. What can be
        known to be wrong with any of them is raised before the first; after it, the calls that ended well stand.
        """
        tokens = checked_tokens(tokens, self.config.vocab_size)  # [T]
        cache = self.new_cache() if cache is None else cache
        start = cache.length
        if start + len(tokens) > self.config.n_ctx:
            raise ContextFullError(f"{start} positions are in the cache and {len(tokens)} more were given, but the model's "
                                   f"context has {self.config.n_ctx}: give fewer tokens, or begin a new cache")  # fmt: skip
        self._check_edits(edits, start, len(tokens))
        rows = [
            super(FeedbackTransformer, self).forward(tokens[i : i + 1], cache, observer=observer, edits=_of(edits, start + i))
            for i in range(len(tokens))
        ]
        return rows[-1] if last_logits_only else np.concatenate(rows)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the standard model's fingerprint and of what is added here."""
        added = f"{super().fingerprint} feedback {self.shared_kv} {self.layer_weights.tolist()}"
        return hashlib.sha256(added.encode()).hexdigest()

    def _blocks(self, x: Array, call: Call) -> Array:
        memory = self.shares[0] * x  # [1, D]
        for layer, block in enumerate(self.weights.blocks):
            x = memory_sublayer(self, block, layer, x, call)  # [1, D]
            x = mlp_sublayer(self, block, layer, x, call)  # [1, D]
            memory = memory + self.shares[layer + 1] * x  # [1, D]
        for layer, block in enumerate(self.weights.blocks):
            remember(self, self.weights.blocks[0] if self.shared_kv else block, layer, memory, call)
        return x

    def _check_edits(self, edits: Sequence[Edit], start: int, n: int) -> None:
        sorted_edits(edits, self.config, start, n)
        for edit in edits:
            if isinstance(edit, Cut | ZeroValue) and edit.src == edit.dst:
                raise EditError(f"{edit}: position {edit.dst} does not read itself in a feedback model anyway")


def memory_sublayer(model: Transformer, w: BlockWeights, layer: int, x: Array, call: Call) -> Array:
    """x + attention(norm(x)): the position reads the memories of those before it. At position 0 there are none."""
    config = model.config
    x = call.state("resid_pre", layer, x)  # [1, D]
    h = model.norm(x, w.attn_norm, w.attn_norm_bias)  # [1, D]
    q = model.ops.linear(h, w.wq, w.bq).reshape(-1, config.n_heads, config.head_dim)  # [1, H, hd]
    q = _placed(model, layer, q, w.q_norm, call)  # [1, H, hd]
    call.observer.state("q", layer, call.start, q)
    stop = np.array([call.start], np.int32)  # [1]
    first = np.maximum(stop + 1 - (config.window_of(layer) or call.start + 1), 0).astype(np.int32)  # [1]
    return attend(model, w, x, q, Slots(layer, call.start, model.kv_head, Ranges(first, stop)), call)


def remember(model: Transformer, w: BlockWeights, layer: int, memory: Array, call: Call) -> None:
    """Write a layer's key and value of a position's memory."""
    config = model.config
    h = model.norm(memory, w.attn_norm, w.attn_norm_bias)  # [1, D]
    k, v = model.ops.linears(h, (w.wk, w.wv), (w.bk, w.bv))  # [1, G*hd], [1, G*hd]
    k = _placed(model, layer, k.reshape(-1, config.n_kv_heads, config.head_dim), w.k_norm, call)  # [1, G, hd]
    v = v.reshape(-1, config.n_kv_heads, config.head_dim)  # [1, G, hd]
    call.cache.write(layer, call.start, k, v)
    call.observer.write(layer, call.start, k, v)


def _placed(model: Transformer, layer: int, x: Array, norm: Array | None, call: Call) -> Array:
    """Queries or keys after their norm and RoPE, where the config has them."""
    config = model.config
    if config.qk_norm:
        x = model.ops.rms_norm(x, norm, config.norm_eps)  # [1, N, hd]
    rope = config.rope_of(layer)
    return x if rope is None else model.ops.rope(x, *call.rotations[rope], config.rope_pairs)


def _of(edits: Sequence[Edit], pos: int) -> list[Edit]:
    """What concerns the call of one position: its reads, its states, and the entries of those before it."""
    return [
        edit for edit in edits
        if (isinstance(edit, Cut | ZeroValue) and edit.dst == pos)
        or (isinstance(edit, Add) and edit.pos == pos)
        or (isinstance(edit, Replace) and edit.pos < pos)
    ]  # fmt: skip
