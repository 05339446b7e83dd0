"""A trace holds what happened to the cache, in memory and on the disk alike."""

from __future__ import annotations

import gc
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from models import CONFIGS, model, tokens

from nanokv import kernels
from nanokv.errors import FileFormatError, NanokvError, TraceError
from nanokv.generate import generate
from nanokv.trace import Recorder, Trace
from nanokv.trace.explain import show
from nanokv.trace.hashes import hash_entries, hash_words
from nanokv.trace.schema import KINDS, LEVELS, ROLES, SITES
from nanokv.transformer import Transformer


def recorded(
    family: str = "llama", level: str = "states", path: Path | None = None, ops: str = "numba"
) -> tuple[Transformer, Trace]:
    """Seven tokens in calls of 4, 1 and 2."""
    small, ids = model(CONFIGS[family], ops=ops), tokens(CONFIGS[family], 7)
    cache = small.new_cache()
    with Recorder(path, level=level) as recorder:
        for part in (ids[:4], ids[4:5], ids[5:]):
            small.forward(part, cache, observer=recorder)
    return small, recorder.trace


def test_the_standard_fnv_hash_of_known_words() -> None:
    """FNV-1a by its definition, on Python integers."""
    x = np.array([[1.5, -0.0, np.inf]], np.float32)
    expected = 0xCBF29CE484222325
    for word in struct.unpack("<3I", x.tobytes()):
        expected = (expected ^ word) * 0x100000001B3 % 2**64
    assert hash_words(x)[0] == expected


def test_the_compiled_hash_is_the_same() -> None:
    x = np.random.default_rng(0).standard_normal((3, 4, 5)).astype(np.float32)
    x[0, 0, 0] = -0.0
    x.flags.writeable = False
    for part in (x, x[:, 1:3], x[:0], x.transpose(1, 0, 2)):
        assert np.array_equal(kernels.hash_words(part), hash_words(part))


def test_a_recording_in_memory_holds_every_number_once() -> None:
    """It held each array as it was reported, too, until the next call: twice what the trace takes."""
    small, recorder = model(CONFIGS["llama"], ops="numpy"), Recorder(level="states")
    ids = tokens(CONFIGS["llama"], 60)
    small.forward(ids, observer=Recorder(level="states"))  # what is made once is made now
    tracemalloc.start()
    small.forward(ids, observer=recorder)
    gc.collect()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    kept = sum(array.nbytes for step in recorder.trace.steps for array in step.arrays.values())
    assert held < 1.3 * kept


@pytest.mark.parametrize("n", [1, 31, 32, 45])
def test_the_hashes_that_are_read_in_place_are_those_of_the_entries(n: int) -> None:
    small = model(CONFIGS["llama"], ops="numba")
    cache = small.new_cache()
    small.forward(np.arange(45) % small.config.vocab_size, cache)
    for layer in range(small.config.n_layers):
        for found, expected in zip(kernels.hash_entries(cache, layer, n), hash_entries(cache, layer, n), strict=True):
            assert np.array_equal(found, expected)


