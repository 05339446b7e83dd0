"""Hugging Face transformers in float32, with its DynamicCache; its plain forward, without the overhead of generate()."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from benchmarks.peers.base import Model, by_turns, timed


class TransformersModel(Model):
    """A model from a folder. attention: "sdpa" or "eager", the only one that can give its attention weights."""

    def __init__(self, tokens: list[int], threads: int, path: str, attention: str = "sdpa") -> None:
        super().__init__(tokens)
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.attention = attention
        self.model: Any = AutoModelForCausalLM.from_pretrained(path, attn_implementation=attention)

    def about(self) -> str:
        return f"{self.attention}, {self.model.dtype}"

    def empty(self) -> Any:
        return DynamicCache()

    def append(self, cache: Any, tokens: np.ndarray) -> int:
        return int(self._forward(cache, tokens).logits[0, -1].argmax())

    def keep(self, cache: Any) -> Any:
        return copy.deepcopy(cache)

    def restore(self, kept: Any) -> Any:
        return copy.deepcopy(kept)

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        return self.model(torch.from_numpy(tokens).long()[None]).logits[0].numpy()

    def record_prefill(self, n: int) -> dict[str, float]:
        """A prefill of n that gives its attention weights, between two that do not; the bytes of these weights."""
        before, cache, held = self.prefill(n)[0], self.empty(), list[int]()
        recorded = timed(lambda: self._recorded(cache, self.tokens[:n], held))
        return {"plain": (before + self.prefill(n)[0]) / 2, "recorded": recorded, "bytes": sum(held)}

    def record_decode(self, context: int, n: int, first: int) -> dict[str, float]:
        """n steps that give their attention weights, and n that do not, by turns; the bytes of all these weights."""
        plain, watched, held = self.restore(self._kept[context]), self.restore(self._kept[context]), list[int]()
        ways = {
            "plain": lambda token: self.append(plain, token),
            "recorded": lambda token: self._recorded(watched, token, held),
        }
        return {**by_turns(ways, self.tokens[context : context + n], first), "bytes": sum(held)}

    def _forward(self, cache: Any, tokens: np.ndarray, **more: Any) -> Any:
        ids = torch.from_numpy(tokens).long()[None]
        return self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **more)

    def _recorded(self, cache: Any, tokens: np.ndarray, held: list[int]) -> int:
        """Like append. The bytes of the weights are noted; keeping the weights themselves would cost memory, not time."""
        output = self._forward(cache, tokens, output_attentions=True)
        held.append(sum(weights.nbytes for weights in output.attentions))
        return int(output.logits[0, -1].argmax())
