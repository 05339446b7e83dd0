"""The file to bisect a real model: SmolLM2-135M on one text, with every layer's states at the last position."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from making.cases import case, decimals
from making.rules import rules_of
from nanokv_parts import Collector

import nanokv
from nanokv import safetensors_file
from nanokv.config import Rope
from nanokv.errors import ModelNotFoundError

TEXT, TOKENS = "The capital of France is", [504, 3575, 282, 4649, 314]
FILE = "smollm2/capital.safetensors"
TOLERANCE = [1e-3, 1e-4]
# Bugs of reading this file, as another config would have them; the others are told by the small models.
SHOWN: dict[str, dict[str, Any]] = {
    "RopePairs": {"rope_pairs": "halves"},
    "RopeBaseOther": {"rope": Rope(10000.0)},
    "ScaleMissing": {"attn_scale": 1.0},
}


def cases(folder: Path, kept: Path) -> list[dict[str, Any]]:
    """The one case. Without the model its file and its flags are those which are kept."""
    (folder / FILE).parent.mkdir()
    try:
        model = nanokv.load("smollm2-135m", ops="numba")
    except ModelNotFoundError:
        shutil.copy(kept / FILE, folder / FILE)
        flags = json.loads((kept / "level3_run" / "smollm2.json").read_text(encoding="utf-8"))["cases"][0]["flags"]
    else:
        right = states(model)
        safetensors_file.save(folder / FILE, right, {"format": "pt", "text": TEXT})
        flags = {bug: signature(right, model, changes) for bug, changes in SHOWN.items()}
    arrays, _ = safetensors_file.open_safetensors(folder / FILE)
    made = case("run/smollm2", "run", {"model": "smollm2-135m", "calls": [TOKENS]}, f'"{TEXT}", in one call',
                tol=TOLERANCE, optional=[name for name in arrays if not name.endswith("logits")])  # fmt: skip
    del made["want"]
    return [made | {"rules": rules_of(made["id"]), "expect_file": FILE, "flags": flags}]


def signature(right: dict[str, np.ndarray], model: nanokv.Transformer, changes: dict[str, Any]) -> dict[str, Any]:
    """The three largest differences in the first state that another config makes wrong by ten tolerances."""
    wrong = states(nanokv.Transformer(replace(model.config, **changes), model.weights, ops="numba"))
    for name, value in right.items():
        ratios = (np.abs(value - wrong[name]) / (TOLERANCE[0] + TOLERANCE[1] * np.abs(value))).reshape(-1)
        if ratios.max() >= 10:
            at = np.sort(np.argsort(-ratios, kind="stable")[:3])
            return {"output": name, "at": at.tolist(), "is": decimals(wrong[name].reshape(-1)[at])}
    raise AssertionError(f"{changes} does not show")


def states(model: nanokv.Transformer) -> dict[str, np.ndarray]:
    """By id, in the order of computation: what enters each layer, its key and value, the stream after attention."""
    seen, at = Collector(), len(TOKENS) - 1
    model.forward(TOKENS, observer=seen)
    names = [f"layer{layer}.pos{at}{site}" for layer in range(model.config.n_layers) for site in ("", ".k", ".v", ".resid_mid")]
    names += [f"layer{model.config.n_layers}.pos{at}", f"pos{at}.logits"]
    return {name: np.ascontiguousarray(seen.get(name)) for name in names}
