"""Trace: what a recorder wrote down, in memory or on the disk, as tables of NumPy columns and as arrays by id."""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from nanokv import safetensors_file
from nanokv.config import Config, Rope
from nanokv.errors import FileFormatError, TraceError
from nanokv.trace.schema import KINDS, LEVELS, NAME, ROLES, SITES, STORED, VERSION, holds

if TYPE_CHECKING:
    from nanokv.trace.flow import Flow
    from nanokv.transformer import Transformer

Array = np.ndarray
_FORMAT = f"{NAME}-step {VERSION}"


class Step:
    """One forward call: positions start to start + T - 1, and the arrays of `schema.STORED` that its level holds."""

    def __init__(self, number: int, start: int, arrays: Mapping[str, Array]) -> None:
        self.number, self.start, self.arrays = number, start, arrays
        self.n = len(arrays["token_id"])

    @cached_property
    def layer_ends(self) -> Array:
        """int64 [L + 1]: the reads of the layers before each, all heads of one counted once."""
        return np.cumsum(np.r_[0, (self.arrays["read_stop"] - self.arrays["read_first"]).sum(axis=1, dtype=np.int64)])

    def reads(self, name: str, layer: int) -> Array:
        """weight or score of a layer, [H, R]."""
        h = self.arrays["read_kv_head"].shape[1]
        low, high = self.layer_ends[layer] * h, self.layer_ends[layer + 1] * h
        return self.arrays[name][low:high].reshape(h, -1)

    def pairs(self, layer: int) -> tuple[Array, Array]:
        """dst and src of the R reads of a layer."""
        first, stop = self.arrays["read_first"][layer], self.arrays["read_stop"][layer]
        counts = stop - first
        dst = np.repeat(np.arange(self.start, self.start + self.n, dtype=np.int32), counts)
        within = np.arange(counts.sum(), dtype=np.int32) - np.repeat(np.cumsum(counts, dtype=np.int32) - counts, counts)
        return dst, np.repeat(first, counts) + within

    def texts(self) -> list[str]:
        """The text of each token."""
        data, ends = self.arrays["text"].tobytes(), self.arrays["text_end"].tolist()
        return [data[a:b].decode("utf-8", "replace") for a, b in zip([0, *ends], ends, strict=False)]


