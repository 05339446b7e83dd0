"""Checks that the checkpoints here can tell a wrong implementation from a right one.

For each checkpoint, transformers is made to compute something slightly wrong, one mistake at a time, and the largest
change of a logit on the expected prompt is printed. A change so small that a test might miss it is a fault of the
checkpoint (change its weights), and the exit status is 1.

    pip install -e .[reference]
    python tests/checkpoints/wrong_variants.py
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from functools import reduce
from itertools import combinations
from typing import Any
from unittest import mock

import numpy as np
import torch
from make_checkpoints import CHECKPOINTS, Checkpoint, T, build, draw_tokens, logits_of
from torch import Tensor, nn
from transformers import PreTrainedModel

SMALLEST = 1e-2
SMALLEST_FOR_GELU = 1e-3  # GELU by erf and by tanh are within 5e-4 of each other
GELU_SETTING = {"gpt2": "activation_function", "gemma3_text": "hidden_activation"}
Settings = dict[str, Any]
Change = Callable[[PreTrainedModel], object]


def wrong_settings(checkpoint: Checkpoint) -> Iterator[tuple[str, Settings]]:
    """Each setting that a loader might read wrongly."""
    settings = checkpoint.settings
    eps = "layer_norm_epsilon" if checkpoint.model_type == "gpt2" else "rms_norm_eps"
    right_eps = settings.get(eps, 1e-5 if checkpoint.model_type == "gpt2" else 1e-6)
    for factor in (0.1, 10):
        yield f"eps * {factor}", settings | {eps: right_eps * factor}
    if checkpoint.model_type in GELU_SETTING:
        yield "GELU by erf", settings | {GELU_SETTING[checkpoint.model_type]: "gelu"}
    else:
        yield "GELU for SiLU", settings | {"hidden_act": "gelu"}
    if "sliding_window" in settings:
        yield from wrong_gemma_settings(settings)
    elif "rope_parameters" in settings:
        for name, rope in wrong_ropes(settings["rope_parameters"]):
            yield name, settings | {"rope_parameters": rope}


def wrong_ropes(rope: Settings) -> Iterator[tuple[str, Settings]]:
    yield "RoPE base / 10", rope | {"rope_theta": rope["rope_theta"] / 10}
    if rope["rope_type"] != "default":
        yield "RoPE not scaled", {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    if rope["rope_type"] == "llama3":
        yield "all of RoPE scaled", rope | {"rope_type": "linear"}
        yield "no smooth band (all as low)", rope | {"low_freq_factor": 2.99}
        yield "no smooth band (all as high)", rope | {"high_freq_factor": 1.01}


def wrong_gemma_settings(settings: Settings) -> Iterator[tuple[str, Settings]]:
    for change in (-1, 1):
        yield f"window {change:+d}", settings | {"sliding_window": settings["sliding_window"] + change}
    yield "scores scaled by head_dim", settings | {"query_pre_attn_scalar": settings["head_dim"]}
    kinds = settings["layer_types"]
    yield "all layers sliding", settings | {"layer_types": ["sliding_attention"] * len(kinds)}
    yield "all layers full", settings | {"layer_types": ["full_attention"] * len(kinds)}
    yield "layer types one later", settings | {"layer_types": kinds[-1:] + kinds[:-1]}
    ropes = settings["rope_parameters"]
    full, sliding = ropes["full_attention"], ropes["sliding_attention"]
    yield "RoPE bases swapped", settings | {"rope_parameters": {"full_attention": sliding, "sliding_attention": full}}
    for kind in ropes:
        for name, rope in wrong_ropes(ropes[kind]):
            yield f"{kind}: {name}", settings | {"rope_parameters": ropes | {kind: rope}}
    if full["rope_type"] == "linear":
        wrong = full | {"rope_theta": sliding["rope_theta"]}
        yield "sliding layers scaled too", settings | {"rope_parameters": ropes | {"sliding_attention": wrong}}


def kind_of(name: str) -> str:
    """The name of a parameter or module without its layer."""
    return re.sub(r"\.\d+\.", ".*.", name)


def by_kind(model: PreTrainedModel) -> dict[str, list[nn.Parameter]]:
    """The parameters, those of all layers under one name."""
    kinds: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        kinds.setdefault(kind_of(name), []).append(parameter)
    return kinds


def change_all(kind: str, change: Callable[[Tensor], Tensor]) -> Change:
    def apply(model: PreTrainedModel) -> None:
        for parameter in by_kind(model)[kind]:
            parameter.data = change(parameter.data)

    return apply


def swap(kind: str, other: str) -> Change:
    def apply(model: PreTrainedModel) -> None:
        for first, second in zip(by_kind(model)[kind], by_kind(model)[other], strict=True):
            first.data, second.data = second.data, first.data

    return apply


def leave_out(kind: str) -> Change:
    """Replaces the modules of a kind by the identity."""

    def apply(model: PreTrainedModel) -> None:
        for name in [name for name, _ in model.named_modules() if kind_of(name) == kind]:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, nn.Identity())

    return apply


def reorder_thirds(order: list[int]) -> Callable[[Tensor], Tensor]:
    return lambda fused: torch.cat([fused.chunk(3, dim=-1)[i] for i in order], dim=-1)


def both(first: Change, second: Change) -> Change:
    return lambda model: (first(model), second(model))


def wrong_parameters(checkpoint: Checkpoint) -> Iterator[tuple[str, Change]]:
    """Each kind of vector left out, each square matrix transposed, each two kinds of one shape taken for each other."""
    kinds = by_kind(build(checkpoint))
    for kind, (parameter, *_) in kinds.items():
        if parameter.ndim == 1:
            ignored = (
                torch.zeros_like if kind.endswith(".bias") or checkpoint.stores_norms_minus_one else torch.ones_like
            )
            yield f"{kind} left out", change_all(kind, ignored)
        elif parameter.shape[0] == parameter.shape[1]:
            yield f"{kind} transposed", change_all(kind, lambda matrix: matrix.T.contiguous())
    for kind, other in combinations(kinds, 2):
        if kinds[kind][0].shape == kinds[other][0].shape and len(kinds[kind]) == len(kinds[other]):
            yield f"{kind} and {other} swapped", swap(kind, other)


def wrong_steps(checkpoint: Checkpoint) -> Iterator[tuple[str, Change]]:
    """Each norm left out, and what only one family does."""
    model = build(checkpoint)
    for kind in sorted({kind_of(name) for name, _ in model.named_modules() if re.search(r"norm$|ln_.$", name)}):
        yield f"{kind} not applied", leave_out(kind)
    if checkpoint.stores_norms_minus_one:
        norms = [kind for kind in by_kind(model) if kind.endswith("norm.weight")]
        yield "norms by w, not 1 + w", reduce(both, [change_all(kind, lambda w: w - 1) for kind in norms])
        yield "embedding not scaled", lambda model: model.get_buffer("model.embed_tokens.embed_scale").fill_(1.0)
    if checkpoint.model_type == "gpt2":
        for name, order in {"k, q, v": [1, 0, 2], "q, v, k": [0, 2, 1]}.items():
            changes = [change_all(kind, reorder_thirds(order)) for kind in by_kind(model) if ".c_attn." in kind]
            yield f"c_attn as {name}", reduce(both, changes)


def rotate_neighbours(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """RoPE on pairs (0, 1), (2, 3), … where transformers pairs each feature with the one half a head away."""
    half = cos.shape[-1] // 2
    cos, sin = (table[:, None, :, :half].repeat_interleave(2, dim=-1) for table in (cos, sin))

    def rotate(x: Tensor) -> Tensor:
        return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2) * sin

    return rotate(q), rotate(k)


def wrong_functions(checkpoint: Checkpoint) -> Iterator[tuple[str, Any]]:
    """Mistakes inside attention, as patches of the module that computes it."""
    if checkpoint.model_type == "gpt2":
        return
    module = sys.modules[type(build(checkpoint)).__module__]
    yield "query head h reads h % G", mock.patch.object(module, "repeat_kv", lambda x, n: x.repeat(1, n, 1, 1))
    yield "RoPE on neighbours", mock.patch.object(module, "apply_rotary_pos_emb", rotate_neighbours)
    yield "no RoPE", mock.patch.object(module, "apply_rotary_pos_emb", lambda q, k, cos, sin: (q, k))


def wrong_logits(checkpoint: Checkpoint, tokens: Tensor) -> Iterator[tuple[str, np.ndarray]]:
    for name, settings in wrong_settings(checkpoint):
        yield name, logits_of(build(checkpoint, settings), tokens)
    for name, change in (*wrong_parameters(checkpoint), *wrong_steps(checkpoint)):
        model = build(checkpoint)
        change(model)
        yield name, logits_of(model, tokens)
    for name, patch in wrong_functions(checkpoint):
        with patch:
            yield name, logits_of(build(checkpoint), tokens)
    if checkpoint.model_type == "gpt2":
        with torch.no_grad():
            shifted = build(checkpoint)(tokens[None], position_ids=torch.arange(1, T + 1)[None])
        yield "positions from 1", shifted.logits[0].numpy()


def main() -> int:
    missed = 0
    for checkpoint in CHECKPOINTS:
        tokens = draw_tokens(checkpoint, "tokens", T)
        right = logits_of(build(checkpoint), tokens)
        for name, logits in wrong_logits(checkpoint, tokens):
            change = np.abs(logits - right).max()
            too_small = change < (SMALLEST_FOR_GELU if name == "GELU by erf" else SMALLEST)
            missed += too_small
            print(f"{checkpoint.name:14} {change:9.4f} {'TOO SMALL ' if too_small else ''} {name}")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
