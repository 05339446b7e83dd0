"""What a case expects: `close` from float64, `exact` from the kernels; and the signature that each bug leaves."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from compare import crc_of_bits
from making.cases import decimals, hexadecimal
from making.mutants import BUGS, CHOICES, bit_mutant, mutant
from making.rules import rules_of
from nanokv_parts import Parts, parts_of
from nanokv_port import Port
from trace_files import read_trace

Array = np.ndarray
BREAKS = 10.0  # a bug is flagged at a case that it breaks by so many tolerances
SHOWN = 3  # numbers of a signature

# Bugs whose numbers depend on the machine's libraries: flagged where they are known to show, without a signature.
OF_THE_MACHINE = {"BlasOrder": "linear/long"}
INEXACT = ("k_norm", "v_norm")  # of a trace: no order is stated for these sums


class Maker:
    """Fills in the expected values of cases."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.double, self.kernels = Port(Parts(dtype=np.float64)), Port(parts_of("numba"))
        self.mutants = {name: mutant(name, np.float64) for name, bug in BUGS.items() if not bug.bits}
        self.traced_mutants = {name: mutant(name) for name in self.mutants}  # the trace's types count, too
        self.bit_mutants = {name: bit_mutant(name) for name, bug in BUGS.items() if bug.bits and name not in OF_THE_MACHINE}

    def finish(self, case: dict[str, Any], level: int | str) -> dict[str, Any]:
        """The case as it stands in its file."""
        close, exact = self.answer(self.double, case), self.answer(self.kernels, case)
        kinds = case.pop("kinds", None)
        assert kinds is None or exact["outputs"]["errors"] == kinds, (case["id"], exact)
        if "error" in case or "error" in exact:
            assert close.get("error") == exact.get("error") == case.get("error"), (case["id"], close, exact)
        else:
            if case.get("profiles") == ["exact"]:
                close = exact
            if case["op"] == "trace":  # what is said of the trace is of the kernels' trace
                numbers = {name: value for name, value in close["outputs"].items() if isinstance(value, Mapping)}
                close = {"outputs": {name: numbers.get(name, value) for name, value in exact["outputs"].items()}}
            case["expect"] = {
                name: _expected(case, name, value, exact["outputs"][name]) for name, value in close["outputs"].items()
            }
        case["rules"] = rules_of(case["id"])
        case["flags"] = self.flags(case, close, exact, level)
        for key in ("want", "optional", "comment"):
            if key == "want" or not case[key]:
                del case[key]
        return case

    def answer(self, port: Port, case: Mapping[str, Any]) -> dict[str, Any]:
        """The port's answer, with arrays; a trace is read back."""
        inputs = dict(case["inputs"])
        for name in ("model", "tokenizer"):
            if name in inputs:
                inputs[name] = str(self.folder / inputs[name])
        request = {"op": case["op"], "inputs": inputs, "want": case["want"]}
        if case["op"] != "trace":
            return port.answer(request)
        with TemporaryDirectory() as scratch:
            inputs["path"] = str(Path(scratch) / "run.nkv")
            answer = port.answer(request)
            return answer if "error" in answer else {"outputs": _trace_outputs(Path(inputs["path"]))}

    def flags(self, case: dict[str, Any], close: Any, exact: Any, level: int | str) -> dict[str, Any]:
        """For each bug that breaks this case: what it puts where."""
        found: dict[str, Any] = {name: {} for name, id_ in OF_THE_MACHINE.items() if id_ == case["id"]}
        if case.get("profiles") != ["exact"]:
            right, mutants = (exact, self.traced_mutants) if case["op"] == "trace" else (close, self.mutants)
            signs = {name: self.signatures(case, right, port) for name, port in mutants.items() if _concerns(name, level)}
            found |= _told_apart({name: sign for name, sign in signs.items() if sign})
        if level in (0, 1, 2) and "error" not in case:
            for name, port in self.bit_mutants.items():
                if (sign := self.bit_signature(case, exact, port)) is not None:
                    found[name] = sign
        return found

    def signatures(self, case: dict[str, Any], right: Any, port: Port) -> list[dict[str, Any]]:
        """What a bug makes of each output that it makes wrong."""
        wrong = self.answer(port, case)
        if "error" in right or "error" in wrong:
            return [] if right.get("error") == wrong.get("error") else [{"error": wrong.get("error", "")}]
        signs = {name: _difference(case, name, value, wrong["outputs"].get(name)) for name, value in right["outputs"].items()}
        return [{"output": name, **sign} for name, sign in signs.items() if sign is not None]

    def bit_signature(self, case: dict[str, Any], right: Any, port: Port) -> dict[str, Any] | None:
        """The checksum of the first output whose bits a bug changes. None of a single number, which tells too little: {}."""
        wrong = self.answer(port, case)
        for name, value in right["outputs"].items():
            if isinstance(value, np.ndarray) and value.dtype == np.float32:
                a, b = (np.ascontiguousarray(x, np.float32).reshape(-1) for x in (value, wrong["outputs"][name]))
                if ((a.view(np.uint32) != b.view(np.uint32)) & ~(np.isnan(a) & np.isnan(b))).any():
                    return {"output": name, "crc32": crc_of_bits(b.tolist())} if b.size > 1 else {}
        return None


