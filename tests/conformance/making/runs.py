"""Levels 2 to 4: one block with its insides, whole runs call by call, and the traces that they leave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from making.cases import RUNS, case
from making.draws import normal, whole
from making.models import CONFIGS, D, V

from nanokv.config import Config

Cases = list[dict[str, Any]]


def names_of_block(config: Config, layer: int, steps: int) -> list[str]:
    """Every site of a block, in the order of computation."""
    heads = [f"head{h}.{site}" for site in ("scores", "pattern") for h in range(config.n_heads)]
    gate = ["gate"] if config.gated_mlp else []
    sites = ["ln1", "q", "k", "v", *heads, "z", "attn_out", "resid_mid", "ln2", *gate, "up", "act", "mlp_out", "resid_post"]
    return [f"step{step}.layer{layer}.{site}" for step in range(steps) for site in sites]


def blocks() -> Cases:
    made = []
    for model, layer in (("llama", 1), ("llama3", 0), ("qwen2", 0), ("qwen3", 1), ("gpt2", 0), ("gemma3", 0), ("gemma3", 1)):
        config = CONFIGS[model]
        calls = [3, 1] if model != "gemma3" else [5, 2]
        names = names_of_block(config, layer, len(calls))
        if model == "gemma3":  # the calls are longer, so that the window shows: less of each
            names = [name for name in names if not name.endswith(("scores", "up", "gate", "ln2", "q"))]
        last = f"step{len(calls) - 1}.layer{layer}.resid_post"
        made.append(case(
            f"block/{model}_layer{layer}", "block",
            {"model": f"models/{model}", "layer": layer, "calls": calls, "x": normal(f"block {model} {layer}", sum(calls), D)},
            f"layer {layer} alone, over x [S, D]; {calls[0]} positions, then {calls[1]}",
            tol=RUNS, want=names, optional=[name for name in names if name != last],
        ))  # fmt: skip
    return made


def names_of_run(config: Config, calls: Sequence[Sequence[int]], full: bool) -> list[str]:
    """What a run is asked for: everything that a bisection needs, or the logits alone."""
    names = []
    for step in range(len(calls)):
        if full:
            names += ["step0.layer0.resid_pre"] if step == 0 else []
            for layer in range(config.n_layers):
                heads = [f"head{h}.pattern" for h in range(config.n_heads)]
                names += [f"step{step}.layer{layer}.{site}" for site in ("k", "v", *heads, "resid_mid", "resid_post")]
        names.append(f"step{step}.logits")
    return names


def split(tokens: list[int], *sizes: int) -> list[list[int]]:
    ends = np.cumsum(sizes).tolist()
    return [tokens[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def run(id_: str, model: str, calls: list[list[int]], comment: str, full: bool = False, **more: Any) -> Any:
    """A run; but for the logits a port may leave outputs out."""
    config = CONFIGS[model.removesuffix("_hf")]
    names = names_of_run(config, calls, full)
    return case(f"run/{id_}", "run", {"model": f"models/{model}", "calls": calls, **more}, comment, tol=RUNS,
                want=names, optional=[name for name in names if not name.endswith("logits")])  # fmt: skip


def families() -> Cases:
    """Each family: a chunk, a smaller one, single tokens, every state of which is told; and the same in one call."""
    made = []
    for model in CONFIGS:
        tokens = whole(f"tokens {model}", 8, V)
        made.append(run(f"{model}_in_parts", model, split(tokens, 5, 2, 1), "5 + 2 + 1 tokens, with all states", full=True))
        made.append(run(f"{model}_at_once", model, [tokens], "the same tokens in one call"))
    return made


def splits() -> Cases:
    """The same prompt in other parts, a full context, and cut edges."""
    tokens = whole("tokens llama", 8, V)
    long = whole("tokens full", 32, V)
    cuts = [{"layer": 1, "dst": 5, "src": 2}, {"layer": 2, "dst": 6, "src": 0, "head": 3}]
    gemma = run("cut", "llama", split(tokens, 5, 2, 1), "two edges cut, one of them in all heads", cuts=cuts)
    gemma["optional"] = gemma["want"]
    return [
        run("one_by_one", "llama", split(tokens, *[1] * 8), "every token a call of its own"),
        run("chunks", "llama", split(tokens, 1, 4, 3), "a token first, then chunks"),
        run("full_context", "llama", split(long, 19, 1, 12), "to the last slot; sums over more than sixteen"),
        run("sliding_far", "gemma3", split(long, 20, 1, 6), "windows that begin in the middle of the lanes"),
        gemma,
    ]


def published() -> Cases:
    """Models as Hugging Face publishes them: the loader must make the same of them."""
    made = []
    for model, comment in (
        ("gpt2_hf", "matrices [inputs, outputs], q, k and v in one"),
        ("gemma3_hf", "norms less one, the embedding's scale"),
        ("llama3_hf", "rows of q and k for halves, RoPE scaled as in Llama 3, a head of its own"),
    ):
        plain = model.removesuffix("_hf")
        made.append(run(model, model, split(whole(f"tokens {plain}", 8, V), 7, 1), comment))
    return made


def traces() -> Cases:
    made = []
    for model, sizes, level, comment in (
        ("llama", (3, 1), "states", "everything"),
        ("gemma3", (7, 1), "vectors", "reads that begin at the window"),
        ("gpt2", (3, 1), "weights", "no RoPE, so the keys are as projected"),
        ("qwen3", (4, 4), "writes", "the least that there is"),
    ):
        calls = split(whole(f"tokens {model}", 8, V)[: sum(sizes)], *sizes)
        made.append(case(
            f"trace/{model}_{level}", "trace", {"model": f"models/{model}", "calls": calls, "trace_level": level},
            comment, tol=RUNS,
        ))  # fmt: skip
    return made


LEVELS = {2: {"blocks": blocks}, 3: {"families": families, "splits": splits, "published": published}, 4: {"traces": traces}}
