"""What a trace does not hold, computed anew with the model's weights, in the order of docs/arithmetic.md.

A forward pass makes more numbers than a trace keeps: queries, normed states, the MLP's units. Those of one position and
layer follow from the states, keys, values and scores that a trace of level `states` holds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from nanokv import ops
from nanokv.errors import TraceError
from nanokv.feedback import FeedbackTransformer
from nanokv.trace import arithmetic
from nanokv.trace.ids import SITES, Id, recorded
from nanokv.trace.recorder import Recorder
from nanokv.trace.store import Trace

if TYPE_CHECKING:
    from nanokv.transformer import Transformer

Array = np.ndarray


class Operands:
    """The arrays behind the numbers of a position: as the trace holds them, or else computed from what it holds."""

    def __init__(self, trace: Trace, model: Transformer | None) -> None:
        self.trace, self.model, self.config = trace, model, trace.config
        self.get: Callable[[str, int | None, int], Array] = lru_cache(maxsize=256)(self._get)
        self.weight: Callable[[str, int | None], Array | None] = lru_cache(maxsize=64)(self._weight)

    def _get(self, site: str, layer: int | None, pos: int) -> Array:
        """A site's array at a position, [..] as SITES says; also q_linear, k_linear, v_linear, attn_linear, mlp_linear
        (before RoPE and any norm), q_normed and k_normed (before RoPE)."""
        if site in SITES and SITES[site].array is not None:
            return recorded(self.trace, Id(site, layer, pos))
        return _COMPUTED[site](self, layer, pos)

    def _weight(self, name: str, layer: int | None = None) -> Array | None:
        if self.model is None:
            raise TraceError(f"this takes the model's weights ({name}): give the model")
        weights = self.model.weights
        array: Any = getattr(weights if layer is None else weights.blocks[layer], name)
        return None if array is None else np.asarray(array, np.float32)

    @property
    def shares(self) -> Array:
        """float32 [L + 1]: a feedback model's, of every depth in its memory."""
        if not isinstance(self.model, FeedbackTransformer):
            raise TraceError("this takes a feedback model's shares of the depths: give the model")
        return self.model.shares

    def kv_input(self) -> str:
        """What keys and values are made of: the normed state that enters the layer, or in a feedback model the memory."""
        return "ln_memory" if self.trace.about.architecture == "feedback" else "ln1"

    def kv_layer(self, layer: int) -> int:
        """Whose weights make a layer's keys and values: its own, or the first's where all share them."""
        return 0 if getattr(self.model, "shared_kv", False) else layer

    def matrix(self, name: str, layer: int | None = None) -> Array:
        """A matrix that every model has."""
        array = self.weight(name, layer)
        assert array is not None
        return array

    def cosines(self, layer: int, pos: int) -> tuple[Array, Array] | None:
        """cos and sin of a layer's RoPE at a position, [hd/2] each; None without RoPE."""
        rope = self.config.rope_of(layer)
        if rope is None:
            return None
        cos, sin = ops.rope_table(rope, self.config.head_dim, pos, 1, np.dtype(np.float32))
        return cos[0], sin[0]

    def norm(self, x: Array, name: str, layer: int | None) -> Array:
        bias = None if name.startswith("post") else self.weight(f"{name}_bias", layer)
        return arithmetic.norm(self.config.norm, x, self.weight(name, layer), bias, self.config.norm_eps)

    def linear(self, x: Array, matrix: str, bias: str, layer: int | None) -> Array:
        return arithmetic.linear(x.reshape(-1), self.matrix(matrix, layer), self.weight(bias, layer))


def _heads_linear(name: str) -> Callable[[Operands, int, int], Array]:
    def linear(o: Operands, layer: int, pos: int) -> Array:
        x, owner = ("ln1", layer) if name == "q" else (o.kv_input(), o.kv_layer(layer))
        return o.linear(o.get(x, layer, pos), f"w{name}", f"b{name}", owner).reshape(-1, o.config.head_dim)

    return linear


