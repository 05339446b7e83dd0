"""Where two traces part: the first number that differs, in the order of computation, and each site's largest difference.

Numbers are compared position by position, however the tokens were split into calls. Equal means equal in every bit, where
NaN equals NaN and -0 is not 0; or, with a tolerance, not further apart than that. Turns, roles and calls are not compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nanokv.errors import FileFormatError, TraceError
from nanokv.trace.dump import read_dump
from nanokv.trace.ids import AFTER_THE_LAYERS, ORDER, SITES, Id, Rows, held, order, parse, recorded, resolve, unread
from nanokv.trace.store import Trace

Array = np.ndarray
Name = Callable[[tuple[int, ...]], str]  # from an element's index to its id
SIZES = ("n_layers", "n_heads", "n_kv_heads", "head_dim", "d_model", "vocab_size")  # of models that can be compared at all


@dataclass
class Site:
    """How far two traces agree at one site."""

    compared: int = 0  # numbers
    differ: int = 0
    largest: float = 0.0  # the largest difference; infinite where only one of the two is NaN or infinite
    where: str = ""  # the id of that number


@dataclass
class Difference:
    """What a comparison found."""

    names: tuple[str, str] = ("a", "b")
    tolerance: float = 0.0
    first: tuple[str, str, str] | None = None  # the first id that differs, and its value in each
    sites: dict[str, Site] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    extent: str = ""  # of what was compared, in words

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return self.first is None

    def lines(self) -> Iterator[str]:
        """What was found, in words."""
        yield from self.notes
        if self.first is None:
            how = "in every bit" if self.tolerance == 0 else f"to within {self.tolerance:g}"
            yield f"equal {how}: {sum(site.compared for site in self.sites.values()):,} numbers {self.extent}"
            return
        name, *values = self.first
        yield f"the first that differs{'' if self.tolerance == 0 else f' by more than {self.tolerance:g}'}: {name}"
        width = max(map(len, self.names))
        yield from (f"  {which:<{width}}  {value}" for which, value in zip(self.names, values, strict=True))
        if self.sites:
            yield f"{'site':<12} {'compared':>14} {'differ':>14}  largest difference"
        for site, found in sorted(self.sites.items(), key=lambda each: ORDER[each[0]]):
            largest = f"{found.largest:.3g} at {found.where}" if found.where else ""
            yield f"{site:<12} {found.compared:>14,} {found.differ:>14,}  {largest}".rstrip()

    def part(self, name: str, here: object, there: object) -> None:
        """Two things differ that are no numbers to subtract."""
        if self.first is None:
            self.first = (name, str(here), str(there))

    def shapes_part(self, here: Array, there: Array, name_of: Name) -> bool:
        """Whether two arrays have not the same shape, which is then what differs at their first element."""
        if here.shape != there.shape:
            self.part(name_of((0,) * here.ndim), *(f"one of {list(x.shape)} numbers" for x in (here, there)))
        return here.shape != there.shape

    def compare(self, site: str, here: Array, there: Array, name_of: Name) -> None:
        """Two arrays of a site, their elements in the order of computation; name_of gives an element's id."""
        found = self.sites.setdefault(site, Site())
        if self.shapes_part(here, there, name_of):
            return
        found.compared += here.size
        far = distance(here, there)
        apart = ~same(here, there) if self.tolerance == 0 else far > self.tolerance
        if not apart.any():
            return
        found.differ += int(apart.sum())
        largest = np.unravel_index(int(np.argmax(np.where(apart, far, -1))), far.shape)
        if not found.where or far[largest] > found.largest:
            found.largest, found.where = float(far[largest]), name_of(tuple(map(int, largest)))
        first = np.unravel_index(int(np.argmax(apart)), apart.shape)
        self.part(name_of(tuple(map(int, first))), here[first], there[first])


def distance(here: Array, there: Array) -> Array:
    """|a - b| in float64; 0 where both are NaN or the same infinity, infinite where only one is."""
    a, b = np.asarray(here, np.float64), np.asarray(there, np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        far = np.abs(a - b)
    return np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0, np.where(np.isnan(far), np.inf, far))


