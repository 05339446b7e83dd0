"""The suite's models: small, random, of every family, with sizes such that wrong code gives other numbers.

In plain form (config.json with the fields of SPEC.md's C1, weights.safetensors with its names), and three of them once
more as Hugging Face publishes such models, from which a loader must make the same.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from making.draws import normal

from nanokv import safetensors_file
from nanokv.config import Config, Rope
from nanokv.families import FAMILIES
from nanokv.weights import block_shapes, model_shapes

Array = np.ndarray
V, N_CTX, D, F = 37, 32, 20, 22

# The frequencies of llama3 make 24 f / 2 pi turns in 24 positions: 3.8, 1.4, 0.5 and 0.2, in each of the three bands.
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 50.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0,
    "original_max_position_embeddings": 24,
}  # fmt: skip


def llama3_divisors() -> tuple[float, ...]:
    """SPEC.md's C4 for those settings."""
    divisors = []
    for frequency in Rope(50.0).frequencies(8):
        smooth = min(max((24 * frequency / (2 * math.pi) - 1.0) / (3.0 - 1.0), 0.0), 1.0)
        divisors.append(1 / ((1 - smooth) / 4.0 + smooth))
    return tuple(divisors)


# H and G such that h // G, h % G and h // (H/G) differ; D above 16, so that lanes wrap around; F and V no multiple of 4.
CONFIGS: dict[str, Config] = {
    "llama": Config(3, 6, 2, 8, D, F, V, N_CTX, rope=Rope(100000.0)),
    "llama3": Config(2, 6, 3, 8, D, F, V, N_CTX, rope=Rope(50.0, llama3_divisors()), rope_pairs="neighbours",
                     tied_head=False),
    "qwen2": Config(2, 6, 2, 4, D, F, V, N_CTX, rope=Rope(1000.0), qkv_bias=True, norm_eps=1e-6),
    "qwen3": Config(2, 6, 3, 6, D, F, V, N_CTX, rope=Rope(1000.0), qk_norm=True, norm_eps=1e-6),
    "gpt2": Config(2, 5, 5, 4, D, F, V, N_CTX, norm="layer", learned_positions=True, qkv_bias=True, out_bias=True,
                   mlp_bias=True, gated_mlp=False, activation="gelu_tanh"),
    "gemma3": Config(3, 6, 2, 6, D, F, V, N_CTX, rope=Rope(1000.0), rope_local=Rope(10.0), window=5,
                     sliding=(True, False, True), qk_norm=True, post_norms=True, activation="gelu_tanh",
                     embed_scale=math.sqrt(D), attn_scale=10**-0.5, norm_eps=1e-6),
}  # fmt: skip


def arrays_of(name: str) -> dict[str, Array]:
    """The weights of a model by their names in the plain form."""
    config = CONFIGS[name]
    shapes = model_shapes(config)
    if config.tied_head:
        del shapes["head"]
    shapes |= {f"blocks.{i}.{part}": shape for i in range(config.n_layers) for part, shape in block_shapes(config).items()}
    arrays = {part: normal(f"{name} {part}", *shape, scale=0.3) for part, shape in shapes.items()}
    return {part: array + np.float32(1) if part.endswith("norm") else array for part, array in arrays.items()}


def write_models(folder: Path) -> None:
    """All models, each in its folder."""
    for name, config in CONFIGS.items():
        plain = {key: value for key, value in asdict(config).items() if value is not None}
        _write(folder / name, plain, "weights.safetensors", arrays_of(name))
    _write(folder / "gpt2_hf", GPT2_HF, "model.safetensors", _gpt2_hf(arrays_of("gpt2")))
    _write(folder / "gemma3_hf", GEMMA3_HF, "model.safetensors", _gemma3_hf(arrays_of("gemma3")))
    _write(folder / "llama3_hf", LLAMA3_HF, "model.safetensors", _llama3_hf(arrays_of("llama3")))


