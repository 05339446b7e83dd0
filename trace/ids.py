"""Ids: the names of a trace's numbers, and where each stands.

    layer1.pos5              the residual stream entering layer 1 at position 5, [D]; layer L is the final state
    layer1.pos5.attn_out     another site there; SITES says which there are
    layer1.pos5.head2.pattern    one head's part of a site
    step3.layer1.head2.pattern   a whole call's, a row for each of its positions
    pos5.logits, step3.logits    what belongs to no layer

An element is chosen behind the id, by its indices in the array that the id names: layer1.pos5[7], layer1.pos5.k[0,3].
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from nanokv.errors import TraceError
from nanokv.trace import schema
from nanokv.trace.store import Step, Trace

Array = np.ndarray


@dataclass(frozen=True)
class Site:
    """A place of a layer (or after the last) where a position has numbers. `why` tells each; a trace holds only some."""

    name: str
    axes: tuple[str, ...]  # of the array of one position, in the letters of the code
    meaning: str
    stored: str | None = ""  # the array of schema.STEP that holds it: that of its own name; None: no trace holds it

    @property
    def array(self) -> str | None:
        """The array that holds it."""
        return self.name if self.stored == "" else self.stored


# In the order of computation.
SITES = {
    site.name: site
    for site in (
        Site("resid_pre", ("D",), "the residual stream entering the layer"),
        Site("ln1", ("D",), "that, normed for attention", None),
        Site("q", ("H", "hd"), "the queries, after RoPE"),
        Site("k", ("G", "hd"), "the keys as cached, after RoPE"),
        Site("v", ("G", "hd"), "the values as cached"),
        Site("scores", ("H", "S"), "the scores q . k, scaled", "score"),
        Site("pattern", ("H", "S"), "the attention weights", "weight"),
        Site("z", ("H", "hd"), "what each head found: the mean of the values, by weight"),
        Site("attn_out", ("D",), "what attention adds to the stream"),
        Site("resid_mid", ("D",), "the stream between attention and MLP"),
        Site("ln2", ("D",), "that, normed for the MLP", None),
        Site("gate", ("F",), "the MLP's gate, before its activation", None),
        Site("up", ("F",), "the MLP's input", None),
        Site("act", ("F",), "the MLP's units", None),
        Site("mlp_out", ("D",), "what the MLP adds to the stream"),
        Site("resid_post", ("D",), "the stream leaving the layer"),
        Site("memory", ("D",), "what a feedback model keeps of all depths, by their shares", None),
        Site("ln_memory", ("D",), "that, normed for the keys and values of the layer", None),
        Site("final_scale", (), "what the final norm multiplies by"),
        Site("ln_final", ("D",), "the final state, normed", None),
        Site("logits", ("V",), "the logits"),
    )
}
ORDER = {name: rank for rank, name in enumerate(SITES)}
AFTER_THE_LAYERS = ("memory", "final_scale", "ln_final", "logits")

_FORMS = (
    r"layer(?P<layer>\d+)\.pos(?P<pos>\d+)(\.head(?P<head>\d+))?(\.(?P<site>\w+))?",
    r"step(?P<step>\d+)\.layer(?P<layer>\d+)(\.head(?P<head>\d+))?\.(?P<site>\w+)",
    r"pos(?P<pos>\d+)\.(?P<site>\w+)",
    r"step(?P<step>\d+)\.(?P<site>\w+)",
)


@dataclass(frozen=True)
class Id:
    """An id's parts. Either pos or step is set; layer is None after the layers; index is () for a whole array."""

    site: str
    layer: int | None = None
    pos: int | None = None
    step: int | None = None
    head: int | None = None
    index: tuple[int, ...] = ()

    def __str__(self) -> str:
        parts = [f"{name}{value}" for name, value in (("step", self.step), ("layer", self.layer), ("pos", self.pos),
                                                      ("head", self.head)) if value is not None]  # fmt: skip
        plain = self.site == "resid_pre" and self.step is None and self.head is None
        element = f"[{','.join(map(str, self.index))}]" if self.index else ""
        return ".".join(parts if plain else [*parts, self.site]) + element


def parse(name: str) -> Id:
    """The parts of an id; TraceError if it is none."""
    array, elements = name.strip(), ""
    if whole := re.fullmatch(r"([^\[\]]*)\[([\d,\s]+)\]", array):
        array, elements = whole[1], whole[2]
    for form in _FORMS:
        match = re.fullmatch(form, array)
        site = None if match is None else match["site"] or "resid_pre"
        if match is not None and site in SITES and ("layer" in match.groupdict()) != (site in AFTER_THE_LAYERS):
            numbers = {part: int(text) for part, text in match.groupdict().items() if part != "site" and text}
            index = tuple(int(part) for part in elements.split(",") if part.strip())
            if "head" not in numbers or "H" in SITES[site].axes:
                return Id(site, index=index, **numbers)
    raise TraceError(f"{name!r} is no id; ids look like layer1.pos5, layer1.pos5.mlp_out[7], step3.layer1.head2.pattern, "
                     f"pos5.logits. Sites are {', '.join(SITES)}")  # fmt: skip


