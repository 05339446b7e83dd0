"""`show` tells a trace's events, those that matter first; `diff` finds where two traces part."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from models import CONFIGS, model, tokens
from test_trace import recorded

from nanokv.cli import main
from nanokv.edits import Add, Cut
from nanokv.errors import FileFormatError, TraceError
from nanokv.generate import generate
from nanokv.handmade import induction
from nanokv.trace import Recorder, Trace
from nanokv.trace.diff import Difference
from nanokv.trace.explain import diff, show
from nanokv.trace.steps import RecordedStep

READ = re.compile(r"\s+layer (\d+) head (\d+): .* \((\d+)\) reads (\d\.\d\d) of (?:.* \((\d+)\) \(written .*\)|itself)(; .*)?")


def spoken(text: str = "the cat sat on the mat and the cat", new: int = 0, level: str = "weights") -> Trace:
    """The induction model on a text, by which new tokens are then written."""
    handmade, recorder = induction(32, 32), Recorder(level=level)
    cache = handmade.new_cache()
    handmade.forward(handmade.tokenizer.encode(text), cache, observer=recorder)
    list(generate(handmade, cache=cache, max_new_tokens=new, observer=recorder))
    return recorder.trace


def of_weights(pattern: np.ndarray) -> Trace:
    """A trace of a model whose attention is given, [L, H, S, S]: what show looks at."""
    config = CONFIGS["llama"]
    small, recorder = model(config, ops="numpy"), Recorder(level="weights")
    small.forward(tokens(config, pattern.shape[2]), observer=recorder)
    trace = recorder.trace
    inside = np.tril(np.ones(pattern.shape[2:], bool))
    return with_arrays(trace, weight=np.concatenate([each[:, inside].reshape(-1) for each in pattern], dtype=np.float32))


def with_arrays(trace: Trace, **arrays: np.ndarray) -> Trace:
    """The trace with other arrays in its last step."""
    step = trace.steps[-1]
    other = RecordedStep(step.number, step.start, dict(step.arrays) | arrays, trace.about, {})
    return Trace(trace.about, [*trace.steps[: len(trace.steps) - 1], other])


def test_a_call_tells_what_it_wrote_and_whom_it_read() -> None:
    lines = list(show(spoken(new=1)))
    assert (
        lines[1] == "  each token writes 2 keys and as many values to the cache: one for each of 1 key/value head in 2 layers"
    )
    assert "step 0 (turn 0, user) wrote positions 0 to 9: '<bos>' 'the' 'cat' 'sat' 'on' 'the' 'mat' 'and' 'the' 'cat'" in lines
    assert "step 1 (turn 1, model, sampled) wrote position 10: 'sat'" in lines
    assert "  layer 1 head 0: 'sat' (10) reads 1.00 of 'on' (4) (written in step 0, user)" in lines
    before = "  the token just before: layer 0 head 0: 'sat' (10) reads 1.00 of 'cat' (9) (written in step 0, user)"
    assert before in lines


def test_a_sink_is_named_once_and_not_told_read_by_read() -> None:
    lines = list(show(spoken(), layer=1))
    assert "  sink: '<bos>' (0) draws 0.62 of all attention from later positions; not told below" in lines
    assert "  layer 1 head 0: 'cat' (9) reads 1.00 of 'sat' (3) (written in this call, user)" in lines
    assert not any("of '<bos>'" in line for line in lines) and not any("reads 0.00" in line for line in lines)
    everything = list(show(spoken(), layer=1, everything=True))
    assert any("reads 1.00 of '<bos>' (0)" in line for line in everything) and not any("sink" in line for line in everything)


def test_the_reads_that_matter_come_first_one_line_for_a_pair_of_tokens() -> None:
    """Layer 1 head 2: position 6 reads 0.9 of 2; two heads of layer 2 read some of it, too; all else is spread evenly."""
    pattern = np.broadcast_to(np.tril(np.ones((8, 8))) / np.arange(1, 9)[:, None], (3, 6, 8, 8)).copy()
    pattern[1, 2, 6] = np.eye(8)[2] * 0.9 + np.eye(8)[3] * 0.1
    trace = of_weights(pattern)
    texts = trace.tokens["text"]
    told = [line for line in show(trace) if READ.fullmatch(line)]
    assert told[0].startswith(f"  layer 1 head 2: {texts[6]!r} (6) reads 0.90 of {texts[2]!r} (2) (written in this call, user)")
    assert told[0].endswith("; 17 other heads read 0.1 or more")
    pairs = Counter((match[3], match[5]) for match in map(READ.fullmatch, told) if match)
    assert max(pairs.values()) == 1
    weights = [float(match[4]) for match in map(READ.fullmatch, told) if match]
    assert weights == sorted(weights, reverse=True)


def test_with_everything_each_read_is_told_once() -> None:
    trace = recorded(level="weights")[1]
    told = [READ.fullmatch(line) for line in show(trace, everything=True, most=10_000)]
    found = Counter((int(m[1]), int(m[2]), int(m[3]), int(m[5] or m[3])) for m in told if m)
    reads = trace.reads
    columns = [reads[name].tolist() for name in ("layer", "head", "dst", "src")]
    assert found == Counter(zip(*columns, strict=True))


def test_only_what_is_chosen_is_told() -> None:
    trace = recorded(level="weights")[1]
    for chosen in ({"step": 2, "layer": 1}, {"head": 3, "pos": 5}, {"src": 2}, {"pos": 4, "src": 1}):
        told = [m for m in map(READ.fullmatch, show(trace, everything=True, most=10_000, **chosen)) if m]  # type: ignore[arg-type]
        assert told
        for match in told:
            layer, head, dst, src = (int(part) for part in (match[1], match[2], match[3], match[5] or match[3]))
            facts = {"layer": layer, "head": head, "pos": dst, "src": src, "step": 0 if dst < 4 else 1 if dst == 4 else 2}
            assert all(facts[name] == value for name, value in chosen.items())


@pytest.mark.parametrize("by", ["pos", "layer", "head"])
def test_by_position_layer_or_head_the_shares_make_a_whole(by: str) -> None:
    trace = recorded(level="weights")[1]
    lines = list(show(trace, by=by, most=100))  # type: ignore[arg-type]
    titles = [line for line in lines if re.match(r"  (layer \d+|layer \d+ head \d+|'.*' \(\d+\)) reads \d", line)]
    expected = {"pos": 7, "layer": 3 * trace.config.n_layers, "head": 3 * trace.config.n_layers * trace.config.n_heads}
    assert len(titles) == expected[by]
    for title in titles:
        assert sum(float(share) for share in re.findall(r"(\d\.\d\d) of", title)) == pytest.approx(1, abs=0.03)


def test_by_head_those_that_read_most_of_other_tokens_come_first() -> None:
    lines = [line for line in show(spoken(), by="head") if "reads" in line]
    assert lines[0] == "  layer 1 head 0 reads 0.30 of other tokens, 0.10 of itself, 0.60 of sinks"
    assert lines[1] == "    layer 1 head 0: 'the' (5) reads 1.00 of 'cat' (2) (written in this call, user)"
    assert lines[2] == "  layer 0 head 0 reads 0.80 of the token just before, 0.10 of itself, 0.10 of sinks"


def test_a_trace_without_weights_says_so() -> None:
    lines = list(show(recorded(level="writes")[1]))
    assert "  by how much an entry was read is recorded from level weights on" in lines and not any(
        "reads" in line for line in lines
    )


def test_where_logits_are_recorded_the_prediction_is_told() -> None:
    assert "  predicts 'sat' (p = 1.00)" in list(show(spoken(level="states")))
    assert re.fullmatch(r"  predicts (token \d+|'\d+') \(p = 0\.\d\d\)", list(show(recorded()[1]))[4])


def test_interventions_are_told() -> None:
    small, ids, recorder = model(CONFIGS["llama"]), tokens(CONFIGS["llama"], 7), Recorder()
    vector = np.ones(small.config.d_model, np.float32)
    small.forward(ids, edits=[Cut(1, 6, 4, head=2), Add("mlp_out", 0, 5, vector)], observer=recorder)
    six, four, five = (repr(str(ids[pos])) for pos in (6, 4, 5))
    lines = list(show(recorder.trace))
    assert f"  intervened (cut) in layer 1 head 2: pattern of {six} (6) reading {four} (4)" in lines
    assert f"  intervened (add) in layer 0: mlp_out of {five} (5)" in lines


def test_with_topk_the_reads_kept_are_told() -> None:
    handmade, recorder = induction(32, 32), Recorder(level="weights", topk=1)
    handmade.forward(handmade.tokenizer.encode("the cat sat on the mat and the cat"), observer=recorder)
    lines = list(show(recorder.trace, layer=1))
    assert "  layer 1 head 0: 'cat' (9) reads 1.00 of 'sat' (3) (written in this call, user)" in lines


@pytest.mark.parametrize(
    "chosen, message",
    [({"step": 4}, "step 4"), ({"layer": 2}, "layers are 0 to 1"), ({"head": 1}, "heads are 0 to 0"),
     ({"pos": 99}, "position 99"), ({"src": -1}, "position -1"), ({"by": "magic"}, "read, pos, layer or head"),
     ({"most": -1}, "most is -1")],
)  # fmt: skip
def test_a_choice_of_what_is_not_there_is_a_clear_error(chosen: dict[str, int], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        list(show(spoken(), **chosen))  # type: ignore[arg-type]


# diff


def run(
    *calls: int, family: str = "gemma3", level: str = "states", ops: str = "numba", seed: int = 0, **options: object
) -> Trace:
    """The same twelve tokens in calls of these lengths."""
    config = CONFIGS[family]
    small, ids, recorder = model(config, seed=seed, ops=ops), tokens(config, 12), Recorder(level=level)
    cache, at = small.new_cache(), 0
    for n in calls:
        small.forward(ids[at : at + n], cache, observer=recorder, **options)  # type: ignore[arg-type]
        at += n
    return recorder.trace


def test_a_decode_is_equal_to_the_prefill_in_every_bit() -> None:
    whole = run(12)
    for other in (run(5, 1, 1, 5), run(*[1] * 12)):
        found = diff(whole, other)
        assert found.equal and [*found.lines()][-1].startswith("equal in every bit: ")
        assert found.extent == "at 12 positions"
        config = whole.config
        assert found.sites["resid_mid"].compared == config.n_layers * 12 * config.d_model
        assert found.sites["pattern"].compared == config.n_layers * config.n_heads * 12 * 13 // 2
        assert found.sites["logits"].compared == 12 * config.vocab_size


def test_numpy_and_numba_part_by_rounding_and_are_equal_within_a_tolerance() -> None:
    a, b = run(12), run(12, ops="numpy")
    found = diff(a, b, names=("numba", "numpy"))
    assert not found.equal and found.first is not None
    name, here, there = found.first
    assert name.startswith("layer0.pos0.") and here != there
    for site, at in found.sites.items():
        assert at.differ == 0 or 0 < at.largest < 1e-4
        if site not in ("scores", "pattern", "final_scale", "logits"):
            theirs = np.abs(np.stack([a[f"step0.layer{l}.{site}"] - b[f"step0.layer{l}.{site}"] for l in range(4)]))
            assert at.largest == pytest.approx(theirs.max(), rel=1e-5) and at.differ == np.count_nonzero(theirs)
    lines = list(found.lines())
    assert lines[0] == f"the first that differs: {name}" and lines[1] == f"  numba  {here}" and lines[2] == f"  numpy  {there}"
    assert diff(a, b, tolerance=1e-4).equal
    assert next(iter(diff(a, b, tolerance=1e-4).lines())).startswith("equal to within 0.0001: ")


def changed(trace: Trace, name: str, at: tuple[int, ...], value: float) -> Trace:
    """The trace with one number of its last step changed."""
    array = trace.steps[-1].arrays[name].copy()
    array[at] = value
    return with_arrays(trace, **{name: array})


@pytest.mark.parametrize(
    "name, at, first",
    [("attn_out", (2, 1, 7), "layer2.pos6.attn_out[7]"), ("k", (1, 0, 1, 3), "layer1.pos5.k[1,3]"),
     ("resid_pre", (0, 6, 0), "layer0.pos11[0]"), ("logits", (3, 9), "pos8.logits[9]"),
     ("final_scale", (3,), "pos8.final_scale"), ("z", (3, 6, 5, 5), "layer3.pos11.z[5,5]")],
)  # fmt: skip
def test_the_first_difference_is_the_changed_number(name: str, at: tuple[int, ...], first: str) -> None:
    found = diff(run(12), changed(run(5, 7), name, at, 0.5))
    assert found.first is not None and found.first[0] == first and found.first[2] == "0.5"
    assert sum(site.differ for site in found.sites.values()) == 1 and found.sites[name].where == first


def test_a_changed_weight_or_score_is_found_by_its_head_and_slot() -> None:
    for array, site in (("weight", "pattern"), ("score", "scores")):
        trace = run(5, 7, family="llama")
        reads = trace.reads
        row = next(i for i in np.flatnonzero(reads["step"] == 1) if reads["layer"][i] == 1 and reads["head"][i] == 4
                   and reads["dst"][i] == 9 and reads["src"][i] == 3)  # fmt: skip
        found = diff(run(12, family="llama"), changed(trace, array, (row - np.count_nonzero(reads["step"] == 0),), 0.5))
        assert found.first is not None and found.first[0] == f"layer1.pos9.{site}[4,3]"


def test_nan_equals_nan_and_minus_zero_is_not_zero() -> None:
    same = diff(changed(run(12), "z", (0, 0, 0, 0), np.nan), changed(run(12), "z", (0, 0, 0, 0), np.nan))
    assert same.equal
    zeros = [changed(run(12), "z", (0, 0, 0, 0), value) for value in (0.0, -0.0)]
    found = diff(*zeros)
    assert found.first == ("layer0.pos0.z[0,0]", "0.0", "-0.0") and found.sites["z"].largest == 0
    assert diff(*zeros, tolerance=1e-9).equal
    apart = diff(run(12), changed(run(12), "z", (0, 0, 0, 0), np.nan), tolerance=1e9)
    assert not apart.equal and apart.sites["z"].largest == np.inf


def test_where_tokens_part_what_comes_before_is_compared() -> None:
    config = CONFIGS["gemma3"]
    ids = tokens(config, 12)
    ids[8] = (ids[8] + 1) % config.vocab_size
    recorder = Recorder(level="states")
    model(config).forward(ids, observer=recorder)
    found = diff(run(12), recorder.trace)
    assert found.first == ("pos8.token_id", str(tokens(config, 12)[8]), str(ids[8])) and found.extent == "at 8 positions"
    assert all(site.differ == 0 for site in found.sites.values())


def test_a_sequence_that_ends_early_differs_where_it_ends() -> None:
    found = diff(run(12), run(5, 4))
    assert found.first == ("pos9", "there", "nothing, it has ended") and found.extent == "at 9 positions"


def test_levels_may_differ_and_hashes_stand_for_what_one_does_not_hold() -> None:
    found = diff(run(12), run(12, level="weights"))
    assert found.equal and found.sites.keys() == {"pattern"} and "what both hold is compared" in found.notes[0]
    found = diff(run(12, level="writes"), run(12, level="writes", ops="numpy"))
    assert found.first is not None and re.fullmatch(r"layer0.pos0.[kv]_hash\[\d\]", found.first[0])
    assert re.fullmatch("0x[0-9a-f]{16}", found.first[1])
    assert diff(run(12, level="writes"), run(12, level="writes", ops="numpy"), tolerance=1e-4).equal


def test_weights_of_which_other_numbers_were_kept_are_not_compared() -> None:
    small, ids, recorder = model(CONFIGS["gemma3"]), tokens(CONFIGS["gemma3"], 12), Recorder(level="states", topk=2)
    small.forward(ids, observer=recorder)
    found = diff(run(12), recorder.trace)
    assert found.equal and not found.sites.keys() & {"scores", "pattern"}
    assert found.notes == ["weights and scores are not compared, for of each row all and the 2 largest were kept"]
    assert "pattern" in diff(recorder.trace, recorder.trace).sites


def test_another_mask_is_a_difference() -> None:
    trace = run(12, level="writes")
    first = trace.steps[0].arrays["read_first"].copy()
    first[1, 7] += 1
    assert diff(run(12, level="writes"), with_arrays(trace, read_first=first)).first == ("layer1.pos7.read_first", "3", "4")


def test_traces_of_models_of_other_sizes_cannot_be_compared() -> None:
    with pytest.raises(TraceError, match="n_layers is 4 in a and 3 in b"):
        diff(run(12), run(12, family="llama"))
    with pytest.raises(TraceError, match="tolerance is -1"):
        diff(run(12), run(12), tolerance=-1)


# Dumps


def dumped(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def compared(tmp_path: Path, *lines: object) -> Difference:
    return diff(run(5, 7), dumped(tmp_path / "dump.jsonl", *lines))


def test_a_dump_of_a_few_ids_is_compared(tmp_path: Path) -> None:
    trace = run(5, 7)
    ids = ["layer1.pos5", "layer4.pos11", "step1.layer2.k", "layer0.pos3.pattern", "step1.layer1.head2.scores", "pos6.logits",
           "step0.logits", "pos6.final_scale", "step1.layer3.z", "layer2.pos9.head3.q"]  # fmt: skip
    whole = [{"id": name, "value": trace[name].tolist()} for name in ids]
    flat = [{"id": name, "shape": list(trace[name].shape), "value": trace[name].reshape(-1).tolist()} for name in ids]
    element = {"id": "step1.layer1.head2.scores[3,6]", "value": float(trace["step1.layer1.head2.scores"][3, 6])}
    found = compared(tmp_path, *whole, "", *flat, element)
    assert found.equal and found.extent == "of 21 ids"


def test_of_a_dump_the_first_difference_is_by_the_order_of_computation_not_of_lines(tmp_path: Path) -> None:
    trace = run(5, 7)
    lines = [
        {"id": name, "value": (trace[name] + 1).tolist()} for name in ("pos2.logits", "layer2.pos3", "layer0.pos9.attn_out")
    ]
    found = compared(tmp_path, *lines)
    assert found.first is not None and found.first[0] == "layer2.pos3[0]"
    assert found.sites["attn_out"].largest == pytest.approx(1) and found.sites["logits"].differ == trace.config.vocab_size


def test_a_dump_may_say_numbers_as_hexadecimal_floats_or_names(tmp_path: Path) -> None:
    trace = run(5, 7)
    hexadecimal = [float(x).hex() for x in trace["layer1.pos5"]]
    scores = [str(x) for x in trace["step0.layer1.head0.scores"].reshape(-1)]  # -inf among them
    bare = '{"id": "layer1.pos2.z[0,0]", "value": NaN}'
    found = compared(tmp_path, {"id": "layer1.pos5", "value": hexadecimal},
                     {"id": "step0.layer1.head0.scores", "shape": [5, 5], "value": scores}, bare)  # fmt: skip
    assert found.first is not None and found.first[0] == "layer1.pos2.z[0,0]" and found.first[2] == "nan"


def test_ids_that_the_level_does_not_hold_are_counted(tmp_path: Path) -> None:
    trace, one = run(12, level="weights"), {"id": "layer1.pos5", "value": [0.0] * 20}
    known = {"id": "layer1.pos3.head0.pattern", "value": trace["layer1.pos3.head0.pattern"].tolist()}
    found = diff(trace, dumped(tmp_path / "a.jsonl", one, known, one))
    assert found.equal and found.notes == ["ids that a trace of level weights does not hold: 2 of resid_pre"]
    with pytest.raises(TraceError, match="has no id that the trace holds"):
        diff(trace, dumped(tmp_path / "a.jsonl", one))


BAD_LINES = {
    "{": "line 2: this is no JSON",
    "[1, 2]": "line 2: a line must be an object",
    '{"id": 5, "value": 1}': "line 2: a line must be an object",
    '{"id": "layer1.pos5"}': "line 2: a line must be an object",
    '{"id": "layer1.pos5", "value": [1, [2]]}': "line 2: the value is not a number or evenly nested",
    '{"id": "layer1.pos5", "value": [true]}': "True is no number",
    '{"id": "layer1.pos5", "value": ["one"]}': "could not convert",
    '{"id": "layer1.pos5", "value": null}': "None is no number",
    '{"id": "layer1.pos5", "value": [1e400]}': "shape",
    '{"id": "layer1.pos5", "value": [1' + "0" * 400 + "]}": "too large",
    '{"id": "layer1.pos5", "value": [1, 2], "shape": [3]}': "has 2 numbers, and the shape",
    '{"id": "layer1.pos5", "value": [1, 2], "shape": [-2]}': "list of whole numbers",
    '{"id": "layer1.pos5", "value": [1, 2], "shape": "2"}': "list of whole numbers",
    '{"id": "layer1.pos5", "value": [1, 2]}': r"layer1.pos5 has shape \[2\] here and \[20\] in the trace",
    '{"id": "layer9.pos5", "value": [1, 2]}': "layers are 0 to 3",
    '{"id": "layer1.pos50", "value": [1, 2]}': "position 50",
    '{"id": "layer1.pos5.magic", "value": [1, 2]}': "is no id",
    '{"id": "layer1.pos5[20]", "value": 1}': "not there",
    "[" * 100_000: "line 2: this is no JSON",
    '{"id": "\udcff"}': "line 2: this is no JSON",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=[str(i) for i in range(len(BAD_LINES))])
def test_a_bad_line_of_a_dump_is_a_clear_error_that_names_it(tmp_path: Path, line: str) -> None:
    path = tmp_path / "dump.jsonl"
    good = json.dumps({"id": "layer1.pos5", "value": [0.0] * 20})
    path.write_bytes(f"{good}\n{line}\n".encode("utf-8", "surrogateescape"))
    with pytest.raises(FileFormatError, match=BAD_LINES[line]) as error:
        diff(run(5, 7), path)
    assert "line 2" in str(error.value)


# The commands

PROMPT = "the cat sat on the mat and the cat"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_show_why_diff_and_export(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", PROMPT, "-o", "a.nkv", "--level", "states", "--max-new-tokens", "2"]) == 0
    assert main(["trace", PROMPT + " sat on", "-o", "b.nkv"]) == 0
    capsys.readouterr()
    assert main(["show", "a.nkv", "--by", "head", "--step", "0", "--all", "--src", "3", "--most", "5"]) == 0
    assert "layer 1 head 0: 'cat' (9) reads 1.00 of 'sat' (3)" in capsys.readouterr().out
    assert main(["why", "a.nkv", "step1.layer1.head0.pattern[0,4]", "--model", "induction"]) == 0
    assert capsys.readouterr().out.startswith("step1.layer1.head0.pattern[0,4] = 1.0   (= layer1.pos10.pattern[0,4])\n")
    assert main(["diff", "a.nkv", "b.nkv"]) == 0
    assert "equal in every bit: " in capsys.readouterr().out
    assert main(["export", "a.nkv", "-o", "a.dump", "--only", "resid_pre,logits"]) == 0
    assert main(["diff", "a.dump", "a.nkv"]) == 0
    dumped(folder / "p.jsonl", {"id": "layer1.pos3[0]", "value": 9})
    capsys.readouterr()
    assert main(["diff", "a.nkv", "p.jsonl"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("the first that differs: layer1.pos3[0]\n  a.nkv    0.0\n  p.jsonl  9.0\n")
    assert main(["diff", "a.nkv", "p.jsonl", "--tolerance", "9"]) == 0
    assert main(["export", "a.nkv", "-o", "a.jsonl"]) == 0 and (folder / "a.jsonl").is_file()


COMMANDS = {
    "an id that is none": (["why", "a.nkv", "layer1"], "'layer1' is no id"),
    "an id of many numbers": (["why", "a.nkv", "layer1.pos2"], "choose one, as in layer1.pos2[0]"),
    "what is not recorded and takes a model": (["why", "a.nkv", "layer1.pos2.q[0,0]"], "give the model (--model)"),
    "another model": (["why", "a.nkv", "layer1.pos2[0]", "--model", "automaton"], "of another model"),
    "nothing to compare with": (["diff", "a.nkv", "no.nkv"], "no.nkv"),
    "a dump with a bad line": (["diff", "a.nkv", "bad.jsonl"], "bad.jsonl line 1"),
    "two dumps": (["diff", "bad.jsonl", "bad.jsonl"], "bad.jsonl"),
    "a form that is none": (["export", "a.nkv", "-o", "a.csv"], ".parquet, .jsonl or .dump"),
    "a table that is not held": (["export", "a.nkv", "-o", "x.jsonl", "--only", "states"], "there is no table 'states'"),
    "a file that is there": (["export", "a.nkv", "-o", "bad.jsonl"], "already there"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_bad_use_of_them_is_one_clear_line_and_status_2(case: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["trace", "a b a", "-o", "a.nkv"])
    dumped(folder / "bad.jsonl", "nonsense")
    capsys.readouterr()
    arguments, message = COMMANDS[case]
    before = sorted(folder.rglob("*"))
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("nanokv: ") and error.count("\n") == 1 and message in error
    assert sorted(folder.rglob("*")) == before
