"""Recorder: the observer that writes down what a forward pass did to the cache, and what it made of it.

During a call it hands the attention weights on, layer by layer, and keeps references to the other arrays; at the call's
end it makes one step of them. A call that raises leaves no step.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from nanokv.cache import KVCache, Slots
from nanokv.edits import Add, Cut, Edit, Replace, ZeroValue
from nanokv.errors import TraceError
from nanokv.feedback import FeedbackTransformer
from nanokv.trace.hashes import audit, hash_entries, hash_words, hashes_and_norms
from nanokv.trace.schema import AUDIT_EVERY, BY_NAME, EDIT_SITES, EDITS, LEVELS, ROLES, SITES, holds
from nanokv.trace.steps import About
from nanokv.trace.store import Trace
from nanokv.trace.writer import DiskWriter, MemoryWriter, Writer, new_folder

if TYPE_CHECKING:
    from nanokv.transformer import Transformer

Array = np.ndarray
NEEDED = {"pattern": "weights", "scores": "vectors", "final_scale": "states"}  # the level from which a site is wanted
KEPT = {"vectors": ("q", "z"), "states": (*SITES, "final_scale")}  # the sites that a level keeps of those reported as states


class Recorder:
    """Records the forward calls of one sequence, into a folder or (path None) in memory. Use it in a `with` block, or call
    close(). After the block, and also within, `trace` is what was recorded so far.

    level: what is kept, one of `schema.LEVELS`, each with all before it; "weights" if nothing is said. topk: keep only so
    many weights of a row, the largest. resume: go on with the trace that is there, with the cache that it ends with (see
    `KVCache.save`); level and topk are the trace's own.
    """

    def __init__(
        self, path: str | Path | None = None, level: str | None = None, *, topk: int | None = None, resume: bool = False
    ) -> None:
        if level not in (None, *LEVELS):
            raise TraceError(f"the level is {level!r}; it must be one of {', '.join(LEVELS)}")
        if topk is not None and topk < 1:
            raise TraceError(f"topk is {topk}; it must be 1 or more")
        self._model: Transformer | None = None
        self._cache: KVCache | None = None
        self._turn, self._role, self._sampled, self._chunk = -1, 0, False, 0
        self._number, self._end = -1, -1  # the last step, and the cache's length after it; -1: none yet
        self._audited = -1
        resumed = self._resumed(path, level, topk) if resume else None
        if path is not None and not resume:
            new_folder(Path(path))
        self._about = resumed  # of the trace; where it is new, when the model is known
        self.level, self.topk = (level or "weights", topk) if resumed is None else (resumed.level, resumed.topk)
        self._writer: Writer = MemoryWriter() if path is None else DiskWriter(Path(path))
        self._wanted = frozenset(site for site, needed in NEEDED.items() if holds(self.level, needed))
        self._kept = frozenset(site for name, sites in KEPT.items() if holds(self.level, name) for site in sites)
        self._before = (self._number, self._end, self._chunk)
        if not resume:
            self.turn("user")

    @property
    def trace(self) -> Trace:
        """What was recorded so far."""
        if isinstance(self._writer, DiskWriter):
            return Trace.load(self._writer.folder)
        if self._about is None:
            raise TraceError("nothing was recorded yet: run a forward pass with this recorder as its observer")
        assert isinstance(self._writer, MemoryWriter)
        return Trace(self._about, list(self._writer.steps), self._writer.audits, self._model)

    def turn(self, role: str, sampled: bool = False, goes_on: bool = False) -> None:
        """Whose tokens come next. sampled: that they are chosen from the predictions, each from the one before it.

        goes_on: with the turn that is there, if it is the role's. So does what is sampled after the foreign beginning of the
        model's own turn, such as "<|im_start|>assistant".
        """
        if role not in ROLES:
            raise TraceError(f"the role is {role!r}; it must be one of {', '.join(ROLES)}")
        goes_on = (goes_on or (sampled and not self._sampled)) and ROLES[self._role] == role and self._turn >= 0
        self._role, self._sampled = ROLES.index(role), sampled
        if not goes_on:
            if self._turn < 0 or self._chunk > 0:  # a turn without a token is none
                self._turn += 1
            self._chunk = 0

    def close(self) -> None:
        """End the trace: the cache is hashed once more, and what was recorded is on the disk."""
        try:
            if self._cache is not None and self._number > self._audited:
                self._audit(self._cache, self._number, self._end)
        finally:
            self._writer.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        with suppress(*((OSError,) if error is not None else ())):  # an error on its way says more than that of closing
            self.close()

    # The observer's part

    def attach(self, model: Transformer, cache: KVCache) -> None:
        """Called by the model before a call: whose call it is. TraceError if it does not go on where the trace ends."""
        if self._model is None:
            self._describe(model)
        elif self._model is not model:
            raise TraceError("this recorder has recorded another model: use one recorder for each model")
        if self._end >= 0 and cache.length != self._end:
            raise TraceError(f"the trace ends before position {self._end}, and the cache holds {cache.length} positions: a "
                             "recorder records every call of one sequence. Use another for another sequence, and resume a "
                             "trace with the cache that it ends with")  # fmt: skip
        if self._end >= 0 and cache is not self._cache:
            self._check_tokens(cache)
        self._cache, self._length = cache, cache.length

    def begin(self, step: int, tokens: Array, start: int) -> None:
        self._before = (self._number, self._end, self._chunk)
        self._number = step if self._number < 0 else self._number + 1
        self._start, self._tokens = start, tokens
        self._writes: list[tuple[int, int, Array, Array]] = []  # layer, first slot, k, v
        self._reads: list[tuple[Slots, Array | None, Array | None]] = []  # scores, and where topk keeps the slots, these
        self._big: dict[str, list[Array]] = {}
        self._edits: list[tuple[int, ...]] = []
        self._deviations: dict[str, str] = {}
        self._writer.begin(self._number)

    def edited(self, edits: Sequence[Edit]) -> None:
        """What is intervened on in this call."""
        self._edits = [row for edit in edits for row in _edit_rows(edit)]

    def wants(self, site: str) -> bool:
        return site in self._wanted

    def write(self, layer: int, start: int, k: Array, v: Array) -> None:
        self._writes.append((layer, start, k, v))

    def read(self, layer: int, start: int, slots: Slots, scores: Array | None, weights: Array | None) -> None:
        src = None
        if weights is not None:
            if weights.dtype != self._dtype:
                weights = self._float("pattern", layer, weights)
            if self.topk is not None:
                src, places = largest(weights, slots, self.topk)
                weights = np.take_along_axis(weights, places, axis=1)
                scores = None if scores is None else np.take_along_axis(scores, places, axis=1)
            self._writer.weights(weights)
        self._reads.append((slots, scores, src))

    def state(self, site: str, layer: int, start: int, x: Array) -> None:
        if site in self._kept:
            self._big.setdefault(site, []).append(self._float(site, layer, x))

    def end(self, logits: Array) -> None:
        self._check_reports()
        k = [self._float("k", layer, k) for layer, _, k, _ in self._writes]
        v = [self._float("v", layer, v) for layer, _, _, v in self._writes]
        if holds(self.level, "vectors"):
            scores = [self._float("scores", slots.layer, x) for slots, x, _ in self._reads if x is not None]
            self._big |= {"k": k, "v": v, "score": scores}
        if holds(self.level, "states"):
            self._big["logits"] = [self._float("logits", -1, logits)]
        if holds(self.level, "weights") and self.topk is not None:
            self._big["weight_src"] = [src for _, _, src in self._reads if src is not None]
        small, big = self._small(k, v), self._big
        self._writes, self._reads, self._big = [], [], {}  # so that the writer may let go of what it has copied
        self._writer.finish(self._number, self._start, small, big, self._deviations)
        self._end = self._length + len(self._tokens)
        self._chunk += 1
        if (self._number + 1) % AUDIT_EVERY == 0 and self._cache is not None:
            self._audit(self._cache, self._number, self._end)

    def abort(self) -> None:
        self._writer.abandon(self._number)
        self._number, self._end, self._chunk = self._before
        self._audited = min(self._audited, self._number)
        self._writes, self._reads, self._big = [], [], {}

    # Details

    def _describe(self, model: Transformer) -> None:
        on_disk = isinstance(self._writer, DiskWriter)
        feedback = isinstance(model, FeedbackTransformer)
        about = About(
            model.config, self.level, self.topk, str(model.dtype), "feedback" if feedback else "standard",
            model.fingerprint if on_disk else "", model.name,
        )  # fmt: skip
        if self._about is not None and about.model_hash != self._about.model_hash:
            raise TraceError(f"the trace is of another model (its hash begins {self._about.model_hash[:12]}, this model's "
                             f"{about.model_hash[:12]}): resume it with the model that made it")  # fmt: skip
        if self._about is not None and about.dtype != self._about.dtype:
            raise TraceError(f"the trace is of a run in {self._about.dtype}, and this model runs in {about.dtype}")
        self._about = about if self._about is None else self._about
        self._writer.describe(self._about)
        self._model, self._dtype = model, model.dtype
        self._hash = getattr(model.ops, "hash_words", hash_words)  # compiled, where the model's operations are
        self._hash_entries = getattr(model.ops, "hash_entries", hash_entries)

    def _resumed(self, path: str | Path | None, level: str | None, topk: int | None) -> About:
        """Of the trace that is there, where it ends is remembered."""
        if path is None:
            raise TraceError("only a trace on the disk can be resumed: give its path")
        trace = Trace.load(path)
        if level not in (None, trace.level) or topk not in (None, trace.topk):
            raise TraceError(f"{path} has level {trace.level!r} and topk {trace.topk}, and stays so: resume it with these")
        if len(trace.steps):
            last = trace.steps[-1]
            self._number, self._end = last.number, last.start + last.n
            self._turn, self._role, self._chunk = (int(last.arrays[name][-1]) for name in ("turn", "role", "chunk"))
            self._sampled, self._chunk = bool(last.arrays["sampled"][-1]), self._chunk + 1
        else:
            self._turn = 0
        self._audited = max((audit.step for audit in trace.audits), default=-1)
        return trace.about

    def _check_tokens(self, cache: KVCache) -> None:
        tokens = self.trace.tokens["token_id"]
        if not np.array_equal(tokens, cache.tokens[cache.length - len(tokens) :]):
            raise TraceError("the cache holds other tokens than the trace: resume with the cache that the trace ends with")

    def _check_reports(self) -> None:
        """TraceError unless each layer reported one write and one read."""
        assert self._model is not None
        layers = list(range(self._model.config.n_layers))
        wrote, n_reads = [write[0] for write in self._writes], len(self._reads)
        if wrote != layers or n_reads != len(layers):
            raise TraceError(f"each of {len(layers)} layers must report one write and one read in a call; writes were reported "
                             f"of layers {wrote}, and {n_reads} reads")  # fmt: skip

    def _small(self, k: list[Array], v: list[Array]) -> dict[str, Array]:
        """The arrays of level `writes`."""
        n, L, slots = len(self._tokens), len(k), [read[0] for read in self._reads]
        texts = [self._text(token).encode("utf-8", "backslashreplace") for token in self._tokens.tolist()]
        hashes, norms = hashes_and_norms([*k, *v], self._hash)
        small = {
            "token_id": self._tokens,
            "text": np.frombuffer(b"".join(texts), np.uint8),
            "text_end": np.cumsum([len(text) for text in texts], dtype=np.int32),
            "turn": np.array([self._turn] * n, np.int32),
            "role": np.array([self._role] * n, np.uint8),
            "chunk": np.array([self._chunk] * n, np.int32),
            "sampled": np.array([self._sampled] * n, np.uint8),
            "write_slot": np.array([write[1] for write in self._writes], np.int32),
            "k_hash": hashes[:L], "v_hash": hashes[L:], "k_norm": norms[:L], "v_norm": norms[L:],
            "read_layer": np.array([each.layer for each in slots], np.int32),
            "read_kv_head": _stacked([each.kv_head for each in slots]),
            "read_first": _stacked([each.first for each in slots]),
            "read_stop": _stacked([each.stop for each in slots]),
        }  # fmt: skip
        if self._edits:
            names = ("edit_kind", "edit_site", "edit_layer", "edit_head", "edit_pos", "edit_src")
            columns = zip(names, np.array(self._edits).T, strict=True)
            small |= {name: column.astype(BY_NAME[name].dtype) for name, column in columns}
        return small

    def _audit(self, cache: KVCache, number: int, n: int) -> None:
        self._writer.audit(audit(cache, number, n, self._hash_entries))
        self._audited = number

    def _float(self, site: str, layer: int, x: Array) -> Array:
        """The array in the model's type of floats; that it was of another is written down."""
        if x.dtype == self._dtype:
            return x
        self._deviations[site if layer < 0 else f"layer{layer}.{site}"] = str(x.dtype)
        return x.astype(self._dtype)

    def _text(self, token: int) -> str:
        tokenizer = self._model.tokenizer if self._model is not None else None
        return str(token) if tokenizer is None else tokenizer.piece(token)