def _concerns(bug: str, level: int | str) -> bool:
    """Sampling and text belong to level 5 and to what is refused; whole continuations would show every other bug, too."""
    return level == "invalid" or (bug in CHOICES) == (level == 5)


def _told_apart(signs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The first signature of each bug; where two bugs have the same one, the last one beside it."""
    firsts = [json.dumps(each[0]) for each in signs.values()]
    return {
        name: each[0] | ({"and": each[-1]} if firsts.count(json.dumps(each[0])) > 1 and len(each) > 1 else {})
        for name, each in signs.items()
    }


def _expected(case: Mapping[str, Any], name: str, close: Any, exact: Any) -> dict[str, Any]:
    """One output. The kernels must be well within the tolerance of what float64 gives."""
    if isinstance(close, Mapping):  # of a trace
        expected = _expected(case, name, close["values"], exact["values"]) | {"dtype": exact["dtype"]}
        if name.endswith(INEXACT):
            expected.pop("hex")
        return expected
    if isinstance(close, np.ndarray) and close.dtype.kind == "f":
        with np.errstate(over="ignore"):
            close = close.astype(np.float32)
        ratio = _ratios(case, close, exact).max(initial=0)
        assert ratio <= 0.5, f"{case['id']}: {name} is {ratio} tolerances from float64"
        return {"shape": list(exact.shape), "f32": decimals(close), "hex": hexadecimal(exact)}
    if isinstance(close, np.ndarray):
        if close.dtype == np.uint64:  # hashes of bits, so of the kernels'
            return {"shape": list(exact.shape), "u64": [f"{x:016x}" for x in exact.reshape(-1).tolist()]}
        assert np.array_equal(close, exact), (case["id"], name)
        return {"shape": list(exact.shape), "i": exact.reshape(-1).tolist()}
    assert list(close) == list(exact), (case["id"], name, close, exact)
    plain = [x.item() if isinstance(x, np.generic) else x for x in exact]
    return {"text": plain} if plain and isinstance(plain[0], str) else {"i": plain}


def _difference(case: Mapping[str, Any], name: str, right: Any, wrong: Any) -> dict[str, Any] | None:
    """What a bug makes of an output, if that is far enough from what is right."""
    if wrong is None:
        return {"missing": True}
    if isinstance(right, Mapping):
        if wrong["dtype"] != right["dtype"]:
            return {"dtype": wrong["dtype"]}
        right, wrong = right["values"], wrong["values"]
    if isinstance(right, np.ndarray) and right.dtype.kind == "f":
        if right.shape != wrong.shape:
            return {"length": wrong.size}
        ratios = _ratios(case, right, wrong)
        if ratios.max(initial=0) < BREAKS:
            return None
        rounded = np.array([float(f"{ratio:.6g}") for ratio in ratios.tolist()])  # equal ones stay so on every machine
        at = np.sort(np.argsort(-rounded, kind="stable")[:SHOWN])
        return {"at": at.tolist(), "is": decimals(wrong.reshape(-1)[at])}
    a, b = (x.reshape(-1).tolist() if isinstance(x, np.ndarray) else list(x) for x in (right, wrong))
    if a == b or (isinstance(right, np.ndarray) and right.dtype == np.uint64):
        return None
    if len(a) != len(b):
        return {"length": len(b)}
    at = [i for i in range(len(a)) if a[i] != b[i]][:SHOWN]
    return {"at": at, "is": [b[i].item() if isinstance(b[i], np.generic) else b[i] for i in at]}


def _ratios(case: Mapping[str, Any], right: Array, wrong: Array) -> Array:
    with np.errstate(over="ignore"):
        a, b = (np.asarray(x, np.float32).astype(np.float64).reshape(-1) for x in (right, wrong))
    atol, rtol = case["tol"]
    with np.errstate(all="ignore"):
        ratios = np.abs(a - b) / (atol + rtol * np.abs(a))
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    return np.where(same, 0, np.where(np.isfinite(ratios), ratios, math.inf))


def _trace_outputs(folder: Path) -> dict[str, Any]:
    """A recorded trace as the runner reads it, with arrays for lists."""
    found = read_trace(folder)
    for name, value in found.items():
        if isinstance(value, Mapping):
            values = np.array(value["values"], _TYPES[value["dtype"]]).reshape(value["shape"])
            found[name] = {"dtype": value["dtype"], "values": values}
    del found["trace.config"]  # its numbers are compared by the model that it describes
    return found


_TYPES = {"F32": np.float32, "F64": np.float64, "I32": np.int32, "U64": np.uint64, "U8": np.uint8}
