"""The same numbers by other names: those of nanokv's traces, of Hugging Face transformers, and of TransformerLens.

docs/names.md is made from this page: python -m nanokv.trace.names > docs/names.md
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Name:
    """One site. l is a layer, p a position, h a query head, g a key/value head; {} in a module's name is the layer."""

    site: str  # in a trace: layer{l}.pos{p}.SITE
    shape: str  # of one position
    output: str = ""  # in what a transformers model returns; batch first
    llama: str = ""  # the module whose "in"put or "out"put it is, in Llama, Mistral and Qwen
    gemma: str = ""  # the same in Gemma 3, where it is another
    gpt2: str = ""  # the same in GPT-2
    lens: str = ""  # TransformerLens: the name in its cache
    but: str = ""  # what is to be said of `output`
    plain: str = ""  # TransformerLens's name in models without RoPE (q, k), without a gate (up)


NAMES = (
    Name("resid_pre", "[D]", "hidden_states[l][0, p]", "layers.{} in", "", "h.{} in", "blocks.{l}.hook_resid_pre"),
    Name("ln1", "[D]", "", "layers.{}.input_layernorm out", "", "h.{}.ln_1 out", "blocks.{l}.ln1.hook_out"),
    Name("q", "[H, hd]", lens="blocks.{l}.attn.hook_rot_q", plain="without RoPE `hook_q`"),
    Name("k", "[G, hd]", "cache.layers[l].keys[0, :, p]", lens="blocks.{l}.attn.hook_rot_k",
         plain="without RoPE `hook_k`"),
    Name("v", "[G, hd]", "cache.layers[l].values[0, :, p]", lens="blocks.{l}.attn.hook_v"),
    Name("scores", "[H, S]", lens="blocks.{l}.attn.hook_attn_scores[0, :, p]"),
    Name("pattern", "[H, S]", "attentions[l][0, :, p]", lens="blocks.{l}.attn.hook_pattern[0, :, p]"),
    Name("z", "[H, hd]", "", "layers.{}.self_attn.o_proj in", "", "h.{}.attn.c_proj in", "blocks.{l}.attn.hook_z"),
    Name("attn_out", "[D]", "", "layers.{}.self_attn out", "layers.{}.post_attention_layernorm out", "h.{}.attn out",
         "blocks.{l}.hook_attn_out"),
    Name("resid_mid", "[D]", "", "layers.{}.post_attention_layernorm in", "layers.{}.pre_feedforward_layernorm in",
         "h.{}.ln_2 in", "blocks.{l}.hook_resid_mid"),
    Name("ln2", "[D]", "", "layers.{}.post_attention_layernorm out", "layers.{}.pre_feedforward_layernorm out",
         "h.{}.ln_2 out", "blocks.{l}.ln2.hook_out"),
    Name("gate", "[F]", "", "layers.{}.mlp.gate_proj out", "", "", "blocks.{l}.mlp.hook_pre"),
    Name("up", "[F]", "", "layers.{}.mlp.up_proj out", "", "h.{}.mlp.c_fc out",
         "blocks.{l}.mlp.hook_pre_linear", plain="without a gate `hook_pre`"),
    Name("act", "[F]", "", "layers.{}.mlp.down_proj in", "", "h.{}.mlp.c_proj in", "blocks.{l}.mlp.hook_post"),
    Name("mlp_out", "[D]", "", "layers.{}.mlp out", "layers.{}.post_feedforward_layernorm out", "h.{}.mlp out",
         "blocks.{l}.hook_mlp_out"),
    Name("resid_post", "[D]", "hidden_states[l + 1][0, p]", "layers.{} out", "", "h.{} out",
         "blocks.{l}.hook_resid_post", but=", but for the last layer"),
    Name("final_scale", "", lens="1 / ln_final.hook_scale"),
    Name("ln_final", "[D]", "hidden_states[L][0, p]", "norm out", "", "ln_f out", "ln_final.hook_out"),
    Name("logits", "[V]", "logits[0, p]", lens="unembed.hook_out"),
)  # fmt: skip

INTRODUCTION = """\
# The same numbers by other names

A number of a trace has an id: `layer1.pos5.attn_out[7]`. This table says where other programs have it. `l` is a layer, `p` a
position, L the number of layers; the other letters are those of the README. In the columns of modules, *in* is what a module
is given and *out* what it returns (the first of a tuple); names begin below `model.` (GPT-2: `transformer.`).

Mind these:

- **The last of `hidden_states` is after the final norm.** There are L + 1: the first is the embedding, the next what leaves
  each layer; but the last, `hidden_states[L]`, is not what leaves the last layer. That is `layer{L}.pos{p}` here, and in
  transformers what goes into the final norm.
- Keys are cached after RoPE, here as in transformers. TransformerLens's `hook_k` is before it, `hook_rot_k` after it.
- What the mask excludes has the score −∞ here, and −3.4e38 or so in transformers and TransformerLens; its weight is 0 in all.
- `attn_out` and `mlp_out` are as added to the stream: after the second norm, where a family (Gemma) has one.
- transformers before 5.24 calls the cache `past_key_values`; its type differs between versions.
- A cache that transformers makes for a model with sliding windows drops what leaves them. `DynamicCache()`, made without a
  config, keeps it, as nanokv does.
- TransformerLens's `hook_normalized` is before the norm's weights, `hook_out` after them. Before 4.0 it folded these weights
  into the next matrix, and centred others, unless loaded with `from_pretrained_no_processing`: then values differ.
- Its `hook_result`, what each head adds to the stream by itself, is not recorded here; it is `z` times the head's part of W_O.

The tests compare the columns of Hugging Face with what transformers 5.24 gave for tiny checkpoints of each family
(tests/checkpoints); those of modules, where torch and transformers are installed. The column of TransformerLens was compared
with its version 4.3.0 (TransformerBridge) on checkpoints of Llama, Qwen 3, Gemma 3 and GPT-2: all within 1e-5.

"""


def table() -> str:
    """The names as a table in Markdown."""
    heads = ("nanokv", "shape", "transformers returns", "its module (Llama, Qwen)", "Gemma 3, if another", "GPT-2",
             "TransformerLens")  # fmt: skip
    rows = [heads, ("---",) * len(heads)]
    for name in NAMES:
        after = name.site in ("final_scale", "ln_final", "logits")
        site = f"pos{{p}}.{name.site}" if after else "layer{l}.pos{p}" + f".{name.site}" * (name.site != "resid_pre")
        modules = [_module(text) for text in (name.llama, name.gemma, name.gpt2)]
        lens = _code(name.lens) + (f", {name.plain}" if name.plain else "")
        rows.append((_code(site), name.shape, _code(name.output) + name.but, *modules, lens))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _module(text: str) -> str:
    module, _, way = text.partition(" ")
    return f"{_code(module.replace('{}', '{l}'))} {way}".strip()


if __name__ == "__main__":
    print(INTRODUCTION + table(), end="")