@pytest.mark.parametrize("family", CONFIGS)
def test_every_position_reads_what_its_mask_allows_and_its_weights_sum_to_one(family: str) -> None:
    small, trace = recorded(family)
    config, reads = small.config, trace.reads
    for layer in range(config.n_layers):
        window = config.window_of(layer) or 99
        for head in range(config.n_heads):
            mine = (reads["layer"] == layer) & (reads["head"] == head)
            pairs = list(zip(reads["dst"][mine].tolist(), reads["src"][mine].tolist(), strict=True))
            assert pairs == [(dst, src) for dst in range(7) for src in range(dst + 1) if dst - src < window]
            assert set(reads["kv_head"][mine]) == {head // (config.n_heads // config.n_kv_heads)}
        assert np.allclose(trace.pattern(layer).sum(axis=2), 1, atol=1e-6)


def test_a_read_says_whether_it_went_to_itself_to_the_past_or_to_the_same_call() -> None:
    _, trace = recorded()
    reads = trace.reads
    kinds = {(dst, src): KINDS[kind] for dst, src, kind in zip(reads["dst"], reads["src"], reads["kind"], strict=True)}
    assert kinds[3, 3] == kinds[4, 4] == "self"
    assert kinds[3, 0] == kinds[6, 5] == "chunk"
    assert kinds[4, 3] == kinds[6, 4] == kinds[5, 0] == "past"


def test_writes_are_the_entries_of_the_cache() -> None:
    small, trace = recorded()
    cache = small.new_cache()
    small.forward(trace.tokens["token_id"], cache)
    writes = trace.writes
    assert len(writes["slot"]) == 3 * 7 * 2 and np.array_equal(writes["slot"], writes["pos"])
    for i in range(len(writes["slot"])):
        layer, slot, head = (writes[name][i] for name in ("layer", "slot", "kv_head"))
        assert writes["k_hash"][i] == hash_words(cache.keys(layer)[slot, head])
        assert writes["v_norm"][i] == pytest.approx(np.linalg.norm(cache.values(layer)[slot, head]), rel=1e-6)


def test_recording_changes_no_bit() -> None:
    small, ids = model(CONFIGS["gemma3"]), tokens(CONFIGS["gemma3"], 30)
    plain = small.forward(ids)
    for level in LEVELS:
        assert np.array_equal(small.forward(ids, observer=Recorder(level=level)), plain)


def test_residuals_add_up_in_bits_and_go_from_layer_to_layer() -> None:
    for family in ("llama", "gemma3", "gpt2"):
        small, trace = recorded(family)
        for layer in range(small.config.n_layers):
            pre, attn, mid, mlp, post = (trace.state(site, layer) for site in SITES)
            assert np.array_equal(pre + attn, mid) and np.array_equal(mid + mlp, post)
            if layer + 1 < small.config.n_layers:
                assert np.array_equal(post, trace.state("resid_pre", layer + 1))


@pytest.mark.parametrize("level", LEVELS)
def test_a_trace_on_the_disk_is_the_trace_in_memory(tmp_path: Path, level: str) -> None:
    small, in_memory = recorded(level=level)
    _, written = recorded(level=level, path=tmp_path / "a.nkv")
    in_memory.save(tmp_path / "b.nkv")
    for trace in (written, Trace.load(tmp_path / "a.nkv"), Trace.load(tmp_path / "b.nkv")):
        assert trace.config == small.config and trace.level == level
        for table in ("tokens", "writes", "reads"):
            ours, theirs = getattr(trace, table), getattr(in_memory, table)
            assert ours.keys() == theirs.keys()
            assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
        assert [step.arrays.keys() for step in trace.steps] == [step.arrays.keys() for step in in_memory.steps]
    assert Trace.load(tmp_path / "a.nkv").model_hash == small.fingerprint


def test_any_safetensors_reader_can_read_a_step(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    _, trace = recorded(path=tmp_path / "a.nkv")
    arrays = load_file(tmp_path / "a.nkv" / "step-000000.safetensors")
    assert arrays["resid_pre"].shape == (3, 4, 20) and np.array_equal(arrays["resid_pre"][1, 2], trace["layer1.pos2"])


def test_ids_name_states_patterns_and_logits() -> None:
    small, trace = recorded()
    ids = trace.tokens["token_id"]
    logits = small.forward(ids)
    assert np.array_equal(trace["layer0.pos5"], np.asarray(small.weights.embed)[ids[5]])
    assert np.array_equal(trace["layer3.pos5"], trace.state("resid_post", 2)[5])
    assert np.array_equal(trace["layer1.pos5.mlp_out"], trace.state("mlp_out", 1)[5])
    assert np.array_equal(trace["step2.layer1.head4.pattern"], trace.pattern(1)[4, 5:])
    assert trace["step0.layer1.head4.scores"].shape == (4, 4) and trace["step0.layer1.head4.scores"][0, 1] == -np.inf
    assert np.array_equal(trace["step2.layer2.k"], trace.keys(2)[5:])
    assert np.array_equal(trace["pos5.logits"], logits[5]) and np.array_equal(trace["step2.logits"], logits[5:])


def test_an_id_names_a_site_of_a_position_of_a_head_or_of_a_call() -> None:
    _, trace = recorded()
    step, config = trace.steps[2], trace.config  # positions 5 and 6
    for site in ("q", "k", "v", "z"):
        heads = config.n_kv_heads if site in "kv" else config.n_heads
        assert trace[f"step2.layer1.{site}"].shape == (2, heads, config.head_dim)
        assert np.array_equal(trace[f"layer1.pos6.{site}"], step.arrays[site][1, 1])
    for site in ("pattern", "scores"):
        assert trace[f"step2.layer1.{site}"].shape == (6, 2, 7) and trace[f"layer1.pos5.{site}"].shape == (6, 6)
        assert np.array_equal(trace[f"layer1.pos5.head4.{site}"], trace[f"step2.layer1.head4.{site}"][0, :6])
    for site in ("q", "z"):
        assert np.array_equal(trace[f"step2.layer1.head4.{site}"][1], trace[f"layer1.pos6.head4.{site}"])
    assert trace["step2.final_scale"].shape == (2,) and trace["pos6.final_scale"] == trace["step2.final_scale"][1]


def test_writes_and_reads_say_whose_turn_it_was() -> None:
    small, recorder = model(CONFIGS["llama"]), Recorder()
    cache = small.new_cache()
    small.forward([1, 2], cache, observer=recorder)
    recorder.turn("tool")
    small.forward([3, 4], cache, observer=recorder)
    writes, reads = recorder.trace.writes, recorder.trace.reads
    for table, pos in ((writes, writes["pos"]), (reads, reads["dst"])):
        assert np.array_equal(table["turn"], pos // 2)
        assert {ROLES[role] for role in table["role"][pos > 1]} == {"tool"}
    past = reads["kind"] == KINDS.index("past")
    assert np.array_equal(past, (reads["dst"] > 1) & (reads["src"] < 2))
    assert reads["src"].dtype == np.int32 and "cats" not in reads
    with pytest.raises(KeyError):
        reads["cats"]


def test_what_is_sampled_goes_on_with_the_turn_that_was_begun_for_the_model() -> None:
    small, recorder = model(CONFIGS["llama"]), Recorder()
    cache = small.new_cache()
    small.forward([1], cache, observer=recorder)
    recorder.turn("model")
    small.forward([2, 3], cache, observer=recorder)  # such as the mark that begins an answer
    list(generate(small, cache=cache, max_new_tokens=2, observer=recorder))
    table = recorder.trace.tokens
    assert table["turn"].tolist() == [0, 1, 1, 1, 1] and table["chunk"].tolist() == [0, 0, 0, 1, 2]
    assert table["sampled"].tolist() == [False] * 3 + [True] * 2


@pytest.mark.parametrize(
    "name", ["", "layer4.pos0", "layer0.pos7", "layer0.pos-1", "step3.logits", "step0.layer0.head6.pattern", "layer0", "pos0.q"]
)
def test_an_id_that_names_nothing_is_an_error(name: str) -> None:
    with pytest.raises(TraceError):
        recorded()[1][name]


def test_what_a_level_does_not_hold_is_an_error_that_names_the_level() -> None:
    _, trace = recorded(level="weights")
    with pytest.raises(TraceError, match="resid_pre is recorded from level states on, and this trace has level weights"):
        trace.state("resid_pre", 0)
    with pytest.raises(TraceError, match="from level vectors on"):
        trace.keys(0)


def test_generated_tokens_are_the_models_own_turn_and_sampled() -> None:
    small = model(CONFIGS["llama"])
    cache, recorder = small.new_cache(), Recorder()
    small.forward([1, 2, 3], cache, observer=recorder)
    written = list(generate(small, cache=cache, max_new_tokens=2, observer=recorder))
    recorder.turn("tool")
    small.forward([5, 6], cache, observer=recorder)
    table = recorder.trace.tokens
    assert table["token_id"].tolist() == [1, 2, 3, *written, 5, 6]
    assert table["role"].tolist() == ["user"] * 3 + ["model"] * 2 + ["tool"] * 2
    assert table["turn"].tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert table["chunk"].tolist() == [0, 0, 0, 0, 1, 0, 0]
    assert table["step"].tolist() == [0, 0, 0, 1, 2, 3, 3]
    assert table["sampled"].tolist() == [False] * 3 + [True] * 2 + [False] * 2


def test_a_call_that_raises_leaves_no_step() -> None:
    small = model(CONFIGS["llama"])
    cache, recorder = small.new_cache(), Recorder()
    small.forward([1, 2], cache, observer=recorder)
    with pytest.raises(NanokvError):
        small.forward([99], cache, observer=recorder)
    small.forward([3], cache, observer=recorder)
    assert recorder.trace.tokens["token_id"].tolist() == [1, 2, 3]


def test_a_recorder_does_not_write_over_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "run.nkv").mkdir()
    (tmp_path / "run.nkv" / "precious").write_text("data")
    with pytest.raises(TraceError, match="already there"):
        Recorder(tmp_path / "run.nkv")


def test_an_unknown_level_or_role_is_an_error() -> None:
    with pytest.raises(TraceError, match="level is 'all'"):
        Recorder(level="all")
    with pytest.raises(TraceError, match="role is 'robot'"):
        Recorder().turn("robot")


def test_one_recorder_is_for_one_model() -> None:
    recorder = Recorder()
    model(CONFIGS["llama"]).forward([1], observer=recorder)
    with pytest.raises(TraceError, match="another model"):
        model(CONFIGS["llama"], seed=1).forward([1], observer=recorder)


def test_a_folder_that_is_no_trace_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="no trace"):
        Trace.load(tmp_path)
    recorded(path=tmp_path / "a.nkv")
    (tmp_path / "a.nkv" / "trace.json").write_text('{"schema": "other"}')
    with pytest.raises(FileFormatError, match="schema 'other'"):
        Trace.load(tmp_path / "a.nkv")


def test_show_tells_the_reads_that_matter_first_and_folds_the_rest() -> None:
    from nanokv.handmade import induction

    small, recorder = induction(), Recorder()
    small.forward(small.tokenizer.encode("the cat sat on the mat and the cat"), observer=recorder)
    lines = list(show(recorder.trace, layer=1))
    assert "  layer 1 head 0: 'cat' (9) reads 1.00 of 'sat' (3) (written in this call, user)" in lines
    assert "  sink: '<bos>' (0) draws 0.62 of all attention from later positions; not told below" in lines
    assert not any("reads 0.00" in line for line in lines)
    with pytest.raises(TraceError, match="step 4"):
        list(show(recorder.trace, step=4))
