"""A trace on the disk: complete or absent, checked, read when it is used, gone on with; whatever happens to the process."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import CONFIGS, model, tokens

from nanokv import safetensors_file
from nanokv.cache import KVCache
from nanokv.config import Config
from nanokv.errors import FileFormatError, NanokvError, TraceError
from nanokv.trace import Recorder, Trace, schema
from nanokv.trace import files as trace_files
from nanokv.trace.files import BLOCK, FileWriter, checksum_of
from nanokv.trace.recorder import rebuilt_cache
from nanokv.trace.schema import AUDIT_EVERY, LEVELS
from nanokv.trace.steps import OPEN
from nanokv.transformer import Transformer

ROOT = Path(__file__).parent.parent
LLAMA = CONFIGS["llama"]
IDS = tokens(LLAMA, 12)


def record(path: Path, level: str = "states", parts: tuple[int, ...] = (4, 1, 2)) -> Transformer:
    small = model(LLAMA, ops="numpy")
    cache = small.new_cache()
    with Recorder(path, level=level) as recorder:
        for part in np.split(IDS[: sum(parts)], np.cumsum(parts)[:-1]):
            small.forward(part, cache, observer=recorder)
    return small


def same(a: Trace, b: Trace) -> bool:
    """Whether two traces hold the same arrays."""
    return [step.number for step in a.steps] == [step.number for step in b.steps] and all(
        np.array_equal(x.arrays[name], y.arrays[name], equal_nan=x.arrays[name].dtype.kind == "f")
        for x, y in zip(a.steps, b.steps, strict=True) for name in {*x.arrays, *y.arrays}
    )  # fmt: skip


# The checksum


@pytest.mark.parametrize("n", [0, 1, 8, 4095, 4096, 4097, 20000, BLOCK, BLOCK + 4104])
def test_the_checksum_is_what_the_text_says(n: int) -> None:
    """By its definition, on Python integers."""
    data = np.random.default_rng(n).integers(0, 256, n).astype(np.uint8).tobytes()
    padded = data + bytes(-n % 4096)
    words = [int.from_bytes(padded[i : i + 8], "little") for i in range(0, len(padded), 8)]
    rows = [sum(words[i : i + 512]) % 2**64 for i in range(0, len(words), 512)]
    columns = [sum(words[i::512]) % 2**64 for i in range(512)]
    expected = zlib.crc32(b"".join(x.to_bytes(8, "little") for x in rows + columns))
    parts = np.split(np.frombuffer(data, np.uint8), sorted({n // 3, n // 2}))
    assert checksum_of(parts) == f"{expected:08x}"


def test_any_changed_bit_of_a_file_is_found_and_the_file_named(tmp_path: Path) -> None:
    record(tmp_path / "a.nkv")
    path = tmp_path / "a.nkv" / "step-000001.safetensors"
    good, random = path.read_bytes(), np.random.default_rng(0)
    levels = Trace.load(tmp_path / "a.nkv").steps[1].arrays
    for at in random.integers(8192, len(good), 60):
        bad = bytearray(good)
        bad[at] ^= 1 << int(random.integers(8))
        path.write_bytes(bad)
        step, refused = Trace.load(tmp_path / "a.nkv").steps[1], set()
        for name in levels:
            try:
                _ = step.arrays[name]
            except FileFormatError as error:
                assert str(path) in str(error) and "damaged" in str(error)
                refused.add(name)
        assert refused and len(refused) < len(levels)  # those of one level; the others can still be read


# Damaged and foreign files

ANY = schema.Stored("", "", "", "", "writes", "")

def rewritten(path: Path, change: Callable[[dict[str, np.ndarray], dict[str, str]], Any]) -> None:
    """Write a step's file anew, its arrays and metadata changed, its checksums right."""
    tensors, about = safetensors_file.open_safetensors(path)
    arrays = {
        name: np.array(t.raw.view(safetensors_file.DTYPES[t.kind][1])).reshape(t.shape) for name, t in tensors.items()
    }
    change(arrays, about)
    about = {name: text for name, text in about.items() if not name.startswith("sum.")}
    path.unlink()
    file = FileWriter(str(path.parent), path.name, 8192, np.empty(BLOCK, np.uint8))
    for level in LEVELS:
        file.section(level)
        file.small({name: array for name, array in arrays.items() if schema.BY_NAME.get(name, ANY).level == level})
    file.finish(about)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut short": (lambda p: p.write_bytes(p.read_bytes()[:-10]), "step-000001"),
    "empty": (lambda p: p.write_bytes(b""), "step-000001"),
    "garbage": (lambda p: p.write_bytes(os.urandom(5000)), "step-000001"),
    "another step's": (lambda p: p.write_bytes(p.with_name("step-000002.safetensors").read_bytes()), "holds step 2"),
    "another format": (lambda p: safetensors_file.save(p, {"x": IDS}, {"format": "cats"}), "has the format 'cats'"),
    "an array too many": (lambda p: rewritten(p, lambda a, m: a.update(cats=IDS)), "'cats', which no"),
    "an array too few": (lambda p: rewritten(p, lambda a, m: a.pop("k_hash")), "holds no k_hash"),
    "another type": (lambda p: rewritten(p, lambda a, m: a.update(turn=a["turn"].astype(np.int64))), "turn is <i8"),
    "another shape": (lambda p: rewritten(p, lambda a, m: a.update(k=a["k"][:, :, :1])), "k is <f4"),
    "no start": (lambda p: rewritten(p, lambda a, m: m.pop("start")), "its start is ''"),
    "a start that is no number": (lambda p: rewritten(p, lambda a, m: m.update(start="-1")), "its start is '-1'"),
    "slots that nobody can have read": (lambda p: rewritten(p, lambda a, m: a["read_stop"].fill(2**30)), "can have read"),
    "fewer weights than reads": (lambda p: rewritten(p, lambda a, m: a["read_first"].fill(1)), "numbers for"),
    "an unknown role": (lambda p: rewritten(p, lambda a, m: a["role"].fill(9)), "role 9"),
    "missing": (lambda p: p.unlink(), "step 1 is missing"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_step_is_a_clear_error(tmp_path: Path, what: str) -> None:
    record(tmp_path / "a.nkv")
    damage, message = DAMAGE[what]
    damage(tmp_path / "a.nkv" / "step-000001.safetensors")
    with pytest.raises(NanokvError, match=re.escape(message)):
        trace = Trace.load(tmp_path / "a.nkv")
        _ = trace.tokens, trace.pattern(0), trace.keys(0)


@pytest.mark.parametrize("name, value", [
    ("version", 2), ("schema", "cats"), ("level", "all"), ("topk", 0), ("topk", True), ("dtype", "float16"),
    ("architecture", "cat"), ("config", None), ("config", {"n_layers": 1}), ("model_hash", 7), ("model_name", None),
])  # fmt: skip
def test_a_trace_json_that_is_not_right_is_a_clear_error(tmp_path: Path, name: str, value: Any) -> None:
    record(tmp_path / "a.nkv")
    file = tmp_path / "a.nkv" / "trace.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    with pytest.raises(FileFormatError, match=r"trace\.json"):
        Trace.load(tmp_path / "a.nkv")


def test_unfinished_and_foreign_files_in_the_folder_are_passed_over(tmp_path: Path) -> None:
    record(tmp_path / "a.nkv")
    before = Trace.load(tmp_path / "a.nkv")
    for name in (".step-000003.safetensors.part", "notes.txt", "step-3.safetensors"):
        (tmp_path / "a.nkv" / name).write_bytes(b"half")
    assert same(Trace.load(tmp_path / "a.nkv"), before)


# Lazy, flat


def test_opening_a_trace_of_a_gigabyte_is_instant(tmp_path: Path) -> None:
    """A sparse file stands in for the weights."""
    n, heads = 2900, 64
    record(tmp_path / "a.nkv", level="weights", parts=(4,))
    about = json.loads((tmp_path / "a.nkv" / "trace.json").read_text())
    about["config"] |= {"n_layers": 1, "n_heads": heads, "n_kv_heads": 1, "sliding": [False], "n_ctx": 4000}
    (tmp_path / "a.nkv" / "trace.json").write_text(json.dumps(about))
    path = tmp_path / "a.nkv" / "step-000000.safetensors"
    path.unlink()
    (tmp_path / "a.nkv" / "audit-000000.safetensors").unlink()
    file = FileWriter(str(path.parent), path.name, 4096, np.empty(BLOCK, np.uint8))
    file.section("writes")
    file.small(_columns(n, heads))
    file._end_section()
    file._write_summed()
    file._at += 4 * heads * n * (n + 1) // 2
    file.name("weight", (heads * n * (n + 1) // 2,), "<f4")
    os.ftruncate(file._file, 4096 + file._at)
    file._level = ""
    file.finish({"format": "nanokv-trace-step 1", "step": "0", "start": "0"})
    assert path.stat().st_size > 2**30
    began = time.perf_counter()
    trace = Trace.load(tmp_path / "a.nkv")
    assert trace.length == n and trace.tokens["token_id"][-1] == n - 1 and len(trace.steps) == 1
    assert time.perf_counter() - began < 0.5


def _columns(n: int, heads: int) -> dict[str, np.ndarray]:
    """The arrays of level `writes` of a call of n tokens, one layer, one key/value head."""
    zeros = np.zeros((1, n, 1))
    return {
        "k_hash": zeros.astype(np.uint64), "v_hash": zeros.astype(np.uint64), "k_norm": zeros.astype(np.float32),
        "v_norm": zeros.astype(np.float32), "token_id": np.arange(n, dtype=np.int32), "text_end": np.zeros(n, np.int32),
        "turn": np.zeros(n, np.int32), "chunk": np.zeros(n, np.int32), "write_slot": np.zeros(1, np.int32),
        "read_layer": np.zeros(1, np.int32), "read_kv_head": np.zeros((1, heads), np.int32),
        "read_first": np.zeros((1, n), np.int32), "read_stop": np.arange(1, n + 1, dtype=np.int32)[None],
        "role": np.zeros(n, np.uint8), "sampled": np.zeros(n, np.uint8), "text": np.zeros(0, np.uint8),
    }  # fmt: skip


def test_a_trace_of_more_steps_than_files_can_be_open(tmp_path: Path) -> None:
    small, cache = model(LLAMA, ops="numpy"), KVCache(LLAMA)
    with Recorder(tmp_path / "a.nkv", level="vectors") as recorder:
        for token in tokens(LLAMA, 190):
            small.forward([token], cache, observer=recorder)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + OPEN + 20, hard))
        trace = Trace.load(tmp_path / "a.nkv")
        assert trace.check() == [] and trace.pattern(1).shape == (6, 190, 190)
        assert np.array_equal(trace.keys(2), cache.keys(2))
        assert len(trace.audits) == 190 // AUDIT_EVERY + 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_memory_stays_flat_however_long_the_run(tmp_path: Path) -> None:
    """A thousand calls of one size, as the model reports them."""
    small, cache = model(LLAMA, ops="numpy"), KVCache(LLAMA)
    small.forward(IDS[:3], cache)
    recorder, events = Recorder(tmp_path / "a.nkv", level="states"), []

    class Tape(Recorder):
        def __getattribute__(self, name: str) -> Any:
            own = super().__getattribute__(name)
            if name not in ("begin", "write", "read", "state", "end"):
                return own
            return lambda *given: (events.append((name, given)), own(*given))[1]

    small.forward(IDS[3:4], cache, observer=Tape(level="states"))
    recorder._describe(small)
    recorder._length = 3
    held = []
    tracemalloc.start()
    try:
        for i in range(1000):
            for name, given in events:
                getattr(recorder, name)(*given)
            if i in (200, 999):
                held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert held[1] - held[0] < 50_000, held


# A process that is killed, a disk that is full


KILLED = """
import os, random, signal, sys, time
sys.path.insert(0, {tests!r})
from models import CONFIGS, model, tokens
from nanokv.trace import Recorder
small, ids = model(CONFIGS["llama"], ops="numpy"), tokens(CONFIGS["llama"], 200)
random.seed(0)
for i in range(30):
    child = os.fork()
    if child == 0:
        cache, recorder = small.new_cache(), Recorder(f"{{i}}.nkv", level="states")
        small.forward(ids[:5], cache, observer=recorder)
        for token in ids[5:]:
            small.forward([token], cache, observer=recorder)
        os._exit(0)
    time.sleep(random.uniform(0.002, 0.08))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


def test_a_recording_that_is_killed_at_any_moment_leaves_all_completed_steps(tmp_path: Path) -> None:
    script = KILLED.format(tests=str(Path(__file__).parent))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True, timeout=120)
    small, ids = model(LLAMA, ops="numpy"), tokens(LLAMA, 200)
    lengths = []
    for folder in tmp_path.glob("*.nkv"):
        if not (folder / "trace.json").exists():
            continue
        trace = Trace.load(folder)
        lengths.append(trace.length)
        if trace.length:
            assert np.array_equal(trace.tokens["token_id"], ids[: trace.length])
            assert len(lengths) % 5 or trace.check() == []  # of some, for it takes its time
    longest = max(tmp_path.glob("*.nkv"), key=lambda folder: len(list(folder.glob("step-*"))))
    assert max(lengths) > 5 and len(set(lengths)) > 3, lengths
    go_on_after_a_kill(longest, small, ids)


def go_on_after_a_kill(folder: Path, small: Transformer, ids: np.ndarray) -> None:
    """The trace that a killed process left is gone on with, from its own tokens."""
    left = Trace.load(folder)
    cache = rebuilt_cache(left, small)
    with Recorder(folder, resume=True) as recorder:
        small.forward(ids[left.length : left.length + 3], cache, observer=recorder)
    assert recorder.trace.length == left.length + 3 and recorder.trace.check() == []


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, after: int) -> Iterator[list[int]]:
    """The disk is full after so many calls to it; it takes half of what the first refused call gives."""
    calls = [0]

    def counted(real: Callable[..., Any], halves: bool = False) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            calls[0] += 1
            if halves and calls[0] == after + 1:
                file, pieces, at = given
                return real(file, [pieces[0][: len(pieces[0]) // 2]], at)
            if calls[0] > after:
                raise OSError(28, "No space left on device")
            return real(*given)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(trace_files.os, "pwritev", counted(os.pwritev, halves=True))
        patch.setattr(trace_files.os, "replace", counted(os.replace))
        yield calls


@pytest.mark.parametrize("after", range(7))
def test_a_full_disk_loses_only_the_call_in_flight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """At every moment that the disk can refuse; then there is room again, and the run goes on."""
    small, cache = model(LLAMA, ops="numpy"), KVCache(LLAMA)
    recorder, done = Recorder(tmp_path / "a.nkv", level="states"), 0
    small.forward(IDS[:4], cache, observer=recorder)
    with failing(monkeypatch, after):
        for i in range(4, 8):
            before = cache.tokens, cache.last_logits, cache.steps
            try:
                small.forward(IDS[i : i + 1], cache, observer=recorder)
                done += 1
            except OSError as error:
                assert error.filename is None or error.filename.startswith(str(tmp_path / "a.nkv" / "step-"))
                assert cache.tokens is before[0] and cache.last_logits is before[1] and cache.steps == before[2]
                break
    assert done == after // 2 and not list((tmp_path / "a.nkv").glob(".*"))
    assert recorder.trace.length == 4 + done and recorder.trace.check() == []
    for i in range(4 + done, 8):
        small.forward(IDS[i : i + 1], cache, observer=recorder)
    recorder.close()
    record(tmp_path / "b.nkv", parts=(4, 1, 1, 1, 1))
    assert same(recorder.trace, Trace.load(tmp_path / "b.nkv")) and recorder.trace.check() == []


FULL = """
import resource, signal, sys
sys.path.insert(0, {tests!r})
from models import CONFIGS, model, tokens
from nanokv.trace import Recorder, Trace
small, ids = model(CONFIGS["llama"], ops="numpy"), tokens(CONFIGS["llama"], 190)
cache = small.new_cache()
{limit}
try:
    with Recorder({folder!r}, level="states") as recorder:
        for token in ids:
            small.forward([token], cache, observer=recorder)
except OSError as error:
    trace = Trace.load({folder!r})
    print(error.filename is not None, trace.length == cache.length > 3, trace.check() == [])
"""


def full(tmp_path: Path, folder: Path, limit: str) -> str:
    script = FULL.format(tests=str(Path(__file__).parent), folder=str(folder), limit=limit)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    return done.stdout.strip() or done.stderr


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    """Steps grow with the cache, until one is larger than a file may be."""
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (24_000, 24_000))"
    assert full(tmp_path, tmp_path / "a.nkv", limit) == "True True True"


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path / "disk")], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs more rights; the test before this one needs none")
    try:
        assert full(tmp_path, tmp_path / "disk" / "a.nkv", "") == "True True True"
    finally:
        subprocess.run(["umount", str(tmp_path / "disk")], check=True)


# Going on


def test_a_resumed_run_appends_to_its_trace(tmp_path: Path) -> None:
    small, cache = model(LLAMA, ops="numpy"), KVCache(LLAMA)
    with Recorder(tmp_path / "a.nkv", level="states") as recorder:
        recorder.turn("system")
        small.forward(IDS[:4], cache, observer=recorder)
        cache.save(tmp_path / "a.cache", small)
    cache = KVCache.load(tmp_path / "a.cache", small)
    with Recorder(tmp_path / "a.nkv", resume=True) as recorder:
        assert recorder.level == "states"
        small.forward(IDS[4:5], cache, observer=recorder)  # still the same turn
        recorder.turn("user")
        small.forward(IDS[5:7], cache, observer=recorder)
    table = recorder.trace.tokens
    assert table["token_id"].tolist() == IDS[:7].tolist() and table["step"].tolist() == [0] * 4 + [1, 2, 2]
    assert table["turn"].tolist() == [0] * 5 + [1, 1] and table["chunk"].tolist() == [0] * 4 + [1, 0, 0]
    assert table["role"].tolist() == ["system"] * 5 + ["user"] * 2
    assert recorder.trace.check() == [] and [audit.step for audit in recorder.trace.audits] == [0, 2]


PROCESS = """
import sys
sys.path.insert(0, {tests!r})
import numpy as np
from models import CONFIGS, model, tokens
from nanokv.cache import KVCache
from nanokv.generate import generate
from nanokv.trace import Recorder
small, ids = model(CONFIGS["gemma3"], ops="numba"), tokens(CONFIGS["gemma3"], 40)
resumed = "resumed" in sys.argv
cache = KVCache.load("a.cache", small) if resumed else small.new_cache()
with Recorder("a.nkv", **({{"resume": True}} if resumed else {{"level": "states"}})) as recorder:
    if not resumed:
        small.forward(ids, cache, observer=recorder)
    written = list(generate(small, cache=cache, max_new_tokens=4, observer=recorder))
cache.save("a.cache", small)
np.savez("resumed.npz" if resumed else "first.npz", logits=cache.last_logits, written=written)
"""


def test_a_run_that_is_resumed_in_a_new_process_goes_on_identically(tmp_path: Path) -> None:
    from nanokv.generate import generate

    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for mode in ("first", "resumed"):
        script = PROCESS.format(tests=str(Path(__file__).parent))
        subprocess.run([sys.executable, "-c", script, mode], cwd=tmp_path, env=environment, check=True)
    small, ids = model(CONFIGS["gemma3"], ops="numba"), tokens(CONFIGS["gemma3"], 40)
    cache, whole = small.new_cache(), Recorder(level="states")
    small.forward(ids, cache, observer=whole)
    written = list(generate(small, cache=cache, max_new_tokens=8, observer=whole))
    first, resumed = np.load(tmp_path / "first.npz"), np.load(tmp_path / "resumed.npz")
    assert [*first["written"], *resumed["written"]] == written
    assert np.array_equal(resumed["logits"], cache.last_logits)
    trace = Trace.load(tmp_path / "a.nkv")
    assert trace.check() == [] and np.array_equal(trace.state("resid_post", 3), whole.trace.state("resid_post", 3))
    assert np.array_equal(trace.pattern(2), whole.trace.pattern(2))


def test_what_does_not_go_on_where_the_trace_ends_is_refused(tmp_path: Path) -> None:
    small = record(tmp_path / "a.nkv")
    cache = KVCache(LLAMA)
    small.forward(IDS[:6], cache)

    def resume(model_: Transformer, cache_: KVCache, **options: Any) -> None:
        with Recorder(tmp_path / "a.nkv", resume=True, **options) as recorder:
            model_.forward(IDS[7:8], cache_, observer=recorder)

    with pytest.raises(TraceError, match="ends before position 7, and the cache holds 6"):
        resume(small, cache)
    small.forward([60], cache)
    with pytest.raises(TraceError, match="other tokens"):
        resume(small, cache)
    other = model(LLAMA, seed=1)
    with pytest.raises(TraceError, match="another model"):
        resume(other, other.new_cache())
    with pytest.raises(TraceError, match="has level 'states' and topk None"):
        resume(small, cache, level="writes")
    with pytest.raises(TraceError, match="give its path"):
        Recorder(resume=True)
    with pytest.raises(FileFormatError, match="no trace"):
        Recorder(tmp_path / "b.nkv", resume=True)
    assert Trace.load(tmp_path / "a.nkv").length == 7 and cache.length == 7


def test_a_cache_is_rebuilt_from_a_trace_or_refused(tmp_path: Path) -> None:
    small = record(tmp_path / "a.nkv")
    trace = Trace.load(tmp_path / "a.nkv")
    cache = rebuilt_cache(trace, small)
    assert cache.steps == 3 and cache.length == 7
    with pytest.raises(TraceError, match=r"step0\.layer0\.k is not what this model computes"):
        rebuilt_cache(trace, model(LLAMA, seed=1, ops="numpy"))


def test_one_recorder_is_for_one_sequence(tmp_path: Path) -> None:
    small, recorder = model(LLAMA, ops="numpy"), Recorder()
    small.forward(IDS[:3], observer=recorder)
    with pytest.raises(TraceError, match="one sequence"):
        small.forward(IDS[:3], observer=recorder)
    cache = small.new_cache()
    small.forward(IDS[:2], cache, observer=(again := Recorder()))
    small.forward(IDS[2:3], cache)  # not recorded
    with pytest.raises(TraceError, match="ends before position 2, and the cache holds 3"):
        small.forward(IDS[3:4], cache, observer=again)


def test_a_trace_may_begin_within_a_sequence(tmp_path: Path) -> None:
    small, cache = model(LLAMA), KVCache(LLAMA)
    small.forward(IDS[:3], cache)
    with Recorder(tmp_path / "a.nkv", level="states") as recorder:
        small.forward(IDS[3:5], cache, observer=recorder)
        small.forward(IDS[5:6], cache, observer=recorder)
    trace = recorder.trace
    assert trace.tokens["pos"].tolist() == [3, 4, 5] and trace.steps[0].number == 1 and trace.check() == []
    assert trace.reads["src"][trace.reads["dst"] == 3].max() == 3 and trace["step1.layer0.head0.pattern"].shape == (2, 5)


def test_a_config_with_everything_is_read_back(tmp_path: Path) -> None:
    for family, config in CONFIGS.items():
        small = model(config, ops="numpy")
        with Recorder(tmp_path / f"{family}.nkv", topk=2) as recorder:
            small.forward([1, 2, 3], observer=recorder)
        trace = Trace.load(tmp_path / f"{family}.nkv")
        assert trace.config == config and isinstance(trace.config, Config) and trace.topk == 2