class Trace:
    """The recorded calls of one sequence. Tables are mappings from a column's name to a NumPy array.

    Level `writes` has tokens, writes and the slots of reads; `weights` adds what was read by how much; `vectors` keys,
    values and scores; `states` the residual stream and the logits. What a level does not hold is a TraceError.
    """

    def __init__(self, config: Config, level: str, steps: Sequence[Step], model_hash: str = "", model_name: str = "") -> None:
        self.config, self.level, self.steps = config, level, list(steps)
        self.model_hash, self.model_name = model_hash, model_name

    @property
    def length(self) -> int:
        """Positions recorded."""
        return sum(step.n for step in self.steps)

    def __repr__(self) -> str:
        return f"<Trace of {self.model_name or 'a model'}: {self.length} tokens in {len(self.steps)} calls, level {self.level}>"

    @property
    def tokens(self) -> dict[str, Array]:
        """pos, token_id, text, turn, role, step, chunk, sampled: a row for each position."""
        columns = {name: self._joined(name) for name in ("token_id", "turn", "chunk")}
        steps = np.repeat([step.number for step in self.steps], [step.n for step in self.steps]).astype(np.int32)
        return {
            "pos": np.concatenate([np.arange(s.start, s.start + s.n, dtype=np.int32) for s in self._recorded()]),
            "text": np.array([text for step in self.steps for text in step.texts()], object),
            "role": np.array(ROLES, object)[self._joined("role")],
            "step": steps,
            "sampled": self._joined("sampled").astype(bool),
            **columns,
        }

    @property
    def writes(self) -> dict[str, Array]:
        """step, layer, slot, pos, kv_head, k_hash, v_hash, k_norm, v_norm: a row for each entry written to the cache."""
        return _stack([self._writes_of(step) for step in self._recorded()])

    @property
    def reads(self) -> dict[str, Array]:
        """step, layer, head, dst, src, kv_layer, kv_head, slot, kind (an index into KINDS), and weight and score where
        the level holds them: a row for each slot that a head read for a position. Rows are made when asked for; mind that
        there are L * H * T * (T + 1) / 2 of them."""
        return _stack([self._reads_of(step, layer) for step in self._recorded() for layer in range(self.config.n_layers)])

    def pattern(self, layer: int) -> Array:
        """float32 [H, S, S]: attention weights of a layer, dst by src, 0 where nothing was read."""
        return self._square("weight", layer, 0.0)

    def scores(self, layer: int) -> Array:
        """float32 [H, S, S]: scores of a layer, dst by src, -inf where nothing was read."""
        return self._square("score", layer, -np.inf)

    def keys(self, layer: int) -> Array:
        """float32 [S, G, hd]: the keys of a layer as cached."""
        return self._joined("k", layer)

    def values(self, layer: int) -> Array:
        """float32 [S, G, hd]: the values of a layer as cached."""
        return self._joined("v", layer)

    def state(self, site: str, layer: int) -> Array:
        """float32 [S, D]: one of SITES in a layer."""
        if site not in SITES:
            raise TraceError(f"there is no site {site!r} in a trace; it must be one of {', '.join(SITES)}")
        return self._joined(site, layer)

    def logits(self, pos: int) -> Array | None:
        """float32 [V]: the logits at a position; None where the call was not asked for them."""
        step = self._step_of(pos)
        logits = self._array(step, "logits")
        row = pos - (step.start + step.n - len(logits))
        return logits[row] if row >= 0 else None

    def __getitem__(self, name: str) -> Array:
        """The array that an id names:

        layer1.pos5                  the residual stream entering layer 1 at position 5, [D]; layer L is the final state
        layer1.pos5.attn_out         another site there, [D]
        step3.layer1.resid_pre       a site of a call, [T, D]; also k and v, [T, G, hd]
        step3.layer1.head2.pattern   the weights of a head in a call, [T, S]; also scores
        step3.logits, pos5.logits    the logits of a call, [T', V], and of a position, [V]
        """
        for form, resolve in _IDS:
            if match := re.fullmatch(form, name):
                return resolve(self, *(int(part) if part.isdigit() else part for part in match.groups()))
        raise TraceError(f"{name!r} is no id of a trace; ids look like layer1.pos5, step3.layer1.head2.pattern, pos5.logits")

    def flow(self, model: Transformer | None = None, *, measure: str, at: int = -1, token: int | str | None = None,
             against: int | str | None = None, heads: Literal["apart", "merged"] = "apart") -> Flow:  # fmt: skip
        """The graph of what led to the prediction at a position; see `flow.flow`."""
        from nanokv.trace import flow

        return flow.flow(self, model, measure=measure, at=at, token=token, against=against, heads=heads)

    def save(self, path: str | Path) -> None:
        """Write the whole trace to a folder NAME.nkv."""
        writer = TraceWriter(path, self.level)
        writer.describe(self.config, self.model_hash, self.model_name)
        for step in self.steps:
            writer.add(step.number, step.start, {name: [array] for name, array in step.arrays.items()})
        writer.close()

    @staticmethod
    def load(path: str | Path) -> Trace:
        """Open a trace folder. Arrays are read from the disk when they are asked for. FileFormatError if it is none."""
        folder = Path(path)
        about = _description(folder)
        files = sorted(folder.glob("step-*.safetensors"))
        steps = [_read_step(file, about["level"]) for file in files]
        return Trace(_config_of(about["config"], folder), about["level"], steps, about["model_hash"], about["model_name"])

    def _recorded(self) -> list[Step]:
        if not self.steps:
            raise TraceError("the trace holds no call: record a forward pass first")
        return self.steps

    def _array(self, step: Step, name: str) -> Array:
        if name not in step.arrays:
            level = next(stored.level for stored in STORED if stored.name == name)
            raise TraceError(f"{name} is recorded from level {level} on, and this trace has level {self.level}: record it "
                             f"again with level={level!r}")  # fmt: skip
        return step.arrays[name]

    def _joined(self, name: str, layer: int | None = None) -> Array:
        arrays = [self._array(step, name) for step in self._recorded()]
        return np.concatenate([array if layer is None else array[self._layer(layer)] for array in arrays])

    def _layer(self, layer: int) -> int:
        if not 0 <= layer < self.config.n_layers:
            raise TraceError(f"layer {layer} is not in the model: layers are 0 to {self.config.n_layers - 1}")
        return layer

    def _step_of(self, pos: int) -> Step:
        for step in self._recorded():
            if step.start <= pos < step.start + step.n:
                return step
        raise TraceError(f"position {pos} is not in the trace, which holds {self.length} positions")

    def _square(self, name: str, layer: int, empty: float) -> Array:
        square = np.full((self.config.n_heads, self.length, self.length), empty, np.float32)
        origin = self._recorded()[0].start
        for step in self.steps:
            self._array(step, name)
            dst, src = step.pairs(self._layer(layer))
            inside = src >= origin
            square[:, dst[inside] - origin, src[inside] - origin] = step.reads(name, layer)[:, inside]
        return square

    def _writes_of(self, step: Step) -> dict[str, Array]:
        l, t, g = step.arrays["k_hash"].shape
        layer, row, kv_head = (index.reshape(-1) for index in np.indices((l, t, g), np.int32))
        columns = {name: step.arrays[name].reshape(-1) for name in ("k_hash", "v_hash", "k_norm", "v_norm")}
        slot = step.arrays["write_slot"][layer] + row
        return {"step": np.full(l * t * g, step.number, np.int32), "layer": layer, "slot": slot, "pos": step.start + row,
                "kv_head": kv_head, **columns}  # fmt: skip

    def _reads_of(self, step: Step, layer: int) -> dict[str, Array]:
        dst, src = step.pairs(layer)
        kv_head = step.arrays["read_kv_head"][layer]
        h, r = len(kv_head), len(dst)
        kind = np.where(src == dst, KINDS.index("self"), np.where(src < step.start, KINDS.index("past"), KINDS.index("chunk")))
        columns = {
            "step": np.full(h * r, step.number, np.int32),
            "layer": np.full(h * r, layer, np.int32),
            "head": np.repeat(np.arange(h, dtype=np.int32), r),
            "dst": np.tile(dst, h),
            "src": np.tile(src, h),
            "kv_layer": np.full(h * r, step.arrays["read_layer"][layer], np.int32),
            "kv_head": np.repeat(kv_head, r),
            "slot": np.tile(src, h),
            "kind": np.tile(kind.astype(np.uint8), h),
        }
        return columns | {name: step.reads(name, layer).reshape(-1) for name in ("weight", "score") if name in step.arrays}


