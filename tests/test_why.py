"""`why` tells a number's arithmetic: its printed equations are put together again here, by other means, to the stated bits."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from models import CONFIGS, model, tokens
from test_trace import recorded

from nanokv.edits import Cut, ZeroValue
from nanokv.errors import TraceError
from nanokv.feedback import FeedbackTransformer
from nanokv.handmade import induction
from nanokv.trace import Recorder, Trace
from nanokv.trace.arithmetic import erf, exp, fma, lane_sum, tanh
from nanokv.trace.explain import why
from nanokv.trace.ids import AFTER_THE_LAYERS, SITES
from nanokv.trace.telling import SHORT, Stage
from nanokv.trace.why import explain, same_bits

F = np.float32


def nearest(exact: Fraction) -> np.float32:
    """The float32 nearest to a number, ties to even, by whole numbers alone."""
    if exact == 0:
        return F(0)
    size = abs(exact)
    power = size.numerator.bit_length() - size.denominator.bit_length()
    power -= size < Fraction(2) ** power  # 2^power <= size < 2^(power + 1)
    unit = Fraction(2) ** max(power - 23, -149)
    whole, rest = divmod(size, unit)
    whole += rest > unit / 2 or (rest == unit / 2 and whole % 2 == 1)
    value = np.float64(int(whole)) * np.float64(unit)
    return F(np.inf if value >= 2.0**128 else value) * F(1 if exact > 0 else -1)


def exact_fma(a: np.float32, b: np.float32, c: np.float32) -> np.float32:
    """a * b + c rounded once."""
    in_float64 = np.float64(a) * np.float64(b) + np.float64(c)  # right where nothing is rounded: infinities, NaN, zeros
    if not np.isfinite(in_float64):
        return F(in_float64)
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    return nearest(exact) if exact != 0 else F(in_float64)


def polynomial(x: np.float32, *coefficients: float) -> np.float32:
    p = F(coefficients[0])
    for coefficient in coefficients[1:]:
        p = exact_fma(p, x, F(coefficient))
    return p


def exact_exp(x: np.float32) -> np.float32:
    """F1 of docs/arithmetic.md."""
    x = F(-105) if x < -105 else F(89) if x > 89 else x
    n = exact_fma(x, F(1.44269504), F(12582912)) - F(12582912)
    r = exact_fma(n, F(1.90465421e-9), exact_fma(n, F(-0.693147182), x))
    p = polynomial(r, 0.00138140086, 0.00836900063, 0.0416684151, 0.166665182, 0.49999994, 1, 1)
    half = int(n) >> 1
    return p * F(2.0**half) * F(2.0 ** (int(n) - half))


def exact_tanh(x: np.float32) -> np.float32:
    """F2."""
    a = abs(x)
    s = a * a
    p = polynomial(s, -0.00589515036, 0.0207959637, -0.0537838265, 0.133319244, -0.333332986)
    value = exact_fma(p * s, a, a) if a < F(0.6) else 1 - 2 / (exact_exp(a + a) + 1)
    return np.copysign(value, x)


def exact_erf(x: np.float32) -> np.float32:
    """F3."""
    a = min(abs(x), F(4))
    p = polynomial(a * a, 8.31677244e-05, -0.000813001185, 0.00519990642, -0.0268589407, 0.112836875, -0.376126319, 0.128379166)
    q = polynomial(a, 7.37456389e-07, 1.13113501e-05, -0.000378849683, 0.0039941012, -0.0247745123, 0.107858211, 0.633663297,
                   1.12938178, -0.000150613705)  # fmt: skip
    return np.copysign(exact_fma(p, a, a) if a < F(0.92) else 1 - exact_exp(-q), x)


FUNCTIONS = {"fma": exact_fma, "exp": exact_exp, "tanh": exact_tanh, "erf": exact_erf, "sqrt": np.sqrt, "max": max,
             "relu": lambda x: max(x, F(0))}  # fmt: skip
OPERATORS = {ast.Add: np.add, ast.Sub: np.subtract, ast.Mult: np.multiply, ast.Div: np.divide}


def evaluated(node: ast.expr) -> np.float32:
    """What an expression comes to in float32, rounding once for each operation."""
    if isinstance(node, ast.Constant):
        return F(node.value)
    if isinstance(node, ast.Name):
        return F(node.id)  # inf, nan
    if isinstance(node, ast.UnaryOp):
        return -evaluated(node.operand)
    if isinstance(node, ast.BinOp):
        return F(OPERATORS[type(node.op)](evaluated(node.left), evaluated(node.right)))
    assert isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    return F(FUNCTIONS[node.func.id](*map(evaluated, node.args)))


def equations(lines: list[str]) -> Iterator[tuple[np.float32, str]]:
    """The printed equations: the value on the left, the expression on the right without the note behind it."""
    for line in lines:
        if match := re.fullmatch(r"  (\S+) += (.+?)(   .*)?", line):
            yield F(match[1]), match[2].strip()


def assert_recombines(lines: list[str], stated: np.ndarray) -> None:
    """Every printed equation holds to the bit, and the last one gives the stated number."""
    value = None
    with np.errstate(all="ignore"):
        for value, expression in equations(lines):
            assert same_bits(evaluated(ast.parse(expression, mode="eval").body), value), f"{value} = {expression}"
    assert value is not None and same_bits(value, stated)


def assert_goes_on(stage: Stage) -> None:
    """In a sum term by term, each line goes on from what the line before came to."""
    for before, after in pairwise(stage.equations):
        expression = after.expression
        start = expression[:-1].split(", ")[2] if expression.startswith("fma(") else expression.split(" ")[0]
        assert start == str(before.value) or expression == "-inf", (before, after)


def element(trace: Trace, site: str, random: np.random.Generator) -> str:
    """The id of one number of a site, at a position and in a layer."""
    c, pos = trace.config, int(random.integers(1, trace.length))
    sizes = {"D": c.d_model, "H": c.n_heads, "hd": c.head_dim, "G": c.n_kv_heads, "F": c.d_ff, "V": c.vocab_size, "S": pos + 1}
    index = ",".join(str(random.integers(sizes[axis])) for axis in SITES[site].axes)
    where = "" if site in AFTER_THE_LAYERS else f"layer{random.integers(c.n_layers)}."
    return f"{where}pos{pos}.{site}" + (f"[{index}]" if index else "")


@pytest.mark.parametrize("family", CONFIGS)
def test_the_printed_equations_give_the_recorded_bits(family: str) -> None:
    small, trace = recorded(family)
    random = np.random.default_rng(0)
    for site in SITES:
        if (site == "gate" and not small.config.gated_mlp) or "memory" in site:
            continue
        for _ in range(3):
            told = explain(trace, element(trace, site, random), small)
            assert not told.recorded or same_bits(told.computed, told.value), told.name
            assert_recombines(list(told.lines(everything=True)), told.value)
            for stage in told.stages:
                if stage.rule in ("L1", "A2", "A4", "T1"):
                    assert_goes_on(stage)


def test_operands_are_those_that_the_trace_holds() -> None:
    small, trace = recorded()
    told = explain(trace, "step2.layer1.head4.pattern[1,3]", small)  # position 6 reads position 3; head 4 reads kv head 1
    (scores, _, exponents, _, weight) = told.stages
    q, k = trace["layer1.pos6.q"][4], trace["layer1.pos3.k"][1]
    for i, equation in enumerate(scores.equations[:-1]):
        assert equation.expression.startswith(f"fma({q[i]!s}, {k[i]!s}, ")
    row = trace["layer1.pos6.scores"][4]
    assert [each.expression for each in exponents.equations] == [f"exp({score!s} - {row.max()!s})" for score in row]
    assert weight.equations[0].value == trace["layer1.pos6.pattern"][4, 3] == told.value
    assert told.at == explain(trace, "layer1.pos6.head4.pattern[3]").at


def test_it_begins_with_the_number_and_what_it_is() -> None:
    trace = recorded()[1]
    first, second = list(why(trace, "step2.layer1.head4.pattern[1,3]"))[:2]
    assert first == f"step2.layer1.head4.pattern[1,3] = {trace['layer1.pos6.pattern'][4, 3]!s}   (= layer1.pos6.pattern[4,3])"
    texts = trace.tokens["text"]
    assert second == f"of all that {texts[6]!r} (6; step 2, user) reads in layer 1 head 4, the part that it reads of " \
                     f"{texts[3]!r} (3; step 0, user)"  # fmt: skip


def test_long_sums_are_folded_unless_everything_is_wanted() -> None:
    small, trace = recorded()
    folded, whole = (list(why(trace, "layer1.pos5.mlp_out[3]", small, everything=wanted)) for wanted in (False, True))
    assert len(list(equations(whole))) == small.config.d_ff and len(list(equations(folded))) == 6
    assert "  ... 22 more" in folded
    assert_recombines(folded, trace["layer1.pos5.mlp_out"][3])


def test_terms_that_change_nothing_are_folded_first() -> None:
    handmade = induction(32, 32)
    recorder = Recorder(level="states")
    handmade.forward(handmade.tokenizer.encode("a b a"), observer=recorder)
    lines = list(why(recorder.trace, "layer1.pos3.pattern[0,2]", handmade))
    sums = [expression for _, expression in equations(lines) if expression.startswith("fma")]
    assert "fma(66000.0, 1.0, 0.0)" in sums and len(sums) < SHORT


def test_without_the_model_what_follows_from_the_trace_is_told() -> None:
    trace = recorded(level="vectors")[1]
    for name in ("layer1.pos5.scores[2,3]", "layer1.pos5.pattern[2,3]", "layer1.pos5.z[2,3]"):
        told = explain(trace, name)
        assert told.recorded and same_bits(told.computed, told.value)
    lines = list(why(trace, "layer1.pos5.k[0,3]"))
    assert any("give the model (--model)" in line for line in lines) and not list(equations(lines))


@pytest.mark.parametrize("level", ["writes", "weights", "vectors"])
def test_with_the_model_any_level_will_do_for_the_run_is_repeated(level: str) -> None:
    small, trace = recorded("gemma3", level=level)
    whole = recorded("gemma3")[1]
    for name in ("layer2.pos5[3]", "layer1.pos6.pattern[2,4]", "layer3.pos4.attn_out[7]", "pos6.logits[9]"):
        told = explain(trace, name, small)
        assert same_bits(told.value, explain(whole, name, small).value)
        assert any("running its tokens again" in note for note in told.notes) and len(told.notes) == 1


def test_where_topk_left_scores_out_they_are_computed_anew() -> None:
    small, ids, recorder = model(CONFIGS["llama"]), tokens(CONFIGS["llama"], 7), Recorder(level="states", topk=2)
    small.forward(ids, observer=recorder)
    whole = recorded()[1]
    src = int(np.argmax(whole["layer1.pos6.pattern"][2]))
    told = explain(recorder.trace, f"layer1.pos6.pattern[2,{src}]", small)
    assert same_bits(told.value, whole["layer1.pos6.pattern"][2, src]) and same_bits(told.computed, told.value)
    assert explain(recorder.trace, f"layer1.pos6.pattern[2,{src}]").computed is None


def test_a_run_that_cannot_be_repeated_bit_for_bit_is_said_to_be_another() -> None:
    config, ids = CONFIGS["llama"], tokens(CONFIGS["llama"], 7)
    recorder = Recorder(level="weights")
    model(config, ops="numpy").forward(ids, observer=recorder)
    told = explain(recorder.trace, "layer1.pos5.pattern[2,3]", model(config))
    assert "not the one recorded" in told.notes[1]
    assert told.value == pytest.approx(told.computed, abs=1e-5)


def test_numbers_of_another_order_are_said_to_differ() -> None:
    config, ids = CONFIGS["llama"], tokens(CONFIGS["llama"], 7)
    small, recorder = model(config, ops="numpy"), Recorder(level="states")
    small.forward(ids, observer=recorder)
    lines = [line for i in range(20) for line in why(recorder.trace, f"layer2.pos5.mlp_out[{i}]", small)]
    assert any("away: it was computed in another order" in line for line in lines)


def test_what_the_mask_excludes_or_an_edit_cut_is_told_so() -> None:
    small, trace = recorded("gemma3")
    told = explain(trace, "layer0.pos6.pattern[1,0]", small)
    assert told.value == 0 and "position 6 reads slots 2 to 6 here" in told.stages[0].title
    recorder = Recorder(level="states")
    small.forward(tokens(small.config, 7), edits=[Cut(1, 6, 4)], observer=recorder)
    told = explain(recorder.trace, "layer1.pos6.scores[1,4]", small)
    assert told.value == told.computed == -np.inf and told.stages[0].equations[-1].note == "this edge was cut"
    for name in ("layer1.pos6.pattern[1,4]", "layer1.pos6.z[1,2]"):
        told = explain(recorder.trace, name, small)
        assert same_bits(told.computed, told.value)
        assert_recombines(list(told.lines(everything=True)), told.value)
    recorder = Recorder(level="states")
    small.forward(tokens(small.config, 7), edits=[ZeroValue(1, 6, 4)], observer=recorder)
    assert any("away: an edit of this run changed it, or" in line for line in why(recorder.trace, "layer1.pos6.z[1,2]"))


@pytest.mark.parametrize("level", ["writes", "states"])
@pytest.mark.parametrize("shared_kv", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_feedback_architecture_is_told_with_its_memory(family: str, shared_kv: bool, level: str) -> None:
    standard = model(CONFIGS[family])
    feedback = FeedbackTransformer(standard.config, standard.weights.map(np.asarray), layer_weights=[0.5, 1.0, -1.0, 2.0],
                                   shared_kv=shared_kv)  # fmt: skip
    recorder, whole = Recorder(level=level), Recorder(level="states")
    for observer in (recorder, whole):
        feedback.forward(tokens(CONFIGS[family], 5), observer=observer)
    for name in ("layer1.pos3.pattern[2,1]", "layer1.pos0.z[2,1]", "layer1.pos3.z[2,1]", "layer2.pos3[7]",
                 "layer1.pos3.mlp_out[7]", "layer1.pos3.k[1,2]", "layer2.pos2.v[0,3]"):  # fmt: skip
        told = explain(recorder.trace, name, feedback)
        assert same_bits(told.computed, told.value) and same_bits(told.value, whole.trace[name]), name
        assert len(told.notes) == (level == "writes")
    for name in ("layer1.pos3.ln_memory[4]", "pos3.memory[4]"):
        told = explain(recorder.trace, name, feedback)
        assert_recombines(list(told.lines(everything=True)), told.value)


def test_a_standard_model_keeps_no_memory_of_all_depths() -> None:
    with pytest.raises(TraceError, match="only a feedback model"):
        explain(recorded()[1], "pos3.memory[4]")


BAD = {
    "layer1": "is no id",
    "layer1.pos5.magic[0]": "is no id",
    "layer1.pos5.logits[0]": "is no id",
    "layer1.pos5": r"more than one number.*\['D'\] = \[20\]; choose one, as in layer1.pos5\[0\]",
    "layer1.pos5.k[1]": r"choose one, as in layer1.pos5.k\[0,0\]",
    "layer1.pos5.head2.pattern": r"choose one, as in layer1.pos5.head2.pattern\[0\]",
    "layer1.pos5[20]": r"not there: resid_pre of a position is \['D'\] = \[20\], counted from 0",
    "layer1.pos5.pattern[0,6]": "the positions up to 5",
    "layer1.pos5[1,2]": "not there",
    "layer3.pos5.k[0,0]": "layers are 0 to 2",
    "layer1.pos7[0]": "position 7 is not in the trace",
    "step2.layer1.head2.pattern[2,0]": "step 2 has rows 0 to 1, for positions 5 to 6",
    "step2.layer1.resid_pre": r"choose a number, as in step2.layer1.resid_pre\[0,0\]",
    "step9.logits[0,0]": "step 9 is not in the trace",
}


@pytest.mark.parametrize("name", BAD)
def test_an_id_of_no_single_number_is_a_clear_error(name: str) -> None:
    with pytest.raises(TraceError, match=BAD[name]):
        explain(recorded()[1], name)


def test_another_model_is_an_error() -> None:
    trace = recorded()[1]
    with pytest.raises(TraceError, match="of another model"):
        explain(trace, "layer1.pos5[3]", model(CONFIGS["qwen2"]))
    with pytest.raises(TraceError, match="of another model"):
        explain(trace, "layer1.pos5[3]", model(CONFIGS["llama"], seed=1))


def random_bits(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**32, n, dtype=np.uint64).astype(np.uint32).view(F)


def test_the_fused_multiply_add_in_numpy_is_exact() -> None:
    """On all magnitudes, subnormal results among them, and where the sum nearly cancels or lies next to a tie."""
    a, b, c = (random_bits(4000, seed) for seed in range(3))
    tie = np.array([1 + 2**-12], F), np.array([1 + 2**-12], F), np.array([2**-60], F)
    with np.errstate(all="ignore"):
        for x, y, z in ((a, b, c), (a, b, -(a * b)), (a, b, a * b * F(2**-24)), tie):
            want = np.array([exact_fma(*each) for each in zip(x, y, z, strict=True)], F)
            assert same_bits(fma(x, y, z), want)


@pytest.mark.parametrize("ours, exact", [(exp, exact_exp), (tanh, exact_tanh), (erf, exact_erf)])
def test_functions_in_numpy_are_those_of_the_page(ours: Any, exact: Any) -> None:
    random = np.random.default_rng(0)
    x = np.concatenate([random.standard_normal(300) * 4, random.uniform(-110, 95, 300), [0.0, -0.0, 1e-42, np.inf, -np.inf]])
    with np.errstate(all="ignore"):
        assert same_bits(ours(x.astype(F)), np.array([exact(each) for each in x.astype(F)], F))
        assert np.isnan(ours(F(np.nan)))


def test_a_sum_goes_by_lanes_of_the_absolute_slot() -> None:
    x = np.random.default_rng(0).standard_normal(50).astype(F)
    for first in (0, 5, 21):
        lanes = [F(0)] * 16
        for i, value in enumerate(x):
            lanes[(first + i) % 16] += value
        while len(lanes) > 1:
            half = len(lanes) // 2
            lanes = [low + high for low, high in zip(lanes[:half], lanes[half:], strict=True)]
        assert same_bits(lane_sum(x, first), lanes[0])
