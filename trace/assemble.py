"""A trace put together from the arrays of another program's run. What it lacks a model computes, if there is one, or is NaN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from nanokv.config import Config
from nanokv.errors import TraceError
from nanokv.trace.hashes import hash_words
from nanokv.trace.schema import ROLES, SITES, STEP, holds
from nanokv.trace.steps import About, RecordedStep
from nanokv.trace.store import Trace

if TYPE_CHECKING:
    from nanokv.transformer import Transformer

Array = np.ndarray


@dataclass
class Call:
    """What is known of one forward call. T new positions, S in the cache after it; lists have an entry for each layer."""

    tokens: Array  # [T]
    start: int
    patterns: list[Array]  # [H, T, S]
    states: dict[str, list[Array]] = field(default_factory=dict)  # of each site that is known, [T, D]
    logits: Array | None = None  # [T', V], of the last T' positions
    sampled: bool = False  # whether its tokens were chosen from the predictions


@dataclass(frozen=True)
class Source:
    """What a run's calls share."""

    config: Config
    cache: list[tuple[Array, Array]] | None  # keys and values of each layer, [S, G, hd]; None: not known
    texts: list[str]  # of all tokens
    model: Transformer | None = None  # the same model in nanokv, to compute what is missing
    name: str = ""


def assemble(calls: Sequence[Call], source: Source) -> Trace:
    """The trace of these calls: of level `states` if their states and the cache are known, else of level `weights`.

    At level `weights` without a cache, hashes are 0 and lengths NaN. TraceError where shapes do not fit the config.
    """
    states = source.cache is not None and all("resid_pre" in call.states for call in calls)
    model, level = source.model, "states" if states else "weights"
    about = About(source.config, level, model_hash="" if model is None else model.fingerprint, model_name=source.name)
    steps, chunk = [], {False: 0, True: 0}
    for number, call in enumerate(calls):
        _check(call, source)
        arrays = _written(call, source, chunk[call.sampled]) | _read(call, source.config)
        if states:
            arrays |= _computed(call, source)
        chunk[call.sampled] += 1
        kept = {stored.name: np.ascontiguousarray(arrays[stored.name], stored.dtype)
                for stored in STEP if holds(level, stored.level) and stored.name in arrays}  # fmt: skip
        steps.append(RecordedStep(number, call.start, kept, about, {}))
    return Trace(about, steps)


def _check(call: Call, source: Source) -> None:
    c, n = source.config, len(call.tokens)
    expected: dict[str, tuple[int, ...]] = {"attentions": (c.n_layers, c.n_heads, n, call.start + n)}
    given: dict[str, tuple[int, ...]] = {"attentions": (len(call.patterns), *call.patterns[0].shape)}
    for site, arrays in call.states.items():
        expected[site], given[site] = (c.n_layers, n, c.d_model), (len(arrays), *arrays[0].shape)
    if source.cache is not None:
        keys = source.cache[0][0]
        expected["keys"], given["keys"] = (c.n_layers, c.n_kv_heads, c.head_dim), (len(source.cache), *keys.shape[1:])
        if len(keys) < call.start + n:
            raise TraceError(f"the cache holds {len(keys)} positions of {call.start + n}: it dropped what left a sliding "
                             "window. Give the call a DynamicCache() made without a config, which keeps all")  # fmt: skip
    for name, shape in expected.items():
        if given[name] != shape:
            raise TraceError(
                f"{name} have the shape {list(given[name])}; for this model and {n} tokens it must be {list(shape)}"
            )


def _written(call: Call, source: Source, chunk: int) -> dict[str, Array]:
    """The arrays of level `writes` that say what was written, and k and v."""
    c, n, start = source.config, len(call.tokens), call.start
    texts = [text.encode("utf-8", "backslashreplace") for text in source.texts[start : start + n]]
    arrays: dict[str, Array] = {
        "token_id": call.tokens,
        "text": np.frombuffer(b"".join(texts), np.uint8),
        "text_end": np.cumsum([len(text) for text in texts]),
        "turn": np.full(n, int(call.sampled)),
        "role": np.full(n, ROLES.index("model" if call.sampled else "user")),
        "chunk": np.full(n, chunk),
        "sampled": np.full(n, call.sampled),
        "write_slot": np.full(c.n_layers, start),
    }
    if source.cache is None:
        unknown = np.full((c.n_layers, n, c.n_kv_heads), np.nan)
        nothing = np.zeros(unknown.shape, np.uint64)
        return arrays | {"k_hash": nothing, "v_hash": nothing, "k_norm": unknown, "v_norm": unknown}
    for i, name in enumerate("kv"):
        x = np.stack([pair[i][start : start + n] for pair in source.cache])  # [L, T, G, hd]
        arrays |= {name: x, f"{name}_hash": hash_words(x), f"{name}_norm": np.linalg.norm(x, axis=-1)}
    return arrays


def _mask(config: Config, layer: int, start: int, n: int) -> tuple[Array, Array]:
    """The first slot that each of n positions reads, and one past the last."""
    stop = np.arange(start + 1, start + n + 1)
    window = config.window_of(layer)
    return (np.zeros_like(stop) if window is None else np.maximum(stop - window, 0)), stop


