"""Every number of a position has the same 32 bits, however the tokens were split, whatever else ran. NaN matches NaN."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CONFIGS, model, tokens, weights
from test_transformer import States, run_in_parts, splits

import nanokv
from nanokv import kernels
from nanokv.cache import KVCache
from nanokv.config import Config, Rope
from nanokv.errors import NanokvError
from nanokv.gguf_file import FileTensor
from nanokv.panels import PARTS
from nanokv.trace import Recorder
from nanokv.transformer import Transformer

# No multiple of any tile: widths, heads, vocabulary; windows shorter and longer than a tile of positions.
AWKWARD = {
    "long": Config(2, 6, 3, 20, 50, 70, 101, 600, rope=Rope(500.0), window=37, sliding=(True, False), qk_norm=True),
    "one head": Config(1, 1, 1, 2, 3, 5, 7, 600, rope=Rope(10.0), rope_pairs="neighbours"),
    "wide head": Config(1, 5, 1, 66, 34, 49, 97, 600, window=3, sliding=(True,), learned_positions=True, norm="layer",
                        gated_mlp=False, activation="gelu", qkv_bias=True),
}  # fmt: skip


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two float32 arrays are equal bit for bit, NaN aside."""
    both_nan = np.isnan(a) & np.isnan(b)
    return a.shape == b.shape and bool(np.all((a.view(np.int32) == b.view(np.int32)) | both_nan))


def same_runs(first: tuple[np.ndarray, KVCache, States], second: tuple[np.ndarray, KVCache, States]) -> bool:
    (logits, cache, states), (logits_, cache_, states_) = first, second
    layers = range(cache.config.n_layers)
    return (
        same(logits, logits_)
        and all(same(cache.keys(i), cache_.keys(i)) and same(cache.values(i), cache_.values(i)) for i in layers)
        and states.rows.keys() == states_.rows.keys()
        and all(same(states.rows[key], states_.rows[key]) for key in states.rows)
    )


@pytest.mark.parametrize("family", CONFIGS)
def test_every_split_of_eight_tokens_gives_the_same_bits(family: str) -> None:
    small, ids = model(CONFIGS[family]), tokens(CONFIGS[family], 8)
    whole = run_in_parts(small, ids, [8])
    for lengths in splits(8):
        assert same_runs(run_in_parts(small, ids, lengths), whole)


LONG = {name: (model(config), tokens(config, 512)) for name, config in AWKWARD.items()}
WHOLE = {name: run_in_parts(small, ids, [512]) for name, (small, ids) in LONG.items()}


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(sorted(AWKWARD)), st.lists(st.integers(1, 511), max_size=6, unique=True))
def test_random_splits_of_512_tokens_give_the_same_bits_at_awkward_sizes(name: str, cuts: list[int]) -> None:
    small, ids = LONG[name]
    ends = [*sorted(cuts), 512]
    lengths = [b - a for a, b in zip([0, *ends], ends, strict=False)]
    assert same_runs(run_in_parts(small, ids, lengths), WHOLE[name])


@pytest.mark.parametrize("name", AWKWARD)
def test_single_tokens_give_the_bits_of_one_call(name: str) -> None:
    small, ids = LONG[name]
    assert same_runs(run_in_parts(small, ids, [1] * 512), WHOLE[name])


THREADS = """
import sys, nanokv
sys.path.insert(0, "tests")
from test_same_bits import LONG, WHOLE, run_in_parts, same_runs
for n in (1, 2, 3, 4):
    nanokv.set_threads(n)
    for name, (small, ids) in LONG.items():
        print(n, name, same_runs(run_in_parts(small, ids, [400, 1, 111]), WHOLE[name]))
"""


def test_the_number_of_threads_changes_no_bit() -> None:
    root = Path(__file__).parent.parent
    environment = os.environ | {"NUMBA_NUM_THREADS": "4", "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", THREADS]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 12 and all(line.endswith("True") for line in done.stdout.splitlines())


def test_an_impossible_number_of_threads_is_an_error() -> None:
    for n in (0, 10_000):
        with pytest.raises(NanokvError, match=f"{n} threads"):
            nanokv.set_threads(n)