def _heads_normed(name: str) -> Callable[[Operands, int, int], Array]:
    def normed(o: Operands, layer: int, pos: int) -> Array:
        x = o.get(f"{name}_linear", layer, pos)
        w = o.weight(f"{name}_norm", layer if name == "q" else o.kv_layer(layer))
        return x if w is None else np.stack([arithmetic.norm("rms", row, w, None, o.config.norm_eps) for row in x])

    return normed


def _act(o: Operands, layer: int, pos: int) -> Array:
    up = o.get("up", layer, pos)
    if not o.config.gated_mlp:
        return arithmetic.activate(o.config.activation, up)
    return arithmetic.activate(o.config.activation, o.get("gate", layer, pos)) * up


def _memory(o: Operands, layer: int | None, pos: int) -> Array:
    """The sum of all depths by their shares, from the embedding up (Fan et al. 2020)."""
    depths = [o.get("resid_pre", 0, pos), *(o.get("resid_post", layer, pos) for layer in range(o.config.n_layers))]
    memory: Array = o.shares[0] * depths[0]
    for share, x in zip(o.shares[1:], depths[1:], strict=True):
        memory = memory + share * x
    return memory


_COMPUTED: dict[str, Callable[[Operands, Any, int], Array]] = {
    "ln1": lambda o, l, p: o.norm(o.get("resid_pre", l, p), "attn_norm", l),
    "q_linear": _heads_linear("q"),
    "k_linear": _heads_linear("k"),
    "v_linear": _heads_linear("v"),
    "q_normed": _heads_normed("q"),
    "k_normed": _heads_normed("k"),
    "attn_linear": lambda o, l, p: o.linear(o.get("z", l, p), "wo", "bo", l),
    "ln2": lambda o, l, p: o.norm(o.get("resid_mid", l, p), "mlp_norm", l),
    "gate": lambda o, l, p: o.linear(o.get("ln2", l, p), "w_gate", "b_gate", l),
    "up": lambda o, l, p: o.linear(o.get("ln2", l, p), "w_up", "b_up", l),
    "act": _act,
    "mlp_linear": lambda o, l, p: o.linear(o.get("act", l, p), "w_down", "b_down", l),
    "memory": _memory,
    "ln_memory": lambda o, l, p: o.norm(o.get("memory", None, p), "attn_norm", o.kv_layer(l)),
    "ln_final": lambda o, l, p: o.norm(o.get("resid_post", o.config.n_layers - 1, p), "final_norm", None),
}


def rerun(trace: Trace, model: Transformer, pos: int) -> tuple[Trace, int | None]:
    """The model run on the trace's tokens up to a position, recorded at level `states`, and the first position whose keys
    or values are not those that the trace recorded, by their hashes; None if they all are.

    However the tokens were split into calls, the numbers are the same, so one forward will do. TraceError where the trace
    begins within a sequence, for then it does not hold the tokens before it.
    """
    if trace.steps[0].start > 0:
        raise TraceError(f"the trace begins at position {trace.steps[0].start} and holds no tokens before it, so it cannot be "
                         "run again: record it from the beginning, or at level states")  # fmt: skip
    recorder = Recorder(level="states")
    model.forward(trace.tokens["token_id"][: pos + 1], observer=recorder, last_logits_only=True)
    again = recorder.trace
    other = np.zeros(pos + 1, bool)
    for name in ("k_hash", "v_hash"):
        old, new = (np.concatenate([step.arrays[name] for step in run.steps], axis=1) for run in (trace, again))  # [L, S, G]
        other |= (old[:, : pos + 1] != new).any(axis=(0, 2))
    return again, int(np.argmax(other)) if other.any() else None


def check_model(trace: Trace, model: Transformer) -> None:
    """TraceError unless this is the model that was traced, as far as the trace says which it was."""
    feedback = isinstance(model, FeedbackTransformer)
    if feedback != (trace.about.architecture == "feedback") or model.config != trace.config or (
        trace.model_hash and trace.model_hash != model.fingerprint
    ):
        raise TraceError(f"the trace is of another model ({trace.model_name or 'without a name'}, hash "
                         f"{trace.model_hash[:12] or 'unknown'}): this one is {model.name or 'without a name'}, hash "
                         f"{model.fingerprint[:12]}")  # fmt: skip
