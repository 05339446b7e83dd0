"""Truncated, bit-flipped and lying files: each gives an error of nanokv's own, or loads; none crashes or takes memory.

A lie is a header that promises more than the file has: 2^60 elements, a string of 2^63 bytes, data outside of the file.
"""

from __future__ import annotations

import json
import random
import resource
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_load_gguf import gguf_pairs, gguf_tensors, write_gguf
from test_tokenizer import DISGUISES, write_tokenizer

from nanokv.errors import FileFormatError, NanokvError
from nanokv.gguf_file import open_gguf
from nanokv.load import read_folder, read_gguf
from nanokv.safetensors_file import open_folder, open_safetensors

CHECKPOINTS = Path(__file__).parent / "checkpoints"
MEMORY = 30e6  # bytes that loading a file of some ten thousand bytes may take; imports take most of it
Read = Callable[[Path], object]


def read_all_gguf(path: Path) -> None:
    """Load everything, to the last number and token."""
    _, weights, tokenizer = read_gguf(path)
    weights.map(np.asarray)
    if tokenizer is not None:
        tokenizer.pieces(tokenizer.encode("ab <s> 日"))


def read_all_of_folder(folder: Path) -> None:
    _, weights, tokenizer = read_folder(folder)
    weights.map(np.asarray)
    if tokenizer is not None:
        tokenizer.pieces(tokenizer.encode("ab <s> 日"))


def outcome(read: Read, path: Path) -> str:
    """What reading gives: "loaded", or the kind of nanokv's error. Any other exception and much memory are failures."""
    tracemalloc.start()
    try:
        read(path)
        return "loaded"
    except NanokvError as error:
        assert len(str(error)) < 1500
        return type(error).__name__
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MEMORY


