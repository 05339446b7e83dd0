"""nanokv against an independent implementation: the numbers that Hugging Face transformers gives for tiny random checkpoints.

`tests/checkpoints/make_checkpoints.py` made them; their sizes and weights are chosen so that wrong code shows.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import nanokv
from nanokv.safetensors_file import open_safetensors
from nanokv.trace import Recorder

FOLDER = Path(__file__).parent / "checkpoints"
FAMILIES = sorted(path.parent.name for path in FOLDER.glob("*/expected.safetensors"))


def expected(family: str) -> dict[str, np.ndarray]:
    tensors, _ = open_safetensors(FOLDER / family / "expected.safetensors")
    kinds = {"F32": np.float32, "F64": np.float64, "I32": np.int32}
    return {name: tensor.raw.view(kinds[tensor.kind]).reshape(tensor.shape) for name, tensor in tensors.items()}


def test_every_family_that_nanokv_claims_has_a_checkpoint() -> None:
    assert FAMILIES == ["gemma3", "gemma3_scaled", "gpt2", "llama", "llama3", "llama_bias", "qwen2", "qwen3"]


@pytest.mark.parametrize("ops", ["numpy", "numba"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family: str, ops: str) -> None:
    model, want = nanokv.load(FOLDER / family, ops=ops), expected(family)
    for tokens, logits in (("tokens", "logits"), ("tokens_long", "logits_long")):
        assert np.abs(model.forward(want[tokens]) - want[logits]).max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_in_float64_the_logits_are_those_of_transformers_to_rounding(family: str) -> None:
    given = nanokv.load(FOLDER / family, ops="numpy")
    double = given.weights.map(lambda array: np.asarray(array, np.float64))
    model, want = nanokv.Transformer(given.config, double, ops="numpy"), expected(family)
    rounded = family.startswith("gemma3")  # its 1 + w and sqrt(D) are float32 here, and sqrt(D) there, too
    assert np.abs(model.forward(want["tokens"]) - want["logits_f64"]).max() < (1e-5 if rounded else 1e-10)


@pytest.mark.parametrize("ops", ["numpy", "numba"])
@pytest.mark.parametrize("family", FAMILIES)
def test_states_weights_and_the_cache_are_those_of_transformers(family: str, ops: str) -> None:
    model, want = nanokv.load(FOLDER / family, ops=ops), expected(family)
    recorder, cache = Recorder(level="states"), model.new_cache()
    model.forward(want["tokens"], cache, observer=recorder)
    trace = recorder.trace
    for layer in range(model.config.n_layers):
        assert np.abs(trace.state("resid_pre", layer) - want["hidden_states"][layer]).max() < 2e-5
        assert np.abs(trace.pattern(layer) - want["attentions"][layer]).max() < 1e-5
        assert np.abs(cache.keys(layer) - want["keys"][layer]).max() < 2e-5
        assert np.abs(cache.values(layer) - want["values"][layer]).max() < 2e-5
    assert np.abs(trace.state("resid_post", model.config.n_layers - 1) - want["resid_post_last"]).max() < 2e-5
