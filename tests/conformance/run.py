"""Runs the conformance suite against any program, and says which bug it has. Needs Python alone, no package.

    python tests/conformance/run.py --program ./port                 the whole suite, within tolerances
    python tests/conformance/run.py --program ./port --profile exact bit for bit
    python tests/conformance/run.py --program ./port --level 1 --pattern rope

The program reads one JSON request a line and prints one JSON answer a line: README.md beside this file. Exit status 0 if
nothing failed, 1 if a case failed or the program broke, 2 for bad use. What a port doesn't do it skips; that fails nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import queue
import shlex
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from compare import Result, judge
from trace_files import expected_in, read_trace

HERE = Path(__file__).resolve().parent
Case = dict[str, Any]
Port = Callable[[dict[str, Any]], Mapping[str, Any]]  # a request -> its answer
SMOLLM2 = "smollm2-135m"  # in place of a model's path: the file that --smollm2 names


class ProgramError(Exception):
    """The program ended, hung, or printed something that is no answer."""


class NoProgramError(Exception):
    """There is no such program."""


class Program:
    """A port that runs beside us: a line goes in, a line comes out. Begun anew after it broke."""

    def __init__(self, command: str, timeout: float) -> None:
        self.command, self.timeout = shlex.split(command), timeout
        self.process: subprocess.Popen[str] | None = None

    def __call__(self, request: dict[str, Any]) -> Mapping[str, Any]:
        if self.process is None:
            self._start()
        assert self.process is not None and self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.lines.get(timeout=self.timeout)
        except queue.Empty:
            self.close()
            raise ProgramError(f"no answer within {self.timeout:g} s") from None
        except BrokenPipeError:
            line = ""
        if not line.endswith("\n"):
            status = self.process.wait()
            self.close()
            raise ProgramError(f"the program ended{' in the midst of a line' if line else ''} (exit status {status})")
        return _answer(line, request["id"])

    def _start(self) -> None:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "encoding": "utf-8"}
        try:
            self.process = subprocess.Popen(self.command, **pipes)
        except OSError as error:
            raise NoProgramError(f"{self.command[0]} cannot be started: {error.strerror}") from error
        self.lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, args=(self.process, self.lines), daemon=True).start()

    @staticmethod
    def _read(process: subprocess.Popen[str], lines: queue.Queue[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put("")

    def close(self) -> None:
        if self.process is not None:
            assert self.process.stdin is not None
            with contextlib.suppress(OSError):
                self.process.stdin.close()
            try:
                self.process.wait(timeout=1)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None


def _answer(line: str, id_: str) -> Mapping[str, Any]:
    try:
        answer = json.loads(line)
    except ValueError:
        raise ProgramError(f"printed a line that is not JSON: {line[:200]!r}") from None
    if not isinstance(answer, dict) or answer.get("id") != id_:
        raise ProgramError(f"printed an answer without the request's id {id_!r}: {line[:200]!r}")
    return answer


def load_cases(folder: Path = HERE) -> list[Case]:
    """Every case of the suite, in the order of levels; `level` is put into each."""
    cases: list[Case] = []
    for entry in json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]:
        if "level" in entry:
            found = json.loads((folder / entry["path"]).read_text(encoding="utf-8"))["cases"]
            cases += [case | {"level": entry["level"]} | _values_of(case, folder) for case in found]
    return cases


def _values_of(case: Case, folder: Path) -> Case:
    return {"expect": expected_in(folder / case["expect_file"])} if "expect_file" in case else {}


def load_flags(folder: Path = HERE) -> dict[str, dict[str, Any]]:
    """What each flag means."""
    flags: dict[str, dict[str, Any]] = json.loads((folder / "flags.json").read_text(encoding="utf-8"))["flags"]
    return flags


def chosen(cases: Iterable[Case], levels: Sequence[str], pattern: str | None, ids: Sequence[str], profile: str) -> list[Case]:
    """The cases of these levels whose id the pattern fits, as a part of it or with wildcards, in this profile."""

    def fits(case: Case) -> bool:
        in_pattern = pattern is None or pattern in case["id"] or fnmatchcase(case["id"], pattern)
        in_levels = not levels or str(case["level"]) in levels
        return in_pattern and in_levels and (not ids or case["id"] in ids) and profile in case.get("profiles", [profile])

    return [case for case in cases if fits(case)]


def run_case(case: Case, port: Port, profile: str, folder: Path = HERE, smollm2: str | None = None) -> Result:
    """Send a case to a port and judge what comes back."""
    inputs = dict(case["inputs"])
    if inputs.get("model") == SMOLLM2:
        if smollm2 is None:
            return Result(case, "skip", ["needs SmolLM2-135M-Instruct.Q4_1.gguf: give --smollm2 PATH"])
        inputs["model"] = smollm2
    for name in ("model", "tokenizer"):
        if name in inputs and inputs[name] != smollm2:
            inputs[name] = str(folder / inputs[name])
    with tempfile.TemporaryDirectory() as scratch:
        if case["op"] == "trace":
            inputs["path"] = str(Path(scratch) / "run.nkv")
        try:
            answer = port({"id": case["id"], "op": case["op"], "inputs": inputs, "want": list(case.get("expect", ()))})
            if case["op"] == "trace" and "outputs" in answer:
                answer = {"outputs": read_trace(Path(inputs["path"]))}
        except ProgramError as error:
            return Result(case, "error", [str(error)])
        except ValueError as error:  # of read_trace
            return Result(case, "fail", [f"the trace cannot be read: {error}"])
    return judge(case, answer, profile)


def run(cases: Iterable[Case], port: Port, profile: str, smollm2: str | None = None) -> Iterator[Result]:
    """The result of each case. A bug that would break a case which passed is named only where no other bug fits."""
    innocent: set[str] = set()
    for case in cases:
        result = run_case(case, port, profile, smollm2=smollm2)
        innocent.update(result.cleared)
        result.innocent = frozenset(innocent)
        result.named = [name for name in result.named if name not in innocent] or result.named
        yield result


def told(result: Result, flags: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A failed case in words: what was wrong, by how much, and which bug does that."""
    case = result.case
    lines = [f"{result.status.upper()} {case['id']}: {result.lines[0]}", *(f"    {line}" for line in result.lines[1:])]
    if case.get("comment"):
        lines.append(f"    the case: {case['comment']}")
    if result.status == "fail":
        lines += [f"    rules: {', '.join(case['rules'])} (SPEC.md)"]
    lines += [f"    -> {name}: these are the very numbers of a port in which {_meaning(flags[name])}" for name in result.named]
    if result.status == "fail" and not result.named:
        likely = [name for name in case.get("flags", {}) if flags[name]["bits"] == result.rounding_only]
        likely = [name for name in likely if name not in result.innocent]
        lines += [f"    ?  {name}, where {_meaning(flags[name])}" for name in likely[:4]]
    return lines


