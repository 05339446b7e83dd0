"""Level 1: one operation at a time, each with the inputs at which wrong code shows."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
from making.cases import case
from making.draws import blocks, normal

from nanokv.config import Rope
from nanokv.ops import rope_table

Array = np.ndarray
Cases = list[dict[str, Any]]


def f32(*values: float) -> Array:
    return np.array(values, np.float32)


def numbers() -> Cases:
    """fma, exp, tanh, erf, sums and maxima: what the exact profile is built from."""
    tie = f32(1 + 2**-12)
    signs = case(
        "fma/rounds_once", "number", {"function": "fma", "a": np.concatenate([tie, tie, f32(3, -0.0, 1e38, 0.1)]),
                                      "b": np.concatenate([tie, tie, f32(1 / 3, 1, 10, 0.1)]),
                                      "c": f32(2**-60, -(2**-60), -1, 0.0, -np.inf, 2**-149)},
        "the first two tell a double-rounded fma: by way of float64 both give 3f801000", profiles=["exact"],
    )  # fmt: skip
    ends = f32(-np.inf, -1000, -105, -104, -103.5, -100, -88, -87.3, 88, 88.7, 88.8, 89, 1000, np.inf, np.nan, -0.0, 1e-42)
    middle = np.linspace(-20, 20, 41).astype(np.float32) + np.float32(0.037)
    small = f32(-0.0, 0.0, 1e-42, -1e-30, 1e-6, 0.1, -0.3, 0.59, 0.6, -0.61, 0.9, 0.919, 0.92, -0.93, 1.5, -2.5, 3.9, 4, 4.1)
    far = f32(-np.inf, np.inf, np.nan, 9, -9.5, 45, -100)
    made = [
        signs,
        case("exp/ends", "number", {"function": "exp", "x": ends}, "where it becomes subnormal, 0 and infinite"),
        case("exp/middle", "number", {"function": "exp", "x": middle}),
        case("tanh/all", "number", {"function": "tanh", "x": np.concatenate([small, far])}, "both branches, and the ends"),
        case("erf/all", "number", {"function": "erf", "x": np.concatenate([small, far])}, "both branches, and the ends"),
    ]
    x = normal("sum", 41)
    big = normal("sum big", 35, scale=1000.0) * normal("sum big 2", 35)
    made += [
        case("sum/short", "number", {"function": "sum", "x": x[:5], "first": 0}, "fewer elements than lanes"),
        case("sum/long", "number", {"function": "sum", "x": big, "first": 0}, "lanes of unequal length", tol=[2e-3, 1e-5]),
        case("sum/from_slot_21", "number", {"function": "sum", "x": big, "first": 21},
             "the lane of a slot is its own number mod 16: the first element goes to lane 5", tol=[2e-3, 1e-5]),
        case("sum_of_squares/long", "number", {"function": "sum_of_squares", "x": x, "first": 0},
             "squares go in by fma", tol=[2e-5, 1e-5]),
        case("maximum/with_nan", "number", {"function": "maximum", "x": f32(-3, np.nan, 2, -np.inf, 1), "first": 0},
             "a NaN is passed over", profiles=["exact"]),
    ]  # fmt: skip
    return made


def linear() -> Cases:
    x, w, b = normal("linear x", 3, 20), normal("linear w", 7, 20), normal("linear b", 7)
    tiny = f32(3e-39, 1, -1e-38)[:, None]
    return [
        case("linear/with_bias", "linear", {"x": x, "w": w, "b": b}, "the bias comes last"),
        case("linear/without_bias", "linear", {"x": x, "w": w}, "W is [outputs, inputs]: 3 rows of 20, 7 outputs"),
        case("linear/long", "linear", {"x": normal("linear long x", 2, 150), "w": normal("linear long w", 5, 150)},
             "long enough that another order shows in the bits", tol=[2e-5, 1e-5]),
        case("linear/square", "linear", {"x": x, "w": normal("linear square", 20, 20)},
             "a square matrix hides a transposition from shape checks", tol=[4e-6, 1e-5]),
        case("linear/one_row_of_three", "linear", {"x": x[1:2], "w": w, "b": b},
             "row 1 of linear/with_bias alone: the same bits as beside others"),
        case("linear/subnormal", "linear", {"x": tiny, "w": f32(0.25, -0.5)[:, None]},
             "results below 1.2e-38 are kept", tol=[1e-45, 1e-5]),
        case("linear/cancels", "linear", {"x": f32(1e4, 1, -1e4, 3)[None], "w": f32(1, 1e-3, 1, 1e-4)[None]},
             "the products are added in the order of k", tol=[2e-3, 1e-5]),
    ]  # fmt: skip


def quantised() -> Cases:
    """Each block type: two rows, with halves where the scales stand."""
    made = []
    for kind, width, block, halves in (
        ("F32", 5, 4, ()), ("F16", 6, 2, (0,)), ("BF16", 6, 2, ()),
        ("Q8_0", 64, 34, (0,)), ("Q4_0", 64, 18, (0,)), ("Q4_1", 64, 20, (0, 2)),
        ("Q5_0", 64, 22, (0,)), ("Q5_1", 64, 24, (0, 2)),
        ("Q4_K", 256, 144, (0, 2)), ("Q5_K", 256, 176, (0, 2)), ("Q6_K", 256, 210, (208,)),
    ):  # fmt: skip
        per_block = {"F32": 1, "F16": 1, "BF16": 1}.get(kind, 256 if kind.endswith("K") else 32)
        rows = 1 if kind.endswith("K") else 2
        n_bytes = rows * width // per_block * block
        data = blocks(kind, n_bytes, halves, block)
        if kind in ("F32", "BF16"):
            data = normal(kind, rows * width).astype("<f4").tobytes()
            data = data if kind == "F32" else b"".join(data[i + 2 : i + 4] for i in range(0, len(data), 4))
        if kind == "F16":  # a subnormal, the largest, and a negative zero among them
            data = struct.pack("<3H", 0x0001, 0x7BFF, 0x8000) + data[6:]
        inputs = {"kind": kind, "shape": [rows, width], "data": data.hex()}
        made.append(case(f"dequantise/{kind}", "dequantise", inputs, tol=[1e-7, 1e-6]))
    return made


def norms() -> Cases:
    x, w, b = normal("norm x", 2, 20), normal("norm w", 20, scale=0.3, around=1), normal("norm b", 20, scale=0.3)
    long = normal("norm long", 1, 37, scale=3.0, around=1.0)
    made = [
        case("rms_norm/plain", "rms_norm", {"x": x, "w": w, "eps": 1e-5}),
        case("rms_norm/small_x", "rms_norm", {"x": x * np.float32(0.01), "w": w, "eps": 1e-5},
             "x of the size of the root of eps, so that it shows where eps goes, and which it is"),
        case("rms_norm/zero", "rms_norm", {"x": x * 0, "w": w, "eps": 1e-6}, "0, not NaN: eps is under the root"),
        case("rms_norm/heads", "rms_norm", {"x": normal("norm heads", 2, 3, 6), "w": w[:6], "eps": 1e-6},
             "as the q/k norm: each row of six by itself"),
        case("rms_norm/long", "rms_norm", {"x": long, "w": normal("norm long w", 37), "eps": 1e-5},
             "more than two turns of the lanes"),
        case("layer_norm/plain", "layer_norm", {"x": x + np.float32(0.5), "w": w, "b": b, "eps": 1e-5},
             "a mean that is not 0"),
        case("layer_norm/small_x", "layer_norm", {"x": x * np.float32(0.01), "w": w, "b": b, "eps": 1e-5}),
        case("layer_norm/long", "layer_norm", {"x": long, "w": normal("norm long w", 37), "b": normal("norm long b", 37),
                                               "eps": 1e-5}),
    ]  # fmt: skip
    return made


def rope() -> Cases:
    made = []
    for name, inputs, comment in (
        ("smollm2", {"base": 100000.0, "head_dim": 64, "start": 8190, "n": 2}, "the last positions of SmolLM2's context"),
        ("far", {"base": 500000.0, "head_dim": 8, "start": 131070, "n": 2},
         "float32 angles are wrong in the third digit here"),
        ("divisors", {"base": 50.0, "head_dim": 8, "start": 5, "n": 2, "divisors": [1.0, 1.5, 3.0, 4.0]}, "a divisor a pair"),
    ):  # fmt: skip
        made.append(case(f"rope_table/{name}", "rope_table", inputs, comment, tol=[2e-7, 1e-6]))
    made.append(case("rope_table/nearest", "rope_table", {"base": 10000.0, "head_dim": 96, "start": 1721, "n": 1},
                     "pow of float64 gives a frequency here that is off by a unit, and an entry off by a bit",
                     tol=[2e-7, 1e-6], since="2.0.0"))  # fmt: skip
    x = normal("rope x", 3, 2, 8)
    for pairs in ("halves", "neighbours"):
        for name, start in (("first_positions", 0), ("later", 17)):
            cos, sin = rope_table(Rope(100.0), 8, start, 3, np.dtype(np.float32))
            inputs = {"x": x, "cos": cos, "sin": sin, "pairs": pairs}
            comment = "position 0 is the identity, so the later rows count" if start == 0 else ""
            made.append(case(f"rope/{pairs}_{name}", "rope", inputs, comment))
    return made


def activations() -> Cases:
    x = np.concatenate([np.linspace(-6, 6, 25), [-100, 100, -0.0, 0.3, 1e-4]]).astype(np.float32)[None]
    gate, ends = normal("gate", *x.shape, scale=2.0), f32(np.nan, -0.0, 0.0, -np.inf, np.inf, 1e-42, -1e-42)[None]
    made = [case(f"activate/{kind}", "activate", {"kind": kind, "up": x})
            for kind in ("silu", "gelu_tanh", "gelu", "relu")]  # fmt: skip
    made[1]["comment"] = made[2]["comment"] = "the two formulas of GELU are at most 4.7e-4 apart"
    made += [
        case("activate/silu_gated", "activate", {"kind": "silu", "up": x, "gate": gate}, "act(gate) * up"),
        case("activate/gelu_gated", "activate", {"kind": "gelu_tanh", "up": x, "gate": gate}),
        case("activate/relu_ends", "activate", {"kind": "relu", "up": ends}, "NaN stays NaN, -0 becomes 0", since="2.0.0"),
    ]
    return made


def attention() -> Cases:
    def inputs(name: str, t: int, s: int, h: int, g: int, hd: int, **more: Any) -> dict[str, Any]:
        return {"q": normal(f"{name} q", t, h, hd), "k": normal(f"{name} k", s, g, hd), "v": normal(f"{name} v", s, g, hd),
                "scale": 1 / math.sqrt(hd), **more}  # fmt: skip

    shared = inputs("shared", 2, 5, 6, 2, 4)
    hot = inputs("hot", 2, 4, 2, 1, 4)
    hot["q"] = hot["q"] * np.float32(100)
    planted = inputs("planted", 3, 3, 2, 1, 4)
    planted["v"][2], planted["k"][2] = np.inf, np.nan
    infinite = inputs("infinite", 2, 4, 2, 1, 4)
    infinite["v"][1] = np.inf
    return [
        case("attention/one_slot", "attention", inputs("one", 1, 1, 2, 2, 4), "a weight of exactly 1"),
        case("attention/prompt", "attention", inputs("prompt", 4, 4, 3, 1, 5)),
        case("attention/decode", "attention", inputs("decode", 1, 9, 4, 2, 4)),
        case("attention/chunk", "attention", inputs("chunk", 3, 8, 4, 2, 4), "three positions after five cached ones"),
        case("attention/shared_heads", "attention", shared, "six query heads, two key/value heads"),
        case("attention/large_scores", "attention", hot, "scores far above 88, where exp overflows float32",
             tol=[1e-4, 1e-4]),
        case("attention/many_slots", "attention", inputs("many", 2, 40, 2, 1, 4), "more slots than lanes"),
        case("attention/window", "attention", inputs("window", 2, 23, 2, 1, 4, window=18),
             "rows begin at slots 4 and 5, and so in lanes 4 and 5"),
        case("attention/cut", "attention", shared | {"cuts": [[0, 3, 1], [5, 4, 4], [1, 3, 0]]},
             "cut edges have the score -inf and the weight 0", optional=["scores", "pattern", "z"]),
        case("attention/all_cut", "attention", inputs("all cut", 1, 2, 1, 1, 4, cuts=[[0, 1, 0], [0, 1, 1]]),
             "a head that reads nothing gives 0, not NaN", optional=["scores", "pattern", "z"]),
        case("attention/cuts_unordered", "attention",
             shared | {"cuts": [[4, 4, 3], [0, 3, 1], [4, 4, 1], [4, 4, 3], [4, 4, 0]]},
             "cuts in any order, and one twice", optional=["scores", "pattern", "z"], since="2.0.0"),
        case("attention/cut_infinity", "attention", infinite | {"cuts": [[0, 2, 1], [0, 3, 1], [1, 2, 1], [1, 3, 1]]},
             "a cut edge is left out: 0 times infinity would be NaN", optional=["scores", "pattern", "z"], profiles=["exact"],
             since="2.0.0"),
        case("attention/masked_infinity", "attention", planted,
             "what later slots hold, NaN and infinity, must not reach earlier positions", profiles=["exact"]),
    ]  # fmt: skip


def hashes() -> Cases:
    x = np.concatenate([normal("hash", 2, 8), f32(0, -0.0, 1, 2, 3, 4, 5, 6)[None]])
    return [case("hash_words/rows", "hash_words", {"x": x}, "three rows of eight words; 0 and -0 differ")]


FILES = {
    "numbers": numbers,
    "linear": linear,
    "dequantise": quantised,
    "norms": norms,
    "rope": rope,
    "activations": activations,
    "attention": attention,
    "hashes": hashes,
}