@pytest.fixture(scope="module")
def whole_gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small model with a tokenizer, as a GGUF file."""
    config = json.loads((CHECKPOINTS / "llama3" / "config.json").read_text())
    tokens = [*DISGUISES[:32], "!!", "<s>"]
    pairs = gguf_pairs("llama3", config) | {
        "general.alignment": 32,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 33 + [3],
        "tokenizer.ggml.merges": ["! !"],
        "tokenizer.ggml.bos_token_id": 33,
        "tokenizer.chat_template": "{{ messages }}",
    }
    path = write_gguf(tmp_path_factory.mktemp("whole") / "a.gguf", "llama", pairs, gguf_tensors("llama3", config))
    outcome(read_all_gguf, path)  # imports count no more
    return path.read_bytes()


def header_size(whole: bytes) -> int:
    return whole.rindex(b"rope_freqs.weight") + 50  # the last tensor


def test_the_whole_file_loads(whole_gguf: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(whole_gguf)
    with pytest.raises(NanokvError, match="can express"):  # its vocabulary has no "a"
        read_all_gguf(tmp_path / "a.gguf")
    assert read_gguf(tmp_path / "a.gguf")[2].encode("!!").tolist() == [33, 32]  # type: ignore[union-attr]


@pytest.mark.parametrize("seed", range(4))
def test_a_truncated_gguf_file_is_an_error(whole_gguf: bytes, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    lengths = [rng.randrange(len(whole_gguf) - 40) for _ in range(20)] + [
        rng.randrange(header_size(whole_gguf)) for _ in range(30)
    ]
    for length in lengths:
        (tmp_path / "a.gguf").write_bytes(whole_gguf[:length])
        assert outcome(read_all_gguf, tmp_path / "a.gguf") == "FileFormatError", length


@pytest.mark.parametrize("seed", range(8))
def test_a_gguf_file_with_a_flipped_bit_is_an_error_or_loads(whole_gguf: bytes, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    seen = set()
    for _ in range(60):
        damaged = bytearray(whole_gguf)
        for _ in range(rng.choice([1, 1, 1, 8])):
            damaged[rng.randrange(header_size(whole_gguf))] ^= 1 << rng.randrange(8)
        (tmp_path / "a.gguf").write_bytes(damaged)
        seen.add(outcome(read_all_gguf, tmp_path / "a.gguf"))
    assert "FileFormatError" in seen


@pytest.mark.parametrize("filler", [b"\0", b"\xff", b"\x7f", b"\x01", b"\x80"])
def test_a_gguf_file_with_a_stretch_of_one_byte_is_an_error_or_loads(
    whole_gguf: bytes, tmp_path: Path, filler: bytes
) -> None:
    for start in range(4, header_size(whole_gguf), 97):
        (tmp_path / "a.gguf").write_bytes(whole_gguf[:start] + filler * 8 + whole_gguf[start + 8 :])
        outcome(read_all_gguf, tmp_path / "a.gguf")


def string(text: bytes | str, length: int | None = None) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data) if length is None else length) + data


def pair(key: str, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def info(
    name: str = "w", dims: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0, n_dims: int | None = None
) -> bytes:
    n = len(dims) if n_dims is None else n_dims
    return string(name) + struct.pack("<I", n) + struct.pack(f"<{len(dims)}Q", *dims) + struct.pack("<IQ", kind, offset)


def gguf_bytes(
    pairs: list[bytes],
    infos: list[bytes],
    data: int = 64,
    version: int = 3,
    n_pairs: int | None = None,
    n_infos: int | None = None,
) -> bytes:
    """A GGUF file, whose counts may be lies."""
    counts = struct.pack("<QQ", len(infos) if n_infos is None else n_infos, len(pairs) if n_pairs is None else n_pairs)
    header = b"GGUF" + struct.pack("<I", version) + counts + b"".join(pairs) + b"".join(infos)
    return header + b"\0" * (-len(header) % 32) + b"\0" * data


def array(kind: int, count: int, values: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + values


def nested(depth: int) -> bytes:
    return array(9, 1) * depth + array(0, 1, b"\1")


LIES: dict[str, tuple[bytes, str]] = {
    "no GGUF file": (b"GGML" + bytes(60), "b'GGUF'"),
    "version 1": (gguf_bytes([], [], version=1), "version 1"),
    "version 4": (gguf_bytes([], [], version=4), "version 4"),
    "big endian": (gguf_bytes([], [], version=3 << 24), "big endian"),
    "2^60 pairs": (gguf_bytes([], [], n_pairs=2**60), "byte"),
    "2^64 - 1 tensors": (gguf_bytes([], [], n_infos=2**64 - 1), "byte"),
    "a key of 2^63 bytes": (gguf_bytes([string("k", 2**63) + bytes(99)], []), "longer"),
    "a key of 2^64 - 1 bytes": (gguf_bytes([string("k", 2**64 - 1) + bytes(99)], []), "longer"),
    "a key that is not UTF-8": (gguf_bytes([string(b"\xff\xfe") + struct.pack("<IB", 0, 1)], []), "UTF-8"),
    "a key twice": (gguf_bytes([pair("k", 0, b"\1")] * 2, []), "'k' a second time"),
    "a string of 2^63 bytes": (gguf_bytes([pair("k", 8, string("v", 2**63))], []), "longer"),
    "a string that is not UTF-8": (gguf_bytes([pair("k", 8, string(b"\x80"))], []), "UTF-8"),
    "a pair of type 13": (gguf_bytes([pair("k", 13, b"\1")], []), "type 13"),
    "a truth value of 2": (gguf_bytes([pair("k", 7, b"\2")], []), "truth value of 2"),
    "an array of 2^60 numbers": (gguf_bytes([pair("k", 9, array(6, 2**60))], []), "an array of 1152921504606846976"),
    "an array of 2^64 - 1 bytes": (gguf_bytes([pair("k", 9, array(0, 2**64 - 1))], []), "an array of"),
    "an array of 2^61 doubles": (gguf_bytes([pair("k", 9, array(12, 2**61))], []), "an array of"),
    "an array of 2^60 strings": (gguf_bytes([pair("k", 9, array(8, 2**60))], []), "an array of"),
    "an array of 2^60 truth values": (gguf_bytes([pair("k", 9, array(7, 2**60))], []), "an array of"),
    "an array of 2^60 arrays": (gguf_bytes([pair("k", 9, array(9, 2**60))], []), "an array of"),
    "an array of type 13": (gguf_bytes([pair("k", 9, array(13, 1, bytes(8)))], []), "type 13"),
    "an array with a truth value of 9": (gguf_bytes([pair("k", 9, array(7, 2, b"\1\x09"))], []), "truth value of 9"),
    "an array with a string too long": (
        gguf_bytes([pair("k", 9, array(8, 1, string("b", 2**40)))], []),
        "longer",
    ),
    "arrays nested 9 deep": (gguf_bytes([pair("k", 9, nested(9))], []), "nested"),
    "arrays nested 10000 deep": (gguf_bytes([pair("k", 9, nested(10000))], []), "nested"),
    "an alignment of 0": (gguf_bytes([pair("general.alignment", 4, bytes(4))], [info()]), "alignment 0"),
    "an alignment of 24": (gguf_bytes([pair("general.alignment", 4, b"\x18\0\0\0")], [info()]), "alignment 24"),
    "an alignment of 2^31": (gguf_bytes([pair("general.alignment", 4, b"\0\0\0\x80")], [info()]), "longer file"),
    "an alignment that is a text": (
        gguf_bytes([pair("general.alignment", 8, string("32"))], [info()]),
        "alignment '32'",
    ),
    "a tensor of 2^60 elements": (gguf_bytes([], [info(dims=(2**30, 2**30))]), "longer file"),
    "a tensor of 2^256 elements": (gguf_bytes([], [info(dims=(2**63,) * 4)]), "longer file"),
    "a tensor that overflows to nothing": (gguf_bytes([], [info(dims=(2**32, 2**32))]), "longer file"),
    "a tensor of no elements": (gguf_bytes([], [info(dims=(0, 2**60))]), "no dimension of 0"),
    "a tensor of 5 dimensions": (gguf_bytes([], [info(dims=(1,) * 5)]), "5 dimensions"),
    "a tensor of 2^32 - 1 dimensions": (gguf_bytes([], [info(n_dims=2**32 - 1)]), "4294967295 dimensions"),
    "a tensor of 0 dimensions": (gguf_bytes([], [info(dims=())]), "0 dimensions"),
    "a tensor of kind 4": (gguf_bytes([], [info(kind=4)]), "kind 4"),
    "a tensor of kind 2^32 - 1": (gguf_bytes([], [info(kind=2**32 - 1)]), "kind 4294967295"),
    "rows that are not whole blocks": (gguf_bytes([], [info(kind=2)]), "whole blocks of 32"),
    "a tensor twice": (gguf_bytes([], [info(), info(offset=32)]), "'w' a second time"),
    "data outside of the file": (gguf_bytes([], [info(offset=64)]), "longer file"),
    "data at 2^64 - 32": (gguf_bytes([], [info(offset=2**64 - 32)]), "longer file"),
    "data that is not aligned": (gguf_bytes([], [info(offset=8)]), "multiple of the alignment"),
    "data of two tensors in one place": (gguf_bytes([], [info(), info("v")]), "inside of another"),
    "data that overlaps": (gguf_bytes([], [info(dims=(9,)), info("v", offset=32)]), "inside of another"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_gguf_header_that_lies_is_an_error_that_says_what_is_wrong(tmp_path: Path, lie: str) -> None:
    data, message = LIES[lie]
    (tmp_path / "a.gguf").write_bytes(data)
    assert outcome(open_gguf, tmp_path / "a.gguf") == "FileFormatError"
    with pytest.raises(FileFormatError, match=message) as error:
        open_gguf(tmp_path / "a.gguf")
    assert str(tmp_path / "a.gguf") in str(error.value)


def test_a_gguf_file_by_hand_is_read(tmp_path: Path) -> None:
    pairs = [pair("k", 9, array(9, 2, array(0, 1, b"\7") + array(8, 1, string("x")))), pair("t", 7, b"\1")]
    for version in (2, 3):
        (tmp_path / "a.gguf").write_bytes(gguf_bytes(pairs, [info(), info("v", (2, 2), 0, 32)], version=version))
        file = open_gguf(tmp_path / "a.gguf")
        assert (file.pairs, list(file.tensors)) == ({"k": [np.array([7]), ["x"]], "t": True}, ["w", "v"])


@pytest.fixture(scope="module")
def whole_folder(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a small model in shards, with a tokenizer."""
    folder = tmp_path_factory.mktemp("whole")
    write_tokenizer(folder, "byte level")
    for path in CHECKPOINTS.glob("llama3/model*"):
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "config.json").write_bytes((CHECKPOINTS / "llama3" / "config.json").read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}}))
    read_all_of_folder(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_folder(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).write_bytes(data)


FILES = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors.index.json",
    "model-00001-of-00003.safetensors",
]