def _meaning(flag: Mapping[str, Any]) -> str:
    return f"{flag['bug']}. {flag['fix']}"


def summary(results: Sequence[Result]) -> list[str]:
    """Passes and failures by level, and the levels that hold."""
    counts: dict[str, Counter[str]] = {}
    for result in results:
        counts.setdefault(str(result.case["level"]), Counter())[result.status] += 1
    lines = [
        f"level {level:<8}" + "".join(f"{count[status]:6} {status}" for status in ("pass", "fail", "error", "skip"))
        for level, count in counts.items()
    ]
    worst = max((result for result in results if result.status == "pass"), key=lambda result: result.ratio, default=None)
    if worst is not None and worst.ratio > 0:
        lines.append(f"largest difference that passed: {worst.ratio:.2g} of its tolerance ({worst.case['id']})")
    return lines


def _changes(results: Sequence[Result], path: Path) -> list[str]:
    """What changed since the run that the file keeps; keeps this one there."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    now = {result.case["id"]: result.status for result in results}
    path.write_text(json.dumps(before | now, indent=0), encoding="utf-8")
    return [f"{id_}: {before[id_]} -> {status}" for id_, status in now.items() if before.get(id_, status) != status]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", help="the command that runs the port's adapter")
    parser.add_argument("--level", action="append", default=[], help="only this level: 0 to 5, or invalid; may be repeated")
    parser.add_argument("--pattern", help="only cases whose id holds this, or fits it (*, ?)")
    parser.add_argument("-n", "--id", action="append", default=[], help="only the case of this id; may be repeated")
    parser.add_argument("--profile", choices=("close", "exact"), default="close", help="within tolerances, or bit for bit")
    parser.add_argument("--smollm2", metavar="FILE", help="SmolLM2-135M-Instruct.Q4_1.gguf, for the case that bisects it")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="S", help="seconds to wait for an answer (60)")
    parser.add_argument("--first", action="store_true", help="stop at the first failure")
    parser.add_argument("--track", type=Path, metavar="FILE", help="tell only what changed since the run kept in this file")
    parser.add_argument("--skipped", action="store_true", help="tell what was skipped, and why")
    parser.add_argument("--dump-tests", action="store_true", help="print the chosen cases as JSON lines and run nothing")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    cases, flags = chosen(load_cases(), options.level, options.pattern, options.id, options.profile), load_flags()
    if options.dump_tests:
        for case in cases:
            print(json.dumps(case))
        return 0
    if not options.program or not cases:
        print("run.py: " + ("no case was chosen" if options.program else "give --program"), file=sys.stderr)
        return 2
    program, results = Program(options.program, options.timeout), []
    try:
        for result in run(cases, program, options.profile, options.smollm2):
            results.append(result)
            bad = result.status in ("fail", "error")
            if (bad and options.track is None) or (result.status == "skip" and options.skipped):
                print("\n".join(told(result, flags)) if bad else f"SKIP {result.case['id']}: {result.lines[0]}", flush=True)
            if bad and options.first:
                break
    except NoProgramError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        sys.stderr.close()  # whoever read the output stopped
        return 1
    finally:
        program.close()
    print("\n".join([*(_changes(results, options.track) if options.track else ()), *summary(results)]))
    failed = sum(result.status in ("fail", "error") for result in results)
    version = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))["version"]
    print(f"nanokv-conformance {version}, profile {options.profile}: {f'{failed} failed' if failed else 'nothing failed'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
