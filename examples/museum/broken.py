"""A copy of nanokv's readable model with a switch at each place where ports went wrong.

`bug` is the name of one of the exhibits in bugs.py, or "" for the model as it should be. Beside each switch stands the
right line; everything else is nanokv.ops and nanokv.transformer over again, as short as it gets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nanokv import ops as right
from nanokv.cache import KVCache, Ranges, Slots
from nanokv.config import Config, Rope
from nanokv.transformer import Transformer, Unobserved, checked_tokens
from nanokv.weights import BlockWeights, Weights

Array = np.ndarray


@dataclass(frozen=True)
class Call:
    """What every layer of one forward call shares."""

    cache: Any
    start: int
    rotations: dict[Rope, tuple[Array, Array]]
    cuts: Sequence[Any]  # edges to knock out
    observer: Any


class BrokenOps:
    """nanokv.ops, with switches."""

    prepare, embed, add = staticmethod(right.prepare), staticmethod(right.embed), staticmethod(right.add)
    linear, linears = staticmethod(right.linear), staticmethod(right.linears)

    def __init__(self, bug: str) -> None:
        self.bug = bug

    def rms_scale(self, x: Array, eps: float) -> Array:  # [..., K] -> [...]
        if self.bug == "EpsOfOtherModel":
            eps = 1e-6 if eps == 1e-5 else 1e-5
        mean_square = np.mean(x * x, axis=-1)
        if self.bug == "EpsOutsideRoot":
            return 1 / (np.sqrt(mean_square) + x.dtype.type(eps))
        return 1 / np.sqrt(mean_square + x.dtype.type(eps))

    def rms_norm(self, x: Array, w: Array, eps: float) -> Array:  # [..., K], [K] -> [..., K]
        return x * self.rms_scale(x, eps)[..., None] * w

    def layer_norm(self, x: Array, w: Array, b: Array, eps: float) -> Array:  # [..., K], [K], [K] -> [..., K]
        if self.bug == "LayerNormAsRms":
            return self.rms_norm(x, w, eps) + b
        centred = x - np.mean(x, axis=-1, keepdims=True)
        if self.bug == "VarianceUnbiased":
            n = x.shape[-1]
            return centred / np.sqrt(np.sum(centred * centred, axis=-1, keepdims=True) / (n - 1) + x.dtype.type(eps)) * w + b
        return self.rms_norm(centred, w, eps) + b

    def layer_scale(self, x: Array, eps: float) -> Array:  # [..., K] -> [...]
        return self.rms_scale(x - np.mean(x, axis=-1, keepdims=True), eps)

    def rope_table(self, rope: Rope, head_dim: int, start: int, n: int, dtype: np.dtype) -> tuple[Array, Array]:
        if self.bug == "RopeBaseOther":
            rope = replace(rope, base=10000.0)
        if self.bug == "RopeScalingMissing":
            rope = replace(rope, divisors=None)
        if self.bug == "RopeDivisorMultiplies" and rope.divisors is not None:
            rope = replace(rope, divisors=tuple(1 / divisor for divisor in rope.divisors))
        if self.bug == "RopeExponentHalved":
            rope = replace(rope, base=rope.base**0.5)
        if self.bug in ("RopeAngleFloat32", "RopeFrequencyFloat32"):
            float_of = np.float32 if self.bug == "RopeAngleFloat32" else np.float64
            frequencies = np.array(rope.frequencies(head_dim), np.float32).astype(float_of)
            angles = np.arange(start, start + n).astype(float_of)[:, None] * frequencies
            return np.cos(angles.astype(float)).astype(dtype), np.sin(angles.astype(float)).astype(dtype)
        return right.rope_table(rope, head_dim, start, n, dtype)

    def rope(self, x: Array, cos: Array, sin: Array, pairs: str) -> Array:  # [T, N, hd] -> [T, N, hd]
        if self.bug == "RopePairs":
            pairs = {"halves": "neighbours", "neighbours": "halves"}[pairs]
        y = right.rope(x, cos, -sin if self.bug == "RopeBackwards" else sin, pairs)
        if self.bug == "RopePairOverwritten":  # y1 = x0 sin + x1 cos, but x0's place holds y0 by then
            first, second = right._pair_slices(x.shape[-1], pairs)
            y[..., second] = y[..., first] * sin[:, None] + x[..., second] * cos[:, None]
        return y

    def attention(
        self, q: Array, cache: Any, slots: Slots, scale: float, cuts: Array | None = None,
        weights_out: Array | None = None, scores_out: Array | None = None,
    ) -> Array:  # [T, H, hd] -> [T, H, hd]  # fmt: skip
        k, v = cache.keys(slots.layer), cache.values(slots.layer)  # [S, G, hd]
        kv_head = np.minimum(slots.kv_head, k.shape[1] - 1)  # a port would read whatever lies behind the last head
        k, v = k[:, kv_head], v[:, kv_head]  # [S, H, hd]
        scale = 1.0 if self.bug == "ScaleMissing" else scale
        scores = q.transpose(1, 0, 2) @ k.transpose(1, 2, 0) * k.dtype.type(scale)  # [H, T, S]
        mask = slots.mask()  # [T, S]
        k, v = k[: mask.shape[1]], v[: mask.shape[1]]
        scores = scores[..., : mask.shape[1]]
        if self.bug != "MaskAfterSoftmax":
            scores[:, ~mask] = -np.inf
        if cuts is not None:
            cuts = cuts[cuts[:, 2] < scores.shape[-1]]
            scores[cuts[:, 0], cuts[:, 1] - slots.start, cuts[:, 2]] = -np.inf
        weights = self.softmax(scores)  # [H, T, S]
        if self.bug == "MaskAfterSoftmax":
            weights = weights * mask
        if weights_out is not None:
            weights_out[:] = weights[:, mask]
        if scores_out is not None:
            scores_out[:] = scores[:, mask]
        return (weights @ v.transpose(1, 0, 2)).transpose(1, 0, 2)

    def softmax(self, scores: Array) -> Array:  # [..., S] -> [..., S]
        if self.bug == "SoftmaxWithoutMaximum":
            e = np.exp(scores.astype(np.float32))  # as ports compute it, whatever the reference's precision
            return (e / np.sum(e, axis=-1, keepdims=True)).astype(scores.dtype)
        if self.bug == "AllCutGivesNaN":
            e = np.exp(scores - np.max(scores, axis=-1, keepdims=True))
            return e / np.sum(e, axis=-1, keepdims=True)
        return right.softmax(scores)

    def activate(self, up: Array, kind: str, gate: Array | None = None) -> Array:  # [T, F], [T, F] -> [T, F]
        if self.bug == "GeluByErf" and kind == "gelu_tanh":
            kind = "gelu"
        elif self.bug == "GeluByTanh" and kind == "gelu":
            kind = "gelu_tanh"
        if self.bug == "GateAndUpSwapped" and gate is not None:
            gate, up = up, gate
        if self.bug == "ReluLosesNaN" and kind == "relu" and gate is None:
            return np.fmax(up, 0)
        return right.activate(up, kind, gate)


class BrokenCache(KVCache):
    """nanokv.cache, with switches."""

    bug = ""
    gap = 0  # slots that were passed over

    @contextmanager
    def step(self, n_new: int) -> Iterator[int]:
        if self.bug == "FirstDecodeOneLate" and self.steps == 1 and not self.gap:
            self._pass_over()  # llama3.np: its loop goes on from the prompt's length plus 1
        if self.bug == "OverflowBeginsAgain" and self.length + n_new > self.config.n_ctx:
            self.tokens = self.tokens[:0]
            self._written = [0] * self.config.n_layers
        with super().step(n_new + self.gap) as start:
            yield start + self.gap
        self._written = [self.length + self.gap] * self.config.n_layers

    def _pass_over(self) -> None:
        """Nobody writes the next slot, which then holds zeros."""
        zeros = np.zeros((1, self.config.n_kv_heads, self.config.head_dim), self.dtype)
        self._reserve(self.length + 1)
        for layer in range(self.config.n_layers):
            super().write(layer, self.length, zeros, zeros)
        self.gap = 1

    def commit(self, tokens: Array, last_logits: Array) -> None:
        self._written = [written - self.gap for written in self._written]
        super().commit(tokens, last_logits)

    def write(self, layer: int, start: int, k: Array, v: Array) -> None:
        if self.bug == "WriteAnywhere" and start != self._written[layer]:
            start = self._written[layer]
        super().write(layer, start, k, v)

    def read(self, layer: int, start: int, n: int, kv_head: Array, window: int | None = None) -> Slots:
        if self.bug == "UnwrittenSlotRead":
            self._written[layer] = max(self._written[layer], start + n)
        if window is not None:
            window = {"WindowOneLonger": window + 1, "WindowOneShorter": max(window - 1, 1)}.get(self.bug, window)
        slots = super().read(layer, start, n, kv_head, window)
        stop = slots.stop  # position start + t reads slots up to its own: start + t + 1 is one past it
        if self.bug == "MaskSeesNext":
            stop = np.minimum(stop + 1, start + n).astype(np.int32)
        elif self.bug == "MaskMissesSelf":
            stop = np.maximum(stop - 1, 1).astype(np.int32)
        elif self.bug == "ChunkMaskIgnoresPast" and n > 1:
            stop = stop - np.int32(start)
        return replace(slots, ranges=Ranges(np.minimum(slots.first, stop - 1).astype(np.int32), stop))


class RotatingCache:
    """A cache whose reader turns the keys, as TransformerLens's does."""

    def __init__(self, cache: KVCache, turn: Callable[[Array], Array]) -> None:
        self.cache, self.turn, self.values = cache, turn, cache.values

    def keys(self, layer: int) -> Array:
        return self.turn(self.cache.keys(layer))