def _stacked(rows: list[Array]) -> Array:
    """[L, n]; mostly all layers say the same."""
    same = all(row is rows[0] for row in rows)
    return np.repeat(rows[0][None], len(rows), axis=0) if same else np.stack(rows)


def rebuilt_cache(trace: Trace, model: Transformer) -> KVCache:
    """The cache that a trace ends with, computed anew from its tokens.

    In one call, or, where the operations give other bits to another split, in the trace's own calls. TraceError if the trace
    begins within a sequence, or if another model or an intervention left other keys or values.
    """
    if len(trace.steps) == 0 or trace.steps[0].start > 0:
        raise TraceError("a cache can be rebuilt only from a trace that begins at position 0: load a saved cache instead")
    tokens, odd = trace.tokens["token_id"], ""
    for calls in ([tokens], np.split(tokens, [step.start for step in trace.steps][1:])):
        cache = model.new_cache()
        for call in calls:
            model.forward(call, cache, last_logits_only=True)
        cache.steps = trace.steps[-1].number + 1
        odd = _other_entry(trace, cache)
        if not odd:
            return cache
    raise TraceError(f"{odd} is not what this model computes from the trace's tokens: load a saved cache instead")


def _other_entry(trace: Trace, cache: KVCache) -> str:
    """The first keys or values that are not those recorded; "" if they all are."""
    for step in trace.steps:
        for layer in range(trace.config.n_layers):
            for name, entries in (("k", cache.keys(layer)), ("v", cache.values(layer))):
                found = hash_words(entries[step.start : step.start + step.n])
                if not np.array_equal(found, step.arrays[f"{name}_hash"][layer]):
                    return f"step{step.number}.layer{layer}.{name}"
    return ""


