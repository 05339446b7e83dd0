"""The suite's plain form of a model (SPEC.md, C1, C2): config.json and weights.safetensors as nanokv's Config and Weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from nanokv.config import Config, Rope
from nanokv.errors import ConfigError, WeightsError
from nanokv.weights import BlockWeights, Weights, block_shapes, model_shapes

Array = np.ndarray


def small_config(n_heads: int, n_kv_heads: int, head_dim: int, n_ctx: int = 1, n_layers: int = 1) -> Config:
    """The smallest model with these heads."""
    return Config(n_layers, n_heads, n_kv_heads, head_dim, 2, 0, 2, n_ctx, norm="none", gated_mlp=False, tied_head=False)


def changed(config: Config, **changes: Any) -> Config:
    return Config(**{field.name: changes.get(field.name, getattr(config, field.name)) for field in fields(Config)})


def config_of(values: Mapping[str, Any]) -> Config:
    """The Config that a config.json of the suite's plain form describes (SPEC.md, C1)."""

    def rope(value: Any) -> Rope | None:
        if value is None:
            return None
        divisors = value.get("divisors")
        return Rope(value["base"], None if divisors is None else tuple(divisors))

    try:
        ropes = {name: rope(values.get(name)) for name in ("rope", "rope_local")}
        return Config(**{**values, **ropes, "sliding": tuple(values.get("sliding", ()))})
    except (TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"the config cannot be read: {error}") from error


def weights_of(config: Config, arrays: Mapping[str, Array]) -> Weights:
    """Arrays by name as Weights. WeightsError for a block or an array that the config doesn't have, or lacks."""
    known = {field.name for field in fields(BlockWeights)}
    blocks: list[dict[str, Array]] = [{} for _ in range(config.n_layers)]
    rest: dict[str, Any] = {}
    for name, array in arrays.items():
        match = re.fullmatch(r"blocks\.(\d+)\.(\w+)", name)
        if match and int(match[1]) < config.n_layers and match[2] in known:
            blocks[int(match[1])][match[2]] = array
        elif name in model_shapes(config) and not (config.tied_head and name == "head"):
            rest[name] = array
        else:
            raise WeightsError(f"array {name} has no place in a model of this config")
    needed = {name for name in model_shapes(config) if name != "head" or not config.tied_head} - rest.keys()
    needed |= {f"blocks.{i}.{name}" for i, block in enumerate(blocks) for name in block_shapes(config).keys() - block.keys()}
    if needed:
        raise WeightsError(f"missing array {min(needed)} ({len(needed)} missing in all)")
    return Weights(blocks=tuple(BlockWeights(**block) for block in blocks), **{"head": rest["embed"], **rest})


def one_block(weights: Weights, layer: int) -> Weights:
    """The model with this block alone, as plain arrays."""
    plain = weights.map(lambda array: np.array(array, getattr(array, "dtype", None)))
    return Weights(
        embed=plain.embed, blocks=(plain.blocks[layer],), head=plain.head, final_norm=plain.final_norm,
        final_norm_bias=plain.final_norm_bias, pos_embed=plain.pos_embed,
    )  # fmt: skip
