"""Where a recorder's steps go: into memory, or onto the disk as they come."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nanokv.config import Config, Rope
from nanokv.errors import ConfigError, FileFormatError, TraceError
from nanokv.safetensors_file import parse_json
from nanokv.trace.files import BLOCK, FileWriter
from nanokv.trace.schema import ABOUT, ARCHITECTURES, AUDIT, LEVELS, NAME, STEP, VERSION, dtype_of, holds
from nanokv.trace.steps import AUDIT_FORMAT, STEP_FORMAT, About, Audit, RecordedStep, Step
from nanokv.trace.store import Trace

Array = np.ndarray
Pieces = Mapping[str, list[Array]]  # of each array, layer by layer, or the whole in one
HEAD = {"writes": 4096, "weights": 4096, "vectors": 8192, "states": 8192}  # bytes of a step's header, by level
ABOUT_FILE = "trace.json"
SMALL = sorted((s for s in STEP if s.level == "writes"), key=lambda s: -np.dtype(s.dtype).itemsize)  # so that all are aligned
BIG = {level: [s for s in STEP if s.level == level] for level in LEVELS[1:]}
LISTED = 16  # deviations that are written down of one step


class Writer(Protocol):
    """Where steps go. A step begins, is given its weights one layer after another, and is finished or abandoned."""

    def describe(self, about: About) -> None:
        """Before the first step: what is recorded."""

    def begin(self, number: int) -> None:
        """A call begins."""

    def weights(self, weights: Array) -> None:
        """The weights of the next layer, [H, R]. On the disk they are used at once, so that their memory serves the next."""

    def finish(self, number: int, start: int, small: Mapping[str, Array], big: Pieces, deviations: Mapping[str, str]) -> None:
        """The call has ended. small: the arrays of level `writes`; big: those of the others, but for the weights: lists that
        are the writer's to empty."""

    def abandon(self, number: int) -> None:
        """The call has failed, or was undone after it was finished: leave nothing of it."""

    def audit(self, audit: Audit) -> None:
        """The cache was hashed."""

    def close(self) -> None:
        """No more steps come."""


