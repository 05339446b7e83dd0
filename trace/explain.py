"""A trace in words: `show` tells its events, `why` the arithmetic of one number, `diff` where two traces part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from nanokv.errors import TraceError
from nanokv.trace import schema
from nanokv.trace.diff import diff as diff
from nanokv.trace.labels import several
from nanokv.trace.store import Step, Trace
from nanokv.trace.why import why as why

Array = np.ndarray
By = Literal["read", "pos", "layer", "head"]

LEAST = 0.005  # a read of less than this rounds to 0.00 and is only counted
ALSO = 0.1  # a head that reads so much of a token is counted beside the one that reads most of it
SINK = 0.3  # a position that draws so much of all attention from those after it is named once, not read by read
JUDGED = 8  # so many calls, those with the most reads, say which positions are sinks
EACH = 3  # reads told of each position, layer or head

PLACES = ("other tokens", "the token just before", "itself", "sinks")  # where a read can go


@dataclass(frozen=True)
class Choice:
    """Which reads to tell."""

    layer: int | None = None
    head: int | None = None
    pos: int | None = None  # the position that reads
    src: int | None = None  # the position that is read
    everything: bool = False  # fold nothing: sinks, a position's own entry, the token before, other heads


@dataclass(frozen=True)
class Reads:
    """The reads of one layer in one call, as far as they were chosen: one row for each head, one column for each pair."""

    layer: int
    heads: Array  # [H']
    dst: Array  # [R']
    src: Array  # [R']
    weight: Array  # [H', R']


@dataclass(frozen=True)
class Told:
    """One read to tell."""

    layer: int
    head: int
    dst: int
    src: int
    weight: float
    also: int = 0  # other heads that read ALSO or more of the same token


def show(
    trace: Trace,
    *,
    step: int | None = None,
    layer: int | None = None,
    head: int | None = None,
    pos: int | None = None,
    src: int | None = None,
    by: By = "read",
    most: int | None = None,
    everything: bool = False,
) -> Iterator[str]:
    """The event log in plain words, line by line: what each call wrote, then whom its positions read, most first.

    step, layer, head, pos, src: only these (pos is the one that reads, src the one that is read). by: "read" tells each
    call's strongest reads, the others what each position, layer or head read. most: reads, layers, heads or positions told
    of each call; by default 20, and 5 of a call of one token. Folded, unless everything is wanted: a position's reads of
    itself and of the token just before it, sinks, the other heads that read the same. Everything is told by read.
    TraceError for what the trace does not have.
    """
    _check(trace, layer, head, pos, src, by)
    if most is not None and most < 0:
        raise TraceError(f"most is {most}; it is how many to tell, 0 or more")
    shown = [each for each in trace._recorded() if step is None or each.number == step]
    if not shown:
        raise TraceError(f"step {step} is not in the trace: its steps are {trace.steps[0].number} to {trace.steps[-1].number}")
    yield repr(trace)
    c, choice, teller = trace.config, Choice(layer, head, pos, src, everything), _Teller(trace)
    yield f"  each token writes {several(c.n_layers * c.n_kv_heads, 'key')} and as many values to the cache: one for each of " \
          f"{several(c.n_kv_heads, 'key/value head')} in {several(c.n_layers, 'layer')}"  # fmt: skip
    if not schema.holds(trace.level, "weights"):
        yield "  by how much an entry was read is recorded from level weights on"
    sinks = {} if everything else _sinks(trace, choice)
    for position, share in sinks.items():
        yield f"  sink: {teller.name(position)} draws {share:.2f} of all attention from later positions; not told below"
    for each in shown:
        yield from teller.written(each)
        if schema.holds(trace.level, "weights"):
            default = 5 if each.n == 1 else 20
            yield from teller.read(each, choice, [*sinks], by, default if most is None else most)


def _check(trace: Trace, layer: int | None, head: int | None, pos: int | None, src: int | None, by: str) -> None:
    if layer is not None:
        trace._layer(layer)
    if head is not None and not 0 <= head < trace.config.n_heads:
        raise TraceError(f"head {head} is not in the model: heads are 0 to {trace.config.n_heads - 1}")
    for position in (pos, src):
        if position is not None:
            trace._step_of(position)
    if by not in ("read", "pos", "layer", "head"):
        raise TraceError(f"by is {by!r}; it must be read, pos, layer or head")


def _reads(trace: Trace, step: Step, choice: Choice) -> Iterator[Reads]:
    """The chosen reads of a call, layer by layer."""
    heads = np.arange(trace.config.n_heads) if choice.head is None else np.array([choice.head])
    for layer in range(trace.config.n_layers) if choice.layer is None else [choice.layer]:
        dst, src = step.pairs(layer)
        keep = np.ones(len(dst), bool)
        for column, wanted in ((dst, choice.pos), (src, choice.src)):
            if wanted is not None:
                keep &= column == wanted
        yield Reads(layer, heads, dst[keep], src[keep], step.reads("weight", layer)[heads][:, keep])


def _sinks(trace: Trace, choice: Choice) -> dict[int, float]:
    """Positions that draw more than SINK of what later positions read, with the mean weight of a read of them."""
    drawn, count = np.zeros(trace.steps[-1].start + trace.steps[-1].n), np.zeros(trace.steps[-1].start + trace.steps[-1].n)
    by_reads = sorted(trace.steps, key=lambda step: -step.layer_ends[-1])
    for step in by_reads[:JUDGED] if schema.holds(trace.level, "weights") else ():
        for reads in _reads(trace, step, Choice(choice.layer, choice.head)):
            later = reads.dst > reads.src + 1
            at = reads.src[later]
            drawn += np.bincount(at, reads.weight[:, later].sum(axis=0), len(drawn))
            count += len(reads.heads) * np.bincount(at, minlength=len(count))
    mean = drawn / np.maximum(count, 1)
    often = count >= max(8, 0.2 * count.max(initial=0))
    return {int(p): float(mean[p]) for p in np.flatnonzero((mean > SINK) & often) if p != choice.src}


class _Teller:
    """Puts the events of a trace in words."""

    def __init__(self, trace: Trace) -> None:
        self.trace, self.tokens, self.origin = trace, trace.tokens, trace.steps[0].start
        self.edits = dict(trace.edits)

    def name(self, pos: int) -> str:
        return f"{self.tokens['text'][pos - self.origin]!r} ({pos})" if pos >= self.origin else f"({pos})"

    def written(self, step: Step) -> Iterator[str]:
        """What a call wrote to the cache, and what it predicted."""
        at, last = step.start - self.origin, step.start + step.n - 1
        where = f"position {last}" if step.n == 1 else f"positions {step.start} to {last}"
        texts = " ".join(map(repr, step.texts()))
        turn, role, drawn = (self.tokens[name][at] for name in ("turn", "role", "sampled"))
        yield ""
        yield f"step {step.number} (turn {turn}, {role}{', sampled' if drawn else ''}) wrote {where}: {_cut(texts, 80)}"
        yield from self._edits(step)
        if schema.holds(self.trace.level, "states") and len(step.arrays["logits"]):
            yield f"  predicts {self._predicted(step)}"

    def _edits(self, step: Step) -> Iterator[str]:
        """What was intervened on in a call."""
        for i in np.flatnonzero(self.edits["step"] == step.number):
            kind, site, layer, head, pos, src = (
                self.edits[name][i] for name in ("kind", "site", "layer", "head", "pos", "src")
            )
            where = f"layer {layer}" + (f" head {head}" if head >= 0 else "") + f": {site} of {self.name(pos)}"
            yield f"  intervened ({kind}) in {where}" + (f" reading {self.name(src)}" if src >= 0 else "")

    def _predicted(self, step: Step) -> str:
        logits = self.trace._array(step, "logits")[-1].astype(np.float64)
        token = int(np.argmax(logits))
        chance = 1 / np.exp(logits - logits[token]).sum()
        seen = np.flatnonzero(self.tokens["token_id"] == token)
        name = repr(self.tokens["text"][seen[0]]) if len(seen) else f"token {token}"
        return f"{name} (p = {chance:.2f})"

    def read(self, step: Step, choice: Choice, sinks: Sequence[int], by: By, most: int) -> Iterator[str]:
        """Whom the positions of a call read."""
        if choice.everything:
            yield from self._unfolded(step, choice, most)
        elif by == "read":
            pairs = _Pairs(step)
            for reads in _reads(self.trace, step, choice):
                pairs.add(reads, sinks)
            yield from self._strongest(step, pairs, most)
        elif by == "pos":
            yield from self._by_position(step, choice, sinks, most)
        else:
            yield from self._by_head(step, choice, sinks, by, most)

    def _strongest(self, step: Step, pairs: _Pairs, most: int) -> Iterator[str]:
        told, before = pairs.told(), pairs.told(before=True)
        for each in told[:most]:
            yield f"  {self.sentence(step, each)}"
        if len(told) > most:
            more = several(len(told) - most, "more pair of tokens", "more pairs of tokens")
            yield f"  ... {more}, {told[most].weight:.2f} and less; see --most, --layer, --head, --pos"
        if before and step.n == 1:
            yield f"  the token just before: {self.sentence(step, before[0])}"
        elif before:
            first, ends = before[0], dict.fromkeys(f"{each.weight:.2f}" for each in (before[-1], before[0]))
            extent = " to ".join(ends)
            yield (f"  the token just before: read by {several(len(before), 'position')}, {extent}, most by "
                   f"{self.name(first.dst)} in layer {first.layer} head {first.head}")  # fmt: skip
        if pairs.few:
            yield f"  ... {several(pairs.few, 'read')} of less than {LEAST}"

    def _unfolded(self, step: Step, choice: Choice, most: int) -> Iterator[str]:
        """The strongest reads, each by itself."""
        found: list[Told] = []
        total = 0
        for reads in _reads(self.trace, step, choice):
            total += reads.weight.size
            found = sorted([*found, *_top(reads, reads.weight, most)], key=lambda each: -each.weight)[:most]
        yield from (f"  {self.sentence(step, each)}" for each in found)
        if total > len(found):
            yield f"  ... {several(total - len(found), 'more read')}; see --most"

    def _by_position(self, step: Step, choice: Choice, sinks: Sequence[int], most: int) -> Iterator[str]:
        pairs, shares = _Pairs(step), np.zeros((step.n, len(PLACES)))
        rows = 0
        for reads in _reads(self.trace, step, choice):
            pairs.add(reads, sinks)
            where, mean = _place_of(reads, sinks), reads.weight.sum(axis=0)
            np.add.at(shares, (reads.dst - step.start, where), mean)
            rows += len(reads.heads)
        told = pairs.told(), pairs.told(before=True)
        for t in [t for t in range(step.n) if shares[t].any()][:most]:
            mine = [each for kind in told for each in kind if each.dst == step.start + t]
            yield f"  {self.name(step.start + t)} reads {_shares(shares[t] / rows)}"
            for each in sorted(mine, key=lambda each: -each.weight)[:EACH]:
                yield f"    {self.sentence(step, each)}"
        if step.n > most:
            yield f"  ... {several(step.n - most, 'more position')}; see --most, --pos"

    def _by_head(self, step: Step, choice: Choice, sinks: Sequence[int], by: By, most: int) -> Iterator[str]:
        """Layers in their order; of heads those first that read single other tokens the most: by the mean, over positions,
        of the largest weight that goes to one."""
        groups: list[tuple[float, str, Array, list[Told]]] = []
        for reads in _reads(self.trace, step, choice):
            where, begins = _place_of(reads, sinks), np.flatnonzero(np.diff(reads.dst, prepend=-1))
            shares = np.stack([reads.weight[:, where == i].sum(axis=1) for i in range(len(PLACES))], axis=1)  # [H', 4]
            shares /= max(1, len(begins))
            others = np.where(where == PLACES.index("other tokens"), reads.weight, 0)
            if by == "layer":
                groups.append((0, f"layer {reads.layer} reads", shares.mean(axis=0), _top(reads, others, EACH)))
            elif len(begins):
                sharp = np.maximum.reduceat(others, begins, axis=1).mean(axis=1)  # reads lie by position
                for row, head in enumerate(reads.heads.tolist()):
                    alone = Reads(reads.layer, reads.heads[row : row + 1], reads.dst, reads.src, others[row : row + 1])
                    title = f"layer {reads.layer} head {head} reads"
                    groups.append((float(sharp[row]), title, shares[row], _top(alone, alone.weight, 1)))
        shown = groups if by == "layer" else sorted(groups, key=lambda group: -group[0])[:most]
        for _, title, share, told in shown:
            yield f"  {title} {_shares(share)}"
            yield from (f"    {self.sentence(step, each)}" for each in told if each.weight >= LEAST)
        if len(groups) > len(shown):
            yield f"  ... {several(len(groups) - len(shown), f'more {by}')}; see --most, --layer, --head"

    def sentence(self, step: Step, told: Told) -> str:
        """One read in words."""
        if told.src == told.dst:
            of = "itself"
        elif told.src < self.origin:
            of = f"{self.name(told.src)} (written before the trace began)"
        else:
            row = told.src - self.origin
            when = "in this call" if told.src >= step.start else f"in step {self.tokens['step'][row]}"
            of = f"{self.name(told.src)} (written {when}, {self.tokens['role'][row]})"
        also = f"; {several(told.also, 'other head reads', 'other heads read')} {ALSO} or more" if told.also else ""
        return f"layer {told.layer} head {told.head}: {self.name(told.dst)} reads {told.weight:.2f} of {of}{also}"


class _Pairs:
    """The strongest read of each token by each position of a call, over layers and heads: no more than [T, S] is kept."""

    def __init__(self, step: Step) -> None:
        self.step, self.few = step, 0
        shape = (step.n, step.start + step.n)
        self.best, self.where = np.zeros(shape, np.float32), np.zeros((*shape, 2), np.int32)
        self.also = np.zeros(shape, np.int32)

    def add(self, reads: Reads, sinks: Sequence[int]) -> None:
        """The reads of a layer; those of itself and of sinks do not count."""
        keep = (reads.src != reads.dst) & ~np.isin(reads.src, list(sinks))
        weight, row, src = reads.weight[:, keep], reads.dst[keep] - self.step.start, reads.src[keep]
        if weight.size == 0:
            return
        self.few += int((weight < LEAST).sum())
        self.also[row, src] += (weight >= ALSO).sum(axis=0)
        head, most = weight.argmax(axis=0), weight.max(axis=0)
        better = most > self.best[row, src]
        row, src = row[better], src[better]
        self.best[row, src] = most[better]
        self.where[row, src] = np.stack([np.full(len(row), reads.layer), reads.heads[head[better]]], axis=1)

    def told(self, before: bool = False) -> list[Told]:
        """What is worth telling, strongest first: of the token just before each position, or of all others."""
        row, src = np.nonzero(self.best >= LEAST)
        of_it = (src == row + self.step.start - 1) == before
        row, src = row[of_it], src[of_it]
        order = np.argsort(-self.best[row, src], kind="stable")
        return [self._told(r, s) for r, s in zip(row[order].tolist(), src[order].tolist(), strict=True)]

    def _told(self, row: int, src: int) -> Told:
        layer, head = self.where[row, src].tolist()
        also = max(0, int(self.also[row, src]) - 1)
        return Told(layer, head, row + self.step.start, src, float(self.best[row, src]), also)


def _top(reads: Reads, weight: Array, most: int) -> list[Told]:
    """The strongest of a layer's reads."""
    flat = weight.reshape(-1)
    some = np.argpartition(-flat, most)[:most] if len(flat) > most else np.arange(len(flat))
    order = some[np.lexsort((some, -flat[some]))]
    head, pair = np.divmod(order, max(1, len(reads.dst)))
    return [
        Told(reads.layer, int(reads.heads[h]), int(reads.dst[p]), int(reads.src[p]), float(weight[h, p]))
        for h, p in zip(head, pair, strict=True)
    ]


def _place_of(reads: Reads, sinks: Sequence[int]) -> Array:
    """[R']: which of PLACES each read goes to."""
    kinds = [np.isin(reads.src, list(sinks)) & (reads.src != reads.dst), reads.src == reads.dst, reads.src == reads.dst - 1]
    return np.select(kinds, [PLACES.index(name) for name in ("sinks", "itself", "the token just before")], 0)


def _shares(shares: Array) -> str:
    told = [(name, share) for name, share in zip(PLACES, shares, strict=True) if share >= LEAST]
    return ", ".join(f"{share:.2f} of {name}" for name, share in told) or "nothing"


def _cut(text: str, n: int) -> str:
    return text if len(text) <= n else text[: n - 3] + "..."
