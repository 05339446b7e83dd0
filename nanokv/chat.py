"""Conversations: turns as text, by the chat template that a model brings, and as tokens that extend what is cached.

A template (Jinja, in the form that Hugging Face uses) writes a whole conversation as one text, with marks of who speaks:

    <|im_start|>user\\nWhat is a cache?<|im_end|>\\n<|im_start|>assistant\\n

A cache only grows, so a conversation can go on only if its text with one more turn begins with its text so far. What is new
of it is one turn's chunk: all its tokens are processed side by side, and read what earlier turns left in the cache.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from nanokv.errors import ChatError, MissingExtraError
from nanokv.gguf_file import clipped

if TYPE_CHECKING:
    from nanokv.cache import KVCache
    from nanokv.tokenizer import Tokenizer, WordTokenizer
    from nanokv.transformer import Transformer

ROLES = {"user": "user", "model": "model", "assistant": "model", "system": "system", "tool": "tool"}  # by what a line may say
LARGEST = 1_000_000  # characters: of what a template may multiply up, and write


@dataclass(frozen=True)
class Message:
    """What was said by whom: user, model, system or tool."""

    role: str
    text: str


@dataclass(frozen=True)
class Turn:
    """Tokens to append in one call. goes_on: they belong to the turn that the cache ends with."""

    role: str
    tokens: np.ndarray  # int32 [T]
    goes_on: bool = False


def read_messages(data: bytes, where: str) -> list[Message]:
    """A conversation in JSON lines, {"role": "user", "text": "Hello"} each; ChatError names the first bad line.

    "assistant" may stand for "model", and "content" for "text", as in Hugging Face's form.
    """
    lines = data.split(b"\n")
    if lines[-1].strip() == b"":
        lines.pop()
    if not lines:
        raise ChatError(f'{where} holds no turn: give lines such as {{"role": "user", "text": "Hello"}}')
    return [_message(line, f"{where}, line {number}") for number, line in enumerate(lines, 1)]


def _message(line: bytes, where: str) -> Message:
    try:
        said = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise ChatError(f'{where} is no JSON ({clipped(str(error))}); expected {{"role": ..., "text": ...}}') from error
    if not isinstance(said, dict):
        raise ChatError(f'{where} is {clipped(repr(said))}; expected an object {{"role": ..., "text": ...}}')
    if "content" in said and "text" not in said:
        said["text"] = said.pop("content")
    if said.keys() != {"role", "text"}:
        raise ChatError(f"{where} has the keys {clipped(', '.join(said)) or 'none'}; expected role and text")
    role, text = said["role"], said["text"]
    if not isinstance(role, str) or role not in ROLES:
        raise ChatError(f"{where}: the role is {clipped(repr(role))}; it must be user, model, system or tool")
    if not isinstance(text, str) or not text.strip():
        raise ChatError(f"{where}: the text is {clipped(repr(text))}; it must be some text")
    return Message(ROLES[role], text)


def awaits_answer(messages: Sequence[Message]) -> bool:
    """Whether it is the model's turn: the conversation ends with what a user said, or with a tool's result."""
    return messages[-1].role in ("user", "tool")


class ChatTemplate:
    """A model's chat template. It runs in Jinja's sandbox, which keeps it from files and from Python's insides."""

    def __init__(self, source: str, special: dict[str, str]) -> None:
        """special: texts that the template may ask for by name, such as bos_token. ChatError if it cannot be compiled."""
        sandbox = _sandbox()
        from jinja2 import TemplateError  # there, since the sandbox is

        self._refusals = (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, RecursionError)
        try:
            self._template = sandbox.from_string(source, globals=special)
        except (*self._refusals, SyntaxError) as error:
            raise ChatError(f"the model's chat template cannot be read: {clipped(str(error))}") from error

    @classmethod
    def of(cls, model: Transformer) -> ChatTemplate:
        """The one that the model brought. ChatError if it has none, MissingExtraError without jinja2."""
        tokenizer = model.tokenizer
        if tokenizer is None or not tokenizer.chat_template:
            raise ChatError(f"the model {model.name or 'given'} has no chat template: take one that was trained to chat, such "
                            "as smollm2-135m, or write the conversation out as one prompt")  # fmt: skip
        ends = tokenizer.stop_ids
        special = {"bos_token": "" if tokenizer.bos_id is None else tokenizer.piece(tokenizer.bos_id),
                   "eos_token": tokenizer.piece(ends[-1]) if ends else ""}  # fmt: skip
        return cls(tokenizer.chat_template, special)

    def text(self, messages: Sequence[Message], answer: bool = False) -> str:
        """The conversation as one text; answer: with the marks that begin the model's turn. ChatError if it is refused."""
        given = [{"role": "assistant" if m.role == "model" else m.role, "content": m.text} for m in messages]
        pieces, length = [], 0
        try:
            for piece in self._template.generate(messages=given, add_generation_prompt=answer, tools=None, documents=None):
                pieces.append(piece)
                length += len(piece)
                if length > LARGEST + sum(len(m.text) for m in messages) * 4:
                    raise ChatError(f"the chat template writes more than {length} characters: it does not look like one")
        except self._refusals as error:
            raise ChatError(f"the chat template refuses the conversation: {clipped(str(error))}") from error
        return "".join(pieces)


