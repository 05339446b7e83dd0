"""Flow: the graph of what led to a prediction: its edges, their influence on it, and pruning to what counts.

The nodes are the states of the residual stream, layer{l}.pos{p} for l = 0..L (entering layer l; L is the final one).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from nanokv.config import Config
from nanokv.errors import TraceError
from nanokv.trace import labels, measures, schema
from nanokv.trace.edges import EDGE, Kind, influence, layer_edges, on_the_way, sampled_edges, weakest_link
from nanokv.trace.measures import Goal, LayerWeights, TraceLike, received

if TYPE_CHECKING:
    import graphviz

MOST_EDGES = 20_000_000  # attention edges of one flow; it takes about 80 bytes for each

__all__ = ["EDGE", "Count", "Flow", "Kind", "Prediction", "Sink", "Tokens", "find_sinks", "flow"]


@dataclass(frozen=True)
class Prediction:
    """What is predicted at the flow's end."""

    token_id: int | None  # None where neither logits nor a drawn token are recorded
    text: str
    probability: float | None = None  # None where the trace holds no logits
    against: str | None = None  # the text of the token that it is compared with


@dataclass(frozen=True)
class Sink:
    """A position that draws much attention and gives little. The edges from it are set apart."""

    pos: int
    share: float  # of the attention of the positions after it (the next one aside), mean over layers and heads


@dataclass(frozen=True)
class Count:
    """Numbers of edges."""

    crossing: int = 0  # attention from one position to another, sinks aside
    sinks: int = 0  # attention from sinks
    others: int = 0  # self-attention, residual, MLP, sampled


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

    edges: np.ndarray  # [E] of EDGE: kind, layer, head, dst, src, weight
    influence: np.ndarray  # [E] float64, 0..1: how much of what reaches the prediction passes through (edges.influence)
    tokens: Tokens
    n_layers: int
    at: int  # the position whose prediction is explained
    prediction: Prediction
    measure: str
    heads: Literal["apart", "merged"]
    sinks: tuple[Sink, ...]
    made: Count = field(default_factory=Count)  # edges before any pruning
    total: float = 0.0  # the influence of all crossing edges before any pruning: how often, on average, it changed position
    dropped: Count = field(default_factory=Count)  # edges that pruning took away

    @property
    def crossing(self) -> np.ndarray:
        """[E] bool: the attention edges from one position to another, sinks aside. These are what pruning counts."""
        return (self.edges["kind"] == Kind.ATTENTION) & ~self.from_sinks

    @property
    def from_sinks(self) -> np.ndarray:
        """[E] bool: the attention edges to other positions that come from a sink."""
        return (self.edges["kind"] == Kind.ATTENTION) & np.isin(self.edges["src"], [sink.pos for sink in self.sinks])

    @property
    def share(self) -> float:
        """The part of the influence passing between positions that the crossing edges hold; 1 if all are there."""
        return float(self.influence[self.crossing].sum() / self.total) if self.total > 0 else 1.0

    def prune(self, share: float = 0.9, *, threshold: float = 0.0, top_k: int | None = None) -> Flow:
        """The flow cut down to the strongest edges that lead to the prediction.

        Crossing edges are taken until they hold `share` of all influence that passes between positions. They are taken
        in the order of the weakest link on the strongest way from them to the prediction, so that each is connected to
        it by those taken before. None is taken whose way has a link of less influence than `threshold`, nor more than
        `top_k`. Edges from sinks go. Of the rest, what lies on a way from a token to the prediction stays: residual
        edges, and those of the others that have no less influence than the weakest link taken (edges.on_the_way).
        """
        if not 0 <= share <= 1:
            raise TraceError(f"share is {share!r}; it is the part of the influence to keep, from 0 to 1")
        if top_k is not None and top_k < 0:
            raise TraceError(f"top_k is {top_k!r}; it is the most edges to keep, 0 or more")
        link = weakest_link(self.edges, self.crossing, self.influence, self.n_layers, self.at)
        order = np.flatnonzero((link > 0) & (link >= threshold))
        # Of equal links the one with the later dst comes first: a way to the prediction leads on to later positions.
        order = order[np.lexsort((order, -self.edges["dst"][order], -link[order]))][:top_k]
        held = np.concatenate([[0.0], np.cumsum(self.influence[order])])
        enough = share * self.total * (1 - 1e-12)  # or else rounding might take one edge too many
        taken = order[: int(np.searchsorted(held, enough))]
        keep = np.zeros(len(self.edges), bool)
        keep[taken] = True
        strong = self.influence >= max(threshold, float(link[taken].min(initial=1.0)))
        return self._only(keep | on_the_way(self.edges, keep, strong, self.n_layers, self.at))

    def _only(self, keep: np.ndarray) -> Flow:
        before, kept = _count(self), replace(self, edges=self.edges[keep], influence=self.influence[keep])
        after = _count(kept)
        lost = {f.name: getattr(before, f.name) - getattr(after, f.name) for f in fields(Count)}
        return replace(kept, dropped=Count(**{name: getattr(self.dropped, name) + n for name, n in lost.items()}))

    def graph(self, **options: Any) -> graphviz.Digraph:
        """The picture as a Digraph of the graphviz package; draw it with `neato_no_op=2`, for every place is given."""
        from nanokv.trace import draw

        return draw.graph(self, **options)

    def dot(self, **options: Any) -> str:
        """The picture in the DOT language, for `neato -n2`. The same flow gives the same text, byte for byte."""
        return self.graph(**options).source

    def render(self, path: str | Path, *, title: str | None = None) -> Path:
        """Draw into a file, in the format that its suffix names: .svg, .png, .pdf or .dot. Returns the path.

        Raises DrawError for another suffix, or if there is no program to draw with. A file that is there already is
        replaced only by a whole new one.
        """
        from nanokv.trace import draw

        return draw.render(self, Path(path), title=title)

    def table(self, n: int = 20) -> str:
        """The n edges with the most influence, in words, the strongest first. Residual edges, mostly more, are aside."""
        order = np.argsort(-self.influence, kind="stable")
        order = order[self.edges["kind"][order] != Kind.RESIDUAL][:n]
        rows = [f"{self.influence[i]:>9.2%}  {self.edges['weight'][i]:>9.4g}  {_in_words(self, self.edges[i])}" for i in order]
        return "\n".join([repr(self), f"{'influence':>9}  {'weight':>9}  edge", *rows])

    def __repr__(self) -> str:
        chance = "" if self.prediction.probability is None else f" (p = {self.prediction.probability:.2g})"
        kept, made = _count(self).crossing, self.made.crossing
        return (
            f"<Flow by {self.measure} to {labels.phrase(self.prediction.text)}{chance} at position {self.at}: "
            f"{kept:,} of {made:,} attention edges, {self.share:.0%} of their influence>"
        )

    def _repr_svg_(self) -> str | None:
        from nanokv.trace import draw

        return draw.for_notebook(self)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        """What a notebook shows: the picture, or the table where there is no program to draw with."""
        svg = self._repr_svg_()
        return {"text/plain": self.table()} | ({} if svg is None else {"image/svg+xml": svg})


