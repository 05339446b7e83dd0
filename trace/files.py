"""How a trace's files lie on the disk: each complete or absent, with a checksum for the arrays of each level.

A file is a safetensors file, written under another name and renamed when it is whole, so that a process killed at any
moment, or a full disk, costs no more than the call in flight. The arrays are written as they come; the header before them,
whose room is reserved, comes last. The checksum of a level's arrays stands in its metadata as "sum.LEVEL":

    their bytes, filled up with zeros to rows of 4096, are taken as 64-bit numbers, [rows, 512];
    CRC-32 of the rows' sums, from the first row to the last, and then of the 512 columns' sums; sums are modulo 2^64.

Sums run at the speed of memory, a CRC of all bytes at a tenth of it. Whatever changes one row or one column is found, but
for one chance in 2^32.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from nanokv import safetensors_file
from nanokv.errors import FileFormatError
from nanokv.gguf_file import FileTensor

Array = np.ndarray
ROW = 4096  # bytes
BLOCK = 256 * ROW  # bytes that are copied, summed and written together: they stay in the processor's cache
TO_JSON = json.JSONEncoder(separators=(",", ":")).encode
KINDS = {dtype: kind for kind, (_, dtype) in safetensors_file.DTYPES.items() if dtype is not None}


class Checksum:
    """The checksum of a stream of bytes, given in pieces, all but the last of whole rows."""

    def __init__(self) -> None:
        self._columns, self._crc = np.zeros(ROW // 8, np.uint64), 0

    def add(self, block: Array, n: int) -> None:
        """The first n bytes of uint8 [..]; what follows them there up to a whole row is overwritten by zeros."""
        whole = -(-n // ROW) * ROW
        block[n:whole] = 0
        rows = block[:whole].view(np.uint64).reshape(-1, ROW // 8)
        self._crc = zlib.crc32(rows.sum(axis=1).data, self._crc)
        self._columns += rows.sum(axis=0)

    def __str__(self) -> str:
        return f"{zlib.crc32(self._columns.data, self._crc):08x}"


def checksum_of(pieces: Iterable[Array]) -> str:
    """The checksum of the bytes of several arrays, uint8 each, one after the other."""
    checksum, block, fill = Checksum(), np.empty(BLOCK, np.uint8), 0
    for piece in pieces:
        for at in range(0, len(piece), BLOCK):
            part = piece[at : at + BLOCK]
            n = min(len(part), BLOCK - fill)
            block[fill : fill + n] = part[:n]
            fill += n
            if fill == BLOCK:
                checksum.add(block, fill)
                fill = len(part) - n
                block[:fill] = part[n:]
    if fill:
        checksum.add(block, fill)
    return str(checksum)


class FileWriter:
    """A file of a trace while it is written: `section`, then for each array `append` its pieces and `name` them; `finish`.

    A small file is gathered in the block and written by one call. An OSError, such as a full disk, names the file. After
    it, and whenever the file is not wanted, `abandon` it.
    """

    def __init__(self, folder: str, name: str, head: int, block: Array) -> None:
        """head: bytes reserved for the header. block: uint8 [BLOCK] to work in, one for all files of a trace."""
        self._path, self._part = f"{folder}/{name}", f"{folder}/.{name}.part"
        self._head, self._block, self._bytes = head, block, block.data
        self._begin, self._fill = 0, 0  # where in the block the bytes lie that are not summed yet
        self._summed: list[memoryview] = []  # parts of the block that are, and are still to be written
        self._to = head  # where they go in the file
        self._at, self._named = 0, 0  # bytes of arrays so far, and of those that have a name
        self._entries: dict[str, dict[str, object]] = {}
        self._sums: dict[str, str] = {}
        self._level, self._checksum = "", Checksum()
        self._file = -1  # opened when the first bytes are written

    def section(self, level: str) -> None:
        """What follows has a checksum of its own."""
        self._end_section()
        self._level, self._checksum = level, Checksum()

    def append(self, pieces: Sequence[Array]) -> None:
        """Pieces of an array. They are used at once and not kept."""
        flat = [piece.reshape(-1).view(np.uint8) for piece in pieces]
        n = sum(map(len, flat))
        if 0 < n < BLOCK - self._fill:  # one call copies them all
            np.concatenate(flat, out=self._block[self._fill : self._fill + n])
            self._at, self._fill = self._at + n, self._fill + n
        else:
            for piece in flat:
                self._append(piece.data)

    def name(self, name: str, shape: tuple[int, ...], dtype: str) -> None:
        """What was appended since the last name is this array."""
        self._entries[name] = {"dtype": KINDS[dtype], "shape": shape, "data_offsets": (self._named, self._at)}
        self._named = self._at

    @property
    def unnamed(self) -> int:
        """Bytes that were appended since the last name."""
        return self._at - self._named

    def small(self, arrays: Mapping[str, Array]) -> None:
        """Append and name arrays, all in one go."""
        pieces = []
        for name, array in arrays.items():
            begin, self._named = self._named, self._named + array.nbytes
            self._entries[name] = {"dtype": KINDS[array.dtype.str], "shape": array.shape, "data_offsets": (begin, self._named)}
            pieces.append(array.tobytes())
        self._append(memoryview(b"".join(pieces)))

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the header and what is still to be written, and give the file its name."""
        self._end_section()
        about = {**metadata, **{f"sum.{level}": text for level, text in self._sums.items()}}
        header = TO_JSON({"__metadata__": about, **self._entries}).encode()
        if len(header) > self._head - 8:
            raise ValueError(f"a header of {len(header)} bytes does not fit into {self._head}")
        if self._to > self._head:
            self._write_summed()
        self._write([memoryview(struct.pack("<Q", self._head - 8) + header.ljust(self._head - 8)), *self._summed], 0)
        file, self._file = self._file, -1
        os.close(file)
        os.replace(self._part, self._path)

    def abandon(self) -> None:
        """Leave nothing behind."""
        if self._file >= 0:
            file, self._file = self._file, -1
            os.close(file)
        with suppress(FileNotFoundError):
            os.unlink(self._part)

    def _append(self, data: memoryview) -> None:
        self._at += len(data)
        while len(data):
            n = min(len(data), BLOCK - self._fill)
            self._bytes[self._fill : self._fill + n] = data[:n]
            self._fill, data = self._fill + n, data[n:]
            if self._fill == BLOCK:
                self._sum()
                self._write_summed()

    def _sum(self) -> None:
        n = self._fill - self._begin
        self._checksum.add(self._block[self._begin :], n)
        self._summed.append(self._bytes[self._begin : self._fill])
        self._begin = self._fill = self._begin + -(-n // ROW) * ROW

    def _end_section(self) -> None:
        if self._fill > self._begin:
            self._sum()
        if self._fill == BLOCK:
            self._write_summed()
        if self._level:
            self._sums[self._level] = str(self._checksum)

    def _write_summed(self) -> None:
        self._to = self._write(self._summed, self._to)
        self._summed, self._begin, self._fill = [], 0, 0

    def _write(self, pieces: list[memoryview], at: int) -> int:
        """Write the pieces one after the other at a place of the file; returns the place after them."""
        try:
            if self._file < 0:
                self._file = os.open(self._part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            while pieces:  # a nearly full disk takes a part, and refuses the rest when asked again
                n = os.pwritev(self._file, pieces, at)
                at += n
                while pieces and n >= len(pieces[0]):
                    n -= len(pieces[0])
                    pieces = pieces[1:]
                pieces = [pieces[0][n:], *pieces[1:]] if n else pieces
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._path) from error
        return at


class FileArrays(Mapping[str, Array]):
    """The arrays of a file: listed from its header, checked and read when they are asked for.

    checked: the levels whose checksum was found right; the caller may keep it from one opening to the next.
    """

    def __init__(self, path: Path, levels: Mapping[str, str], file_format: str, checked: set[str]) -> None:
        """levels: the level of each array that the file may hold. FileFormatError if it is no such file."""
        tensors, self.metadata = safetensors_file.open_safetensors(path)
        if self.metadata.get("format") != file_format:
            raise FileFormatError(f"{path} has the format {self.metadata.get('format')!r}; expected {file_format!r}: it is of "
                                  "another kind, or of another version of nanokv")  # fmt: skip
        if unknown := sorted(tensors.keys() - levels.keys()):
            raise FileFormatError(f"{path} holds {unknown[0]!r}, which no {file_format} has: the file is of another program")
        self._path, self._tensors, self._levels, self._checked = path, tensors, levels, checked

    def __getitem__(self, name: str) -> Array:
        tensor, level = self._tensors[name], self._levels[name]
        if level not in self._checked:
            self._check(level)
            self._checked.add(level)
            _let_go(tensor.raw)
        array: Array = np.require(tensor.raw.view(self.dtype(name)), requirements="A").reshape(tensor.shape)
        return array

    def __contains__(self, name: object) -> bool:
        return name in self._tensors  # without reading it

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of an array, without reading it."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> str:
        """Of an array, by NumPy's name, or "" if NumPy has no such type; without reading it."""
        return safetensors_file.DTYPES[self._tensors[name].kind][1] or ""

    def _check(self, level: str) -> None:
        mine: list[FileTensor] = [tensor for name, tensor in self._tensors.items() if self._levels[name] == level]
        found = checksum_of(sorted((tensor.raw for tensor in mine if len(tensor.raw)), key=lambda raw: raw.ctypes.data))
        if found != (said := self.metadata.get(f"sum.{level}")):
            raise FileFormatError(f"{self._path}: the checksum of its arrays of level {level} is {found}; expected {said}, as "
                                  "its header says. The file is damaged: remove it and those after it, or record again")


def _let_go(raw: Array) -> None:
    """The pages of the file that these bytes are mapped from, which were all read to be summed: whoever uses some of them gets
    them from the system again, and the others need not count as this process's memory."""
    owner: object = raw
    while isinstance(owner, np.ndarray):
        owner = owner.base
    owner = owner.obj if isinstance(owner, memoryview) else owner
    if isinstance(owner, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        owner.madvise(mmap.MADV_DONTNEED)
