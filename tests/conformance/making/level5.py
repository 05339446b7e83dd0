"""Level 5: choosing a token, and text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from making.cases import case
from making.draws import normal

Cases = list[dict[str, Any]]


def generator() -> Cases:
    return [
        case(f"pcg32/seed_{name}", "pcg32", {"seed": seed, "stream": 0, "n": 6}, comment)
        for name, seed, comment in (
            ("0", "0", "the seed with which xorshift stands still"),
            ("1", "1", ""),
            ("largest", str(2**64 - 1), "seeds go as decimal text, since JSON readers may round numbers above 2^53"),
        )
    ] + [case("pcg32/stream", "pcg32", {"seed": "42", "stream": 54, "n": 6}, "the pair of PCG's own demonstration")]


def choices() -> Cases:
    flat = normal("logits", 24, scale=1.5)
    ties = np.round(normal("ties", 24) * 2) / np.float32(2)
    steep = np.array([0, 200, 199, -300, 150], np.float32)
    made = [
        case("greedy/ties", "greedy", {"logits": np.array([1, 3, -2, 3, 3], np.float32)}, "the lowest id of the largest"),
    ]
    for name, logits, options, comment in (
        ("plain", flat, {"temperature": 1.0}, ""),
        ("cold", flat, {"temperature": 0.3}, ""),
        ("hot", flat, {"temperature": 2.5}, ""),
        ("top_k", flat, {"temperature": 1.5, "top_k": 4}, ""),
        ("top_p", flat, {"temperature": 1.0, "top_p": 0.6}, ""),
        ("both", flat, {"temperature": 1.5, "top_k": 9, "top_p": 0.7}, "top_k first; probabilities sum to 1 over what it kept"),
        ("ties", ties, {"temperature": 1.0, "top_k": 6}, "equal logits stand by rising id"),
        ("top_p_small", flat, {"temperature": 1.0, "top_p": 0.001}, "the likeliest is always kept"),
        ("steep", steep, {"temperature": 1.0}, "exp(200) overflows float32, so subtract the largest"),
    ):
        inputs = {"logits": logits, "seed": "7", "n": 12, **options}
        made.append(case(f"sample/{name}", "sample", inputs, comment))
    return made


def continuations() -> Cases:
    prompt = [7, 33, 17, 1, 14]  # goes on with different tokens, the likeliest of each by 0.03 or more
    made = []
    for name, options, comment in (
        ("greedy", {"max_new_tokens": 8, "temperature": 0.0}, ""),
        ("stop", {"max_new_tokens": 8, "temperature": 0.0, "stop": [15]}, "the third ends the text and is not given out"),
        ("sampled", {"max_new_tokens": 10, "temperature": 1.3, "top_k": 12, "seed": "3"}, ""),
        ("to_the_last_slot", {"max_new_tokens": 27, "temperature": 0.8, "seed": "11"}, "5 + 27 positions fill the context"),
    ):
        inputs = {"model": "models/llama", "tokens": prompt, **options}
        made.append(case(f"generate/{name}", "generate", inputs, comment))
    return made


TEXTS = (
    ("words", "the cat sat on the mat", ""),
    ("spaces", "  two  spaces and\na line\t end ", "runs of spaces: the last of them belongs to the word"),
    ("digits", "in 2024 or 7", "each digit is a word of its own"),
    ("contractions", "it's the cat's, isn't it?", ""),
    ("accents", "caf\u00e9 na\u00efve", "characters of two bytes"),
    ("emoji", "ok \U0001f642!", "a character of four bytes, each a token"),
    ("special", "<|begin|>the cat<|end|>", "special tokens that the text spells out become themselves"),
    ("angle", "<s>less</s> is <more>", "letters that a careless strip would take"),
)


def texts(folder: Path) -> Cases:
    """What the suite's tokenizer makes of some texts, and the way back."""
    write_tokenizer(folder / "tokenizer")
    made = [case(f"encode/{name}", "encode", {"tokenizer": "tokenizer", "text": text}, comment)
            for name, text, comment in TEXTS]  # fmt: skip
    from nanokv.tokenizer import folder_tokenizer

    tokenizer = folder_tokenizer(folder / "tokenizer")
    assert tokenizer is not None
    for name, text, _ in TEXTS:
        ids = tokenizer.encode(text).tolist()
        if name in ("spaces", "emoji", "special", "angle"):
            made.append(case(f"decode/{name}", "decode", {"tokenizer": "tokenizer", "ids": ids}))
    half = tokenizer.encode("ok \U0001f642").tolist()[:-1]
    made.append(case("decode/half_a_character", "decode", {"tokenizer": "tokenizer", "ids": half},
                     "bytes that make no whole character become U+FFFD"))  # fmt: skip
    return made


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE of 256 bytes, 40 merges and two special tokens, as tokenizer.json."""
    alphabet = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shown = {byte: chr(byte) for byte in alphabet}
    shown |= {byte: chr(256 + i) for i, byte in enumerate(byte for byte in range(256) if byte not in shown)}
    vocab = {shown[byte]: byte for byte in range(256)}
    merges = []
    for pair in MERGES.split():
        left, right = pair.split("+")
        merges.append([left, right])
        vocab[left + right] = len(vocab)
    added = [
        {"id": len(vocab) + i, "content": text, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
        for i, text in enumerate(("<|begin|>", "<|end|>"))
    ]  # fmt: skip
    steps = [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ]
    whole_file = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}, "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": vocab, "merges": merges},
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(whole_file, ensure_ascii=True, indent=0) + "\n", encoding="utf-8")


MERGES = """t+h th+e Ġ+the a+t Ġ+c Ġ+s Ġc+at Ġs+at Ġ+o Ġo+n Ġ+m Ġm+at i+n Ġ+i Ġi+s Ġi+n e+s es+s l+ess Ġ+a Ġa+n Ġan+d
Ġ+l l+i li+n lin+e Ġ+Ġ Ġ+w s+p sp+a c+e '+s '+t n+'t o+r Ã+© Ã+¯ ð+Ł c+a f+Ã ca+fÃ"""

FILES = {"generator": generator, "choices": choices, "continuations": continuations}
