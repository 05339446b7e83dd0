"""nanokv behind the door that every port comes through: one JSON request a line in, one JSON answer a line out.

    python tests/conformance/run.py --program "python tests/conformance/nanokv_port.py --ops numpy"
    python tests/conformance/run.py --program "python tests/conformance/nanokv_port.py --bug KvHeadModuloG"

README.md beside this file says what a request is. Here each operation is a method of Port that calls the part of nanokv
that the case is about. The museum (examples/museum) hands in other parts, one of which is wrong on purpose.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from nanokv_parts import Collector, Parts, as_json, parts_of
from plain_models import changed, config_of, one_block, small_config, weights_of

from nanokv.cache import KVCache
from nanokv.config import Config, Rope
from nanokv.edits import Cut
from nanokv.errors import NanokvError
from nanokv.gguf_file import open_gguf
from nanokv.safetensors_file import open_safetensors, read_json
from nanokv.trace import Recorder
from nanokv.transformer import Transformer
from nanokv.weights import block_shapes, check, model_shapes

Array = np.ndarray


class Port:
    """Answers requests with the parts that it is given."""

    def __init__(self, parts: Parts | None = None) -> None:
        self.parts = parts or Parts()
        self._numbers: dict[str, Callable[..., Any]] | None = None
        self._models: dict[str, Transformer] = {}

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """{"outputs": {name: array, list or text}}, {"error": kind, "message": text} or {"skip": reason}."""
        operation = getattr(self, f"op_{request['op']}", None)
        if operation is None:
            return {"skip": f"nanokv's adapter has no operation {request['op']}"}
        try:
            with np.errstate(all="ignore"):
                return operation(request, **{name: self._value(value) for name, value in request["inputs"].items()})
        except NanokvError as error:
            return {"error": type(error).__name__, "message": str(error)}

    def _value(self, value: Any) -> Any:
        if isinstance(value, dict) and "f32" in value:
            return np.array([float(x) for x in value["f32"]], np.float32).astype(self.parts.dtype).reshape(value["shape"])
        return value

    # Level 0: whole numbers

    def op_kv_head(self, request: Any, n_heads: int, n_kv_heads: int) -> Any:
        return _outputs(kv_head=self._empty_model(small_config(n_heads, n_kv_heads, 2)).kv_head)

    def op_reads(self, request: Any, start: int, n: int, window: int | None) -> Any:
        cache = self.parts.cache(small_config(1, 1, 2, n_ctx=start + n), self.parts.dtype)
        self._fill(cache, start)
        with cache.step(n) as begin:
            cache.write(0, begin, *2 * [np.zeros((n, 1, 2), self.parts.dtype)])
            slots = cache.read(0, begin, n, np.zeros(1, np.int32), window)
        row, src = np.nonzero(slots.mask())
        return _outputs(dst=start + row, src=src)

    def op_rope_pairs(self, request: Any, head_dim: int, pairs: str) -> Any:
        """A quarter turn moves the first feature of a pair to the second's place."""
        n, dtype = head_dim // 2, self.parts.dtype
        one = np.eye(head_dim, dtype=dtype)[:, None]  # [hd, 1, hd]
        turned = self.parts.ops.rope(one, np.zeros((head_dim, n), dtype), np.ones((head_dim, n), dtype), pairs)[:, 0]
        first, second = np.nonzero(turned > 0.5)
        return _outputs(pairs=np.stack([first, second], axis=1))

    def op_offset(self, request: Any, shape: list[int], index: list[int]) -> Any:
        return _outputs(offset=[np.ravel_multi_index(index, shape)])

    # Level 1: operations

    def op_number(self, request: Any, function: str, **inputs: Any) -> Any:
        if self._numbers is None:
            self._numbers = self.parts.numbers()
        if function not in self._numbers:
            return {"skip": f"these operations have no {function} of their own"}
        return _outputs(y=np.atleast_1d(self._numbers[function](**inputs)).astype(self.parts.dtype))

    def op_linear(self, request: Any, x: Array, w: Array, b: Array | None = None) -> Any:
        return _outputs(y=self.parts.ops.linear(x, self._prepared(w), b))

    def op_dequantise(self, request: Any, kind: str, shape: list[int], data: str) -> Any:
        return _outputs(y=self.parts.dequantise(kind, bytes.fromhex(data), shape))

    def op_rms_norm(self, request: Any, x: Array, w: Array, eps: float) -> Any:
        return _outputs(y=self.parts.ops.rms_norm(x, w, eps))

    def op_layer_norm(self, request: Any, x: Array, w: Array, b: Array, eps: float) -> Any:
        return _outputs(y=self.parts.ops.layer_norm(x, w, b, eps))

    def op_rope_table(
        self, request: Any, base: float, head_dim: int, start: int, n: int, divisors: list[float] | None = None
    ) -> Any:
        rope = Rope(base, None if divisors is None else tuple(divisors))
        cos, sin = self.parts.ops.rope_table(rope, head_dim, start, n, np.dtype(self.parts.dtype))
        return _outputs(cos=cos, sin=sin)

    def op_rope(self, request: Any, x: Array, cos: Array, sin: Array, pairs: str) -> Any:
        return _outputs(y=self.parts.ops.rope(x, cos, sin, pairs))

    def op_activate(self, request: Any, kind: str, up: Array, gate: Array | None = None) -> Any:
        return _outputs(y=self.parts.ops.activate(up, kind, gate))

    def op_attention(
        self, request: Any, q: Array, k: Array, v: Array, scale: float, window: int | None = None,
        cuts: list[list[int]] | None = None,
    ) -> Any:  # fmt: skip
        """q [T, H, hd] are the last T of the S positions whose keys and values [S, G, hd] are given."""
        (t, h, hd), (s, g, _) = q.shape, k.shape
        config = small_config(h, g, hd, n_ctx=s)
        cache = self.parts.cache(config, self.parts.dtype)
        self._fill(cache, s - t, k, v)
        with cache.step(t) as start:
            cache.write(0, start, k[s - t :], v[s - t :])
            slots = cache.read(0, start, t, self._empty_model(config).kv_head, window)
            cut = None if cuts is None else np.array([[*edge, 0] for edge in cuts], np.int64)
            weights, scores = (np.empty((h, slots.count), self.parts.dtype) for _ in range(2))
            z = self.parts.ops.attention(q, cache, slots, scale, cut, weights, scores)
        return _outputs(scores=scores, pattern=weights, z=z)

    def op_hash_words(self, request: Any, x: Array) -> Any:
        hashes = self.parts.hash_words(np.asarray(x, np.float32)).reshape(-1)
        return _outputs(hash=[f"{value:016x}" for value in hashes.tolist()])

    def op_cache(self, request: Any, n_layers: int, n_ctx: int, actions: list[list[Any]]) -> Any:
        """Uses of a cache, one by one; the numbers that are written don't matter."""
        cache = self.parts.cache(small_config(1, 1, 2, n_ctx=n_ctx, n_layers=n_layers), self.parts.dtype)
        for call in actions:
            with cache.step(call[0]):
                for do, layer, start, n in call[1:]:
                    if do == "write":
                        cache.write(layer, start, *2 * [np.ones((n, 1, 2), self.parts.dtype)])
                    else:
                        cache.read(layer, start, n, np.zeros(1, np.int32))
                cache.commit(np.zeros(call[0], np.int32), np.zeros(2, self.parts.dtype))
        return _outputs(length=[cache.length])

    # Levels 2 to 4: blocks, runs, traces

    def op_block(self, request: Any, model: str, layer: int, calls: list[int], x: Array) -> Any:
        """One block over x [S, D], so many positions a call."""
        whole = self._model(model)
        config = changed(whole.config, n_layers=1, sliding=whole.config.sliding[layer : layer + 1])
        single = self.parts.make(config, one_block(whole.weights, layer), ops=self.parts.ops_name)
        cache, seen, stop = single.new_cache(), Collector(), np.cumsum(calls)
        for step, (begin, end) in enumerate(zip(stop - calls, stop, strict=True)):
            seen.begin(step, np.zeros(end - begin, np.int32), begin)
            with cache.step(end - begin) as start:
                self.parts.blocks(single, x[begin:end], cache, start, seen)
                cache.commit(np.zeros(end - begin, np.int32), np.zeros(config.vocab_size, self.parts.dtype))
            seen.end(np.zeros(0))
        self._add_inner(single, seen)
        return _wanted(request, lambda name: seen.get(name.replace(f"layer{layer}", "layer0")))

    def op_run(self, request: Any, model: str, calls: list[Any], cuts: list[dict[str, int]] | None = None) -> Any:
        """Calls one after the other on one cache; a call that is refused changes nothing."""
        run, seen = self._model(model), Collector()
        cache, errors = run.new_cache(), []
        for tokens in calls:
            try:
                now = [Cut(**cut) for cut in cuts or () if cache.length <= cut["dst"] < cache.length + len(tokens)]
                run.forward(np.array(tokens, np.int64), cache, observer=seen, edits=now)
                errors.append("")
            except NanokvError as error:
                errors.append(type(error).__name__)
        found = {"errors": errors, "length": [cache.length]}
        return _wanted(request, lambda name: found.get(name, seen.get(name)))

    def op_trace(self, request: Any, model: str, calls: list[list[int]], trace_level: str, path: str) -> Any:
        """Record the calls, the first of which a user gives and each other of which the model chose, into a folder."""
        run = self._model(model)
        cache = run.new_cache()
        with Recorder(path, level=trace_level) as recorder:
            for i, tokens in enumerate(calls):
                if i == 1:
                    recorder.turn("model", sampled=True)
                run.forward(np.array(tokens, np.int64), cache, observer=recorder)
        return _outputs()

    # Level 5: sampling and text

    def op_pcg32(self, request: Any, seed: str, n: int, stream: int = 0) -> Any:
        random = self.parts.sampling.PCG32(int(seed), stream)
        return _outputs(words=[random.next() for _ in range(n)])

    def op_greedy(self, request: Any, logits: Array) -> Any:
        return _outputs(token=[self.parts.sampling.greedy(logits)])

    def op_sample(self, request: Any, logits: Array, seed: str, n: int, **options: Any) -> Any:
        random = self.parts.sampling.PCG32(int(seed))
        return _outputs(tokens=[self.parts.sampling.sample(logits, random, **options) for _ in range(n)])

    def op_generate(self, request: Any, model: str, tokens: list[int], seed: str = "0", **options: Any) -> Any:
        made = self.parts.sampling.generate(self._model(model), np.array(tokens, np.int64), seed=int(seed), **options)
        return _outputs(tokens=list(made))

    def op_encode(self, request: Any, tokenizer: str, text: str) -> Any:
        return _outputs(ids=self.parts.tokenizer(tokenizer).encode(text))

    def op_decode(self, request: Any, tokenizer: str, ids: list[int]) -> Any:
        return _outputs(text=[self.parts.tokenizer(tokenizer).decode(ids)])

    # What must be refused

    def op_check_config(self, request: Any, config: dict[str, Any]) -> Any:
        config_of(config)
        return _outputs(ok=[1])

    def op_check_weights(self, request: Any, config: dict[str, Any], shapes: dict[str, list[int]]) -> Any:
        made = config_of(config)
        check(weights_of(made, {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}), made)
        return _outputs(ok=[1])

    def op_open_file(self, request: Any, kind: str, data: str) -> Any:
        with tempfile.NamedTemporaryFile(suffix=f".{kind}") as file:
            file.write(bytes.fromhex(data))
            file.flush()
            tensors = open_gguf(file.name).tensors if kind == "gguf" else open_safetensors(file.name)[0]
            return _outputs(names=sorted(tensors))

    # Models

    def _model(self, path: str) -> Transformer:
        """A folder in the suite's plain form, or what people publish. Kept, for several cases ask for the same one."""
        if path not in self._models:
            plain = (Path(path) / "weights.safetensors").is_file()
            made = self._plain_model(Path(path)) if plain else self.parts.load(path, ops=self.parts.ops_name)
            if self.parts.dtype != np.float32:
                double = made.weights.map(lambda array: np.asarray(array, self.parts.dtype))
                made = self.parts.make(made.config, double, ops=self.parts.ops_name)
            self._models[path] = made
        return self._models[path]

    def _plain_model(self, folder: Path) -> Transformer:
        config = config_of(read_json(folder / "config.json"))
        tensors, _ = open_safetensors(folder / "weights.safetensors")
        arrays = {name: np.asarray(tensor) for name, tensor in tensors.items()}
        return self.parts.make(config, weights_of(config, arrays), ops=self.parts.ops_name)

    def _empty_model(self, config: Config) -> Transformer:
        shapes = model_shapes(config) | {f"blocks.0.{name}": shape for name, shape in block_shapes(config).items()}
        arrays = {name: np.zeros(shape, self.parts.dtype) for name, shape in shapes.items()}
        return self.parts.make(config, weights_of(config, arrays), ops=self.parts.ops_name)

    def _prepared(self, w: Array) -> Any:
        if self.parts.ops_name == "numpy":
            return w
        from nanokv.panels import place

        return place([w], packed=False)[id(w)]

    def _fill(self, cache: KVCache, n: int, k: Array | None = None, v: Array | None = None) -> None:
        """Commit n positions; their keys and values, [S, 1, 2] zeros if none are given."""
        shape = (n, cache.config.n_kv_heads, cache.config.head_dim)
        if n:
            with cache.step(n) as start:
                cache.write(0, start, *(np.zeros(shape, self.parts.dtype) if x is None else x[:n] for x in (k, v)))
                cache.commit(np.zeros(n, np.int32), np.zeros(2, self.parts.dtype))

    def _add_inner(self, model: Transformer, seen: Collector) -> None:
        """What the forward pass doesn't report: the norms' results and the inside of the MLP, computed again."""
        c, ops, w = model.config, model.ops, model.weights.blocks[0]
        for step in seen.starts:
            at = f"step{step}.layer0."
            seen.found.setdefault(at + "ln1", model.norm(seen.found[at + "resid_pre"], w.attn_norm, w.attn_norm_bias))
            ln2 = seen.found.setdefault(at + "ln2", model.norm(seen.found[at + "resid_mid"], w.mlp_norm, w.mlp_norm_bias))
            up = seen.found.setdefault(at + "up", ops.linear(ln2, w.w_up, w.b_up))
            gate = seen.found.setdefault(at + "gate", ops.linear(ln2, w.w_gate, w.b_gate)) if c.gated_mlp else None
            seen.found.setdefault(at + "act", ops.activate(up, c.activation, gate))


def _outputs(**found: Any) -> dict[str, Any]:
    return {"outputs": found}


def _wanted(request: Mapping[str, Any], get: Callable[[str], Any]) -> dict[str, Any]:
    found = {name: get(name) for name in request["want"]}
    return {"outputs": {name: value for name, value in found.items() if value is not None}}


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer conformance requests with nanokv, a line each.")
    parser.add_argument("--ops", choices=("numpy", "numba"), default="numpy", help="what computes")
    parser.add_argument("--bug", help="a name of flags.json: answer as a port with this bug would")
    options = parser.parse_args()
    port = Port(parts_of(options.ops))
    if options.bug:
        from making.mutants import mutant

        port = mutant(options.bug)
    for line in sys.stdin:
        request = json.loads(line)
        print(as_json({"id": request["id"], **port.answer(request)}), flush=True)


if __name__ == "__main__":
    main()
