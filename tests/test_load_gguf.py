"""GGUF files: every architecture, every kind of block, and what is refused. The files are written by the gguf package.

A file of each family is made of its checkpoint in tests/checkpoints, whose logits transformers computed.
"""

from __future__ import annotations

import json
import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, MODEL_ARCH, GGMLQuantizationType
from gguf.quants import dequantize
from safetensors.numpy import load_file

import nanokv
from nanokv import gguf_file
from nanokv.config import Rope
from nanokv.errors import ConfigError, FileFormatError, ModelNotFoundError, NanokvError, WeightsError
from nanokv.gguf_file import FileTensor, open_gguf
from nanokv.load import find, read_folder, read_gguf

CHECKPOINTS = Path(__file__).parent / "checkpoints"
ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,
    "llama3": MODEL_ARCH.LLAMA,
    "llama_bias": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
    "gpt2": MODEL_ARCH.GPT2,
    "gemma3": MODEL_ARCH.GEMMA3,
    "gemma3_scaled": MODEL_ARCH.GEMMA3,
}
Change = Callable[[dict[str, Any], dict[str, np.ndarray]], object]


def permuted(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """Rows of queries or keys in the order of a llama GGUF file: the two features of a pair side by side."""
    return rows.reshape(n_heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def gguf_tensors(name: str, config: dict[str, Any]) -> dict[str, np.ndarray]:
    """The checkpoint's tensors as llama.cpp's converter would write them, by the gguf package's own table of names."""
    names = gguf.get_tensor_name_map(ARCHITECTURES[name], 9)
    stored: dict[str, np.ndarray] = {}
    for path in CHECKPOINTS.glob(f"{name}/model*.safetensors"):
        stored |= load_file(path)
    tensors = {}
    for key, tensor in stored.items():
        if ".q_proj." in key and name.startswith("llama"):
            tensor = permuted(tensor, config["num_attention_heads"])
        if ".k_proj." in key and name.startswith("llama"):
            tensor = permuted(tensor, config["num_key_value_heads"])
        if key.endswith("norm.weight") and name.startswith("gemma3"):
            tensor = tensor + 1
        if key.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
            tensor = tensor.T
        tensors[names.get_name(key, try_suffixes=(".weight", ".bias"))] = np.ascontiguousarray(tensor)
    if name == "llama3":
        divisors = read_folder(CHECKPOINTS / name)[0].rope.divisors  # type: ignore[union-attr]
        tensors["rope_freqs.weight"] = np.array(divisors, np.float32)
    return tensors


def gguf_pairs(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint's settings under GGUF's names."""
    pairs = {
        "block_count": config.get("num_hidden_layers") or config["n_layer"],
        "context_length": config.get("max_position_embeddings") or config["n_positions"],
        "embedding_length": config.get("hidden_size") or config["n_embd"],
        "feed_forward_length": config.get("intermediate_size") or config["n_inner"],
        "attention.head_count": config.get("num_attention_heads") or config["n_head"],
    }
    if name == "gpt2":
        return pairs | {"attention.layer_norm_epsilon": config["layer_norm_epsilon"]}
    rope = config["rope_parameters"].get("full_attention", config["rope_parameters"])
    pairs |= {
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": rope["rope_theta"],
    }
    if name.startswith("llama"):
        pairs |= {"rope.dimension_count": config["head_dim"], "vocab_size": config["vocab_size"]}
    if name.startswith("gemma3"):
        pairs |= {
            "attention.sliding_window": config["sliding_window"],
            "attention.sliding_window_pattern": [kind == "sliding_attention" for kind in config["layer_types"]],
            "attention.scale": config["query_pre_attn_scalar"] ** -0.5,
            "rope.freq_base_swa": config["rope_parameters"]["sliding_attention"]["rope_theta"],
        }
        if rope["rope_type"] == "linear":
            pairs |= {"rope.scaling.type": "linear", "rope.scaling.factor": rope["factor"]}
    return pairs


def write_gguf(path: Path, arch: str, pairs: dict[str, Any], tensors: dict[str, Any]) -> Path:
    """Write a file with the gguf package. A pair without a dot before its name is one of the architecture's."""
    writer = gguf.GGUFWriter(path, arch)
    adders = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in pairs.items():
        if value is not None:
            adders[type(value)](key if key.startswith(("tokenizer.", "split.", "general.")) else f"{arch}.{key}", value)
    for name, tensor in tensors.items():
        data, kind = tensor if isinstance(tensor, tuple) else (tensor, None)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def converted(tmp_path: Path, name: str, change: Change = lambda pairs, tensors: None) -> Path:
    """A checkpoint as a GGUF file, after a change."""
    config = json.loads((CHECKPOINTS / name / "config.json").read_text())
    pairs, tensors = gguf_pairs(name, config), gguf_tensors(name, config)
    change(pairs, tensors)
    return write_gguf(tmp_path / f"{name}.gguf", gguf.MODEL_ARCH_NAMES[ARCHITECTURES[name]], pairs, tensors)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_file_computes_what_its_checkpoint_does(tmp_path: Path, name: str) -> None:
    model = nanokv.load(converted(tmp_path, name), ops="numpy")
    expected = load_file(CHECKPOINTS / name / "expected.safetensors")
    for tokens, logits in (("tokens", "logits"), ("tokens_long", "logits_long")):
        assert np.abs(model.forward(expected[tokens]) - expected[logits]).max() < 1e-4
    assert model.name == name
    assert model.tokenizer is None


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_file_says_the_same_as_its_checkpoint(tmp_path: Path, name: str) -> None:
    config, weights, _ = read_gguf(converted(tmp_path, name))
    expected, of_folder, _ = read_folder(CHECKPOINTS / name)
    for key, value in vars(config).items():
        if key in ("norm_eps", "attn_scale"):  # float32 in the file
            assert value == pytest.approx(getattr(expected, key), rel=1e-6)
        elif key == "rope" and name == "llama3":
            assert value.divisors == pytest.approx(expected.rope.divisors, rel=1e-6)  # type: ignore[union-attr]
        elif key == "rope_pairs":
            assert value == ("neighbours" if name.startswith("llama") else "halves")
        else:
            assert value == getattr(expected, key), key
    for (array, value), (_, other) in zip(weights.items(), of_folder.items(), strict=True):
        if not (name.startswith("llama") and array.endswith((".wq", ".wk", ".bq", ".bk"))):
            assert np.array_equal(np.asarray(value), np.asarray(other)), array


def test_a_gemma_file_that_says_little_is_read_as_llama_cpp_reads_it(tmp_path: Path) -> None:
    left_out = ("attention.scale", "attention.sliding_window_pattern", "rope.freq_base_swa")
    config = read_gguf(converted(tmp_path, "gemma3", lambda pairs, _: [pairs.pop(key) for key in left_out]))[0]
    assert (config.attn_scale, config.sliding, config.rope_local) == (4**-0.5, (True,) * 4, Rope(10000.0))
    config = read_gguf(converted(tmp_path, "gemma3", lambda pairs, _: pairs.update({left_out[1]: 2})))[0]
    assert config.sliding == (True, False, True, False)
    config = read_gguf(converted(tmp_path, "gemma3", lambda pairs, _: pairs.pop("attention.sliding_window")))[0]
    assert (config.window, config.sliding, config.rope_local) == (None, (False,) * 4, None)


def test_a_head_of_its_own_is_used_where_there_is_one(tmp_path: Path) -> None:
    head = np.ones((37, 20), np.float32)
    config, weights, _ = read_gguf(
        converted(tmp_path, "gpt2", lambda _, tensors: tensors.update({"output.weight": head}))
    )
    assert not config.tied_head
    assert np.array_equal(np.asarray(weights.head), head)


KINDS = [kind for kind in GGML_QUANT_SIZES if gguf_file.can_read(kind.name)]


def test_every_kind_that_the_gguf_package_dequantises_can_be_read() -> None:
    for kind, (_, n_bytes) in GGML_QUANT_SIZES.items():
        try:
            dequantize(np.zeros((1, 8 * n_bytes), np.uint8), kind)
        except NotImplementedError:
            assert kind not in KINDS or kind.name == "F64"
        else:
            assert kind in KINDS
    assert len(KINDS) >= 25


@pytest.mark.parametrize("kind", KINDS, ids=[kind.name for kind in KINDS])
def test_a_matrix_of_this_kind_is_what_the_gguf_package_makes_of_it(
    tmp_path: Path, kind: GGMLQuantizationType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_file, "SLICE", 600)  # several slices, the last one shorter
    per_block, block_bytes = GGML_QUANT_SIZES[kind]
    blocks = 2 if per_block > 1 else 96
    raw = np.random.default_rng(0).integers(0, 256, (5, blocks * block_bytes)).astype(np.uint8)
    path = write_gguf(tmp_path / "a.gguf", "llama", {}, {"first": np.zeros(3, np.float32), "w": (raw, kind)})
    tensor = open_gguf(path).tensors["w"]
    assert (tensor.shape, tensor.kind) == ((5, blocks * per_block), kind.name)
    assert np.array_equal(tensor.raw, raw.ravel())
    assert not tensor.raw.flags.writeable
    with np.errstate(all="ignore"):
        whole = raw.view(np.float64).astype(np.float32) if kind.name == "F64" else dequantize(raw, kind)
        found, part = np.asarray(tensor), np.asarray(tensor.rows(1, 4))
    assert found.dtype == np.float32
    assert np.array_equal(found, whole, equal_nan=True)
    assert np.array_equal(part, whole[1:4], equal_nan=True)


def random_tensors(name: str, width: int, mlp: int) -> dict[str, np.ndarray]:
    """A one-layer model of this width in the names of a checkpoint's GGUF file, with random weights."""
    config = json.loads((CHECKPOINTS / name / "config.json").read_text())
    like = {key: t.shape for key, t in gguf_tensors(name, config).items() if ".1." not in key and ".2." not in key}
    old, old_mlp = like["output_norm.weight"][0], like["blk.0.ffn_up.weight"][0]
    sizes = {old: width, 3 * old: 3 * width, old_mlp: mlp, 37: 37, 32: 32, 8: width // 2}
    random = np.random.default_rng(0)
    return {key: random.standard_normal([sizes[n] for n in shape]).astype(np.float32) for key, shape in like.items()}


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_a_quantised_model_computes_what_its_dequantised_weights_do(tmp_path: Path, name: str) -> None:
    q8, tensors = GGMLQuantizationType.Q8_0, random_tensors(name, 64, 96)
    pairs = {"block_count": 1, "context_length": 32, "embedding_length": 64, "feed_forward_length": 96}
    pairs |= {"attention.head_count": 4, "attention.head_count_kv": 2 if name == "qwen2" else 4}
    pairs |= {"attention.layer_norm_epsilon" if name == "gpt2" else "attention.layer_norm_rms_epsilon": 1e-5}
    packed = {key: (gguf.quants.quantize(t, q8), q8) if t.ndim == 2 else t for key, t in tensors.items()}
    plain = {key: dequantize(t[0], q8) if isinstance(t, tuple) else t for key, t in packed.items()}
    models = []
    for file, chosen in (("packed.gguf", packed), ("plain.gguf", plain)):
        models.append(nanokv.load(write_gguf(tmp_path / file, name, pairs, chosen), ops="numpy"))
    ids = np.arange(9)
    assert np.array_equal(models[0].forward(ids), models[1].forward(ids))


def test_an_array_may_be_asked_for_in_another_type_or_without_a_copy(tmp_path: Path) -> None:
    raw = gguf.quants.quantize(np.eye(32, dtype=np.float32), GGMLQuantizationType.Q8_0)
    tensors = {"q": (raw, GGMLQuantizationType.Q8_0), "f": np.eye(4, dtype=np.float32)}
    found = open_gguf(write_gguf(tmp_path / "a.gguf", "llama", {}, tensors)).tensors
    assert np.asarray(found["q"], np.float64).dtype == np.float64
    assert np.array(found["f"]).flags.writeable
    assert np.shares_memory(np.asarray(found["f"]), found["f"].raw)
    with pytest.raises(ValueError, match="copy"):
        np.array(found["q"], copy=False)
    with pytest.raises(FileFormatError, match="I32"):
        np.asarray(FileTensor("x", (1,), "I32", np.zeros(4, np.uint8)))


def test_pairs_of_every_type_are_read(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "none")
    for add, key, value in (
        (writer.add_uint8, "u8", 2**8 - 1), (writer.add_int8, "i8", -(2**7)), (writer.add_uint16, "u16", 2**16 - 1),
        (writer.add_int16, "i16", -(2**15)), (writer.add_uint32, "u32", 2**32 - 1), (writer.add_int32, "i32", -(2**31)),
        (writer.add_uint64, "u64", 2**64 - 1), (writer.add_int64, "i64", -(2**63)), (writer.add_float32, "f32", 0.5),
        (writer.add_float64, "f64", 0.1), (writer.add_bool, "yes", True), (writer.add_string, "text", "é\0"),
        (writer.add_array, "texts", ["a", "", "日"]), (writer.add_array, "numbers", [1, -2]),
        (writer.add_array, "truths", [True, False]),
    ):  # fmt: skip
        add(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    pairs = open_gguf(tmp_path / "a.gguf").pairs
    assert [pairs[key] for key in ("u8", "i8", "u16", "i16", "u32", "i32", "u64", "i64")] == [
        255, -128, 65535, -32768, 2**32 - 1, -(2**31), 2**64 - 1, -(2**63)
    ]  # fmt: skip
    assert (pairs["f32"], pairs["f64"], pairs["yes"], pairs["text"]) == (0.5, 0.1, True, "é\0")
    assert pairs["texts"] == ["a", "", "日"]
    assert [list(pairs["numbers"]), list(pairs["truths"])] == [[1, -2], [True, False]]  # type: ignore[arg-type]


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"expert_count": 8}, "expert_count"),
    ("llama", {"attention.sliding_window": 16}, "sliding_window"),
    ("llama", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, "yarn"),
    ("llama", {"rope.dimension_count": 2}, "rope.dimension_count"),
    ("llama", {"attention.value_length": 8}, "attention.value_length"),
    ("llama", {"attention.causal": False}, "attention.causal"),
    ("llama", {"split.count": 3}, "one of 3 parts"),
    ("llama", {"attention.head_count": [6, 6, 6]}, "attention.head_count"),
    ("llama", {"attention.head_count_kv": 4}, "multiple"),
    ("llama", {"block_count": 4}, r"blk\.3\..* is missing"),
    ("llama", {"block_count": 2}, r"blk\.2\..*no place"),
    ("llama", {"block_count": 2**31}, "promised"),
    ("llama", {"attention.key_length": 2**31}, "promised"),
    ("llama", {"vocab_size": 36}, r"token_embd\.weight has shape \[37, 24\].*\[36, 24\]"),
    ("llama", {"feed_forward_length": None}, "there is no feed_forward_length"),
    ("llama", {"tokenizer.ggml.tokens": [str(i) for i in range(38)]}, "38 tokens for a vocabulary of 37"),
    ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    ("gemma3", {"attention.sliding_window_pattern": [True]}, "1 entries for 4 layers"),
    ("gemma3", {"attention.sliding_window_pattern": "all"}, "sliding_window_pattern"),
    ("gpt2", {"context_length": 64}, "position_embd"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "settings", "message"), REFUSED, ids=[str(settings)[:60] for _, settings, _ in REFUSED]
)
def test_what_nanokv_does_not_implement_is_refused_by_name(
    tmp_path: Path, name: str, settings: dict[str, Any], message: str
) -> None:
    path = converted(tmp_path, name, lambda pairs, _: pairs.update(settings))
    with pytest.raises((ConfigError, WeightsError), match=message) as error:
        read_gguf(path)
    assert str(path) in str(error.value)


def test_an_architecture_that_nanokv_lacks_is_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", "mamba", {}, {"w": np.zeros(3, np.float32)})
    with pytest.raises(ConfigError, match=r"'mamba'.*llama, qwen2, qwen3, gpt2, gemma3"):
        read_gguf(path)


def test_a_tensor_that_is_missing_or_extra_or_misshapen_or_of_whole_numbers_is_named(tmp_path: Path) -> None:
    changes: dict[str, Change] = {
        r"blk\.1\.ffn_up\.weight \[26, 24\] is missing": lambda _, tensors: tensors.pop("blk.1.ffn_up.weight"),
        r"blk\.0\.attn_q\.scale has no place": lambda _, t: t.update({"blk.0.attn_q.scale": np.ones(1, np.float32)}),
        r"output_norm\.weight has shape \[7\]": lambda _, t: t.update({"output_norm.weight": np.ones(7, np.float32)}),
        r"output_norm\.weight is of the kind I32": lambda _, t: t.update({"output_norm.weight": np.ones(24, np.int32)}),
    }  # fmt: skip
    for message, change in changes.items():
        with pytest.raises(WeightsError, match=message):
            read_gguf(converted(tmp_path, "llama", change))


def test_a_file_that_is_not_there_or_no_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty.gguf").touch()
    for path in (tmp_path, tmp_path / "none.gguf", tmp_path / "empty.gguf", Path("/dev/zero"), Path("a\0b")):
        with pytest.raises((ModelNotFoundError, FileFormatError)):
            open_gguf(path)


@pytest.fixture(scope="module")
def smollm2() -> Path:
    try:
        return find("smollm2-135m")
    except NanokvError as error:
        pytest.skip(str(error))


def test_smollm2_has_the_sizes_that_its_makers_published(smollm2: Path) -> None:
    config, weights, tokenizer = read_gguf(smollm2)
    assert (config.n_layers, config.n_heads, config.n_kv_heads, config.head_dim) == (30, 9, 3, 64)
    assert (config.d_model, config.d_ff, config.vocab_size, config.n_ctx) == (576, 1536, 49152, 8192)
    assert (config.rope, config.rope_pairs, config.tied_head) == (Rope(100000.0), "neighbours", True)
    assert math.isclose(config.norm_eps, 1e-5, rel_tol=1e-6)
    kinds = [value.kind for _, value in weights.items() if isinstance(value, FileTensor)]
    assert (kinds.count("Q4_1"), kinds.count("Q8_0")) == (210, 2)  # the embedding is the head, too
    assert tokenizer is not None
    assert tokenizer.vocab_size == config.vocab_size


def test_smollm2_is_read_without_its_matrices(smollm2: Path) -> None:
    tracemalloc.start()
    try:
        kept = read_gguf(smollm2)
        assert (
            tracemalloc.get_traced_memory()[1] < 60e6
        )  # its vocabulary and merges, as Python strings; the file has 98e6
    finally:
        tracemalloc.stop()
    assert kept[0].n_layers == 30