def at_position(trace: Trace, given: Id) -> Id:
    """The same number or array of one position, as layer{l}.pos{p}.site[...], with its head among the indices.

    An id of a call needs an index to say which of its positions is meant. TraceError where the trace has no such
    position, layer, head or element.
    """
    index, pos = given.index, given.pos
    if given.step is not None:
        pos, index = _row_of_a_call(trace, given)
    assert pos is not None
    trace._step_of(pos)
    index = index if given.head is None else (given.head, *index)
    found = Id(given.site, given.layer, pos, index=index)
    if found.site == "resid_pre" and found.layer == trace.config.n_layers:
        found = replace(found, site="resid_post", layer=found.layer - 1)
    if found.layer is not None:
        trace._layer(found.layer)
    _check_index(trace, given, found)
    return found


def _row_of_a_call(trace: Trace, given: Id) -> tuple[int, tuple[int, ...]]:
    """The position that an element of a whole call's array belongs to, and its index in that position's array."""
    assert given.step is not None
    step, axes, index = trace._numbered(given.step), SITES[given.site].axes, given.index
    first, last = step.start, step.start + step.n - 1
    if given.layer is None and held(trace, given.site):
        first = last + 1 - len(trace._array(step, given.site))  # the last T' positions
    axis = 1 if "S" in axes and given.head is None else 0  # [H, T, S], else [T, ...]
    if len(index) <= axis:
        n = 1 + len(axes) - (given.head is not None)
        raise TraceError(f"{given} is a whole call's: choose a number, as in {replace(given, index=(0,) * n)}")
    if index[axis] > last - first:
        raise TraceError(
            f"{given} is not there: step {given.step} has rows 0 to {last - first}, for positions {first} to {last}"
        )
    return first + index[axis], index[:axis] + index[axis + 1 :]


def _check_index(trace: Trace, given: Id, found: Id) -> None:
    if found.site == "gate" and not trace.config.gated_mlp:
        raise TraceError(f"{given} is not there: this model's MLP has no gate")
    if "memory" in found.site and trace.about.architecture != "feedback":
        raise TraceError(f"{given} is not there: only a feedback model keeps a memory of all depths")
    shape = shape_at(trace, found)
    if len(found.index) > len(shape) or any(i >= n for i, n in zip(found.index, shape, strict=False)):
        axes = SITES[found.site].axes
        raise TraceError(f"{given} is not there: {found.site} of a position is {list(axes)} = {list(shape)}, counted from 0"
                         + (f" (S: the positions up to {found.pos})" if "S" in axes else ""))  # fmt: skip


def shape_at(trace: Trace, where: Id) -> tuple[int, ...]:
    """The shape of a site's array at a position."""
    c, assumed = trace.config, where.pos or 0
    sizes = {"D": c.d_model, "H": c.n_heads, "hd": c.head_dim, "G": c.n_kv_heads, "F": c.d_ff, "V": c.vocab_size,
             "S": assumed + 1}  # fmt: skip
    return tuple(sizes[axis] for axis in SITES[where.site].axes)


def held(trace: Trace, site: str) -> bool:
    """Whether the trace's level holds a site."""
    array = SITES[site].array
    return array is not None and schema.holds(trace.level, schema.level_of(array))


def reads(step: Step, layer: int, pos: int) -> tuple[int, int]:
    """The first slot that a position of a call read in a layer, and one past the last."""
    t = pos - step.start
    return int(step.arrays["read_first"][layer, t]), int(step.arrays["read_stop"][layer, t])


def unread(site: str) -> float:
    """What pattern or scores have where nothing was read."""
    return 0.0 if site == "pattern" else -np.inf


