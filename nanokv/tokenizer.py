"""Text to token ids and back.

A token is a string of bytes. Most vocabularies are byte-pair encodings (Sennrich et al. 2016) in one of two spellings:

    byte-level (GPT-2, Llama 3, Qwen, SmolLM): each byte is disguised as one visible character, a space as "Ġ"
    SentencePiece (Llama 2, Gemma): plain text with "▁" for a space, and "<0x0A>" for a byte that has no other token

so `decode` joins bytes first and makes text of them last: a character may be spread over several tokens.
"""

from __future__ import annotations

import heapq
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanokv.errors import TokenError, TokenizerError
from nanokv.gguf_file import clipped
from nanokv.safetensors_file import parse_json, read_json


class Tokenizer:
    """A model's vocabulary.

    vocab_size: one more than the largest id. bos_id: the token that begins a text, or None; whether `encode` puts it
    there is as the model's files say. stop_ids: the tokens that end a text. chat_template: Jinja source, or None.
    """

    def __init__(
        self,
        tokens: Mapping[int, str],
        encode: Callable[[str], list[int]],
        to_bytes: Callable[[str], bytes],
        *,
        verbatim: Iterable[int] = (),
        bos_id: int | None = None,
        stop_ids: Iterable[int] = (),
        chat_template: str | None = None,
        unwritable: Iterable[int] = (),
        joint: bytes = b"",
        drops_space: bool = False,
    ) -> None:
        """verbatim: ids that are not in the vocabulary's spelling. unwritable: bytes that no token can express. joint:
        what stands between tokens. drops_space: `encode` puts a space before a text, which `decode` takes away."""
        self._tokens, self._encode, self._to_bytes = tokens, encode, to_bytes
        self._verbatim, self._unwritable = frozenset(verbatim), frozenset(unwritable)
        self._joint, self._drops_space = joint, drops_space
        self.vocab_size = max(tokens, default=-1) + 1
        self.bos_id = bos_id
        self.stop_ids = tuple(sorted(set(stop_ids)))
        self.chat_template = chat_template

    def encode(self, text: str) -> np.ndarray:
        """int32 [T]. Special tokens that the text spells out, such as <|im_start|>, become themselves."""
        if not self._unwritable.isdisjoint(checked_text(text).encode()):
            character = next(c for c in text if not self._unwritable.isdisjoint(c.encode()))
            raise TokenizerError(
                f"the text holds U+{ord(character):04X}, which no token of this model can express: leave it out"
            )
        return np.array(_guarded(lambda: self._encode(text), "the text cannot be encoded"), np.int32)

    def decode(self, tokens: Iterable[int]) -> str:
        """Text, special tokens as they are spelt; a byte that belongs to no character becomes U+FFFD."""
        ids = [int(token) for token in tokens]
        data = self._joint.join(map(self.bytes_of, ids))
        if self._drops_space and ids and ids[0] not in self._verbatim:
            data = data.removeprefix(b" ")
        return data.decode(errors="replace")

    def piece(self, token: int) -> str:
        """The text of one token, for traces and pictures. A byte that is only a part of a character is shown as <E6>.

        Nothing else is made visible: a token that is a newline is a newline.
        """
        return _with_hex(self.bytes_of(int(token)))

    def pieces(self, tokens: Iterable[int]) -> list[str]:
        """`piece` of each."""
        return [self.piece(token) for token in tokens]

    def bytes_of(self, token: int) -> bytes:
        """The bytes that a token stands for. TokenError if there is no such token."""
        if token not in self._tokens:
            raise TokenError(f"token {token} is not in this tokenizer's vocabulary (0 to {self.vocab_size - 1})")
        text = self._tokens[token]
        return text.encode() if token in self._verbatim else self._to_bytes(text)


