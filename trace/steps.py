"""Step: what was recorded of one forward call; and the steps and audits of a trace on the disk, opened when they are used."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np

from nanokv.config import Config
from nanokv.errors import FileFormatError
from nanokv.trace.files import FileArrays
from nanokv.trace.schema import (
    AUDIT,
    EDIT_SITES,
    EDITS,
    NAME,
    OPTIONAL,
    ROLES,
    STEP,
    VERSION,
    Stored,
    dtype_of,
    holds,
    sizes,
)

Array = np.ndarray
STEP_FORMAT, AUDIT_FORMAT = f"{NAME}-step {VERSION}", f"{NAME}-audit {VERSION}"
BEYOND = 64  # slots past the last position: a step that says it read farther is no report of anything
OPEN = 64  # files that are kept open at a time: each takes a file descriptor


@dataclass(frozen=True)
class About:
    """What trace.json says, under the same names: see `schema.ABOUT`."""

    config: Config
    level: str
    topk: int | None = None
    dtype: str = "float32"
    architecture: str = "standard"
    model_hash: str = ""
    model_name: str = ""


@dataclass(frozen=True)
class Edited:
    """What was intervened on in a call: the `edit_` arrays of a step, row by row, or no rows."""

    rows: tuple[tuple[str, str, int, int, int, int], ...]  # kind, site, layer, head, pos, src
    n_heads: int
    start: int
    n: int

    def edges(self, layer: int, kinds: tuple[str, ...]) -> Array:
        """bool [H, T]: where a row of weights lost an edge by an edit of one of these kinds."""
        found = np.zeros((self.n_heads, self.n), bool)
        for kind, _, at, head, pos, _ in self.rows:
            if kind in kinds and at == layer:
                found[slice(None) if head < 0 else head, pos - self.start] = True
        return found

    def entries(self, layer: int, site: str) -> list[int]:
        """The slots whose key or value (site k or v) was replaced while the call ran."""
        return [pos for kind, what, at, _, pos, _ in self.rows if kind == "replace" and at == layer and what == site]

    def states(self, site: str, layer: int) -> list[int]:
        """The positions to whose state something was added."""
        return [pos for kind, what, at, _, pos, _ in self.rows if kind == "add" and at == layer and what == site]


class Step(ABC):
    """One forward call: positions start to start + n - 1, and those arrays of `schema.STEP` that its level holds."""

    def __init__(self, number: int, start: int, n: int, about: About, where: str) -> None:
        self.number, self.start, self.n, self._about, self._where = number, start, n, about, where

    @property
    @abstractmethod
    def arrays(self) -> Mapping[str, Array]:
        """The arrays by name."""

    @property
    @abstractmethod
    def deviations(self) -> dict[str, str]:
        """What was not of the trace's type of floats when it was reported: {"layer2.k": "float64"}."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that it takes, in memory or on the disk."""

    @cached_property
    def edited(self) -> Edited:
        """What was intervened on."""
        rows: list[Any] = []
        if "edit_kind" in self.arrays:
            columns = [self.arrays[f"edit_{name}"].tolist() for name in ("kind", "site", "layer", "head", "pos", "src")]
            if max(columns[0], default=0) >= len(EDITS) or max(columns[1], default=0) >= len(EDIT_SITES):
                raise FileFormatError(f"{self._where}: an edit of an unknown kind: the file is damaged or of another program")
            rows = [(EDITS[kind], EDIT_SITES[site], *rest) for kind, site, *rest in zip(*columns, strict=True)]
        return Edited(tuple(rows), self._about.config.n_heads, self.start, self.n)

    @cached_property
    def layer_ends(self) -> Array:
        """int64 [L + 1]: the reads of the layers before each, all heads of one counted once."""
        first, stop = self.arrays["read_first"].astype(np.int64), self.arrays["read_stop"].astype(np.int64)
        if (first < 0).any() or (stop < first).any() or (stop > self.start + self.n + BEYOND).any():
            raise FileFormatError(f"{self._where}: slots {first.min()} to {stop.max()}, which no position up to "
                                  f"{self.start + self.n - 1} can have read: it is damaged or of another program")
        counts = stop - first
        return np.cumsum(np.r_[0, counts.sum(axis=1)])

    @cached_property
    def _kept_ends(self) -> Array:
        """The same of the reads that topk keeps."""
        topk = self._about.topk
        if topk is None:
            return self.layer_ends
        counts = np.minimum(self.arrays["read_stop"] - self.arrays["read_first"], topk)
        return np.cumsum(np.r_[0, counts.sum(axis=1, dtype=np.int64)])

    def reads(self, name: str, layer: int) -> Array:
        """weight or score of a layer, [H, R]. What topk did not keep is 0 (a weight) or NaN (a score)."""
        kept = self._kept(name, layer)
        if self._about.topk is None:
            return kept
        first, stop = self.arrays["read_first"][layer], self.arrays["read_stop"][layer]
        whole = np.full((len(kept), int((stop - first).sum())), 0 if name == "weight" else np.nan, kept.dtype)
        np.put_along_axis(whole, self._places(layer), kept, axis=1)
        return whole

    def pairs(self, layer: int) -> tuple[Array, Array]:
        """dst and src of the R reads of a layer."""
        assert len(self.layer_ends)  # checked before anything of that size is made
        first, stop = self.arrays["read_first"][layer], self.arrays["read_stop"][layer]
        dst, within = self._rows(stop - first)
        return dst, np.repeat(first, stop - first) + within

    def kept_pairs(self, layer: int) -> tuple[Array, Array]:
        """dst [R'] and src [H, R'] of the reads whose weights are held: all, or with topk those kept of each row."""
        if self._about.topk is None:
            dst, src = self.pairs(layer)
            return dst, np.broadcast_to(src, (self.arrays["read_kv_head"].shape[1], len(src)))
        first, stop = self.arrays["read_first"][layer], self.arrays["read_stop"][layer]
        return self._rows(np.minimum(stop - first, self._about.topk))[0], self._kept("weight_src", layer)

    def kept(self, name: str, layer: int) -> Array:
        """weight or score of those, [H, R']."""
        return self._kept(name, layer)

    def texts(self) -> list[str]:
        """The text of each token."""
        data, ends = self.arrays["text"].tobytes(), self.arrays["text_end"].tolist()
        return [data[a:b].decode("utf-8", "replace") for a, b in zip([0, *ends], ends, strict=False)]

    def roles(self) -> Array:
        """uint8 [T]: an index into ROLES."""
        roles = self.arrays["role"]
        if (roles >= len(ROLES)).any():
            raise FileFormatError(f"{self._where}: role {roles.max()}; there are {len(ROLES)}: the file is of another program")
        return roles

    def _kept(self, name: str, layer: int) -> Array:
        h, ends, array = self.arrays["read_kv_head"].shape[1], self._kept_ends, self.arrays[name]
        if len(array) != ends[-1] * h:
            raise FileFormatError(f"{self._where}: {name} has {len(array)} numbers for {ends[-1] * h} reads: the file is "
                                  "damaged or of another program")  # fmt: skip
        return array[ends[layer] * h : ends[layer + 1] * h].reshape(h, -1)

    def _rows(self, counts: Array) -> tuple[Array, Array]:
        """For rows of so many reads, one a position: the position of each read, and the how-manieth of its row it is."""
        dst = np.repeat(np.arange(self.start, self.start + self.n, dtype=np.int32), counts)
        return dst, np.arange(len(dst), dtype=np.int32) - np.repeat(np.cumsum(counts, dtype=np.int32) - counts, counts)

    def _places(self, layer: int) -> Array:
        """int64 [H, R']: where the kept reads lie among the R."""
        first, stop = self.arrays["read_first"][layer], self.arrays["read_stop"][layer]
        dst, src = self.kept_pairs(layer)
        offsets = np.cumsum(stop - first, dtype=np.int64) - (stop - first) - first
        places = offsets[dst - self.start] + src
        if ((src < first[dst - self.start]) | (src >= stop[dst - self.start])).any():
            raise FileFormatError(f"{self._where}: weights of slots that were not read: the file is damaged")
        return places


