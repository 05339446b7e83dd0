"""A flow as a graph for other programs, and back: node-link JSON, and networkx's MultiDiGraph.

Nodes are states, named layer{l}.pos{p} (and memories, pos{p}.memory, of a feedback model), with their layer, position, token,
and what the state counts for. Edges have a kind, layer, head, weight, influence and link. What else the flow knows stands in
the graph's own attributes, so that a flow comes back as it went, but for its proof, its words, and what pruning had taken
away.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from nanokv.errors import MissingExtraError, TraceError
from nanokv.trace.edges import EDGE, Count, Kind
from nanokv.trace.flow import Flow, Tokens
from nanokv.trace.prediction import Prediction
from nanokv.trace.sinks import Sink

if TYPE_CHECKING:
    import networkx

NAME = "nanokv-flow 1"


def to_json(flow: Flow) -> str:
    """Node-link JSON as networkx 3.4 and later write and read it: nodes with `id`, edges with `source`, `target`, `key`."""
    data = {"directed": True, "multigraph": True, "graph": _about(flow), "nodes": _nodes(flow), "edges": _edges(flow)}
    return json.dumps(data, ensure_ascii=True, allow_nan=False)


def from_json(text: str) -> Flow:
    """The flow that `to_json` wrote. TraceError if it is something else."""
    try:
        data = json.loads(text)
        return _flow(data["graph"], data["nodes"], data["edges"])
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise TraceError(f"this is no flow that to_json wrote: {type(error).__name__}: {error}") from error


def to_networkx(flow: Flow) -> networkx.MultiDiGraph:
    """The graph for networkx, which the extra of that name brings. An edge leads from the state that is read."""
    try:
        import networkx
    except ImportError as error:
        raise MissingExtraError("a networkx graph needs networkx: pip install 'nanokv[networkx]'") from error
    graph = networkx.MultiDiGraph(**_about(flow))
    graph.add_nodes_from((node["id"], {name: value for name, value in node.items() if name != "id"}) for node in _nodes(flow))
    for edge in _edges(flow):
        graph.add_edge(edge.pop("source"), edge.pop("target"), **edge)
    return graph


def from_networkx(graph: networkx.MultiDiGraph) -> Flow:
    """The flow of a graph that `to_networkx` made, with the nodes and edges that it still has."""
    nodes = [{"id": name, **attributes} for name, attributes in graph.nodes(data=True)]
    edges = [{"source": a, "target": b, **attributes} for a, b, attributes in graph.edges(data=True)]
    try:
        return _flow(graph.graph, nodes, edges)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TraceError(f"this is no graph that to_networkx made: {type(error).__name__}: {error}") from error


def _about(flow: Flow) -> dict[str, Any]:
    return {
        "format": NAME, "measure": flow.measure, "heads": flow.heads, "at": flow.at, "n_layers": flow.n_layers,
        "feedback": flow.feedback,
        "windows": list(flow.windows), "prediction": asdict(flow.prediction), "sinks": [asdict(sink) for sink in flow.sinks],
        "made": asdict(flow.made), "total": flow.total, "biases": flow.biases,
        "notes": list(flow.notes), "tokens": asdict(flow.tokens),
    }  # fmt: skip


def _nodes(flow: Flow) -> list[dict[str, Any]]:
    tokens = flow.tokens
    return [
        {"id": flow.name(layer, pos), "layer": layer, "pos": pos, "token": tokens.text[pos], "turn": tokens.turn[pos],
         "role": tokens.role[pos], "state": float(flow.states[layer, pos])}
        for layer in range(flow.rows) for pos in range(len(tokens))
    ]  # fmt: skip


def _edges(flow: Flow) -> list[dict[str, Any]]:
    keys = dict[tuple[str, str], int]()
    edges = []
    rows = zip(*(row.tolist() for row in flow.ends), strict=True)
    numbers = zip(flow.edges.tolist(), rows, flow.influence.tolist(), flow.link.tolist(), strict=True)
    for (kind, layer, head, dst, src, weight), (below, above), influence, link in numbers:
        ends = flow.name(below, src), flow.name(above, dst)
        key = keys[ends] = keys.get(ends, -1) + 1
        edges.append({
            "source": ends[0], "target": ends[1], "key": key, "kind": Kind(kind).name.lower(), "layer": layer, "head": head,
            "dst": dst, "src": src, "weight": weight, "influence": influence, "link": link,
        })  # fmt: skip
    return edges


def _flow(about: dict[str, Any], nodes: list[dict[str, Any]], listed: list[dict[str, Any]]) -> Flow:
    if about.get("format") != NAME:
        raise ValueError(f"its format is {about.get('format')!r}, not {NAME!r}")
    edges = np.zeros(len(listed), EDGE)
    for i, edge in enumerate(listed):
        edges[i] = (Kind[edge["kind"].upper()], *(edge[name] for name in ("layer", "head", "dst", "src", "weight")))
    # As a flow's own table has them: layer by layer, then sampled edges, then those into memories.
    after = np.where(edges["kind"] == Kind.MEMORY, 2**14, edges["layer"] % (2**14))
    order = np.lexsort((edges["layer"], edges["src"], edges["dst"], edges["head"], _PLACE[edges["kind"]], after))
    tokens = Tokens(**{name: tuple(column) for name, column in about["tokens"].items()})
    states = np.zeros((about["n_layers"] + 1 + about["feedback"], len(tokens)))
    for node in nodes:
        states[node["layer"], node["pos"]] = node["state"]
    influence, link = (np.array([edge[name] for edge in listed], np.float64)[order] for name in ("influence", "link"))
    return Flow(
        edges[order], influence, link, states, tokens, about["n_layers"], about["at"], Prediction(**about["prediction"]),
        about["measure"], about["heads"], tuple(Sink(**sink) for sink in about["sinks"]), tuple(about["windows"]),
        Count(**about["made"]), about["total"], feedback=about["feedback"],
        biases=about["biases"], notes=tuple(about["notes"]),
    ).counted()  # fmt: skip


_PLACE = np.array([2, 2, 0, 1, 3, 4])  # residual, MLP, then attention of both kinds, as a flow's own table has them