class WordTokenizer:
    """Whole words, for the hand-made models: token 0 begins a text, the others are words.

    With room left in the vocabulary, a word that `encode` has not met takes the next free id.
    """

    bos_id = 0
    stop_ids: tuple[int, ...] = ()
    chat_template: str | None = None

    def __init__(self, vocab_size: int, words: Sequence[str] = ()) -> None:
        self.vocab_size = vocab_size
        self.words = ["<bos>"]  # by id
        self._ids: dict[str, int] = {}
        self._learn(words)

    def encode(self, text: str) -> np.ndarray:
        """int32 [T], beginning with token 0. TokenizerError for a new word when the vocabulary is full."""
        words = split_words(checked_text(text))
        self._learn(words)
        return np.array([self.bos_id, *(self._ids[word] for word in words)], np.int32)

    def decode(self, tokens: Iterable[int]) -> str:
        """The words with a space between them, but none inside of brackets or before punctuation."""
        text, glue = "", True
        for word in self.pieces(token for token in tokens if token != self.bos_id):
            kind = unicodedata.category(word[0]) if len(word) == 1 else ""
            text += word if glue or kind in ("Pe", "Pf") or word in ".,;:!?" else " " + word
            glue = kind in ("Ps", "Pi")
        return text

    def piece(self, token: int) -> str:
        """The word; "<17>" for an id that no word has taken yet."""
        if not 0 <= token < self.vocab_size:
            raise TokenError(f"token {token} is not in this tokenizer's vocabulary (0 to {self.vocab_size - 1})")
        return self.words[token] if token < len(self.words) else f"<{token}>"

    def pieces(self, tokens: Iterable[int]) -> list[str]:
        """`piece` of each."""
        return [self.piece(int(token)) for token in tokens]

    def _learn(self, words: Sequence[str]) -> None:
        new = [word for word in dict.fromkeys(words) if word not in self._ids]
        if len(self.words) + len(new) > self.vocab_size:
            known = ", ".join(self.words[1:9]) + (", ..." if len(self.words) > 9 else "")
            raise TokenizerError(f"the word {new[0]!r} is not in this model's vocabulary, and that is full: it has "
                                 f"{self.vocab_size - 1} words ({known}); use those")  # fmt: skip
        for word in new:
            self._ids[word] = len(self.words)
            self.words.append(word)


def split_words(text: str) -> list[str]:
    """The words of a text, without space; punctuation around a word stands by itself: "(John's)," -> ( John's ) ,"""
    words = []
    for chunk in text.split():
        core = len(chunk.lstrip(_punctuation_of(chunk)))
        start = len(chunk) - core
        stop = max(start, len(chunk.rstrip(_punctuation_of(chunk))))
        words += [*chunk[:start], *([chunk[start:stop]] if stop > start else []), *chunk[stop:]]
    return words


def checked_text(text: str) -> str:
    """The text. TokenizerError if it is none, or holds half a character (a lone surrogate)."""
    if not isinstance(text, str):
        raise TokenizerError(f"a text must be a str, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"the text holds a lone surrogate at index {error.start}, which is not a character"
        ) from error
    return text


def gguf_tokenizer(pairs: Mapping[str, Any], where: str | Path) -> Tokenizer | None:
    """The tokenizer that a GGUF file's pairs describe, or None. TokenizerError if it is of a kind that nanokv lacks."""
    if "tokenizer.ggml.model" not in pairs:
        return None
    vocabulary = _Vocabulary(pairs, where)
    if vocabulary.model not in _MAKERS:
        raise TokenizerError(
            f"{where}: tokenizer.ggml.model, the kind of vocabulary, is {str(vocabulary.model)[:80]!r}, which is not "
            f"implemented; nanokv has {', '.join(_MAKERS)}"
        )
    return _MAKERS[vocabulary.model](vocabulary)


def folder_tokenizer(folder: str | Path) -> Tokenizer | None:
    """The tokenizer of a Hugging Face folder, or None if it has no tokenizer.json."""
    folder = Path(folder)
    if not (folder / "tokenizer.json").is_file():
        return None
    from tokenizers import Tokenizer as Backend

    text = (folder / "tokenizer.json").read_bytes()
    spelling = parse_json(text, folder / "tokenizer.json")
    backend = _guarded(lambda: Backend.from_buffer(text), f"{folder}: the tokenizer.json cannot be used")
    backend.no_truncation()
    backend.no_padding()
    tokens = {id_: token for token, id_ in backend.get_vocab(with_added_tokens=True).items()}
    to_bytes, options = _spelling(spelling.get("decoder"), tokens, folder)
    return Tokenizer(
        tokens,
        lambda text: backend.encode(text).ids,
        to_bytes,
        # Other added tokens may be runs of spaces, in the vocabulary's spelling.
        verbatim=[
            i for i, added in backend.get_added_tokens_decoder().items() if added.special or to_bytes is _undisguised
        ],
        **options,
        **_folder_settings(folder, {token: id_ for id_, token in tokens.items()}),
    )


# The kinds of token in a GGUF vocabulary.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)

# Control tokens that end a text or a turn; older files do not say so themselves.
_ENDS = {"<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>"}


