"""Makes the tiny random checkpoints in this folder, and what Hugging Face transformers computes from them.

Each checkpoint is a folder as transformers writes it, with random float32 weights, and with `expected.safetensors`, the
numbers that another implementation has to match. Sizes are awkward and no norm weight or bias is trivial, so that code
which mixes up two axes or leaves something out gives other numbers; `wrong_variants.py` checks that it does.

To make them again (the weights come from NumPy's generator, seeded by their own names, so they are the same anywhere;
expected values may differ in the last bits on another processor):

    pip install -e .[reference]
    python tests/checkpoints/make_checkpoints.py

Run by transformers 4, the same program instead writes the configuration as that version spells it (`config.v4.json` by
4.57, `config.v4_51.json` by 4.51), having checked that it reads its own spelling back and gets the expected logits.

What is in `expected.safetensors`, for a prompt of T tokens (L layers, H query heads, G key/value heads, hd head
dimension, D model width, V vocabulary; attention is eager, on a CPU):
    tokens           int32   [T]
    logits           float32 [T, V]
    logits_f64       float64 [T, V]       the same weights, every operation in float64
    hidden_states    float32 [L+1, T, D]  as transformers gives them: the embedding, then what leaves each layer, but
                                          THE LAST ONE IS AFTER THE FINAL NORM
    resid_post_last  float32 [T, D]       what leaves the last layer, before the final norm
    attentions       float32 [L, H, T, T] the weights; a masked position is exactly 0
    keys, values     float32 [L, T, G, hd]  the cache; keys after RoPE. Sliding-window layers keep all T here
    tokens_long      int32   [T_LONG]     a second, longer prompt of its own
    logits_long      float32 [T_LONG, V]
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

HERE = Path(__file__).resolve().parent
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
T, T_LONG, N_CTX, V = 13, 29, 32, 37


@dataclass(frozen=True)
class Checkpoint:
    """A folder to make: its name, the family and its settings in the words of transformers 5."""

    name: str
    model_type: str
    settings: dict[str, Any]
    max_shard_size: str = "1MB"

    @property
    def folder(self) -> Path:
        return HERE / self.name

    @property
    def stores_norms_minus_one(self) -> bool:
        """Whether a norm multiplies by 1 + w and not by w."""
        return self.model_type == "gemma3_text"


def rope(theta: float, kind: str = "default", **more: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": theta, **more}


def decoder(layers: int, width: int, head_dim: int, mlp_width: int, **more: Any) -> dict[str, Any]:
    """Settings with six query heads and two key/value heads: h // 3, h // 2 and h % 2 all differ."""
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "head_dim": head_dim,
        "intermediate_size": mlp_width,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": V,
        "max_position_embeddings": N_CTX,
        **more,
    }


# The bands end at wavelengths 24 / 3 = 8 and 24 / 1 = 24; the four wavelengths here are 6.3, 16.7, 44 and 118.
LLAMA3_ROPE = rope(
    50.0, "llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=3.0, original_max_position_embeddings=24
)

GPT2_SIZES = {"n_layer": 2, "n_head": 5, "n_embd": 20, "n_inner": 28, "n_positions": N_CTX, "vocab_size": V}


def gemma3(layer_types: str, theta: float, local_theta: float, **scaling: Any) -> dict[str, Any]:
    """Settings of a Gemma 3 text model whose layers are given as letters, s for sliding and f for full attention."""
    kinds = {"s": "sliding_attention", "f": "full_attention"}
    ropes = {"full_attention": rope(theta, **scaling), "sliding_attention": rope(local_theta)}
    return decoder(
        len(layer_types),
        width=12,
        head_dim=4,
        mlp_width=20,
        rope_parameters=ropes,
        layer_types=[kinds[letter] for letter in layer_types],
        sliding_window=5,
        query_pre_attn_scalar=10,
    )


