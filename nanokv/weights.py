"""Every array of a model, with its name and shape. A matrix is [outputs, inputs], so linear(x) is x W^T + b.

Names beside those of other codebases stand in the README's glossary. An array that a model's config does not ask for is
None. Whatever has a shape and can become a NumPy array (`np.asarray(w)`) will do for a matrix: float32 arrays, and
matrices that stay in the form in which a file or a kernel keeps them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, Protocol, runtime_checkable

import numpy as np

from nanokv.config import Config
from nanokv.errors import WeightsError


@runtime_checkable
class Matrix(Protocol):
    """A two-dimensional float32 array, whatever form it is kept in."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __array__(self, /) -> np.ndarray: ...


Vector = np.ndarray | None


@dataclass(frozen=True, eq=False)
class BlockWeights:
    """One block: attention, then an MLP."""

    wq: Matrix  # [H*hd, D]  queries
    wk: Matrix  # [G*hd, D]  keys
    wv: Matrix  # [G*hd, D]  values
    wo: Matrix  # [D, H*hd]  what the heads found -> the stream
    w_up: Matrix  # [F, D]
    w_down: Matrix  # [D, F]
    w_gate: Matrix | None = None  # [F, D]  if gated_mlp

    bq: Vector = None  # [H*hd]  if qkv_bias
    bk: Vector = None  # [G*hd]
    bv: Vector = None  # [G*hd]
    bo: Vector = None  # [D]     if out_bias
    b_gate: Vector = None  # [F] if mlp_bias and gated_mlp
    b_up: Vector = None  # [F]   if mlp_bias
    b_down: Vector = None  # [D]

    attn_norm: Vector = None  # [D]  unless norm is "none"
    mlp_norm: Vector = None  # [D]
    attn_norm_bias: Vector = None  # [D]  if norm is "layer"
    mlp_norm_bias: Vector = None  # [D]
    q_norm: Vector = None  # [hd]  if qk_norm
    k_norm: Vector = None  # [hd]
    post_attn_norm: Vector = None  # [D]  if post_norms
    post_mlp_norm: Vector = None  # [D]


@dataclass(frozen=True, eq=False)
class Weights:
    """The whole model. `check(weights, config)` compares every name and shape with what the config asks for."""

    embed: Matrix  # [V, D]
    blocks: tuple[BlockWeights, ...]  # L of them
    head: Matrix  # [V, D]  the very same object as embed if tied_head
    final_norm: Vector = None  # [D]  unless norm is "none"
    final_norm_bias: Vector = None  # [D]  if norm is "layer"
    pos_embed: np.ndarray | None = None  # [n_ctx, D]  if learned_positions

    def items(self) -> Iterator[tuple[str, Matrix | np.ndarray]]:
        """(name, array) of every array that is there, in reading order: `embed`, `blocks.0.wq`, ..., `head`."""
        yield "embed", self.embed
        if self.pos_embed is not None:
            yield "pos_embed", self.pos_embed
        for layer, block in enumerate(self.blocks):
            for name in BLOCK_NAMES:
                if getattr(block, name) is not None:
                    yield f"blocks.{layer}.{name}", getattr(block, name)
        for name in ("final_norm", "final_norm_bias", "head"):
            if getattr(self, name) is not None:
                yield name, getattr(self, name)

    def map(self, function: Callable[[Any], Any]) -> Weights:
        """The same weights with function(array) in place of every array. Arrays that are one object stay one object."""
        done: dict[int, Any] = {}

        def once(array: Any) -> Any:
            if array is not None and id(array) not in done:
                done[id(array)] = function(array)
            return done.get(id(array))

        blocks = tuple(BlockWeights(**{name: once(getattr(block, name)) for name in BLOCK_NAMES}) for block in self.blocks)
        rest = {name: once(getattr(self, name)) for name in ("embed", "head", "final_norm", "final_norm_bias", "pos_embed")}
        return Weights(blocks=blocks, **rest)


BLOCK_NAMES = tuple(field.name for field in fields(BlockWeights))


def block_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every array that one block of this config must have."""
    c = config
    q, kv, d, f = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim, c.d_model, c.d_ff
    shapes: dict[str, tuple[int, ...]] = {
        "wq": (q, d), "wk": (kv, d), "wv": (kv, d), "wo": (d, q), "w_up": (f, d), "w_down": (d, f)
    }  # fmt: skip
    if c.gated_mlp:
        shapes["w_gate"] = (f, d)
    if c.qkv_bias:
        shapes |= {"bq": (q,), "bk": (kv,), "bv": (kv,)}
    if c.out_bias:
        shapes["bo"] = (d,)
    if c.mlp_bias:
        shapes |= {"b_up": (f,), "b_down": (d,)} | ({"b_gate": (f,)} if c.gated_mlp else {})
    if c.norm != "none":
        shapes |= {"attn_norm": (d,), "mlp_norm": (d,)}
    if c.norm == "layer":
        shapes |= {"attn_norm_bias": (d,), "mlp_norm_bias": (d,)}
    if c.qk_norm:
        shapes |= {"q_norm": (c.head_dim,), "k_norm": (c.head_dim,)}
    if c.post_norms:
        shapes |= {"post_attn_norm": (d,), "post_mlp_norm": (d,)}
    return shapes


def model_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every array outside the blocks."""
    c = config
    shapes: dict[str, tuple[int, ...]] = {"embed": (c.vocab_size, c.d_model), "head": (c.vocab_size, c.d_model)}
    if c.norm != "none":
        shapes["final_norm"] = (c.d_model,)
    if c.norm == "layer":
        shapes["final_norm_bias"] = (c.d_model,)
    if c.learned_positions:
        shapes["pos_embed"] = (c.n_ctx, c.d_model)
    return shapes


def check(weights: Weights, config: Config) -> None:
    """Raise WeightsError, naming the array, unless the weights are exactly those that the config asks for."""
    expected = model_shapes(config)
    for layer in range(config.n_layers):
        expected |= {f"blocks.{layer}.{name}": shape for name, shape in block_shapes(config).items()}
    given = dict(weights.items())
    if missing := sorted(expected.keys() - given.keys()):
        raise WeightsError(f"missing array {missing[0]} {list(expected[missing[0]])} ({len(missing)} missing in all)")
    if extra := sorted(given.keys() - expected.keys()):
        raise WeightsError(f"array {extra[0]} has no place in a model of this config ({len(extra)} such in all)")
    for name, shape in expected.items():
        if tuple(given[name].shape) != shape:
            raise WeightsError(f"array {name} has shape {list(given[name].shape)}; the config asks for {list(shape)}")
    if config.tied_head and weights.head is not weights.embed:
        raise WeightsError("the config ties the head to the embedding, but two different arrays were given")