class MemoryWriter:
    """Keeps the steps in memory."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.audits: list[Audit] = []
        self._about: About | None = None
        self._weights: list[Array] = []

    def describe(self, about: About) -> None:
        self._about = about

    def begin(self, number: int) -> None:
        self._weights = []

    def weights(self, weights: Array) -> None:
        self._weights.append(weights)

    def finish(self, number: int, start: int, small: Mapping[str, Array], big: Pieces, deviations: Mapping[str, str]) -> None:
        assert self._about is not None
        pieces = {**big, "weight": self._weights} if holds(self._about.level, "weights") else big
        arrays = dict(small)
        for stored in STEP:
            if stored.name in pieces:
                arrays[stored.name] = _joined(pieces[stored.name], stored.shape)
        self.steps.append(RecordedStep(number, start, arrays, self._about, dict(deviations)))

    def abandon(self, number: int) -> None:
        self._weights = []
        self.steps = [step for step in self.steps if step.number < number]
        self.audits = [audit for audit in self.audits if audit.step < number]

    def audit(self, audit: Audit) -> None:
        self.audits.append(audit)

    def close(self) -> None:
        pass


class DiskWriter:
    """Writes each step into its file, complete or absent. What it holds in memory does not grow with the run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._about: About | None = None
        self._named = str(folder)
        self._block = np.empty(BLOCK, np.uint8)
        self._step: FileWriter | None = None
        self._gathered: list[Array] = []  # weights that are not in the file yet
        self._first, self._last = 0, -1  # steps that were written since the disk was last known to have all
        self._audits: list[int] = []

    def describe(self, about: About) -> None:
        self._about = about
        if not (self.folder / ABOUT_FILE).exists():
            _write_about(self.folder, about)

    def begin(self, number: int) -> None:
        assert self._about is not None
        if self._step is not None:
            self._step.abandon()
        self._step = FileWriter(self._named, _file_name("step", number), HEAD[self._about.level], self._block)
        self._gathered = []
        if holds(self._about.level, "weights"):
            self._step.section("weights")

    def weights(self, weights: Array) -> None:
        self._gathered.append(weights)
        if len(self._gathered) * weights.nbytes > BLOCK // 2:  # one token's are so few that they go together
            self._append_weights()

    def _append_weights(self) -> None:
        assert self._step is not None
        self._step.append(self._gathered)
        self._gathered = []

    def finish(self, number: int, start: int, small: Mapping[str, Array], big: Pieces, deviations: Mapping[str, str]) -> None:
        file, about = self._step, self._about
        assert file is not None and about is not None
        for level, arrays in BIG.items():
            if holds(about.level, level):
                if level == "weights":
                    self._append_weights()  # into the section that began with the step
                else:
                    file.section(level)
                for stored in arrays:
                    if stored.name == "weight":
                        file.name("weight", (file.unnamed // np.dtype(about.dtype).itemsize,), dtype_of(stored, about.dtype))
                    elif stored.name in big:
                        file.append(big[stored.name])
                        file.name(stored.name, _shape(big[stored.name], stored.shape), dtype_of(stored, about.dtype))
        file.section("writes")
        file.small({stored.name: small[stored.name] for stored in SMALL if stored.name in small})
        said = " ".join(f"{name}={dtype}" for name, dtype in list(deviations.items())[:LISTED])
        file.finish({"format": STEP_FORMAT, "step": str(number), "start": str(start), **({"deviations": said} if said else {})})
        self._step = None
        self._first, self._last = (number if self._last < 0 else self._first), number

    def abandon(self, number: int) -> None:
        if self._step is not None:
            self._step.abandon()
            self._step = None
        for kind in ("audit", "step"):
            self._path(kind, number).unlink(missing_ok=True)

    def audit(self, audit: Audit) -> None:
        file = FileWriter(self._named, _file_name("audit", audit.step), HEAD["writes"], self._block)
        try:
            file.section("writes")
            file.small({stored.name: getattr(audit, stored.name) for stored in AUDIT})
            file.finish({"format": AUDIT_FORMAT, "step": str(audit.step)})
        except BaseException:
            file.abandon()
            raise
        self._audits.append(audit.step)

    def close(self) -> None:
        """Wait until the disk has all files, and the folder's own entries."""
        if self._step is not None:
            self._step.abandon()
            self._step = None
        steps = [self._path("step", number) for number in range(self._first, self._last + 1)]
        for path in (*steps, *(self._path("audit", number) for number in self._audits), self.folder / ABOUT_FILE, self.folder):
            if path.exists():
                handle = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(handle)
                finally:
                    os.close(handle)
        self._last, self._audits = -1, []

    def _path(self, kind: str, number: int) -> Path:
        return self.folder / _file_name(kind, number)


def _file_name(kind: str, number: int) -> str:
    return f"{kind}-{number:06d}.safetensors"


def new_folder(path: Path) -> None:
    """Make a folder for a trace; TraceError if there is something already."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise TraceError(f"{path} is already there: give another name, or remove it first")
    path.mkdir(parents=True, exist_ok=True)


def save(trace: Trace, path: str | Path) -> None:
    """Write a trace to a new folder."""
    new_folder(Path(path))
    writer, about = DiskWriter(Path(path)), trace.about
    writer.describe(About(**{**vars(about), "model_hash": trace.model_hash}))
    for step in trace.steps:
        writer.begin(step.number)
        arrays = dict(step.arrays)
        if "weight" in arrays:
            writer.weights(arrays.pop("weight"))
        small = {stored.name: arrays.pop(stored.name) for stored in SMALL if stored.name in arrays}
        writer.finish(step.number, step.start, small, {name: [array] for name, array in arrays.items()}, step.deviations)
    for audit in trace.audits:
        writer.audit(audit)
    writer.close()


def read_about(folder: Path) -> About:
    """What trace.json says; FileFormatError if there is none, or one that this program does not read."""
    file = folder / ABOUT_FILE
    if not file.is_file():
        raise FileFormatError(f"{folder} is no trace: it holds no {ABOUT_FILE}. Give the folder NAME.nkv that a recording made")
    said = parse_json(file.read_bytes(), file)
    if said.get("schema") != NAME or said.get("version") != VERSION:
        raise FileFormatError(f"{file}: schema {said.get('schema')!r} version {said.get('version')!r}; this program reads "
                              f"{NAME!r} version {VERSION}")  # fmt: skip
    topk = said.get("topk")
    right = {
        "level": said.get("level") in LEVELS,
        "topk": topk is None or (type(topk) is int and topk > 0),
        "dtype": said.get("dtype") in ("float32", "float64"),
        "architecture": said.get("architecture") in ARCHITECTURES,
        "config": isinstance(said.get("config"), dict),
        "model_hash": isinstance(said.get("model_hash"), str),
        "model_name": isinstance(said.get("model_name"), str),
    }
    for name, is_right in right.items():
        if not is_right:
            raise FileFormatError(f"{file}: its {name} is {str(said.get(name))[:80]!r}; it must be {ABOUT[name]}: the file is "
                                  "damaged")  # fmt: skip
    return About(_config_of(said["config"], file), **{name: said[name] for name in right if name != "config"})


def _write_about(folder: Path, about: About) -> None:
    said = {"schema": NAME, "version": VERSION, **asdict(about)}
    data = json.dumps({name: said[name] for name in ABOUT}, indent=1).encode()
    part = folder / f".{ABOUT_FILE}.part"
    try:
        part.write_bytes(data)
        os.replace(part, folder / ABOUT_FILE)
    finally:
        part.unlink(missing_ok=True)


def _config_of(values: dict[str, Any], file: Path) -> Config:
    def rope(value: dict[str, Any] | None) -> Rope | None:
        return None if value is None else Rope(value["base"], None if value["divisors"] is None else tuple(value["divisors"]))

    try:
        ropes = {name: rope(values[name]) for name in ("rope", "rope_local")}
        return Config(**{**values, **ropes, "sliding": tuple(values["sliding"])})
    except (TypeError, KeyError, ConfigError) as error:
        raise FileFormatError(f"{file}: its config cannot be read ({error}): the file is damaged") from error


def _shape(pieces: Sequence[Array], shape: str) -> tuple[int, ...]:
    """The shape of an array that is given in pieces."""
    if shape.startswith("sum"):
        return (sum(piece.size for piece in pieces),)
    whole = len(pieces) == 1 and pieces[0].ndim == len(shape.split())
    return pieces[0].shape if whole else (len(pieces), *pieces[0].shape)


def _joined(pieces: list[Array], shape: str) -> Array:
    """One array. The pieces are let go one by one, so that memory holds every number once."""
    if _shape(pieces, shape) == pieces[0].shape:
        return pieces[0]
    whole = np.empty(_shape(pieces, shape), pieces[0].dtype)
    rest = whole.reshape(-1)
    while pieces:
        piece = pieces.pop(0).reshape(-1)
        rest[: piece.size] = piece
        rest = rest[piece.size :]
    return whole