class RecordedStep(Step):
    """A step in memory."""

    def __init__(self, number: int, start: int, arrays: Mapping[str, Array], about: About, deviations: dict[str, str]) -> None:
        super().__init__(number, start, len(arrays["token_id"]), about, f"step {number}")
        self._arrays, self._deviations = arrays, deviations

    @property
    def arrays(self) -> Mapping[str, Array]:
        """The arrays by name."""
        return self._arrays

    @property
    def deviations(self) -> dict[str, str]:
        """What was not of the trace's type of floats when it was reported: {"layer2.k": "float64"}."""
        return self._deviations

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        return sum(array.nbytes for array in self._arrays.values())


class StoredStep(Step):
    """A step on the disk. Its file is opened when its arrays are used, and may be closed between two uses."""

    def __init__(self, number: int, path: Path, files: OpenFiles, about: About) -> None:
        self._path, self._files = path, files
        if (said := _whole_number(self.arrays.metadata, "step", path)) != number:
            raise FileFormatError(f"{path} holds step {said}: it was given another name")
        start = _whole_number(self.arrays.metadata, "start", path)
        super().__init__(number, start, self.arrays.shape("token_id")[0], about, str(path))

    @property
    def arrays(self) -> FileArrays:
        """The arrays by name, each read when it is asked for."""
        return self._files.step(self._path)

    @property
    def deviations(self) -> dict[str, str]:
        """What was not of the trace's type of floats when it was reported: {"layer2.k": "float64"}."""
        return dict(part.partition("=")[::2] for part in self.arrays.metadata.get("deviations", "").split())

    @property
    def nbytes(self) -> int:
        """Bytes of its file."""
        return self._path.stat().st_size


