"""SmolLM2-135M against what Hugging Face transformers 5.24 (torch 2.13, CPU, float32, eager attention) gives for the same
weights, dequantised: `tests/data/smollm2.json`, made apart from this project."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nanokv
from nanokv.errors import ModelNotFoundError
from nanokv.trace import Recorder
from nanokv.transformer import Transformer

GOLDEN = json.loads((Path(__file__).parent / "data" / "smollm2.json").read_text())


@pytest.fixture(scope="module")
def smollm2() -> Transformer:
    try:
        return nanokv.load("smollm2-135m")
    except ModelNotFoundError as missing:
        pytest.skip(str(missing))


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("name", GOLDEN)
def test_ids_logits_and_likelihoods_are_those_of_transformers(smollm2: Transformer, name: str) -> None:
    golden: dict[str, Any] = GOLDEN[name]
    ids = smollm2.tokenizer.encode(golden["text"])
    assert ids.tolist() == golden["ids"]
    logits = smollm2.forward(ids)
    for row, best in zip(logits[-len(golden["top5_logits"]) :], golden["top5_logits"], strict=True):
        assert max(abs(row[token] - logit) for token, logit in best) < 5e-4
        assert row.argmax() == best[0][0]
    nll = -log_probabilities(logits)[np.arange(len(ids) - 1), ids[1:]]
    assert np.allclose(nll, golden["nll"], atol=5e-4)
    if len(nll):
        assert abs(nll.mean() - golden["mean_nll"]) < 1e-4


@pytest.mark.parametrize("name", ["ioi", "unicode"])
def test_states_and_weights_are_those_of_transformers(smollm2: Transformer, name: str) -> None:
    golden, recorder = GOLDEN[name], Recorder(level="states")
    smollm2.forward(golden["ids"], observer=recorder)
    trace, last = recorder.trace, len(golden["ids"]) - 1
    for layer, first8 in golden["resid_pre_last_position_first8"].items():
        assert np.allclose(trace[f"layer{layer}.pos{last}"][:8], first8, atol=2e-3, rtol=1e-4)
    for layer, weights in golden["pattern_last_query_head0"].items():
        assert np.allclose(trace.pattern(int(layer))[0, last], weights, atol=1e-4)


def test_the_capital_of_france_is_paris(smollm2: Transformer) -> None:
    tokens = smollm2.tokenizer.encode("The capital of France is")
    assert smollm2.tokenizer.decode(nanokv.generate(smollm2, tokens, max_new_tokens=1)) == " Paris"