def turns(model: Transformer, messages: Sequence[Message], cache: KVCache, *, answer: bool = False) -> list[Turn]:
    """What is to be appended to the cache, so that it holds the conversation: a chunk for each turn that it does not hold.

    answer: also the marks that begin the model's next turn. ChatError if the conversation's text does not extend what is
    cached, or if the template would rewrite earlier turns when one is added. Nothing is computed or changed.
    """
    template, tokenizer = ChatTemplate.of(model), model.tokenizer
    assert tokenizer is not None
    texts = _texts(template, messages) + ([("model", template.text(messages, answer=True))] if answer else [])
    cached = _text(tokenizer, cache.tokens, texts[-1][1])
    done, tokens, found = cached, cache.tokens, list[Turn]()
    for role, text in texts:
        if not found and cached.startswith(text):
            continue  # the cache holds this turn
        if not text.startswith(done):
            raise ChatError(_parting(done, text, in_cache=not found))
        new = _new_tokens(tokenizer, tokens, done, text)
        found.append(Turn(role, new, goes_on=not found and cached not in ("", *(earlier for _, earlier in texts))))
        done, tokens = text, np.concatenate([tokens, new])
    if done != texts[-1][1]:
        raise ChatError("the cache holds this conversation and more: add a turn to it")
    return found


def _texts(template: ChatTemplate, messages: Sequence[Message]) -> list[tuple[str, str]]:
    """The text after each turn. A template may want a system's turn together with the one that follows."""
    texts = []
    for n, message in enumerate(messages, 1):
        try:
            texts.append((message.role, template.text(messages[:n])))
        except ChatError:
            if message.role != "system" or n == len(messages):
                raise
    return texts


def _text(tokenizer: Tokenizer | WordTokenizer, tokens: np.ndarray, conversation: str) -> str:
    """The text of tokens, without the one that begins a text where the conversation does not write it."""
    begins = len(tokens) and tokens[0] == tokenizer.bos_id
    return tokenizer.decode(tokens[1:] if begins and not conversation.startswith(tokenizer.piece(tokens[0])) else tokens)


def _new_tokens(tokenizer: Tokenizer | WordTokenizer, tokens: np.ndarray, done: str, text: str) -> np.ndarray:
    """The tokens of what the text has after `done`: as the whole text's tokens go on, or else by themselves."""
    whole = tokenizer.encode(text)
    bos = tokenizer.bos_id
    if len(whole) > 1 and whole[0] == whole[1] == bos:  # the template writes it, and the tokenizer adds it
        whole = whole[1:]
    if len(whole) > len(tokens) and np.array_equal(whole[: len(tokens)], tokens):
        return whole[len(tokens) :]
    rest = tokenizer.encode(text[len(done) :])
    return rest[1:] if len(rest) and rest[0] == bos and not text[len(done) :].startswith(tokenizer.piece(rest[0])) else rest


def _parting(done: str, text: str, in_cache: bool) -> str:
    at = next((i for i, (a, b) in enumerate(zip(done, text, strict=False)) if a != b), min(len(done), len(text)))
    there, here = repr(done[at : at + 40]), repr(text[at : at + 40])
    if in_cache:
        return (f"the conversation does not extend what is cached: at character {at} the cache has {there}, the conversation "
                f"{here}. A cache only grows: begin a new one")  # fmt: skip
    return (f"the model's chat template rewrites earlier turns when one is added: at character {at} {there} becomes {here}. A "
            "cache only grows, so such a conversation cannot be appended turn by turn")  # fmt: skip


def _sandbox() -> Any:
    try:
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ModuleNotFoundError as error:
        raise MissingExtraError("chat templates need jinja2: pip install 'nanokv[chat]'") from error

    class Sandbox(ImmutableSandboxedEnvironment):
        """Also without the plainest ways in which a small template makes a large text."""

        intercepted_binops = frozenset(("*", "**", "%"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            numbers = [x for x in (left, right) if isinstance(x, int)]
            sizes = [len(x) for x in (left, right) if isinstance(x, str | list | tuple)]
            if operator == "**" or (operator == "%" and sizes) or (operator == "*" and sizes and max(numbers) > LARGEST):
                raise ValueError(f"{operator!r} of these is not allowed")
            return super().call_binop(context, operator, left, right)

        def getattr(self, obj: Any, attribute: str) -> Any:
            return self.unsafe_undefined(obj, attribute) if _pads(obj, attribute) else super().getattr(obj, attribute)

        def getitem(self, obj: Any, argument: Any) -> Any:
            return self.unsafe_undefined(obj, argument) if _pads(obj, argument) else super().getitem(obj, argument)

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            return not _pads(obj, attr) and super().is_safe_attribute(obj, attr, value)

    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    for name in ("center", "format", "indent"):
        del sandbox.filters[name]
    sandbox.filters["tojson"] = _to_json
    sandbox.globals["raise_exception"] = _refuse
    sandbox.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return sandbox


def _pads(obj: Any, name: Any) -> bool:
    """Whether it is a method that makes a string as long as it is told to."""
    return isinstance(obj, str) and name in ("ljust", "rjust", "center", "zfill", "expandtabs", "format", "format_map")


def _to_json(x: Any, ensure_ascii: bool = False, indent: int | None = None, **_: Any) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=None if indent is None else min(int(indent), 8))


def _refuse(message: object) -> None:
    raise ValueError(message)