class Rows:
    """The rows of pattern or scores in a layer, position by position; the call looked at last is kept at hand."""

    def __init__(self, trace: Trace, site: str, layer: int) -> None:
        self._trace, self._site, self._layer = trace, site, layer
        self._step: Step | None = None
        self._reads, self._ends = np.zeros((0, 0)), np.zeros(0)

    def at(self, pos: int) -> Array:
        """[H, S]: what was not read is 0, or -inf; what topk did not keep is 0, or NaN. S is pos + 1, or more where a wrong
        mask let the position read on."""
        step = self._trace._step_of(pos)
        if step is not self._step:
            array = SITES[self._site].array
            assert array is not None
            self._trace._array(step, array)
            counts = step.arrays["read_stop"][self._layer] - step.arrays["read_first"][self._layer]
            self._step, self._reads = step, step.reads(array, self._layer)
            self._ends = np.cumsum(np.r_[0, counts.astype(np.int64)])
        first, stop = reads(step, self._layer, pos)
        rows = np.full((len(self._reads), max(pos + 1, stop)), unread(self._site), self._reads.dtype)
        t = pos - step.start
        rows[:, first:stop] = self._reads[:, self._ends[t] : self._ends[t + 1]]
        return rows


def array(trace: Trace, where: Id) -> Array:
    """The array, or with an index the number, that an id names. TraceError where the trace has no such thing."""
    stored, layer, index = SITES[where.site].array, where.layer, where.index
    if stored is None:
        raise TraceError(f"{where.site} is in no trace: nanokv why computes it with the model")
    if layer is None:
        return np.asarray(_after_the_layers(trace, where, stored)[index])
    if where.site == "resid_pre" and layer == trace.config.n_layers:
        stored, layer = "resid_post", layer - 1
    step = _call_of(trace, where)
    head = slice(None) if where.head is None else trace._head(where.head)
    if "S" in SITES[where.site].axes:
        whole = _call_rows(trace, step, trace._layer(layer), where.site)[head]  # [H, T, S]
        return np.asarray((whole if where.pos is None else whole[..., where.pos - step.start, : where.pos + 1])[index])
    whole = trace._array(step, stored)[trace._layer(layer)]  # [T, ..]
    whole = whole if where.head is None else whole[:, head]
    return np.asarray((whole if where.pos is None else whole[where.pos - step.start])[index])


def _call_of(trace: Trace, where: Id) -> Step:
    return trace._numbered(where.step) if where.step is not None else trace._step_of(where.pos or 0)


def _call_rows(trace: Trace, step: Step, layer: int, site: str) -> Array:
    """pattern or scores of a call, [H, T, S]."""
    rows = np.full((trace.config.n_heads, step.n, step.start + step.n), unread(site), np.float32)
    trace._array(step, str(SITES[site].array))
    dst, src = step.pairs(layer)
    rows[:, dst - step.start, src] = step.reads(str(SITES[site].array), layer)
    return rows


def _after_the_layers(trace: Trace, where: Id, stored: str) -> Array:
    step = _call_of(trace, where)
    whole = trace._array(step, stored)  # [T', ..]
    if where.pos is None:
        return whole
    row = where.pos - (step.start + step.n - len(whole))
    if row < 0:
        raise TraceError(f"the call that computed position {where.pos} was asked for its last logits only")
    return np.asarray(whole[row])


def recorded(trace: Trace, where: Id) -> Array:
    """The array of a site at a position, as the trace holds it; S, where it has that axis, is the positions up to there, or
    more where a wrong mask let it read on.

    `where` is of the form that at_position gives. TraceError where the level does not hold it.
    """
    if where.layer is not None and where.pos is not None and "S" in SITES[where.site].axes:
        return Rows(trace, where.site, where.layer).at(where.pos)
    return array(trace, replace(where, index=()))


def resolve(trace: Trace, given: Id) -> tuple[Array, Callable[[tuple[int, ...]], Id]]:
    """The array that an id names, and a function from an index in it to the id of that number, as at_position gives it.

    TraceError where the trace has no such thing, or its level does not hold it.
    """
    if given.step is None or given.index:
        at = at_position(trace, given)
        return np.asarray(recorded(trace, at)[at.index]), lambda index: replace(at, index=at.index + index)
    step, site = trace._numbered(given.step), given.site
    whole = array(trace, given)
    if given.layer is None:
        first = step.start + step.n - len(whole)
        return whole, lambda index: Id(site, None, first + index[0], index=index[1:])
    head = () if given.head is None else (given.head,)
    if "S" in SITES[site].axes and given.head is None:
        return whole, lambda index: Id(site, given.layer, step.start + index[1], index=(index[0], index[2]))
    return whole, lambda index: Id(site, given.layer, step.start + index[0], index=(*head, *index[1:]))


def order(trace: Trace, at: Id) -> tuple[int, ...]:
    """A key that sorts numbers, given as at_position gives them, in the order in which the trace computed them."""
    assert at.pos is not None
    layer = trace.config.n_layers if at.layer is None else at.layer
    return trace._step_of(at.pos).number, layer, ORDER[at.site], at.pos, *at.index
