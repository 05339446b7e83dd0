"""Is an answer right? If not: where first, by how much, and which known bug gives exactly that. Python's own modules alone."""

from __future__ import annotations

import math
import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Numbers = list[Any]


@dataclass
class Result:
    """What became of a case."""

    case: dict[str, Any]
    status: str  # pass, fail, error (no answer that can be read), skip
    lines: list[str] = field(default_factory=list)  # the reason; the first one says it shortly
    ratio: float = 0.0  # the largest difference over its tolerance; infinite for what cannot be measured
    named: list[str] = field(default_factory=list)  # flags whose bug gives these very numbers
    cleared: list[str] = field(default_factory=list)  # flags whose bug would break this case, which passed
    innocent: frozenset[str] = frozenset()  # those cleared so far in the run
    rounding_only: bool = False  # wrong in bits, but within the tolerance


def judge(case: dict[str, Any], answer: Mapping[str, Any], profile: str) -> Result:
    """Compare an answer with what the case expects."""
    if "skip" in answer:
        return Result(case, "skip", [str(answer["skip"])])
    if "error" not in answer and not isinstance(answer.get("outputs"), dict):
        return Result(case, "error", ["the answer has neither outputs nor error nor skip"])
    if "error" in case or "error" in answer:
        return _judge_error(case, answer)
    return _judge_outputs(case, answer["outputs"], profile)


def _judge_error(case: dict[str, Any], answer: Mapping[str, Any]) -> Result:
    wanted, got = case.get("error", ""), str(answer.get("error", ""))
    if wanted == got:
        return Result(case, "pass", cleared=[flag for flag, sign in case.get("flags", {}).items() if "error" in sign])
    named = [flag for flag, sign in case.get("flags", {}).items() if sign.get("error") == got]
    said = f"{got} ({answer.get('message', '')})" if got else "an answer without error"
    return Result(case, "fail", [f"expected {wanted or 'no error'}, got {said}"], math.inf, named)


def _judge_outputs(case: dict[str, Any], outputs: Mapping[str, Any], profile: str) -> Result:
    """The first output that is wrong is the one that is told: they stand in the order in which they are computed."""
    result, given = Result(case, "pass"), 0
    for name, expected in case["expect"].items():
        if name not in outputs:
            if name in case.get("optional", ()):
                continue
            return _worse(result, Result(case, "fail", [f"the answer lacks the output {name}"], math.inf))
        given += 1
        result = _worse(result, _judge_output(case, name, expected, outputs[name], profile))
    if given == 0:
        return Result(case, "skip", ["the answer holds none of the outputs asked for"])
    signs = {flag: sign for flag, sign in case.get("flags", {}).items() if profile == "exact" or "crc32" not in sign}
    if result.status == "pass":
        result.cleared = [flag for flag, sign in signs.items() if "error" in sign or sign.get("output") in outputs]
        return result
    matching = {flag: "crc32" in sign for flag, sign in signs.items() if _matches(case, sign, outputs)}
    numbers = [flag for flag, in_bits in matching.items() if not in_bits and not result.rounding_only]
    result.named = numbers or [flag for flag, in_bits in matching.items() if in_bits]
    return result


def _worse(so_far: Result, now: Result) -> Result:
    """The first failure stays; passes keep the larger ratio."""
    if so_far.status == "fail":
        so_far.rounding_only &= now.status == "pass" or now.rounding_only
        so_far.ratio = max(so_far.ratio, now.ratio)
        return so_far
    if now.status == "fail":
        return now
    return so_far if so_far.ratio >= now.ratio else now


def _judge_output(case: dict[str, Any], name: str, expected: Mapping[str, Any], given: Any, profile: str) -> Result:
    if "u64" in expected:
        return _judge_hashes(case, name, expected, given, profile)
    if "f32" not in expected:
        return _judge_plain(case, name, expected, given)
    if isinstance(given, Mapping):  # of a trace's file, which says its type
        if given["dtype"] != expected.get("dtype", "F32"):
            return Result(case, "fail", [f"{name} is of type {given['dtype']}, expected F32"], math.inf)
        given = given["values"]
    try:
        got = as_floats(given)
    except (ValueError, TypeError, struct.error):
        return Result(case, "fail", [f"{name} is neither a list of numbers nor float32 bits in hexadecimal"], math.inf)
    wanted = [float(x) for x in expected["f32"]]
    if len(got) != len(wanted):
        return Result(case, "fail", [f"{name} has {len(got)} numbers, expected {len(wanted)}, {expected['shape']}"], math.inf)
    atol, rtol = case["tol"]
    ratios = [_ratio(a, b, atol, rtol) for a, b in zip(got, wanted, strict=True)]
    worst = max(ratios, default=0.0)
    if profile == "exact" and "hex" in expected:
        return _judge_bits(case, name, expected, got, worst)
    if worst <= 1:
        return Result(case, "pass", ratio=worst)
    at = ratios.index(worst)
    lines = [
        f"{name}{_place(at, expected['shape'])} is {got[at]:.9g}, expected {wanted[at]:.9g}",
        f"difference {abs(got[at] - wanted[at]):.3g}, {worst:.3g} times the tolerance; "
        f"{sum(ratio > 1 for ratio in ratios)} of {len(ratios)} numbers are wrong",
    ]
    return Result(case, "fail", lines, worst)


