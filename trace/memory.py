"""Feedback memory in the graph: what each depth of a position gave to its memory, and how influence goes through it.

A feedback model's layers read one memory of each earlier position, m = sum over depths of s_d x_d, the embedding's depth 0
(`nanokv/feedback.py`; Fan et al. 2020, arXiv 2002.09402). So the graph has a node for it, pos{p}.memory: memory edges lead
to it from all depths of its position, and attention edges from it to any layer of later ones. A state may lie on ways that
go up through all layers of one position after another; the prediction's influence is found position by position, the last
one first, and within each from the memory, which only later positions read, down to the embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nanokv.config import Config
from nanokv.trace.measures import MEASURES, Heads, Measure, lengths
from nanokv.trace.parts import Array, FrozenNorm, Goal, LayerWeights, TraceLike, frozen_norm
from nanokv.trace.proximity import closeness
from nanokv.trace.spread import Influence, Shared, part, whole_influence
from nanokv.trace.target import at_the_head, dots, frozen_mlp, pull_heads, pull_values


@dataclass(frozen=True)
class Through:
    """What a measure says of the edges of a feedback model among n positions, and the influence of each."""

    layers: tuple[tuple[LayerWeights, Influence], ...]  # the last layer first
    memory: Array  # [L + 1, n]: the weights of the memory edges
    there: Array  # [L + 1, n] bool: which of these are edges: of depths that have a share, where somebody may read
    passing: Array  # [L + 1, n]: their influence
    states: Array  # [L + 2, n]: what each state counts for, and last what each memory does


def through(trace: TraceLike, model: Any, measure: Measure, goal: Goal, heads: Heads, sampled: Array,
            sinks: Sequence[int]) -> Through:  # fmt: skip
    """The measure's edge weights and their influence on the goal's prediction."""
    n = goal.at + 1
    there = np.repeat(np.asarray(model.shares != 0)[:, None], n, axis=1)  # [L + 1, n]
    there[:, goal.at] = False
    if measure.name == "target":
        return _whole(*target(trace, model, goal, heads), there, sinks)
    if measure.name == "rollout":
        return _rollout(trace, model, goal, heads, there, sinks)
    layers = list(measure.layers(trace, model, goal, heads))
    if measure.whole:  # it cuts edges between positions, and no others
        states = np.zeros((len(layers) + 2, n))
        states[:-2] = [whole_influence(weights, sinks).states for weights in reversed(layers)]
        return _whole(layers, np.zeros(there.shape), states, there, sinks)
    return _shared(layers, _memory_weights(trace, model, measure, n), there, goal, sampled, sinks)


def depths(trace: TraceLike, n: int) -> Array:
    """The states of the first n positions, the embedding first: [L + 1, n, D]."""
    last = trace.config.n_layers - 1
    rows = [*(trace.state("resid_pre", layer) for layer in range(last + 1)), trace.state("resid_post", last)]
    return np.stack([row[:n] for row in rows])


def memories(trace: TraceLike, model: Any, n: int) -> Array:
    """What the first n positions left for those after them, [n, D], added up as `FeedbackTransformer` does."""
    memory, *more = (share * x for share, x in zip(model.shares, depths(trace, n), strict=True))
    for given in more:
        memory = memory + given
    return memory


def target(trace: TraceLike, model: Any, goal: Goal, heads: Heads) -> tuple[list[LayerWeights], Array, Array]:
    """`target` (`target.py`) through memory: the layers' weights, the last first; the memory edges' [L + 1, n]; and what the
    states and memories do for the goal [L + 2, n].

    Complete at every position: what it and later ones read of the memories before it, the embeddings from it on, and the
    biases from it on, add up to the logit or difference.
    """
    run = _run(trace, model, goal.at + 1)
    found = _effects(run)
    found.covector[-1], found.bias[-1] = at_the_head(trace, model, goal)
    for pos in reversed(range(goal.at + 1)):
        _from_memory(run, found, pos)
        for layer in reversed(range(len(run.blocks))):
            _through_layer(run, found, layer, pos)
    states = np.concatenate([dots(found.covector, run.x), dots(found.at_memory, run.memory)[None]])  # [L + 2, n]
    given = dots(found.at_memory, run.shares[:, None, None] * run.x)  # [L + 1, n]
    layers = [
        LayerWeights(layer, edges if heads == "apart" else edges.sum(axis=0, keepdims=True), found.stream[layer],
                     found.mlp[layer], bias=found.bias[layer], states=states[layer])
        for layer, edges in enumerate(found.edges)
    ]  # fmt: skip
    return layers[::-1], given, states


@dataclass(frozen=True)
class _Run:
    """What `target` reads of a run of n positions."""

    config: Config
    shares: Array  # [L + 1]
    blocks: tuple[Any, ...]
    writers: tuple[Any, ...]  # the blocks whose matrices made each layer's keys and values
    norms: tuple[FrozenNorm, ...]  # of the memories, before these matrices
    x: Array  # [L + 1, n, D]
    memory: Array  # [n, D]
    mids: list[Array]  # L of [n, D]
    written: list[Array]  # by the MLPs: L of [n, D]
    patterns: list[Array]  # L of [H, n, n]
    values: list[Array]  # L of [n, G, hd]


def _run(trace: TraceLike, model: Any, n: int) -> _Run:
    config, memory, layers = trace.config, memories(trace, model, n), range(trace.config.n_layers)
    blocks = model.weights.map(np.asarray).blocks
    writers = (blocks[0],) * len(blocks) if model.shared_kv else blocks
    norms = tuple(frozen_norm(memory, w.attn_norm, w.attn_norm_bias, config) for w in writers)
    mids, written = ([trace.state(site, layer)[:n] for layer in layers] for site in ("resid_mid", "mlp_out"))
    patterns, values = [trace.pattern(layer)[:, :n, :n] for layer in layers], [trace.values(layer)[:n] for layer in layers]
    return _Run(config, model.shares, blocks, writers, norms, depths(trace, n), memory, mids, written, patterns, values)


@dataclass(frozen=True)
class _Effects:
    """What `target` finds, position by position."""

    covector: Array  # [L + 1, n, D]: of what was done to each state
    at_memory: Array  # [n, D]: of what was done to each memory
    at_src: list[Array]  # of the values: L of [n, G, hd]
    edges: list[Array]  # L of [H, n, n]
    stream: Array  # [L, n], as are the next two
    mlp: Array
    bias: Array


def _effects(run: _Run) -> _Effects:
    stream, mlp, bias = np.zeros((3, len(run.blocks), len(run.memory)))
    at_src, edges = (list(map(np.zeros_like, arrays)) for arrays in (run.values, run.patterns))
    return _Effects(np.zeros_like(run.x), np.zeros_like(run.memory), at_src, edges, stream, mlp, bias)


def _from_memory(run: _Run, found: _Effects, pos: int) -> None:
    """From a position's values, which all later positions have read by then, to its memory, and to its states of all depths."""
    here = slice(pos, pos + 1)
    for layer, (writer, norm) in enumerate(zip(run.writers, run.norms, strict=True)):
        below, bias = pull_values(writer, replace(norm, scale=norm.scale[here]), found.at_src[layer][here])  # [1, D], [1]
        found.at_memory[pos] += below[0]
        found.bias[layer, pos] += bias[0]
    found.covector[:, pos] += run.shares[:, None] * found.at_memory[pos]


