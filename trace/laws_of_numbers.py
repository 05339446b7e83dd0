"""The laws of weights, keys, values and states: what follows from what. Each yields an id and what is wrong with it.

Sums of the residual stream are compared in bits. The rest is computed anew in float64, and may differ by as much as the
rounding of so many operations can. A NaN among the operands says that they are not known, as in traces of other programs.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from nanokv.trace.hashes import hash_words
from nanokv.trace.steps import Step

if TYPE_CHECKING:
    from nanokv.trace.store import Trace

Array = np.ndarray
Finding = tuple[str, str]
EPS = 2.0**-24  # how far rounding to float32 moves a number, relatively


def types(trace: Trace) -> Iterator[Finding]:
    for step in trace.steps:
        for name, dtype in step.deviations.items():
            yield f"step{step.number}.{name}", f"is {dtype}; the trace has {trace.about.dtype}"


def weights(trace: Trace) -> Iterator[Finding]:
    for step, layer in _layers(trace):
        dst = step.kept_pairs(layer)[0]
        rows, begins = np.unique(dst, return_index=True)
        if not len(rows):
            continue
        given = step.kept("weight", layer).astype(np.float64)
        total, least = (f.reduceat(given, begins, axis=1) for f in (np.add, np.minimum))  # [H, rows]
        slack = 1e-5 + np.diff(np.r_[begins, len(dst)]) * EPS
        right = (least >= 0) & (total <= 1 + slack) & ((total >= 1 - slack) | (trace.topk is not None))
        right |= step.edited.edges(layer, ("cut", "zero_value"))[:, rows - step.start]
        for head, row in zip(*np.nonzero(~right), strict=True):
            low, what = least[head, row], f"has weights that sum to {total[head, row]:.9g}"
            yield f"layer{layer}.pos{rows[row]}.head{head}.pattern", f"has a weight of {low:.9g}" if low < 0 else what


def hashes(trace: Trace) -> Iterator[Finding]:
    for step, layer in _layers(trace):
        for name in ("k", "v"):
            x, norm = step.arrays[name][layer], step.arrays[f"{name}_norm"][layer]
            length = np.sqrt(np.sum(x.astype(np.float64) ** 2, axis=-1))
            wrong = hash_words(x) != step.arrays[f"{name}_hash"][layer]
            wrong |= np.abs(norm - length) > x.shape[-1] * EPS * length
            for t in np.flatnonzero(wrong.any(axis=-1)):
                yield f"layer{layer}.pos{step.start + t}.{name}", "is not what its hash and its length were taken of"


def scores(trace: Trace) -> Iterator[Finding]:
    scale = float(trace.config.attn_scale or 1)
    for step, layer, k, _ in _with_past(trace):
        dst, src = step.kept_pairs(layer)
        kv_head = _own_heads(step, layer, k)
        q, row = step.arrays["q"][layer].astype(np.float64), np.broadcast_to(dst - step.start, src.shape)
        head = np.arange(len(kv_head))[:, None]
        products = np.einsum("thi,shi->hts", q, k[:, kv_head], optimize=True)[head, row, src]
        lengths = (np.linalg.norm(q, axis=-1).T[:, :, None] * np.linalg.norm(k[:, kv_head], axis=-1).T[:, None])[head, row, src]
        given = step.kept("score", layer).astype(np.float64)
        with np.errstate(invalid="ignore"):
            wrong = np.abs(given - scale * products) > 1e-30 + (k.shape[-1] + 4) * EPS * scale * lengths
        wrong |= np.isinf(given) & np.isfinite(products)
        wrong &= ~step.edited.edges(layer, ("cut",))[head, row] & ~np.isin(src, step.edited.entries(layer, "k"))
        for h, r in zip(*np.nonzero(wrong), strict=True):
            yield (f"layer{layer}.pos{dst[r]}.head{h}.scores", f"is {given[h, r]:.6g} for slot {src[h, r]}; its query times "
                   f"the key of key/value head {kv_head[h]} there is {scale * products[h, r]:.6g}")  # fmt: skip


def softmax(trace: Trace) -> Iterator[Finding]:
    for step, layer in _layers(trace):
        dst = step.pairs(layer)[0]
        rows, begins, counts = np.unique(dst, return_index=True, return_counts=True)
        if not len(rows):
            continue
        score = step.reads("score", layer).astype(np.float64)
        top = np.maximum.reduceat(score, begins, axis=1)
        e = np.exp(score - np.repeat(np.where(np.isneginf(top), 0, top), counts, axis=1))
        total = np.add.reduceat(e, begins, axis=1)
        expected = e / np.repeat(np.where(total == 0, 1, total), counts, axis=1)
        wrong = np.abs(step.reads("weight", layer) - expected) > 1e-7 + (2e-5 + np.repeat(counts, counts) * EPS) * expected
        wrong = np.logical_or.reduceat(wrong, begins, axis=1)
        wrong &= ~step.edited.edges(layer, ("zero_value",))[:, rows - step.start]
        for head, row in zip(*np.nonzero(wrong), strict=True):
            yield f"layer{layer}.pos{rows[row]}.head{head}.pattern", "is not the softmax of its scores"


def mixture(trace: Trace) -> Iterator[Finding]:
    for step, layer, k, v in _with_past(trace):
        dst, src = step.pairs(layer)
        kv_head = _own_heads(step, layer, k)
        dense = np.zeros((len(kv_head), step.n, len(v)))
        dense[:, dst - step.start, src] = step.reads("weight", layer)
        own = v[:, kv_head].transpose(1, 0, 2)  # [H, S, hd]
        z = step.arrays["z"][layer].transpose(1, 0, 2)  # [H, T, hd]
        slack = 1e-30 + (2e-5 + len(v) * EPS) * (dense @ np.abs(own))
        wrong = (np.abs(z - dense @ own) > slack).any(axis=-1)
        replaced = np.isin(src, step.edited.entries(layer, "v"))
        wrong[:, np.unique(dst[replaced]) - step.start] = False
        for head, t in zip(*np.nonzero(wrong), strict=True):
            yield (f"layer{layer}.pos{step.start + t}.head{head}.z", "is not the sum of the values of key/value head "
                   f"{kv_head[head]} by weight")  # fmt: skip


def residual(trace: Trace) -> Iterator[Finding]:
    sums = (("resid_pre", "attn_out", "resid_mid"), ("resid_mid", "mlp_out", "resid_post"))
    for step, layer in _layers(trace):
        for before, added, after in sums:
            x, y, z = (step.arrays[name][layer] for name in (before, added, after))
            for t in _differ(x + y, z, step, after, layer):
                yield f"layer{layer}.pos{step.start + t}.{after}", f"is not {before} + {added}"


def stream(trace: Trace) -> Iterator[Finding]:
    for step in trace.steps:
        for layer, following in pairwise(range(trace.config.n_layers)):
            post, pre = step.arrays["resid_post"][layer], step.arrays["resid_pre"][following]
            for t in _differ(post, pre, step, "resid_pre", following):
                yield f"layer{following}.pos{step.start + t}", f"is not layer{layer}.pos{step.start + t}.resid_post"


def _differ(expected: Array, found: Array, step: Step, site: str, layer: int) -> list[int]:
    """Rows [T, D] that differ in bits, but for what an edit added to; a NaN that was expected matches anything."""
    differ = ((expected.view(np.uint32) != found.view(np.uint32)).reshape(len(found), -1, expected.itemsize // 4).any(-1)
              & ~np.isnan(expected)).any(axis=-1)  # fmt: skip
    edited = step.edited.states(site, layer)
    return [int(t) for t in np.flatnonzero(differ) if step.start + t not in edited]


def _layers(trace: Trace) -> Iterator[tuple[Step, int]]:
    for step in trace.steps:
        for layer in range(trace.config.n_layers):
            yield step, layer


def _with_past(trace: Trace) -> Iterator[tuple[Step, int, Array, Array]]:
    """Each step and layer with the keys and values [S, G, hd] of all positions up to then, NaN where not recorded."""
    c, end = trace.config, max(step.start + step.n for step in trace.steps)
    entry = trace.steps[0].arrays["k"].shape[2:]  # [G, hd], as it was written
    past = np.full((2, c.n_layers, end, *entry), np.nan, trace.about.dtype)
    for step in trace.steps:
        end = step.start + step.n
        past[0, :, step.start : end], past[1, :, step.start : end] = step.arrays["k"], step.arrays["v"]
        for layer in range(c.n_layers):
            yield step, layer, past[0, layer, :end].astype(np.float64), past[1, layer, :end].astype(np.float64)


def _own_heads(step: Step, layer: int, k: Array) -> Array:
    """The key/value head that each query head says it read."""
    return np.clip(step.arrays["read_kv_head"][layer], 0, k.shape[1] - 1)
