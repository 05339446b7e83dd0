"""The ports in examples/ports: they pass the conformance suite, and read, compute and record as nanokv does, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import nanokv
from nanokv.errors import ConfigError, ModelNotFoundError
from nanokv.load import find
from nanokv.trace import Recorder, Trace

ROOT = Path(__file__).parents[1]
SUITE, C = ROOT / "tests" / "conformance", ROOT / "examples" / "ports" / "c"
COMPILERS = [name for name in ("gcc", "clang") if shutil.which(name)]
PLAIN = ("llama", "llama3", "qwen2", "qwen3", "gpt2", "gemma3")


@pytest.fixture(scope="module", params=["gcc", "clang"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the C port's programs, made by a compiler without a warning."""
    if request.param not in COMPILERS or not shutil.which("make"):
        pytest.skip(f"no {request.param} or no make")
    folder = tmp_path_factory.mktemp(request.param)
    targets = [f"{folder}/{name}" for name in ("nanokv", "adapter", "adapter-checked")]
    done = subprocess.run(
        ["make", "-s", "-C", str(C), f"CC={request.param}", f"BUILD={folder}", *targets], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return folder


def suite(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SUITE / "run.py", "--program", program, *arguments], capture_output=True, text=True)


def run(program: Path, *arguments: str | Path | int) -> list[str]:
    done = subprocess.run([str(program), *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def logits_of(program: Path, model: str | Path, tokens: Sequence[int]) -> np.ndarray:
    """The last position's logits, whose bits the port prints."""
    return np.array([int(word, 16) for word in run(program, model, "-n", 0, *tokens)], np.uint32).view(np.float32)


def smollm2() -> Path:
    try:
        return find("smollm2-135m")
    except ModelNotFoundError as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize("profile", ["close", "exact"])
@pytest.mark.parametrize("program", ["adapter", "adapter-checked"])
def test_the_c_port_passes_the_suite(built: Path, program: str, profile: str) -> None:
    done = suite(str(built / program), "--profile", profile, "--skipped")
    assert done.returncode == 0, done.stdout + done.stderr
    skipped = {line.split()[1].rstrip(":") for line in done.stdout.splitlines() if line.startswith("SKIP")}
    assert skipped == {
        "run/smollm2", "run/cut", "attention/cut", "attention/cuts_unordered", "attention/all_cut",
        *(["attention/cut_infinity"] if profile == "exact" else []),
        *(f"dequantise/{kind}" for kind in ("Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")),
        *(name for name in skipped if name.startswith(("encode/", "decode/"))),
    }  # fmt: skip
    assert "level 4            4 pass" in done.stdout


def test_on_smollm2_the_c_port_has_the_bits_of_nanokv(built: Path) -> None:
    path = smollm2()
    done = suite(str(built / "adapter"), "--profile", "exact", "--id", "run/smollm2", "--smollm2", str(path))
    assert done.returncode == 0 and "1 pass" in done.stdout, done.stdout
    model = nanokv.load("smollm2-135m")
    tokens = model.tokenizer.encode("When Mary and John went to the store, John gave a drink to").tolist()
    theirs = logits_of(built / "nanokv", path, tokens)
    assert np.array_equal(theirs.view(np.uint32), model.forward(tokens)[-1].view(np.uint32))


@pytest.mark.parametrize("options", [(), ("-t", "0.9", "-k", "12", "-p", "0.8", "-s", "5")])
def test_the_c_port_generates_what_nanokv_generates(built: Path, options: tuple[str, ...]) -> None:
    folder, prompt = ROOT / "tests" / "checkpoints" / "llama", [7, 3, 17, 1, 14]
    model = nanokv.load(folder)
    sampling = {"temperature": 0.9, "top_k": 12, "top_p": 0.8, "seed": 5} if options else {}
    ours = list(nanokv.generate(model, prompt, max_new_tokens=12, stop=(), **sampling))
    assert run(built / "nanokv", folder, "-n", 12, *options, *prompt) == [str(token) for token in ours]


@pytest.mark.parametrize("family", ["gemma3", "gpt2", "llama", "llama_bias", "qwen2", "qwen3"])
def test_the_c_port_reads_what_hugging_face_publishes(built: Path, family: str) -> None:
    folder, tokens = ROOT / "tests" / "checkpoints" / family, [3, 1, 4, 1, 5, 9, 2, 6]
    ours = nanokv.load(folder).forward(tokens)[-1]
    assert np.array_equal(logits_of(built / "nanokv", folder, tokens).view(np.uint32), ours.view(np.uint32))


def write_gguf(path: Path, **settings: float) -> None:
    """A small Llama in the forms that SmolLM2's file has: Q4_1, Q8_0 and F32; settings by name, __ for a point."""
    import gguf

    random, file = np.random.default_rng(0), gguf.GGUFWriter(path, "llama")
    for name, value in (("block_count", 2), ("head_count", 6), ("head_count_kv", 2), ("embedding_length", 96),
                        ("feed_forward_length", 64), ("context_length", 40), ("vocab_size", 50)):  # fmt: skip
        getattr(file, f"add_{name}")(value)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_rope_freq_base(5000.0)
    for name, value in settings.items():
        file.add_float32(f"llama.{name.replace('__', '.')}", value)
    kinds = gguf.GGMLQuantizationType

    def add(name: str, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> None:
        array = (random.standard_normal(shape) * 0.3 + (len(shape) == 1)).astype(np.float32)
        file.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)

    add("token_embd.weight", (50, 96), kinds.Q8_0)
    add("output_norm.weight", (96,), kinds.F32)
    for layer in range(2):
        for name, shape in (("attn_q", (96, 96)), ("attn_k", (32, 96)), ("attn_v", (32, 96)), ("attn_output", (96, 96)),
                            ("ffn_gate", (64, 96)), ("ffn_up", (64, 96)), ("ffn_down", (96, 64))):  # fmt: skip
            add(f"blk.{layer}.{name}.weight", shape, kinds.Q4_1)
        for name in ("attn_norm", "ffn_norm"):
            add(f"blk.{layer}.{name}.weight", (96,), kinds.F32)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def test_the_c_port_reads_gguf(built: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path / "small.gguf")
    tokens = [3, 1, 4, 1, 5, 9, 2, 6]
    ours = nanokv.load(tmp_path / "small.gguf").forward(tokens)[-1]
    assert np.array_equal(logits_of(built / "nanokv", tmp_path / "small.gguf", tokens).view(np.uint32), ours.view(np.uint32))


@pytest.mark.parametrize("level", ["writes", "weights", "vectors", "states"])
def test_nanokv_accepts_the_trace_of_the_c_port(built: Path, tmp_path: Path, level: str) -> None:
    folder, prompt, theirs = ROOT / "tests" / "checkpoints" / "gemma3", [7, 3, 17, 1, 14, 2], tmp_path / "theirs.nkv"
    made = run(built / "nanokv", folder, "-n", 3, "-o", theirs, "-l", level, *prompt)
    model, cache = nanokv.load(folder), None
    with Recorder(tmp_path / "ours.nkv", level=level) as recorder:
        cache = model.new_cache()
        model.forward(prompt, cache, observer=recorder)
        assert [str(token) for token in nanokv.generate(model, cache=cache, max_new_tokens=3, observer=recorder)] == made
    assert Trace.load(theirs).check() == []
    checked = nanokv_command("check", theirs)
    assert checked.returncode == 0 and "0 broken" in checked.stdout
    compared = nanokv_command("diff", theirs, tmp_path / "ours.nkv")
    assert compared.returncode == 0, compared.stdout
    if level == "states":
        flow = Trace.load(theirs).flow(model, measure="norm", at=5)
        flow.prune(share=0.9).render(tmp_path / "flow.dot")
        assert (tmp_path / "flow.dot").read_text().startswith("digraph")


def nanokv_command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nanokv.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_what_the_c_port_cannot_do_it_refuses(built: Path, tmp_path: Path) -> None:
    folder = ROOT / "tests" / "checkpoints" / "llama"
    for arguments, said in (
        ((tmp_path, 1), "FileFormatError"),
        ((folder, 99), "TokenError"),
        ((folder, *[1] * 33), "ContextFullError"),
        ((folder, "-t", "-1", 1), "NanokvError"),
        ((folder, "-o", tmp_path, 1), "TraceError"),
    ):
        done = subprocess.run([str(built / "nanokv"), *map(str, arguments)], capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.startswith(said), (arguments, done.stderr)


def test_damaged_files_do_not_crash_the_c_port(built: Path, tmp_path: Path) -> None:
    """Bits flipped and ends cut off, read by the program that stops at the first wrong step in memory."""
    write_gguf(tmp_path / "small.gguf")
    whole = {"gguf": (tmp_path / "small.gguf").read_bytes()[:3000]}
    whole["safetensors"] = (SUITE / "models" / "qwen2" / "weights.safetensors").read_bytes()[:6000]
    random, lines = np.random.default_rng(0), []
    for number in range(400):
        kind = ("gguf", "safetensors")[number % 2]
        data = bytearray(whole[kind])
        for at in random.integers(0, 2500, 3):
            data[at] ^= 1 << int(random.integers(0, 8))
        data = data[: int(random.integers(1, len(data)))] if number % 3 == 0 else data
        inputs = {"kind": kind, "data": data.hex()}
        lines.append(json.dumps({"id": str(number), "op": "open_file", "inputs": inputs, "want": ["names"]}) + "\n")
    done = subprocess.run([built / "adapter-checked"], input="".join(lines), capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("\n") == len(lines), done.stderr[-2000:]


@pytest.fixture(scope="module")
def rust(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Rust port's adapter, made without a warning and without a network."""
    if not shutil.which("cargo"):
        pytest.skip("no cargo")
    target = tmp_path_factory.mktemp("rust")
    command = ["cargo", "build", "--quiet", "--release", "--offline", "--locked", "--target-dir", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "examples" / "ports" / "rust")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return target / "release" / "adapter"


@pytest.mark.parametrize("profile", ["close", "exact"])
def test_the_rust_port_passes_levels_0_to_3_sampling_and_refusals(rust: Path, profile: str) -> None:
    done = suite(str(rust), "--profile", profile, "--skipped")
    assert done.returncode == 0, done.stdout + done.stderr
    skipped = {line.split()[1].rstrip(":") for line in done.stdout.splitlines() if line.startswith("SKIP")}
    assert {name for name in skipped if not name.startswith(("trace/", "encode/", "decode/"))} == {"run/smollm2"}


@pytest.mark.parametrize("settings", [{}, {"rope__scaling__factor": 4.0}, {"attention__scale": 0.5}])
def test_the_rust_port_reads_gguf(rust: Path, tmp_path: Path, settings: dict[str, float]) -> None:
    write_gguf(tmp_path / "small.gguf", **settings)
    tokens = [3, 1, 4, 1, 5, 9, 2, 6]
    ours = nanokv.load(tmp_path / "small.gguf").forward(tokens)
    asked = {"id": "a", "op": "run", "inputs": {"model": str(tmp_path / "small.gguf"), "calls": [tokens]}}
    line = json.dumps(asked | {"want": ["step0.logits"]}) + "\n"
    done = subprocess.run([rust], input=line, capture_output=True, text=True)
    bits = np.frombuffer(bytes.fromhex(json.loads(done.stdout)["outputs"]["step0.logits"]), ">u4")
    assert np.array_equal(bits, ours.view(np.uint32).reshape(-1))


def test_the_rust_port_passes_on_smollm2(rust: Path) -> None:
    done = suite(str(rust), "--profile", "exact", "--id", "run/smollm2", "--smollm2", str(smollm2()))
    assert done.returncode == 0 and "1 pass" in done.stdout, done.stdout + done.stderr


# C4 of the specification: what would change the numbers.
REFUSED: tuple[dict[str, object], ...] = (
    {"final_logit_softcapping": 30.0},
    {"partial_rotary_factor": 0.5},
    {"num_experts": 4},
    {"quantization_config": {"bits": 4}},
    {"use_bidirectional_attention": True},
    {"scale_attn_weights": False},
    {"hidden_act": "other"},
    {"model_type": "other"},
    {"rope_scaling": {"rope_type": "other", "factor": 2.0}},
)


def errors_of(adapter: Path, folder: Path) -> list[str]:
    """What a port, and nanokv, say to a model with each of those settings."""
    shutil.copytree(SUITE / "models" / "llama3_hf", folder)
    config = json.loads((folder / "config.json").read_text())
    asked = {"id": "a", "op": "run", "inputs": {"model": str(folder), "calls": [[1]]}, "want": ["step0.logits"]}
    said = []
    for change in REFUSED:
        (folder / "config.json").write_text(json.dumps(config | change))
        done = subprocess.run([adapter], input=json.dumps(asked) + "\n", capture_output=True, text=True)
        said.append(json.loads(done.stdout).get("error", ""))
        with pytest.raises(ConfigError):
            nanokv.load(folder)
    return said


def test_a_setting_that_would_change_the_numbers_is_refused_by_the_rust_port(rust: Path, tmp_path: Path) -> None:
    assert errors_of(rust, tmp_path / "model") == ["ConfigError"] * len(REFUSED)


def test_a_setting_that_would_change_the_numbers_is_refused_by_the_c_port(built: Path, tmp_path: Path) -> None:
    assert errors_of(built / "adapter", tmp_path / "model") == ["ConfigError"] * len(REFUSED)


@pytest.mark.parametrize("profile", ["close", "exact"])
def test_the_javascript_port_passes_levels_0_to_3(profile: str) -> None:
    if not shutil.which("node"):
        pytest.skip("no node")
    done = suite(f"node {ROOT}/examples/ports/js/adapter.mjs", "--profile", profile, "--skipped")
    assert done.returncode == 0, done.stdout + done.stderr
    skipped = {line.split()[1].rstrip(":") for line in done.stdout.splitlines() if line.startswith("SKIP")}
    core = {
        name for name in skipped if name.startswith(("kv_head", "reads", "rope", "linear", "rms", "layer_norm", "block", "run"))
    }
    assert core == {"run/smollm2", "run/cut", "run/gpt2_hf", "run/gemma3_hf", "run/llama3_hf"}
