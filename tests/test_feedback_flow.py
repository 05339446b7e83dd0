"""The flow of a feedback model: memories of all depths, read by every layer of later positions. Small ones are checked against
every path, one by one."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CONFIGS, model, tokens
from test_feedback import feedback

from nanokv.edits import Add, ZeroValue
from nanokv.errors import TraceError
from nanokv.feedback import FeedbackTransformer
from nanokv.handmade import automaton
from nanokv.trace import Flow, Recorder, Trace, memory, paths, reach
from nanokv.trace.flow import Kind
from nanokv.trace.layout import arrange
from nanokv.trace.measures import MEASURES
from nanokv.trace.parts import Goal
from nanokv.trace.pyramid import panels

State = tuple[int, int]  # row, position


def run(fed: FeedbackTransformer, n: int = 6, given_: int = 0, level: str = "states") -> Trace:
    """A trace of n positions, the last of them sampled if only `given_` are given."""
    recorder, cache = Recorder(level=level), fed.new_cache()
    fed.forward(tokens(fed.config, given_ or n), cache, observer=recorder)
    if given_:
        recorder.turn("model", sampled=True)
        fed.forward(tokens(fed.config, n)[given_:], cache, observer=recorder)
    return recorder.trace


def small(seed: int, n_layers: int, n: int, given_: int) -> tuple[FeedbackTransformer, Trace]:
    config = replace(CONFIGS["gpt2"], n_layers=n_layers, n_heads=2, n_kv_heads=2, sliding=())
    weights = np.random.default_rng(seed).standard_normal(n_layers + 1)
    fed = FeedbackTransformer(config, model(config, seed, "numpy").weights, layer_weights=weights, ops="numpy")
    return fed, run(fed, n, min(given_, n - 1))


def ways(flow: Flow) -> Iterator[list[int]]:
    """Every way back from the prediction, as the list of its edges, and each of its beginnings. MLP edges lead nowhere."""
    into, (below, above) = defaultdict(list), flow.ends
    for i in np.flatnonzero(flow.edges["kind"] != Kind.MLP).tolist():
        into[int(above[i]), int(flow.edges["dst"][i])].append(i)
    stack: list[tuple[State, list[int]]] = [((flow.n_layers, flow.at), [])]
    while stack:
        at, way = stack.pop()
        yield way
        stack += [((int(below[i]), int(flow.edges["src"][i])), [*way, i]) for i in into[at]]


MADE = st.tuples(st.integers(0, 10**6), st.integers(1, 2), st.integers(1, 4), st.sampled_from([0, 2]))


@settings(max_examples=15, deadline=None)
@given(MADE, st.sampled_from(["norm", "proximity", "attention"]))
def test_influence_is_the_sum_over_all_ways_through_an_edge(shape: tuple[int, int, int, int], measure: str) -> None:
    fed, trace = small(*shape)
    flow = trace.flow(fed, measure=measure, heads="merged")
    size, total = np.abs(flow.edges["weight"].astype(float)), defaultdict[State, float](float)
    into = list(zip(flow.ends[1].tolist(), flow.edges["dst"].tolist(), strict=True))
    moves = flow.edges["kind"] != Kind.MLP
    for i in np.flatnonzero(moves):
        total[into[i]] += size[i]
    share, expected = np.array([size[i] / (total[into[i]] or 1) for i in range(len(size))]), np.zeros(len(size))
    for way in ways(flow):
        if way:
            expected[way[-1]] += np.prod(share[way])
    np.testing.assert_allclose(flow.influence[moves], expected[moves], atol=1e-6)


@pytest.mark.parametrize("shared_kv", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_by_target_every_cut_through_the_graph_adds_up_to_the_logit(name: str, shared_kv: bool) -> None:
    """What crosses from before a position, the embeddings from it on, and the biases from it on."""
    if name == "gemma3" and shared_kv:
        pytest.skip("its layers' RoPE differs")
    fed = feedback(name, shared_kv=shared_kv)
    trace, goal = run(fed, 7), Goal(5, 3, 8)
    flow = trace.flow(fed, at=5, token=3, against=8)
    layers, given_, states = memory.target(trace, fed, goal, "apart")
    biases, logit = np.sum([weights.bias for weights in layers], axis=0), goal.value(fed.forward(tokens(fed.config, 7))[5])
    assert flow.prediction.value == pytest.approx(logit, abs=1e-5)
    for pos in range(6):
        crossing = flow.edges[(flow.edges["kind"] == Kind.ATTENTION) & (flow.edges["src"] < pos) & (flow.edges["dst"] >= pos)]
        assert crossing["weight"].sum() + states[0, pos:].sum() + biases[pos:].sum() == pytest.approx(logit, abs=1e-4)
    assert np.allclose(given_.sum(axis=0), states[-1], atol=1e-4)  # a memory is nothing but what its depths gave
    assert np.array_equal(flow.states[:-2], states[:-2]) and np.array_equal(flow.states[-1], states[-1])
    assert (flow.edges["kind"] == Kind.MEMORY).sum() == (fed.config.n_layers + 1) * 5  # nobody reads the last memory


def test_to_first_order_the_strongest_edges_by_target_do_what_it_says() -> None:
    """An edge into the last layer of the last position goes through nothing but the MLP and the final norm."""
    config = replace(CONFIGS["relu"], norm="none", gated_mlp=False)
    fed = FeedbackTransformer(config, model(config, 0, "numpy").weights, ops="numpy")
    trace = run(fed)
    flow = trace.flow(fed, token=3, against=8)
    ids, goal = tokens(config, 6), Goal(5, 3, 8)
    whole = goal.value(fed.forward(ids)[-1])
    for edge in flow.edges[flow.crossing & (flow.edges["dst"] == 5) & (flow.edges["layer"] == 1)]:
        tiny = less_of(fed, trace, edge, 1e-3)
        lost = (whole - goal.value(fed.forward(ids, edits=[tiny])[-1])) / 1e-3
        assert lost == pytest.approx(float(edge["weight"]), rel=1e-3, abs=0.05)


def less_of(fed: FeedbackTransformer, trace: Trace, edge: np.void, part: float) -> Add:
    """An edit that takes that part of what an edge brings away from its position."""
    layer, head, dst, src = (int(edge[name]) for name in ("layer", "head", "dst", "src"))
    size = fed.config.head_dim
    brought = trace.pattern(layer)[head, dst, src] * trace.values(layer)[src, fed.kv_head[head]]
    wo = np.asarray(fed.weights.blocks[layer].wo)[:, head * size : (head + 1) * size]
    return Add("attn_out", layer, dst, (-part * (wo @ brought)).astype(np.float32))


def test_by_value_zero_and_knockout_an_edge_weighs_what_is_lost_without_it() -> None:
    fed = feedback("llama", "numpy")
    trace, ids = run(fed, 4), tokens(fed.config, 4)
    flow = trace.flow(fed, measure="value-zero", heads="merged", token=3, against=8)
    whole = Goal(3, 3, 8).value(fed.forward(ids)[-1])
    edges = flow.edges[flow.edges["kind"] == Kind.ATTENTION]
    assert len(edges) == 3 * (1 + 2 + 3)
    for edge in edges:
        edit = ZeroValue(int(edge["layer"]), int(edge["dst"]), int(edge["src"]))
        lost = whole - Goal(3, 3, 8).value(fed.forward(ids, edits=[edit])[-1])
        assert lost == pytest.approx(float(edge["weight"]), abs=1e-5)
    assert abs(edges["weight"][edges["layer"] == 2]).max() > 1e-3  # the last layer of earlier positions is read, too
    proof = flow.prune(top_k=4).verify(fed).proof
    assert proof is not None and proof.correlation == pytest.approx(1)


@pytest.mark.parametrize("measure", MEASURES)
def test_every_measure_has_its_flow_and_it_lies_within_reach(measure: str) -> None:
    fed = feedback("gemma3", "numpy")
    trace = run(fed, 7, 5)
    flow = trace.flow(fed, measure=measure, heads="merged")
    sampled, windows = [5, 6], flow.windows
    reached = reach.cone(7, windows, 4, 6, architecture="feedback", sampled=sampled)
    (below, _), used = flow.ends, np.flatnonzero(flow.influence > 0)
    states = [(int(below[i]), int(flow.edges["src"][i])) for i in used]
    assert len(used) and all(reached[row, pos] for row, pos in states if row < flow.rows - 1)
    most = reach.depth(7, windows, architecture="feedback", sampled=sampled)
    assert len(flow.longest_way().edges) - (flow.longest_way().edges["kind"] == Kind.SAMPLED).sum() <= most[4, 6]
    assert flow.prune(0.9).share >= 0.9 - 1e-9 and flow.states.shape == (6, 7)


@settings(max_examples=10, deadline=None)
@given(MADE)
def test_ways_are_counted_as_one_would_by_listing_them(shape: tuple[int, int, int, int]) -> None:
    fed, trace = small(*shape)
    flow = trace.flow(fed, measure="attention", heads="merged")
    listed, (below, _) = np.zeros((flow.rows, flow.at + 1), object), flow.ends
    for way in ways(flow):
        at = (int(below[way[-1]]), int(flow.edges["src"][way[-1]])) if way else (flow.n_layers, flow.at)
        listed[at] += 1
    assert (flow.count_ways() == listed).all()
    sampled = [pos for pos in range(flow.at + 1) if flow.tokens.sampled[pos]]
    possible = paths.possible(flow.at + 1, flow.windows, architecture="feedback", sampled=sampled)
    assert (possible == listed[:-1]).all()


def test_the_longest_way_takes_one_edge_to_each_position_and_each_has_more_ways_than_without() -> None:
    fed = feedback("llama", "numpy")
    flow = run(fed, 9).flow(fed, measure="attention", heads="merged")
    assert len(flow.longest_way().edges) == 8
    assert flow.count_ways()[-1, 7] == 3 and flow.count_ways()[0, 8] == 1  # the last memory is read by three layers
    assert flow.count_ways()[0, 0] > math.comb(8 + 2, 2)  # without feedback


@pytest.mark.parametrize("n", [1, 3])
def test_the_strongest_ways_are_the_strongest_of_all(n: int) -> None:
    fed, trace = small(3, 2, 4, 0)
    flow = trace.flow(fed, measure="norm", heads="merged")
    found: dict[tuple[int, ...], float] = {}
    for way in ways(flow):
        moves = tuple(i for i in reversed(way) if flow.edges["kind"][i] == Kind.ATTENTION)
        if moves and flow.edges["kind"][way[-1]] == Kind.ATTENTION:
            found[moves] = min(flow.influence[list(moves)])
    best = sorted(found.values(), reverse=True)[:n]
    assert [way.strength for way in flow.ways(n)] == pytest.approx(best)


def test_one_layer_with_feedback_is_a_straight_line_where_a_stack_is_a_staircase() -> None:
    """The same program, the same graph, the same code: each position reads the one before it, at the top or one layer below."""
    moves = [0, 1, 2, 2, 1, 2, 1]
    flows = []
    for machine in (FeedbackTransformer.of(automaton(5, 1, 20), top=True), automaton(5, 6, 20)):
        recorder = Recorder(level="states")
        machine.forward(moves, observer=recorder)
        assert recorder.trace.check() == []
        flows.append(recorder.trace.flow(machine, measure="target").prune(0.99))
    line, stairs = (sorted(flow.edges[flow.crossing][["layer", "dst", "src"]].tolist()) for flow in flows)
    assert line == [(0, pos + 1, pos) for pos in range(6)]
    assert stairs == [(pos, pos + 1, pos) for pos in range(6)]
    memories = flows[0].edges[flows[0].edges["kind"] == Kind.MEMORY]
    assert memories[["layer", "src"]].tolist() == [(1, pos) for pos in range(6)]  # of the top of the stack alone


def test_a_memory_has_an_id_in_the_graph_its_picture_and_its_json() -> None:
    fed = feedback("llama", "numpy")
    flow = run(fed).flow(fed).prune(0.8)
    names = {dot.name for dot in arrange(flow).dots if dot.name}
    assert "pos0.memory" in names and "pos5.memory" not in names and "layer3.pos5" in names
    strokes = [stroke.ends for stroke in arrange(flow).strokes if stroke.ends]
    assert ("layer0.pos0", "pos0.memory") in strokes
    positions = [[re.search(r"pos\d+", end)[0] for end in ends] for ends in strokes]  # type: ignore[index]
    assert all(ends[0].endswith(".memory") for ends, (src, dst) in zip(strokes, positions, strict=True) if src != dst)
    assert Flow.from_json(flow.to_json()).to_json() == flow.to_json()
    assert [panel.name for panel in panels(flow)] == ["this model: feedback memory", "standard"]
    below = flow.cone(1, 2)
    assert (below.edges["dst"] <= 2).all() and (below.edges["kind"] == Kind.MEMORY).any()


def test_a_flow_through_memory_needs_the_model() -> None:
    fed = feedback("llama", "numpy")
    with pytest.raises(TraceError, match="needs the model"):
        run(fed).flow(measure="attention")


def test_a_feedback_position_that_reads_itself_breaks_the_mask() -> None:
    trace = run(feedback("llama", "numpy"), level="writes")
    trace.steps[3].arrays["read_stop"][1] += 1
    assert trace.check()[0].law == "mask" and trace.check()[0].ids == ("layer1.pos3.pattern",)
