"""The measures, on numbers that can be followed by hand, and on random models of every family."""

from __future__ import annotations

import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
from flows import Given, random_patterns, weights_of
from models import CONFIGS, model, tokens

from nanokv import handmade
from nanokv.config import Config
from nanokv.edits import Cut, ZeroValue
from nanokv.errors import TraceError
from nanokv.trace import Recorder, Trace, measures, sinks
from nanokv.trace.parts import Goal
from nanokv.trace.proximity import closeness
from nanokv.trace.rollout import Rollout
from nanokv.weights import BlockWeights

# Two positions, two heads that share one key/value head of one feature, a stream of four features.
PATTERN = [[[[1, 0], [0.25, 0.75]], [[1, 0], [0.5, 0.5]]]]  # [1, 2, 2, 2]
VALUES = [[[[2.0]], [[-1.0]]]]  # [1, 2, 1, 1]
WO = [[[3, -3], [4, -4], [0, 0], [0, 0]]]  # [1, 4, 2]: the second head writes the opposite of the first
STATES = {"resid_pre": [[[3, 4, 0, 0], [0, 0, 5, 12]]], "mlp_out": [[[0, 0, 0, 0], [2, 0, 0, 0]]]}


def small_trace(level: str = "states") -> tuple[Given, SimpleNamespace]:
    trace = Given(PATTERN, level=level, values=VALUES, states=STATES)
    return trace, SimpleNamespace(config=trace.config, weights=weights_of(WO), tokenizer=None)


def test_attention_is_the_weight_and_the_residual_counts_as_all_heads_together() -> None:
    trace, _ = small_trace("weights")
    (apart,) = measures.attention(trace, None, Goal(1), False)
    np.testing.assert_array_equal(apart.attention, np.array(PATTERN[0], np.float32))
    np.testing.assert_array_equal(apart.residual, [2, 2])
    assert apart.mlp is None
    (merged,) = measures.attention(trace, None, Goal(1), True)
    np.testing.assert_allclose(merged.attention, [[[1, 0], [0.375, 0.625]]])
    np.testing.assert_array_equal(merged.residual, [1, 1])


def test_norm_is_the_length_of_what_a_head_moves() -> None:
    trace, shaped = small_trace()
    (apart,) = measures.norm(trace, shaped, Goal(1), False)
    # A value of 2 becomes (6, 8) of length 10, one of -1 becomes (-3, -4) of length 5, in either head.
    np.testing.assert_allclose(apart.attention, [[[10, 0], [2.5, 3.75]], [[10, 0], [5, 2.5]]])
    np.testing.assert_allclose(apart.residual, [5, 13])
    np.testing.assert_allclose(apart.mlp, [0, 2])


def test_the_norm_of_merged_heads_is_that_of_their_sum_so_heads_that_cancel_count_as_nothing() -> None:
    trace, shaped = small_trace()
    (merged,) = measures.norm(trace, shaped, Goal(1), True)
    np.testing.assert_allclose(merged.attention, [[[0, 0], [2.5, 1.25]]], atol=1e-6)


def test_only_positions_up_to_the_goal_count() -> None:
    trace, shaped = small_trace()
    for name in ("attention", "norm", "rollout"):
        (weights,) = measures.MEASURES[name].weights(trace, shaped, Goal(0), False)
        assert weights.attention.shape == (2, 1, 1) and weights.residual.shape == (1,)


