"""The museum's other rooms: bugs of loaders, of dequantising, of the sampler, of text, and of the trace.

As in broken.py, `bug` is an exhibit's name, or "" for what is right.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

import nanokv
from nanokv.config import Rope
from nanokv.gguf_file import FileTensor
from nanokv.tokenizer import folder_tokenizer
from nanokv.transformer import Transformer
from nanokv.weights import Weights

Array = np.ndarray
right = import_module("nanokv.generate")  # in the package itself that name is the function's


def weights_as_loaded(model: Transformer, bug: str) -> Weights:
    """The weights of a model read from a file as people publish them, as a loader with this bug has them."""
    config, weights = model.config, model.weights
    gpt2, gemma = config.learned_positions, config.post_norms

    def unturned(w: Array) -> Array:
        """A matrix of a file that keeps [inputs, outputs], taken for [outputs, inputs]."""
        w = np.asarray(w)
        return np.ascontiguousarray(w.T).reshape(w.shape)

    def by_head(*parts: Array) -> list[Array]:
        """The rows q, k, v of a file, taken for q, k, v of head 0, q, k, v of head 1, and so on."""
        rows = np.concatenate([np.asarray(part) for part in parts])
        heads = rows.reshape(config.n_heads, 3, config.head_dim, *rows.shape[1:])
        return [np.ascontiguousarray(heads[:, i]).reshape(-1, *rows.shape[1:]) for i in range(3)]

    def block(w: Any) -> Any:
        if bug == "Conv1DNotTransposed" and gpt2:
            return replace(w, **{name: unturned(getattr(w, name)) for name in ("wq", "wk", "wv", "wo", "w_up", "w_down")})
        if bug == "FusedSplitWrong" and gpt2:
            return replace(w, wk=w.wv, wv=w.wk, bk=w.bv, bv=w.bk)
        if bug == "FusedSplitByHead" and gpt2:
            return replace(w, **{
                f"{kind}{letter}": part
                for kind in "wb"
                for letter, part in zip("qkv", by_head(*(getattr(w, f"{kind}{x}") for x in "qkv")), strict=True)
            })  # fmt: skip
        if bug == "NormsWithoutOne" and gemma:
            return replace(w, **{name: getattr(w, name) - 1 for name in _NORMS})
        if bug == "HeadNormsWithoutOne" and gemma:
            return replace(w, q_norm=w.q_norm - 1, k_norm=w.k_norm - 1)
        return w

    final_norm = weights.final_norm
    if bug == "NormsWithoutOne" and gemma and final_norm is not None:
        final_norm = final_norm - 1
    return replace(weights, blocks=tuple(map(block, weights.blocks)), final_norm=final_norm)


_NORMS = ("attn_norm", "mlp_norm", "q_norm", "k_norm", "post_attn_norm", "post_mlp_norm")


# kind: bytes of a block, and where its halves stand.
_HALVES = {
    "F16": (2, (0,)), "Q8_0": (34, (0,)), "Q4_0": (18, (0,)), "Q4_1": (20, (0, 2)), "Q5_0": (22, (0,)), "Q5_1": (24, (0, 2)),
    "Q4_K": (144, (0, 2)), "Q5_K": (176, (0, 2)), "Q6_K": (210, (208,)),
}  # fmt: skip


def blocks_as_read(kind: str, data: bytes, bug: str) -> Array:
    """The bytes of quantised blocks as a reader with this bug takes them."""
    if kind not in _HALVES:
        return np.frombuffer(data, np.uint8)
    size, halves = _HALVES[kind]
    blocks = np.frombuffer(data, np.uint8).copy().reshape(-1, size)
    if bug == "HalfSubnormalsLost":
        for at in halves:
            blocks[(blocks[:, at + 1] & 0x7C) == 0, at : at + 2] = 0
    if bug == "ScalesHighBitsLost" and kind in ("Q4_K", "Q5_K"):
        blocks[:, 4:12] &= 63
    if bug == "ScalesHighBitsSwapped" and kind in ("Q4_K", "Q5_K"):
        of_scales, of_mins = blocks[:, 4:8].copy(), blocks[:, 8:12].copy()
        blocks[:, 4:8], blocks[:, 8:12] = of_scales & 63 | of_mins & 192, of_mins & 63 | of_scales & 192
    return blocks.reshape(-1)


def dequantise(kind: str, data: bytes, shape: Sequence[int], bug: str) -> Array:
    """float32 of a tensor in a GGUF file's form."""
    values = np.asarray(FileTensor("", tuple(shape), kind, blocks_as_read(kind, data, bug)))
    if bug == "NibblesInterleaved" and kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1"):
        # Byte j holds elements j and j + 16; taken for 2j and 2j + 1.
        values = values.reshape(-1, 2, 16).swapaxes(1, 2).reshape(shape)
    return values


