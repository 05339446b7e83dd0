"""SmolLM2's flow on one prompt, against cutting; and what is asked of a flow: ways, reach, exchange, selection."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from flows import Given, random_flow, random_patterns

import nanokv
from nanokv.edits import ZeroValue
from nanokv.errors import ModelNotFoundError, TraceError
from nanokv.trace import Flow, Recorder, cachemap, draw, paths, reach
from nanokv.trace.making import flow
from nanokv.trace.verify import spearman

PROMPT = "When Mary and John went to the store, John gave a drink to"
needs_program = pytest.mark.skipif(draw.find_program() is None, reason="no program to draw with")


def test_the_strongest_edges_of_target_turn_the_answer_of_smollm2() -> None:
    try:
        model = nanokv.load("smollm2-135m")
    except ModelNotFoundError as missing:
        pytest.skip(str(missing))
    ids, recorder = model.tokenizer.encode(PROMPT), Recorder(level="states")
    logits = model.forward(ids, observer=recorder)[-1]
    made = recorder.trace.flow(model, token=" Mary", against=" John")
    by_word = {0: 0.98, 1: 3.70, 3: -1.43, 9: 2.39}
    assert np.allclose([made.states[0, pos] for pos in by_word], list(by_word.values()), atol=0.01)
    assert np.abs(np.delete(made.states[0], list(by_word))).max() < 0.27
    assert made.states[0].sum() == pytest.approx(6.12, abs=0.01) and made.made.attention == 28350

    edges = made.edges[made.edges["kind"] <= 1]
    edges = edges[np.argsort(-edges["weight"], kind="stable")]
    mary, john = ids[1], ids[3]

    def change(cut: np.ndarray) -> float:
        edits = [ZeroValue(int(e["layer"]), int(e["dst"]), int(e["src"]), int(e["head"])) for e in cut]
        after = model.forward(ids, edits=edits)[-1]
        return float(after[mary] - after[john] - (logits[mary] - logits[john]))

    assert change(edges[:10]) == pytest.approx(-7.07, abs=0.01)
    assert change(edges[:20]) == pytest.approx(-10.14, abs=0.01)
    draws = np.random.default_rng(0)
    by_chance = sorted(change(draws.choice(edges, 10, replace=False)) for _ in range(12))
    assert by_chance[0] > -0.4 and by_chance[-1] < 0.3
    proof = made.prune(top_k=30).verify(model).proof
    assert proof is not None and proof.flips and proof.steps[-1].n == 6 and proof.steps[-1].answer == " John"
    assert proof.like_steps.answer == " Mary" and proof.correlation > 0.75


def test_ranks_correlate_as_they_should() -> None:
    assert spearman(np.array([1, 2, 3]), np.array([10, 20, 30])) == pytest.approx(1)
    assert spearman(np.array([1, 2, 3]), np.array([3, 2, 1])) == pytest.approx(-1)
    assert math.isnan(spearman(np.ones(3), np.arange(3)))


def test_ways_are_counted_exactly_and_none_is_longer_than_the_model_is_deep() -> None:
    made = random_flow(1, 5, 1, 7, heads="merged")
    assert made.count_ways()[0].tolist() == [*(math.comb(6 - pos + 4, 4) for pos in range(6)), 1]
    assert len(made.longest_way().edges) == 5
    strengths = [way.strength for way in made.ways(6)]
    assert strengths == sorted(strengths, reverse=True) and len(strengths) == 6


@pytest.mark.parametrize("sampled", [(), (3, 5)])
def test_as_many_ways_are_possible_as_a_flow_of_all_edges_has(sampled: tuple[int, ...]) -> None:
    made = random_flow(1, 3, 1, 6, heads="merged", sampled=sampled)
    assert (paths.possible(6, [None] * 3, sampled=sampled) == made.count_ways()).all()


def test_ways_are_counted_exactly_over_any_distance_and_a_window_leaves_fewer() -> None:
    counts = paths.possible(65, [None] * 30)[0]
    assert counts[0] == math.comb(64 + 29, 29) and counts[63] == 30 and counts[64] == 1
    assert paths.possible(5, [2] * 3)[0].tolist() == [0, *(math.comb(3, 4 - pos) for pos in range(1, 5))]


def test_depth_grows_with_feedback_and_not_with_tokens() -> None:
    assert reach.depth(6, [None] * 4)[-1].tolist() == [4] * 6
    assert reach.depth(6, [None] * 4, architecture="feedback")[-1].tolist() == [4, 8, 12, 16, 20, 24]
    assert reach.depth(6, [None] * 4, sampled=(3, 5))[-1].tolist() == [4, 4, 4, 8, 8, 12]


@pytest.mark.parametrize("windows", [[None] * 3, [2, 3, 2]])
@pytest.mark.parametrize("architecture", ["standard", "feedback"])
@pytest.mark.parametrize("sampled", [(), (2, 4)])
def test_what_can_reach_a_state_is_what_it_can_be_reached_from(
    windows: list[int | None], architecture: reach.Architecture, sampled: tuple[int, ...]
) -> None:
    n, states = 5, [(layer, pos) for layer in range(4) for pos in range(5)]
    up, down = (
        np.stack([reach.cone(n, windows, *state, direction=way, architecture=architecture, sampled=sampled).reshape(-1)
                  for state in states])
        for way in ("up", "down")
    )  # fmt: skip
    assert np.array_equal(up, down.T)


def test_a_flow_comes_back_from_json_and_networkx() -> None:
    made = random_flow(1, 3, 2, 6, sampled=(4, 5)).prune(0.7)
    again = Flow.from_json(made.to_json())
    assert again.edges.tobytes() == made.edges.tobytes() and again.to_json() == made.to_json()
    pytest.importorskip("networkx")
    assert Flow.from_networkx(made.to_networkx()).edges.tobytes() == made.edges.tobytes()
    with pytest.raises(TraceError, match="no flow that to_json wrote"):
        Flow.from_json("{}")


def test_a_flow_can_be_narrowed() -> None:
    made = random_flow(0, 4, 2, 6)
    some = made.select(layers=(1, 2), src=[1, 2])
    edges = some.edges[some.crossing]
    assert set(edges["layer"]) == {1, 2} and set(edges["src"]) == {1, 2} and some.notes
    below = made.cone(2, 3)
    assert (below.edges["layer"] < 2).all() and (below.edges["dst"] <= 3).all()
    assert (made.cone(2, 3, "up").edges["layer"] >= 2).all()


def test_a_run_less_itself_is_nothing_and_less_another_what_differs() -> None:
    a, b = (flow(Given(random_patterns(seed, 2, 2, 5)), measure="attention") for seed in (0, 1))
    assert not a.minus(a).edges["weight"].any()
    made = a.minus(b)
    assert made.edges["weight"].min() < 0 < made.edges["weight"].max() and "difference" in made.measure


@needs_program
def test_every_kind_of_picture_is_drawn_in_both_themes_and_at_a_width(tmp_path: Path) -> None:
    made = random_flow(0, 3, 2, 9, sampled=(7, 8))
    for kind in ("graph", "heat", "pyramid"):
        for theme in ("light", "dark"):
            svg = made.render(tmp_path / "a.svg", kind=kind, theme=theme, width=84).read_text()
            assert ("#14171a" in svg.lower()) == (theme == "dark")
    model = nanokv.load("induction")
    recorder = Recorder()
    model.forward(model.tokenizer.encode("a b a"), observer=recorder)
    assert cachemap.render(recorder.trace, tmp_path / "c.svg").read_text().startswith("<?xml")