CHECKPOINTS = [
    Checkpoint(
        "llama",
        "llama",
        decoder(3, 24, 4, 26, rope_parameters=rope(100000.0), rms_norm_eps=1e-5, tie_word_embeddings=True),
    ),
    Checkpoint(
        "llama3", "llama", decoder(3, 18, 8, 22, rope_parameters=LLAMA3_ROPE, rms_norm_eps=1e-5), max_shard_size="20KB"
    ),
    Checkpoint(
        "llama_bias", "llama", decoder(3, 12, 4, 20, rope_parameters=rope(10000.0), attention_bias=True, mlp_bias=True)
    ),
    Checkpoint("qwen2", "qwen2", decoder(2, 24, 4, 26, rope_parameters=rope(1000000.0))),
    Checkpoint("qwen3", "qwen3", decoder(3, 12, 8, 20, rope_parameters=rope(1000000.0), tie_word_embeddings=True)),
    Checkpoint("gpt2", "gpt2", {**GPT2_SIZES, "bos_token_id": 0, "eos_token_id": 0}),
    Checkpoint("gemma3", "gemma3_text", gemma3("ssfs", theta=1000.0, local_theta=20.0)),
    Checkpoint("gemma3_scaled", "gemma3_text", gemma3("sfsf", 1000.0, 20.0, kind="linear", factor=8.0)),
]


def generator(checkpoint: Checkpoint, name: str) -> np.random.Generator:
    """A generator seeded by the name of what it draws, so that no tensor depends on the order they are drawn in."""
    return np.random.default_rng(list(f"{checkpoint.name}/{name}".encode()))


def draw_tokens(checkpoint: Checkpoint, name: str, length: int) -> torch.Tensor:
    return torch.from_numpy(generator(checkpoint, name).integers(0, V, length))


def draw_parameter(checkpoint: Checkpoint, name: str, shape: torch.Size) -> torch.Tensor:
    """Random values on the scale that makes mistakes show, for the parameter of this name."""
    noise = generator(checkpoint, name).standard_normal(shape)
    if name.endswith(".bias"):
        values = 0.5 * noise
    elif noise.ndim == 1:
        # Only the norm weights of q and k can make attention sharp where the norm undoes the scale of the projections.
        centre, spread = (1.6, 0.5) if "q_norm" in name or "k_norm" in name else (1.0, 0.3)
        values = centre + spread * noise - checkpoint.stores_norms_minus_one
    elif "embed_tokens" in name or ".wte." in name or ".wpe." in name:
        values = 0.6 * noise
        values[::3] *= 0.002  # so small that the norms' epsilon matters
    else:
        gain = 2.0 if "lm_head" in name else 1.6 if any(s in name for s in ("q_proj", "k_proj", "c_attn")) else 1.0
        fan_in = shape[0] if checkpoint.model_type == "gpt2" else shape[1]  # GPT-2 stores its matrices transposed
        values = gain / np.sqrt(fan_in) * noise
    return torch.from_numpy(values.astype(np.float32))


def build(checkpoint: Checkpoint, settings: dict[str, Any] | None = None) -> PreTrainedModel:
    """The model with its random weights, ready to run."""
    config = AutoConfig.for_model(checkpoint.model_type, **(checkpoint.settings if settings is None else settings))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(draw_parameter(checkpoint, name, parameter.shape))
    return model


