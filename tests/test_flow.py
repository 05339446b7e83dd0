"""The flow: its edges, their influence, and what pruning keeps. Small ones are checked against every path, one by one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
from flows import Given, random_flow, random_patterns, weights_of
from hypothesis import given, settings
from hypothesis import strategies as st

from nanokv import handmade
from nanokv.errors import TraceError
from nanokv.trace import Flow, Recorder, draw, making
from nanokv.trace.flow import EDGE, Count, Kind, Sink
from nanokv.trace.making import flow

State = tuple[int, int]  # row, position
SMALL = st.builds(
    random_flow,
    seed=st.integers(0, 10**6),
    n_layers=st.integers(1, 2),
    n_heads=st.integers(1, 2),
    n=st.integers(1, 4),
    sampled=st.sampled_from([(), (3,), (2,)]),
    sinks=st.sampled_from([(), (0,)]),
)


def ends(flow: Flow, i: int) -> tuple[State, State]:
    """The states that edge i leads from and to."""
    edge = flow.edges[i]
    return (int(edge["layer"]) % (flow.n_layers + 1), int(edge["src"])), (int(edge["layer"]) + 1, int(edge["dst"]))


def ways(flow: Flow) -> Iterator[list[int]]:
    """Every way back from the prediction, as the list of its edges, and each of its beginnings. MLP edges lead nowhere."""
    into = defaultdict(list)
    for i in range(len(flow.edges)):
        if flow.edges["kind"][i] != Kind.MLP:
            into[ends(flow, i)[1]].append(i)
    stack = [((flow.n_layers, flow.at), list[int]())]
    while stack:
        at, way = stack.pop()
        yield way
        stack += [(ends(flow, i)[0], [*way, i]) for i in into[at]]


def shares(flow: Flow) -> np.ndarray:
    """Each edge's part of what comes into its state, edges from sinks aside."""
    weight = np.where(flow.from_sinks, 0, np.abs(flow.edges["weight"].astype(float)))
    total: dict[State, float] = defaultdict(float)
    for i in range(len(weight)):
        total[ends(flow, i)[1]] += weight[i]
    return np.array([weight[i] / total[ends(flow, i)[1]] for i in range(len(weight))])


def hand_made(text: str, level: str = "states", new: int = 0) -> tuple[Flow, Flow]:
    """The flows by attention and by norm of the induction model on a text."""
    model = handmade.induction(vocab_size=32, n_ctx=32)
    recorder, cache = Recorder(level=level), model.new_cache()
    logits = model.forward(model.tokenizer.encode(text), cache, observer=recorder)
    recorder.turn("model", sampled=True)
    for _ in range(new):
        logits = model.forward(np.array([int(logits[-1].argmax())], np.int32), cache, observer=recorder)
    return tuple(recorder.trace.flow(model, measure=measure) for measure in ("attention", "norm"))  # type: ignore[return-value]


def test_the_edges_are_a_table_of_kinds_layers_heads_and_positions() -> None:
    made = random_flow(n_layers=2, n_heads=3, n=4, sampled=(3,))
    assert made.edges.dtype == EDGE and EDGE.names == ("kind", "layer", "head", "dst", "src", "weight")
    counts = {kind: int((made.edges["kind"] == kind).sum()) for kind in Kind}
    pairs = 4 * 3 // 2
    expected = {Kind.ATTENTION: 2 * 3 * pairs, Kind.SELF: 2 * 3 * 4, Kind.RESIDUAL: 2 * 4, Kind.SAMPLED: 1}
    assert counts == expected | {Kind.MLP: 0, Kind.MEMORY: 0}
    assert made.made == Count(crossing=2 * 3 * pairs, sinks=0, selves=2 * 3 * 4, others=2 * 4 + 1)
    assert (made.edges["src"] <= made.edges["dst"]).all()


def test_merged_heads_have_no_number_but_the_only_head_of_a_model_has() -> None:
    assert set(random_flow(n_heads=2, heads="merged").edges["head"]) == {-1}
    one = random_flow(n_heads=1)
    assert set(one.edges["head"][one.crossing]) == {0}


def test_the_flow_ends_at_the_position_that_was_asked_for() -> None:
    made = random_flow(n=5, at=2)
    assert made.at == 2 and len(made.tokens) == 3 and made.edges["dst"].max() == 2
    assert random_flow(n=5, at=-3).at == 2


def test_the_same_trace_gives_the_same_flow() -> None:
    a, b = (random_flow(3, 2, 2, 6, sampled=(4, 5)).prune(0.7) for _ in range(2))
    assert a.edges.tobytes() == b.edges.tobytes() and a.influence.tobytes() == b.influence.tobytes()


