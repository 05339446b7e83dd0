"""The language-neutral suite in tests/conformance: its files are what they should be, and nanokv passes it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from nanokv.errors import ConfigError, ModelNotFoundError
from nanokv.load import find

SUITE = Path(__file__).parent / "conformance"
ROOT = SUITE.parents[1]
sys.path.insert(0, str(SUITE))

import run as runner  # noqa: E402
from compare import crc_of_bits, judge  # noqa: E402
from making import rules  # noqa: E402
from nanokv_parts import as_json, parts_of  # noqa: E402
from nanokv_port import Port  # noqa: E402
from plain_models import config_of  # noqa: E402

CASES = runner.load_cases()
FLAGS = runner.load_flags()
SPEC = (SUITE / "SPEC.md").read_text(encoding="utf-8")


def ask(port: Port) -> runner.Port:
    """The port behind the door of JSON, but in this process."""
    return lambda request: json.loads(as_json({"id": request["id"], **port.answer(json.loads(json.dumps(request)))}))


def run_program(*arguments: str, program: str = "nanokv_port.py --ops numpy") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SUITE / "run.py"), "--program", f"{sys.executable} {SUITE}/{program}", *arguments]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=SUITE)


@pytest.mark.parametrize("ops, profile", [("numpy", "close"), ("numba", "close"), ("numba", "exact")])
def test_nanokv_passes(ops: str, profile: str) -> None:
    chosen = runner.chosen(CASES, [], None, [], profile)
    results = list(runner.run(chosen, ask(Port(parts_of(ops))), profile))
    assert [line for result in results if result.status in ("fail", "error") for line in runner.told(result, FLAGS)] == []
    skipped = {result.case["id"] for result in results if result.status == "skip"}
    assert skipped <= {"run/smollm2"}
    if profile == "close":
        assert max(result.ratio for result in results) < 0.2  # so that another order of additions passes, too


@pytest.mark.parametrize("ops, profile", [("numpy", "close"), ("numba", "exact")])
def test_nanokv_passes_on_smollm2(ops: str, profile: str) -> None:
    try:
        path = find("smollm2-135m")
    except ModelNotFoundError as missing:
        pytest.skip(str(missing))
    (case,) = runner.chosen(CASES, [], None, ["run/smollm2"], profile)
    result = runner.run_case(case, ask(Port(parts_of(ops))), profile, smollm2=str(path))
    assert result.status == "pass" and result.ratio < 0.2, result.lines


def test_the_files_are_what_make_vectors_makes() -> None:
    done = subprocess.run([sys.executable, str(SUITE / "make_vectors.py"), "--check"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_files_fit_their_schemas() -> None:
    schemas = {path.stem: json.loads(path.read_text("utf-8")) for path in (SUITE / "schema").glob("*.json")}
    files = [
        path for path in SUITE.rglob("*.json") if path.parent.name not in ("schema", "tokenizer") and "models" not in path.parts
    ]
    assert len(files) > 15
    for path in files:
        content = json.loads(path.read_text("utf-8"))
        assert misfits(content, schemas[content["schema"]], schemas[content["schema"]]) == [], path
    for case in CASES[:60]:
        request = {"id": case["id"], "op": case["op"], "inputs": case["inputs"], "want": list(case.get("expect", ()))}
        assert misfits(request, schemas["request_v1"], schemas["request_v1"]) == []
        assert misfits(ask(Port())(request), schemas["answer_v1"], schemas["answer_v1"]) == []


def test_the_suite_is_small_and_listed() -> None:
    manifest = json.loads((SUITE / "manifest.json").read_text("utf-8"))
    assert sum((SUITE / entry["path"]).stat().st_size for entry in manifest["files"]) < 2 << 20
    assert sum(entry.get("cases", 0) for entry in manifest["files"]) == len(CASES)
    assert f"## {manifest['version']}\n" in (SUITE / "CHANGES.md").read_text("utf-8")


def test_every_rule_names_cases_and_every_case_and_flag_has_rules() -> None:
    ids = [case["id"] for case in CASES]
    assert len(set(ids)) == len(ids)
    assert rules.unmatched(ids) == []
    known = rules.patterns()
    for case in CASES:
        assert case["rules"] == rules.rules_of(case["id"]) != [], case["id"]
    for name, flag in FLAGS.items():
        assert set(flag["rules"]) <= known.keys(), name
        assert any(name in case["flags"] for case in CASES), name


def test_the_specification_has_the_numbers_of_the_page_on_arithmetic() -> None:
    """Every constant of a rule on the one page is in the rule of the same label on the other."""
    page = (ROOT / "docs" / "arithmetic.md").read_text(encoding="utf-8")
    for label in ("F1", "F2", "F3", "F5", "F6"):
        here, there = (numbers_of(text, label) for text in (SPEC, page))
        assert here and there - here == Counter(), label


def numbers_of(text: str, label: str) -> Counter[str]:
    block = re.split(r"\n\n|\n(?=\*\*[A-Z]\d+\*\*)|Cases:|Below", text[text.index(f"**{label}** ") :])[0]
    return Counter(re.findall(r"\d+\.\d+(?:e[−-]\d+)?", block))


def test_the_operations_of_the_readme_are_those_of_the_cases() -> None:
    text = (SUITE / "README.md").read_text(encoding="utf-8")
    table = text[text.index("| op |") : text.index("## A case")]
    named = {name for row in re.findall(r"^\| (`[^|]*)\|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert named == {case["op"] for case in CASES}


def test_the_example_of_the_readme_is_what_the_runner_prints() -> None:
    text = (SUITE / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"```console\n\$ .*?\n(.*?)```", text, re.DOTALL)
    done = run_program("--level", "1", "--pattern", "rms", program="nanokv_port.py --bug EpsOfOtherModel")
    assert shown is not None and done.stdout.startswith(shown[1])


def test_the_runner_says_by_its_exit_status_what_happened(tmp_path: Path) -> None:
    assert run_program("--level", "0").returncode == 0
    assert run_program("--level", "0", program="nanokv_port.py --bug KvHeadModuloG").returncode == 1
    assert run_program("--level", "0", "--pattern", "no such case").returncode == 2
    missing = subprocess.run(
        [sys.executable, str(SUITE / "run.py"), "--program", "/no/such/port"], capture_output=True, text=True
    )
    assert missing.returncode == 2 and "cannot be started" in missing.stderr
    state = tmp_path / "state.json"
    assert "->" not in run_program("--level", "0", "--track", str(state)).stdout
    changed = run_program("--level", "0", "--track", str(state), program="nanokv_port.py --bug KvHeadModuloG").stdout
    assert "kv_head/six_of_two: pass -> fail" in changed and "reads/" not in changed


def test_the_runner_needs_no_package() -> None:
    command = [sys.executable, "-S", str(SUITE / "run.py"), "--program", "/no/such/port", "--dump-tests", "--level", "3"]
    done = subprocess.run(command, capture_output=True, text=True, env={})
    assert done.returncode == 0 and '"run/llama_in_parts"' in done.stdout, done.stderr


@pytest.mark.parametrize(
    "program, status, reason",
    [
        ("import sys; sys.exit(3)", "error", "ended"),
        ("input(); print('no json', flush=True); input()", "error", "not JSON"),
        ("input(); print('{}', flush=True); input()", "error", "without the request's id"),
        ("import time; input(); time.sleep(60)", "error", "no answer within"),
    ],
)
def test_a_program_that_breaks_is_an_error_and_not_a_hang(program: str, status: str, reason: str) -> None:
    port = runner.Program(f'{sys.executable} -c "{program}"', timeout=1.0)
    try:
        result = runner.run_case(CASES[0], port, "close")
        assert result.status == status and reason in result.lines[0]
    finally:
        port.close()


def example(**changes: Any) -> dict[str, Any]:
    expect = {"y": {"shape": [2, 2], "f32": [1.0, 2.0, "Infinity", "NaN"], "hex": "3f800000 40000000 7f800000 7fc00000"}}
    return {"id": "a/b", "tol": [1e-6, 1e-5], "expect": expect, "rules": ["L1"], "flags": {}, **changes}


@pytest.mark.parametrize(
    "outputs, close, exact",
    [
        ({"y": [1, 2, "Infinity", "NaN"]}, "pass", "pass"),
        ({"y": [[1, 2.000001], ["Infinity", "NaN"]]}, "pass", "fail"),
        ({"y": "3f80000040000000 7F8000007fc00001"}, "pass", "pass"),  # any NaN is a NaN
        ({"y": [1, 2.1, "Infinity", "NaN"]}, "fail", "fail"),
        ({"y": [1, 2, 3e38, "NaN"]}, "fail", "fail"),
        ({"y": [1, 2, "Infinity", 0]}, "fail", "fail"),
        ({"y": [1, 2, "Infinity"]}, "fail", "fail"),
        ({"y": "3f8"}, "fail", "fail"),
        ({"y": ["one"]}, "fail", "fail"),
        ({"z": [1]}, "fail", "fail"),
    ],
)
def test_answers_are_judged(outputs: dict[str, Any], close: str, exact: str) -> None:
    assert judge(example(), {"outputs": outputs}, "close").status == close
    assert judge(example(), {"outputs": outputs}, "exact").status == exact


def test_cuts_in_any_order_and_twice_are_the_same_cuts() -> None:
    """A porter fed the kernels cuts that were not sorted: between two of them values were added twice. Only the model's own
    door sorted them. The kernels sort them, whoever calls."""
    (case,) = [case for case in CASES if case["id"] == "attention/cuts_unordered"]
    cuts = case["inputs"]["cuts"]
    assert cuts != sorted(cuts) and len(cuts) > len({tuple(cut) for cut in cuts})
    port = ask(Port(parts_of("numba")))
    answers = [
        port({"id": "a/b", "op": case["op"], "inputs": case["inputs"] | {"cuts": given}, "want": ["z"]})["outputs"]
        for given in (cuts, cuts[::-1], sorted(map(list, {tuple(cut) for cut in cuts})))
    ]
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize("norm", ["layer", "none"])
def test_post_norms_without_rms_norm_are_refused(norm: str) -> None:
    """A porter asked which norm the post-norms of such a model are: nanokv ended in a TypeError, or passed over the arrays."""
    with pytest.raises(ConfigError, match="post_norms"):
        small = {"n_layers": 1, "n_heads": 1, "n_kv_heads": 1, "head_dim": 2, "d_model": 2, "d_ff": 2, "vocab_size": 2}
        config_of(small | {"n_ctx": 2, "norm": norm, "post_norms": True})


def test_a_bug_that_a_passed_case_speaks_against_is_not_named_where_another_fits() -> None:
    signs = {"One": {"output": "y", "at": [0], "is": [5.0]}, "Other": {"output": "y", "at": [1], "is": [7.0]}}
    wrong = {"outputs": {"y": [5, 7, "Infinity", "NaN"]}}
    right = {"outputs": {"y": [1, 2, "Infinity", "NaN"]}}
    first, second = example(id="a/first", inputs={}, op="a"), example(id="a/second", inputs={}, op="a", flags=signs)

    def named(flags: dict[str, Any]) -> list[str]:
        cases = [first | {"flags": flags}, second]
        results = runner.run(cases, lambda request: right if request["id"] == "a/first" else wrong, "close")
        return list(results)[1].named

    assert named({}) == ["One", "Other"]
    assert named({"One": signs["One"]}) == ["Other"]
    assert named(signs) == ["One", "Other"]  # a bug in one place, and not in another


def test_bits_are_told_by_a_checksum_of_all_of_an_output() -> None:
    put = [1.0, 2.0000002384185791, "Infinity", "NaN"]
    case = example(flags={"Bits": {"output": "y", "crc32": crc_of_bits([float(x) for x in put])}})
    assert judge(case, {"outputs": {"y": put}}, "exact").named == ["Bits"]
    assert judge(case, {"outputs": {"y": [1.0000001192092896, *put[1:]]}}, "exact").named == []
    assert judge(case, {"outputs": {"y": [1, 2, "Infinity", "NaN"]}}, "exact").cleared == ["Bits"]
    assert judge(case, {"outputs": {"y": [1, 2, "Infinity", "NaN"]}}, "close").cleared == []


def test_minus_zero_is_not_zero_in_bits() -> None:
    case = example(expect={"y": {"shape": [1], "f32": [0.0], "hex": "00000000"}})
    assert judge(case, {"outputs": {"y": [-0.0]}}, "close").status == "pass"
    assert judge(case, {"outputs": {"y": [-0.0]}}, "exact").status == "fail"


def test_optional_outputs_may_be_left_out_and_errors_must_match() -> None:
    assert judge(example(optional=["y"]), {"outputs": {}}, "close").status == "skip"
    refused = {"id": "a/b", "error": "TokenError", "flags": {"Unchecked": {"error": ""}}}
    assert judge(refused, {"error": "TokenError"}, "close").status == "pass"
    assert judge(refused, {"outputs": {}}, "close").named == ["Unchecked"]
    assert judge(refused, {"error": "ConfigError"}, "close").status == "fail"
    assert judge(refused, {}, "close").status == "error"


def misfits(value: Any, schema: dict[str, Any], root: dict[str, Any], at: str = "$") -> list[str]:
    """Where a value does not fit a JSON schema, as far as the suite's own schemas go."""
    if "$ref" in schema:
        return misfits(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root, at)
    found = [f"{at}: {keyword}" for keyword, fits in KEYWORDS.items() if keyword in schema and not fits(value, schema[keyword])]
    for keyword, most in (("anyOf", 99), ("oneOf", 1)):
        if keyword in schema and not 1 <= sum(not misfits(value, option, root, at) for option in schema[keyword]) <= most:
            found.append(f"{at}: {keyword}")
    if isinstance(value, dict):
        known, rest = schema.get("properties", {}), schema.get("additionalProperties", True)
        for key, each in value.items():
            if key in known or isinstance(rest, dict):
                found += misfits(each, known.get(key, rest), root, f"{at}.{key}")
            elif rest is False:
                found.append(f"{at}: {key} has no place")
    if isinstance(value, list) and "items" in schema:
        found += [misfit for i, each in enumerate(value) for misfit in misfits(each, schema["items"], root, f"{at}[{i}]")]
    return found


TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}
KEYWORDS = {
    "type": lambda value, types: any(isinstance(value, TYPES[t]) for t in ([types] if isinstance(types, str) else types)),
    "enum": lambda value, allowed: value in allowed,
    "const": lambda value, only: value == only,
    "required": lambda value, keys: not isinstance(value, dict) or set(keys) <= value.keys(),
    "pattern": lambda value, pattern: not isinstance(value, str) or re.search(pattern, value) is not None,
    "minimum": lambda value, least: not isinstance(value, int | float) or value >= least,
    "minItems": lambda value, least: not isinstance(value, list) or len(value) >= least,
    "maxItems": lambda value, most: not isinstance(value, list) or len(value) <= most,
}
