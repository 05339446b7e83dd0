"""Small random models of every family, for tests."""

from __future__ import annotations

import numpy as np

from nanokv.config import Config, Rope
from nanokv.transformer import Transformer
from nanokv.weights import BlockWeights, Weights, block_shapes, model_shapes

_ROPE = Rope(100.0)
# Sizes are all different, and H, G such that every wrong pairing of heads shows.
CONFIGS = {
    "llama": Config(3, 6, 2, 4, 20, 28, 61, 200, rope=_ROPE),
    "llama3": Config(3, 6, 2, 8, 20, 28, 61, 200, rope=Rope(50.0, (1.0, 1.5, 3.0, 4.0)), rope_pairs="neighbours",
                     tied_head=False),
    "qwen2": Config(3, 6, 2, 4, 20, 28, 61, 200, rope=_ROPE, qkv_bias=True),
    "qwen3": Config(3, 6, 2, 8, 20, 28, 61, 200, rope=_ROPE, qk_norm=True, norm_eps=1e-6),
    "gpt2": Config(3, 5, 5, 4, 20, 28, 61, 200, norm="layer", learned_positions=True, qkv_bias=True, out_bias=True,
                   mlp_bias=True, gated_mlp=False, activation="gelu_tanh"),
    "gemma3": Config(4, 6, 2, 6, 20, 28, 61, 200, rope=_ROPE, rope_local=Rope(10.0), window=5,
                     sliding=(True, True, False, True), qk_norm=True, post_norms=True, activation="gelu_tanh",
                     embed_scale=20**0.5, attn_scale=10**-0.5),
    "gelu": Config(2, 3, 1, 4, 20, 28, 61, 200, norm="none", activation="gelu", gated_mlp=False, learned_positions=True),
    "relu": Config(2, 3, 1, 4, 20, 28, 61, 200, activation="relu", rope=_ROPE, mlp_bias=True),
}  # fmt: skip


def weights(config: Config, seed: int = 0, scale: float = 0.3) -> Weights:
    """Normal random weights; those of norms around 1."""
    random = np.random.default_rng(seed)

    def array(shape: tuple[int, ...]) -> np.ndarray:
        return (scale * random.standard_normal(shape) + (len(shape) == 1)).astype(np.float32)

    blocks = tuple(
        BlockWeights(**{name: array(shape) for name, shape in block_shapes(config).items()}) for _ in range(config.n_layers)
    )
    rest = {name: array(shape) for name, shape in model_shapes(config).items()}
    if config.tied_head:
        rest["head"] = rest["embed"]
    return Weights(blocks=blocks, **rest)


def model(config: Config, seed: int = 0, ops: str = "numba") -> Transformer:
    """A model with those weights."""
    return Transformer(config, weights(config, seed), ops=ops)


def tokens(config: Config, n: int, seed: int = 1) -> np.ndarray:
    """n random ids."""
    return np.random.default_rng(seed).integers(0, config.vocab_size, n).astype(np.int32)