def test_weights_are_the_same_bits_however_the_tokens_were_split_and_recording_changes_none() -> None:
    small, ids = LONG["long"]
    whole, parts = Recorder(level="states"), Recorder(level="states")
    cache = small.new_cache()
    logits = small.forward(ids[:90], observer=whole)
    pieces = [small.forward(part, cache, observer=parts) for part in np.split(ids[:90], [3, 4, 70])]
    assert same(np.concatenate(pieces), logits) and same(logits, WHOLE["long"][0][:90])
    for layer in range(2):
        assert same(whole.trace.pattern(layer), parts.trace.pattern(layer))
        assert same(whole.trace.scores(layer), parts.trace.scores(layer))


def test_a_saved_cache_goes_on_in_the_same_bits(tmp_path: Path) -> None:
    small, ids = LONG["long"]
    cache = small.new_cache()
    small.forward(ids[:300], cache)
    cache.save(tmp_path / "cache", small)
    assert same(small.forward(ids[300:], KVCache.load(tmp_path / "cache", small)), WHOLE["long"][0][300:])


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("name", ["long", "wide head"])
def test_what_stands_in_a_masked_slot_is_neither_multiplied_nor_added(name: str, bad: float) -> None:
    """0 times infinity is NaN: a kernel that multiplies what the mask excludes by a weight of 0 shows here."""
    small, ids = LONG[name]
    clean, dirty = small.new_cache(), small.new_cache()
    for cache in (clean, dirty):
        small.forward(ids[:100], cache)
    for layer in range(small.config.n_layers):
        window = small.config.window_of(layer)
        if window is not None:
            for slot in range(100 - window):  # past the window of every new position
                dirty.key_blocks[layer][:, slot // 32, :, slot % 32] = bad
                dirty.value_strips[layer][:, :, slot] = bad
        dirty.value_strips[layer][:, :, 100:] = bad  # slots not written yet
        dirty.key_blocks[layer][:, 3, :, 4:] = bad
    assert same(small.forward(ids[100:120], clean), small.forward(ids[100:120], dirty))


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_position_that_is_not_finite_spoils_those_that_read_it_and_no_other_whatever_the_split(bad: float) -> None:
    config = CONFIGS["llama"]
    given_weights = weights(config)
    given_weights.embed[7, 3] = bad
    small, ids = Transformer(config, given_weights), np.array([1, 2, 3, 7, 4, 5, 6, 8], np.int32)
    whole = run_in_parts(small, ids, [8])
    finite = np.isfinite(whole[0][:, :7]).all(axis=1)
    assert finite[:3].all() and not finite[3:].any()
    for lengths in ([1] * 8, [4, 4], [3, 2, 3]):
        assert same_runs(run_in_parts(small, ids, lengths), whole)


def random_blocks(kind: str, shape: tuple[int, int], seed: int) -> FileTensor:
    """Random bytes of a kind of block, whose scales are small numbers."""
    random = np.random.default_rng(seed)
    kind_of = gguf.GGMLQuantizationType[kind]
    if kind in ("F16", "BF16"):
        numbers = (0.3 * random.standard_normal(shape)).astype(np.float32)
        raw = numbers.astype(np.float16).view(np.uint8) if kind == "F16" else (numbers.view(np.uint32) >> 16).astype(np.uint16)
        return FileTensor("w", shape, kind, np.ascontiguousarray(raw).view(np.uint8).reshape(-1))
    per_block, size = gguf.GGML_QUANT_SIZES[kind_of]
    raw = random.integers(0, 256, (shape[0] * shape[1] // per_block, size), dtype=np.uint8)
    scales = {"Q6_K": (208,), "Q8_0": (0,), "Q4_0": (0,), "Q5_0": (0,)}.get(kind, (0, 2))
    for at in scales:
        halves = (0.01 * random.standard_normal(len(raw))).astype(np.float16)
        raw[:, at : at + 2] = halves.view(np.uint8).reshape(-1, 2)
    return FileTensor("w", shape, kind, raw.reshape(-1))


@pytest.fixture
def packed_models() -> Iterator[dict[str, tuple[Transformer, Transformer]]]:
    """By kind: the same quantised model with its weights packed, and dequantised beforehand."""
    made = {}
    for kind in PARTS:
        config = Config(1, 4, 2, 64, 256, 256, 100, 200, rope=Rope(100.0))
        plain = weights(config)
        matrices = {id(array): i for i, (_, array) in enumerate(plain.items()) if array.ndim == 2}

        def blocks(array: np.ndarray, kind: str = kind, matrices: dict[int, int] = matrices) -> object:
            if id(array) not in matrices:
                return array
            return random_blocks(kind, array.shape, matrices[id(array)])  # type: ignore[arg-type]

        quantised = plain.map(blocks)
        made[kind] = (Transformer(config, quantised, packed=True), Transformer(config, quantised))
    yield made


def test_packed_weights_give_the_bits_of_dequantised_ones_for_every_kind_of_block(
    packed_models: dict[str, tuple[Transformer, Transformer]],
) -> None:
    ids = tokens(Config(1, 4, 2, 64, 256, 256, 100, 200), 12)
    for kind, (packed, plain) in packed_models.items():
        assert packed.weights.embed.kind == kind and plain.weights.embed.kind == "F32"
        for (name, ours), (_, theirs) in zip(packed.weights.items(), plain.weights.items(), strict=True):
            assert same(np.asarray(ours), np.asarray(theirs)), f"{kind} {name}"
        assert same_runs(run_in_parts(packed, ids, [9, 1, 2]), run_in_parts(plain, ids, [12])), kind
        assert packed.fingerprint == plain.fingerprint


def test_groups_of_matrices_of_different_kinds_work_together() -> None:
    """As in files of mixed quantisation, where values have more bits than queries and keys."""
    config = CONFIGS["llama"]
    config = Config(1, 4, 2, 32, 64, 96, 50, 99, rope=Rope(100.0))
    plain = weights(config)
    kinds = {"wq": "Q4_1", "wk": "Q4_1", "wv": "Q8_0", "w_up": "Q5_0"}
    changed = {name: random_blocks(kind, getattr(plain.blocks[0], name).shape, 5) for name, kind in kinds.items()}
    by_id = {id(getattr(plain.blocks[0], name)): blocks for name, blocks in changed.items()}
    quantised = plain.map(lambda array: by_id.get(id(array), array))
    packed, floats = Transformer(config, quantised, packed=True), Transformer(config, quantised)
    assert packed.weights.blocks[0].wv.kind == "Q8_0" and packed.weights.blocks[0].wo.kind == "F32"
    ids = tokens(config, 9)
    assert same_runs(run_in_parts(packed, ids, [5, 1, 3]), run_in_parts(floats, ids, [9]))


HASHES = """
import hashlib, sys
sys.path.insert(0, "tests")
from models import CONFIGS, model, tokens
for family, config in CONFIGS.items():
    print(family, hashlib.sha256(model(config).forward(tokens(config, 40)).tobytes()).hexdigest())
"""


def test_another_processors_vectors_give_the_same_bits() -> None:
    """The kernels compiled for AVX2 alone: other tiles, the same order."""
    root = Path(__file__).parent.parent
    environment = os.environ | {"NUMBA_CPU_NAME": "x86-64-v3", "PYTHONPATH": str(root)}
    if os.uname().machine != "x86_64":
        pytest.skip("x86-64 only")
    done = subprocess.run([sys.executable, "-c", HASHES], cwd=root, env=environment, capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        family, digest = line.split()
        logits = model(CONFIGS[family]).forward(tokens(CONFIGS[family], 40))
        assert hashlib.sha256(logits.tobytes()).hexdigest() == digest
    assert len(done.stdout.splitlines()) == len(CONFIGS)


def test_smollm2_has_the_same_bits_split_packed_and_dequantised() -> None:
    try:
        packed = nanokv.load("smollm2-135m", weights="packed")
    except NanokvError as missing:
        pytest.skip(str(missing))
    plain = nanokv.load("smollm2-135m", weights="float32")
    ids = np.random.default_rng(0).integers(0, 49152, 80).astype(np.int32)
    whole = run_in_parts(plain, ids, [80])
    assert same_runs(run_in_parts(plain, ids, [50, 1, 1, 28]), whole)
    assert same_runs(run_in_parts(packed, ids, [33, 1, 46]), whole)
    assert packed.fingerprint == plain.fingerprint


def test_functions_that_a_factory_makes_for_each_kind_have_names_of_their_own() -> None:
    """One process had compiled for Q8_0, another for Q4_1; a third, which read both from the disk, multiplied Q4_1 as if it
    were Q8_0 and got NaN. Compiled code is linked by name, and the count that sets equal names apart starts anew in each
    process."""
    made = [function for kind in ("Q8_0", "Q4_1", "Q6_K") for function in kernels._packed_rows_of(kind)]
    made += [kernels._panel_of(kind, *kernels._packed_rows_of(kind)) for kind in ("Q8_0", "Q4_1", "Q6_K")]
    made += [kernels._panel_rows, kernels._block_rows]
    names = [function.py_func.__qualname__ for function in made]
    assert len(set(names)) == len(names), names