class _Vocabulary:
    """The pairs of a GGUF file that describe a tokenizer, each checked."""

    def __init__(self, pairs: Mapping[str, Any], where: str | Path) -> None:
        self.pairs, self.where = pairs, where
        self.model = self.one("model", str)
        self.pre = self.one("pre", str)
        self.tokens: list[str] = self.many("tokens", str)
        self.ids = {token: id_ for id_, token in enumerate(self.tokens)}
        if not self.tokens or len(self.ids) < len(self.tokens):
            raise self.error("its tokens are none, or not all different")
        n = len(self.tokens)
        self.kinds: list[int] = self.many("token_type", int, n) or [_NORMAL] * n
        self.chat_template: str | None = pairs.get("tokenizer.chat_template") if isinstance(
            pairs.get("tokenizer.chat_template"), str) else None  # fmt: skip

    def error(self, problem: str) -> TokenizerError:
        return TokenizerError(
            f"{self.where}: the tokenizer cannot be built: {problem}. Download or convert the file again"
        )

    def one(self, name: str, kind: type) -> Any:
        """tokenizer.ggml.NAME, or None."""
        value = self.pairs.get(f"tokenizer.ggml.{name}")
        if value is not None and type(value) is not kind:
            raise self.error(f"{name} is {str(value)[:80]!r}, not of type {kind.__name__}")
        return value

    def many(self, name: str, kind: type, length: int | None = None) -> list[Any]:
        """tokenizer.ggml.NAME as a list; empty if there is none."""
        values = self.pairs.get(f"tokenizer.ggml.{name}", [])
        values = values.tolist() if isinstance(values, np.ndarray) else values
        if not isinstance(values, list) or any(type(value) is not kind for value in values):
            raise self.error(f"{name} is not a list of {kind.__name__}")
        if values and length is not None and len(values) != length:
            raise self.error(f"{name} has {len(values)} entries for {length} tokens")
        return values

    def token(self, name: str) -> int | None:
        """tokenizer.ggml.NAME_token_id, or None."""
        value: int | None = self.one(f"{name}_token_id", int)
        if value is not None and not 0 <= value < len(self.tokens):
            raise self.error(f"{name}_token_id is {value}, outside of the {len(self.tokens)} tokens")
        return value

    def of_kind(self, *kinds: int) -> list[int]:
        return [id_ for id_, kind in enumerate(self.kinds) if kind in kinds]

    def finish(
        self,
        encode: Callable[[str], list[int]],
        to_bytes: Callable[[str], bytes],
        verbatim: Sequence[int],
        add_bos: bool,
        **options: Any,
    ) -> Tokenizer:
        """The tokenizer; encode does not yet add what begins and ends a text, verbatim are kinds of tokens."""
        bos, eos = self.token("bos"), self.token("eos")
        add_bos = add_bos if self.one("add_bos_token", bool) is None else self.one("add_bos_token", bool)
        first = [bos] if add_bos and bos is not None else []
        last = [eos] if self.one("add_eos_token", bool) and eos is not None else []
        ends = [
            eos,
            self.token("eot"),
            self.token("eom"),
            *(i for i in self.of_kind(_CONTROL) if self.tokens[i] in _ENDS),
        ]
        return Tokenizer(
            dict(enumerate(self.tokens)),
            (lambda text: first + encode(text) + last) if first or last else encode,
            to_bytes,
            verbatim=self.of_kind(*verbatim),
            bos_id=bos,
            stop_ids=[end for end in ends if end is not None],
            chat_template=self.chat_template,
            **options,
        )


@dataclass(frozen=True)
class _Splitting:
    """How a byte-level vocabulary cuts a text into words, inside of which pairs are merged."""

    pattern: str | None = None  # None: GPT-2's
    single_digits: bool = False  # each digit is a word
    nfc: bool = False  # Unicode normal form C first
    whole_words: bool = False  # a word that is a token is not put together from its parts
    add_bos: bool = False  # unless the file says otherwise


_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

# By tokenizer.ggml.pre.
SPLITTINGS = {
    "gpt-2": _Splitting(),
    "smollm": _Splitting(single_digits=True),
    "llama-bpe": _Splitting(_LLAMA3, whole_words=True, add_bos=True),
    "smaug-bpe": _Splitting(_LLAMA3),
    "qwen2": _Splitting(_QWEN2, nfc=True),
}  # fmt: skip
_SAME = {
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "refact": "smollm",
    "starcoder": "smollm",
    "deepseek-r1-qwen": "qwen2",
}
SPLITTINGS |= {name: SPLITTINGS[other] for name, other in _SAME.items()}