def same(here: Array, there: Array) -> Array:
    """Where two arrays have the same bits, NaN being NaN whatever its bits."""
    return ((here == there) & (np.signbit(here) == np.signbit(there))) | (np.isnan(here) & np.isnan(there))


def diff(a: Trace, b: Trace | str | Path, *, tolerance: float = 0.0, names: tuple[str, str] = ("a", "b")) -> Difference:
    """Compare a trace with another, or with a dump of some of its numbers by any program (see `dump`).

    Of two traces, what both hold is compared, in the order in which the first computed it. Where their tokens part, what
    comes before is compared. names: what the two are called in print. TraceError for traces of models of other sizes or
    without a common position; FileFormatError for a dump with a bad line, which it names.
    """
    if not tolerance >= 0:
        raise TraceError(f"the tolerance is {tolerance}; it is the largest difference that counts as none, 0 or more")
    found = Difference(names, tolerance)
    if isinstance(b, Trace):
        _compare_traces(a, b, found)
    else:
        _compare_dump(a, Path(b), found)
    return found


def _compare_traces(a: Trace, b: Trace, found: Difference) -> None:
    for name in SIZES:
        if getattr(a.config, name) != getattr(b.config, name):
            raise TraceError(f"traces of models of other sizes cannot be compared: {name} is {getattr(a.config, name)} in "
                             f"{found.names[0]} and {getattr(b.config, name)} in {found.names[1]}")  # fmt: skip
    if a.level != b.level:
        levels = f"{found.names[0]} has level {a.level}, {found.names[1]} has level {b.level}"
        found.notes.append(f"{levels}: what both hold is compared")
    if a.topk != b.topk:
        kept = " and ".join("all" if t.topk is None else f"the {t.topk} largest" for t in (a, b))
        found.notes.append(f"weights and scores are not compared, for of each row {kept} were kept")
    begin, end, parting = _common(a, b, found)
    found.extent = f"at {end - begin:,} positions"
    for step in a.steps:
        low, high = max(begin, step.start), min(end, step.start + step.n)
        if low < high:
            for layer in range(a.config.n_layers):
                _compare_layer(a, b, layer, low, high, found)
            for site in AFTER_THE_LAYERS:
                _compare_after(a, b, site, low, high, found)
    if parting is not None:
        found.part(*parting)


def _common(a: Trace, b: Trace, found: Difference) -> tuple[int, int, tuple[str, object, object] | None]:
    """The positions to compare, those before the first token that differs; and where the sequences part, if they do."""
    begins = [t._recorded()[0].start for t in (a, b)]
    ends = [t.steps[-1].start + t.steps[-1].n for t in (a, b)]
    begin, end = max(begins), min(ends)
    if begin >= end:
        raise TraceError(f"{found.names[0]} and {found.names[1]} have no position in common")
    if begins[0] != begins[1]:
        found.notes.append(f"{found.names[0]} begins at position {begins[0]}, {found.names[1]} at {begins[1]}")
    ours, theirs = (t.tokens["token_id"][begin - first : end - first] for t, first in zip((a, b), begins, strict=True))
    other = np.flatnonzero(ours != theirs)
    if other.size:
        at = begin + int(other[0])
        return begin, at, (f"pos{at}.token_id", ours[other[0]], theirs[other[0]])
    if ends[0] != ends[1]:
        return begin, end, (f"pos{end}", *("nothing, it has ended" if last == end else "there" for last in ends))  # type: ignore[return-value]
    return begin, end, None


def _compare_layer(a: Trace, b: Trace, layer: int, low: int, high: int, found: Difference) -> None:
    for name in ("read_first", "read_stop"):
        _compare_marks(a, b, name, layer, low, high, found)
    if found.tolerance == 0 and not (held(a, "k") and held(b, "k")):
        for name in ("k_hash", "v_hash"):
            _compare_marks(a, b, name, layer, low, high, found)
    for site in SITES.values():
        if site.name in AFTER_THE_LAYERS or not (held(a, site.name) and held(b, site.name)):
            continue
        if "S" in site.axes:
            if a.topk == b.topk:
                _compare_reads(a, b, site.name, layer, low, high, found)
        else:
            ours, theirs = (_rows(trace, site.name, layer, low, high) for trace in (a, b))
            found.compare(site.name, ours, theirs, _namer(site.name, layer, low))