def _stack(parts: list[dict[str, Array]]) -> dict[str, Array]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _state_at(trace: Trace, layer: int, pos: int, site: str = "resid_pre") -> Array:
    if layer == trace.config.n_layers and site == "resid_pre":
        layer, site = layer - 1, "resid_post"
    step = trace._step_of(pos)
    return trace._array(step, site)[trace._layer(layer), pos - step.start]


def _in_step(trace: Trace, number: int, layer: int, name: str) -> Array:
    return trace._array(_numbered(trace, number), name)[trace._layer(layer)]


def _head_in_step(trace: Trace, number: int, layer: int, head: int, name: str) -> Array:
    step, stored = _numbered(trace, number), {"pattern": "weight", "scores": "score"}[name]
    trace._array(step, stored)
    if not 0 <= head < trace.config.n_heads:
        raise TraceError(f"head {head} is not in the model: heads are 0 to {trace.config.n_heads - 1}")
    dst, src = step.pairs(trace._layer(layer))
    rows = np.full((step.n, step.start + step.n), 0.0 if name == "pattern" else -np.inf, np.float32)
    rows[dst - step.start, src] = step.reads(stored, layer)[head]
    return rows


def _numbered(trace: Trace, number: int) -> Step:
    for step in trace.steps:
        if step.number == number:
            return step
    raise TraceError(f"step {number} is not in the trace: its steps are {[step.number for step in trace.steps][:20]}")


def _logits_at(trace: Trace, pos: int) -> Array:
    logits = trace.logits(pos)
    if logits is None:
        raise TraceError(f"the call that computed position {pos} was asked for its last logits only")
    return logits


_SITE = "|".join(SITES)
_IDS: tuple[tuple[str, Callable[..., Array]], ...] = (
    (r"layer(\d+)\.pos(\d+)", _state_at),
    (rf"layer(\d+)\.pos(\d+)\.({_SITE})", _state_at),
    (rf"step(\d+)\.layer(\d+)\.({_SITE}|k|v)", _in_step),
    (r"step(\d+)\.layer(\d+)\.head(\d+)\.(pattern|scores)", _head_in_step),
    (r"step(\d+)\.logits", lambda trace, number: trace._array(_numbered(trace, number), "logits")),
    (r"pos(\d+)\.logits", _logits_at),
)


