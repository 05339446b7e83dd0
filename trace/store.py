"""Trace: what a recorder wrote down, in memory or on the disk, as tables of NumPy columns and as arrays by id."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from nanokv.config import Config
from nanokv.errors import TraceError
from nanokv.trace.schema import KINDS, ROLES, SITES, TABLES, holds, level_of
from nanokv.trace.steps import About, Audit, Step, StoredSteps, audits

if TYPE_CHECKING:
    from nanokv.trace.flow import Flow
    from nanokv.trace.laws import Broken
    from nanokv.transformer import Transformer

__all__ = ["Step", "Table", "Trace"]
Array = np.ndarray


class Table(Mapping[str, Array]):
    """Columns by name. Each is made when it is asked for, so that asking for one doesn't cost the others."""

    def __init__(self, names: Sequence[str], column: Callable[[str], Array]) -> None:
        self._names, self._column = tuple(names), column

    def __getitem__(self, name: str) -> Array:
        if name not in self._names:
            raise KeyError(name)
        return self._column(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return f"<Table of {', '.join(self._names)}>"


class Trace:
    """The recorded calls of one sequence. A table maps a column's name to a NumPy array; `schema.TABLES` lists them.

    Level `writes` has tokens, writes and the slots of reads; `weights` adds what was read by how much; `vectors` queries,
    keys, values and scores; `states` the residual stream and the logits. What a level does not hold is a TraceError. A
    trace on the disk is read when it is used, step by step; a damaged file is a FileFormatError that names it.
    """

    def __init__(
        self, about: About, steps: Sequence[Step], audits: Sequence[Audit] = (), model: Transformer | None = None
    ) -> None:
        """model: the one that was recorded, if its hash was not taken yet."""
        self.about, self.steps, self.audits, self._model = about, steps, list(audits), model

    @staticmethod
    def load(path: str | Path) -> Trace:
        """Open a trace folder. Arrays are read from the disk when they are asked for. FileFormatError if it is none."""
        from nanokv.trace.writer import read_about

        folder = Path(path)
        about = read_about(folder)
        return Trace(about, StoredSteps(folder, about), audits(folder, about))

    def save(self, path: str | Path) -> None:
        """Write the whole trace to a folder NAME.nkv."""
        from nanokv.trace.writer import save

        save(self, path)

    @property
    def config(self) -> Config:
        """The shape of the model."""
        return self.about.config

    @property
    def level(self) -> str:
        """How much was kept: one of `schema.LEVELS`."""
        return self.about.level

    @property
    def topk(self) -> int | None:
        """How many weights of a row were kept; None: all."""
        return self.about.topk

    @cached_property
    def model_hash(self) -> str:
        """The fingerprint of the model that was recorded."""
        return self._model.fingerprint if self._model is not None and not self.about.model_hash else self.about.model_hash

    @property
    def model_name(self) -> str:
        """What the model was loaded as."""
        return self.about.model_name

    @property
    def length(self) -> int:
        """Positions recorded."""
        return self.steps[-1].start + self.steps[-1].n - self.steps[0].start if len(self.steps) else 0

    def __repr__(self) -> str:
        return f"<Trace of {self.model_name or 'a model'}: {self.length} tokens in {len(self.steps)} calls, level {self.level}>"

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        """What a notebook shows: whose turns were recorded, and the cache that they left."""
        from nanokv.trace import notebook

        return notebook.of_trace(self)

    @cached_property
    def tokens(self) -> dict[str, Array]:
        """pos, token_id, text, turn, role, step, chunk, sampled: a row for each position."""
        columns: dict[str, Array] = {name: self._joined(name) for name in ("token_id", "turn", "chunk")}
        columns["step"] = np.concatenate([np.full(step.n, step.number, np.int32) for step in self._recorded()])
        columns["pos"] = np.concatenate([np.arange(s.start, s.start + s.n, dtype=np.int32) for s in self.steps])
        columns["text"] = np.array([text for step in self.steps for text in step.texts()], object)
        columns["role"] = np.array(ROLES, object)[np.concatenate([step.roles() for step in self.steps])]
        columns["sampled"] = self._joined("sampled").astype(bool)
        return {name: columns[name] for name in TABLES["tokens"]}

    @property
    def writes(self) -> Table:
        """step, layer, slot, pos, kv_head, turn, role (an index into ROLES), k_hash, v_hash, k_norm, v_norm: a row for each
        entry written to the cache."""
        return Table(tuple(TABLES["writes"]), lambda name: np.concatenate([_write(step, name) for step in self._recorded()]))

    @property
    def reads(self) -> Table:
        """step, layer, head, dst, src, kv_layer, kv_head, slot, kind (an index into KINDS), turn and role of dst, and weight
        and score where the level holds them: a row for each slot that a head read for a position; with topk, for each of
        those kept. Rows are made when asked for; mind that there are L * H * T * (T + 1) / 2 of them."""
        names = [name for name in TABLES["reads"] if name not in ("weight", "score") or holds(self.level, level_of(name))]
        layers = range(self.config.n_layers)
        return Table(
            names, lambda name: np.concatenate([_read(step, l, name) for step in self._recorded() for l in layers])
        )

    @property
    def edits(self) -> Table:
        """step, kind, site, layer, head (-1: all), pos, src (-1: none): a row for each intervention."""
        return Table(tuple(TABLES["edits"]), lambda name: np.concatenate([_edit(step, name) for step in self._recorded()]))

    def pattern(self, layer: int) -> Array:
        """float32 [H, S, S]: attention weights of a layer, dst by src, 0 where nothing was read (or, with topk, kept)."""
        return self._square("weight", layer, 0.0)

    def scores(self, layer: int) -> Array:
        """float32 [H, S, S]: scores of a layer, dst by src, -inf where nothing was read; NaN where topk kept nothing."""
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
        layer1.pos5.attn_out         another site there, [D]; also q and z, [H, hd], k and v, [G, hd]
        layer1.pos5.pattern          the weights of all heads at a position, [H, S], S = 6; also scores
        layer1.pos5.head2.pattern    those of one head, [S]; also scores, q, z, [hd]
        step3.layer1.resid_pre       a site of a call, [T, D]; also q and z, [T, H, hd], k and v, [T, G, hd]
        step3.layer1.pattern         the weights of a call, [H, T, S]; also scores
        step3.layer1.head2.pattern   the weights of a head in a call, [T, S]; also scores, q, z, [T, hd]
        step3.logits, pos5.logits    the logits of a call, [T', V], and of a position, [V]; also final_scale
        """
        from nanokv.trace import ids

        return ids.array(self, ids.parse(name))

    def check(self) -> list[Broken]:
        """The laws that the trace breaks, each with the ids that break it: [] if all is well. See `laws`."""
        from nanokv.trace import laws

        return laws.check(self)

    def flow(self, model: Transformer | None = None, *, measure: str | None = None, at: int = -1,
             token: int | str | None = None, against: int | str | None = "runner-up",
             heads: Literal["apart", "merged", "summed"] = "apart") -> Flow:  # fmt: skip
        """The graph of what led to the prediction at a position, by default weighed by what each edge did for its logit over
        that of the likeliest other token (`target`), or else by attention; see `making.flow`."""
        from nanokv.trace import making

        return making.flow(self, model, measure=measure, at=at, token=token, against=against, heads=heads)

    def _recorded(self) -> Sequence[Step]:
        if not len(self.steps):
            raise TraceError("the trace holds no call: record a forward pass first")
        return self.steps

    def _array(self, step: Step, name: str) -> Array:
        if name not in step.arrays:
            level = level_of(name)
            raise TraceError(f"{name} is recorded from level {level} on, and this trace has level {self.level}: record it "
                             f"again with level={level!r}")  # fmt: skip
        return step.arrays[name]

    def _joined(self, name: str, layer: int | None = None) -> Array:
        """An array of all steps, or its part of one layer, one position after the other."""
        steps, at = self._recorded(), 0
        joined = np.empty(0)
        for step in steps:  # one after the other, for a step's file may be closed when the next one is used
            part = self._array(step, name) if layer is None else self._array(step, name)[self._layer(layer)]
            if step is steps[0]:
                joined = np.empty((self.length, *part.shape[1:]), part.dtype)
            if step.start - steps[0].start != at or len(part) != step.n:
                raise TraceError(f"step {step.number} has {len(part)} rows of {name} from position {step.start} on; expected "
                                 f"{step.n} from {steps[0].start + at} on: see what trace.check() says")  # fmt: skip
            joined[at : at + step.n] = part
            at += step.n
        return joined

    def _layer(self, layer: int) -> int:
        if not 0 <= layer < self.config.n_layers:
            raise TraceError(f"layer {layer} is not in the model: layers are 0 to {self.config.n_layers - 1}")
        return layer

    def _head(self, head: int) -> int:
        if not 0 <= head < self.config.n_heads:
            raise TraceError(f"head {head} is not in the model: heads are 0 to {self.config.n_heads - 1}")
        return head

    def _step_of(self, pos: int) -> Step:
        steps = self._recorded()
        i = bisect_right(steps, pos, key=lambda step: step.start) - 1
        if i >= 0 and pos < steps[i].start + steps[i].n:
            return steps[i]
        raise TraceError(f"position {pos} is not in the trace, which holds {self.length} positions, from {steps[0].start} on")

    def _numbered(self, number: int) -> Step:
        first = self._recorded()[0].number  # numbers follow one another, in what a recorder wrote
        if 0 <= number - first < len(self.steps) and self.steps[number - first].number == number:
            return self.steps[number - first]
        last = self.steps[-1].number
        raise TraceError(f"step {number} is not in the trace, which has {len(self.steps)} steps, {first} to {last}")

    def _square(self, name: str, layer: int, empty: float) -> Array:
        square = np.full((self.config.n_heads, self.length, self.length), empty, np.float32)
        origin = self._recorded()[0].start
        for step in self.steps:
            self._array(step, name)
            dst, src = step.pairs(self._layer(layer))
            inside = src >= origin
            square[:, dst[inside] - origin, src[inside] - origin] = step.reads(name, layer)[:, inside]
        return square

    def _reads_of(self, step: Step, layer: int) -> dict[str, Array]:
        """The columns of `reads` for one layer of one step."""
        return {name: _read(step, layer, name) for name in self.reads}


def _write(step: Step, name: str) -> Array:
    """A column of `writes` of one step."""
    if name in ("k_hash", "v_hash", "k_norm", "v_norm"):
        return step.arrays[name].reshape(-1)
    l, t, g = step.arrays["k_hash"].shape
    slot = step.arrays["write_slot"][:, None, None] + np.arange(t, dtype=np.int32)[:, None]
    columns: dict[str, Array] = {
        "step": np.full((), step.number, np.int32),
        "layer": np.arange(l, dtype=np.int32)[:, None, None],
        "slot": slot,
        "pos": np.arange(step.start, step.start + t, dtype=np.int32)[:, None],
        "kv_head": np.arange(g, dtype=np.int32),
        "turn": step.arrays["turn"][:, None],
        "role": step.roles()[:, None],
    }
    return np.broadcast_to(columns[name], (l, t, g)).reshape(-1)


def _read(step: Step, layer: int, name: str) -> Array:
    """A column of `reads` of one layer of one step."""
    if name in ("weight", "score"):
        return step.kept(name, layer).reshape(-1)
    dst, src = step.kept_pairs(layer)
    h = len(src)
    if name == "kind":
        past = np.where(src < step.start, KINDS.index("past"), KINDS.index("chunk"))
        return np.where(src == dst, KINDS.index("self"), past).astype(np.uint8).reshape(-1)
    columns: dict[str, Callable[[], Array]] = {
        "step": lambda: np.full((), step.number, np.int32),
        "layer": lambda: np.full((), layer, np.int32),
        "head": lambda: np.arange(h, dtype=np.int32)[:, None],
        "dst": lambda: dst,
        "src": lambda: src,
        "kv_layer": lambda: step.arrays["read_layer"][layer],
        "kv_head": lambda: step.arrays["read_kv_head"][layer][:, None],
        "slot": lambda: src,
        "turn": lambda: step.arrays["turn"][dst - step.start],
        "role": lambda: step.roles()[dst - step.start],
    }
    return np.broadcast_to(columns[name](), (h, len(dst))).reshape(-1)


def _edit(step: Step, name: str) -> Array:
    """A column of `edits` of one step; kinds and sites by name."""
    if name == "step":
        return np.full(len(step.edited.rows), step.number, np.int32)
    place = list(TABLES["edits"]).index(name) - 1
    return np.array([row[place] for row in step.edited.rows], object if name in ("kind", "site") else np.int32)