class BrokenTransformer(Transformer):
    """nanokv.transformer, with switches."""

    def __init__(self, config: Config, weights: Weights, *, bug: str = "", ops: str = "numpy", **named: Any) -> None:
        super().__init__(config, weights, ops="numpy", **named)
        self.bug, self.ops = bug, BrokenOps(bug)
        h, g = config.n_heads, config.n_kv_heads
        head = np.arange(h, dtype=np.int32)
        self.kv_head = {
            "KvHeadDividedByG": head // g,
            "KvHeadModuloG": head % g,
            "KvRepeatedBeforeCaching": head,
        }.get(bug, head // (h // g))

    def new_cache(self) -> KVCache:
        config = self.config
        if self.bug == "KvRepeatedBeforeCaching":
            config = replace(config, n_kv_heads=config.n_heads)
        cache = BrokenCache(config, np.float64 if self.bug == "CacheInFloat64" else self.dtype)
        cache.bug = self.bug
        return cache

    def forward(self, tokens: Any, cache: Any = None, *, observer: Any = None, edits: Any = (), last_logits_only: bool = False,
                ) -> Array:  # fmt: skip
        config, weights = self.config, self.weights
        if self.bug == "TokenIdUnchecked":
            tokens = np.asarray(tokens) % config.vocab_size
        tokens = checked_tokens(tokens, config.vocab_size)  # [T]
        cache = self.new_cache() if cache is None else cache
        observer = Unobserved() if observer is None else observer
        with cache.step(len(tokens)) as start:
            call = Call(cache, start, self._rotations(start, len(tokens)), edits, observer)
            if hasattr(observer, "attach"):
                observer.attach(self, cache)
            observer.begin(cache.steps, tokens, start)
            x = self._blocks(self._embedded(tokens, start), call)  # [T, D]
            if last_logits_only:
                x = x[-1:]
            if observer.wants("final_scale"):
                observer.state("final_scale", config.n_layers, start + len(tokens) - len(x), self._scale(x))
            h = x if self.bug == "FinalNormMissing" else self.norm(x, weights.final_norm, weights.final_norm_bias)
            logits = self.ops.linear(h, weights.embed if self.bug == "HeadTiedAnyway" else weights.head)  # [T, V]
            cache.commit(tokens, logits[-1])
            observer.end(logits)
        return logits

    def _blocks(self, x: Array, call: Any) -> Array:
        for layer, block in enumerate(self.weights.blocks):
            pre, x = x, attention_sublayer(self, block, layer, x, call)  # [T, D]
            x = mlp_sublayer(self, block, layer, x, pre if self.bug == "MlpReadsResidPre" else x, call)  # [T, D]
        return x

    def _embedded(self, tokens: Array, start: int) -> Array:
        x, scale = self.ops.embed(tokens, self.weights.embed), self.config.embed_scale
        if self.bug == "EmbedScaleMissing":
            scale = 1.0
        if self.bug == "EmbedScaleInBfloat16":
            scale = float((np.array([scale], np.float32).view(np.uint32) + 0x8000 & 0xFFFF0000).view(np.float32)[0])
        x = x * self.dtype.type(scale)
        if self.weights.pos_embed is None:
            return x
        start = 0 if self.bug == "PositionsRestart" else start
        return x + self.weights.pos_embed[start : start + len(tokens)]

    def _rotations(self, start: int, n: int) -> dict[Rope, tuple[Array, Array]]:
        start = 0 if self.bug == "PositionsRestart" else start
        ropes = {rope for rope in map(self.rope_of, range(self.config.n_layers)) if rope is not None}
        return {rope: self.ops.rope_table(rope, self.config.head_dim, start, n, self.dtype) for rope in ropes}

    def rope_of(self, layer: int) -> Rope | None:
        return self.config.rope if self.bug == "RopeLocalMissing" else self.config.rope_of(layer)

    def window_of(self, layer: int) -> int | None:
        if self.bug == "SlidingLayersSwapped":
            return None if self.config.sliding[layer] else self.config.window
        if self.bug == "EveryLayerSlides":
            return self.config.window
        return None if self.bug == "WindowIgnored" else self.config.window_of(layer)

    def scale_of_scores(self) -> float:
        config = self.config
        if self.bug == "ScaleByWidth":
            return 1 / math.sqrt(config.d_model)
        if self.bug == "ScaleOfConfigIgnored":
            return 1 / math.sqrt(config.head_dim)
        return config.attn_scale or 1.0


def queries_keys_values(model: BrokenTransformer, w: BlockWeights, h: Array) -> tuple[Array, Array, Array]:
    """[T, H, hd], [T, G, hd], [T, G, hd], before RoPE."""
    config, ops = model.config, model.ops
    biases = (None, None, None) if model.bug == "QkvBiasMissing" else (w.bq, w.bk, w.bv)
    q, k, v = ops.linears(h, (w.wq, w.wk, w.wv), biases)
    if config.qk_norm and model.bug == "QkNormOverAllHeads":
        q = q * ops.rms_scale(q, config.norm_eps)[:, None] * np.tile(w.q_norm, config.n_heads)
        k = k * ops.rms_scale(k, config.norm_eps)[:, None] * np.tile(w.k_norm, config.n_kv_heads)
    q, k, v = (x.reshape(len(x), -1, config.head_dim) for x in (q, k, v))
    if config.qk_norm and model.bug not in ("QkNormOverAllHeads", "QkNormAfterRope"):
        q, k = ops.rms_norm(q, w.q_norm, config.norm_eps), ops.rms_norm(k, w.k_norm, config.norm_eps)
    return (q, v, k) if model.bug == "KeysAndValuesSwapped" else (q, k, v)


def attention_sublayer(model: BrokenTransformer, w: BlockWeights, layer: int, x: Array, call: Call) -> Array:
    config, ops, cache, observer, bug = model.config, model.ops, call.cache, call.observer, model.bug
    observer.state("resid_pre", layer, call.start, x)
    h = x if bug == "NormAfterAdd" else model.norm(x, w.attn_norm, w.attn_norm_bias)  # [T, D]
    observer.state("ln1", layer, call.start, h)
    q, k, v = queries_keys_values(model, w, h)
    rope, turn = model.rope_of(layer), lambda x: x
    if rope is not None:
        turn = lambda x: ops.rope(x, *model._rotations(0, len(x))[rope], config.rope_pairs)  # noqa: E731
        table = call.rotations[rope]
        q = ops.rope(q, *table, config.rope_pairs)
        k = k if bug == "KeysCachedBeforeRope" else ops.rope(k, *table, config.rope_pairs)
        v = ops.rope(v, *table, config.rope_pairs) if bug == "ValuesRotated" else v
    if config.qk_norm and bug == "QkNormAfterRope":
        q, k = ops.rms_norm(q, w.q_norm, config.norm_eps), ops.rms_norm(k, w.k_norm, config.norm_eps)
    if bug == "KvRepeatedBeforeCaching":
        k, v = (np.repeat(x, config.n_heads // config.n_kv_heads, axis=1) for x in (k, v))
    cache.write(layer, call.start, k, v)
    observer.state("q", layer, call.start, q)
    observer.write(layer, call.start, k, v)

    slots = cache.read(layer, call.start, len(x), model.kv_head, model.window_of(layer))
    weights, scores = (
        np.empty((config.n_heads, slots.count), x.dtype) if observer.wants(site) else None for site in ("pattern", "scores")
    )
    if bug == "ScaledTwice":
        q = q * q.dtype.type(model.scale_of_scores())
    reader = RotatingCache(cache, turn) if bug in ("KeysCachedBeforeRope", "KeysRotatedTwice") else cache
    cuts = cuts_of(call.cuts, layer, config.n_heads)
    z = ops.attention(q, reader, slots, model.scale_of_scores(), cuts, weights, scores)  # [T, H, hd]
    observer.read(layer, call.start, slots, scores, weights)
    observer.state("z", layer, call.start, z)
    attn_out = ops.linear(z.reshape(len(x), -1), w.wo, w.bo)  # [T, D]
    x = h if bug == "ResidualAfterNorm" else x
    return added(model, x, attn_out, layer, call, "attn_out", (w.attn_norm, w.attn_norm_bias), w.post_attn_norm)


def cuts_of(edges: Sequence[Any], layer: int, n_heads: int) -> Array | None:
    """(head, dst, src) of the edges cut in a layer, [n, 3]; None if there are none."""
    rows = [(head, edge.dst, edge.src) for edge in edges if edge.layer == layer
            for head in (range(n_heads) if edge.head is None else (edge.head,))]  # fmt: skip
    return np.array(rows) if rows else None


def mlp_sublayer(model: BrokenTransformer, w: BlockWeights, layer: int, x: Array, read: Array, call: Call) -> Array:
    """x and what the MLP makes of `read`, which is x."""
    config, ops, observer, bug = model.config, model.ops, call.observer, model.bug
    observer.state("resid_mid", layer, call.start, x)
    h = x if bug == "NormAfterAdd" else model.norm(read, w.mlp_norm, w.mlp_norm_bias)  # [T, D]
    observer.state("ln2", layer, call.start, h)
    up = ops.linear(h, w.w_up, w.b_up)  # [T, F]
    gate = ops.linear(h, w.w_gate, w.b_gate) if config.gated_mlp else None  # [T, F]
    observer.state("up", layer, call.start, up)
    if gate is not None:
        observer.state("gate", layer, call.start, gate)
    a = ops.activate(up, config.activation, gate)  # [T, F]
    observer.state("act", layer, call.start, a)
    mlp_out = ops.linear(a, w.w_down, w.b_down)  # [T, D]
    x = h if bug == "ResidualAfterNorm" else x
    x = added(model, x, mlp_out, layer, call, "mlp_out", (w.mlp_norm, w.mlp_norm_bias), w.post_mlp_norm)
    last = bug == "LastStateNormed" and layer == config.n_layers - 1
    shown = model.norm(x, model.weights.final_norm, model.weights.final_norm_bias) if last else x
    observer.state("resid_post", layer, call.start, shown)
    return x


def added(model: BrokenTransformer, x: Array, out: Array, layer: int, call: Call, site: str,
          norm: tuple[Any, Any], post_norm: Any) -> Array:  # fmt: skip
    """x + out, after out's own norm if the model has one."""
    if model.config.post_norms and model.bug not in ("PostNormsMissing", "PostNormOnTheStream"):
        out = model.norm(out, post_norm, None)
    call.observer.state(site, layer, call.start, out)
    if model.bug == "PostNormOnTheStream" and model.config.post_norms:
        return model.norm(x + out, post_norm, None)
    return model.norm(x + out, *norm) if model.bug == "NormAfterAdd" else x + out


def numbers(bug: str) -> dict[str, Callable[..., Array]]:
    """The functions that a bug makes otherwise, of a number."""
    if bug != "ClampLosesNaN":
        return {}

    def exp(x: Array) -> Array:
        return np.exp(np.fmin(np.fmax(x, -105), 89))

    return {
        "exp": exp,
        "tanh": lambda x: np.copysign(np.where(np.isnan(x), 1 - 2 / (exp(x) + 1), np.tanh(x)), x),
        "erf": lambda x: np.copysign(np.array([math.erf(each) for each in np.fmin(np.abs(x), 4)], x.dtype), x),
    }


def blocks(model: BrokenTransformer, x: Array, cache: Any, start: int, observer: Any) -> Array:  # [T, D] -> [T, D]
    """The model's blocks alone, over positions from start on."""
    return model._blocks(x, Call(cache, start, model._rotations(start, len(x)), (), observer))
