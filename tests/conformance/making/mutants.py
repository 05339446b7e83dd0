"""The museum's bugs (examples/museum), each as the parts of a port that has it."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from nanokv_parts import Parts
from nanokv_port import Port

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "examples" / "museum"))

import broken
import broken_bits
import broken_files
from bugs import BUGS, CHOICES

import nanokv

__all__ = ["BUGS", "CHOICES", "bit_mutant", "mutant"]


def mutant(bug: str, dtype: Any = np.float32) -> Port:
    """A port with this bug; "" is the museum's copy as it should be."""
    if bug in BUGS and BUGS[bug].bits:
        return bit_mutant(bug)
    make = partial(broken.BrokenTransformer, bug=bug)
    cache = type("Cache", (broken.BrokenCache,), {"bug": bug})
    return Port(
        Parts(
            ops=broken.BrokenOps(bug),
            make=make,
            load=lambda path, ops: broken_files.load(path, bug, make),
            cache=cache,
            blocks=broken.blocks,
            dequantise=lambda kind, data, shape: broken_files.dequantise(kind, data, shape, bug),
            sampling=broken_files.Sampling(bug),
            tokenizer=lambda folder: broken_files.BrokenTokenizer(folder, bug),
            numbers=lambda: Parts().numbers() | broken.numbers(bug),
            hash_words=broken_files.hash_bytes if bug == "HashOverBytes" else Parts().hash_words,
            dtype=dtype,
        )
    )


def bit_mutant(bug: str) -> Port:
    """A port that computes in the stated order, slowly, but for one bug; "" has none."""

    def make(config: Any, weights: Any, ops: str = "numpy", **named: Any) -> Any:
        model = nanokv.Transformer(config, weights, ops="numpy", **named)
        model.ops = broken_bits.BitOps(bug)
        return model

    def load(path: str, ops: str) -> Any:
        model = nanokv.load(path, ops="numpy")
        return make(model.config, model.weights, tokenizer=model.tokenizer)

    return Port(Parts(ops=broken_bits.BitOps(bug), make=make, load=load, numbers=lambda: broken_bits.numbers(bug)))
