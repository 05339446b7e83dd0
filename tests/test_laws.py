"""Each law is broken on purpose, by a bug put into a copy of the cache or the model, or by an edited trace, and reported."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from models import CONFIGS, model, tokens

from nanokv.cache import KVCache, Ranges, Slots
from nanokv.cli import main
from nanokv.edits import Add, Cut, Replace, ZeroValue
from nanokv.errors import TraceError
from nanokv.feedback import FeedbackTransformer
from nanokv.trace import Recorder, Trace, laws
from nanokv.trace.schema import AUDIT_EVERY, LEVELS
from nanokv.trace.steps import RecordedStep
from nanokv.transformer import Transformer

LLAMA = CONFIGS["llama"]  # 3 layers, 6 query heads, 2 key/value heads


def run(
    small: Transformer, cache: KVCache | None = None, level: str = "states", parts: Sequence[int] = (4, 1, 1, 3), **options: Any
) -> Trace:
    """Calls of so many tokens each."""
    ids, cache = tokens(small.config, sum(parts)), small.new_cache() if cache is None else cache
    with Recorder(level=level, **options) as recorder:
        for part in np.split(ids, np.cumsum(parts)[:-1]):
            small.forward(part, cache, observer=recorder)
    return recorder.trace


def broken(trace: Trace) -> dict[str, tuple[str, ...]]:
    """The ids that break each law."""
    return {each.law: each.ids for each in trace.check()}


# All is well


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("ops", ["numpy", "numba"])
def test_the_laws_hold_of_every_family(family: str, ops: str) -> None:
    small = model(CONFIGS[family], ops=ops)
    assert run(small, parts=(7, 1, 1, 5, 1)).check() == []
    assert run(small, parts=(7, 1, 5), topk=3).check() == []


@pytest.mark.parametrize("level", LEVELS)
def test_each_level_tests_what_it_can_and_names_the_rest(level: str) -> None:
    trace = run(model(LLAMA), level=level)
    assert trace.check() == []
    known = LEVELS[: LEVELS.index(level) + 1]
    assert [law.name for law in laws.LAWS if laws.untested(trace, law) is None] == [
        law.name for law in laws.LAWS if law.level in known
    ]


def test_a_feedback_model_reads_the_positions_before_it_and_breaks_no_law() -> None:
    small = FeedbackTransformer.of(model(LLAMA, ops="numpy"))
    trace = run(small)
    assert trace.about.architecture == "feedback" and trace.check() == []


def test_a_float64_model_has_float64_everywhere() -> None:
    small = model(LLAMA, ops="numpy")
    wide = Transformer(LLAMA, small.weights.map(lambda array: np.asarray(array, np.float64)), ops="numpy")
    trace = run(wide)
    assert trace.about.dtype == "float64" and trace["layer1.pos5"].dtype == np.float64 and trace.check() == []


def test_a_trace_without_a_call_cannot_be_checked(tmp_path: Path) -> None:
    run(model(LLAMA)).save(tmp_path / "a.nkv")
    for step in (tmp_path / "a.nkv").glob("step-*"):
        step.unlink()
    with pytest.raises(TraceError, match="no call"):
        Trace.load(tmp_path / "a.nkv").check()


# Bugs in the cache and in the model. Numbers are those of the museum of bugs that real ports had.


class Careless(KVCache):
    """A cache that takes what it is given."""

    def write(self, layer: int, start: int, k: np.ndarray, v: np.ndarray) -> None:
        self._written[layer] = start
        super().write(layer, start, k, v)

    def commit(self, tokens: np.ndarray, last_logits: np.ndarray) -> None:
        self._written = [self.length + len(tokens)] * len(self._written)
        super().commit(tokens, last_logits)


def test_bug_1_decoding_that_starts_one_position_late() -> None:
    class Late(Careless):
        @contextmanager
        def step(self, n_new: int) -> Iterator[int]:
            with super().step(n_new + 1) as start:
                yield start + (start > 0)

    found = broken(run(model(LLAMA), Late(LLAMA), "writes"))
    assert found["positions"] == ("step1",)
    assert found["written once"] == ("layer0.pos4.k", "layer1.pos4.k", "layer2.pos4.k")
    assert set(found["read after write"]) == {f"layer{l}.pos{p}.pattern" for l in range(3) for p in (5, 6, 7, 8, 9)}
    assert found.keys() == {"positions", "written once", "read after write"}


@pytest.mark.parametrize("wrong", [lambda h: h // 2, lambda h: h % 2], ids=["h // G", "h % G"])
def test_bug_3_query_heads_that_read_another_key_value_head(wrong: Callable[[int], int]) -> None:
    small = model(LLAMA, ops="numpy")
    small.kv_head = np.array([min(wrong(h), 1) for h in range(6)], np.int32)
    heads = [h for h in range(6) if min(wrong(h), 1) != h // 3]
    found = broken(run(small, level="writes", parts=(4,)))
    assert found == {"heads": tuple(f"step0.layer{l}.head{h}.pattern" for l in range(3) for h in heads)}


def test_bug_3_where_the_model_says_the_right_head_and_reads_another() -> None:
    small = model(LLAMA, ops="numpy")
    right = small.ops.attention

    def attention(q: np.ndarray, cache: KVCache, slots: Slots, *rest: Any) -> np.ndarray:
        return right(q, cache, replace(slots, kv_head=np.arange(6, dtype=np.int32) % 2), *rest)

    small.ops = SimpleNamespace(**{**vars(small.ops), "attention": attention})
    assert broken(run(small, level="weights")) == {}
    found = broken(run(small, level="vectors"))
    assert found.keys() == {"scores", "mixture"}
    assert {name.split(".")[2] for name in found["scores"]} == {"head1", "head4"} == {n.split(".")[2] for n in found["mixture"]}


def test_bug_5_a_cache_of_float64() -> None:
    found = broken(run(model(LLAMA, ops="numpy"), KVCache(LLAMA, np.float64)))
    assert "step0.layer0.z" in found["types"]
    found = broken(run(model(LLAMA, ops="numpy"), KVCache(LLAMA, np.float64), "writes"))
    assert "step0.layer1.k" in found["types"]


class Masked(KVCache):
    """A cache with another mask."""

    stop: Callable[[Slots, int], np.ndarray]

    def read(self, layer: int, start: int, n: int, kv_head: np.ndarray, window: int | None = None) -> Slots:
        slots = super().read(layer, start, n, kv_head, window)
        stop = type(self).stop(slots, self._written[layer]).astype(np.int32)
        return replace(slots, ranges=Ranges(np.minimum(slots.first, stop), stop))


def masked(stop: Callable[[Slots, int], np.ndarray]) -> KVCache:
    return type("_", (Masked,), {"stop": staticmethod(stop)})(LLAMA)


def test_bug_6_a_mask_that_is_shifted_by_one() -> None:
    successor = masked(lambda slots, written: np.minimum(slots.stop + 1, written))
    found = broken(run(model(LLAMA), successor, "writes", parts=(4, 1)))
    assert found == {"mask": tuple(f"layer{l}.pos{p}.pattern" for l in range(3) for p in (0, 1, 2))}
    not_itself = masked(lambda slots, written: np.maximum(slots.stop - 1, 1))
    found = broken(run(model(LLAMA), not_itself, "writes", parts=(4,)))
    assert found == {"mask": tuple(f"layer{l}.pos{p}.pattern" for l in range(3) for p in (1, 2, 3))}


def test_bug_7_a_chunks_mask_that_ignores_what_is_cached() -> None:
    found = broken(run(model(LLAMA), masked(lambda slots, written: slots.stop - slots.start), "writes", parts=(4, 3)))
    assert found == {"mask": tuple(f"layer{l}.pos{p}.pattern" for l in range(3) for p in (4, 5, 6))}


def test_bug_8_positions_that_begin_again_after_the_prefill() -> None:
    class Again(Careless):
        @contextmanager
        def step(self, n_new: int) -> Iterator[int]:
            with super().step(n_new):
                yield 0

    found = broken(run(model(LLAMA), Again(LLAMA), "writes", parts=(4, 1)))
    assert found["positions"] == ("step1",)
    assert found["written once"] == ("layer0.pos0.k", "layer1.pos0.k", "layer2.pos0.k")


def test_bug_18_a_window_that_is_one_too_small() -> None:
    class Narrow(KVCache):
        def read(self, layer: int, start: int, n: int, kv_head: np.ndarray, window: int | None = None) -> Slots:
            return super().read(layer, start, n, kv_head, None if window is None else window - 1)

    gemma = CONFIGS["gemma3"]  # layers 0, 1 and 3 slide, over 5 positions
    found = broken(run(model(gemma), Narrow(gemma), "weights", parts=(5, 1)))
    assert found == {"mask": tuple(f"layer{l}.pos{p}.pattern" for p in (4, 5) for l in (0, 1, 3))}


@pytest.mark.parametrize("closed", [True, False])
def test_bug_24_an_eviction_that_overwrites_slot_0(closed: bool) -> None:
    """It reports nothing: only the audits, every 64 calls and at the end, can show it."""

    class Evicting(KVCache):
        def write(self, layer: int, start: int, k: np.ndarray, v: np.ndarray) -> None:
            super().write(layer, start, k, v)
            if start == 6 and layer == 1:
                self.key_blocks[layer][:, 0, :, 0] = k[0]

    small, cache, recorder = model(LLAMA, ops="numpy"), Evicting(LLAMA), Recorder(level="writes")
    for token in tokens(LLAMA, 9 if closed else AUDIT_EVERY):
        small.forward([token], cache, observer=recorder)
    if closed:
        recorder.close()
    assert broken(recorder.trace) == {"unchanged": ("layer1.pos0.k",)}
    (law,) = [law for law in laws.LAWS if law.name == "unchanged"]
    last = 8 if closed else AUDIT_EVERY - 1
    assert laws.broken_by(recorder.trace, law).notes == (f"is not what was written, at the audit after step {last}",)


def test_bug_12_scores_that_are_scaled_by_the_models_width() -> None:
    small = model(LLAMA, ops="numpy")
    right = small.ops.attention
    small.ops = SimpleNamespace(**{**vars(small.ops), "attention": lambda q, cache, slots, scale, *rest: right(
        q, cache, slots, 20**-0.5, *rest)})  # fmt: skip
    assert broken(run(small, level="vectors", parts=(3,))).keys() == {"scores"}


def test_what_a_trace_that_was_cut_off_cannot_test_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recorder, small = Recorder(tmp_path / "a.nkv", level="writes"), model(LLAMA)
    small.forward([1, 2], observer=recorder)
    assert main(["check", str(tmp_path / "a.nkv")]) == 0
    printed = capsys.readouterr().out
    assert "not tested  unchanged" in printed and "cut off before the first" in printed
    assert "needs a trace of level states; this one has level writes" in printed


# Edited traces


def edited(trace: Trace, number: int, name: str, change: Callable[[np.ndarray], None]) -> Trace:
    """A copy of a trace in which an array of a step was changed."""
    steps = []
    for step in trace.steps:
        arrays = dict(step.arrays)
        if step.number == number:
            arrays[name] = arrays[name].copy()
            change(arrays[name])
        steps.append(RecordedStep(step.number, step.start, arrays, trace.about, step.deviations))
    return Trace(trace.about, steps, trace.audits)


def at(*index: Any, to: Any = None, times: float = 1, plus: float = 0) -> Callable[[np.ndarray], None]:
    def change(array: np.ndarray) -> None:
        array[index] = array[index] * times + plus if to is None else to

    return change


def one_bit(*index: int) -> Callable[[np.ndarray], None]:
    def change(array: np.ndarray) -> None:
        array.view(np.uint32)[index] ^= 1

    return change


# Steps hold positions 0 to 3, 4, 5, 6 to 8. Weights: layer by layer, [H, R]; step 1 has R = 5.
EDITED: dict[str, tuple[int, str, Callable[[np.ndarray], None], dict[str, tuple[str, ...]]]] = {
    "a slot written again": (2, "write_slot", at(1, to=4), {
        "written once": ("step2.layer1.k", "layer1.pos4.k", "layer1.pos5.k"),
        "read after write": ("layer1.pos5.pattern", *(f"layer1.pos{p}.pattern" for p in (6, 7, 8))),
        "unchanged": ("layer1.pos4.k", "layer1.pos4.v"),
    }),
    "another layer read": (1, "read_layer", at(2, to=1), {"heads": ("step1.layer2.pattern",)}),
    "another head read": (1, "read_kv_head", at(2, 5, to=0), {
        "heads": ("step1.layer2.head5.pattern",), "scores": ("layer2.pos4.head5.scores",) * 5,
        "mixture": ("layer2.pos4.head5.z",)}),
    "a weight too large": (1, "weight", at(7, plus=0.01), {
        "weights": ("layer0.pos4.head1.pattern",), "softmax": ("layer0.pos4.head1.pattern",),
        "mixture": ("layer0.pos4.head1.z",)}),
    "a negative weight": (1, "weight", at(5, to=-0.5), {
        "weights": ("layer0.pos4.head1.pattern",), "softmax": ("layer0.pos4.head1.pattern",),
        "mixture": ("layer0.pos4.head1.z",)}),
    "a weight that is no number": (1, "weight", at(5, to=np.nan), {"weights": ("layer0.pos4.head1.pattern",)}),
    "a score": (1, "score", at(0, plus=1), {
        "scores": ("layer0.pos4.head0.scores",), "softmax": ("layer0.pos4.head0.pattern",)}),
    "a query": (1, "q", at(1, 0, 2, plus=1), {"scores": ("layer1.pos4.head2.scores",) * 5}),
    "a value of what a head found": (3, "z", at(0, 1, 4, 2, plus=0.1), {"mixture": ("layer0.pos7.head4.z",)}),
    "a bit of a value": (3, "v", one_bit(2, 0, 1, 0), {"hashes": ("layer2.pos6.v",)}),
    "a hash": (0, "k_hash", at(0, 3, 1, plus=1), {"hashes": ("layer0.pos3.k",), "unchanged": ("layer0.pos3.k",)}),
    "a length": (0, "k_norm", at(0, 3, 1, times=1.001), {"hashes": ("layer0.pos3.k",)}),
    "a bit of what attention adds": (3, "attn_out", one_bit(1, 2, 5), {"residual": ("layer1.pos8.resid_mid",)}),
    "a bit of what the MLP adds": (0, "mlp_out", one_bit(2, 0, 0), {"residual": ("layer2.pos0.resid_post",)}),
    "a bit of the stream between two layers": (1, "resid_pre", one_bit(1, 0, 3), {
        "residual": ("layer1.pos4.resid_mid",), "stream": ("layer1.pos4",)}),
}  # fmt: skip


@pytest.fixture(scope="module")
def good() -> Trace:
    """Calls of 4, 1, 1 and 3 tokens at level states, all well."""
    return run(model(LLAMA))


@pytest.mark.parametrize("what", EDITED)
def test_an_edited_trace_breaks_the_laws_that_it_should(good: Trace, what: str) -> None:
    number, name, change, expected = EDITED[what]
    found = broken(edited(good, number, name, change))
    assert {law: tuple(ids) for law, ids in found.items() if law in expected} == expected
    assert found.keys() - expected.keys() <= {"mixture", "scores", "softmax"}, found  # what follows from it


def test_every_law_is_broken_by_some_test(good: Trace) -> None:
    by_edits = {law for *_, expected in EDITED.values() for law in expected}
    assert by_edits | {"positions", "types", "mask"} == {law.name for law in laws.LAWS}


@pytest.mark.parametrize("what", EDITED)
def test_every_id_that_is_named_names_something(good: Trace, what: str) -> None:
    for name in [name for ids in EDITED[what][3].values() for name in ids]:
        assert good[name].size


def test_check_prints_what_is_broken_and_exits_with_1(
    good: Trace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good.save(tmp_path / "good.nkv")
    assert main(["check", str(tmp_path / "good.nkv")]) == 0
    assert "14 holds, 0 broken, 0 not tested" in capsys.readouterr().out
    edited(good, 1, "q", at(1, 0, 2, plus=1)).save(tmp_path / "bad.nkv")
    assert main(["check", str(tmp_path / "bad.nkv")]) == 1
    printed = capsys.readouterr().out
    assert "BROKEN      scores" in printed and "    layer1.pos4.head2.scores is " in printed
    assert "13 holds, 1 broken, 0 not tested" in printed


# What an edit did is exempt

VECTOR = np.arange(20, dtype=np.float32)
INTERVENTIONS = {
    "an edge cut": [Cut(1, 5, 2, head=3)],
    "an edge cut in every head": [Cut(0, 4, 0), Cut(0, 4, 1), Cut(0, 4, 2), Cut(0, 4, 3), Cut(0, 4, 4)],
    "a value taken away": [ZeroValue(1, 5, 2, head=3), ZeroValue(2, 6, 6)],
    "an entry replaced": [Replace(1, 2, np.ones((2, 4), np.float32), -np.ones((2, 4), np.float32))],
    "a key of this call replaced": [Replace(0, 5, k=np.ones((2, 4), np.float32))],
    "a value replaced": [Replace(2, 5, v=np.ones((2, 4), np.float32))],
    **{f"something added to {site}": [Add(site, 1, 5, VECTOR)] for site in ("resid_pre", "attn_out", "resid_mid", "mlp_out",
                                                                           "resid_post")},
}  # fmt: skip


def intervened(edits: Sequence[Any], ops: str) -> Trace:
    small, ids = model(LLAMA, ops=ops), tokens(LLAMA, 8)
    cache = small.new_cache()
    with Recorder(level="states") as recorder:
        small.forward(ids[:4], cache, observer=recorder)
        small.forward(ids[4:7], cache, observer=recorder, edits=edits)
        small.forward(ids[7:], cache, observer=recorder)
    return recorder.trace


@pytest.mark.parametrize("ops", ["numpy", "numba"])
@pytest.mark.parametrize("what", INTERVENTIONS)
def test_what_an_edit_did_is_exempt_and_told(what: str, ops: str) -> None:
    trace = intervened(INTERVENTIONS[what], ops)
    assert trace.check() == []
    table = trace.edits
    assert set(table["step"]) == {1} and len(table["kind"]) == sum(
        2 if isinstance(edit, Replace) and edit.k is not None and edit.v is not None else 1 for edit in INTERVENTIONS[what]
    )


@pytest.mark.parametrize("what, law", [
    ("an edge cut", "scores"), ("an edge cut in every head", "weights"), ("a value taken away", "weights"),
    ("an entry replaced", "scores"), ("an entry replaced", "mixture"), ("something added to resid_pre", "stream"),
    ("something added to resid_mid", "residual"), ("something added to resid_post", "residual"),
])  # fmt: skip
def test_without_the_word_of_the_edit_the_same_trace_breaks_a_law(what: str, law: str) -> None:
    trace = intervened(INTERVENTIONS[what], "numba")
    steps = []
    for step in trace.steps:
        arrays = {name: array for name, array in step.arrays.items() if not name.startswith("edit_")}
        steps.append(RecordedStep(step.number, step.start, arrays, trace.about, {}))
    assert law in broken(Trace(trace.about, steps, trace.audits))


def test_the_edits_table_says_what_was_done() -> None:
    edits = [Cut(1, 5, 2, head=3), Replace(0, 2, v=np.ones((2, 4), np.float32)), Add("mlp_out", 1, 5, VECTOR)]
    table = intervened(edits, "numpy").edits
    rows = list(zip(*(table[name].tolist() for name in ("kind", "site", "layer", "head", "pos", "src")), strict=True))
    assert rows == [("cut", "pattern", 1, 3, 5, 2), ("replace", "v", 0, -1, 2, -1), ("add", "mlp_out", 1, -1, 5, -1)]


def test_a_trace_without_a_call_is_told_by_the_command_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A disk that was full at the first call leaves trace.json alone; the command ended in an IndexError."""
    with Recorder(tmp_path / "a.nkv", level="weights") as recorder:
        model(LLAMA).forward([1, 2], observer=recorder)
    for step in (tmp_path / "a.nkv").glob("*.safetensors"):
        step.unlink()
    assert main(["check", str(tmp_path / "a.nkv")]) == 2
    assert "holds no call" in capsys.readouterr().err
