"""What the adapter is made of: nanokv's parts, each of which the museum can replace by a broken one; a collector of states."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

import nanokv
from nanokv import ops as numpy_ops
from nanokv.cache import KVCache
from nanokv.edits import Edits
from nanokv.gguf_file import FileTensor
from nanokv.tokenizer import folder_tokenizer
from nanokv.trace.recorder import hash_words
from nanokv.transformer import Call, Transformer

Array = np.ndarray
sampling = import_module("nanokv.generate")  # in the package itself that name is the function's


def numpy_numbers() -> dict[str, Callable[..., Any]]:
    """The functions of a number, and of a vector, in the dtype that they are given."""
    return {
        "exp": lambda x: np.exp(x),
        "tanh": lambda x: np.tanh(x),
        "erf": lambda x: np.array([math.erf(each) for each in x], x.dtype),
        "sum": lambda x, first: np.sum(x),
        "sum_of_squares": lambda x, first: np.sum(x * x),
        "maximum": lambda x, first: np.max(x),
    }


def kernel_numbers() -> dict[str, Callable[..., Any]]:
    """The same of the kernels, and fma, each compiled around."""
    import numba

    from nanokv import kernels, microkernel

    def each(function: Any) -> Callable[[Array], Array]:
        @numba.njit(error_model="numpy")
        def apply(x, y):  # type: ignore[no-untyped-def]
            for i in range(len(x)):
                y[i] = function(x[i])

        def run(x: Array) -> Array:
            apply(x, y := np.empty_like(x))
            return y

        return run

    def over(function: Any) -> Callable[[Array, int], Any]:
        @numba.njit(error_model="numpy")
        def reduce(x, low, high):  # type: ignore[no-untyped-def]
            return function(x, 0, low, high)

        return lambda x, first: reduce(np.concatenate([np.zeros(first, np.float32), x]), first, first + len(x))

    @numba.njit(error_model="numpy")
    def fma(a, b, c, y):  # type: ignore[no-untyped-def]
        for i in range(len(a)):
            y[i] = microkernel.fma(a[i], b[i], c[i])

    def run_fma(a: Array, b: Array, c: Array) -> Array:
        fma(a, b, c, y := np.empty_like(a))
        return y

    return {
        "fma": run_fma,
        **{name: each(getattr(kernels, name)) for name in ("exp", "tanh", "erf")},
        "sum": over(microkernel.row_sum),
        "sum_of_squares": over(microkernel.row_sum_of_squares),
        "maximum": over(microkernel.row_max),
    }


def dequantise(kind: str, data: bytes, shape: Sequence[int]) -> Array:
    """float32 of a tensor in one of the forms that a GGUF file has."""
    return np.asarray(FileTensor("", tuple(shape), kind, np.frombuffer(data, np.uint8)))


def blocks(model: Transformer, x: Array, cache: KVCache, start: int, observer: Any) -> Array:  # [T, D] -> [T, D]
    """The model's blocks alone, over positions from start on."""
    return model._blocks(x, Call(cache, start, model._rotations(start, len(x)), Edits(), observer))


@dataclass
class Parts:
    """What nanokv is made of, as far as the suite asks. The defaults are nanokv; the museum replaces some."""

    ops: Any = numpy_ops
    make: Callable[..., Transformer] = Transformer  # (config, weights, ops="numpy") -> model
    ops_name: str = "numpy"
    load: Callable[..., Transformer] = nanokv.load  # a folder or file as people publish them -> model
    cache: type[KVCache] = KVCache
    blocks: Callable[..., Array] = blocks  # (model, x, cache, start, observer) -> x after all blocks
    numbers: Callable[[], dict[str, Callable[..., Any]]] = numpy_numbers
    dequantise: Callable[..., Array] = dequantise
    sampling: Any = sampling
    tokenizer: Callable[..., Any] = folder_tokenizer
    hash_words: Callable[[Array], Array] = hash_words
    dtype: Any = np.float32


class Collector:
    """An observer that keeps everything, by the id of the call that it belongs to."""

    def __init__(self) -> None:
        self.found: dict[str, Array] = {}
        self.starts: dict[int, int] = {}  # of each call: its first position

    def begin(self, step: int, tokens: Array, start: int) -> None:
        self.step, self.start = step, start
        self.call: dict[str, Array] = {}

    def wants(self, site: str) -> bool:
        return True

    def state(self, site: str, layer: int, start: int, x: Array) -> None:
        self.call[f"step{self.step}.layer{layer}.{site}"] = np.array(x)

    def write(self, layer: int, start: int, k: Array, v: Array) -> None:
        self.state("k", layer, start, k)
        self.state("v", layer, start, v)

    def read(self, layer: int, start: int, slots: Any, scores: Array, weights: Array) -> None:
        mask = slots.mask()
        for head in range(len(weights)):
            for site, values, rest in (("pattern", weights, 0), ("scores", scores, -np.inf)):
                square = np.full(mask.shape, rest, values.dtype)
                square[mask] = values[head]
                self.call[f"step{self.step}.layer{layer}.head{head}.{site}"] = square

    def end(self, logits: Array) -> None:
        self.call[f"step{self.step}.logits"] = logits
        self.found |= self.call
        self.starts[self.step] = self.start

    def abort(self) -> None: ...

    def get(self, name: str) -> Array | None:
        """What an id names, of a call or of a position; the state that enters layer L is what leaves the last one."""
        match = re.fullmatch(r"(?:layer(\d+)\.)?pos(\d+)(?:\.(\w+))?", name)
        if match is None:
            return self.found.get(name)
        layer, pos, site = match[1], int(match[2]), match[3] or "resid_pre"
        step = max(step for step, start in self.starts.items() if start <= pos)
        if layer is None:
            return self.found[f"step{step}.{site}"][pos - self.starts[step]]
        found = self.found.get(f"step{step}.layer{layer}.{site}")
        if found is None and site == "resid_pre":
            found = self.found.get(f"step{step}.layer{int(layer) - 1}.resid_post")
        return None if found is None else found[pos - self.starts[step]]


def as_json(answer: dict[str, Any]) -> str:
    """One line. float32 arrays go as their bits in hexadecimal, everything else as plain lists."""

    def plain(value: Any) -> Any:
        if isinstance(value, np.ndarray) and value.dtype == np.float32:
            return np.ascontiguousarray(value).view(np.uint32).astype(">u4").tobytes().hex()
        if isinstance(value, np.ndarray):
            return value.reshape(-1).tolist()
        return [x.item() if isinstance(x, np.generic) else x for x in value]

    if "outputs" in answer:
        answer = answer | {"outputs": {name: plain(value) for name, value in answer["outputs"].items()}}
    return json.dumps(answer)


def parts_of(ops: str) -> Parts:
    """nanokv on its readable operations ("numpy") or on its kernels ("numba")."""
    if ops == "numpy":
        return Parts()
    from nanokv import kernels

    return Parts(ops=kernels, ops_name="numba", numbers=kernel_numbers)