class TraceWriter:
    """Takes steps one by one: into a list, or each into its file, complete or absent."""

    def __init__(self, path: str | Path | None, level: str) -> None:
        self.folder, self.level = None if path is None else Path(path), level
        self._steps: list[Step] = []
        self._about: tuple[Config, str, str] | None = None
        if self.folder is not None:
            if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
                raise TraceError(f"{self.folder} is already there: give another name, or remove it first")
            self.folder.mkdir(parents=True, exist_ok=True)

    def open(self, model: Transformer) -> None:
        """Say which model is recorded; only a trace on the disk needs its hash."""
        self.describe(model.config, model.fingerprint if self.folder is not None else "", model.name)

    def describe(self, config: Config, model_hash: str, model_name: str) -> None:
        self._about = (config, model_hash, model_name)
        if self.folder is not None:
            about = {"schema": NAME, "version": VERSION, "level": self.level, "config": asdict(config),
                     "model_hash": model_hash, "model_name": model_name}  # fmt: skip
            _write_whole(self.folder / "trace.json", json.dumps(about, indent=1).encode())

    def add(self, number: int, start: int, parts: Mapping[str, Sequence[Array]]) -> None:
        """Add one call; parts are the pieces, layer by layer, of each stored array."""
        arrays = {stored.name: _whole(parts[stored.name], stored.shape) for stored in STORED if stored.name in parts}
        if self.folder is None:
            self._steps.append(Step(number, start, arrays))
            return
        about = {"format": _FORMAT, "step": str(number), "start": str(start), "crc32": str(_checksum(arrays))}
        safetensors_file.save(self.folder / f"step-{number:06d}.safetensors", arrays, about, sync=False)

    def trace(self) -> Trace:
        if self.folder is not None:
            return Trace.load(self.folder)
        if self._about is None:
            raise TraceError("nothing was recorded yet: run a forward pass with this recorder as its observer")
        config, model_hash, model_name = self._about
        return Trace(config, self.level, self._steps, model_hash, model_name)

    def close(self) -> None:
        """Wait until the disk has all files, and the folder's own entries."""
        if self.folder is not None and self.folder.is_dir():
            for path in (*self.folder.iterdir(), self.folder):
                handle = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(handle)
                finally:
                    os.close(handle)


def _whole(parts: Sequence[Array], shape: str) -> Array:
    if len(parts) == 1 and not shape.startswith("L"):
        return parts[0].reshape(-1) if shape.startswith("sum") else parts[0]
    if shape.startswith("sum"):
        return np.concatenate([part.reshape(-1) for part in parts])
    if shape == "L":
        return np.concatenate(parts)
    return np.stack(parts) if parts[0].ndim < len(shape.split()) else parts[0]


def _checksum(arrays: Mapping[str, Array]) -> int:
    total = 0
    for array in arrays.values():
        total = zlib.crc32(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data if array.size else b"", total)
    return total


def _read_step(file: Path, level: str) -> Step:
    arrays, about = safetensors_file.load(file, _FORMAT)
    for stored in STORED:
        if holds(level, stored.level) and (stored.name not in arrays or arrays[stored.name].dtype != np.dtype(stored.dtype)):
            raise FileFormatError(f"{file}: found no {stored.name} of type {stored.dtype}, which level {level} needs: "
                                  "the file is damaged or from another program")  # fmt: skip
    try:
        return Step(int(about["step"]), int(about["start"]), arrays)
    except (KeyError, ValueError) as error:
        raise FileFormatError(f"{file}: its metadata lacks {error}: the file is damaged or from another program") from error


def _description(folder: Path) -> dict[str, Any]:
    file = folder / "trace.json"
    if not file.is_file():
        raise FileFormatError(f"{folder} is no trace: it holds no trace.json. Give the folder NAME.nkv that a recording made")
    about = safetensors_file.parse_json(file.read_bytes(), file)
    if about.get("schema") != NAME or about.get("version") != VERSION:
        raise FileFormatError(f"{file}: schema {about.get('schema')!r} version {about.get('version')!r}; this program reads "
                              f"{NAME!r} version {VERSION}")  # fmt: skip
    if about.get("level") not in LEVELS or not isinstance(about.get("config"), dict):
        raise FileFormatError(f"{file}: no level or no config: the file is damaged")
    return about


def _config_of(values: dict[str, Any], folder: Path) -> Config:
    def rope(value: dict[str, Any] | None) -> Rope | None:
        return None if value is None else Rope(value["base"], None if value["divisors"] is None else tuple(value["divisors"]))

    try:
        ropes = {name: rope(values[name]) for name in ("rope", "rope_local")}
        return Config(**{**values, **ropes, "sliding": tuple(values["sliding"])})
    except (TypeError, KeyError) as error:
        raise FileFormatError(f"{folder / 'trace.json'}: its config cannot be read ({error}): the file is damaged") from error


def _write_whole(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)
