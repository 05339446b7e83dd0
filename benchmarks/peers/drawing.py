"""Flow graphs: from a trace to a picture, and a large graph laid out by us and by graphviz."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import numpy as np

import nanokv
from nanokv.trace import Flow, Recorder, Trace, draw
from nanokv.trace.flow import EDGE, Count, Kind, Prediction, Tokens
from nanokv.trace.layout import arrange
from nanokv.trace.look import Look

SHOWN = 30  # attention edges that a flow is pruned to, as by the command


class Drawing:
    """nanokv's pictures. Times are seconds."""

    def __init__(self, tokens: list[int], threads: int, path: str) -> None:
        self.tokens, self.path = np.array(tokens, np.int32), path
        self.program = draw.find_program()
        if self.program is None:
            raise RuntimeError("found no graphviz (pip install 'nanokv[dot]')")
        nanokv.set_threads(threads)

    def about(self) -> str:
        """Who draws."""
        assert self.program is not None
        return f"drawn by {Path(self.program.path).name}"

    def record(self, n: int, folder: str) -> None:
        """A prefill of n tokens, recorded with its states."""
        with Recorder(folder, level="states") as recorder:
            nanokv.load(self.path).forward(self.tokens[:n], observer=recorder, last_logits_only=True)

    def from_trace(self, folder: str, measure: str) -> dict[str, float]:
        """From that trace to the picture of its last prediction: the whole graph, the strongest of it, the SVG."""
        model, seconds = nanokv.load(self.path), {}
        began = time.perf_counter()
        flow = Trace.load(folder).flow(model, measure=measure)
        seconds["flow"] = time.perf_counter() - began
        kept = flow.prune(1.0, top_k=SHOWN)
        seconds["pruning"] = time.perf_counter() - began - sum(seconds.values())
        kept.render(Path(folder).with_suffix(".svg"))
        seconds["picture"] = time.perf_counter() - began - sum(seconds.values())
        return seconds

    def graph(self, n_layers: int, n: int, n_edges: int, folder: str) -> dict[str, float]:
        """A graph of so many layers, positions and edges, none of them pruned, to SVG."""
        flow, look, seconds = graph(n_layers, n, n_edges), Look(), {}
        began = time.perf_counter()
        scene = arrange(flow, look)
        seconds["layout"] = time.perf_counter() - began
        svg = draw.drawn(lambda _: scene, "svg", look)
        seconds["picture"] = time.perf_counter() - began - seconds["layout"]
        Path(folder, "graph.svg").write_bytes(svg)
        return seconds

    def layered(self, n_layers: int, n: int, n_edges: int, most: float) -> float | None:
        """The same graph laid out in layers by graphviz's `dot`, to SVG; None if it takes more than `most` seconds."""
        assert self.program is not None
        edges = graph(n_layers, n, n_edges).edges
        lines = (f"l{edge['layer']}p{edge['src']} -> l{edge['layer'] + 1}p{edge['dst']}" for edge in edges)
        dot = "digraph { rankdir=BT; node [shape=point]; edge [arrowhead=none]\n" + "\n".join(lines) + "\n}"
        began = time.perf_counter()
        try:
            subprocess.run([self.program.path, "-Kdot", "-Tsvg"], input=dot.encode(), timeout=most, check=True,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        except subprocess.TimeoutExpired:
            return None
        return time.perf_counter() - began


def graph(n_layers: int, n: int, n_edges: int) -> Flow:
    """A flow of n_layers x n states, each joined to the next by the stream, and else of attention edges drawn by chance."""
    rng, stream = np.random.default_rng(0), n_layers * n
    if n_edges <= stream:
        raise ValueError(f"{n_edges} edges; it must be more than the {stream} of the stream")
    edges = np.zeros(n_edges, EDGE)
    edges["weight"] = rng.random(len(edges))
    residual, attention = edges[:stream], edges[stream:]
    residual["kind"], residual["head"] = Kind.RESIDUAL, -1
    residual["layer"], residual["dst"] = np.divmod(np.arange(stream), n)
    residual["src"] = residual["dst"]
    attention["layer"], attention["head"] = rng.integers(0, n_layers, len(attention)), rng.integers(0, 9, len(attention))
    attention["dst"] = rng.integers(1, n, len(attention))
    attention["src"] = rng.integers(0, attention["dst"])
    edges = edges[np.lexsort((edges["src"], edges["dst"], edges["head"], edges["layer"]))]
    influence = edges["weight"].astype(np.float64)
    tokens = Tokens((0,) * n, tuple(f" t{pos}" for pos in range(n)), (0,) * n, ("user",) * n, (False,) * n)
    made = Count(crossing=len(attention), others=stream)
    states = np.zeros((n_layers + 1, n))
    return Flow(edges, influence, influence, states, tokens, n_layers, n - 1, Prediction(0, " t"), "attention", "apart", (),
                made=made, total=float(influence.sum()))  # fmt: skip
