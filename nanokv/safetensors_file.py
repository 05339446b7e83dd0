"""safetensors: named arrays in a file, mapped into memory and read where they lie.

    u64 length of the header, little endian | the header, JSON | the arrays, one after the other
    header: {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, ..., "__metadata__": {"a": "b"}}

Offsets count from the end of the header. As with GGUF, nothing that the header says is believed before it is checked.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nanokv.errors import FileFormatError, ModelNotFoundError
from nanokv.gguf_file import FileTensor, clipped, map_file

# dtype -> bytes of an element, and NumPy's name where NumPy has it
DTYPES: dict[str, tuple[int, str | None]] = {
    "F64": (8, "<f8"), "F32": (4, "<f4"), "F16": (2, "<f2"), "BF16": (2, None),
    "F8_E4M3": (1, None), "F8_E5M2": (1, None),
    "I64": (8, "<i8"), "I32": (4, "<i4"), "I16": (2, "<i2"), "I8": (1, "|i1"), "BOOL": (1, "|b1"),
    "U64": (8, "<u8"), "U32": (4, "<u4"), "U16": (2, "<u2"), "U8": (1, "|u1"),
}  # fmt: skip
MAX_HEADER = 100_000_000  # bytes; the format's own limit
MAX_DIMS = 32
MAX_SIZE = 1 << 60  # what the dimensions other than 0 may multiply up to

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def open_safetensors(path: str | Path) -> tuple[dict[str, FileTensor], dict[str, str]]:
    """The tensors of a file, not yet read, and its metadata. FileFormatError says what is wrong with the file."""
    data = map_file(path)
    length = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else 0
    if not 2 <= length <= min(len(data) - 8, MAX_HEADER):
        raise _damaged(path, f"a header of {length} bytes in a file of {len(data)}", "one that fits into the file")
    header = parse_json(data[8 : 8 + length], path)
    metadata = header.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(text, str) for text in metadata.values())):
        raise _damaged(path, "a __metadata__ that is not text by name", "an object of strings")
    buffer = np.frombuffer(data, np.uint8)[8 + length :]
    tensors = {name: _tensor(path, name, entry, buffer) for name, entry in header.items()}
    _check_layout(path, {name: header[name]["data_offsets"] for name in tensors}, len(buffer))
    return tensors, metadata


def open_folder(folder: str | Path) -> dict[str, FileTensor]:
    """The tensors of a Hugging Face folder, in one file or in shards that an index names."""
    folder = Path(folder)
    if (folder / SINGLE).is_file():
        return open_safetensors(folder / SINGLE)[0]
    if not (folder / INDEX).is_file():
        raise _no_weights(folder)
    places = read_json(folder / INDEX).get("weight_map")
    if not (isinstance(places, dict) and places and all(map(_plain_name, places.values()))):
        raise _damaged(
            folder / INDEX, "no weight_map that names files of this folder", "tensor names with plain file names"
        )
    tensors: dict[str, FileTensor] = {}
    for file in sorted(set(places.values())):
        shard = open_safetensors(folder / file)[0]
        if twice := sorted(shard.keys() & tensors.keys()):
            raise _damaged(
                folder / file, f"the tensor {twice[0]} again, which another shard holds", "each tensor in one shard"
            )
        if missing := sorted(name for name, place in places.items() if place == file and name not in shard):
            raise _damaged(folder / file, f"no tensor {missing[0]}", f"it, as {INDEX} says")
        tensors |= shard
    return tensors


def save(
    path: str | Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str], *, sync: bool = True
) -> None:
    """Write arrays to a safetensors file: whole or, if anything fails, not at all. The same input gives the same bytes.

    sync: wait until the disk has it. Without, the end of the process loses nothing, but a power cut may.
    """
    path, end = Path(path), 0
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    for name, array in arrays.items():
        begin, end = end, end + array.nbytes
        entries[name] = {"dtype": _dtype_name(array), "shape": list(array.shape), "data_offsets": [begin, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            for array in arrays.values():
                file.write(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1).view(np.uint8).data)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | Path, file_format: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read back what `save` wrote: arrays, read-only views of the file, and metadata.

    FileFormatError unless the metadata's "format" is file_format.
    """
    tensors, metadata = open_safetensors(path)
    if metadata.get("format") != file_format:
        raise FileFormatError(
            f"{path} has the format {metadata.get('format')!r}; expected {file_format!r}: give another file"
        )
    arrays = {}
    for name, tensor in tensors.items():
        dtype = DTYPES[tensor.kind][1]
        if dtype is None:
            raise _damaged(path, f"{name} of type {tensor.kind}", "a type that NumPy has")
        arrays[name] = np.require(tensor.raw.view(dtype), requirements="A").reshape(tensor.shape)
    return arrays, metadata


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. ModelNotFoundError if the file cannot be read, FileFormatError if it holds none."""
    return parse_json(map_file(path)[:], path)


def parse_json(text: bytes, path: str | Path) -> dict[str, Any]:
    """A JSON object. FileFormatError if it is none, or names something twice."""
    try:
        parsed = json.loads(text.decode(), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or a number of too many digits
        raise _damaged(path, f"JSON that cannot be read ({error})", "a JSON object") from error
    if not isinstance(parsed, dict):
        raise _damaged(path, "JSON that is not an object", "a JSON object")
    return parsed


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a name stands there twice")
    return found


def _tensor(path: str | Path, name: str, entry: Any, buffer: np.ndarray) -> FileTensor:
    """One entry of the header as a tensor, whose bytes must be those that its shape needs."""
    if not (isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}):
        raise _damaged(path, f"{name} described by {str(entry)[:80]}", "dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not (isinstance(dtype, str) and dtype in DTYPES):
        raise _damaged(path, f"{name} of type {str(dtype)[:80]}", f"one of {', '.join(DTYPES)}")
    if not (_sizes(shape) and len(shape) <= MAX_DIMS and _sizes(offsets) and len(offsets) == 2):
        raise _damaged(path, f"{name} of shape {str(shape)[:80]} at {str(offsets)[:80]}", "lists of whole numbers")
    begin, end = offsets
    if not begin <= end <= len(buffer):
        raise _damaged(path, f"{name} at bytes {begin} to {end} of {len(buffer)}", "a place inside of the file")
    size = math.prod(shape) * DTYPES[dtype][0]
    if size != end - begin or math.prod(n or 1 for n in shape) > MAX_SIZE:
        raise _damaged(
            path, f"{name} of shape {str(shape)[:80]} in {end - begin} bytes", f"as many as its {dtype} take"
        )
    return FileTensor(name, tuple(shape), dtype, buffer[begin:end])


def _check_layout(path: str | Path, offsets: dict[str, list[int]], size: int) -> None:
    """The format's rule: tensors lie one after the other, without a gap or an overlap, to the end of the file."""
    at = 0
    for name, (begin, end) in sorted(offsets.items(), key=lambda item: item[1]):
        if begin != at:
            raise _damaged(path, f"{name} at byte {begin}", f"it where the tensor before it ends, at {at}")
        at = end
    if at != size:
        raise _damaged(path, f"{size} bytes of tensors", f"{at}, where the last tensor ends")