def _judge_bits(case: dict[str, Any], name: str, expected: Mapping[str, Any], got: Numbers, worst: float) -> Result:
    bits, wanted = [_bits(x) for x in got], [int(word, 16) for word in _words(expected["hex"])]
    wrong = [i for i, (a, b) in enumerate(zip(bits, wanted, strict=True)) if a != b and not (_is_nan(a) and _is_nan(b))]
    if not wrong:
        return Result(case, "pass")
    at = wrong[0]
    lines = [
        f"{name}{_place(at, expected['shape'])} is {bits[at]:08x} ({got[at]:.9g}), expected {wanted[at]:08x} "
        f"({_float(wanted[at]):.9g}); {len(wrong)} of {len(bits)} differ in bits"
    ]
    if worst <= 1:
        lines.append("all are within the tolerance, so the order or the rounding of the arithmetic differs, not the formula")
    return Result(case, "fail", lines, max(worst, math.inf if worst > 1 else 0.0), rounding_only=worst <= 1)


def _judge_hashes(case: dict[str, Any], name: str, expected: Mapping[str, Any], given: Any, profile: str) -> Result:
    """Hashes of bits, which only the exact profile can compare."""
    values = given["values"] if isinstance(given, Mapping) else given
    if profile != "exact" or [f"{x:016x}" for x in values] == expected["u64"]:
        return Result(case, "pass")
    return Result(case, "fail", [f"{name} differs: these are hashes of bits"], math.inf)


def _judge_plain(case: dict[str, Any], name: str, expected: Mapping[str, Any], given: Any) -> Result:
    """Whole numbers and texts, which must be equal."""
    if isinstance(given, Mapping):
        if given["dtype"] != expected.get("dtype", given["dtype"]):
            return Result(case, "fail", [f"{name} is of type {given['dtype']}, expected {expected['dtype']}"], math.inf)
        given = given["values"]
    wanted = expected["i"] if "i" in expected else expected["text"]
    given = flat(given)
    if given == wanted:
        return Result(case, "pass")
    if len(given) != len(wanted):
        return Result(case, "fail", [f"{name} has {len(given)} entries, expected {len(wanted)}: {given[:20]}"], math.inf)
    at = next(i for i, (a, b) in enumerate(zip(given, wanted, strict=True)) if a != b)
    place = _place(at, expected.get("shape", [len(wanted)]))
    return Result(case, "fail", [f"{name}{place} is {given[at]!r}, expected {wanted[at]!r}"], math.inf)


def _matches(case: Mapping[str, Any], sign: Mapping[str, Any], outputs: Mapping[str, Any]) -> bool:
    """Whether the outputs hold what a bug puts there: `is` at the places `at` of an output, a `length`, or bits alone."""
    if "output" not in sign or sign["output"] not in outputs:
        return "missing" in sign
    if "and" in sign and sign["and"]["output"] in outputs and not _matches(case, sign["and"], outputs):
        return False
    given = outputs[sign["output"]]
    dtype, given = (given["dtype"], given["values"]) if isinstance(given, Mapping) else (None, given)
    if "dtype" in sign:
        return bool(sign["dtype"] == dtype)
    expected = case["expect"][sign["output"]]
    try:
        got = as_floats(given) if "f32" in expected else flat(given)
    except (ValueError, TypeError, struct.error):
        return False
    if "length" in sign:
        return len(got) == int(sign["length"])
    if "crc32" in sign:
        return crc_of_bits(got) == sign["crc32"]
    if max(sign["at"], default=0) >= len(got):
        return False
    values = [got[i] for i in sign["at"]]
    if "f32" not in expected:
        return values == sign["is"]
    atol, rtol = case["tol"]
    return all(_ratio(a, float(b), atol, rtol) <= 1 for a, b in zip(values, sign["is"], strict=True))


def as_floats(given: Any) -> Numbers:
    """Numbers from a list (nested or flat; "Infinity", "-Infinity" and "NaN" as text), or from float32 bits in hexadecimal."""
    if isinstance(given, str):
        return [_float(int(word, 16)) for word in _words(given)]
    return [float(x) for x in flat(given)]


def flat(given: Any) -> Numbers:
    """The entries of a nested list, row by row."""
    if not isinstance(given, list):
        return [given]
    if not any(isinstance(x, list) for x in given):
        return given
    return [entry for part in given for entry in flat(part)]


def _words(text: str) -> list[str]:
    joined = text.replace(" ", "")
    if len(joined) % 8 or re.search("[^0-9a-fA-F]", joined):
        raise ValueError("not so many words of eight hexadecimal digits")
    return [joined[i : i + 8] for i in range(0, len(joined), 8)]


def _float(bits: int) -> float:
    value: float = struct.unpack("<f", struct.pack("<I", bits))[0]
    return value


def _bits(x: float) -> int:
    try:
        bits: int = struct.unpack("<I", struct.pack("<f", x))[0]
    except OverflowError:  # beyond float32
        return 0x7F800000 if x > 0 else 0xFF800000
    return bits


def crc_of_bits(numbers: Numbers) -> str:
    """CRC-32 of float32 numbers, every NaN being 7fc00000."""
    words = [0x7FC00000 if math.isnan(x) else _bits(x) for x in numbers]
    return f"{zlib.crc32(struct.pack(f'<{len(words)}I', *words)):08x}"


def _is_nan(bits: int) -> bool:
    return bits & 0x7FFFFFFF > 0x7F800000


def _ratio(got: float, wanted: float, atol: float, rtol: float) -> float:
    if got == wanted or (math.isnan(got) and math.isnan(wanted)):
        return 0.0
    difference = abs(got - wanted)
    return difference / (atol + rtol * abs(wanted)) if math.isfinite(difference) and math.isfinite(wanted) else math.inf


def _place(at: int, shape: Sequence[int]) -> str:
    """The indices of the element that stands at this place of an array in row-major order."""
    indices = []
    for n in reversed(shape):
        at, index = divmod(at, n)
        indices.append(index)
    return str(list(reversed(indices)))