def _rows(trace: Trace, name: str, layer: int, low: int, high: int) -> Array:
    """An array's rows at positions low to high - 1, from the calls that computed them."""
    steps = [step for step in trace.steps if low < step.start + step.n and step.start < high]
    parts = [trace._array(step, name)[layer, max(0, low - step.start) : high - step.start] for step in steps]
    return np.concatenate(parts)


def _compare_marks(a: Trace, b: Trace, name: str, layer: int, low: int, high: int, found: Difference) -> None:
    """Whole numbers that must be the same: which slots were read, and the hashes of what was written."""
    def mark(at: tuple[int, ...]) -> str:
        return f"layer{layer}.pos{low + at[0]}.{name}" + (f"[{at[1]}]" if len(at) > 1 else "")

    ours, theirs = (_rows(trace, name, layer, low, high) for trace in (a, b))
    if found.shapes_part(ours, theirs, mark):
        return
    for at in map(tuple, np.argwhere(ours != theirs)[:1].tolist()):
        found.part(mark(at), *(f"{x[at]:#018x}" if "hash" in name else x[at] for x in (ours, theirs)))


def _namer(site: str, layer: int | None, low: int) -> Name:
    """The id of an element of an array whose rows are positions from `low` on."""
    return lambda at: str(Id(site, layer, low + at[0], index=at[1:]))


def _compare_reads(a: Trace, b: Trace, site: str, layer: int, low: int, high: int, found: Difference) -> None:
    ours, theirs = Rows(a, site, layer), Rows(b, site, layer)
    for pos in range(low, high):
        rows = ours.at(pos), theirs.at(pos)  # [H, S]; a wrong mask has its own S
        width = max(x.shape[1] for x in rows)
        one, other = (np.pad(x, ((0, 0), (0, width - x.shape[1])), constant_values=unread(site)) for x in rows)
        found.compare(site, one[None], other[None], _namer(site, layer, pos))


def _compare_after(a: Trace, b: Trace, site: str, low: int, high: int, found: Difference) -> None:
    """Where both have it: a call may have been asked for the logits of its last position only."""
    for pos in range(low, high) if held(a, site) and held(b, site) else ():
        if all(pos >= step.start + step.n - len(step.arrays[site]) for step in (t._step_of(pos) for t in (a, b))):
            ours, theirs = (recorded(trace, Id(site, None, pos))[None] for trace in (a, b))
            found.compare(site, ours, theirs, _namer(site, None, pos))


def _compare_dump(trace: Trace, path: Path, found: Difference) -> None:
    """Compare the ids that a dump has, whatever their order, with the trace."""
    missing: dict[str, int] = {}
    earliest: tuple[int, ...] = ()
    ids = 0
    for line, name, value in read_dump(path):
        try:
            given = parse(name)
            if not held(trace, given.site):
                missing[given.site] = missing.get(given.site, 0) + 1
                continue
            array, id_of = resolve(trace, given)
        except TraceError as error:
            raise FileFormatError(f"{path} line {line}: {error}") from error
        if array.shape != value.shape:
            shapes = f"{list(value.shape)} here and {list(array.shape)} in the trace"
            raise FileFormatError(f"{path} line {line}: {name} has shape {shapes}")
        ids += 1
        one = Difference(tolerance=found.tolerance, sites=found.sites)
        one.compare(given.site, array, value.astype(array.dtype), lambda index, id_of=id_of: str(id_of(index)))  # type: ignore[misc]
        if one.first is not None and (not earliest or order(trace, parse(one.first[0])) < earliest):
            earliest, found.first = order(trace, parse(one.first[0])), one.first
    if missing:
        counts = ", ".join(f"{n:,} of {site}" for site, n in missing.items())
        found.notes.append(f"ids that a trace of level {trace.level} does not hold: {counts}")
    if ids == 0:
        raise TraceError(f"{path} has no id that the trace holds" + (f" ({found.notes[-1]})" if missing else ""))
    found.extent = f"of {ids:,} id{'s' * (ids > 1)}"