@pytest.mark.parametrize("file", FILES)
def test_a_folder_with_a_truncated_file_is_an_error(whole_folder: dict[str, bytes], tmp_path: Path, file: str) -> None:
    write_folder(tmp_path, whole_folder)
    rng, data = random.Random(0), whole_folder[file]
    for length in [0, 1, 8, 9, len(data) - 2, *(rng.randrange(min(len(data), 5000)) for _ in range(40))]:
        (tmp_path / file).write_bytes(data[:length])
        assert outcome(read_all_of_folder, tmp_path) in ("FileFormatError", "TokenizerError"), length


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("file", FILES)
def test_a_folder_with_flipped_bits_is_an_error_or_loads(
    whole_folder: dict[str, bytes], tmp_path: Path, file: str, seed: int
) -> None:
    write_folder(tmp_path, whole_folder)
    rng = random.Random(seed)
    for _ in range(50):
        damaged = bytearray(whole_folder[file])
        for _ in range(rng.choice([1, 1, 4])):
            damaged[rng.randrange(min(len(damaged), 3000))] ^= 1 << rng.randrange(8)
        (tmp_path / file).write_bytes(damaged)
        outcome(read_all_of_folder, tmp_path)


def safetensors_bytes(header: Any, data: int = 16, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(data)


def entry(shape: Any = (4,), offsets: Any = (0, 16), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


SAFETENSORS_LIES: dict[str, tuple[bytes, str]] = {
    "too short": (b"\2\0\0", "a header of 0 bytes"),
    "a header of 2^63 bytes": (safetensors_bytes({}, length=2**63), "9223372036854775808"),
    "a header longer than the file": (safetensors_bytes({}, length=19), "a header of 19 bytes"),
    "a header of 0 bytes": (safetensors_bytes({}, length=0), "a header of 0 bytes"),
    "a header that is a list": (safetensors_bytes([1]), "not an object"),
    "a header that is no JSON": (safetensors_bytes(b"{,}"), "JSON"),
    "a header that is not UTF-8": (safetensors_bytes(b'{"\xff": 1}'), "JSON"),
    "a header of 100000 brackets": (safetensors_bytes(b"[" * 100000), "JSON"),
    "a number of 5000 digits": (safetensors_bytes(b'{"a": ' + b"9" * 5000 + b"}"), "JSON|described by"),
    "a tensor twice": (safetensors_bytes(b'{"a": 1, "a": 2}'), "twice"),
    "metadata that is no text": (safetensors_bytes({"__metadata__": {"a": 1}}), "__metadata__"),
    "a tensor that is a number": (safetensors_bytes({"w": 1}), "described by 1"),
    "a tensor without a place": (safetensors_bytes({"w": {"dtype": "F32", "shape": [4]}}), "described by"),
    "an unknown type": (safetensors_bytes({"w": entry(dtype="F128")}), "F128"),
    "a type that is a list": (safetensors_bytes({"w": entry(dtype=["F32"])}), "type"),
    "2^60 elements": (safetensors_bytes({"w": entry([2**30, 2**30])}), "shape"),
    "a shape that overflows": (safetensors_bytes({"w": entry([2**62, 4])}), "shape"),
    "no elements, but 2^70 rows": (safetensors_bytes({"w": entry([2**70, 0], [0, 0])}, 0), "shape"),
    "a negative dimension": (safetensors_bytes({"w": entry([-1, -4])}), "whole numbers"),
    "a dimension that is a truth value": (safetensors_bytes({"w": entry([True, 4])}), "whole numbers"),
    "a dimension of 4.0": (safetensors_bytes({"w": entry([4.0])}), "whole numbers"),
    "a shape that is a text": (safetensors_bytes({"w": entry("4")}), "whole numbers"),
    "1000 dimensions": (safetensors_bytes({"w": entry([1] * 1000 + [4])}), "whole numbers"),
    "an end outside of the file": (safetensors_bytes({"w": entry([5], [0, 20])}), "inside of the file"),
    "a beginning after the end": (safetensors_bytes({"w": entry([4], [16, 0])}), "inside of the file"),
    "offsets of 2^64": (safetensors_bytes({"w": entry([4], [2**64, 2**64 + 16])}), "inside of the file"),
    "negative offsets": (safetensors_bytes({"w": entry([4], [-16, 0])}), "whole numbers"),
    "three offsets": (safetensors_bytes({"w": entry([4], [0, 16, 16])}), "whole numbers"),
    "a shape that does not fill its bytes": (safetensors_bytes({"w": entry([3])}), "shape"),
    "two tensors in one place": (safetensors_bytes({"w": entry(), "v": entry()}), "where the tensor before it ends"),
    "a gap before a tensor": (safetensors_bytes({"w": entry(offsets=[16, 32])}, 32), "where the tensor before it ends"),
    "bytes after the last tensor": (safetensors_bytes({"w": entry()}, 17), "where the last tensor ends"),
}


@pytest.mark.parametrize("lie", SAFETENSORS_LIES)
def test_a_safetensors_header_that_lies_is_an_error_that_says_what_is_wrong(tmp_path: Path, lie: str) -> None:
    data, message = SAFETENSORS_LIES[lie]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    assert outcome(open_safetensors, path) == "FileFormatError"
    with pytest.raises(FileFormatError, match=message) as error:
        open_safetensors(path)
    assert str(path) in str(error.value)


INDEXES: dict[str, tuple[Any, str]] = {
    "outside by a path": ({"w": "../secret.safetensors"}, "plain file names"),
    "outside by an absolute path": ({"w": "/etc/passwd"}, "plain file names"),
    "outside by a backslash": ({"w": "..\\secret.safetensors"}, "plain file names"),
    "the folder above": ({"w": ".."}, "plain file names"),
    "a folder inside": ({"w": "more/model.safetensors"}, "plain file names"),
    "a name with a NUL": ({"w": "a\0b"}, "plain file names"),
    "a name that is a number": ({"w": 1}, "plain file names"),
    "nothing": ({}, "plain file names"),
    "a list": (["w"], "plain file names"),
    "a shard that is not there": ({"w": "none.safetensors"}, "none.safetensors"),
    "a tensor that its shard has not": ({"v": "a.safetensors", "w": "a.safetensors"}, "no tensor v"),
    "a tensor that two shards have": ({"w": "a.safetensors", "v": "b.safetensors"}, "w again"),
}


@pytest.mark.parametrize("name", INDEXES)
def test_an_index_that_leads_astray_is_an_error(tmp_path: Path, name: str) -> None:
    places, message = INDEXES[name]
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.safetensors").write_bytes(safetensors_bytes({"w": entry()}))
    (folder / "a.safetensors").write_bytes(safetensors_bytes({"w": entry()}))
    (folder / "b.safetensors").write_bytes(safetensors_bytes({"w": entry(), "v": entry([4], [16, 32])}, 32))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(NanokvError, match=message):
        open_folder(folder)


def test_lying_files_are_refused_where_little_memory_can_be_had(tmp_path: Path) -> None:
    """The same again in a process that may take 300 MB more than it has, so that all memory counts."""
    for number, (data, _) in enumerate(LIES.values()):
        (tmp_path / f"{number}.gguf").write_bytes(data)
    for number, (data, _) in enumerate(SAFETENSORS_LIES.values()):
        (tmp_path / f"{number}.safetensors").write_bytes(data)
    program = """
import resource, sys
from pathlib import Path
from nanokv.errors import FileFormatError
from nanokv.gguf_file import _block_types, open_gguf
from nanokv.safetensors_file import open_safetensors
_block_types()
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 300 * 2**20,) * 2)
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        (open_gguf if path.suffix == ".gguf" else open_safetensors)(path)
    except FileFormatError:
        print(path.name)
"""
    if not Path("/proc/self/statm").exists() or not hasattr(resource, "RLIMIT_AS"):
        pytest.skip("memory cannot be limited here")
    refused = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], check=True, capture_output=True, text=True
    ).stdout
    assert len(refused.split()) == len(LIES) + len(SAFETENSORS_LIES)
