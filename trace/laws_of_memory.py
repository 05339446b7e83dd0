"""The laws of writes and reads: who wrote which slot, who read it. Each yields an id and what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from nanokv.trace.steps import BEYOND, Audit

if TYPE_CHECKING:
    from nanokv.trace.store import Trace

Array = np.ndarray
Finding = tuple[str, str]


def n_slots(trace: Trace) -> int:
    """The slots that a check looks at."""
    return max(step.start + step.n for step in trace.steps) + BEYOND


def positions(trace: Trace) -> Iterator[Finding]:
    end = trace.steps[0].start
    for step in trace.steps:
        if step.start != end:
            yield f"step{step.number}", f"begins at position {step.start}; the step before it ends at {end}"
        end = step.start + step.n


def written_once(trace: Trace) -> Iterator[Finding]:
    origin, end = trace.steps[0].start, trace.steps[0].start
    counts = np.zeros((trace.config.n_layers, n_slots(trace)), np.int32)
    for step in trace.steps:
        for layer, slot in enumerate(step.arrays["write_slot"].tolist()):
            if slot != step.start:
                yield f"step{step.number}.layer{layer}.k", f"position {step.start} was written to slot {slot}"
            written = counts[layer, max(slot, 0) : max(slot + step.n, 0)]
            for again in np.flatnonzero(written) + max(slot, 0):
                yield f"layer{layer}.pos{again}.k", f"slot {again} was written again, in step {step.number}"
            written += 1
            end = max(end, min(slot + step.n, counts.shape[1]))
    for layer, slot in zip(*np.nonzero(counts[:, origin:end] == 0), strict=True):
        yield f"layer{layer}.pos{origin + slot}.k", f"slot {origin + slot} was never written, though later ones were"


def unchanged(trace: Trace) -> Iterator[Finding]:
    origin, n_heads = trace.steps[0].start, trace.steps[0].arrays["k_hash"].shape[2]  # key/value heads that were written
    hashes = np.zeros((2, trace.config.n_layers, n_slots(trace), n_heads), np.uint64)  # of keys and values, as written
    written = np.zeros(hashes.shape[1:3], bool)
    audits = {audit.step: audit for audit in trace.audits}
    told: set[str] = set()
    for step in trace.steps:
        for layer, slot in enumerate(step.arrays["write_slot"].tolist()):
            to = slice(max(slot, 0), max(slot + step.n, 0))
            written[layer, to] = True
            for i, name in enumerate(("k_hash", "v_hash")):
                room = hashes[i, layer, to]
                room[:] = step.arrays[name][layer, : len(room)]
        if step.number in audits:
            new = [where for where in _changed(hashes, written, origin, audits[step.number]) if where not in told]
            told.update(new)
            yield from ((where, f"is not what was written, at the audit after step {step.number}") for where in new)


def _changed(hashes: Array, written: Array, origin: int, audit: Audit) -> Iterator[str]:
    """The entries whose slot and whose head have not the sum of hashes that they were written with."""
    n = min(len(audit.k_by_slot), hashes.shape[2])
    known = written[:, :n].all(axis=0)  # what was never written is another law's
    for i, name in enumerate("kv"):
        by_slot, by_head = getattr(audit, f"{name}_by_slot"), getattr(audit, f"{name}_by_head")
        slots = np.flatnonzero(known & (hashes[i, :, :n].sum(axis=(0, 2)) != by_slot[:n]))
        whole = written[:, :n].all(axis=1) & (origin == 0)  # the layers whose sums by head can be told
        layers = np.flatnonzero(~whole | (hashes[i, :, :n].sum(axis=1) != by_head).any(axis=1))
        yield from (f"layer{layer}.pos{slot}.{name}" for layer in layers for slot in slots)


def read_after_write(trace: Trace) -> Iterator[Finding]:
    unwritten = np.ones((trace.config.n_layers, n_slots(trace)), bool)
    unwritten[:, : trace.steps[0].start] = False  # by calls that were not recorded
    for step in trace.steps:
        for layer, slot in enumerate(step.arrays["write_slot"].tolist()):
            unwritten[layer, max(slot, 0) : max(slot + step.n, 0)] = False
        assert len(step.layer_ends)  # which checks that slots are within bounds
        for layer, source in enumerate(step.arrays["read_layer"].tolist()):
            if not 0 <= source < len(unwritten):
                continue  # law `heads` tells it
            before = np.r_[0, np.cumsum(unwritten[source])]  # unwritten slots before each
            first, stop = step.arrays["read_first"][layer], step.arrays["read_stop"][layer]
            for t in np.flatnonzero(before[stop] > before[first]):
                slot = first[t] + int(np.argmax(unwritten[source, first[t] :]))
                yield f"layer{layer}.pos{step.start + t}.pattern", f"reads slot {slot}, which nothing was written to"


def mask(trace: Trace) -> Iterator[Finding]:
    itself = 0 if trace.about.architecture == "feedback" else 1
    for step in trace.steps:
        pos = np.arange(step.start, step.start + step.n)
        for layer in range(trace.config.n_layers):
            window = trace.config.window_of(layer)
            first = np.zeros_like(pos) if window is None else np.maximum(pos + 1 - window, 0)
            said = step.arrays["read_first"][layer], step.arrays["read_stop"][layer]
            for t in np.flatnonzero((said[0] != first) | (said[1] != pos + itself)):
                yield (f"layer{layer}.pos{pos[t]}.pattern", f"reads slots {said[0][t]} to {said[1][t] - 1}; its mask allows "
                       f"{first[t]} to {pos[t] + itself - 1}")  # fmt: skip


def heads(trace: Trace) -> Iterator[Finding]:
    c = trace.config
    own = np.arange(c.n_heads) // (c.n_heads // c.n_kv_heads)
    for step in trace.steps:
        for layer, source in enumerate(step.arrays["read_layer"].tolist()):
            if source != layer:
                yield f"step{step.number}.layer{layer}.pattern", f"reads layer {source} of the cache"
            kv_head = step.arrays["read_kv_head"][layer]
            for head in np.flatnonzero(kv_head != own):
                yield (f"step{step.number}.layer{layer}.head{head}.pattern",
                       f"reads key/value head {kv_head[head]}; its own is {own[head]}")  # fmt: skip