def flow(trace: TraceLike, model: Any = None, *, measure: str, at: int = -1, token: int | str | None = None,
         against: int | str | None = None, heads: Literal["apart", "merged"] = "apart",
         sinks: Sequence[int] | None = None) -> Flow:  # fmt: skip
    """The flow to the prediction at position `at` (from the end if negative), its edges weighed by a measure.

    `token` and `against`, ids or text, are the predicted token to look at instead of the likeliest, and the one to
    compare it with, which only a measure that aims at a logit can do. `sinks` are the positions to set apart; if None,
    those that `find_sinks` recognises. Raises TraceError for what this trace does not hold.
    """
    chosen, tokens = measures.find(measure, trace, model), trace.tokens
    n = len(tokens["text"])
    if not -n <= at < n:
        raise TraceError(f"the trace has no position {at}: it has {n} tokens, at 0 to {n - 1}")
    if heads not in ("apart", "merged"):
        raise TraceError(f"heads is {heads!r}; it must be 'apart' or 'merged'")
    if against is not None and not chosen.aimed:
        raise TraceError(
            f"measure {measure!r} is the same whatever is predicted, so there is nothing to take against another token"
        )
    at %= n
    _check_size(trace.config, at + 1, heads)
    prediction, against_id = _predict(trace, model, at, token, against)
    weights = chosen.weights(trace, model, Goal(at, prediction.token_id, against_id), heads == "merged")
    layers = sorted(weights, key=lambda layer: layer.layer)
    sampled = np.flatnonzero(tokens["sampled"][1 : at + 1]) + 1
    edges = np.concatenate([*(layer_edges(layer, heads == "merged") for layer in layers), sampled_edges(sampled)])
    columns = {f.name: tuple(np.asarray(tokens[f.name])[: at + 1].tolist()) for f in fields(Tokens)}
    apart = find_sinks(layers) if sinks is None else tuple(_sink(layers, pos) for pos in sinks)
    made = Flow(edges, np.zeros(len(edges)), Tokens(**columns), trace.config.n_layers, at, prediction, measure, heads, apart)
    passes = influence(edges, made.from_sinks, made.n_layers, at)
    return replace(made, influence=passes, made=_count(made), total=float(passes[made.crossing].sum()))


def _check_size(config: Config, n: int, heads: str) -> None:
    edges = config.n_layers * (config.n_heads if heads == "apart" else 1) * n * (n + 1) // 2
    if edges > MOST_EDGES:
        ways = ["end the flow at an earlier position (at=...)"] + ["merge the heads (heads='merged')"] * (heads == "apart")
        raise TraceError(
            f"a flow over {n:,} positions would have {edges:,} edges, more than {MOST_EDGES:,}: {' or '.join(ways)}"
        )


