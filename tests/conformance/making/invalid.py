"""What must be refused, and as what."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
from making.cases import RUNS, case
from making.draws import whole
from making.models import CONFIGS, N_CTX, V

from nanokv.weights import block_shapes, model_shapes

Cases = list[dict[str, Any]]


def calls() -> Cases:
    """Calls that are refused in the midst of a run, which goes on as if they had not been made."""
    tokens = whole("tokens llama", 8, V)
    made = []
    for name, bad, kind, comment in (
        ("token_too_large", [3, V], "TokenError", "ids are 0 to V - 1"),
        ("token_negative", [3, -1], "TokenError", "-1 is not the last token"),
        ("no_token", [], "EmptyPromptError", ""),
        ("context_overflow", whole("too many", N_CTX - 4, V), "ContextFullError", "one position more than there is room for"),
    ):
        all_calls = [tokens[:5], bad, tokens[5:7]]
        names = ["errors", "length", "step0.logits", "step1.logits"]
        made.append(case(f"invalid/call_{name}", "run", {"model": "models/llama", "calls": all_calls},
                         comment or "a refused call is no step", tol=RUNS, want=names, kinds=["", kind, ""]))  # fmt: skip
    return made


def cache() -> Cases:
    """Uses of the cache: [positions of the call, [what, layer, first slot, slots], ...] for each call."""
    both = [["write", 0, 0, 3], ["read", 0, 0, 3], ["write", 1, 0, 3], ["read", 1, 0, 3]]
    made = [case("invalid/cache_control", "cache", {"n_layers": 2, "n_ctx": 8, "actions": [[3, *both]]},
                 "nothing is wrong here")]  # fmt: skip
    for name, actions, kind, comment in (
        ("read_before_write", [[3, ["read", 0, 0, 3]]], "UnwrittenSlotError", "nothing was written"),
        ("read_past_what_is_written", [[3, ["write", 0, 0, 2], ["read", 0, 0, 3]]], "UnwrittenSlotError", ""),
        ("read_other_layer", [[3, ["write", 0, 0, 3], ["read", 1, 0, 3]]], "UnwrittenSlotError", "each layer has its own"),
        ("write_twice", [[3, *both], [1, ["write", 0, 2, 1], ["write", 1, 2, 1]]], "CacheError", "an entry never changes"),
        ("write_with_a_gap", [[3, *both], [1, ["write", 0, 4, 1], ["write", 1, 4, 1]]], "CacheError", "slot 3 stays empty"),
        ("commit_unwritten_layer", [[3, ["write", 0, 0, 3]]], "CacheError", "layer 1 has nothing"),
        ("write_past_the_end", [[9, ["write", 0, 0, 9]]], "ContextFullError", ""),
    ):
        made.append(case(f"invalid/cache_{name}", "cache", {"n_layers": 2, "n_ctx": 8, "actions": actions}, comment,
                         error=kind))  # fmt: skip
    return made


def configs() -> Cases:
    good: dict[str, Any] = {
        "n_layers": 2, "n_heads": 6, "n_kv_heads": 2, "head_dim": 4, "d_model": 20, "d_ff": 22, "vocab_size": 37, "n_ctx": 32,
        "rope": {"base": 10000.0},
    }  # fmt: skip
    made = [case("invalid/config_control", "check_config", {"config": good}, "nothing is wrong here")]
    for name, change, comment in (
        ("heads_do_not_divide", {"n_kv_heads": 4}, "6 query heads cannot share 4"),
        ("no_layers", {"n_layers": 0}, ""),
        ("negative_width", {"d_model": -20}, ""),
        ("fraction", {"n_heads": 6.5}, ""),
        ("odd_head_for_rope", {"head_dim": 5}, "RoPE turns pairs"),
        ("negative_eps", {"norm_eps": -1e-5}, ""),
        ("unknown_activation", {"activation": "swishy"}, ""),
        ("unknown_norm", {"norm": "batch"}, ""),
        ("rope_base_zero", {"rope": {"base": 0}}, ""),
        ("wrong_number_of_divisors", {"rope": {"base": 10000.0, "divisors": [1.0]}}, "one for each of the hd/2 pairs"),
        ("sliding_without_window", {"sliding": [True, False]}, ""),
        ("sliding_of_other_length", {"sliding": [True], "window": 4}, ""),
        ("window_zero", {"sliding": [True, False], "window": 0}, ""),
        ("unknown_field", {"n_experts": 8}, "what a port doesn't know it must not ignore"),
    ):
        made.append(case(f"invalid/config_{name}", "check_config", {"config": good | change}, comment, error="ConfigError"))
    for name, change, comment in (
        ("null_for_a_number", {"norm_eps": None}, ""),
        ("null_for_a_name", {"activation": None}, ""),
        ("null_for_a_size", {"head_dim": None}, ""),
        ("post_norms_of_layer", {"norm": "layer", "post_norms": True}, "post-norms are RMS norms"),
        ("post_norms_of_none", {"norm": "none", "post_norms": True}, "post-norms are RMS norms"),
    ):
        made.append(case(f"invalid/config_{name}", "check_config", {"config": good | change}, comment, error="ConfigError",
                         since="2.0.0"))  # fmt: skip
    missing = {key: value for key, value in good.items() if key != "vocab_size"}
    made.append(case("invalid/config_missing_field", "check_config", {"config": missing}, error="ConfigError"))
    return made


def weights() -> Cases:
    config = CONFIGS["llama"]
    plain = {"n_layers": 1, "n_heads": 6, "n_kv_heads": 2, "head_dim": 8, "d_model": 20, "d_ff": 22, "vocab_size": 37,
             "n_ctx": 32, "rope": {"base": 10000.0}}  # fmt: skip
    shapes = {name: list(shape) for name, shape in model_shapes(config).items() if name != "head"}
    shapes |= {f"blocks.0.{name}": list(shape) for name, shape in block_shapes(config).items()}
    made = [case("invalid/weights_control", "check_weights", {"config": plain, "shapes": shapes}, "nothing is wrong here")]
    for name, change, comment in (
        ("missing", {"blocks.0.wk": None}, ""),
        ("extra", {"blocks.0.bq": [48]}, "a bias that the config doesn't have"),
        ("extra_block", {"blocks.1.wq": [48, 20]}, ""),
        ("transposed", {"blocks.0.w_up": [20, 22]}, "[inputs, outputs]"),
        ("head_though_tied", {"head": [37, 20]}, ""),
        ("kv_of_all_heads", {"blocks.0.wv": [48, 20]}, "wk and wv have G heads, not H"),
    ):
        given = {key: value for key, value in (shapes | change).items() if value is not None}
        made.append(case(f"invalid/weights_{name}", "check_weights", {"config": plain, "shapes": given}, comment,
                         error="WeightsError"))  # fmt: skip
    return made


def safetensors(header: Any, body: bytes, length: int | None = None) -> str:
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    return (struct.pack("<Q", len(text) if length is None else length) + text + body).hex()


def files() -> Cases:
    """Files that are not what they claim to be, in hexadecimal."""
    a = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    data = bytes(range(24))
    good = safetensors({"a": a}, data)
    made = [case("invalid/file_control", "open_file", {"kind": "safetensors", "data": good}, "nothing is wrong here")]
    for name, bad, comment in (
        ("cut_short", good[:-2], ""),
        ("too_long", good + "00", "bytes that belong to no array"),
        ("header_too_long", safetensors({"a": a}, data, length=1 << 60), "a header of 2^60 bytes: allocate nothing for it"),
        ("no_header", "0800", ""),
        ("not_json", safetensors(b"{]", data), ""),
        ("shape_and_bytes_differ", safetensors({"a": a | {"shape": [2, 4]}}, data), ""),
        ("shape_lies", safetensors({"a": a | {"shape": [1 << 40, 1 << 40]}}, data), "the product overflows 64 bits"),
        ("outside", safetensors({"a": a | {"data_offsets": [8, 32]}}, data), ""),
        ("overlap", safetensors({"a": a, "b": a}, data), "two arrays in one place"),
        ("unknown_type", safetensors({"a": a | {"dtype": "F33"}}, data), ""),
        ("negative", safetensors({"a": a | {"shape": [-2, -3]}}, data), ""),
    ):
        made.append(case(f"invalid/file_{name}", "open_file", {"kind": "safetensors", "data": bad}, comment,
                         error="FileFormatError"))  # fmt: skip
    return made + gguf_files()


def gguf_files() -> Cases:
    def gguf(count: int = 1, dims: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0, magic: bytes = b"GGUF") -> str:
        head = magic + struct.pack("<IQQ", 3, count, 0) + struct.pack("<Q", 1) + b"a"
        head += struct.pack("<I", len(dims)) + struct.pack(f"<{len(dims)}Q", *dims) + struct.pack("<IQ", kind, offset)
        return (head + bytes(-len(head) % 32) + np.arange(4, dtype="<f4").tobytes()).hex()

    made = [case("invalid/gguf_control", "open_file", {"kind": "gguf", "data": gguf()}, "nothing is wrong here")]
    for name, bad, comment in (
        ("magic", gguf(magic=b"GGML"), ""),
        ("count", gguf(count=1 << 60), "2^60 tensors: allocate nothing for them"),
        ("dims", gguf(dims=(1 << 40, 1 << 40)), ""),
        ("offset", gguf(offset=1 << 62), ""),
        ("unaligned", gguf(offset=4), ""),
        ("cut_short", gguf()[:60], ""),
    ):
        made.append(case(f"invalid/gguf_{name}", "open_file", {"kind": "gguf", "data": bad}, comment,
                         error="FileFormatError"))  # fmt: skip
    return made


def sampling() -> Cases:
    made = []
    for name, options in (
        ("negative_temperature", {"temperature": -1.0}),
        ("top_k_zero", {"temperature": 1.0, "top_k": 0}),
        ("top_p_zero", {"temperature": 1.0, "top_p": 0.0}),
        ("top_p_above_one", {"temperature": 1.0, "top_p": 1.5}),
    ):
        inputs = {"model": "models/llama", "tokens": [1, 2], "max_new_tokens": 1, **options}
        made.append(case(f"invalid/sampling_{name}", "generate", inputs, error="NanokvError"))
    return made


FILES = {"calls": calls, "cache": cache, "configs": configs, "weights": weights, "files": files, "sampling": sampling}