def _through_layer(run: _Run, found: _Effects, layer: int, pos: int) -> None:
    """From the state that leaves a layer at a position to the one that enters it, and to the values that it read."""
    here, block, g = slice(pos, pos + 1), run.blocks[layer], found.covector[layer + 1, pos : pos + 1]  # g [1, D]
    found.mlp[layer, pos] = dots(g, run.written[layer][here])[0]
    g, mlp_bias = frozen_mlp(block, run.mids[layer][here], run.config).pull(g)
    found.stream[layer, pos] = dots(g, run.x[layer, here])[0]
    edges, at_src, bias = pull_heads(block, run.patterns[layer][:, here], run.values[layer], g, run.config)
    found.edges[layer][:, here] = edges
    found.at_src[layer][:] += at_src
    found.bias[layer, pos] += mlp_bias[0] + bias[0]
    found.covector[layer, pos] += g[0]


def _memory_weights(trace: TraceLike, model: Any, measure: Measure, n: int) -> Array:
    """What a depth's part of a memory weighs beside the others, in the measure's unit: [L + 1, n]."""
    shares = np.abs(model.shares.astype(np.float64))[:, None]  # [L + 1, 1]
    if measure.name == "norm":
        return shares * lengths(depths(trace, n))
    if measure.name == "proximity":
        return closeness(shares[..., None] * depths(trace, n), memories(trace, model, n))
    return np.repeat(shares, n, axis=1)  # attention says nothing about sizes


def _whole(layers: list[LayerWeights], memory: Array, states: Array, there: Array, sinks: Sequence[int]) -> Through:
    """Where a weight is of the whole prediction, its size is its influence."""
    pairs = tuple((weights, whole_influence(weights, sinks)) for weights in layers)
    return Through(pairs, memory, there, np.abs(memory), states)


def _rollout(trace: TraceLike, model: Any, goal: Goal, heads: Heads, there: Array, sinks: Sequence[int]) -> Through:
    """`rollout` (`rollout.py`): a state is half itself and half, by the mean of the heads, the memories that it read."""
    layers = list(MEASURES["attention"].layers(trace, model, goal, "merged" if heads != "apart" else "apart"))
    shared = _shared(layers, _memory_weights(trace, model, MEASURES["attention"], goal.at + 1), there, goal, [], ())
    found = [
        replace(weights, attention=influence.attention, residual=influence.residual, states=influence.states)
        for weights, influence in shared.layers
    ]
    return _whole(found, shared.passing, shared.states, there, sinks)


def _shared(layers: Sequence[LayerWeights], memory: Array, there: Array, goal: Goal, sampled: Sequence[int] | Array,
            sinks: Sequence[int]) -> Through:  # fmt: skip
    """Share out the prediction's 1 among the edges, as `spread.Shared` does it layer by layer in a standard model."""
    n_layers, n, drawn = len(layers), goal.at + 1, set(np.asarray(sampled).tolist())
    given = part(memory, memory.sum(axis=0, keepdims=True))  # [L + 1, n]
    shares = {weights.layer: Shared(np.zeros(n), sinks).shares(weights) for weights in layers}
    reaching = np.zeros((n_layers + 2, n))
    reaching[n_layers, goal.at] = 1
    for pos in reversed(range(n)):
        reaching[:-1, pos] += given[:, pos] * reaching[-1, pos]
        for layer in reversed(range(n_layers)):
            attention, residual, _ = shares[layer]
            reaching[-1] += attention[:, pos].sum(axis=0) * reaching[layer + 1, pos]
            reaching[layer, pos] += residual[pos] * reaching[layer + 1, pos]
        if pos in drawn:
            reaching[n_layers, pos - 1] += reaching[0, pos]
    pairs = []
    for weights in layers:
        (attention, residual, mlp), above = shares[weights.layer], reaching[weights.layer + 1]
        passed = Influence(attention * above[:, None], residual * above, None if mlp is None else mlp * above,
                           reaching[weights.layer])  # fmt: skip
        pairs.append((weights, passed))
    return Through(tuple(pairs), memory, there, given * reaching[-1], reaching)
