"""GGUF: a model in one file, mapped into memory and read where it lies. All numbers are little endian.

    "GGUF"  u32 version  u64 number of tensors  u64 number of pairs
    pairs:    string key | u32 type | value
    tensors:  string name | u32 number of dimensions | u64 for each, innermost first | u32 kind | u64 offset
    zeros up to a multiple of the alignment; from here on tensors lie, each at its offset

A string is u64 length | UTF-8 bytes; an array is u32 type of its elements | u64 count | elements. A tensor of a
quantised kind is made of blocks: so many numbers of a row, packed into so many bytes.

The header is a stranger's word. No count, length or offset in it is believed before it is compared with the size of the
file, and nothing is allocated ahead of the bytes that will fill it. The gguf package only dequantises.
"""

from __future__ import annotations

import math
import mmap
import os
import stat
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from nanokv.errors import FileFormatError, ModelNotFoundError

Value = int | float | bool | str | list[Any] | np.ndarray  # of a pair; an array of numbers is a view of the file

NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 10: "<Q", 11: "<q", 12: "<d"}
BOOL, STRING, ARRAY = 7, 8, 9
SMALLEST = {**{kind: struct.calcsize(form) for kind, form in NUMBERS.items()}, BOOL: 1, STRING: 8, ARRAY: 12}  # bytes

MAX_DIMS = 4
MAX_NESTING = 4  # arrays in arrays
PLAIN = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}  # kinds that NumPy reads by itself
SLICE = 1 << 17  # numbers that are dequantised at a time: few enough to stay in the processor's cache


