"""Traces of broken models are told, never a traceback: two bugs once ended `check` and `diff` with a bare ValueError."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from models import CONFIGS, model, tokens

from nanokv.cache import KVCache, Ranges, Slots
from nanokv.config import Config
from nanokv.trace import Recorder, Trace
from nanokv.trace.explain import diff, show
from nanokv.transformer import Transformer

CONFIG = CONFIGS["llama"]


def recorded(small: Transformer, cache: KVCache | None = None) -> Trace:
    recorder = Recorder(level="states")
    small.forward(tokens(CONFIG, 6), small.new_cache() if cache is None else cache, observer=recorder)
    return recorder.trace


def laws(trace: Trace) -> set[str]:
    return {broken.law for broken in trace.check()}


def test_a_mask_that_lets_the_next_position_in_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows are longer than the positions up to their own, and could not be laid beside right ones."""
    small, right = model(CONFIG, ops="numpy"), KVCache.read
    good = recorded(small)

    def read(cache: KVCache, layer: int, start: int, n: int, kv_head: np.ndarray, window: int | None = None) -> Slots:
        slots = right(cache, layer, start, n, kv_head, window)
        return Slots(layer, start, kv_head, Ranges(slots.first, np.minimum(slots.stop + 1, start + n).astype(np.int32)))

    monkeypatch.setattr(KVCache, "read", read)
    bad = recorded(small)
    assert laws(bad) == {"mask"} and list(show(bad))
    assert diff(good, bad).first == ("layer0.pos0.read_stop", "1", "2")
    assert "pattern" in diff(good, bad).sites


class Repeating(KVCache):
    """Keeps a key and a value for each query head, as some ports do: right numbers, wrong memory, wrong trace."""

    def write(self, layer: int, start: int, k: np.ndarray, v: np.ndarray) -> None:
        super().write(layer, start, *(np.repeat(x, CONFIG.n_heads // CONFIG.n_kv_heads, axis=1) for x in (k, v)))


class RepeatingRecorder(Recorder):
    def write(self, layer: int, start: int, k: np.ndarray, v: np.ndarray) -> None:
        super().write(layer, start, *(np.repeat(x, CONFIG.n_heads // CONFIG.n_kv_heads, axis=1) for x in (k, v)))


def test_entries_repeated_for_each_query_head_are_told() -> None:
    """They are more than the config has key/value heads, and were put where these have their room."""
    small = model(CONFIG, ops="numpy")
    good = recorded(small)
    many: Config = CONFIG.__class__(**{**vars(CONFIG), "n_kv_heads": CONFIG.n_heads})
    small.kv_head = np.arange(CONFIG.n_heads, dtype=np.int32)
    recorder, ids = RepeatingRecorder(level="states"), tokens(CONFIG, 6)
    small.forward(ids, Repeating(many), observer=recorder)
    bad = recorder.trace
    assert "heads" in laws(bad)
    assert diff(good, bad).first == ("layer0.pos0.k[0,0]", "one of [6, 2, 4] numbers", "one of [6, 6, 4] numbers")


def test_the_logits_of_the_repeating_model_are_right_all_the_same() -> None:
    small, ids = model(CONFIG, ops="numpy"), tokens(CONFIG, 6)
    right: Sequence[np.ndarray] = small.forward(ids)
    many: Config = CONFIG.__class__(**{**vars(CONFIG), "n_kv_heads": CONFIG.n_heads})
    small.kv_head = np.arange(CONFIG.n_heads, dtype=np.int32)
    assert np.array_equal(small.forward(ids, Repeating(many)), right)
