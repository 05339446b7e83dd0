"""Conversations are read, written by the model's template, and appended turn by turn."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from models import weights

import nanokv
from nanokv.chat import ChatTemplate, Message, Turn, awaits_answer, read_messages, turns
from nanokv.cli import main
from nanokv.config import Config, Rope
from nanokv.errors import ChatError, MissingExtraError, ModelNotFoundError
from nanokv.tokenizer import Tokenizer
from nanokv.trace import Trace
from nanokv.transformer import Transformer

pytest.importorskip("jinja2")

PLAIN = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}" \
        "{% if add_generation_prompt %}<assistant>{% endif %}"  # fmt: skip
HELLO = [Message("user", "Hello"), Message("model", "Hi!"), Message("user", "Who?")]
CONFIG = Config(2, 3, 1, 4, 12, 16, 256, 400, rope=Rope(100.0))


def small(template: str | None = PLAIN) -> Transformer:
    """A random model whose tokens are bytes."""
    tokenizer = Tokenizer({i: chr(i) for i in range(256)}, lambda text: list(text.encode()), lambda token: bytes([ord(token)]),
                          stop_ids=(255,), chat_template=template)  # fmt: skip
    return Transformer(CONFIG, weights(CONFIG), tokenizer=tokenizer, ops="numpy", name="small")


def texts(model: Transformer, found: list[Turn]) -> list[tuple[str, str]]:
    assert model.tokenizer is not None
    return [(turn.role, model.tokenizer.decode(turn.tokens)) for turn in found]


# Lines


def test_a_conversation_is_json_lines_of_role_and_text() -> None:
    lines = b'{"role": "system", "text": "Be brief."}\n{"text": "H\\u00e9", "role": "user"}\n' \
            b'{"role": "assistant", "content": "Hi"}\n'  # fmt: skip
    assert read_messages(lines, "x") == [Message("system", "Be brief."), Message("user", "Hé"), Message("model", "Hi")]


@pytest.mark.parametrize("line, message", [
    (b"", "line 2 is no JSON"), (b"{", "line 2 is no JSON"), (b"\xff", "line 2 is no JSON"), (b"[1]", "line 2 is [1]"),
    (b"[" * 100_000, "line 2 is no JSON"), (b"{}", "has the keys none; expected role and text"),
    (b'{"role": "user"}', "has the keys role"),
    (b'{"role": "user", "text": "a", "name": "b"}', "has the keys role, text, name"),
    (b'{"role": "robot", "text": "a"}', "the role is 'robot'; it must be user, model, system or tool"),
    (b'{"role": ["user"], "text": "a"}', "the role is ['user']"), (b'{"role": "user", "text": " "}', "the text is ' '"),
    (b'{"role": "user", "text": 7}', "the text is 7"),
])  # fmt: skip
def test_a_bad_line_is_an_error_that_names_it(line: bytes, message: str) -> None:
    with pytest.raises(ChatError) as error:
        read_messages(b'{"role": "user", "text": "a"}\n' + line + b'\n{"role": "user", "text": "b"}', "talk.jsonl")
    assert message in str(error.value) and str(error.value).startswith("talk.jsonl, line 2")


def test_no_line_at_all_is_an_error() -> None:
    with pytest.raises(ChatError, match="holds no turn"):
        read_messages(b"", "x")


# Turns


def test_each_turn_is_one_chunk_and_the_answers_mark_is_the_models() -> None:
    model = small()
    found = turns(model, HELLO, model.new_cache(), answer=True)
    assert texts(model, found) == [
        ("user", "<user>Hello</>"), ("model", "<assistant>Hi!</>"), ("user", "<user>Who?</>"), ("model", "<assistant>"),
    ]  # fmt: skip
    assert not any(turn.goes_on for turn in found)
    assert awaits_answer(HELLO) and awaits_answer([Message("tool", "4")]) and not awaits_answer(HELLO[:2])


def test_what_is_cached_is_not_appended_again() -> None:
    model = small()
    cache = model.new_cache()
    for turn in turns(model, HELLO[:1], cache, answer=True):
        model.forward(turn.tokens, cache)
    assert model.tokenizer is not None
    model.forward(model.tokenizer.encode("Hi!"), cache)  # the answer, without the mark that ends it
    found = turns(model, HELLO, cache)
    assert texts(model, found) == [("model", "</>"), ("user", "<user>Who?</>")]
    assert [turn.goes_on for turn in found] == [True, False]


def test_a_conversation_that_does_not_extend_what_is_cached_is_an_error() -> None:
    model = small()
    cache = model.new_cache()
    for turn in turns(model, HELLO, cache):
        model.forward(turn.tokens, cache)
    with pytest.raises(ChatError, match=r"at character 6 the cache has 'Hello.*', the conversation 'Bye"):
        turns(model, [Message("user", "Bye"), *HELLO[1:]], cache)
    with pytest.raises(ChatError, match="holds this conversation and more"):
        turns(model, HELLO[:2], cache)
    assert turns(model, HELLO, cache) == [] and cache.length == len("<user>Hello</><assistant>Hi!</><user>Who?</>")


def test_a_template_that_rewrites_earlier_turns_is_an_error() -> None:
    last_only = "{% for m in messages %}{% if loop.last %}!{% endif %}{{ m['content'] }}{% endfor %}"
    model = small(last_only)
    with pytest.raises(ChatError, match="rewrites earlier turns when one is added: at character 0 '!Hello' becomes"):
        turns(model, HELLO, model.new_cache())


def test_a_template_may_want_the_systems_turn_together_with_the_next() -> None:
    alone = "messages|length == 1 and messages[0]['role'] == 'system'"
    joined = "{% if " + alone + " %}{{ raise_exception('alone') }}{% endif %}" + PLAIN
    model = small(joined)
    found = turns(model, [Message("system", "S"), *HELLO[:1]], model.new_cache())
    assert texts(model, found) == [("user", "<system>S</><user>Hello</>")]
    with pytest.raises(ChatError, match="refuses the conversation: alone"):
        turns(model, [Message("system", "S")], model.new_cache())


def test_the_token_that_begins_a_text_stands_there_once() -> None:
    model = small("{{ bos_token }}" + PLAIN)
    plain = model.tokenizer
    assert isinstance(plain, Tokenizer)
    model.tokenizer = Tokenizer({i: chr(i) for i in range(256)}, lambda text: [1, *text.encode()],
                                lambda token: bytes([ord(token)]), bos_id=1, chat_template=plain.chat_template)  # fmt: skip
    found = turns(model, HELLO, model.new_cache())
    assert np.concatenate([turn.tokens for turn in found]).tolist().count(1) == 1


# Templates are programs of others


@pytest.mark.parametrize("source", [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}", "{{ 'x' * 10**9 }}", "{{ 'x' * 1000000000 }}",
    "{{ '%01000000000d' % 1 }}", "{{ 'x'.ljust(1000000000) }}", "{{ '{:>1000000000}'.format(1) }}",
    "{{ '{:>1000000000}'['format'](1) }}", "{{ nothing.at.all }}",
    "{% for i in range(10**9) %}{% endfor %}", "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "{{ raise_exception('roles must alternate') }}", "{{ 1 / 0 }}", "{{ messages[99]['role'] }}", "{{ 'a' + 1 }}",
])  # fmt: skip
def test_a_template_that_misbehaves_is_refused(source: str) -> None:
    with pytest.raises(ChatError, match="chat template"):
        turns(small(source), HELLO, small().new_cache())


def test_a_template_that_cannot_be_read_or_is_not_there_is_an_error() -> None:
    with pytest.raises(ChatError, match="cannot be read"):
        ChatTemplate.of(small("{% for %}"))
    with pytest.raises(ChatError, match="the model small has no chat template"):
        ChatTemplate.of(small(None))


def test_without_jinja2_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2.sandbox", None)
    with pytest.raises(MissingExtraError, match=r"nanokv\[chat\]"):
        ChatTemplate.of(small())


def test_what_templates_use_is_there() -> None:
    source = "{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}{{ m | tojson }}{% endfor %}" \
             "{{ tools is none }}{{ strftime_now('%Y') | length }}{{ bos_token }}{{ eos_token }}"  # fmt: skip
    assert ChatTemplate.of(small(source)).text([Message("tool", "x"), Message("user", "<é>")]) == (
        '{"role": "user", "content": "<é>"}True4<FF>'
    )


# The command


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder in which every model's name means the small one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nanokv, "load", lambda *_, **__: small())
    yield tmp_path


def write(path: str, messages: list[Message]) -> None:
    Path(path).write_text("".join(json.dumps({"role": m.role, "text": m.text}) + "\n" for m in messages))


def test_a_conversation_is_traced_and_answered(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("talk.jsonl", HELLO)
    assert main(["trace", "--chat", "talk.jsonl", "-o", "run.nkv", "--max-new-tokens", "3", "--level", "states"]) == 0
    trace = Trace.load("run.nkv")
    assert capsys.readouterr().out.splitlines()[-1] == f"run.nkv: {trace!r}" and trace.check() == []
    lengths = [len(text) for text in ("<user>Hello</>", "<assistant>Hi!</>", "<user>Who?</>", "<assistant>")]
    assert [step.n for step in trace.steps] == [*lengths, 1, 1, 1]
    table = trace.tokens
    assert [(role, turn) for role, turn in dict.fromkeys(zip(table["role"], table["turn"], strict=True))] == [
        ("user", 0), ("model", 1), ("user", 2), ("model", 3)]  # fmt: skip
    assert table["sampled"].tolist() == [False] * sum(lengths) + [True] * 3
    assert table["chunk"].tolist()[-4:] == [0, 1, 2, 3]  # the mark that begins the answer is of its turn
    reads = trace.reads
    assert set(reads["turn"][reads["dst"] == sum(lengths)]) == {3}


def test_a_conversation_from_standard_input_that_ends_with_the_model_is_not_answered(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = b"".join(json.dumps({"role": m.role, "text": m.text}).encode() + b"\n" for m in HELLO[:2])
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(lines)))
    assert main(["trace", "--chat", "-", "-o", "run.nkv"]) == 0
    assert "model:" not in capsys.readouterr().out and Trace.load("run.nkv").steps[-1].number == 1


def test_a_traced_conversation_is_gone_on_with(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("talk.jsonl", HELLO[:2])
    write("more.jsonl", [*HELLO, Message("tool", "4")])
    write("other.jsonl", HELLO[2:])
    write("whole.jsonl", [*HELLO, Message("tool", "4")])
    assert main(["trace", "--chat", "talk.jsonl", "-o", "run.nkv"]) == 0
    assert main(["trace", "--chat", "other.jsonl", "-o", "run.nkv", "--resume"]) == 2
    assert "does not extend what is cached" in capsys.readouterr().err
    assert main(["trace", "--chat", "more.jsonl", "-o", "run.nkv", "--resume", "--max-new-tokens", "2"]) == 0
    assert main(["trace", "--chat", "whole.jsonl", "-o", "whole.nkv", "--max-new-tokens", "2"]) == 0
    resumed, whole = Trace.load("run.nkv"), Trace.load("whole.nkv")
    assert resumed.check() == [] and all(np.array_equal(resumed.tokens[name], whole.tokens[name]) for name in whole.tokens)


BAD = {
    "a bad line": ["trace", "--chat", "bad.jsonl", "-o", "new.nkv"],
    "no such file": ["trace", "--chat", "no.jsonl", "-o", "new.nkv"],
    "a prompt and a conversation": ["trace", "a prompt", "--chat", "talk.jsonl", "-o", "new.nkv"],
    "neither": ["trace", "-o", "new.nkv"],
    "resuming without a conversation": ["trace", "a prompt", "--resume", "-o", "new.nkv"],
    "resuming what is not there": ["trace", "--chat", "talk.jsonl", "--resume", "-o", "new.nkv"],
    "a trace that is there already": ["trace", "--chat", "talk.jsonl", "-o", "old.nkv"],
    "a topk of nothing": ["trace", "--chat", "talk.jsonl", "-o", "new.nkv", "--topk", "0"],
}


@pytest.mark.parametrize("case", BAD)
def test_bad_use_is_one_clear_line_and_nothing_is_lost(folder: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    write("talk.jsonl", HELLO)
    main(["trace", "--chat", "talk.jsonl", "-o", "old.nkv", "--max-new-tokens", "0"])
    Path("bad.jsonl").write_text('{"role": "user", "text": "a"}\n{"role": "robot", "text": "a"}\n')
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    capsys.readouterr()
    assert main(BAD[case]) == 2
    error = capsys.readouterr().err
    assert error.startswith("nanokv: ") and error.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


# A real model


def test_smollm2_writes_a_conversation_as_its_template_says() -> None:
    try:
        model = nanokv.load("smollm2-135m")
    except ModelNotFoundError as missing:
        pytest.skip(str(missing))
    found = turns(model, HELLO, model.new_cache(), answer=True)
    assert texts(model, found) == [
        ("user", "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
                 "<|im_start|>user\nHello<|im_end|>\n"),
        ("model", "<|im_start|>assistant\nHi!<|im_end|>\n"),
        ("user", "<|im_start|>user\nWho?<|im_end|>\n"),
        ("model", "<|im_start|>assistant\n"),
    ]  # fmt: skip
    assert found[0].tokens[0] == model.tokenizer.bos_id and found[1].tokens[0] == model.tokenizer.bos_id
