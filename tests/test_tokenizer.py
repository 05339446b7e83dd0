"""Text to ids and back: byte-level vocabularies, SentencePiece's, a tokenizer.json, and the hand-made models' words."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from nanokv.errors import ModelNotFoundError, TokenError, TokenizerError
from nanokv.gguf_file import open_gguf
from nanokv.load import find
from nanokv.tokenizer import Tokenizer, WordTokenizer, folder_tokenizer, gguf_tokenizer, split_words

DATA = Path(__file__).parent / "data"
GOLDEN = json.loads((DATA / "smollm2.json").read_text(encoding="utf-8"))
SENTENCEPIECE = json.loads((DATA / "sentencepiece.json").read_text(encoding="utf-8"))
BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
DISGUISES = [chr(byte) for byte in BYTES] + [chr(256 + i) for i in range(256 - len(BYTES))]


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    try:
        path = find("smollm2-135m")
    except ModelNotFoundError as error:
        pytest.skip(str(error))
    tokenizer = gguf_tokenizer(open_gguf(path).pairs, path)
    assert tokenizer is not None
    return tokenizer


def byte_level(pre: str = "gpt-2", merges: list[str] | None = None, **more: Any) -> Tokenizer:
    """A vocabulary of single bytes, the merges' results, and two special tokens, <s> and </s>."""
    merges = [] if merges is None else merges
    tokens = [*DISGUISES, *(str(merge).replace(" ", "") for merge in merges), "<s>", "</s>"]
    pairs = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([1] * (len(tokens) - 2) + [3, 3], np.int32),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": len(tokens) - 2,
        "tokenizer.ggml.eos_token_id": len(tokens) - 1,
        **{f"tokenizer.ggml.{name}": value for name, value in more.items()},
    }
    tokenizer = gguf_tokenizer({key: value for key, value in pairs.items() if value is not None}, "a.gguf")
    assert tokenizer is not None
    return tokenizer


def scored(vocabulary: dict[str, Any], **more: Any) -> Tokenizer:
    pairs = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": vocabulary["tokens"],
        "tokenizer.ggml.scores": np.array(vocabulary["scores"], np.float32),
        "tokenizer.ggml.token_type": np.array(vocabulary["token_type"], np.int32),
        "tokenizer.ggml.add_space_prefix": vocabulary["add_space_prefix"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **{f"tokenizer.ggml.{name}": value for name, value in more.items()},
    }
    tokenizer = gguf_tokenizer({key: value for key, value in pairs.items() if value is not None}, "a.gguf")
    assert tokenizer is not None
    return tokenizer


@pytest.mark.parametrize("name", [name for name, text in GOLDEN.items() if "text" in text])
def test_smollm2_gives_the_ids_of_transformers(smollm2: Tokenizer, name: str) -> None:
    text, ids = GOLDEN[name]["text"], GOLDEN[name]["ids"]
    assert smollm2.encode(text).tolist() == ids
    assert smollm2.encode(text).dtype == np.int32
    assert smollm2.decode(ids) == text


def test_smollm2_says_which_tokens_begin_and_end_a_text(smollm2: Tokenizer) -> None:
    assert (smollm2.vocab_size, smollm2.bos_id) == (49152, 1)
    assert smollm2.pieces(smollm2.stop_ids) == ["<|endoftext|>", "<|im_end|>"]
    assert smollm2.chat_template is not None
    assert smollm2.chat_template.startswith("{% for message in messages %}")


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_smollm2_gives_a_text_back_or_says_which_character_it_cannot_express(smollm2: Tokenizer, text: str) -> None:
    try:
        ids = smollm2.encode(text)
    except TokenizerError as error:
        assert any(f"U+{ord(c):04X}" in str(error) for c in text)
    else:
        assert smollm2.decode(ids) == text


def test_an_empty_text_has_no_tokens(smollm2: Tokenizer) -> None:
    assert smollm2.encode("").shape == (0,)
    assert smollm2.decode([]) == ""


def test_a_byte_that_is_a_part_of_a_character_is_shown_in_hexadecimal(smollm2: Tokenizer) -> None:
    ids = smollm2.encode(" 日本\n")
    assert smollm2.pieces(ids) == [" <E6>", "<97>", "<A5>", "本", "\n"]
    assert smollm2.decode(ids[:2]) == " \N{REPLACEMENT CHARACTER}"