@settings(max_examples=40, deadline=None)
@given(SMALL)
def test_influence_is_the_sum_over_all_ways_through_an_edge(made: Flow) -> None:
    share, expected = shares(made), np.zeros(len(made.edges))
    for way in ways(made):
        if way:
            expected[way[-1]] += np.prod(share[way])
    np.testing.assert_allclose(made.influence, expected, atol=1e-12)


def test_what_reaches_the_prediction_is_the_same_at_every_layer() -> None:
    made = random_flow(1, 4, 3, 6)
    for layer in range(4):
        assert made.influence[made.edges["layer"] == layer].sum() == pytest.approx(1)


def test_what_comes_through_an_mlp_goes_on_to_what_it_read() -> None:
    values, wo = np.ones((1, 2, 1, 1)), np.array([[[1.0], [0], [0], [0]]])
    stream = {"resid_pre": [[[3, 0, 0, 0]] * 2], "mlp_out": [[[0, 4, 0, 0]] * 2]}
    trace = Given([[[[1, 0], [1, 0]]]], level="states", values=values, states=stream)
    made = flow(trace, SimpleNamespace(config=trace.config, weights=weights_of(wo), tokenizer=None), measure="norm", sinks=())
    at_one = {Kind(edge["kind"]): inf for edge, inf in zip(made.edges, made.influence, strict=True) if edge["dst"] == 1}
    # Attention brings 1, the residual 3, the MLP 4: half comes through the MLP, and all of it from the other two.
    assert at_one == pytest.approx({Kind.ATTENTION: 1 / 4, Kind.RESIDUAL: 3 / 4, Kind.MLP: 1 / 2})


def test_a_sampled_edge_carries_all_that_the_embedding_gives() -> None:
    made = random_flow(0, 1, 1, 3, sampled=(2,))
    (sampled,) = np.flatnonzero(made.edges["kind"] == Kind.SAMPLED)
    from_embedding = (made.edges["layer"] == 0) & (made.edges["src"] == 2)
    assert made.influence[sampled] == pytest.approx(made.influence[from_embedding].sum())
    assert ends(made, int(sampled)) == ((1, 1), (0, 2))


@settings(max_examples=60, deadline=None)
@given(SMALL, st.floats(0, 1))
def test_pruning_keeps_just_enough_and_only_what_leads_to_the_prediction(made: Flow, share: float) -> None:
    kept = made.prune(share)
    assert kept.share >= share - 1e-9
    assert kept.share == pytest.approx(made.influence[_positions(made, kept)].sum() / made.total if made.total else 1)
    on_ways = {i for way in ways(kept) for i in way}
    assert set(np.flatnonzero(kept.crossing)) <= on_ways
    assert set(np.flatnonzero(kept.edges["kind"] == Kind.RESIDUAL)) <= on_ways

    # The weakest link of the strongest way, from all ways: what was left out has none better than what was taken.
    link = np.zeros(len(made.edges))
    for way in ways(made):
        crossed = [i for i in way if made.crossing[i]]
        if way and made.crossing[way[-1]]:
            link[way[-1]] = max(link[way[-1]], made.influence[crossed].min())
    taken = np.zeros(len(made.edges), bool)
    taken[_positions(made, kept)] = True
    left = made.crossing & ~taken
    if taken.any():
        assert link[left].max(initial=0) <= link[taken].min() + 1e-12
        weakest = made.influence[taken & (link <= link[taken].min() + 1e-12)]
        assert made.influence[taken].sum() - weakest.max() < share * made.total + 1e-9


def _positions(made: Flow, kept: Flow) -> np.ndarray:
    """Where the kept crossing edges stand in the table of the flow that was pruned."""
    names = made.edges[["kind", "layer", "head", "dst", "src"]].tolist()
    return np.array(
        [names.index(name) for name in kept.edges[["kind", "layer", "head", "dst", "src"]][kept.crossing].tolist()], int
    )


def test_every_kept_column_reaches_down_to_its_token() -> None:
    kept = random_flow(2, 3, 2, 6).prune(0.5)
    columns = defaultdict(set)
    for edge in kept.edges[kept.edges["kind"] == Kind.RESIDUAL]:
        columns[int(edge["src"])].add(int(edge["layer"]))
    assert columns[kept.at] == {0, 1, 2}
    for layers in columns.values():
        assert layers == set(range(max(layers) + 1))


def test_the_numbers_say_what_was_dropped() -> None:
    made = random_flow(0, 3, 2, 6)
    kept = made.prune(0.6)
    assert kept.made == made.made
    assert kept.dropped.crossing + int(kept.crossing.sum()) == made.made.crossing
    assert kept.dropped.others + kept.dropped.selves + int((~kept.crossing).sum()) == made.made.others + made.made.selves
    assert made.dropped == Count() and made.share == pytest.approx(1)


