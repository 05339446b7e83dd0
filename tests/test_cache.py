"""The cache keeps what was written, once, in order; nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import CONFIGS, model, tokens

from nanokv import safetensors_file
from nanokv.cache import BLOCK, KVCache
from nanokv.config import Config
from nanokv.errors import CacheError, ContextFullError, FileFormatError, UnwrittenSlotError

CONFIG = Config(n_layers=2, n_heads=6, n_kv_heads=3, head_dim=5, d_model=8, d_ff=8, vocab_size=9, n_ctx=100)


def entries(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, 3, 5)).astype(np.float32)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6).filter(lambda lengths: sum(lengths) <= 100))
def test_what_was_written_is_what_is_read_however_it_was_split(lengths: list[int]) -> None:
    cache = KVCache(CONFIG)
    k, v = entries(100), entries(100, seed=1)
    for n in lengths:
        with cache.step(n) as start:
            for layer in range(2):
                cache.write(layer, start, k[start : start + n] + layer, v[start : start + n] - layer)
            cache.commit(np.zeros(n, np.int32), np.zeros(9, np.float32))
    for layer in range(2):
        assert np.array_equal(cache.keys(layer), k[: cache.length] + layer)
        assert np.array_equal(cache.values(layer), v[: cache.length] - layer)


def test_the_index_formula_of_the_docstring_holds() -> None:
    cache = KVCache(CONFIG)
    k, v = entries(80), entries(80, seed=1)
    with cache.step(80):
        cache.write(0, 0, k, v)
        assert BLOCK == 32 and cache.key_blocks[0][1, 2, 3, 6] == k[70, 1, 3]
        assert cache.value_strips[0][1, 0, 70, 3] == v[70, 1, 3]


def test_a_slot_read_before_it_was_written_is_an_error() -> None:
    """The live bug of a public port: decoding began one position late, and a slot was read as zeros ever after."""
    cache = KVCache(CONFIG)
    heads = np.arange(6, dtype=np.int32) // 2
    with cache.step(3):
        cache.write(0, 0, entries(2), entries(2))
        with pytest.raises(UnwrittenSlotError, match="layer 0: slot 2 was to be read, but only 2 slots are written"):
            cache.read(0, 2, 1, heads)


def test_slots_are_written_in_order_and_once() -> None:
    cache = KVCache(CONFIG)
    with cache.step(3):
        cache.write(0, 0, entries(2), entries(2))
        for wrong in (0, 1, 3):
            with pytest.raises(CacheError, match=f"slot {wrong} was given to write, but 2 is the next"):
                cache.write(0, wrong, entries(1), entries(1))


def test_a_write_past_the_end_is_an_error() -> None:
    cache = KVCache(CONFIG)
    with pytest.raises(ContextFullError, match="0 positions are in the cache and 101 more"), cache.step(101):
        pass
    with cache.step(1), pytest.raises(ContextFullError, match="past the end"):
        cache.write(0, 0, entries(1000), entries(1000))


def test_a_call_that_skips_a_layer_is_not_committed() -> None:
    cache = KVCache(CONFIG)
    with pytest.raises(CacheError, match="every layer"), cache.step(2):
        cache.write(0, 0, entries(2), entries(2))
        cache.commit(np.zeros(2, np.int32), np.zeros(9, np.float32))
    assert cache.length == 0 and len(cache.keys(0)) == 0


def test_keys_and_values_cannot_be_written_to() -> None:
    small = model(CONFIGS["llama"])
    cache = small.new_cache()
    small.forward([1, 2, 3], cache)
    for array in (cache.keys(0), cache.values(0)):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


@given(st.integers(0, 99), st.integers(1, 50), st.none() | st.integers(1, 60))
def test_a_position_reads_itself_and_what_its_window_allows(start: int, n: int, window: int | None) -> None:
    cache = KVCache(CONFIG)
    n = min(n, 100 - start)
    with cache.step(start + n):
        cache.write(0, 0, entries(start + n), entries(start + n))
        slots = cache.read(0, start, n, np.zeros(6, np.int32), window)
    for i, row in enumerate(slots.mask()):
        pos = start + i
        assert np.flatnonzero(row).tolist() == [s for s in range(pos + 1) if window is None or pos - s < window]
    assert slots.count == slots.mask().sum()


def test_a_copy_goes_its_own_way() -> None:
    small = model(CONFIGS["llama"])
    cache = small.new_cache()
    small.forward([1, 2, 3], cache)
    other = cache.copy()
    small.forward([4], other)
    assert (cache.length, other.length) == (3, 4)
    assert np.array_equal(small.forward([4], cache), other.last_logits[None])


@pytest.mark.parametrize("ops", ["numpy", "numba"])
def test_a_saved_cache_goes_on_in_the_same_bits(tmp_path: Path, ops: str) -> None:
    small, ids = model(CONFIGS["gemma3"], ops=ops), tokens(CONFIGS["gemma3"], 50)
    cache = small.new_cache()
    small.forward(ids[:45], cache)
    cache.save(tmp_path / "run.cache", small)
    again = KVCache.load(tmp_path / "run.cache", small)
    assert again.length == 45 and again.steps == 1 and np.array_equal(again.last_logits, cache.last_logits)
    assert np.array_equal(small.forward(ids[45:], again), small.forward(ids[45:], cache))


def test_a_cache_is_refused_by_another_model(tmp_path: Path) -> None:
    small, other = model(CONFIGS["llama"]), model(CONFIGS["llama"], seed=1)
    cache = small.new_cache()
    small.forward([1, 2], cache)
    cache.save(tmp_path / "run.cache", small)
    with pytest.raises(CacheError, match="another model"):
        KVCache.load(tmp_path / "run.cache", other)


def test_a_file_that_is_no_cache_is_refused(tmp_path: Path) -> None:
    small = model(CONFIGS["llama"])
    (tmp_path / "run.cache").write_bytes(b"not a cache at all")
    with pytest.raises(FileFormatError):
        KVCache.load(tmp_path / "run.cache", small)


@pytest.mark.parametrize("damage", ["tokens", "wrote", "keys.1", "values.0", "last_logits"])
def test_a_saved_cache_with_an_array_of_another_shape_or_type_is_an_error(tmp_path: Path, damage: str) -> None:
    small = model(CONFIGS["llama"])
    cache = small.new_cache()
    small.forward([1, 2, 3], cache)
    cache.save(tmp_path / "cache.safetensors", small)
    arrays, metadata = safetensors_file.load(tmp_path / "cache.safetensors", "nanokv cache 1")
    others = [{**arrays, damage: arrays[damage][:-1]}, {**arrays, damage: arrays[damage].astype(np.float64)}]
    others += [] if damage == "last_logits" else [{name: array for name, array in arrays.items() if name != damage}]
    for other in others:
        safetensors_file.save(tmp_path / "other.safetensors", other, metadata)
        with pytest.raises(FileFormatError, match="damaged"):
            KVCache.load(tmp_path / "other.safetensors", small)


@pytest.mark.parametrize("tokens, steps", [([1, -1], "1"), ([1, 10**6], "1"), ([1, 2], "one"), ([1, 2], None)])
def test_a_saved_cache_with_an_impossible_token_or_number_of_calls_is_an_error(
    tmp_path: Path, tokens: list[int], steps: str | None
) -> None:
    small = model(CONFIGS["llama"])
    cache = small.new_cache()
    small.forward([1, 2], cache)
    cache.save(tmp_path / "cache.safetensors", small)
    arrays, metadata = safetensors_file.load(tmp_path / "cache.safetensors", "nanokv cache 1")
    said = {name: text for name, text in {**metadata, "steps": steps}.items() if text is not None}
    safetensors_file.save(tmp_path / "other.safetensors", {**arrays, "tokens": np.array(tokens, np.int32)}, said)
    with pytest.raises(FileFormatError, match="out of range"):
        KVCache.load(tmp_path / "other.safetensors", small)
