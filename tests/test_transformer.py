"""Laws of the forward pass: one path, however the tokens come, and an error leaves everything as it was."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from models import CONFIGS, model, tokens

from nanokv.cache import KVCache
from nanokv.config import Config
from nanokv.edits import Add, Cut, Replace, ZeroValue, transplant
from nanokv.errors import ConfigError, ContextFullError, EditError, EmptyPromptError, TokenError, WeightsError
from nanokv.trace import Recorder
from nanokv.transformer import Transformer, Unobserved
from nanokv.weights import Weights


def splits(n: int) -> list[list[int]]:
    """Every way to split n tokens into calls: the 2^(n-1) lists of lengths."""
    ways = []
    for cuts in product([False, True], repeat=n - 1):
        ends = [i + 1 for i, cut in enumerate(cuts) if cut] + [n]
        ways.append([b - a for a, b in zip([0, *ends], ends, strict=False)])
    return ways


class States(Unobserved):
    """Collects what a pass reports, by site, layer and position."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, int, int], np.ndarray] = {}

    def state(self, site: str, layer: int, start: int, x: np.ndarray) -> None:
        self.rows |= {(site, layer, start + i): row for i, row in enumerate(x)}

    def write(self, layer: int, start: int, k: np.ndarray, v: np.ndarray) -> None:
        self.state("k", layer, start, k)
        self.state("v", layer, start, v)


def run_in_parts(small: Transformer, ids: np.ndarray, lengths: list[int]) -> tuple[np.ndarray, KVCache, States]:
    cache, states, logits, at = small.new_cache(), States(), [], 0
    for n in lengths:
        logits.append(small.forward(ids[at : at + n], cache, observer=states))
        at += n
    return np.concatenate(logits), cache, states


@pytest.mark.parametrize("ops", ["numpy", "numba"])
@pytest.mark.parametrize("family", CONFIGS)
def test_cached_equals_recomputed_at_every_layer_for_every_split_of_seven_tokens(family: str, ops: str) -> None:
    small, ids = model(CONFIGS[family], ops=ops), tokens(CONFIGS[family], 7)
    whole, _, states = run_in_parts(small, ids, [7])
    for lengths in splits(7):
        logits, _, other = run_in_parts(small, ids, lengths)
        assert np.abs(logits - whole).max() < 1e-4
        assert states.rows.keys() == other.rows.keys()
        assert max(np.abs(states.rows[key] - other.rows[key]).max() for key in states.rows) < 1e-4


@pytest.mark.parametrize("family", CONFIGS)
def test_the_compiled_kernels_agree_with_the_readable_operations(family: str) -> None:
    ids = tokens(CONFIGS[family], 40)
    fast, _, fast_states = run_in_parts(model(CONFIGS[family]), ids, [40])
    slow, _, slow_states = run_in_parts(model(CONFIGS[family], ops="numpy"), ids, [40])
    assert np.abs(fast - slow).max() < 1e-4
    assert max(np.abs(fast_states.rows[key] - slow_states.rows[key]).max() for key in fast_states.rows) < 1e-4


def test_last_logits_only_gives_the_last_row() -> None:
    small, ids = model(CONFIGS["llama"]), tokens(CONFIGS["llama"], 7)
    assert np.array_equal(small.forward(ids, last_logits_only=True), small.forward(ids)[-1:])


def test_the_logits_are_float32_and_the_cache_is_too() -> None:
    small = model(CONFIGS["llama"], ops="numpy")
    cache = small.new_cache()
    assert small.forward([1, 2], cache).dtype == np.float32
    assert cache.keys(0).dtype == cache.values(0).dtype == np.float32


def test_a_sliding_layer_does_not_see_past_its_window() -> None:
    config = Config(1, 2, 1, 4, 8, 8, 30, 64, window=3, sliding=(True,))
    small, ids = model(config), tokens(config, 12)
    changed = ids.copy()
    changed[:9] = (changed[:9] + 1) % 30
    assert np.array_equal(small.forward(ids)[11], small.forward(changed)[11])
    changed[9] = (changed[9] + 1) % 30
    assert not np.array_equal(small.forward(ids)[11], small.forward(changed)[11])


@pytest.mark.parametrize("ops", ["numpy", "numba"])
def test_a_cut_edge_has_weight_zero_and_the_others_share_what_it_had(ops: str) -> None:
    small, ids = model(CONFIGS["llama"], ops=ops), tokens(CONFIGS["llama"], 6)

    class Patterns(Unobserved):
        def wants(self, site: str) -> bool:
            return site == "pattern"

        def read(self, layer: int, start: int, slots: Any, scores: Any, weights: Any) -> None:
            self.__dict__.setdefault("rows", []).append(weights)

    clean, cut = Patterns(), Patterns()
    small.forward(ids, observer=clean)
    small.forward(ids, observer=cut, edits=[Cut(layer=0, head=4, dst=3, src=1)])
    row = slice(6, 10)  # the reads of position 3 stand after those of 0, 1 and 2
    before, after = clean.rows[0][4, row], cut.rows[0][4, row]
    assert after[1] == 0
    assert np.allclose(np.delete(after, 1), np.delete(before, 1) / (1 - before[1]), atol=1e-6)
    untouched = np.delete(np.arange(6), 4)
    assert np.array_equal(clean.rows[0][untouched], cut.rows[0][untouched])