def parts_of(trace: Trace, block: BlockWeights, config: Config, layer: int) -> np.ndarray:
    """What every head adds to every dst from every src, straight from the definition: [H, dst, src, D]."""
    value = np.repeat(trace.values(layer), config.n_heads // config.n_kv_heads, axis=1)  # [src, H, hd]
    wo = np.asarray(block.wo).reshape(config.d_model, config.n_heads, config.head_dim)
    parts = np.einsum("hij,jhe,dhe->hijd", trace.pattern(layer), value, wo)
    if config.post_norms:
        written = parts.sum(axis=(0, 2))  # [dst, D]
        scale = 1 / np.sqrt((written**2).mean(axis=-1) + config.norm_eps)
        parts = parts * scale[:, None, None] * block.post_attn_norm
    return parts


@pytest.mark.parametrize("family", CONFIGS)
def test_the_parts_that_norm_measures_add_up_to_what_attention_wrote(family: str) -> None:
    config = CONFIGS[family]
    shaped = model(config, ops="numpy")
    recorder = Recorder(level="states")
    shaped.forward(tokens(config, 9), observer=recorder)
    trace = recorder.trace
    apart = list(measures.norm(trace, shaped, Goal(8), False))[::-1]
    merged = list(measures.norm(trace, shaped, Goal(8), True))[::-1]
    for layer, block in enumerate(shaped.weights.blocks):
        parts = parts_of(trace, block, config, layer)
        bias = 0 if block.bo is None else block.bo
        np.testing.assert_allclose(parts.sum(axis=(0, 2)) + bias, trace.state("attn_out", layer), atol=1e-5, rtol=1e-4)
        np.testing.assert_allclose(apart[layer].attention, np.linalg.norm(parts, axis=-1), atol=1e-5, rtol=1e-4)
        together = np.linalg.norm(parts.sum(axis=0), axis=-1)
        np.testing.assert_allclose(merged[layer].attention[0], together, atol=1e-4, rtol=1e-3)
        np.testing.assert_allclose(apart[layer].mlp, np.linalg.norm(trace.state("mlp_out", layer), axis=-1), rtol=1e-5)


@pytest.mark.parametrize("merged", [False, True])
def test_norm_never_holds_a_part_for_every_pair_of_positions(merged: bool) -> None:
    n, n_heads, d = 256, 4, 64
    rng = np.random.default_rng(0)
    values = rng.standard_normal((1, n, n_heads, 16))
    states = {site: rng.standard_normal((1, n, d)) for site in ("resid_pre", "mlp_out")}
    trace = Given(random_patterns(0, 1, n_heads, n), level="states", values=values, states=states)
    shaped = SimpleNamespace(config=trace.config, weights=weights_of(rng.standard_normal((1, d, n_heads * 16))))
    tracemalloc.start()
    list(measures.norm(trace, shaped, Goal(n - 1), merged))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < n * n * d * 4


def test_what_a_position_draws_leaves_out_itself_and_the_next_one() -> None:
    pattern = np.array([[[1, 0, 0, 0], [1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.1, 0.2, 0.3, 0.4]]])
    np.testing.assert_allclose(sinks.received(pattern), [(0.5 + 0.1) / 2, 0.2, 0, 0])


def test_a_measure_says_what_it_lacks() -> None:
    trace, shaped = small_trace()
    with pytest.raises(TraceError, match=r"no measure 'colour'.*norm, proximity, attention"):
        measures.find("colour", trace, shaped)
    with pytest.raises(TraceError, match=r"'norm' needs a trace of level 'states'.*'vectors'.*Record it again"):
        measures.find("norm", small_trace("vectors")[0], shaped)
    with pytest.raises(TraceError, match="'attention' needs a trace of level 'weights'"):
        measures.find("attention", small_trace("writes")[0], None)
    with pytest.raises(TraceError, match="'norm' needs the model"):
        measures.find("norm", trace, None)
    with pytest.raises(TraceError, match="another model"):
        measures.find("norm", trace, SimpleNamespace(config=CONFIGS["gpt2"]))


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("against", [None, 9])
def test_target_is_complete_at_every_layer_of_every_family(family: str, against: int | None) -> None:
    config = CONFIGS[family]
    shaped, recorder = model(config), Recorder(level="states")
    logits = shaped.forward(tokens(config, 9), observer=recorder)
    goal = Goal(7, 5, against)
    above = 0.0
    for weights in measures.target(recorder.trace, shaped, goal, False):
        assert weights.bias is not None and weights.states is not None
        above += weights.bias.sum()
        assert weights.states.sum() + above == pytest.approx(goal.value(logits[7]), abs=1e-4)
    apart, merged = (list(measures.target(recorder.trace, shaped, goal, each)) for each in (False, True))
    for a, b in zip(apart, merged, strict=True):
        np.testing.assert_allclose(a.attention.sum(axis=0), b.attention[0], atol=1e-5)


@pytest.mark.parametrize("family", CONFIGS)
def test_contributions_by_proximity_sum_to_one_and_what_is_not_read_has_none(family: str) -> None:
    config = CONFIGS[family]
    shaped, recorder = model(config), Recorder(level="states")
    shaped.forward(tokens(config, 9), observer=recorder)
    for weights in measures.proximity(recorder.trace, shaped, Goal(8), False):
        assert weights.bias is not None
        total = weights.attention.sum(axis=(0, 2)) + weights.residual + weights.bias
        np.testing.assert_allclose(total, 1, atol=1e-5)
        assert not weights.attention[recorder.trace.pattern(weights.layer) == 0].any()


def test_proximity_gives_the_numbers_published_with_its_code() -> None:
    for parts, whole, expected in (
        ([[1, 1], [-1, 0], [2, 1]], [2, 2], [0.43613, 0, 0.56387]),
        ([[1, 1], [2, 2], [1, 1]], [4, 4], [0.25, 0.5, 0.25]),
    ):
        nearer = closeness(np.array(parts, float), np.array(whole, float), order=2)
        np.testing.assert_allclose(nearer / nearer.sum(), expected, atol=1e-5)


def test_a_rollout_grows_without_changing_its_rows_and_is_what_reaches_the_prediction() -> None:
    patterns = random_patterns(3, 3, 2, 7)
    short, whole = Given(patterns[:, :, :5, :5]), Given(patterns)
    grown = Rollout(3).extend(short)
    before = [rows.copy() for rows in grown.rows]
    grown.extend(whole)
    for row, (old, new, once) in enumerate(zip(before, grown.rows, Rollout(3).extend(whole).rows, strict=True)):
        assert np.array_equal(old, new[:5, :5]) and np.array_equal(new, once), row
        np.testing.assert_allclose(new.sum(axis=1), 1, atol=1e-6)
    last = list(measures.rollout(whole, None, Goal(6), False))[-1]
    np.testing.assert_allclose(last.states, grown.rows[-1][6], atol=1e-6)


def test_a_rollout_of_heads_that_shift_by_one_is_binomial() -> None:
    shift = np.eye(6, k=-1)
    shift[0, 0] = 1
    rows = Rollout(3).extend(Given(np.tile(shift, (3, 1, 1, 1)))).rows
    np.testing.assert_allclose(rows[-1][5], [0, 0, 0.125, 0.375, 0.375, 0.125])


def test_the_knockout_graph_of_the_induction_model_is_exactly_its_two_edges_and_other_measures_lie() -> None:
    made = {}
    shaped, recorder = handmade.induction(12, 24), Recorder(level="states")
    shaped.forward([0, 3, 7, 5, 9, 3], observer=recorder)
    for name in measures.MEASURES:
        flow = recorder.trace.flow(shaped, measure=name, at=5)
        edges = flow.edges[(flow.edges["src"] != flow.edges["dst"]) & (flow.edges["kind"] == 0) & (flow.influence > 0)]
        made[name] = {tuple(edge) for edge in edges[["layer", "dst", "src"]].tolist()}
    assert made["knockout"] == made["value-zero"] == {(0, 2, 1), (1, 5, 2)}
    assert made["target"] == {(1, 5, 2)}  # position 1 acts through a key, which is held
    assert (0, 5, 4) in made["rollout"]  # and this changes nothing


@pytest.mark.parametrize("name", ["knockout", "value-zero"])
def test_cutting_an_edge_is_what_a_whole_run_with_that_edit_says(name: str) -> None:
    config = CONFIGS["gemma3"]
    shaped, recorder, ids = model(config), Recorder(), tokens(config, 8)
    whole = shaped.forward(ids, observer=recorder)[-1]
    goal, kind = Goal(7, 3, 4), {"knockout": Cut, "value-zero": ZeroValue}[name]
    for weights in measures.MEASURES[name].layers(recorder.trace, shaped, goal, "apart"):
        for head, dst, src in ((0, 7, 5), (3, 4, 2), (5, 6, 6)):
            after = shaped.forward(ids, edits=[kind(weights.layer, dst, src, head)])[-1]
            assert weights.attention[head, dst, src] == pytest.approx(goal.value(whole) - goal.value(after), abs=1e-6)
