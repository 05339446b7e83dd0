"""What tells one family of models from another in its files: names of arrays, names of settings, what these leave unsaid.

Data only, but for Settings, through which the loader asks for a setting by name and gets it checked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nanokv.errors import ConfigError

MAX_WHOLE = 1 << 53  # no setting is above it; a float64 holds each whole number up to here


class Settings:
    """Settings by name, each checked for its type. What is absent is as `unsaid` has it; null is None."""

    def __init__(
        self, values: dict[str, Any], spelling: dict[str, str] | None = None, unsaid: dict[str, Any] | None = None
    ) -> None:
        self.values, self.spelling, self.unsaid = values, spelling or {}, unsaid or {}

    def get(self, key: str, kinds: tuple[type, ...], what: str) -> Any:
        """The value, or None. ConfigError unless its type is one of kinds."""
        name = self.spelling.get(key, key)
        value = self.values.get(name, self.unsaid.get(key))
        if value is not None and (type(value) not in kinds or (type(value) is int and abs(value) > MAX_WHOLE)):
            raise ConfigError(f"{name} is {str(value)[:80]!r}; expected {what}")
        return value

    def need(self, key: str, kinds: tuple[type, ...], what: str, otherwise: Any = None) -> Any:
        value = self.get(key, kinds, what)
        value = otherwise if value is None else value
        if value is None:
            raise ConfigError(f"there is no {self.spelling.get(key, key)}; expected {what}")
        return value

    def whole(self, key: str, otherwise: int | None = None) -> int:
        value: int = self.need(key, (int,), "a whole number", otherwise)
        return value

    def number(self, key: str, otherwise: float | None = None) -> float:
        return float(self.need(key, (int, float), "a number", otherwise))

    def flag(self, key: str) -> bool:
        value: bool = self.need(key, (bool,), "true or false")
        return value

    def refuse(self, refused: Mapping[str, tuple[Any, ...]]) -> None:
        """ConfigError for a setting that asks for what nanokv does not implement."""
        for key, harmless in refused.items():
            value = self.values.get(key)
            if not any(value is none or (type(value) in (bool, int, float) and value == none) for none in harmless):
                raise ConfigError(f"{key} is {str(value)[:80]!r}, which nanokv does not implement")


def not_every(period: int, layer: int) -> bool:
    """Whether the layer slides, where every period-th does not (0: all slide)."""
    if period < 0:
        raise ConfigError(f"sliding_window_pattern is {period}; it must not be negative")
    return period == 0 or (layer + 1) % period != 0


# What the files call nanokv's arrays. {} is the layer; ^T: stored [inputs, outputs], so transposed here; [q], [k], [v]:
# the rows for the queries, keys or values of a matrix that holds all three.

LLAMA_NAMES = {
    "embed": "embed_tokens.weight",
    "final_norm": "norm.weight",
    "head": "lm_head.weight",
    "attn_norm": "layers.{}.input_layernorm.weight",
    "wq": "layers.{}.self_attn.q_proj.weight",
    "wk": "layers.{}.self_attn.k_proj.weight",
    "wv": "layers.{}.self_attn.v_proj.weight",
    "wo": "layers.{}.self_attn.o_proj.weight",
    "bq": "layers.{}.self_attn.q_proj.bias",
    "bk": "layers.{}.self_attn.k_proj.bias",
    "bv": "layers.{}.self_attn.v_proj.bias",
    "bo": "layers.{}.self_attn.o_proj.bias",
    "q_norm": "layers.{}.self_attn.q_norm.weight",
    "k_norm": "layers.{}.self_attn.k_norm.weight",
    "mlp_norm": "layers.{}.post_attention_layernorm.weight",
    "w_gate": "layers.{}.mlp.gate_proj.weight",
    "w_up": "layers.{}.mlp.up_proj.weight",
    "w_down": "layers.{}.mlp.down_proj.weight",
    "b_gate": "layers.{}.mlp.gate_proj.bias",
    "b_up": "layers.{}.mlp.up_proj.bias",
    "b_down": "layers.{}.mlp.down_proj.bias",
}
GEMMA3_NAMES = LLAMA_NAMES | {
    "post_attn_norm": "layers.{}.post_attention_layernorm.weight",
    "mlp_norm": "layers.{}.pre_feedforward_layernorm.weight",
    "post_mlp_norm": "layers.{}.post_feedforward_layernorm.weight",
}
GPT2_NAMES = {
    "embed": "wte.weight",
    "pos_embed": "wpe.weight",
    "final_norm": "ln_f.weight",
    "final_norm_bias": "ln_f.bias",
    "head": "lm_head.weight",
    "attn_norm": "h.{}.ln_1.weight",
    "attn_norm_bias": "h.{}.ln_1.bias",
    "wq": "h.{}.attn.c_attn.weight^T[q]",
    "wk": "h.{}.attn.c_attn.weight^T[k]",
    "wv": "h.{}.attn.c_attn.weight^T[v]",
    "bq": "h.{}.attn.c_attn.bias[q]",
    "bk": "h.{}.attn.c_attn.bias[k]",
    "bv": "h.{}.attn.c_attn.bias[v]",
    "wo": "h.{}.attn.c_proj.weight^T",
    "bo": "h.{}.attn.c_proj.bias",
    "mlp_norm": "h.{}.ln_2.weight",
    "mlp_norm_bias": "h.{}.ln_2.bias",
    "w_up": "h.{}.mlp.c_fc.weight^T",
    "b_up": "h.{}.mlp.c_fc.bias",
    "w_down": "h.{}.mlp.c_proj.weight^T",
    "b_down": "h.{}.mlp.c_proj.bias",
}
GGUF_NAMES = {
    "embed": "token_embd.weight",
    "pos_embed": "position_embd.weight",
    "final_norm": "output_norm.weight",
    "final_norm_bias": "output_norm.bias",
    "head": "output.weight",
    "attn_norm": "blk.{}.attn_norm.weight",
    "attn_norm_bias": "blk.{}.attn_norm.bias",
    "wq": "blk.{}.attn_q.weight",
    "wk": "blk.{}.attn_k.weight",
    "wv": "blk.{}.attn_v.weight",
    "wo": "blk.{}.attn_output.weight",
    "bq": "blk.{}.attn_q.bias",
    "bk": "blk.{}.attn_k.bias",
    "bv": "blk.{}.attn_v.bias",
    "bo": "blk.{}.attn_output.bias",
    "q_norm": "blk.{}.attn_q_norm.weight",
    "k_norm": "blk.{}.attn_k_norm.weight",
    "post_attn_norm": "blk.{}.post_attention_norm.weight",
    "mlp_norm": "blk.{}.ffn_norm.weight",
    "mlp_norm_bias": "blk.{}.ffn_norm.bias",
    "w_gate": "blk.{}.ffn_gate.weight",
    "w_up": "blk.{}.ffn_up.weight",
    "w_down": "blk.{}.ffn_down.weight",
    "b_gate": "blk.{}.ffn_gate.bias",
    "b_up": "blk.{}.ffn_up.bias",
    "b_down": "blk.{}.ffn_down.bias",
    "post_mlp_norm": "blk.{}.post_ffw_norm.weight",
}
GPT2_GGUF_NAMES = GGUF_NAMES | {
    "wq": "blk.{}.attn_qkv.weight[q]",
    "wk": "blk.{}.attn_qkv.weight[k]",
    "wv": "blk.{}.attn_qkv.weight[v]",
    "bq": "blk.{}.attn_qkv.bias[q]",
    "bk": "blk.{}.attn_qkv.bias[k]",
    "bv": "blk.{}.attn_qkv.bias[v]",
}
GGUF_IGNORED = ("rope_freqs.weight", ".attn_rot_embd.weight")  # read as divisors; a table of angles


@dataclass(frozen=True)
class Family:
    """How a Hugging Face folder of one family keeps its arrays and settings."""

    names: dict[str, str]
    fields: dict[str, Any]  # fields of Config that the family decides
    unsaid: dict[str, Any]  # settings that config.json may leave out
    prefix: str = "model."  # of the arrays' names; some files leave it out
    spelling: dict[str, str] = field(default_factory=dict)  # settings that it calls by another name
    ignored: tuple[str, ...] = (".rotary_emb.inv_freq",)  # ends of names of arrays that hold nothing learnt
    norms_less_one: bool = False  # a norm multiplies by 1 + w
    slides: Callable[[int, Settings], bool] | None = None  # whether a layer slides, where layer_types does not say so
    local_rope: bool = False  # sliding layers have a RoPE of their own


_LLAMA_UNSAID = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_local_base_freq": 10000.0,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
_QWEN_UNSAID = _LLAMA_UNSAID | {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "use_sliding_window": False,
}

FAMILIES = {
    "llama": Family(LLAMA_NAMES, {}, _LLAMA_UNSAID),
    "mistral": Family(
        LLAMA_NAMES,
        {"qkv_bias": False, "out_bias": False, "mlp_bias": False},
        _LLAMA_UNSAID | {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
        slides=lambda layer, settings: True,
    ),
    "qwen2": Family(
        LLAMA_NAMES,
        {"qkv_bias": True, "out_bias": False, "mlp_bias": False},
        _QWEN_UNSAID,
        slides=lambda layer, settings: layer >= settings.whole("max_window_layers"),
    ),
    "qwen3": Family(
        LLAMA_NAMES,
        {"qk_norm": True, "mlp_bias": False},
        _QWEN_UNSAID | {"head_dim": 128},
        slides=lambda layer, settings: layer >= settings.whole("max_window_layers"),
    ),
    "gemma3_text": Family(
        GEMMA3_NAMES,
        {"qk_norm": True, "post_norms": True, "mlp_bias": False},
        _LLAMA_UNSAID
        | {
            "hidden_act": "gelu_pytorch_tanh",
            "rope_theta": 1000000.0,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": True,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
        },
        spelling={"hidden_act": "hidden_activation"},
        norms_less_one=True,
        slides=lambda layer, settings: not_every(settings.whole("sliding_window_pattern"), layer),
        local_rope=True,
    ),
    "gpt2": Family(
        GPT2_NAMES,
        {
            "norm": "layer",
            "rope": None,
            "learned_positions": True,
            "gated_mlp": False,
            "qkv_bias": True,
            "out_bias": True,
            "mlp_bias": True,
        },
        _LLAMA_UNSAID | {"hidden_act": "gelu_new", "rms_norm_eps": 1e-5, "tie_word_embeddings": True},
        prefix="transformer.",
        spelling={
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "hidden_size": "n_embd",
            "intermediate_size": "n_inner",
            "max_position_embeddings": "n_positions",
            "hidden_act": "activation_function",
            "rms_norm_eps": "layer_norm_epsilon",
        },
        ignored=(".attn.bias", ".attn.masked_bias"),  # the causal mask
    ),
}

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}

# Settings that change what a model computes, in ways that nanokv does not implement -> the values that change nothing.
REFUSED: dict[str, tuple[Any, ...]] = {
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "use_bidirectional_attention": (None, False),
    "partial_rotary_factor": (None, 1),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "quantization_config": (None,),
    "scale_attn_weights": (None, True),
    "scale_attn_by_inverse_layer_idx": (None, False),
    "add_cross_attention": (None, False),
    "is_encoder_decoder": (None, False),
}
GGUF_REFUSED: dict[str, tuple[Any, ...]] = {
    "expert_count": (None, 0),
    "attn_logit_softcapping": (None, 0),
    "final_logit_softcapping": (None, 0),
    "logit_scale": (None, 0, 1),
    "residual_scale": (None, 0, 1),
    "embedding_scale": (None, 0, 1),
    "attention.causal": (None, True),
    "attention.clamp_kqv": (None, 0),
    "attention.max_alibi_bias": (None, 0),
    "rope.dimension_sections": (None,),
    "use_parallel_residual": (None, False),
}

# By general.architecture: the fields of Config that it decides. In llama files the rows of the query and key matrices
# are permuted, so that the two that RoPE turns together are neighbours; in the other families' files they are not.
GGUF_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_pairs": "neighbours"},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "gpt2": {**FAMILIES["gpt2"].fields, "activation": "gelu_tanh"},
    "gemma3": {"qk_norm": True, "post_norms": True, "activation": "gelu_tanh"},  # its norms have the 1 added already
}
GGUF_UNSAID = {"attention.sliding_window_pattern": 6, "rope.freq_base": 10000.0, "rope.freq_base_swa": 10000.0}
GEMMA3_27B_LAYERS = 62  # a gemma3 file does not say what scales its scores; this size alone does not take hd