def test_pieces_put_together_are_the_bytes_of_the_text(smollm2: Tokenizer) -> None:
    text = "naïve 🙂 日本語"
    assert b"".join(map(smollm2.bytes_of, smollm2.encode(text))) == text.encode()


@pytest.mark.parametrize("token", [-1, 49152, 2**40])
def test_a_token_outside_of_the_vocabulary_is_an_error(smollm2: Tokenizer, token: int) -> None:
    for use in (smollm2.piece, lambda token: smollm2.decode([token])):
        with pytest.raises(TokenError, match="0 to 49151"):
            use(token)


@pytest.mark.parametrize("text", ["\ud800", b"bytes", None])
def test_what_is_no_text_is_an_error(smollm2: Tokenizer, text: Any) -> None:
    for tokenizer in (smollm2, WordTokenizer(9), scored(SENTENCEPIECE[0])):
        with pytest.raises(TokenizerError):
            tokenizer.encode(text)


# (pre-tokenizer, text, its words): from the definitions that the models were published with
CUTS = [
    ("gpt-2", "It's 1234 ok!\n\n x", ["It", "'s", " 1234", " ok", "!", "\n\n", " x"]),
    ("smollm", "It's 1234 ok!\n\n x", ["It", "'s", " ", "1", "2", "3", "4", " ok", "!", "\n\n", " x"]),
    ("llama-bpe", "It'S 1234 ok!\n\n x", ["It", "'S", " ", "123", "4", " ok", "!\n\n", " x"]),
    ("qwen2", "It'S 1234 ok!\n\n x", ["It", "'S", " ", "1", "2", "3", "4", " ok", "!\n\n", " x"]),
]