def test_pruning_twice_is_pruning_once_by_the_narrower_limit() -> None:
    made = random_flow(4, 3, 2, 6)
    once, twice = made.prune(0.4), made.prune(0.8).prune(0.4)
    assert once.edges.tobytes() == twice.edges.tobytes() and once.dropped == twice.dropped
    assert once.share == pytest.approx(twice.share)


def test_whichever_limit_comes_first_holds() -> None:
    made = random_flow(5, 3, 2, 6)
    assert made.prune(1.0, top_k=7).crossing.sum() == 7
    assert made.prune(0.5, top_k=10**6).edges.tobytes() == made.prune(0.5).edges.tobytes()
    strong = made.prune(1.0, threshold=0.03)
    assert 0 < strong.crossing.sum() < made.prune(1.0).crossing.sum()
    assert strong.influence[strong.crossing].min() >= 0.03
    nothing = made.prune(0.0)
    assert not nothing.crossing.any() and (nothing.edges["dst"] == nothing.at).all()


def test_limits_that_make_no_sense_are_refused() -> None:
    made = random_flow()
    for limits in ({"share": 1.5}, {"share": -0.1}, {"share": float("nan")}, {"top_k": -1}):
        with pytest.raises(TraceError, match=r"share is|top_k is"):
            made.prune(**limits)


def test_a_sampled_edge_stays_where_both_its_positions_are_used() -> None:
    made = random_flow(0, 2, 2, 6, sampled=(4, 5))
    kept = made.prune(1.0)
    assert sorted(kept.edges["src"][kept.edges["kind"] == Kind.SAMPLED]) == [3, 4]
    alone = made.prune(0.0)
    assert not (alone.edges["kind"] == Kind.SAMPLED).any()


def test_one_token_alone_is_a_flow_too() -> None:
    made = random_flow(0, 2, 1, 1)
    assert made.share == 1 and made.prune().share == 1 and not made.crossing.any()
    assert set(made.prune().edges["kind"]) >= {Kind.RESIDUAL}


def test_the_induction_model_is_explained_by_the_edges_that_it_uses() -> None:
    for made in hand_made("a b c a"):
        kept = made.prune()
        edges = {tuple(edge) for edge in kept.edges[kept.crossing][["layer", "dst", "src"]].tolist()}
        # The last a reads what followed the first one; b's own token got there through its residual.
        assert (1, 4, 2) in edges
        assert made.prediction.text.strip() == "b"


def sink_patterns(n: int = 8) -> np.ndarray:
    """Two layers of two heads that give position 0 most of their attention."""
    patterns = 0.3 * random_patterns(0, 2, 2, n)
    patterns[..., 0] += 0.7
    return patterns


def sink_trace(length: float, n: int = 8) -> tuple[Given, SimpleNamespace]:
    """Its values are of length 1, but for position 0."""
    rng = np.random.default_rng(1)
    values = np.ones((2, n, 2, 1))
    values[:, 0] = length
    stream = {site: rng.standard_normal((2, n, 4)) for site in ("resid_pre", "mlp_out")}
    trace = Given(sink_patterns(n), level="states", values=values, states=stream)
    return trace, SimpleNamespace(config=trace.config, weights=weights_of(rng.standard_normal((2, 4, 2))), tokenizer=None)


def test_a_position_that_draws_much_and_gives_little_is_a_sink() -> None:
    trace, shaped = sink_trace(0.1)
    for measure in ("attention", "norm"):
        made = flow(trace, shaped, measure=measure)
        assert [sink.pos for sink in made.sinks] == [0] and 0.7 < made.sinks[0].share < 0.9


def test_by_norm_a_position_that_gives_as_much_as_others_is_none() -> None:
    trace, shaped = sink_trace(1.0)
    assert flow(trace, shaped, measure="norm").sinks == ()
    assert len(flow(trace, shaped, measure="attention").sinks) == 1  # attention alone cannot know


def test_even_attention_makes_no_sink_in_a_model_of_which_a_layer_looks_elsewhere() -> None:
    for made in hand_made("a b c d e f g h"):
        assert made.sinks == ()


def test_edges_from_a_sink_carry_no_influence_and_are_pruned() -> None:
    made = flow(sink_trace(0.1)[0], measure="attention")
    assert made.made.sinks == 2 * 2 * 7 and made.from_sinks.sum() == made.made.sinks
    assert not made.influence[made.from_sinks].any() and not made.crossing[made.from_sinks].any()
    kept = made.prune(1.0)
    assert not kept.from_sinks.any() and kept.dropped.sinks == made.made.sinks and kept.share == pytest.approx(1)


