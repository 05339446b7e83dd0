"""The bug museum, which is the suite's mutation test: every bug is found, well past the tolerance, and called by its name."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from nanokv.errors import ModelNotFoundError
from nanokv.load import find

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "conformance"), str(ROOT / "examples" / "museum")]

import run as runner  # noqa: E402
import tour  # noqa: E402
from making.expected import OF_THE_MACHINE  # noqa: E402
from making.mutants import BUGS, bit_mutant, mutant  # noqa: E402
from nanokv_parts import as_json, parts_of  # noqa: E402
from nanokv_port import Port  # noqa: E402

CASES = runner.load_cases()
FLAGS = runner.load_flags()
ENOUGH = 10.0  # tolerances


def ask(port: Port) -> runner.Port:
    return lambda request: json.loads(as_json({"id": request["id"], **port.answer(json.loads(json.dumps(request)))}))


def results(port: Port, cases: list[runner.Case], profile: str) -> list[runner.Result]:
    chosen = [
        case for case in cases if profile in case.get("profiles", [profile]) and case["inputs"].get("model") != runner.SMOLLM2
    ]
    return list(runner.run(chosen, ask(port), profile))


def test_the_copy_without_a_bug_is_nanokv() -> None:
    """In every case within the tolerance; and where the order is stated, bit for bit."""
    for port, profile in ((mutant(""), "close"), (bit_mutant(""), "exact")):
        levels = [case for case in CASES if case["level"] != 4]
        assert [(r.case["id"], r.lines) for r in results(port, levels, profile) if r.status != "pass"] == []


def test_the_copy_without_a_bug_is_nanokv_in_float64() -> None:
    from nanokv_parts import Parts

    right, copy = Port(Parts(dtype=np.float64)), mutant("", np.float64)
    for case in CASES:
        if case["op"] in ("block", "attention", "rms_norm", "layer_norm", "activate"):
            inputs = case["inputs"] | (
                {"model": str(runner.HERE / case["inputs"]["model"])} if "model" in case["inputs"] else {}
            )
            request = {"op": case["op"], "inputs": inputs, "want": list(case["expect"])}
            for name, value in right.answer(request)["outputs"].items():
                assert np.allclose(copy.answer(request)["outputs"][name], value, rtol=1e-9, atol=1e-12, equal_nan=True), case[
                    "id"
                ]


@pytest.mark.parametrize("name", BUGS)
def test_every_bug_is_found_and_named(name: str) -> None:
    """It breaks a case that carries its flag by ten tolerances, and a failing case calls it by its name."""
    profile = "exact" if BUGS[name].bits else "close"
    flagged = [case for case in CASES if name in case["flags"]]
    failed = [result for result in results(mutant(name), flagged, profile) if result.status == "fail"]
    assert failed, f"no case that is flagged {name} fails"
    if BUGS[name].bits:
        # Where bits are all that there is.
        beyond = ("linear/subnormal", "attention/masked_infinity", "attention/cut_infinity", "fma/rounds_once")
        assert all(result.rounding_only or result.case["id"] in beyond for result in failed)
    else:
        assert max(result.ratio for result in failed) >= ENOUGH
    named = [result for result in failed if name in result.named]
    assert named or name in OF_THE_MACHINE
    assert min((len(result.named) for result in named), default=1) <= 2  # at most one other bug does the very same there
    assert f"-> {name}: " in "\n".join(runner.told(named[0], FLAGS)) if named else True


@pytest.mark.parametrize("name", [name for name, bug in BUGS.items() if not bug.bits])
def test_a_bug_breaks_no_case_that_does_not_say_so(name: str) -> None:
    """By ten tolerances or more; so a failing case's flags are all that are known to break it."""
    unflagged = [case for case in CASES if name not in case["flags"] and case["level"] in (0, 1, 2)]
    broken = [result.case["id"] for result in results(mutant(name), unflagged, "close")
              if result.status == "fail" and result.ratio >= ENOUGH and not same_without(result)]  # fmt: skip
    assert broken == []


def same_without(result: runner.Result) -> bool:
    """What the readable operations do wrong themselves: masked infinities, and a maximum over NaN."""
    return result.case.get("profiles") == ["exact"]


def test_on_smollm2_the_wrong_pairs_are_named() -> None:
    """A GGUF file of a Llama model wants neighbours; with halves it still says that the capital of France is Paris."""
    try:
        path = str(find("smollm2-135m"))
    except ModelNotFoundError as missing:
        pytest.skip(str(missing))
    (case,) = runner.chosen(CASES, [], None, ["run/smollm2"], "close")
    result = runner.run_case(case, ask(mutant("RopePairs")), "close", smollm2=path)
    assert result.named == ["RopePairs"] and "layer0.pos4.k" in result.lines[0]


def test_the_museum_has_what_real_ports_had() -> None:
    assert len(BUGS) >= 20
    assert sum(bool(bug.seen) for bug in BUGS.values()) >= 20
    kernels = Port(parts_of("numba"))
    assert all(result.status == "pass" for result in results(kernels, [case for case in CASES if case["level"] == 1], "exact"))


def test_the_tour_shows_a_bug_in_text_trace_and_picture(tmp_path: Path) -> None:
    lines = tour.shown("KvHeadModuloG", tmp_path)
    text = "\n".join(lines)
    assert "h // (H/G)" in text and "continues" in text and "first differs" in text and "kv_head/" in text
    assert {path.name for path in tmp_path.iterdir()} == {"right.svg", "KvHeadModuloG.svg"}


def test_the_museum_s_page_is_what_the_tour_writes() -> None:
    page = (ROOT / "examples" / "museum" / "README.md").read_text(encoding="utf-8")
    for name, bug in BUGS.items():
        assert f"**{name}**" in page and bug.fix in page, name