@pytest.mark.parametrize("ops", ["numpy", "numba"])
def test_a_position_whose_every_read_is_cut_reads_nothing(ops: str) -> None:
    small, ids = model(CONFIGS["llama"], ops=ops), tokens(CONFIGS["llama"], 4)
    states = States()
    small.forward(ids, observer=states, edits=[Cut(layer=1, dst=2, src=src) for src in range(3)])
    assert np.all(states.rows["z", 1, 2] == 0) and np.any(states.rows["z", 1, 3] != 0)


@pytest.mark.parametrize(
    "cut", [Cut(3, 1, 0), Cut(-1, 1, 0), Cut(0, 1, 0, head=6), Cut(0, 7, 0), Cut(0, 1, 2), Cut(0, 1, -1)], ids=str
)
def test_an_edge_that_the_model_does_not_have_cannot_be_cut(cut: Cut) -> None:
    small = model(CONFIGS["llama"])
    with pytest.raises(EditError, match="Cut"):
        small.forward([1, 2, 3], edits=[cut])


class Failing(Unobserved):
    """Raises at some event of a pass, in some layer."""

    def __init__(self, event: str, layer: int) -> None:
        self.event, self.layer, self.aborted = event, layer, False

    def write(self, layer: int, start: int, k: Any, v: Any) -> None:
        if (self.event, self.layer) == ("write", layer):
            raise RuntimeError("disk full")

    def state(self, site: str, layer: int, start: int, x: Any) -> None:
        if (self.event, self.layer) == (site, layer):
            raise RuntimeError("disk full")

    def end(self, logits: Any) -> None:
        if self.event == "end":
            raise RuntimeError("disk full")

    def abort(self) -> None:
        self.aborted = True


