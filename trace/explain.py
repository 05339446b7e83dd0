"""A trace in words."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from nanokv.errors import TraceError
from nanokv.trace.schema import KINDS
from nanokv.trace.store import Step, Trace

LEAST = 0.005  # a read of less than this rounds to 0.00 and is only counted
SINK = 0.3  # a position that draws so much of all attention from those after it is named once, not read by read


def show(
    trace: Trace,
    *,
    step: int | None = None,
    layer: int | None = None,
    head: int | None = None,
    pos: int | None = None,
    most: int = 20,
) -> Iterator[str]:
    """The event log in plain words, line by line: what each call wrote, then whom its positions read, most first.

    step, layer, head, pos: keep only these (pos is the one that reads). most: reads told of each call. Reads of oneself
    are left out, and those of a sink told in one line.
    """
    yield repr(trace)
    names = [f"{text!r} ({pos})" for pos, text in zip(trace.tokens["pos"], trace.tokens["text"], strict=True)]
    shown = [s for s in trace.steps if step is None or s.number == step]
    if not shown:
        raise TraceError(
            f"step {step} is not in the trace: it has {len(trace.steps)} steps, the first is {trace.steps[0].number}"
        )
    origin = trace.steps[0].start
    for s in shown:
        yield from _written(trace, s)
        if "weight" in s.arrays:
            yield from _read(trace, s, names, origin, layer, head, pos, most)


def _written(trace: Trace, step: Step) -> Iterator[str]:
    roles, turns = trace.tokens["role"], trace.tokens["turn"]
    at = step.start - trace.steps[0].start
    last = step.start + step.n - 1
    where = f"position {last}" if step.n == 1 else f"positions {step.start} to {last}"
    entries = trace.config.n_layers * trace.config.n_kv_heads
    texts = " ".join(map(repr, step.texts()))
    texts = texts if len(texts) <= 80 else texts[:77] + "..."
    yield ""
    yield f"step {step.number} (turn {turns[at]}, {roles[at]}) wrote {where}: {texts}"
    yield f"  {entries} keys and {entries} values for each, one a key/value head and layer"


def _read(trace: Trace, step: Step, names: list[str], origin: int, layer: int | None, head: int | None, pos: int | None,
          most: int) -> Iterator[str]:  # fmt: skip
    columns = _selected(trace, step, layer, head, pos)
    sinks = _sinks(columns)
    for src, share in sinks.items():
        yield f"  sink: {names[src - origin]} draws {share:.2f} of all attention from later positions; not told below"
    order = np.argsort(-columns["weight"], kind="stable")
    others = (columns["kind"] != KINDS.index("self")) & ~np.isin(columns["src"], list(sinks))
    told = [i for i in order.tolist() if others[i] and columns["weight"][i] >= LEAST]
    for i in told[:most]:
        yield "  " + _sentence(trace, columns, i, names, origin)
    if len(told) > most:
        yield f"  ... {len(told) - most:,} more of {LEAST} and above; see --most, --layer, --head, --pos"
    if few := int(others.sum()) - len(told):
        yield f"  ... {few:,} reads of less than {LEAST}"


def _selected(trace: Trace, step: Step, layer: int | None, head: int | None, pos: int | None) -> dict[str, np.ndarray]:
    layers = range(trace.config.n_layers) if layer is None else [trace._layer(layer)]
    parts = [trace._reads_of(step, each) for each in layers]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    keep = np.ones(len(columns["dst"]), bool)
    for name, value in (("head", head), ("dst", pos)):
        if value is not None:
            keep &= columns[name] == value
    return {name: column[keep] for name, column in columns.items()}


def _sinks(columns: dict[str, np.ndarray]) -> dict[int, float]:
    """Positions that draw more than SINK of what later positions read, with the mean weight of a read of them."""
    later = columns["dst"] > columns["src"] + 1
    src, weight = columns["src"][later], columns["weight"][later]
    if len(src) == 0:
        return {}
    total, count = np.bincount(src, weight), np.bincount(src)
    mean = total / np.maximum(count, 1)
    often = count >= max(8, 0.2 * count.max())
    return {int(p): float(mean[p]) for p in np.flatnonzero((mean > SINK) & often)}


def _sentence(trace: Trace, columns: dict[str, np.ndarray], i: int, names: list[str], origin: int) -> str:
    src = columns["src"][i] - origin
    tokens = trace.tokens
    kind = "in this call" if columns["kind"][i] == KINDS.index("chunk") else f"in step {tokens['step'][src]}"
    return (
        f"layer {columns['layer'][i]} head {columns['head'][i]}: {names[columns['dst'][i] - origin]} reads "
        f"{columns['weight'][i]:.2f} of {names[src]} (written {kind}, {tokens['role'][src]})"
    )
