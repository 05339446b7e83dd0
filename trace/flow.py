"""Flow: the graph of what led to a prediction: its edges, their influence on it, and what is asked of it.

The nodes are the states of the residual stream, layer{l}.pos{p} for l = 0..L (entering layer l; L is the final one). With
feedback memory there is a node more for each position, pos{p}.memory, which all layers of later positions read: row L + 1.
`making.py` makes it of a trace.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from nanokv.trace import labels
from nanokv.trace.edges import EDGE, Count, Kind, count, ends
from nanokv.trace.prediction import Prediction
from nanokv.trace.sinks import Sink

if TYPE_CHECKING:
    import graphviz
    import networkx

    from nanokv.trace.knockout import How
    from nanokv.trace.paths import Way
    from nanokv.trace.verify import Proof

Array = np.ndarray
__all__ = ["EDGE", "Count", "Flow", "Kind", "Prediction", "Sink", "Tokens"]


@dataclass(frozen=True)
class Tokens:
    """The n positions up to the prediction's."""

    token_id: tuple[int, ...]
    text: tuple[str, ...]
    turn: tuple[int, ...]
    role: tuple[str, ...]
    sampled: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.text)


@dataclass(frozen=True, eq=False, repr=False)
class Flow:
    """The edges that may have led to one prediction. It is never changed: pruning makes a smaller one."""

    edges: Array  # [E] of EDGE: kind, layer, head, dst, src, weight
    influence: Array  # [E] float64: how much of what reaches the prediction passes through (spread.py)
    link: Array  # [E] float64: the weakest link on the strongest way from a crossing edge to the prediction (edges.py)
    states: Array  # [rows, n] float64: what each state counts for, in the measure's unit if that is of the prediction
    tokens: Tokens
    n_layers: int
    at: int  # the position whose prediction is explained
    prediction: Prediction
    measure: str
    heads: Literal["apart", "merged", "summed"]
    sinks: tuple[Sink, ...]
    windows: tuple[int | None, ...] = ()  # [L] how many positions one may read in the layer, itself included; None: all
    made: Count = field(default_factory=Count)  # edges of the whole run, up to this position
    total: float = 0.0  # the influence of all crossing edges before any pruning: how often, on average, it changed position
    dropped: Count = field(default_factory=Count)  # edges that are not here
    feedback: bool = False  # whether layers read memories of all depths (memory.py)
    biases: float = 0.0  # by `target`: what the biases did for the goal, beside the words
    notes: tuple[str, ...] = ()  # what was selected, in words
    proof: Proof | None = None  # what cutting its edges did
    whole: Flow | None = None  # what it was cut down from
    words: dict[str, tuple[str, float]] = field(default_factory=dict)  # by a state's id: what it would predict, with what p

    @property
    def rows(self) -> int:
        """How many rows of nodes there are: L + 1, and with feedback memory one more."""
        return self.n_layers + 1 + self.feedback

    @property
    def ends(self) -> tuple[Array, Array]:
        """The rows that each edge leads from and to, [E] each."""
        return ends(self.edges, self.n_layers, self.feedback)

    def name(self, row: int, pos: int) -> str:
        """The id of a node."""
        return f"pos{pos}.memory" if row > self.n_layers else f"layer{row}.pos{pos}"

    @property
    def crossing(self) -> Array:
        """[E] bool: the attention edges from one position to another, sinks aside. These are what pruning counts."""
        return (self.edges["kind"] == Kind.ATTENTION) & ~self.from_sinks

    @property
    def from_sinks(self) -> Array:
        """[E] bool: the attention edges to other positions that come from a sink."""
        return (self.edges["kind"] == Kind.ATTENTION) & np.isin(self.edges["src"], [sink.pos for sink in self.sinks])

    @property
    def share(self) -> float:
        """The part of the influence passing between positions that the crossing edges hold; 1 if all are there."""
        return float(self.influence[self.crossing].sum() / self.total) if self.total > 0 else 1.0

    @property
    def signed(self) -> bool:
        """Whether weights speak for and against."""
        from nanokv.trace.measures import MEASURES

        measure = MEASURES.get(self.measure)
        return bool((self.edges["weight"] < 0).any()) or (measure is not None and measure.aimed)

    def prune(self, share: float = 0.9, *, threshold: float = 0.0, top_k: int | None = None) -> Flow:
        """The flow cut down to the strongest edges that lead to the prediction; see `selection.prune`."""
        from nanokv.trace import selection

        return selection.prune(self, share, threshold, top_k)

    def select(self, **of: Any) -> Flow:
        """Only the edges of some layers, heads, src or dst positions, turns, or of one sign; see `selection.select`."""
        from nanokv.trace import selection

        return selection.select(self, **of)

    def cone(self, layer: int, pos: int, direction: Literal["up", "down"] = "down") -> Flow:
        """Only what led to a state (down), or what it led to (up); see `selection.cone`."""
        from nanokv.trace import selection

        return selection.cone(self, layer, pos, direction)

    def by_turn(self) -> Array:
        """What passed from turn to turn; see `selection.by_turn`."""
        from nanokv.trace import selection

        return selection.by_turn(self)

    def ways(self, n: int = 5) -> list[Way]:
        """The n strongest ways from a token to the prediction; see `paths.strongest`."""
        from nanokv.trace import paths

        return paths.strongest(self, n)

    def count_ways(self) -> Array:
        """How many ways lead from each state to the prediction, exactly; see `paths.count`."""
        from nanokv.trace import paths

        return paths.count(self)

    def longest_way(self) -> Way:
        """The way to the prediction that changes position most often; see `paths.longest`."""
        from nanokv.trace import paths

        return paths.longest(self)

    def minus(self, other: Flow) -> Flow:
        """The difference of this run and another as a flow of its own; see `difference.difference`."""
        from nanokv.trace.difference import difference

        return difference(self, other)

    def verify(self, model: Any, how: How = "value-zero") -> Flow:
        """The same flow with a proof: its edges cut, and others like them; see `verify.verify`."""
        from nanokv.trace import verify

        return replace(self, proof=verify.verify(self, model, how))

    def lens(self, trace: Any, model: Any) -> Flow:
        """The same flow with what each of its states would predict, were it the last one; see `lens.lens`."""
        from nanokv.trace.lens import lens

        return replace(self, words=lens(self, trace, model))

    def graph(self, **options: Any) -> graphviz.Digraph:
        """The picture as a Digraph of the graphviz package; draw it with `neato_no_op=2`, for every place is given."""
        from nanokv.trace import draw

        return draw.graph(self, **options)

    def dot(self, **options: Any) -> str:
        """The picture in the DOT language, for `neato -n2`. The same flow gives the same text, byte for byte."""
        return self.graph(**options).source

    def render(self, path: str | Path, **options: Any) -> Path:
        """Draw into a file, in the format that its suffix names: .svg, .png, .pdf or .dot. Returns the path.

        The options are those of `look.Look`: kind ("graph", "heat" or "pyramid"), title, caption, theme, width, font. Raises
        DrawError for another suffix, or if there is no program to draw with. A file that is there already is replaced only
        by a whole new one.
        """
        from nanokv.trace import draw

        return draw.render(self, Path(path), **options)

    def to_networkx(self) -> networkx.MultiDiGraph:
        """The graph for networkx; see `nodelink.to_networkx`."""
        from nanokv.trace import nodelink

        return nodelink.to_networkx(self)

    @staticmethod
    def from_networkx(graph: networkx.MultiDiGraph) -> Flow:
        """The flow of a graph that `to_networkx` made, with the edges that it still has."""
        from nanokv.trace import nodelink

        return nodelink.from_networkx(graph)

    def to_json(self) -> str:
        """The graph as node-link JSON, which networkx, d3 and others read; see `nodelink.to_json`."""
        from nanokv.trace import nodelink

        return nodelink.to_json(self)

    @staticmethod
    def from_json(text: str) -> Flow:
        """The flow that `to_json` wrote."""
        from nanokv.trace import nodelink

        return nodelink.from_json(text)

    def missing(self) -> Count:
        """How many edges of the whole run are not here."""
        here = count(self.edges, [sink.pos for sink in self.sinks])
        return Count(*(getattr(self.made, f.name) - getattr(here, f.name) for f in fields(Count)))

    def only(self, keep: Array, note: str = "") -> Flow:
        """The flow with the edges marked in `keep` [E]; what goes is counted."""
        notes = (*self.notes, note) if note else self.notes
        kept = replace(self, edges=self.edges[keep], influence=self.influence[keep], link=self.link[keep], notes=notes,
                       proof=None, whole=self.whole or self)  # fmt: skip
        return kept.counted()

    def counted(self) -> Flow:
        """The same flow, which knows how many edges of the whole run are not in it."""
        return replace(self, dropped=self.missing())

    def table(self, n: int = 20) -> str:
        """The n edges with the most influence, in words, the strongest first. Residual edges, mostly more, are aside."""
        order = np.argsort(-self.influence, kind="stable")
        order = order[self.edges["kind"][order] != Kind.RESIDUAL][:n]
        sign = "+" if self.signed else ""
        rows = [
            f"{self.influence[i]:>9.2%}  {self.edges['weight'][i]:>{sign}9.4g}  {self.in_words(self.edges[i])}" for i in order
        ]
        return "\n".join([repr(self), f"{'influence':>9}  {'weight':>9}  edge", *rows])

    def in_words(self, edge: np.void) -> str:
        """An edge in words."""
        kind, head = Kind(edge["kind"]), f" head {edge['head']}" if edge["head"] >= 0 else ""
        src, dst = (f"{labels.phrase(self.tokens.text[pos])} {pos}" for pos in (edge["src"], edge["dst"]))
        if kind == Kind.SAMPLED:
            return f"sampled: the prediction at {src} became {dst}"
        return f"layer {edge['layer']}{head} {kind.name.lower()}: " + (
            dst if edge["src"] == edge["dst"] else f"{src} -> {dst}"
        )

    def __repr__(self) -> str:
        chance = "" if self.prediction.probability is None else f" (p = {self.prediction.probability:.2g})"
        against = "" if self.prediction.against is None else f" over {labels.phrase(self.prediction.against)}"
        return (
            f"<Flow by {self.measure} to {labels.phrase(self.prediction.text)}{against}{chance} at position {self.at}: "
            f"{int(self.crossing.sum()):,} of {self.made.attention:,} attention edges, {self.share:.0%} of the influence "
            f"between positions>"
        )

    def _repr_mimebundle_(self, include: Iterable[str] | None = None, exclude: Iterable[str] | None = None) -> dict[str, str]:
        """What a notebook shows: the picture, or the table where there is no program to draw with."""
        from nanokv.trace import draw

        svg = draw.for_notebook(self)
        return {"text/plain": self.table()} | ({} if svg is None else {"image/svg+xml": svg})