BAD_CALLS = {
    "a token id past the vocabulary": ([1, 61], {}, TokenError, "token 61 at index 1 .* vocabulary of 61"),
    "a negative token id": ([-1], {}, TokenError, "token -1 at index 0"),
    "a fraction for a token": ([1.5], {}, TokenError, "whole numbers"),
    "a batch": ([[1, 2]], {}, TokenError, r"shape \[1, 2\]"),
    "no token": ([], {}, EmptyPromptError, "at least one"),
    "more than the context": (list(range(40)) * 5, {}, ContextFullError, "5 positions are in the cache and 200 more"),
    "an observer that fails in the middle": ([1, 2], {"observer": Failing("write", 1)}, RuntimeError, "disk full"),
    "an observer that fails at a state": ([1, 2], {"observer": Failing("resid_post", 2)}, RuntimeError, "disk full"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_a_call_that_raises_leaves_the_cache_as_it_was(case: str) -> None:
    ids, options, error, message = BAD_CALLS[case]
    small = model(CONFIGS["llama"])
    cache = small.new_cache()
    small.forward([3, 1, 4, 1, 5], cache)
    before = cache.copy()
    with pytest.raises(error, match=message):
        small.forward(ids, cache, **options)
    assert cache.length == 5 and cache.steps == 1
    assert np.array_equal(cache.tokens, before.tokens) and np.array_equal(cache.last_logits, before.last_logits)
    for layer in range(3):
        assert np.array_equal(cache.keys(layer), before.keys(layer))
        assert np.array_equal(cache.values(layer), before.values(layer))
    assert np.array_equal(small.forward([9, 2], cache), small.forward([9, 2], before))


def test_an_observer_is_told_of_a_call_that_failed() -> None:
    observer = Failing("write", 0)
    with pytest.raises(RuntimeError):
        model(CONFIGS["llama"]).forward([1], observer=observer)
    assert observer.aborted


def test_weights_must_be_those_that_the_config_asks_for() -> None:
    from models import weights

    config = CONFIGS["qwen2"]
    given = weights(config)
    with pytest.raises(WeightsError, match=r"missing array blocks.0.bk \[8\] \(9 missing in all\)"):
        Transformer(config, weights(CONFIGS["llama"]), ops="numpy")
    with pytest.raises(WeightsError, match=r"array blocks.0.bk has no place"):
        Transformer(CONFIGS["llama"], given, ops="numpy")
    wrong = given.map(lambda array: array[:, :-1] if array is given.blocks[1].wo else array)
    with pytest.raises(WeightsError, match=r"blocks.1.wo has shape \[20, 23\]; the config asks for \[20, 24\]"):
        Transformer(config, wrong, ops="numpy")
    untied = Weights(embed=given.embed, blocks=given.blocks, head=given.embed.copy(), final_norm=given.final_norm)
    with pytest.raises(WeightsError, match="ties the head"):
        Transformer(config, untied, ops="numpy")


BAD_CONFIGS = {
    "heads that cannot be shared": ({"n_kv_heads": 4}, "6 query heads cannot share 4"),
    "no layers": ({"n_layers": 0}, "n_layers is 0"),
    "a true for a number": ({"n_heads": True}, "n_heads is True"),
    "an unknown norm": ({"norm": "batch"}, "norm is 'batch'"),
    "a negative eps": ({"norm_eps": -1e-5}, "norm_eps"),
    "an infinite scale": ({"attn_scale": float("inf")}, "attn_scale"),
    "an odd head for RoPE": ({"head_dim": 5}, "head_dim 5 is odd"),
    "too few divisors": ({"head_dim": 8, "rope": __import__("nanokv").Rope(1e4, (1.0, 2.0))}, "one divisor for each of the 4"),
    "sliding layers without a window": ({"sliding": (True, False, False)}, "window is None"),
    "too few layer kinds": ({"sliding": (False,), "window": 4}, "sliding has 1 entries for 3"),
    "a window of nothing": ({"window": 0}, "window is 0"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_config_that_contradicts_itself_is_refused(case: str) -> None:
    from dataclasses import replace

    changes, message = BAD_CONFIGS[case]
    with pytest.raises(ConfigError, match=message):
        replace(CONFIGS["llama"], **changes)


def test_an_unknown_ops_module_is_refused() -> None:
    with pytest.raises(ConfigError, match="ops is 'torch'"):
        model(CONFIGS["llama"], ops="torch")


def test_equal_models_have_equal_fingerprints_whatever_computes_them() -> None:
    fingerprints = {model(CONFIGS["gemma3"], ops=ops).fingerprint for ops in ("numpy", "numba")}
    assert len(fingerprints) == 1
    assert model(CONFIGS["gemma3"], seed=1, ops="numpy").fingerprint not in fingerprints


@pytest.mark.parametrize("ops", ["numpy", "numba"])
def test_a_zeroed_edge_takes_away_exactly_what_it_brought(ops: str) -> None:
    small, ids = model(CONFIGS["llama"], ops=ops), tokens(CONFIGS["llama"], 6)
    recorder = Recorder(level="states")
    small.forward(ids, observer=recorder)
    trace, layer, head, dst, src = recorder.trace, 1, 4, 5, 2
    wo = np.asarray(small.weights.blocks[layer].wo)[:, head * 4 : head * 4 + 4]
    part = trace.pattern(layer)[head, dst, src] * wo @ trace.values(layer)[src, head // 3]
    states = States()
    small.forward(ids, observer=states, edits=[ZeroValue(layer, dst, src, head)])
    assert np.allclose(states.rows["resid_mid", layer, dst], trace.state("resid_mid", layer)[dst] - part, atol=1e-6)


@pytest.mark.parametrize("ops", ["numpy", "numba"])
@pytest.mark.parametrize("past", [0, 5])
def test_a_transplanted_entry_is_read_and_then_gone_again(ops: str, past: int) -> None:
    small, ids = model(CONFIGS["gemma3"], ops=ops), tokens(CONFIGS["gemma3"], 6)
    other, cache = small.new_cache(), small.new_cache()
    small.forward(ids[::-1].copy(), other)
    if past:
        small.forward(ids[:past], cache)
    before = [cache.keys(layer).copy() for layer in range(4)]
    clean = small.forward(ids[past:], cache.copy())
    changed = small.forward(ids[past:], cache, edits=[transplant(other, 1, 2)])
    assert not np.array_equal(clean[-1], changed[-1])
    for layer in range(4):
        assert np.array_equal(cache.keys(layer)[:past], before[layer])


def test_transplanting_an_entry_onto_itself_changes_nothing() -> None:
    small, ids = model(CONFIGS["llama"]), tokens(CONFIGS["llama"], 6)
    cache = small.new_cache()
    logits = small.forward(ids, cache)
    assert np.array_equal(small.forward(ids, edits=[transplant(cache, layer, 3) for layer in range(3)]), logits)


@pytest.mark.parametrize("site", ["resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"])
def test_what_is_added_to_a_state_changes_it_and_only_what_can_see_it(site: str) -> None:
    small, ids = model(CONFIGS["llama"]), tokens(CONFIGS["llama"], 6)
    clean, edited = States(), States()
    small.forward(ids, observer=clean)
    vector = np.ones(20, np.float32)
    small.forward(ids, observer=edited, edits=[Add(site, 1, 3, vector)])
    assert np.array_equal(edited.rows[site, 1, 3], clean.rows[site, 1, 3] + vector)
    for (name, layer, pos), row in clean.rows.items():
        if layer < 1 or pos < 3 or (layer == 1 and pos > 3 and site != "resid_pre"):
            assert np.array_equal(edited.rows[name, layer, pos], row)


@pytest.mark.parametrize(
    "edit", [Add("z", 1, 3, np.ones(20)), Add("resid_pre", 1, 9, np.ones(20)), Add("resid_pre", 1, 3, np.ones(4)),
             Replace(1, 9, np.ones((2, 4))), Replace(1, 1, np.ones(4)), Replace(3, 1), "cut it"], ids=lambda e: str(e)[:30]
)  # fmt: skip
def test_an_edit_that_cannot_be_made_is_an_error(edit: Any) -> None:
    with pytest.raises(EditError):
        model(CONFIGS["llama"]).forward([1, 2, 3, 4, 5, 6], edits=[edit])