class Sampling:
    """nanokv.generate, with switches."""

    def __init__(self, bug: str) -> None:
        self.bug = bug

    def PCG32(self, seed: int, stream: int = 0) -> Any:  # noqa: N802 - the name that it has in nanokv
        if self.bug == "XorShiftInstead":
            return XorShift(seed)
        random = right.PCG32(seed, stream)
        if self.bug == "PcgSeededWithoutSteps":
            random._state = seed
        if self.bug == "PcgRotatesLeft":
            word = random.next
            random.next = lambda: _turned_back(random, word)  # type: ignore[method-assign]
        return random

    def greedy(self, logits: Array) -> int:
        if self.bug == "LastOfEqualLogits":
            return len(logits) - 1 - int(np.argmax(logits[::-1]))
        return right.greedy(logits)

    def sample(self, logits: Array, random: Any, *, temperature: float = 1.0, top_k: int | None = None,
               top_p: float | None = None) -> int:  # fmt: skip
        unsorted = self.bug == "TopPBeforeSorting" and top_p is not None
        order = np.arange(len(logits)) if unsorted else np.argsort(-logits, kind="stable")[:top_k]
        if self.bug == "TemperatureMultiplies":
            temperature = 1 / temperature
        cumulative = np.cumsum(np.exp((logits[order].astype(np.float64) - np.float64(logits.max())) / temperature))
        if top_p is not None:
            kept = int(np.searchsorted(cumulative, top_p * cumulative[-1], side="left")) + 1
            cumulative = cumulative[: max(kept - 1, 1) if self.bug == "TopPDropsTheCrossing" else kept]
        choice = np.searchsorted(cumulative, random.uniform() * cumulative[-1], side="right")
        return int(order[min(int(choice), len(cumulative) - 1)])

    def generate(self, model: Transformer, tokens: Array, *, max_new_tokens: int, seed: int = 0, temperature: float = 0.0,
                 stop: Sequence[int] = (), **cuts: Any) -> Iterator[int]:  # fmt: skip
        right._check_sampling(max_new_tokens, temperature, cuts.get("top_k"), cuts.get("top_p"), seed)
        cache, random = model.new_cache(), self.PCG32(seed)
        logits = model.forward(tokens, cache)
        for _ in range(max_new_tokens):
            last = logits[-1]
            token = self.greedy(last) if temperature == 0 else self.sample(last, random, temperature=temperature, **cuts)
            if token in stop and self.bug != "StopTokenPrinted":
                return
            yield token
            if token in stop:
                return
            logits = model.forward([token], cache)


class XorShift:
    """The generator of llama2.c, xorshift64*: seed 0 stays 0 for ever."""

    def __init__(self, seed: int) -> None:
        self.state = seed

    def next(self) -> int:
        for shift in (-12, 25, -27):
            self.state ^= (self.state << shift if shift > 0 else self.state >> -shift) & 0xFFFFFFFFFFFFFFFF
        return self.state * 0x2545F4914F6CDD1D >> 32 & 0xFFFFFFFF

    def uniform(self) -> float:
        return self.next() / 2**32


def _turned_back(random: Any, word: Any) -> int:
    """PCG32's output with its last rotation to the left."""
    turn, right_turned = random._state >> 59, word()
    left = 2 * turn % 32
    return (right_turned << left | right_turned >> (32 - left) % 32) & 0xFFFFFFFF if left else right_turned


class BrokenTokenizer:
    """A byte-level tokenizer, with switches."""

    def __init__(self, folder: str, bug: str) -> None:
        self.right, self.bug = folder_tokenizer(folder), bug

    def encode(self, text: str) -> Array:
        if self.bug == "SpaceBeforeText":
            text = " " + text
        return self.right.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        if self.bug == "DecodedTokenByToken":
            return "".join(self.right.bytes_of(token).decode(errors="replace") for token in ids)
        if self.bug == "LettersStripped":  # llama3.np: strip() takes a set of characters, not a word
            return b"".join(self.right.bytes_of(token).strip(b"<s>").strip(b"</s>") for token in ids).decode(errors="replace")
        return self.right.decode(ids)


def load(path: str, bug: str, make: Any, ops: str = "numpy") -> Transformer:
    """nanokv.load, and then what the loader's bug makes of the weights."""
    model = nanokv.load(path, ops="numpy")
    config = model.config
    if bug == "RopeRampNotClamped" and config.rope is not None and config.rope.divisors is not None:
        config = replace(config, rope=unclamped(config.rope, config.head_dim, Path(path)))
    return make(config, weights_as_loaded(model, bug), tokenizer=model.tokenizer)


def unclamped(rope: Rope, head_dim: int, folder: Path) -> Rope:
    """Llama 3's RoPE where the ramp between the two bands goes on past its ends."""
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))["rope_scaling"]
    length, factor, low, high = (
        settings[key] for key in ("original_max_position_embeddings", "factor", "low_freq_factor", "high_freq_factor")
    )
    plain = replace(rope, divisors=None)
    ramps = [(length * each / (2 * math.pi) - low) / (high - low) for each in plain.frequencies(head_dim)]
    object.__setattr__(plain, "divisors", tuple(1 / ((1 - m) / factor + m) for m in ramps))  # unchecked: some are negative
    return plain


def hash_bytes(x: Array) -> Array:
    """FNV-1a-64 over bytes, where the trace's hash goes over 32-bit words."""
    rows = np.ascontiguousarray(x).view(np.uint8).reshape(*x.shape[:-1], -1).astype(np.uint64)
    hashes = np.full(rows.shape[:-1], 0xCBF29CE484222325, np.uint64)
    with np.errstate(over="ignore"):
        for i in range(rows.shape[-1]):
            hashes = (hashes ^ rows[..., i]) * np.uint64(0x100000001B3)
    return hashes
