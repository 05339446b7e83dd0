"""However a sequence is split into calls, saved and resumed: its trace is that of a simple model of the cache, and holds the
same bits."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CONFIGS, model, tokens

from nanokv.cache import KVCache
from nanokv.trace import Recorder, Trace
from nanokv.trace.schema import LEVELS, ROLES, SITES
from nanokv.transformer import Transformer

FAMILIES = ("llama", "gemma3", "gpt2")
MODELS = {family: model(CONFIGS[family]) for family in FAMILIES}
WHOLE: dict[str, Trace] = {}
LENGTH = 60
# A prefill or an appended chunk, a decoded token, a change of turn, a save and a new recorder that goes on.
ACTIONS = st.one_of(
    st.tuples(st.just("append"), st.integers(2, 12)), st.just(("decode", 1)),
    st.tuples(st.just("turn"), st.sampled_from(ROLES)), st.just(("resume", 0)),
)  # fmt: skip


def whole(family: str) -> Trace:
    """The trace of all tokens in one call."""
    if family not in WHOLE:
        recorder = Recorder(level="states")
        MODELS[family].forward(tokens(CONFIGS[family], LENGTH), observer=recorder)
        WHOLE[family] = recorder.trace
    return WHOLE[family]


class Expected:
    """The cache's simple model: a row for each position."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, str, int, int, int]] = []  # token, role, turn, chunk, step
        self.role, self.turn, self.chunk, self.step = "user", 0, 0, 0

    def append(self, ids: np.ndarray) -> None:
        self.rows += [(int(token), self.role, self.turn, self.chunk, self.step) for token in ids]
        self.chunk, self.step = self.chunk + 1, self.step + 1

    def begin(self, role: str) -> None:
        if self.chunk:
            self.turn += 1
        self.role, self.chunk = role, 0


def run(small: Transformer, actions: list[tuple[str, Any]], folder: Path) -> tuple[Trace, Expected, np.ndarray]:
    """What the actions leave: the trace on the disk, what is expected of it, and the last logits."""
    ids, cache, expected = tokens(small.config, LENGTH), small.new_cache(), Expected()
    recorder = Recorder(folder / "a.nkv", level="states")
    for action, value in actions:
        if action in ("append", "decode") and cache.length < LENGTH:
            new = ids[cache.length : cache.length + value]
            small.forward(new, cache, observer=recorder)
            expected.append(new)
        elif action == "turn":
            recorder.turn(value)
            expected.begin(value)
        elif action == "resume" and cache.length and expected.chunk:
            recorder.close()
            cache.save(folder / "a.cache", small)
            cache, recorder = KVCache.load(folder / "a.cache", small), Recorder(folder / "a.nkv", resume=True)
    recorder.close()
    assert cache.last_logits is not None
    return recorder.trace, expected, cache.last_logits


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(FAMILIES), st.lists(ACTIONS, max_size=14).map(lambda rest: [("append", 3), *rest]))
def test_any_schedule_leaves_the_trace_of_its_simple_model(family: str, actions: list[tuple[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trace, expected, logits = run(MODELS[family], actions, Path(folder))
        assert trace.check() == []
        table = trace.tokens
        rows = list(zip(*(table[name].tolist() for name in ("token_id", "role", "turn", "chunk", "step")), strict=True))
        assert rows == expected.rows and table["pos"].tolist() == list(range(len(rows)))
        equal_row_by_row(trace, whole(family))
        assert np.array_equal(logits, whole(family).logits(len(rows) - 1))


def equal_row_by_row(part: Trace, all_of_it: Trace) -> None:
    """The rows of one trace are those of another, in bits, save step, chunk, kind, turn and role."""
    n = part.length
    for name, of in (("writes", "pos"), ("reads", "dst")):
        ours, theirs = getattr(part, name), getattr(all_of_it, name)
        there = theirs[of] < n
        keys = [column for column in ("src", "dst", "pos", "kv_head", "head", "layer") if column in ours]
        one, other = (np.lexsort([table[key][rows] for key in keys]) for table, rows in ((ours, slice(None)), (theirs, there)))
        for column in set(ours) - {"step", "chunk", "kind", "turn", "role"}:
            a, b = ours[column][one], theirs[column][there][other]
            assert a.dtype == b.dtype and a.tobytes() == b.tobytes(), (name, column)
    for layer in range(part.config.n_layers):
        for site in SITES:
            assert np.array_equal(part.state(site, layer), all_of_it.state(site, layer)[:n])
        for site in ("q", "k", "v", "z"):
            ids = [f"layer{layer}.pos{pos}.{site}" for pos in range(n)]
            assert all(np.array_equal(part[name], all_of_it[name]) for name in ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_token_by_token_the_trace_is_that_of_one_call(family: str, tmp_path: Path) -> None:
    for actions in ([("decode", 1)] * 20, [("append", 7), ("append", 7), ("append", 6)]):
        folder = tmp_path / str(len(actions))
        folder.mkdir()
        equal_row_by_row(run(MODELS[family], actions, folder)[0], whole(family))


@pytest.mark.parametrize("topk", [1, 3, 100])
@pytest.mark.parametrize("family", FAMILIES)
def test_topk_keeps_the_largest_weights_of_each_row_however_they_were_split(family: str, topk: int, tmp_path: Path) -> None:
    small, full = MODELS[family], whole(family)
    ids, cache = tokens(small.config, 20), small.new_cache()
    with Recorder(tmp_path / "a.nkv", level="vectors", topk=topk) as recorder:
        for part in (ids[:8], ids[8:9], ids[9:]):
            small.forward(part, cache, observer=recorder)
    trace = recorder.trace
    assert trace.check() == [] and trace.topk == topk
    for layer in range(small.config.n_layers):
        kept, pattern = trace.pattern(layer), full.pattern(layer)[:, :20, :20]
        for head in range(small.config.n_heads):
            for dst in range(20):
                best = np.argsort(-pattern[head, dst, : dst + 1], kind="stable")[:topk]
                expected = np.zeros(20, np.float32)
                expected[best] = pattern[head, dst][best]
                assert np.array_equal(kept[head, dst], expected)
        scores = trace.scores(layer)
        known = ~np.isnan(scores) & ~np.isneginf(scores)
        assert np.array_equal(scores[known], full.scores(layer)[:, :20, :20][known])
    reads = trace.reads
    of_one_head = reads["dst"][(reads["layer"] == 0) & (reads["head"] == 0)]
    assert len(reads["weight"]) == len(reads["src"]) and np.bincount(of_one_head).max() <= topk


def answers(observed: Callable[[], Any]) -> list[bytes]:
    """The bits of the logits and of the cache after a prefill, a chunk and two tokens."""
    small, ids = MODELS["gemma3"], tokens(CONFIGS["gemma3"], 30)
    cache, observer = small.new_cache(), observed()
    parts = (ids[:20], ids[20:28], ids[28:29], ids[29:])
    found = [small.forward(part, cache, observer=observer).tobytes() for part in parts]
    return found + [cache.keys(layer).tobytes() + cache.values(layer).tobytes() for layer in range(4)]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("topk", [None, 2])
def test_recording_changes_no_bit_of_logits_or_cache(level: str, topk: int | None, tmp_path: Path) -> None:
    plain = answers(lambda: None)
    assert answers(lambda: Recorder(level=level, topk=topk)) == plain
    assert answers(lambda: Recorder(tmp_path / "a.nkv", level=level, topk=topk)) == plain
