"""The hand-made models do exactly what they were built for."""

from __future__ import annotations

import numpy as np
import pytest

from nanokv.edits import Cut
from nanokv.handmade import automaton, induction
from nanokv.trace import Recorder


def induced(ids: list[int]) -> list[int]:
    """What an induction head says: what followed the last place where the same token stood, else the first token."""
    said = []
    for t, token in enumerate(ids):
        after = [s for s in range(1, t + 1) if ids[s - 1] == token]
        said.append(ids[max(after)] if after else ids[0])
    return said


@pytest.mark.parametrize("ops", ["numpy", "numba"])
def test_three_hundred_random_sequences_are_continued_without_an_error_by_weights_of_zero_and_one(ops: str) -> None:
    model, random = induction(12, 24, ops=ops), np.random.default_rng(0)
    for _ in range(300):
        ids = [0, *random.integers(1, 12, 23).tolist()]
        recorder = Recorder(level="weights")
        logits = model.forward(ids, observer=recorder)
        assert logits.argmax(axis=1).tolist() == induced(ids)
        assert set(np.unique(recorder.trace.reads["weight"])) == {0.0, 1.0}


@pytest.mark.parametrize("ops", ["numpy", "numba"])
def test_of_all_edges_two_carry_the_prediction(ops: str) -> None:
    """Position 2 learns in layer 0 that it comes after a 3; position 5, a 3 itself, reads it in layer 1 and copies its 7."""
    model, ids = induction(12, 24, ops=ops), [0, 3, 7, 5, 9, 3]
    clean = model.forward(ids)[5]
    assert clean.argmax() == 7
    edges = [(layer, dst, src) for layer in range(2) for dst in range(6) for src in range(dst + 1)]
    changing = {edge for edge in edges if not np.array_equal(model.forward(ids, edits=[Cut(*edge)])[5], clean)}
    assert changing == {(0, 2, 1), (1, 5, 2)}


def test_the_default_induction_model_takes_its_words_from_the_prompt() -> None:
    model = induction()
    ids = model.tokenizer.encode("the cat sat on the mat and the cat")
    assert model.tokenizer.piece(int(model.forward(ids)[-1].argmax())) == "sat"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_automaton_knows_the_state_of_position_t_after_t_layers_and_nothing_before(dtype: type) -> None:
    """The pyramid: a plan moves up one layer with each token that it has to go through."""
    model, random = automaton(5, 8, 40, dtype), np.random.default_rng(0)
    recorder = Recorder(level="states")
    ids = [0, *random.integers(1, 3, 39).tolist()]
    model.forward(ids, observer=recorder)
    states = model.forward([0])[0].size - 3
    known = np.zeros(states)
    known[0] = 1
    truth = [known]
    for token in ids[1:]:
        truth.append(automaton_step(truth[-1], token))
    for layer in range(9):
        for t in range(40):
            state = recorder.trace[f"layer{layer}.pos{t}"][:states]
            assert np.array_equal(state, truth[t] if t <= layer else np.zeros(states))


def automaton_step(state: np.ndarray, token: int) -> np.ndarray:
    """The next state by multiplying the permutations, not by the model's weights."""
    from itertools import permutations

    perms = list(permutations(range(5)))
    move = {1: (1, 0, 2, 3, 4), 2: (1, 2, 3, 4, 0)}[token]
    now = perms[int(state.argmax())]
    after = np.zeros(len(perms))
    after[perms.index(tuple(now[i] for i in move))] = 1
    return after