@dataclass(frozen=True, eq=False)
class FileTensor:
    """A tensor in the form in which its file keeps it. `np.asarray(tensor)` reads it: float32 of this shape."""

    name: str
    shape: tuple[int, ...]  # a matrix is [outputs, inputs]
    kind: str  # F32, F16, BF16, ... or a block type: Q4_1, Q8_0, ...
    raw: np.ndarray  # uint8 [bytes]: a read-only view of the mapped file

    def rows(self, start: int, stop: int) -> FileTensor:
        """Rows start to stop - 1 of a matrix, in the same form: [stop - start, inputs]."""
        step = len(self.raw) // max(self.shape[0], 1)
        return FileTensor(self.name, (stop - start, *self.shape[1:]), self.kind, self.raw[start * step : stop * step])

    def forget(self) -> None:
        """Let go of the pages of memory that hold what was read; they are read anew from the file if need be."""
        mapped: Any = self.raw
        while isinstance(mapped, np.ndarray):
            mapped = mapped.base
        if isinstance(mapped, memoryview) and isinstance(mapped.obj, mmap.mmap) and len(self.raw):
            start = self.raw.ctypes.data - np.frombuffer(mapped, np.uint8).ctypes.data
            first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages only
            length = (start + len(self.raw)) // mmap.PAGESIZE * mmap.PAGESIZE - first
            if length > 0:
                mapped.obj.madvise(mmap.MADV_DONTNEED, first, length)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False and self.kind != "F32":
            raise ValueError(f"a tensor of kind {self.kind} cannot become an array without a copy")
        values = self._float32()
        return values.astype(values.dtype if dtype is None else dtype, copy=bool(copy))

    def _float32(self) -> np.ndarray:
        if self.kind in PLAIN:  # require: a kernel wants aligned float32; astype copies only if it must
            stored = np.require(self.raw.view(PLAIN[self.kind]), requirements="A")
            return stored.reshape(self.shape).astype(np.float32, copy=False)
        if self.kind == "BF16":
            return (self.raw.view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(self.shape)
        if not can_read(self.kind):
            raise FileFormatError(
                f"nanokv cannot make float32 of the tensor {self.name}, which is of the kind {self.kind}"
            )
        return _dequantised(self)


@dataclass(frozen=True, eq=False)
class GGUFFile:
    """What a GGUF file holds: its pairs, and its tensors, not yet read."""

    path: Path
    pairs: dict[str, Value]
    tensors: dict[str, FileTensor]


def open_gguf(path: str | Path) -> GGUFFile:
    """Map the file and read its header. FileFormatError says what is wrong with it, and where."""
    header = _Header(Path(path), map_file(path))
    n_tensors, n_pairs = header.start()
    pairs: dict[str, Value] = {}
    for _ in range(n_pairs):
        key = header.string("a key")
        if key in pairs:
            raise header.error(f"the key {key!r} a second time", "each key once")
        pairs[key] = header.value(header.number("<I", f"the type of {key!r}"), key)
    infos = _tensor_infos(header, n_tensors)
    return GGUFFile(Path(path), pairs, _tensors(header, infos, pairs.get("general.alignment", 32)))


def map_file(path: str | Path) -> mmap.mmap:
    """The file's bytes, mapped for reading. ModelNotFoundError unless it is a regular file that can be opened."""
    try:
        # Asked before it is opened: opening a pipe waits for a writer.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ModelNotFoundError(f"{path} is not a file")
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise FileFormatError(f"{path} is empty: download it again")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def clipped(text: str) -> str:
    """The text, cut down to what an error message can bear: names in a damaged file may be of any length."""
    return text if len(text) <= 300 else f"{text[:300]}..."


@cache
def can_read(kind: str) -> bool:
    """Whether a tensor of this kind can become float32."""
    if kind in PLAIN or kind == "BF16":
        return True
    if kind not in _block_types():
        return False
    try:
        _dequantised(FileTensor("", (1, _block_types()[kind][0]), kind, np.zeros(_block_types()[kind][1], np.uint8)))
    except NotImplementedError:
        return False
    return True


@cache
def _block_types() -> dict[str, tuple[int, int]]:
    """Numbers and bytes of a block, for every kind that the gguf package knows."""
    from gguf.constants import GGML_QUANT_SIZES

    return {kind.name: sizes for kind, sizes in GGML_QUANT_SIZES.items()}


def _dequantised(tensor: FileTensor) -> np.ndarray:
    """float32 of the tensor's shape, a slice of its blocks at a time."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType[tensor.kind]
    per_block, block_bytes = _block_types()[tensor.kind]
    blocks = tensor.raw.reshape(-1, block_bytes)
    out = np.empty((len(blocks), per_block), np.float32)
    step = max(1, SLICE // per_block)
    with np.errstate(all="ignore"):  # a scale may be infinite or NaN: that is what the file says
        for start in range(0, len(blocks), step):
            # As one long row, for dequantize goes over rows in Python.
            row = dequantize(blocks[start : start + step].reshape(1, -1), kind)
            out[start : start + step] = row.reshape(-1, per_block)
    return out.reshape(tensor.shape)


class _Header:
    """A cursor that reads the header from front to back and never steps outside of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.size, self.at = path, data, len(data), 0

    def error(self, found: str, expected: str) -> FileFormatError:
        return FileFormatError(
            f"{self.path}, byte {self.at}: found {clipped(found)}; expected {clipped(expected)}. The file is damaged "
            "or was cut short: download or convert it again"
        )

    def start(self) -> tuple[int, int]:
        """Magic and version; returns the numbers of tensors and of pairs."""
        if self.data[:4] != b"GGUF":
            raise FileFormatError(f"{self.path} begins with {self.data[:4]!r}; a GGUF file begins with b'GGUF'. "
                                  "nanokv also loads a Hugging Face folder: give the folder's path")  # fmt: skip
        self.at = 4
        version = self.number("<I", "the version")
        if version not in (2, 3):
            found = "big endian" if version and version & 0xFFFF == 0 else f"GGUF version {version}"
            raise FileFormatError(
                f"{self.path} is {found}; nanokv reads versions 2 and 3, little endian: convert it again"
            )
        return self.number("<Q", "the number of tensors"), self.number("<Q", "the number of pairs")

    def number(self, form: str, what: str) -> Any:
        """One number; form is struct's."""
        self.need(struct.calcsize(form), what)
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return value

    def need(self, n: int, what: str) -> None:
        """Raise unless n more bytes are there."""
        if n > self.size - self.at:
            raise self.error(f"{self.size - self.at} bytes to the end of the file", f"{n} bytes of {what}")

    def string(self, what: str) -> str:
        return self.strings(1, what)[0]

    def strings(self, count: int, what: str) -> list[str]:
        """So many strings, one after the other. A loop without calls, for a vocabulary is most of a header."""
        data, size, at, found = self.data, self.size, self.at, []
        length_of = struct.Struct("<Q").unpack_from
        try:
            for _ in range(count):
                end = at + 8 + length_of(data, at)[0]
                if end > size:
                    raise struct.error
                found.append(data[at + 8 : end].decode())
                at = end
        except struct.error:
            self.at = at
            raise self.error(
                f"{size - at} bytes to the end of the file", f"a string of {what}, which is longer"
            ) from None
        except UnicodeDecodeError:
            self.at = at
            raise self.error("bytes that are not UTF-8", f"a string of {what}") from None
        self.at = at
        return found

    def value(self, kind: int, what: str, depth: int = 0) -> Value:
        """A value of a pair, or an array within one."""
        if kind in NUMBERS:
            return self.number(NUMBERS[kind], repr(what))
        if kind == BOOL:
            return bool(self.bools(1, what)[0])
        if kind == STRING:
            return self.string(repr(what))
        if kind != ARRAY:
            raise self.error(f"{what!r} of type {kind}", "a type from 0 to 12")
        return self.array(what, depth + 1)

    def array(self, what: str, depth: int) -> Value:
        if depth > MAX_NESTING:
            raise self.error(f"{what!r}, arrays nested more than {MAX_NESTING} deep", "a plain array")
        kind, count = self.number("<I", f"the type of {what!r}"), self.number("<Q", f"the length of {what!r}")
        self.need(count * SMALLEST.get(kind, 1), f"{what!r}, an array of {count} elements")
        if kind in NUMBERS:
            values = np.frombuffer(self.data, NUMBERS[kind], count, self.at)
            self.at += values.nbytes
            return values
        if kind == BOOL:
            return self.bools(count, what)
        if kind == STRING:
            return self.strings(count, repr(what))
        return [self.value(kind, what, depth) for _ in range(count)]

    def bools(self, count: int, what: str) -> np.ndarray:
        self.need(count, repr(what))
        values = np.frombuffer(self.data, np.uint8, count, self.at)
        if values.max(initial=0) > 1:
            raise self.error(f"{what!r}, a truth value of {values.max()}", "0 or 1")
        self.at += count
        return values.astype(bool)


def _tensor_infos(header: _Header, count: int) -> dict[str, tuple[list[int], int, int]]:
    """Name -> (dimensions, kind, offset) of every tensor."""
    infos: dict[str, tuple[list[int], int, int]] = {}
    for _ in range(count):
        name = header.string("a tensor's name")
        if name in infos:
            raise header.error(f"the tensor {name!r} a second time", "each tensor once")
        n_dims = header.number("<I", f"the dimensions of {name!r}")
        if not 1 <= n_dims <= MAX_DIMS:
            raise header.error(f"{name!r} of {n_dims} dimensions", f"1 to {MAX_DIMS}")
        dims = [header.number("<Q", f"the dimensions of {name!r}") for _ in range(n_dims)]
        if 0 in dims:
            raise header.error(f"{name!r} of dimensions {dims}", "no dimension of 0")
        infos[name] = (
            dims,
            header.number("<I", f"the kind of {name!r}"),
            header.number("<Q", f"the offset of {name!r}"),
        )
    return infos


def _tensors(header: _Header, infos: dict[str, tuple[list[int], int, int]], alignment: Value) -> dict[str, FileTensor]:
    """The tensors, whose data must lie inside the file, aligned and apart from one another."""
    if not (isinstance(alignment, int) and alignment > 0 and alignment & (alignment - 1) == 0):
        raise header.error(f"general.alignment {alignment!r}", "a power of two")
    start = -(-header.at // alignment) * alignment
    file, tensors, ends = np.frombuffer(header.data, np.uint8), {}, 0
    for name, (dims, kind, offset) in sorted(infos.items(), key=lambda item: item[1][2]):
        kind_name, n_bytes = _stored_size(header, name, dims, kind)
        if offset % alignment:
            raise header.error(f"{name!r} at offset {offset}", f"a multiple of the alignment, {alignment}")
        if offset < ends:
            raise header.error(
                f"{name!r} at offset {offset}, inside of another tensor", f"an offset of at least {ends}"
            )
        ends = offset + n_bytes
        if start + ends > header.size:
            raise header.error(
                f"{name!r} of dimensions {dims}, which ends at byte {start + ends} of {header.size}", "a longer file"
            )
        tensors[name] = FileTensor(name, tuple(reversed(dims)), kind_name, file[start + offset : start + ends])
    return tensors


def _stored_size(header: _Header, name: str, dims: Sequence[int], kind: int) -> tuple[str, int]:
    """The kind's name, and how many bytes a tensor of these dimensions takes."""
    from gguf.constants import GGMLQuantizationType

    if kind not in GGMLQuantizationType._value2member_map_:
        raise header.error(
            f"{name!r} of kind {kind}", "a kind that the gguf package knows (a newer one may: pip install -U gguf)"
        )
    kind_name = GGMLQuantizationType(kind).name
    per_block, block_bytes = _block_types()[kind_name]
    if dims[0] % per_block:
        raise header.error(f"{name!r} with rows of {dims[0]}", f"whole blocks of {per_block}, as {kind_name} has")
    return kind_name, math.prod(dims) // per_block * block_bytes