def _byte_level(vocabulary: _Vocabulary) -> Tokenizer:
    """A byte-level vocabulary with its list of merges."""
    from tokenizers import AddedToken, models, normalizers
    from tokenizers import Tokenizer as Backend

    if vocabulary.pre not in SPLITTINGS:
        raise TokenizerError(
            f"{vocabulary.where}: tokenizer.ggml.pre, how a text is cut into words, is {str(vocabulary.pre)[:80]!r}, "
            f"which is not implemented; nanokv has {', '.join(SPLITTINGS)}"
        )
    splitting, tokens = SPLITTINGS[vocabulary.pre], vocabulary.tokens
    merges = [tuple(merge.split(" ")) for merge in vocabulary.many("merges", str)]
    if any(len(merge) != 2 for merge in merges):
        raise vocabulary.error("a merge is not two tokens with a space between them")
    backend = Backend(
        _guarded(
            lambda: models.BPE(vocabulary.ids, merges, ignore_merges=splitting.whole_words),
            f"{vocabulary.where}: the vocabulary cannot be used",
        )
    )
    if splitting.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _pre_tokenizer(splitting)
    special = {_CONTROL: True, _USER_DEFINED: False}
    backend.add_tokens([AddedToken(tokens[i], special=special[vocabulary.kinds[i]], normalized=False)
                        for i in vocabulary.of_kind(*special) if tokens[i]])  # fmt: skip
    unwritable = [byte for character, byte in _ALPHABET.items() if character not in vocabulary.ids]
    verbatim = (_UNKNOWN, *special)
    return vocabulary.finish(
        lambda text: backend.encode(text).ids, _undisguised, verbatim, splitting.add_bos, unwritable=unwritable
    )


def _pre_tokenizer(splitting: _Splitting) -> Any:
    from tokenizers import Regex, pre_tokenizers

    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if splitting.single_digits else []
    if splitting.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(splitting.pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitting.pattern is None))
    return pre_tokenizers.Sequence(steps)


def _sentencepiece(vocabulary: _Vocabulary) -> Tokenizer:
    """A SentencePiece vocabulary of the kind that merges pairs, the pair with the best score first."""
    scores: list[float] = vocabulary.many("scores", float, len(vocabulary.tokens))
    if not scores:
        raise vocabulary.error("it has no scores")
    merged = {vocabulary.tokens[i]: (scores[i], i) for i in vocabulary.of_kind(_NORMAL, _USER_DEFINED)}
    bytes_ids = {_unspaced(vocabulary.tokens[i]): i for i in vocabulary.of_kind(_BYTE)}
    unknown = vocabulary.token("unknown")
    if unknown is None and len(bytes_ids) < 256:
        raise vocabulary.error("a character that has no token can be written neither in bytes nor as an unknown one")
    special = {_unspaced(vocabulary.tokens[i]).decode(errors="replace"): i
               for i in vocabulary.of_kind(_CONTROL, _USER_DEFINED) if vocabulary.tokens[i]}  # fmt: skip
    # Longer ones first: of several that match at one place, the longest counts.
    cuts = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")
    space_first = vocabulary.one("add_space_prefix", bool) is not False

    def in_bytes(part: str) -> list[int]:
        return [bytes_ids.get(bytes([byte]), unknown or 0) for byte in part.encode()] if bytes_ids else [unknown or 0]

    def encode(text: str) -> list[int]:
        ids, at = [], 0
        for match in [*cuts.finditer(text), None]:
            if plain := text[at : match.start() if match else None]:
                plain = " " + plain if space_first else plain  # after a special token too, as in llama.cpp
                for part in _merged(plain.replace(" ", "▁"), merged):
                    ids += [merged[part][1]] if part in merged else in_bytes(part)
            if match:
                ids.append(special[match[0]])
                at = match.end()
        return ids

    return vocabulary.finish(encode, _unspaced, (_UNKNOWN, _CONTROL), add_bos=True, drops_space=space_first)


