"""Shape comments, read from the source and compared with the arrays of a real run.

A comment `# [T, H, hd]` behind an assignment names the shape of what it assigns, `# [..], [..]` those of several; behind a
`def` line, the array arguments in order, then `-> ` and the result. Letters of the legend have one value for the whole
call of the model; any other letter has one value within a call of the function. `...` stands for any axes, and `H*hd` for
a product.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import numpy as np

LEGEND = ("T", "S", "L", "H", "G", "hd", "D", "F", "V")
_SHAPES = re.compile(r"\[([^\[\]]*)\]")
_COMMENT = re.compile(r"#\s*((?:\[[^\[\]]*\](?:,\s*)?)*)(?:\s*->\s*((?:\[[^\[\]]*\](?:,\s*)?)+))?\s*$")


@dataclass(frozen=True)
class Claim:
    """What a comment says of one line: names, and the shape of each."""

    line: int
    names: tuple[str, ...]
    shapes: tuple[str, ...]


@dataclass
class Watcher:
    """Compares the claims of some modules with the frames that run; `seen` are the lines that were compared."""

    modules: tuple[ModuleType, ...]
    legend: dict[str, int]
    errors: list[str] = field(default_factory=list)
    seen: set[tuple[str, int]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.claims = {module.__file__: claims_of(module) for module in self.modules}

    def run(self, function: Callable[[], Any]) -> Any:
        """Run it under watch."""
        before = sys.gettrace()
        sys.settrace(self._called)
        try:
            return function()
        finally:
            sys.settrace(before)

    def _called(self, frame: FrameType, event: str, argument: Any) -> Any:
        claims = self.claims.get(frame.f_code.co_filename)
        if claims is None:
            return None
        letters: dict[str, int] = {}
        pending: list[Claim] = []
        first = claims["defs"].get(frame.f_code.co_firstlineno)
        if first is not None:
            self._compare(frame, first, [frame.f_locals.get(name) for name in first.names], letters)

        def stepped(frame: FrameType, event: str, argument: Any) -> Any:
            while pending:
                claim = pending.pop()
                self._compare(frame, claim, [frame.f_locals.get(name) for name in claim.names], letters)
            if event == "return" and first is not None and argument is not None:
                result = claims["results"][frame.f_code.co_firstlineno]
                values = [argument] if len(result.shapes) == 1 else list(argument)
                self._compare(frame, result, values, letters)
            if event == "line" and frame.f_lineno in claims["lines"]:
                pending.append(claims["lines"][frame.f_lineno])
            return stepped

        return stepped

    def _compare(self, frame: FrameType, claim: Claim, values: list[Any], letters: dict[str, int]) -> None:
        for name, shape, value in zip(claim.names, claim.shapes, values, strict=True):
            if not hasattr(value, "shape"):
                continue
            self.seen.add((frame.f_code.co_filename, claim.line))
            if not _fits(shape, tuple(value.shape), self.legend, letters):
                self.errors.append(f"{frame.f_code.co_filename}:{claim.line}: {name} is {list(value.shape)}, not [{shape}]")


def claims_of(module: ModuleType) -> dict[str, dict[int, Claim]]:
    """Claims by line: `lines` of assignments, `defs` of arguments, `results` of results."""
    source = Path(str(module.__file__)).read_text()
    found: dict[str, dict[int, Claim]] = {"lines": {}, "defs": {}, "results": {}}
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            claim = _claim(lines[node.end_lineno - 1], node.lineno, _targets(node))
            if claim is not None:
                found["lines"][node.lineno] = claim[0]
        elif isinstance(node, ast.FunctionDef):
            header = max(range(node.lineno, node.body[0].lineno), default=node.lineno, key=lambda i: "# [" in lines[i - 1])
            arguments = tuple(a.arg for a in node.args.args if a.annotation and ast.unparse(a.annotation) in _ARRAYS)
            claim = _claim(lines[header - 1], node.lineno, arguments)
            if claim is not None:
                found["defs"][node.lineno], found["results"][node.lineno] = claim
    return found


_ARRAYS = ("Array", "Matrix", "Array | None", "Panels")


def _targets(node: Any) -> tuple[str, ...]:
    target = node.targets[0] if isinstance(node, ast.Assign) else node.target
    parts = target.elts if isinstance(target, ast.Tuple) else [target]
    return tuple(part.id if isinstance(part, ast.Name) else "" for part in parts)


def _claim(line: str, number: int, names: tuple[str, ...]) -> Any:
    match = _COMMENT.search(line)
    if match is None or "[" not in match.group(0):
        return None
    shapes, result = (tuple(_SHAPES.findall(group or "")) for group in match.groups())
    if len(shapes) > len(names):
        raise AssertionError(f"line {number}: {len(shapes)} shapes for {names}: {line.strip()}")
    return Claim(number, names[: len(shapes)], shapes), Claim(number, ("result",) * len(result), result)


def _fits(text: str, shape: tuple[int, ...], legend: dict[str, int], letters: dict[str, int]) -> bool:
    axes = [axis.strip() for axis in text.split(",")] if text.strip() else []
    if "..." in axes:
        if len(shape) < len(axes) - 1:
            return False
        at = axes.index("...")
        shape = shape[:at] + shape[len(shape) - (len(axes) - at - 1) :]
        axes.remove("...")
    if len(axes) != len(shape):
        return False
    return all(_axis_fits(axis, n, legend, letters) for axis, n in zip(axes, shape, strict=True))


def _axis_fits(axis: str, n: int, legend: dict[str, int], letters: dict[str, int]) -> bool:
    if axis.isdigit():
        return n == int(axis)
    if "*" in axis:
        return n == int(np.prod([legend[part] for part in axis.split("*")]))
    if axis in legend:
        return n == legend[axis]
    return letters.setdefault(axis, n) == n


def uncompared(watchers: Iterator[Watcher] | list[Watcher]) -> list[str]:
    """Claims that no run reached."""
    watchers = list(watchers)
    seen = set().union(*(watcher.seen for watcher in watchers))
    every = {
        (file, claim.line) for watcher in watchers for file, kinds in watcher.claims.items() for kind in ("lines", "defs")
        for claim in kinds[kind].values() if claim.shapes
    }  # fmt: skip
    return [f"{file}:{line}" for file, line in sorted(every - seen)]