def find_sinks(layers: Sequence[LayerWeights]) -> tuple[Sink, ...]:
    """The positions that draw much attention and give little.

    In most layers they draw more than 0.3 of the attention, and twice what they would if it were spread evenly, on
    average over heads and over the positions after them (the next one aside), of which there must be three. And, where
    the measure knows it, they move less than half of what others do: the median over layers and heads of ||v_j W_O^h||
    over that of the median position.
    """
    n = layers[0].received.size
    evenly = received(np.tri(n)[None] / np.arange(1, n + 1)[:, None])
    draws = np.mean([layer.received > np.maximum(0.3, 2 * evenly) for layer in layers], axis=0) > 0.5  # [n]
    draws[-4:] = False
    moved = [layer.moved for layer in layers if layer.moved is not None]
    if len(moved) == len(layers):
        lengths = np.stack(moved)  # [L, H, n]
        usual = np.maximum(np.median(lengths, axis=-1, keepdims=True), np.finfo(np.float32).tiny)
        draws &= np.median(lengths / usual, axis=(0, 1)) < 0.5
    return tuple(_sink(layers, int(pos)) for pos in np.flatnonzero(draws))


def _sink(layers: Sequence[LayerWeights], pos: int) -> Sink:
    return Sink(pos, float(np.mean([layer.received[pos] for layer in layers])))


def _count(flow: Flow) -> Count:
    crossing, sinks = int(flow.crossing.sum()), int(flow.from_sinks.sum())
    return Count(crossing, sinks, len(flow.edges) - crossing - sinks)


def _in_words(flow: Flow, edge: np.void) -> str:
    kind, head = Kind(edge["kind"]), f" head {edge['head']}" if edge["head"] >= 0 else ""
    src, dst = (f"{labels.phrase(flow.tokens.text[pos])} {pos}" for pos in (edge["src"], edge["dst"]))
    if kind == Kind.SAMPLED:
        return f"sampled: the prediction at {src} became {dst}"
    return f"layer {edge['layer']}{head} {kind.name.lower()}: " + (dst if edge["src"] == edge["dst"] else f"{src} -> {dst}")


def _predict(trace: TraceLike, model: Any, at: int, token: int | str | None,
             against: int | str | None) -> tuple[Prediction, int | None]:  # fmt: skip
    """The prediction at `at`, and the id of the token that it is taken against."""
    tokens, chosen = trace.tokens, None
    logits = trace.logits(at) if schema.holds(trace.level, "states") else None
    if token is not None:
        chosen = _token_id(trace, model, token)
    elif logits is not None:
        chosen = int(np.argmax(logits))
    elif at + 1 < len(tokens["text"]) and tokens["sampled"][at + 1]:
        chosen = int(tokens["token_id"][at + 1])
    probability = None
    if logits is not None and chosen is not None:
        above = np.exp(logits.astype(np.float64) - float(logits.max()))
        probability = float(above[chosen] / above.sum())
    other = None if against is None else _token_id(trace, model, against)
    text = "?" if chosen is None else _text_of(trace, model, chosen)
    return Prediction(chosen, text, probability, None if other is None else _text_of(trace, model, other)), other


def _token_id(trace: TraceLike, model: Any, token: int | str) -> int:
    if isinstance(token, str):
        found = _ids_of(trace, model, token)
        if len(found) != 1:
            raise TraceError(
                f"the text {token!r} is {len(found)} tokens here, and one is needed. A space before it makes another "
                "token of it; an id will do as well"
            )
        token = found[0]
    if not 0 <= token < trace.config.vocab_size:
        raise TraceError(f"token id {token} is outside the vocabulary, 0 to {trace.config.vocab_size - 1}")
    return token


def _ids_of(trace: TraceLike, model: Any, text: str) -> list[int]:
    """The ids of a text: of the one token in the trace that reads so, or else as the tokenizer has it."""
    tokens, tokenizer = trace.tokens, getattr(model, "tokenizer", None)
    seen = np.unique(tokens["token_id"][tokens["text"] == text]).tolist()
    if len(seen) == 1 or tokenizer is None:
        return list(seen)
    begin = len(tokenizer.encode(""))  # what begins every text, such as <bos>, is not meant
    return [int(token) for token in tokenizer.encode(text)[begin:]]


def _text_of(trace: TraceLike, model: Any, token_id: int) -> str:
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is not None:
        return str(tokenizer.piece(token_id))
    tokens = trace.tokens
    seen = np.flatnonzero(tokens["token_id"] == token_id)
    return str(tokens["text"][seen[0]]) if len(seen) else f"#{token_id}"
