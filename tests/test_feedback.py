"""The feedback transformer is the one of the paper, and keeps the library's promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import CONFIGS, model, tokens
from test_handmade import automaton_step

from nanokv import KVCache, generate, ops
from nanokv.edits import Add, Cut, Replace, ZeroValue
from nanokv.errors import CacheError, ConfigError, ContextFullError, EditError, TokenError, WeightsError
from nanokv.feedback import FeedbackTransformer
from nanokv.handmade import automaton
from nanokv.trace import Recorder
from nanokv.transformer import Transformer, Unobserved


def feedback(name: str, ops: str = "numba", dtype: type = np.float32, **options: Any) -> FeedbackTransformer:
    standard = model(CONFIGS[name], ops="numpy")
    weights = standard.weights.map(lambda w: np.asarray(w, dtype))
    learned = np.random.default_rng(5).standard_normal(standard.config.n_layers + 1)
    return FeedbackTransformer(standard.config, weights, layer_weights=learned, ops=ops, **options)


def by_the_paper(fed: FeedbackTransformer, ids: np.ndarray) -> np.ndarray:
    """z_t^l = Attn(x_t^l, {m_1, ..., m_(t-1)}), m_t = sum_l softmax(w)_l x_t^l, one position after the other in float64."""
    c, weights = fed.config, fed.weights.map(lambda w: np.asarray(w, np.float64))
    shares = np.exp(fed.layer_weights) / np.exp(fed.layer_weights).sum()
    standard = Transformer(c, weights, ops="numpy")
    memories: list[np.ndarray] = []
    logits = []

    def turned(x: np.ndarray, layer: int, pos: int) -> np.ndarray:
        rope = c.rope_of(layer)
        return x if rope is None else ops.rope(x, *ops.rope_table(rope, c.head_dim, pos, 1, x.dtype), c.rope_pairs)

    def heads(x: np.ndarray, w: Any, b: Any, norm: Any, n: int) -> np.ndarray:
        x = ops.linear(x, w, b).reshape(1, n, c.head_dim)
        return ops.rms_norm(x, norm, c.norm_eps) if c.qk_norm and norm is not None else x

    for t, token in enumerate(ids):
        x = standard._embedded(np.array([token]), t)
        depths = [x]
        for layer, own in enumerate(weights.blocks):
            kv = weights.blocks[0] if fed.shared_kv else own
            h = standard.norm(x, own.attn_norm, own.attn_norm_bias)
            q = turned(heads(h, own.wq, own.bq, own.q_norm, c.n_heads), layer, t)
            z = np.zeros((c.n_heads, c.head_dim))
            seen = range(max(0, t + 1 - (c.window_of(layer) or t + 1)), t)
            for h in range(c.n_heads if len(seen) else 0):
                k, v = [], []
                for s in seen:
                    m = standard.norm(memories[s], kv.attn_norm, kv.attn_norm_bias)
                    k.append(turned(heads(m, kv.wk, kv.bk, kv.k_norm, c.n_kv_heads), layer, s)[0, fed.kv_head[h]])
                    v.append(heads(m, kv.wv, kv.bv, None, c.n_kv_heads)[0, fed.kv_head[h]])
                z[h] = ops.softmax(np.array(k) @ q[0, h] * c.attn_scale) @ np.array(v)
            out = ops.linear(z.reshape(1, -1), own.wo, own.bo)
            x = x + (standard.norm(out, own.post_attn_norm, None) if c.post_norms else out)
            h = standard.norm(x, own.mlp_norm, own.mlp_norm_bias)
            up = ops.linear(h, own.w_up, own.b_up)
            a = ops.activate(up, c.activation, ops.linear(h, own.w_gate, own.b_gate) if c.gated_mlp else None)
            a = ops.linear(a, own.w_down, own.b_down)
            x = x + (standard.norm(a, own.post_mlp_norm, None) if c.post_norms else a)
            depths.append(x)
        memories.append(sum(share * depth for share, depth in zip(shares, depths, strict=True)))
        logits.append(ops.linear(standard.norm(x, weights.final_norm, weights.final_norm_bias), weights.head)[0])
    return np.array(logits)


@pytest.mark.parametrize("name", CONFIGS)
def test_it_computes_the_equations_of_the_paper(name: str) -> None:
    fed = feedback(name, "numpy", np.float64)
    ids = tokens(fed.config, 9)
    expected = by_the_paper(fed, ids)
    assert np.abs(fed.forward(ids) - expected).max() < 1e-10
    assert np.abs(feedback(name).forward(ids) - expected).max() < 1e-3  # a rounding error goes through all later positions


def test_with_a_shared_projection_all_layers_hold_the_same_entries() -> None:
    fed = feedback("llama", "numpy", np.float64, shared_kv=True)
    ids, cache = tokens(fed.config, 9), fed.new_cache()
    assert np.abs(fed.forward(ids, cache) - by_the_paper(fed, ids)).max() < 1e-10
    for layer in range(1, fed.config.n_layers):
        assert np.array_equal(cache.keys(layer), cache.keys(0)) and np.array_equal(cache.values(layer), cache.values(0))


@pytest.mark.parametrize("ops", ["numpy", "numba"])
@pytest.mark.parametrize("n_layers", [1, 3])
def test_one_layer_of_the_automaton_knows_the_state_at_every_position(n_layers: int, ops: str) -> None:
    """The same block that as a stack of L knows the state of position t only when t <= L."""
    fed, random = FeedbackTransformer.of(automaton(5, n_layers, 40), top=True, ops=ops), np.random.default_rng(0)
    for _ in range(20 if n_layers == 1 else 2):
        ids, recorder = [0, *random.integers(1, 3, 39).tolist()], Recorder(level="states")
        fed.forward(ids, observer=recorder)
        truth = np.eye(120)[0]
        for t, token in enumerate(ids):
            truth = automaton_step(truth, token) if t else truth
            for layer in range(1, n_layers + 1):
                assert np.array_equal(recorder.trace[f"layer{layer}.pos{t}"][:120], truth)


def test_splits_recordings_and_saved_caches_change_no_bit(tmp_path: Path) -> None:
    fed = feedback("qwen3")
    ids, whole, parts = tokens(fed.config, 12), fed.new_cache(), fed.new_cache()
    expected = fed.forward(ids, whole)
    rows = [fed.forward(ids[a:b], parts, observer=Recorder(level="states")) for a, b in ((0, 5), (5, 6))]
    parts.save(tmp_path / "cache", fed)
    parts = KVCache.load(tmp_path / "cache", fed)
    rows.append(fed.forward(ids[6:], parts))
    assert np.array_equal(np.concatenate(rows), expected)
    assert np.array_equal(fed.forward(ids[6:], KVCache.load(tmp_path / "cache", fed), last_logits_only=True), expected[-1:])
    for layer in range(fed.config.n_layers):
        assert np.array_equal(parts.keys(layer), whole.keys(layer)) and np.array_equal(parts.values(layer), whole.values(layer))
    assert parts.steps == whole.steps == 12
    with pytest.raises(CacheError, match="another model"):
        KVCache.load(tmp_path / "cache", feedback("qwen3", shared_kv=True))


def test_it_generates_from_its_cache() -> None:
    fed, cache = feedback("llama"), feedback("llama").new_cache()
    fresh = list(generate(fed, [1, 2, 3], cache=cache, max_new_tokens=5))
    assert fresh == [int(fed.forward([1, 2, 3, *fresh[:i]])[-1].argmax()) for i in range(5)]


def test_a_position_reads_those_before_it_and_not_itself() -> None:
    fed, recorder = feedback("gemma3"), Recorder(level="states")
    fed.forward(tokens(fed.config, 9), observer=recorder)
    trace = recorder.trace
    assert len(trace.steps) == 9 and (trace.reads["src"] < trace.reads["dst"]).all()
    for layer in range(fed.config.n_layers):
        rows = trace.pattern(layer).sum(axis=-1)
        assert (rows[:, 0] == 0).all() and np.allclose(rows[:, 1:], 1)
        window = fed.config.window_of(layer)
        assert (np.count_nonzero(trace.pattern(layer)[0], axis=-1) == np.minimum(np.arange(9), (window or 99) - 1)).all()


def test_what_is_added_anywhere_in_a_position_reaches_every_layer_of_all_later_ones_and_nothing_else() -> None:
    fed = feedback("llama")
    ids, vector = tokens(fed.config, 6), np.ones(fed.config.d_model, np.float32)

    def states(edits: list[Add]) -> np.ndarray:
        recorder = Recorder(level="states")
        fed.forward(ids, observer=recorder, edits=edits)
        return np.array([[recorder.trace[f"layer{layer}.pos{pos}"] for pos in range(6)] for layer in range(4)])

    clean = states([])
    for layer in range(3):
        changed = (states([Add("resid_post", layer, 2, vector)]) != clean).any(axis=-1)
        expected = np.zeros((4, 6), bool)
        expected[layer + 1 :, 2] = True
        expected[1:, 3:] = True
        assert np.array_equal(changed, expected)


def test_edits_act_in_the_call_of_their_position() -> None:
    fed, ids = feedback("llama"), tokens(feedback("llama").config, 6)
    cache, other = fed.new_cache(), fed.new_cache()
    clean = fed.forward(ids, cache)
    fed.forward(ids[::-1].copy(), other)
    for edit in (Cut(1, 4, 2), ZeroValue(1, 4, 2), Replace(1, 3, k=other.keys(1)[3])):
        changed = (fed.forward(ids, edits=[edit]) != clean).any(axis=-1)
        assert changed.tolist() == [False] * 4 + [True] * 2
    with pytest.raises(EditError, match="does not read itself"):
        fed.forward(ids, edits=[Cut(1, 4, 4)])


def test_what_can_be_known_to_be_wrong_is_raised_before_anything_is_done() -> None:
    fed = feedback("llama")
    cache = fed.new_cache()
    fed.forward([1, 2], cache)
    before = cache.last_logits
    for wrong, kind, options in (
        ([3, 4, 999], TokenError, {}),
        ([3] * 199, ContextFullError, {}),
        ([3, 4], EditError, {"edits": [Cut(0, 9, 1)]}),
    ):
        with pytest.raises(kind):
            fed.forward(wrong, cache, **options)
        assert cache.length == cache.steps == 2 and cache.last_logits is before
    with pytest.raises(WeightsError, match=r"expected \[4\]"):
        FeedbackTransformer(fed.config, model(fed.config, ops="numpy").weights, layer_weights=[1.0])
    with pytest.raises(ConfigError, match="RoPE differs"):
        feedback("gemma3", shared_kv=True)


def test_after_an_interruption_the_calls_that_ended_well_stand() -> None:
    class Interrupts(Unobserved):
        def begin(self, step: int, tokens: np.ndarray, start: int) -> None:
            if start == 2:
                raise KeyboardInterrupt

    fed, cache, ids = feedback("llama"), feedback("llama").new_cache(), [1, 2, 3, 4]
    with pytest.raises(KeyboardInterrupt):
        fed.forward(ids, cache, observer=Interrupts())
    assert cache.tokens.tolist() == [1, 2]
    assert np.array_equal(fed.forward(ids[2:], cache), fed.forward(ids)[2:])
