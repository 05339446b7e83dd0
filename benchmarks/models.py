"""The same weights in the forms that the peers read, made once from one file and kept.

    file     the model as it was given: a GGUF file, or a Hugging Face folder
    F32      GGUF: every tensor of the file dequantised
    Q8_0     GGUF: the matrices of F32 quantised to Q8_0, so its weights are not quite those of the others
    folder   a Hugging Face folder in float32; q and k rows brought from GGUF's order, in which RoPE turns neighbouring
             features, to that of transformers, which turns feature i with i + hd/2
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.plan import TEXT

MADE = 1  # to be changed when what is made changes


@dataclass(frozen=True)
class Model:
    """The model in all the forms that it can be had in."""

    name: str
    kind: str  # of most of the file's matrices; "" if it is no GGUF file
    n_weights: int
    tokens: list[int]  # ids of the text, for as many positions as were asked for
    paths: dict[str, Path]  # of each form
    n_bytes: dict[str, int]  # of all weights, for float32 and for each kind of block


def model(name: str, n_tokens: int, folder: Path, say: Callable[[str], None]) -> Model:
    """Find a model, and make in the folder what is missing of its forms."""
    from nanokv.load import find, read_folder, read_gguf

    path = find(name)
    config, weights, tokenizer = read_folder(path) if path.is_dir() else read_gguf(path)
    ids = tokenizer.encode(TEXT).tolist() if tokenizer is not None else list(range(config.vocab_size))
    tokens = (ids * -(-n_tokens // len(ids)))[:n_tokens]
    arrays = {id(array): array for _, array in weights.items()}.values()  # a tied head counts once
    n_weights = sum(int(np.prod(array.shape)) for array in arrays)
    if path.is_dir():
        return Model(path.name, "", n_weights, tokens, {"file": path, "folder": path}, {"float32": 4 * n_weights})
    kinds = Counter(str(getattr(array, "kind", "F32")) for array in arrays if len(array.shape) == 2)
    made = folder / hashlib.sha256(f"{MADE} ".encode() + path.read_bytes()).hexdigest()[:16]
    paths = {"file": path, "F32": made / "F32.gguf", "Q8_0": made / "Q8_0.gguf", "folder": made / "folder"}
    _make(paths, config, dict(weights.items()), say)
    kind = kinds.most_common(1)[0][0]
    n_bytes = {"float32": 4 * n_weights, "Q8_0": _tensor_bytes(paths["Q8_0"]), kind: _tensor_bytes(path)}
    shown = path.name if path.exists() and name.endswith(".gguf") else name
    return Model(shown, kind, n_weights, tokens, paths, n_bytes)


def _make(paths: Mapping[str, Path], config: Any, weights: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Each form that is not there yet, under another name until it is whole."""
    makers: dict[str, Callable[[Path], None]] = {
        "F32": lambda to: write_gguf(paths["file"], to, "F32"),
        "Q8_0": lambda to: write_gguf(paths["file"], to, "Q8_0"),
        "folder": lambda to: write_folder(to, config, weights),
    }
    for form, make in makers.items():
        if not paths[form].exists():
            say(f"making the weights in the form {form}")
            paths[form].parent.mkdir(parents=True, exist_ok=True)
            part = paths[form].with_name(f"{os.getpid()}.part")
            make(part)
            os.replace(part, paths[form])


def write_gguf(source: Path, target: Path, kind: str) -> None:
    """A copy of a GGUF file with its tensors as F32, or its matrices as Q8_0."""
    import gguf
    from gguf.quants import dequantize, quantize

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if field.name not in ("general.architecture", "general.file_type") and not field.name.startswith("GGUF."):
            of_elements = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=of_elements)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0 if kind == "Q8_0" else gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        if kind == "Q8_0" and values.ndim == 2 and values.shape[1] % 32 == 0:
            q8_0 = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(tensor.name, quantize(values, q8_0), raw_dtype=q8_0)
        else:
            writer.add_tensor(tensor.name, np.ascontiguousarray(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_folder(folder: Path, config: Any, weights: Mapping[str, Any]) -> None:
    """A Hugging Face folder of a Llama model, from nanokv's config and arrays."""
    from safetensors.numpy import save_file

    from nanokv.families import LLAMA_NAMES

    arrays = {}
    for name, array in weights.items():
        if name == "head" and config.tied_head:
            continue
        *block, short = name.split(".")
        values = np.asarray(array, np.float32)
        if config.rope_pairs == "neighbours" and short in ("wq", "wk"):
            values = halves(values, config.head_dim)
        stored = LLAMA_NAMES[short].format(block[1] if block else "")
        arrays[stored if name == "head" else f"model.{stored}"] = np.ascontiguousarray(values)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    save_file(arrays, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_settings(config), indent=1))


def halves(w: np.ndarray, head_dim: int) -> np.ndarray:  # [N*hd, D] -> [N*hd, D]
    """The rows of every head, first those at even places, then those at odd ones: neighbours become halves."""
    heads = w.reshape(-1, head_dim // 2, 2, w.shape[1])
    return heads.transpose(0, 2, 1, 3).reshape(w.shape)


def _settings(config: Any) -> dict[str, Any]:
    """config.json, in the words of transformers 4 and 5."""
    rope = {"rope_type": "default", "rope_theta": config.rope.base}
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32", "torch_dtype": "float32",
        "num_hidden_layers": config.n_layers, "hidden_size": config.d_model, "intermediate_size": config.d_ff,
        "num_attention_heads": config.n_heads, "num_key_value_heads": config.n_kv_heads, "head_dim": config.head_dim,
        "vocab_size": config.vocab_size, "max_position_embeddings": config.n_ctx, "hidden_act": config.activation,
        "rms_norm_eps": config.norm_eps, "rope_theta": config.rope.base, "rope_parameters": rope,
        "tie_word_embeddings": config.tied_head, "attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias,
    }  # fmt: skip


def _tensor_bytes(path: Path) -> int:
    """Bytes of all tensors of a GGUF file."""
    from nanokv.gguf_file import open_gguf

    return sum(len(tensor.raw) for tensor in open_gguf(path).tensors.values())