def _read(call: Call, config: Config) -> dict[str, Array]:
    """The arrays that say what was read, and by how much."""
    n, layers = len(call.tokens), range(config.n_layers)
    masks = [_mask(config, layer, call.start, n) for layer in layers]
    kv_head = np.arange(config.n_heads) // (config.n_heads // config.n_kv_heads)
    return {
        "read_layer": np.arange(config.n_layers),
        "read_kv_head": np.tile(kv_head, (config.n_layers, 1)),
        "read_first": np.stack([first for first, _ in masks]),
        "read_stop": np.stack([stop for _, stop in masks]),
        "weight": _packed(call.patterns, masks),
    }


def _packed(rows: Sequence[Array], masks: Sequence[tuple[Array, Array]]) -> Array:
    """Of [H, T, S] in each layer, what the mask lets a position read, one after the other."""
    parts = []
    for each, (first, stop) in zip(rows, masks, strict=True):
        slots = np.arange(each.shape[2])
        parts.append(each[:, (first[:, None] <= slots) & (slots < stop[:, None])].reshape(-1))
    return np.concatenate(parts)


def _computed(call: Call, source: Source) -> dict[str, Array]:
    """The arrays of levels `vectors` and `states`: as they are known, else computed by the model, else NaN."""
    c, n = source.config, len(call.tokens)
    layers = [_layer(call, layer, source) for layer in range(c.n_layers)]
    masks = [_mask(c, layer, call.start, n) for layer in range(c.n_layers)]
    arrays = {name: np.stack([each[name] for each in layers]) for name in ("q", "z", *SITES)}
    arrays["score"] = _packed([each["scores"] for each in layers], masks)
    arrays["logits"] = np.zeros((0, c.vocab_size)) if call.logits is None else call.logits
    last = arrays["resid_post"][-1][n - len(arrays["logits"]) :]
    if c.norm == "layer":
        last = last - last.mean(axis=-1, keepdims=True)
    scale = 1 / np.sqrt((last * last).mean(axis=-1) + c.norm_eps)
    arrays["final_scale"] = np.ones(len(last)) if c.norm == "none" else scale
    return arrays


def _layer(call: Call, layer: int, source: Source) -> dict[str, Array]:
    """All arrays of a layer: [T, D], but q and z, [T, H, hd], and scores, [H, T, S]."""
    assert source.cache is not None
    c, n, model = source.config, len(call.tokens), source.model
    pattern, (k, v) = call.patterns[layer], (x[: call.start + n] for x in source.cache[layer])
    kv_head = np.arange(c.n_heads) // (c.n_heads // c.n_kv_heads)
    known = {site: arrays[layer] for site, arrays in call.states.items() if not np.isnan(arrays[layer]).any()}
    known["z"] = np.einsum("hts,shd->thd", pattern, v[:, kv_head])
    known["q"], known["scores"] = np.full((n, c.n_heads, c.head_dim), np.nan), np.full(pattern.shape, np.nan)
    unknown = np.full((n, c.d_model), np.nan, np.float32)
    if model is not None:
        known["q"] = q = _queries(model, layer, known["resid_pre"], call.start)
        known["scores"] = np.einsum("thd,shd->hts", q, k[:, kv_head]) * np.float32(c.attn_scale or 1)
    if "attn_out" not in known:
        known["attn_out"] = unknown if model is None else _attn_out(model, layer, known["z"])
    known.setdefault("resid_mid", known["resid_pre"] + known["attn_out"])
    if "mlp_out" not in known and model is not None and "resid_post" in known:
        known["mlp_out"] = _difference(known["resid_post"], known["resid_mid"])
    elif "mlp_out" not in known:
        known["mlp_out"] = unknown if model is None else _mlp_out(model, layer, known["resid_mid"])
    known.setdefault("resid_post", known["resid_mid"] + known["mlp_out"])
    return known


def _difference(total: Array, part: Array) -> Array:
    """The other part, so that part + other rounds to the total wherever a float32 does that."""
    other = total - part
    for towards in (np.float32(np.inf), np.float32(-np.inf)):
        near = np.nextafter(other, towards)
        other = np.where((part + other != total) & (part + near == total), near, other)
    return other


def _queries(model: Transformer, layer: int, x: Array, start: int) -> Array:  # [T, D] -> [T, H, hd]
    w, c, ops = model.weights.blocks[layer], model.config, model.ops
    q: Array = ops.linear(model.norm(x, w.attn_norm, w.attn_norm_bias), w.wq, w.bq).reshape(len(x), c.n_heads, c.head_dim)
    if c.qk_norm:
        q = ops.rms_norm(q, w.q_norm, c.norm_eps)
    rope = c.rope_of(layer)
    return q if rope is None else ops.rope(q, *ops.rope_table(rope, c.head_dim, start, len(x), x.dtype), c.rope_pairs)


def _attn_out(model: Transformer, layer: int, z: Array) -> Array:  # [T, H, hd] -> [T, D]
    w = model.weights.blocks[layer]
    out: Array = model.ops.linear(np.ascontiguousarray(z.reshape(len(z), -1), np.float32), w.wo, w.bo)
    return model.norm(out, w.post_attn_norm, None) if model.config.post_norms else out


def _mlp_out(model: Transformer, layer: int, x: Array) -> Array:  # [T, D] -> [T, D]
    w, c, ops = model.weights.blocks[layer], model.config, model.ops
    h = model.norm(x, w.mlp_norm, w.mlp_norm_bias)
    gate = ops.linear(h, w.w_gate, w.b_gate) if c.gated_mlp else None
    out: Array = ops.linear(ops.activate(ops.linear(h, w.w_up, w.b_up), c.activation, gate), w.w_down, w.b_down)
    return model.norm(out, w.post_mlp_norm, None) if c.post_norms else out