def largest(weights: Array, slots: Slots, k: int) -> tuple[Array, Array]:  # [H, R] -> [H, R'], [H, R']
    """The k largest weights of each row, of equal ones those of the lowest slots: their slots, ascending, and their places."""
    src, places = [], []
    for first, stop, end in zip(slots.first.tolist(), slots.stop.tolist(), slots.ranges.ends[1:].tolist(), strict=True):
        n = stop - first
        row = np.nan_to_num(weights[:, end - n : end], nan=np.inf)  # [H, n]; NaN is kept, to be seen
        least = np.partition(row, n - k, axis=1)[:, n - k, None] if n > k else np.full((len(row), 1), -np.inf)
        ties = row == least
        kept = (row > least) | (ties & (np.cumsum(ties, axis=1) <= k - np.sum(row > least, axis=1, keepdims=True)))
        chosen = np.nonzero(kept)[1].reshape(len(row), min(n, k))
        src.append(chosen + first)
        places.append(chosen + (end - n))
    return np.concatenate(src, axis=1).astype(np.int32), np.concatenate(places, axis=1)


def _edit_rows(edit: Edit) -> list[tuple[int, ...]]:
    """An edit as rows of kind, site, layer, head, pos, src."""

    def row(kind: str, site: str, head: int | None, pos: int, src: int) -> tuple[int, ...]:
        return EDITS.index(kind), EDIT_SITES.index(site), edit.layer, -1 if head is None else head, pos, src

    if isinstance(edit, Cut | ZeroValue):
        return [row("cut" if isinstance(edit, Cut) else "zero_value", "pattern", edit.head, edit.dst, edit.src)]
    if isinstance(edit, Replace):
        return [row("replace", name, None, edit.pos, -1) for name in ("k", "v") if getattr(edit, name) is not None]
    assert isinstance(edit, Add)
    return [row("add", edit.site, None, edit.pos, -1)]
