"""The shape of a model: every number and every choice in which one decoder-only transformer differs from another.

Families (Llama, Qwen, GPT-2, Gemma) differ by the values in here, never by a copy of the code. The letters that shape
comments use all over nanokv stand beside the fields that they abbreviate; two more belong to a call, not to a model:
T, the new positions of this call, and S, the positions in the cache after it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal, localcontext
from functools import lru_cache
from typing import Literal

from nanokv.errors import ConfigError


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al. 2021): how fast each pair of a head's features turns as the position grows."""

    base: float  # pair i turns by base ** (-2 i / hd) radians a position, before the divisor
    divisors: tuple[float, ...] | None = None  # one a pair: context-extension schemes slow some pairs down; None is 1

    def __post_init__(self) -> None:
        _require(_positive(self.base), f"the RoPE base is {self.base}; it must be a positive number")
        if self.divisors is not None:
            _require(all(map(_positive, self.divisors)), "every RoPE divisor must be a positive number")

    @lru_cache  # noqa: B019  # a Rope is small, and there are few
    def frequencies(self, head_dim: int) -> list[float]:
        """Radians a position of each of the hd/2 pairs: the float64 nearest to the power, over the divisor."""
        with localcontext() as context:
            context.prec = 40
            powers = [float(Decimal(self.base) ** (Decimal(-2 * i) / head_dim)) for i in range(head_dim // 2)]
        return [power / divisor for power, divisor in zip(powers, self.divisors or [1.0] * len(powers), strict=True)]


@dataclass(frozen=True)
class Config:
    """Everything about a model but its weights. Layers count from 0. Checked on construction: ConfigError says why."""

    n_layers: int  # L: blocks, each one attention and one MLP
    n_heads: int  # H: query heads
    n_kv_heads: int  # G: key/value heads; query head h reads key/value head h // (H/G)
    head_dim: int  # hd: features of a head
    d_model: int  # D: width of the residual stream
    d_ff: int  # F: width of the MLP; 0 makes its output zero (an attention-only model)
    vocab_size: int  # V: tokens
    n_ctx: int  # the most positions that one cache may hold

    norm: Literal["rms", "layer", "none"] = "rms"  # before each sublayer and before the head
    norm_eps: float = 1e-5  # added to the mean square (or the variance), under the root
    rope: Rope | None = None  # rotary positions; None: none
    rope_pairs: Literal["halves", "neighbours"] = "halves"  # pair i is features (i, i + hd/2) or (2i, 2i + 1)
    learned_positions: bool = False  # a row of pos_embed is added to the embedding
    activation: Literal["silu", "gelu_tanh", "gelu", "relu"] = "silu"
    gated_mlp: bool = True  # act(x W_gate) * (x W_up), or act(x W_up) alone
    attn_scale: float | None = None  # multiplies q . k; None is 1/sqrt(hd)
    embed_scale: float = 1.0  # multiplies the embedding
    window: int | None = None  # a sliding layer's position reads itself and the window - 1 before it
    sliding: tuple[bool, ...] = ()  # which layers slide, one a layer; () is none of them
    rope_local: Rope | None = None  # the sliding layers' RoPE, where it differs from the others'

    qkv_bias: bool = False  # bq, bk, bv
    out_bias: bool = False  # bo
    mlp_bias: bool = False  # b_gate (if gated), b_up, b_down
    qk_norm: bool = False  # RMS norm over hd of each query and key head, before RoPE
    post_norms: bool = False  # a second norm, on a sublayer's output before it is added to the stream
    tied_head: bool = True  # the head is the embedding matrix

    def __post_init__(self) -> None:
        for name in ("n_layers", "n_heads", "n_kv_heads", "head_dim", "d_model", "vocab_size", "n_ctx"):
            value = getattr(self, name)
            _require(_whole(value) and value > 0, f"{name} is {value!r}; it must be a positive whole number")
        _require(_whole(self.d_ff) and self.d_ff >= 0, f"d_ff is {self.d_ff!r}; it must be 0 or a positive whole number")
        _require(self.n_heads % self.n_kv_heads == 0, f"{self.n_heads} query heads cannot share {self.n_kv_heads} "
                 "key/value heads evenly: n_heads must be a multiple of n_kv_heads")  # fmt: skip
        _require(_finite(self.norm_eps) and self.norm_eps >= 0, f"norm_eps is {self.norm_eps!r}; it must not be negative")
        _require(_finite(self.embed_scale), f"embed_scale is {self.embed_scale!r}; it must be a finite number")
        for name, allowed in _CHOICES.items():
            _require(getattr(self, name) in allowed, f"{name} is {getattr(self, name)!r}; it must be one of {allowed}")
        if self.attn_scale is None:
            object.__setattr__(self, "attn_scale", 1 / math.sqrt(self.head_dim))
        _require(_positive(self.attn_scale), f"attn_scale is {self.attn_scale!r}; it must be a positive number")
        _require(not self.post_norms or self.norm == "rms", f"post_norms are RMS norms, and norm is {self.norm!r}: it must be "
                 "'rms'")  # fmt: skip
        self._check_positions()

    def _check_positions(self) -> None:
        if not self.sliding:
            object.__setattr__(self, "sliding", (False,) * self.n_layers)
        _require(len(self.sliding) == self.n_layers, f"sliding has {len(self.sliding)} entries for {self.n_layers} layers")
        _require(self.window is None or (_whole(self.window) and self.window > 0), f"window is {self.window!r}; it must be "
                 "a positive whole number of positions, or None")  # fmt: skip
        _require(self.window is not None or not any(self.sliding), "some layers slide, but window is None")
        for rope in (self.rope, self.rope_local):
            _require(
                rope is None or self.head_dim % 2 == 0, f"RoPE turns pairs of features, and head_dim {self.head_dim} is odd"
            )
            _require(rope is None or rope.divisors is None or len(rope.divisors) == self.head_dim // 2, "RoPE needs one "
                     f"divisor for each of the {self.head_dim // 2} pairs")  # fmt: skip

    def window_of(self, layer: int) -> int | None:
        """How many positions, itself included, a position of this layer may read; None: all up to itself."""
        return self.window if self.sliding[layer] else None

    def rope_of(self, layer: int) -> Rope | None:
        """The rotary positions of this layer, or None."""
        return self.rope_local or self.rope if self.sliding[layer] else self.rope


_CHOICES = {
    "norm": ("rms", "layer", "none"),
    "rope_pairs": ("halves", "neighbours"),
    "activation": ("silu", "gelu_tanh", "gelu", "relu"),
}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _positive(value: object) -> bool:
    return _finite(value) and value > 0  # type: ignore[operator]