def _write(folder: Path, config: dict[str, Any], file: str, arrays: dict[str, Array]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    safetensors_file.save(folder / file, arrays, {"format": "pt"})


GPT2_HF = {
    "model_type": "gpt2", "n_layer": 2, "n_head": 5, "n_embd": D, "n_inner": F, "n_positions": N_CTX, "vocab_size": V,
    "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new",
}  # fmt: skip
GEMMA3_HF = {
    "model_type": "gemma3_text", "num_hidden_layers": 3, "hidden_size": D, "head_dim": 6, "intermediate_size": F,
    "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": V, "max_position_embeddings": N_CTX,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 5,
    "query_pre_attn_scalar": 10, "rms_norm_eps": 1e-6, "hidden_activation": "gelu_pytorch_tanh",
    "rope_theta": 1000.0, "rope_local_base_freq": 10.0,
}  # fmt: skip
LLAMA3_HF = {
    "model_type": "llama", "num_hidden_layers": 2, "hidden_size": D, "head_dim": 8, "intermediate_size": F,
    "num_attention_heads": 6, "num_key_value_heads": 3, "vocab_size": V, "max_position_embeddings": N_CTX,
    "rms_norm_eps": 1e-5, "rope_theta": 50.0, "rope_scaling": LLAMA3_ROPE, "tie_word_embeddings": False,
}  # fmt: skip


def _gpt2_hf(arrays: dict[str, Array]) -> dict[str, Array]:
    """GPT-2's own names: matrices [inputs, outputs], the rows of q, k and v in one."""
    out = {"transformer.wte.weight": arrays["embed"], "transformer.wpe.weight": arrays["pos_embed"]}
    out |= {"transformer.ln_f.weight": arrays["final_norm"], "transformer.ln_f.bias": arrays["final_norm_bias"]}
    for i in range(2):
        w = {part: arrays[f"blocks.{i}.{part}"] for part in block_shapes(CONFIGS["gpt2"])}
        fused = {"weight": np.concatenate([w["wq"], w["wk"], w["wv"]]).T, "bias": np.concatenate([w["bq"], w["bk"], w["bv"]])}
        parts = {
            "ln_1.weight": w["attn_norm"], "ln_1.bias": w["attn_norm_bias"],
            "attn.c_attn.weight": fused["weight"], "attn.c_attn.bias": fused["bias"],
            "attn.c_proj.weight": w["wo"].T, "attn.c_proj.bias": w["bo"],
            "ln_2.weight": w["mlp_norm"], "ln_2.bias": w["mlp_norm_bias"],
            "mlp.c_fc.weight": w["w_up"].T, "mlp.c_fc.bias": w["b_up"],
            "mlp.c_proj.weight": w["w_down"].T, "mlp.c_proj.bias": w["b_down"],
        }  # fmt: skip
        out |= {f"transformer.h.{i}.{name}": np.ascontiguousarray(array) for name, array in parts.items()}
    return out


def _gemma3_hf(arrays: dict[str, Array]) -> dict[str, Array]:
    """Norms less one: the loader adds it again, and a float32 sum then has the bits of the plain form."""
    return {
        _hf_name("gemma3_text", name): array - np.float32(1) if name.endswith("norm") else array
        for name, array in arrays.items()
    }


def _llama3_hf(arrays: dict[str, Array]) -> dict[str, Array]:
    """Rows of q and k so that RoPE turns halves: feature 2i of a head goes to i, 2i + 1 to i + hd/2."""
    order = [*range(0, 8, 2), *range(1, 8, 2)]
    out = {}
    for name, array in arrays.items():
        if name.endswith((".wq", ".wk")):
            array = array.reshape(-1, 8, D)[:, order].reshape(-1, D)
        out[_hf_name("llama", name)] = np.ascontiguousarray(array)
    return out


def _hf_name(family: str, name: str) -> str:
    names = FAMILIES[family].names
    layer, part = (name.split(".")[1:]) if name.startswith("blocks.") else ("", name)
    prefix = "" if part == "head" else "model."
    return prefix + names[part].format(layer)