@dataclass(frozen=True)
class Audit:
    """The hashes of the whole cache after a call, summed by slot and by head: see `schema.AUDIT`."""

    step: int
    k_by_slot: Array
    v_by_slot: Array
    k_by_head: Array
    v_by_head: Array


class OpenFiles:
    """The files of a trace that are open, the last used of them."""

    def __init__(self, about: About) -> None:
        self._about = about
        self._open: OrderedDict[Path, FileArrays] = OrderedDict()
        self._checked: dict[Path, set[str]] = {}

    def step(self, path: Path) -> FileArrays:
        """The arrays of a step's file, whose names, types and shapes are right."""
        if path in self._open:
            self._open.move_to_end(path)
            return self._open[path]
        levels = {stored.name: stored.level for stored in STEP}
        arrays = FileArrays(path, levels, STEP_FORMAT, self._checked.setdefault(path, set()))
        _check_arrays(path, arrays, self._about, STEP)
        self._open[path] = arrays
        if len(self._open) > OPEN:
            self._open.popitem(last=False)
        return arrays

    def audit(self, path: Path) -> Audit:
        """An audit's arrays."""
        arrays = FileArrays(path, {stored.name: stored.level for stored in AUDIT}, AUDIT_FORMAT, set())
        _check_arrays(path, arrays, self._about, AUDIT)
        return Audit(_whole_number(arrays.metadata, "step", path), **{name: np.array(array) for name, array in arrays.items()})


class StoredSteps(Sequence[Step]):
    """The steps of a trace on the disk, by number, opened when they are asked for."""

    def __init__(self, folder: Path, about: About) -> None:
        self._about, self._files = about, OpenFiles(about)
        self._paths = numbered(folder, "step")
        self._numbers = sorted(self._paths)
        if self._numbers and len(self._numbers) != self._numbers[-1] - self._numbers[0] + 1:
            lost = next(n for n in range(self._numbers[0], self._numbers[-1]) if n not in self._paths)
            raise FileFormatError(f"{folder} has steps {self._numbers[0]} to {self._numbers[-1]}, but step {lost} is missing: "
                                  "bring its file back, or remove those after it")  # fmt: skip
        self._steps: dict[int, Step] = {}

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, i: int) -> Step: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[Step]: ...
    def __getitem__(self, i: int | slice) -> Step | Sequence[Step]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        number = self._numbers[i]
        if number not in self._steps:
            self._steps[number] = StoredStep(number, self._paths[number], self._files, self._about)
        return self._steps[number]


def audits(folder: Path, about: About) -> list[Audit]:
    """The audits of a trace on the disk."""
    files = OpenFiles(about)
    return [files.audit(path) for _, path in sorted(numbered(folder, "audit").items())]


def numbered(folder: Path, kind: str) -> dict[int, Path]:
    """The files of a kind, step or audit, by number. Unfinished files, and whatever else lies there, are passed over."""
    found = ((re.fullmatch(rf"{kind}-(\d{{6,12}})\.safetensors", path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in found if match}


def _whole_number(metadata: Mapping[str, str], name: str, path: Path) -> int:
    text = metadata.get(name, "")
    if not re.fullmatch(r"\d{1,12}", text):
        raise FileFormatError(f"{path}: its {name} is {text[:80]!r}; it must be a whole number: the file is damaged")
    return int(text)


def _check_arrays(path: Path, arrays: FileArrays, about: About, expected: Sequence[Stored]) -> None:
    """FileFormatError unless the file has each array that its level holds, of the type and shape that the schema says."""
    c = about.config
    letters = {"L": c.n_layers, "H": c.n_heads, "G": c.n_kv_heads, "hd": c.head_dim, "D": c.d_model, "V": c.vocab_size}
    for stored in expected:
        if stored.name not in arrays:
            if holds(about.level, stored.level) and stored.name not in OPTIONAL:
                raise FileFormatError(f"{path} holds no {stored.name}, which level {about.level} has: the file is damaged or "
                                      "of another program")  # fmt: skip
            continue
        shape, dtype = arrays.shape(stored.name), dtype_of(stored, about.dtype)
        wanted = sizes(stored.shape, letters)
        if arrays.dtype(stored.name) != dtype or len(shape) != len(wanted) or any(
            n is not None and n != m for n, m in zip(wanted, shape, strict=True)
        ):  # fmt: skip
            raise FileFormatError(f"{path}: {stored.name} is {arrays.dtype(stored.name)} {list(shape)}; expected {dtype} "
                                  f"[{stored.shape}], with {letters}: the file is damaged or of another program")  # fmt: skip
        letters |= {letter: n for letter, n in zip(stored.shape.split(), shape, strict=False) if letter not in letters}