def test_which_positions_are_sinks_can_be_said() -> None:
    trace, _ = sink_trace(0.1)
    assert flow(trace, measure="attention", sinks=()).sinks == ()
    chosen = flow(trace, measure="attention", sinks=[2]).sinks
    assert [type(sink) for sink in chosen] == [Sink] and chosen[0].pos == 2


def test_the_likeliest_token_is_explained_unless_another_is_named() -> None:
    logits = np.log([0.5, 0.25, 0.125, 0.125] + [1e-9] * 46)
    trace = Given(random_patterns(0, 1, 1, 3), ["a", "b", "c"], level="states", logits=logits)
    best = flow(trace, measure="attention").prediction
    assert (best.token_id, best.text) == (0, "a") and best.probability == pytest.approx(0.5)
    for token in (1, "b"):
        named = flow(trace, measure="attention", token=token).prediction
        assert (named.token_id, named.text) == (1, "b") and named.probability == pytest.approx(0.25)
    assert flow(trace, measure="attention", token=30).prediction.text == "#30"


def test_a_model_with_a_tokenizer_knows_the_text_of_every_token() -> None:
    spell = SimpleNamespace(encode=lambda text: [ord(c) - 97 for c in text], piece=lambda token: chr(97 + token))
    trace = Given(random_patterns(0, 1, 1, 3), level="states", logits=np.eye(50)[3])
    shaped = SimpleNamespace(tokenizer=spell)
    assert flow(trace, shaped, measure="attention").prediction.text == "d"
    assert flow(trace, shaped, measure="attention", token="e").prediction.token_id == 4
    spell.encode = lambda text: [0, *(ord(c) - 97 for c in text)]  # one that begins every text with <bos>
    assert flow(trace, shaped, measure="attention", token="e").prediction.token_id == 4
    with pytest.raises(TraceError, match="'ab' is 2 tokens"):
        flow(trace, shaped, measure="attention", token="ab")


def test_without_logits_the_drawn_token_is_what_was_predicted() -> None:
    trace = Given(random_patterns(0, 1, 1, 3), ["a", "b", "c"], sampled=(2,))
    assert flow(trace, measure="attention", at=1).prediction.text == "c"
    unknown = flow(trace, measure="attention").prediction
    assert unknown.token_id is None and unknown.probability is None


def test_what_the_trace_does_not_hold_is_an_error_that_says_so() -> None:
    trace = Given(random_patterns(0, 1, 1, 3))
    for asked, message in (
        ({"at": 3}, "no position 3: it has 3 tokens, at 0 to 2"),
        ({"at": -4}, "no position -4"),
        ({"heads": "both"}, "heads is 'both'"),
        ({"against": 1}, "'attention' is the same whatever is predicted"),
        ({"token": "zebra"}, "'zebra' is 0 tokens"),
        ({"token": 50}, "token id 50 is outside the vocabulary, 0 to 49"),
    ):
        with pytest.raises(TraceError, match=message):
            flow(trace, measure="attention", **asked)  # type: ignore[arg-type]


def test_of_more_edges_than_it_may_keep_a_flow_keeps_the_strongest_and_counts_others(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = random_flow(0, 3, 2, 6)
    monkeypatch.setattr(making, "MOST_EDGES", 30)
    made = random_flow(0, 3, 2, 6)
    attention = (made.edges["kind"] == Kind.ATTENTION) | (made.edges["kind"] == Kind.SELF)
    assert attention.sum() == 30 and made.made == whole.made and made.dropped.crossing + made.dropped.selves == 126 - 30
    there = (whole.edges["kind"] == Kind.ATTENTION) | (whole.edges["kind"] == Kind.SELF)
    np.testing.assert_allclose(np.sort(made.influence[attention]), np.sort(whole.influence[there])[-30:])
    assert made.share < 1 and made.share == pytest.approx(made.influence[made.crossing].sum() / whole.total)


def test_weights_that_are_not_finite_are_refused() -> None:
    patterns = random_patterns(0, 2, 1, 3)
    patterns[1, 0, 2, 1] = np.nan
    with pytest.raises(TraceError, match="layer 1 are not all finite"):
        flow(Given(patterns), measure="attention")


def test_the_table_names_the_strongest_edges_in_words() -> None:
    lines = random_flow(0, 2, 2, 4, sampled=(3,)).table(5).splitlines()
    assert "50 attention edges" not in lines[0] and "24 of 40 attention edges" in lines[0]
    assert len(lines) == 2 + 5 and any("layer 1 head" in line and "->" in line for line in lines)
    shown = [float(line.split("%")[0]) for line in lines[2:]]
    assert shown == sorted(shown, reverse=True)


def test_a_notebook_shows_the_picture_or_else_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    made = random_flow()
    monkeypatch.setattr(draw, "find_program", lambda: None)
    assert made._repr_mimebundle_() == {"text/plain": made.table()}