@pytest.mark.parametrize(("pre", "text", "words"), CUTS)
def test_a_text_is_cut_into_words_as_the_file_says(pre: str, text: str, words: list[str]) -> None:
    # Every pair may merge, so that a word is one token unless the cut is elsewhere.
    disguise = dict(zip([*BYTES, *(b for b in range(256) if b not in BYTES)], DISGUISES, strict=True))
    spelt = ["".join(disguise[byte] for byte in word.encode()) for word in words]
    merges = dict.fromkeys(f"{word[:n]} {word[n]}" for word in spelt for n in range(1, len(word)))
    tokenizer = byte_level(pre, list(merges), add_bos_token=False)
    assert tokenizer.pieces(tokenizer.encode(text)) == words
    across = [f"{spelt[0]} {spelt[1]}", f"{spelt[-2]} {spelt[-1]}"]
    tempted = byte_level(pre, [*merges, *across], add_bos_token=False)
    assert tempted.pieces(tempted.encode(text)) == words


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2"])
@settings(max_examples=50, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_a_byte_level_vocabulary_gives_a_text_back(pre: str, text: str) -> None:
    text = unicodedata.normalize("NFC", text) if pre == "qwen2" else text
    tokenizer = byte_level(pre, ["a b", "Ġ a"], add_bos_token=False)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_whether_a_text_begins_and_ends_with_a_special_token_is_as_the_file_says() -> None:
    plain = byte_level().encode("ab")
    bos, eos = byte_level().vocab_size - 2, byte_level().vocab_size - 1
    assert byte_level(add_bos_token=True).encode("ab").tolist() == [bos, *plain]
    assert byte_level(add_bos_token=True, add_eos_token=True).encode("ab").tolist() == [bos, *plain, eos]
    assert byte_level("llama-bpe").encode("ab").tolist() == [bos, *plain]
    assert byte_level("llama-bpe", add_bos_token=False).encode("ab").tolist() == plain.tolist()


def test_special_tokens_in_a_text_become_themselves() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("a<s>b</s>")
    assert tokenizer.pieces(ids) == ["a", "<s>", "b", "</s>"]
    assert tokenizer.decode(ids) == "a<s>b</s>"


def test_a_llama_3_word_that_is_a_token_is_not_put_together_from_its_parts() -> None:
    merges = ["b c", "a b", "ab c"]  # "abc" by merges alone is a + bc
    assert byte_level("llama-bpe", merges, add_bos_token=False).pieces(
        byte_level("llama-bpe", merges, add_bos_token=False).encode("abc")
    ) == ["abc"]
    assert byte_level("smaug-bpe", merges).pieces(byte_level("smaug-bpe", merges).encode("abc")) == ["a", "bc"]


@pytest.mark.parametrize("vocabulary", SENTENCEPIECE, ids=["space first", "no space first"])
def test_a_scored_vocabulary_gives_the_ids_of_sentencepiece(vocabulary: dict[str, Any]) -> None:
    tokenizer = scored(vocabulary, add_bos_token=False)
    for text, ids in vocabulary["cases"]:
        assert tokenizer.encode(text).tolist() == ids, text
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("vocabulary", SENTENCEPIECE, ids=["space first", "no space first"])
@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁")))
def test_a_scored_vocabulary_gives_a_text_back(vocabulary: dict[str, Any], text: str) -> None:
    tokenizer = scored(vocabulary, add_bos_token=False)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_space_comes_before_every_stretch_of_text_between_special_tokens_as_in_llama_cpp() -> None:
    tokenizer = scored(SENTENCEPIECE[0], add_bos_token=False)
    assert tokenizer.pieces(tokenizer.encode("<turn>the<turn>")) == ["<turn>", " the", "<turn>"]


def test_a_scored_vocabulary_shows_spaces_and_bytes() -> None:
    tokenizer = scored(SENTENCEPIECE[0])
    assert tokenizer.pieces(tokenizer.encode("the 日")) == ["<s>", " the", " ", "<E6>", "<97>", "<A5>"]
    assert tokenizer.bos_id == 1
    assert tokenizer.stop_ids == (2,)


BROKEN = {
    "an unknown kind": {"model": "t5"},
    "an unknown cut": {"pre": "deepseek-llm"},
    "no cut": {"pre": None},
    "no tokens": {"tokens": None},
    "an empty list of tokens": {"tokens": []},
    "tokens that are numbers": {"tokens": np.arange(3)},
    "a token twice": {"tokens": ["a", "a"]},
    "kinds for other tokens": {"token_type": np.ones(3, np.int32)},
    "a merge of three": {"merges": ["a b c"]},
    "a merge of unknown tokens": {"merges": ["zz yy"]},
    "merges that are numbers": {"merges": np.arange(3)},
    "a first token outside": {"bos_token_id": 999},
    "a first token that is a text": {"bos_token_id": "<s>"},
    "a truth value that is a number": {"add_bos_token": 1},
    "scores instead of merges": {"model": "llama"},
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_vocabulary_that_cannot_be_used_is_an_error_that_names_the_file(name: str) -> None:
    with pytest.raises(TokenizerError, match=r"a\.gguf"):
        byte_level(**BROKEN[name])


def test_a_file_without_a_vocabulary_has_no_tokenizer() -> None:
    assert gguf_tokenizer({"general.architecture": "llama"}, "a.gguf") is None


def write_tokenizer(folder: Path, kind: str) -> Backend:
    """A small tokenizer.json of the kind that Llama 3, Llama 2, Gemma or no model has."""
    if kind == "byte level":
        model = models.BPE({token: i for i, token in enumerate([*DISGUISES, "ab", "Ġa"])}, [("a", "b"), ("Ġ", "a")])
        backend = Backend(model)
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
    elif kind == "metaspace":
        backend = Backend(models.BPE({"<unk>": 0, "▁": 1, "a": 2, "b": 3, "▁a": 4}, [("▁", "a")], unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
        backend.decoder = decoders.Metaspace(prepend_scheme="always")
    elif kind == "words":
        backend = Backend(models.WordLevel({"[UNK]": 0, "one": 1, "two": 2}, unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
    else:
        tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab", "▁a"]
        model = models.BPE(
            {t: i for i, t in enumerate(tokens)}, [("a", "b"), ("▁", "a")], byte_fallback=True, unk_token="<unk>"
        )
        backend = Backend(model)
        replace, strip = normalizers.Replace(" ", "▁"), [decoders.Strip(" ", 1, 0)] if kind == "llama 2" else []
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if kind == "llama 2" else replace
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        )
    backend.add_special_tokens(["<s>", "</s>"])
    backend.add_tokens([AddedToken("zz", normalized=False)])
    backend.enable_truncation(3)
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    return backend


@pytest.mark.parametrize("kind", ["byte level", "llama 2", "gemma", "metaspace", "words"])
def test_a_tokenizer_json_is_read_as_the_tokenizers_package_reads_it(tmp_path: Path, kind: str) -> None:
    backend = write_tokenizer(tmp_path, kind)
    backend.no_truncation()
    tokenizer = folder_tokenizer(tmp_path)
    assert tokenizer is not None
    assert tokenizer.vocab_size == backend.get_vocab_size(with_added_tokens=True)
    for text in ("ab ab<s>zz ba", "one two three", " a", "", "日 🙂 x\n"):
        ids = backend.encode(text).ids
        assert tokenizer.encode(text).tolist() == ids
        assert tokenizer.decode(ids) == backend.decode(ids, skip_special_tokens=False)


@settings(max_examples=50, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁")))
def test_a_tokenizer_json_gives_a_text_back(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    for kind in ("byte level", "llama 2", "gemma"):
        folder = tmp_path_factory.getbasetemp() / kind.replace(" ", "_")
        if not folder.exists():
            write_tokenizer(folder, kind)
        tokenizer = folder_tokenizer(folder)
        assert tokenizer is not None
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_folder_says_which_tokens_begin_and_end_a_text(tmp_path: Path) -> None:
    backend = write_tokenizer(tmp_path, "byte level")
    backend.no_truncation()
    bos, eos, zz = (backend.token_to_id(token) for token in ("<s>", "</s>", "zz"))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    backend.save(str(tmp_path / "tokenizer.json"))
    named = {
        "bos_token": {"content": "<s>"},
        "eos_token": "</s>",
        "chat_template": [{"name": "default", "template": "T"}],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [eos, zz]}))
    tokenizer = folder_tokenizer(tmp_path)
    assert tokenizer is not None
    assert tokenizer.encode("ab").tolist() == [bos, backend.token_to_id("ab")]
    assert (tokenizer.bos_id, tokenizer.stop_ids) == (bos, (eos, zz))
    assert tokenizer.chat_template == "T"
    (tmp_path / "chat_template.jinja").write_text("as transformers 5 keeps it")
    tokenizer = folder_tokenizer(tmp_path)
    assert tokenizer is not None
    assert tokenizer.chat_template == "as transformers 5 keeps it"


def test_a_folder_may_have_no_tokenizer(tmp_path: Path) -> None:
    assert folder_tokenizer(tmp_path) is None


def test_a_tokenizer_json_of_an_unknown_kind_is_an_error(tmp_path: Path) -> None:
    backend = Backend(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="WordPiece"):
        folder_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "none"}}')
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        folder_tokenizer(tmp_path)


def test_words_are_learnt_as_they_come() -> None:
    tokenizer = WordTokenizer(8)
    assert tokenizer.encode("the cat saw the dog").tolist() == [0, 1, 2, 3, 1, 4]
    assert tokenizer.encode("the dog ran").tolist() == [0, 1, 4, 5]
    assert tokenizer.pieces(range(8)) == ["<bos>", "the", "cat", "saw", "dog", "ran", "<6>", "<7>"]
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.stop_ids) == (8, 0, ())


def test_a_new_word_is_an_error_when_the_vocabulary_is_full_and_nothing_is_learnt() -> None:
    tokenizer = WordTokenizer(4, ["swap", "turn"])
    with pytest.raises(TokenizerError, match=r"'a'.*swap, turn"):
        tokenizer.encode("swap a b")
    assert tokenizer.encode("swap turn c").tolist() == [0, 1, 2, 3]
    with pytest.raises(TokenizerError, match="'d'"):
        tokenizer.encode("d")
    with pytest.raises(TokenError):
        tokenizer.piece(4)


WORDS = [
    ("Mary's dog, e.g. (Rex).", ["Mary's", "dog", ",", "e.g", ".", "(", "Rex", ")", "."]),
    (" a\t\n b ", ["a", "b"]),
    ("...", [".", ".", "."]),
    ("3.14 x-y ¿Qué?", ["3.14", "x-y", "¿", "Qué", "?"]),
    ("日本 🙂", ["日本", "🙂"]),
    ("", []),
]


@pytest.mark.parametrize(("text", "words"), WORDS)
def test_punctuation_around_a_word_stands_by_itself(text: str, words: list[str]) -> None:
    assert split_words(text) == words


def test_words_are_joined_as_one_writes() -> None:
    tokenizer = WordTokenizer(20)
    assert tokenizer.decode(tokenizer.encode("Mary  went, (I think) home .")) == "Mary went, (I think) home."


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_words_hold_every_character_but_space(text: str) -> None:
    assert "".join(split_words(text)) == "".join(text.split())
