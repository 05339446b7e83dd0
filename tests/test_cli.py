"""The command as a new user meets it: in an empty folder, with good and with bad input."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nanokv.cli import main
from nanokv.trace import Trace

ROOT = Path(__file__).parent.parent
PROMPT = "the cat sat on the mat and the cat"


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-m", "nanokv.cli", *arguments], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("suffix, begins", [("svg", b"<?xml"), ("png", b"\x89PNG"), ("dot", b"digraph")])
def test_draw_makes_the_picture_that_its_suffix_names(suffix: str, begins: bytes) -> None:
    assert main(["draw", PROMPT, "-o", f"flow.{suffix}"]) == 0
    assert Path(f"flow.{suffix}").read_bytes().startswith(begins)


def test_drawing_with_the_default_model_needs_no_compiler_and_no_tokenizer_package() -> None:
    code = "import sys; from nanokv.cli import main; main(['draw', 'a b a', '-o', 'flow.svg']); " \
           "print(sorted({'numba', 'llvmlite', 'tokenizers', 'gguf', 'tqdm'} & set(sys.modules)))"  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_generate_prints_what_the_model_writes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", PROMPT, "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out == " sat on the\n"
    assert main(["generate", PROMPT, "--max-new-tokens", "1", "--echo"]) == 0
    assert capsys.readouterr().out == PROMPT + " sat\n"


def test_a_trace_can_be_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", PROMPT, "-o", "run.nkv", "--max-new-tokens", "2"]) == 0
    assert main(["show", "run.nkv", "--step", "2", "--layer", "1"]) == 0
    assert "layer 1 head 0: 'on' (11) reads 1.00 of 'the' (5) (written in step 0, user)" in capsys.readouterr().out
    assert Trace.load("run.nkv").length == 12


def test_models_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    assert "induction" in capsys.readouterr().out


BAD_USE = {
    "an empty prompt": (["draw", "", "-o", "flow.svg"], "the prompt is empty"),
    "a prompt of spaces": (["generate", "  "], "the prompt is empty"),
    "an unknown model": (["draw", "a", "--model", "gpt-5", "-o", "flow.svg"], "there is no model 'gpt-5'"),
    "an unknown kind of picture": (["draw", "a", "-o", "flow.gif"], ".svg, .png, .pdf or .dot"),
    "a picture without a suffix": (["draw", "a", "-o", "flow"], ".svg, .png, .pdf or .dot"),
    "a picture in a folder that is not there": (["draw", "a", "-o", "no/flow.svg"], "no"),
    "an unknown measure": (["draw", "a", "-o", "flow.svg", "--measure", "magic"], "magic"),
    "a position that is not there": (["draw", "a b", "-o", "flow.svg", "--at", "9"], "9"),
    "a share of more than all": (["draw", "a b", "-o", "flow.svg", "--share", "2"], "share is 2"),
    "more words than the model has room for": (["draw", " ".join(map(str, range(300))), "-o", "flow.svg"], "vocabulary"),
    "a prompt past the context": (["draw", "a " * 300, "-o", "flow.svg"], "256"),
    "a trace that is not there": (["show", "no.nkv"], "no.nkv"),
    "a step that is not there": (["show", "run.nkv", "--step", "7"], "step 7"),
    "a trace that is there already": (["trace", "a b", "-o", "run.nkv"], "already there"),
    "a temperature below nothing": (["generate", "a", "--temperature", "-1"], "temperature is -1"),
    "half a character": (["generate", "a \udc80"], "surrogate"),
    "a file that is no model": (["generate", "a", "--model", "junk.gguf"], "junk.gguf"),
}


@pytest.mark.parametrize("case", BAD_USE)
def test_bad_use_is_one_clear_line_status_2_and_loses_nothing(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["trace", "a b a", "-o", "run.nkv"])
    Path("junk.gguf").write_bytes(os.urandom(100))
    before = sorted((path, path.stat().st_mtime_ns) for path in Path().rglob("*"))
    capsys.readouterr()
    arguments, message = BAD_USE[case]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("nanokv: ") and error.count("\n") == 1 and message in error
    assert sorted((path, path.stat().st_mtime_ns) for path in Path().rglob("*")) == before


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "key/value cache" in capsys.readouterr().out


def test_output_into_a_closed_pipe_is_no_traceback() -> None:
    main(["trace", " ".join("ab" * 100), "-o", "run.nkv"])
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m nanokv.cli show run.nkv --most 100000 | head -1"],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert "Trace of induction" in done.stdout and done.stderr == ""


def test_a_killed_recording_leaves_a_valid_trace_of_all_completed_steps() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", "nanokv.cli", "trace", "a b a", "-o", "run.nkv", "--max-new-tokens", "200", "--level", "states"],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(Path().glob("run.nkv/step-00002*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    trace = Trace.load("run.nkv")
    assert trace.length >= 20 and np.array_equal(trace.tokens["pos"], np.arange(trace.length))
    assert trace.state("resid_post", 1).shape == (trace.length, 1024)