def logits_of(model: PreTrainedModel, tokens: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return model(tokens[None], use_cache=False).logits[0].numpy()


class EverythingInFloat64(TorchFunctionMode):
    """Turns each request for float32 into one for float64: transformers asks for it in norms, softmax and RoPE."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double

        def widen(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        return func(*map(widen, args), **{key: widen(value) for key, value in (kwargs or {}).items()})


@contextmanager
def float64() -> Iterator[None]:
    """Within it, models are built and run in float64 throughout, their RoPE tables included."""
    with EverythingInFloat64():
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def logits_in_float64(checkpoint: Checkpoint, tokens: torch.Tensor) -> np.ndarray:
    with float64():
        logits = logits_of(build(checkpoint), tokens)
    assert logits.dtype == np.float64
    return logits


def final_norm(model: PreTrainedModel) -> torch.nn.Module:
    return model.base_model.get_submodule("ln_f" if model.config.model_type == "gpt2" else "norm")


def run(model: PreTrainedModel, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """One pass over the prompt with everything looked at, shaped as `expected.safetensors` has it."""
    seen: list[torch.Tensor] = []
    hook = final_norm(model).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    cache = transformers.DynamicCache()  # given no config, it does not drop what leaves a sliding window
    with torch.no_grad():
        output = model(tokens[None], cache=cache, output_hidden_states=True, output_attentions=True)
    hook.remove()
    return {
        "logits": output.logits[0],
        "hidden_states": torch.cat(output.hidden_states),
        "resid_post_last": seen[0][0],
        "attentions": torch.cat(output.attentions),
        "keys": torch.cat([layer.keys for layer in cache.layers]).transpose(1, 2),
        "values": torch.cat([layer.values for layer in cache.layers]).transpose(1, 2),
    }


def expected(checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, np.ndarray]:
    tokens, tokens_long = draw_tokens(checkpoint, "tokens", T), draw_tokens(checkpoint, "tokens_long", T_LONG)
    arrays = {name: tensor.numpy() for name, tensor in run(model, tokens).items()}
    arrays["logits_f64"] = logits_in_float64(checkpoint, tokens)
    arrays["logits_long"] = logits_of(model, tokens_long)
    arrays["tokens"] = tokens.numpy().astype(np.int32)
    arrays["tokens_long"] = tokens_long.numpy().astype(np.int32)
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def check(arrays: dict[str, np.ndarray], model: PreTrainedModel) -> None:
    """That the arrays are what the docstring says and that the model is lively enough to show a mistake."""
    with torch.no_grad():
        after_norm = final_norm(model)(torch.from_numpy(arrays["resid_post_last"])).numpy()
    assert np.array_equal(after_norm, arrays["hidden_states"][-1])
    assert arrays["keys"].shape[:2] == (len(arrays["attentions"]), T)
    assert not np.triu(arrays["attentions"], 1).any()
    error = np.abs(arrays["logits"] - arrays["logits_f64"]).max()
    sharpest = arrays["attentions"][:, :, 4:].max(axis=(2, 3))
    assert error < 2e-5
    assert sharpest.min() > 0.4 and sharpest.max() > 0.6 and arrays["logits"].std() > 1
    print(f"  logits: standard deviation {arrays['logits'].std():.2f}, float32 - float64 at most {error:.1e}")
    print(f"  largest attention weight of a head from position 4 on: {sharpest.min():.2f} to {sharpest.max():.2f}")


def make(checkpoint: Checkpoint) -> None:
    """Writes the folder, with nothing left in it from before but the configurations of transformers 4."""
    for path in checkpoint.folder.glob("*"):
        if not path.name.startswith("config.v4"):
            path.unlink()
    model = build(checkpoint)
    arrays = expected(checkpoint, model)
    check(arrays, model)
    model.save_pretrained(checkpoint.folder, max_shard_size=checkpoint.max_shard_size)
    (checkpoint.folder / "generation_config.json").unlink(missing_ok=True)
    save_file(arrays, checkpoint.folder / "expected.safetensors")


def version4_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings in the words of the transformers 4 that runs."""
    settings = dict(settings)
    ropes = settings.pop("rope_parameters", None)
    if ropes and "full_attention" in ropes:
        settings["rope_local_base_freq"] = ropes["sliding_attention"]["rope_theta"]
        ropes = ropes["full_attention"]
    if ropes:
        scaling = {key: value for key, value in ropes.items() if key != "rope_theta"}
        settings["rope_theta"] = ropes["rope_theta"]
        settings["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
    if "layer_types" in settings and VERSION < (4, 53):
        settings["sliding_window_pattern"] = settings.pop("layer_types").index("full_attention") + 1
    return settings


def make_version4_config(checkpoint: Checkpoint) -> None:
    """Writes the configuration of transformers 4, having checked that it describes the model that 5 made."""
    arrays = load_file(checkpoint.folder / "expected.safetensors")
    with tempfile.TemporaryDirectory() as scratch:
        build(checkpoint, version4_settings(checkpoint.settings)).save_pretrained(scratch)
        model = AutoModelForCausalLM.from_pretrained(scratch, attn_implementation="eager").eval()
        for suffix in ("", "_long"):
            logits = logits_of(model, torch.from_numpy(arrays[f"tokens{suffix}"]).long())
            np.testing.assert_allclose(logits, arrays[f"logits{suffix}"], rtol=0, atol=2e-5)
        name = "config.v4.json" if VERSION == (4, 57) else f"config.v4_{VERSION[1]}.json"
        shutil.copyfile(Path(scratch, "config.json"), checkpoint.folder / name)


def main() -> None:
    torch.set_num_threads(1)
    for checkpoint in CHECKPOINTS:
        print(checkpoint.name)
        if VERSION >= (5, 0):
            make(checkpoint)
        else:
            make_version4_config(checkpoint)


if __name__ == "__main__":
    main()
