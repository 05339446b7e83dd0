"""Makes sentencepiece.json: two small vocabularies, and the ids that the package sentencepiece gives texts by them.

    pip install sentencepiece
    python tests/data/make_sentencepiece.py

The vocabularies are trained on Python's own documentation. One puts a space before a text, as Llama 2 does; the other
does not, and has a token for three spaces, as Gemma does.
"""

from __future__ import annotations

import argparse
import decimal
import difflib
import io
import json
import random
from pathlib import Path
from typing import Any

import sentencepiece

TEXT = "\n".join(str(module.__doc__) for module in (argparse, decimal, difflib, json, random))
CHARACTERS = "abcdefghijklmnopqrstuvwxyz      ,.éß日本🙂\n\tAZ019'\"-"
TEXTS = [
    "",
    "a",
    " ",
    "Hello world",
    "  two  spaces   three",
    "aaaaaaaaaaaaaaaa",
    "naïve café → 日本語 🙂 and ½",
    "<turn>user\nHi<turn>",
]
KINDS = {"normal": 1, "unknown": 2, "control": 3, "user defined": 4, "unused": 5, "byte": 6}  # as GGUF numbers them


def texts() -> list[str]:
    rng = random.Random(0)
    words = TEXT.split()
    of_words = [" ".join(rng.choices(words, k=rng.randint(1, 14))) for _ in range(20)]
    of_characters = ["".join(rng.choices(CHARACTERS, k=rng.randint(1, 40))) for _ in range(20)]
    return TEXTS + of_words + of_characters


def vocabulary(space_first: bool) -> dict[str, Any]:
    own = ["<turn>"] if space_first else ["<turn>", "▁▁▁"]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=480,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=space_first,
        split_digits=True,
        user_defined_symbols=own,
        allow_whitespace_only_pieces=True,
        character_coverage=0.999,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    tokens = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    kinds = ["user defined" if token in own else "normal" for token in tokens]
    for i in range(len(tokens)):
        if processor.is_unknown(i) or processor.is_control(i) or processor.is_byte(i):
            kinds[i] = "unknown" if processor.is_unknown(i) else "control" if processor.is_control(i) else "byte"
    return {
        "add_space_prefix": space_first,
        "tokens": tokens,
        "scores": [processor.get_score(i) for i in range(len(tokens))],
        "token_type": [KINDS[kind] for kind in kinds],
        # Where the space goes in a text with special tokens, implementations differ; nanokv does as llama.cpp does.
        "cases": [[text, processor.encode(text)] for text in texts() if not (space_first and "<turn>" in text)],
    }


if __name__ == "__main__":
    made = json.dumps([vocabulary(True), vocabulary(False)], ensure_ascii=False, separators=(",", ":"))
    (Path(__file__).parent / "sentencepiece.json").write_text(made + "\n", encoding="utf-8")
