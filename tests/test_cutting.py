"""`nanokv cut` and `draw --words`: what follows from cutting an edge, and what a state would predict by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nanokv
from nanokv.cli import main
from nanokv.edits import Cut, ZeroValue
from nanokv.errors import TraceError
from nanokv.trace import Flow, Recorder, Trace, cutting
from nanokv.trace.layout import arrange
from nanokv.trace.scene import state_id

PROMPT = "the cat sat on the mat and the cat"  # with <bos>, `cat` is at 2 and 9, `sat` at 3
COPIES = "1:0:9:3"  # the last `cat` reads `sat`, in layer 1
LEARNS = "0:0:3:2"  # `sat` reads the `cat` before it, in layer 0: so it is found by the one who looks for what follows `cat`


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(new: int = 0) -> tuple[Any, Trace]:
    """The induction model and the trace of a run of it on the prompt, with so many tokens generated."""
    model, recorder = nanokv.load("induction"), Recorder(level="states")
    cache = model.new_cache()
    model.forward(model.tokenizer.encode(PROMPT), cache, observer=recorder)
    for _ in nanokv.generate(model, cache=cache, max_new_tokens=new, observer=recorder):
        pass
    return model, recorder.trace


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    capsys.readouterr()
    assert main(["cut", PROMPT, *arguments]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("edges", [(COPIES,), (LEARNS,), (COPIES, LEARNS)])
@pytest.mark.parametrize("how", ["value-zero", "knockout"])
def test_without_an_edge_of_the_induction_the_answer_is_another(
    capsys: pytest.CaptureFixture[str], edges: tuple[str, ...], how: str
) -> None:
    lines = told(capsys, *(f"--edge={edge}" for edge in edges), "--how", how)
    assert lines[0].startswith(f"{len(edges)} attention edge") and lines[0].endswith(f"({how})")
    assert "  layer 1 head 0: “sat” 3 -> “cat” 9" in lines or COPIES not in edges
    assert lines[-1] == "the answer was “sat” and becomes “<bos>”"
    (sat,) = (line.split() for line in lines if line.startswith("sat "))
    assert sat[1:4] == ["30.00", "0.00", "-30.00"] and float(sat[4]) > 0.99 > 0.01 > float(sat[5])


@pytest.mark.parametrize("edge", ["1:0:9:5", "0:0:5:4", "1:0:7:3", "1:*:9:2"])
def test_without_another_edge_nothing_changes(capsys: pytest.CaptureFixture[str], edge: str) -> None:
    *_, first, second, _, _, _, last = told(capsys, "--edge", edge)
    assert last == "the answer was “sat” and stays so"
    assert first.split()[:4] == ["sat", "30.00", "30.00", "+0.00"] and second.split()[3] == "+0.00"


def test_without_edges_given_the_strongest_are_cut(capsys: pytest.CaptureFixture[str]) -> None:
    lines = told(capsys)
    assert lines[0].startswith("1 attention edge cut") and lines[1] == "  layer 1 head 0: “sat” 3 -> “cat” 9"
    assert lines[-1] == "the answer was “sat” and becomes “<bos>”"
    assert told(capsys, "--at", "3", "--edge", LEARNS)[-1] == told(capsys, "--at=-7", "--edge", LEARNS)[-1]


def test_what_the_command_says_is_what_a_run_with_that_edit_gives(capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = run()
    tokens = model.tokenizer.encode(PROMPT)
    layer, head, dst, src = cutting.parsed(COPIES)
    for how, edit in (("value-zero", ZeroValue), ("knockout", Cut)):
        logits = model.forward(tokens, edits=[edit(layer, dst, src, head)])[-1]
        lines = list(cutting.report(model, tokens, [(layer, head, dst, src)], how))  # type: ignore[arg-type]
        assert lines == told(capsys, "--edge", COPIES, "--how", how)
        (sat,) = (line.split() for line in lines if line.startswith("sat "))
        assert float(sat[2]) == pytest.approx(float(logits[model.tokenizer.encode("sat")[-1]]), abs=0.005)


BAD_EDGES = {
    "9:0:1:0": "layers are 0 to 1",
    "1:7:9:3": "heads are 0 to 0",
    "1:0:3:9": "position 3 does not read position 9",
    "1:0:99:3": "edge 1:0:99:3 leads to position 99, and those up to the prediction are 0 to 9",
    "0:*:10:3": "edge 0:*:10:3 leads to position 10",
    "1:0:9": "'1:0:9' is no edge: write LAYER:HEAD:DST:SRC",
    "-1:0:9:3": "is no edge",
    "layer1:0:9:3": "is no edge",
    "": "'' is no edge",
}


@pytest.mark.parametrize("edge", BAD_EDGES)
def test_an_edge_that_is_not_there_is_one_clear_error(capsys: pytest.CaptureFixture[str], edge: str) -> None:
    assert main(["cut", PROMPT, f"--edge={edge}"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("nanokv: ") and printed.err.count("\n") == 1
    assert BAD_EDGES[edge] in printed.err


@pytest.mark.parametrize(
    "arguments, message",
    [(["--at", "44"], "no position 44"), (["--at=-11"], "no position -11"), (["--strongest", "0"], "strongest is 0"),
     (["--at", "5", "--edge", COPIES], "leads to position 9, and those up to the prediction are 0 to 5")],
)  # fmt: skip
def test_what_cannot_be_cut_is_one_clear_error(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["cut", PROMPT, *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and message in printed.err and printed.err.count("\n") == 1


def test_the_last_state_predicts_what_the_model_does_and_no_state_below_knows_it() -> None:
    model, trace = run()
    made = trace.flow(model).prune().lens(trace, model)
    assert made.words[state_id(2, 9)][0] == made.prediction.text == "sat"
    assert made.words[state_id(2, 9)][1] == pytest.approx(made.prediction.probability)
    assert set(made.words) == {state_id(2, 9), state_id(1, 3)}  # where its only edge begins and ends
    assert made.words[state_id(1, 3)][0] != "sat"  # to be a word and to predict it are two things


def test_at_every_sampled_token_the_state_before_it_predicts_it() -> None:
    model, trace = run(new=3)
    made = trace.flow(model, measure="attention").prune(1.0).lens(trace, model)
    texts = made.tokens.text
    for pos in (9, 10, 11):
        assert made.tokens.sampled[pos + 1] and made.words[state_id(2, pos)][0] == texts[pos + 1]
    assert [texts[pos] for pos in (10, 11, 12)] == ["sat", "on", "the"] and made.prediction.text == "cat"


def test_the_words_stand_beside_their_states_and_the_legend_says_what_they_are() -> None:
    model, trace = run()
    made = trace.flow(model).prune()
    plain, seen = arrange(made), arrange(made.lens(trace, model))
    added = {text.lines for text in seen.texts} - {text.lines for text in plain.texts}
    assert ("sat",) in [text.lines for text in seen.texts if text.size < 7]
    assert any("logit lens" in line for lines in added for line in lines)
    (tip,) = (dot.tip for dot in seen.dots if dot.name == state_id(2, 9))
    assert tip.endswith("it would predict “sat”, p = 1")


def test_words_need_the_states_of_the_run_and_its_model() -> None:
    model, trace = run()
    made: Flow = trace.flow(model)
    with pytest.raises(TraceError, match="was given another model"):
        made.lens(trace, nanokv.load(str(Path(__file__).parent / "checkpoints" / "llama")))
    low = Recorder(level="weights")
    model.forward(model.tokenizer.encode(PROMPT), observer=low)
    with pytest.raises(TraceError, match="states"):
        low.trace.flow(model, measure="attention").lens(low.trace, model)


def test_the_command_writes_the_words_into_the_picture() -> None:
    for option in ([], ["--words"]):
        assert main(["draw", PROMPT, *option, "-o", "flow.dot"]) == 0
        dot = Path("flow.dot").read_text()
        assert ("it would predict “sat”" in dot) == ("logit lens" in dot) == bool(option)


def test_the_lens_reads_the_state_through_the_last_norm_and_the_head() -> None:
    model, recorder = nanokv.load(str(Path(__file__).parent / "checkpoints" / "llama")), Recorder(level="states")
    tokens = np.arange(6, dtype=np.int32)
    logits = model.forward(tokens, observer=recorder)
    trace = recorder.trace
    made = trace.flow(model).prune(1.0).lens(trace, model)
    rows = model.config.n_layers
    for pos in range(6):
        if (word := made.words.get(state_id(rows, pos))) is not None:
            chance = np.exp(logits[pos] - logits[pos].max())
            assert word[1] == pytest.approx(float(chance.max() / chance.sum()), rel=1e-4)
    assert state_id(rows, 5) in made.words and len(made.words) > 6