def _merged(text: str, scores: Mapping[str, tuple[float, int]]) -> list[str]:
    """The text in parts: begin with single characters; while two neighbours make a token, join the two whose token has
    the best score, of equal ones the leftmost."""
    parts: list[str | None] = [*text]  # a part that was joined to the one on its left is None
    left, right = [*range(-1, len(parts) - 1)], [*range(1, len(parts) + 1)]
    queue: list[tuple[float, int, int, str]] = []

    def propose(a: int, b: int) -> None:
        if a >= 0 and b < len(parts) and (pair := f"{parts[a]}{parts[b]}") in scores:
            heapq.heappush(queue, (-scores[pair][0], a, b, pair))

    for b in range(1, len(parts)):
        propose(b - 1, b)
    while queue:
        _, a, b, pair = heapq.heappop(queue)
        if parts[a] is None or parts[b] is None or f"{parts[a]}{parts[b]}" != pair:
            continue  # one of the two has been joined to another meanwhile
        parts[a], parts[b], right[a] = pair, None, right[b]
        if right[b] < len(parts):
            left[right[b]] = a
        propose(left[a], a)
        propose(a, right[a])
    return [part for part in parts if part is not None]


_MAKERS = {"gpt2": _byte_level, "llama": _sentencepiece}


def _alphabet() -> dict[str, int]:
    """GPT-2's disguise of bytes: printable Latin-1 characters stand for themselves, the others are U+0100 and on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(rest)}


_ALPHABET = _alphabet()


def _undisguised(token: str) -> bytes:
    """The bytes of a token in byte-level spelling."""
    return b"".join(bytes([_ALPHABET[c]]) if c in _ALPHABET else c.encode() for c in token)


def _unspaced(token: str) -> bytes:
    """The bytes of a token in SentencePiece's spelling."""
    if match := re.fullmatch("<0x([0-9A-Fa-f]{2})>", token):
        return bytes.fromhex(match[1])
    return token.replace("▁", " ").encode()


def _with_hex(data: bytes) -> str:
    """The bytes as text; those that make no whole character as <E6>."""
    text = ""
    while data:
        try:
            return text + data.decode()
        except UnicodeDecodeError as error:
            text += data[: error.start].decode() + "".join(f"<{byte:02X}>" for byte in data[error.start : error.end])
            data = data[error.end :]
    return text


def _punctuation_of(text: str) -> str:
    return "".join(c for c in text if unicodedata.category(c).startswith("P"))


def _spelling(decoder: Any, tokens: Mapping[int, str], where: Path) -> tuple[Callable[[str], bytes], dict[str, Any]]:
    """How the tokens of a tokenizer.json are spelt, by its decoder, and what the Tokenizer should know of it."""
    found = decoder.get("decoders", [decoder]) if isinstance(decoder, dict) else []
    steps = [step for step in found if isinstance(step, dict)] if isinstance(found, list) else []
    types = {str(step.get("type")) for step in steps}
    if "ByteLevel" in types:
        known = set(tokens.values())
        return _undisguised, {"unwritable": [byte for character, byte in _ALPHABET.items() if character not in known]}
    if types & {"ByteFallback", "Metaspace", "Replace"}:
        return _unspaced, {"drops_space": any(map(_takes_first_space, steps))}
    if decoder is None:
        return str.encode, {"joint": b" "}
    raise TokenizerError(f"{where}: a tokenizer.json with the decoder {sorted(types)} is not implemented")


def _takes_first_space(step: Mapping[str, Any]) -> bool:
    """Whether a step of a decoder takes the space before a text away."""
    scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
    return step.get("type") == "Strip" or (step.get("type") == "Metaspace" and scheme != "never")


def _folder_settings(folder: Path, ids: Mapping[str, int]) -> dict[str, Any]:
    """What the other files of a folder say: the token that begins a text, those that end it, and the chat template."""
    files = {}
    for name in ("tokenizer_config", "generation_config", "config"):
        path = folder / f"{name}.json"
        files[name] = read_json(path) if path.is_file() else {}

    def said(kind: str) -> list[int]:
        text = files["tokenizer_config"].get(f"{kind}_token")
        text = text.get("content") if isinstance(text, dict) else text
        found = [ids.get(text) if isinstance(text, str) else None]
        for name in ("generation_config", "config"):
            value = files[name].get(f"{kind}_token_id")
            found += value if isinstance(value, list) else [value]
        return [id_ for id_ in found if type(id_) is int and id_ >= 0]

    template = files["tokenizer_config"].get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next(
            (t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"), None
        )
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8", errors="replace")
    return {
        "bos_id": next(iter(said("bos")), None),
        "stop_ids": said("eos"),
        "chat_template": template if isinstance(template, str) else None,
    }


def _guarded(call: Callable[[], Any], problem: str) -> Any:
    """What a call to the tokenizers package gives. It raises plain exceptions, and panics in places."""
    try:
        return call()
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise TokenizerError(f"{problem}: {clipped(str(error))}") from error
        raise
