"""The file to bisect a real model: SmolLM2-135M on one text, with every layer's states at the last position."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from making.cases import case
from making.rules import rules_of
from nanokv_parts import Collector

import nanokv
from nanokv import safetensors_file
from nanokv.errors import ModelNotFoundError

TEXT, TOKENS = "The capital of France is", [504, 3575, 282, 4649, 314]
FILE = "smollm2/capital.safetensors"


def cases(folder: Path, kept: Path) -> list[dict[str, Any]]:
    """The one case. Without the model its file is that which is kept."""
    (folder / FILE).parent.mkdir()
    try:
        model = nanokv.load("smollm2-135m", ops="numba")
    except ModelNotFoundError:
        shutil.copy(kept / FILE, folder / FILE)
    else:
        safetensors_file.save(folder / FILE, states(model), {"format": "pt", "text": TEXT})
    arrays, _ = safetensors_file.open_safetensors(folder / FILE)
    made = case("run/smollm2", "run", {"model": "smollm2-135m", "calls": [TOKENS]}, f'"{TEXT}", in one call',
                tol=[1e-3, 1e-4], optional=[name for name in arrays if not name.endswith("logits")])  # fmt: skip
    del made["want"]
    return [made | {"rules": rules_of(made["id"]), "expect_file": FILE, "flags": {}}]


def states(model: nanokv.Transformer) -> dict[str, np.ndarray]:
    """By id, in the order of computation: what enters each layer, its key and value, the stream after attention."""
    seen, at = Collector(), len(TOKENS) - 1
    model.forward(TOKENS, observer=seen)
    names = [f"layer{layer}.pos{at}{site}" for layer in range(model.config.n_layers) for site in ("", ".k", ".v", ".resid_mid")]
    names += [f"layer{model.config.n_layers}.pos{at}", f"pos{at}.logits"]
    return {name: np.ascontiguousarray(seen.get(name)) for name in names}