def _sizes(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)


def _plain_name(name: Any) -> bool:
    """Whether it is a file's name and no path: an index must not lead out of its folder."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\:\0")


def _dtype_name(array: np.ndarray) -> str:
    for name, (_, dtype) in DTYPES.items():
        if dtype is not None and np.dtype(dtype) == array.dtype.newbyteorder("<"):
            return name
    raise TypeError(f"safetensors has no type for arrays of {array.dtype}")


def _damaged(path: str | Path, found: str, expected: str) -> FileFormatError:
    return FileFormatError(
        f"{path}: found {clipped(found)}; expected {expected}. The file is damaged, cut short or of another kind: "
        "download it again"
    )


def _no_weights(folder: Path) -> FileFormatError | ModelNotFoundError:
    """What to say of a folder without a safetensors file."""
    if pickles := sorted(path.name for path in folder.glob("*.bin")):
        return FileFormatError(
            f"{folder} holds its weights only as {pickles[0]}, a pickle, which can run any program when it is opened; "
            "nanokv never opens one. Where you trust it, convert it with transformers: AutoModelForCausalLM"
            ".from_pretrained(folder).save_pretrained(folder, safe_serialization=True)"
        )
    if ggufs := sorted(folder.glob("*.gguf")):
        return ModelNotFoundError(f"{folder} holds no {SINGLE}; did you mean {ggufs[0]}?")
    return ModelNotFoundError(f"{folder} holds no {SINGLE} and no {INDEX}")
