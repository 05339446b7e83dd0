"""Telling a computation: equations in the order of docs/arithmetic.md, and how they are printed.

The right side of an equation, computed in float32 with one rounding for each operation, has the bits of its left side.
Numbers are printed so that reading them back gives the same float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from nanokv.trace.arithmetic import LANES, F, fma
from nanokv.trace.recompute import Operands

Array = np.ndarray
SHORT = 8  # so many equations in a row are printed; of more, some are left out: see _folded


@dataclass(frozen=True)
class Equation:
    """value = expression."""

    value: F
    expression: str
    note: str  # what the operands are
    kept: bool = False  # never folded away


@dataclass
class Stage:
    """Equations that belong together, with the rule of docs/arithmetic.md that orders them."""

    title: str
    rule: str
    equations: list[Equation] = field(default_factory=list)


class Telling:
    """The stages of an explanation while it is made. Methods return the value that they told."""

    def __init__(self) -> None:
        self.stages: list[Stage] = []
        self.further: list[str] = []  # ids of operands that can be asked for in turn

    def stage(self, title: str, rule: str) -> None:
        self.stages.append(Stage(title, rule))

    def say(self, value: Array | F, expression: str, *operands: F, note: str = "", kept: bool = False) -> F:
        """One equation; the expression has {} for each operand."""
        equation = Equation(F(value), expression.format(*(str(F(operand)) for operand in operands)), note, kept)
        self.stages[-1].equations.append(equation)
        return equation.value

    def chain(self, x: Array, w: Array, note: Callable[[int], str]) -> F:
        """fma after fma, from +0."""
        total = F(0)
        for k in range(len(x)):
            total = self.say(fma(x[k], w[k], total), "fma({}, {}, {})", x[k], w[k], total, note=note(k))
        return total

    def lanes(self, x: Array, what: Callable[[int], str], first: int = 0, squares: bool = False) -> F:
        """A sum, or a sum of squares, in sixteen lanes (S1)."""
        lanes = np.zeros(LANES, F)
        for i, value in enumerate(x):
            lane = (first + i) % LANES
            before, note = lanes[lane], f"lane {lane}: {what(i)}"
            if squares:
                lanes[lane] = self.say(fma(value, value, before), "fma({}, {}, {})", value, value, before, note=note)
            else:
                lanes[lane] = self.say(before + value, "{} + {}", before, value, note=note)
        half = LANES // 2
        while half:
            for i in range(half):
                a, b = lanes[i], lanes[i + half]
                lanes[i] = self.say(a + b, "{} + {}", a, b, note=f"lanes {i} and {i + half}")
            half //= 2
        return F(lanes[0])

    def norm(self, kind: str, x: Array, i: int, w: Array | None, b: Array | None, eps: float, name: str) -> F:
        """Element i of a norm (M1, M2) of x; `name` is what x is called."""
        if kind == "none" or w is None:
            self.stage("this model has no norm", "M1")
            return self.say(x[i], "{}", x[i], note=f"{name}[{i}]")
        if kind == "layer":
            x, name = self.centred(x, name, i), "c"
        r = self.scale(x, eps, name)
        self.stage("the norm", "M1" if b is None else "M2")
        if b is None:
            return self.say(x[i] * r * w[i], "({} * {}) * {}", x[i], r, w[i], note=f"{name}[{i}], r, the norm's weight")
        y = x[i] * r * w[i] + b[i]
        return self.say(y, "(({} * {}) * {}) + {}", x[i], r, w[i], b[i], note=f"{name}[{i}], r, the norm's weight and bias")

    def centred(self, x: Array, name: str, keep: int | None = None) -> Array:
        """c = x - mean (M2)."""
        self.stage(f"the mean of {name}, summed in sixteen lanes, element i in lane i mod 16", "M2")
        total = self.lanes(x, lambda k: f"{name}[{k}]")
        mean = self.say(total / F(len(x)), "{} / {}", total, F(len(x)), note="the mean")
        self.stage(f"c: {name} less the mean", "M2")
        for k, each in enumerate(x):
            self.say(each - mean, "{} - {}", each, mean, note=f"c[{k}]", kept=k == keep)
        return x - mean

    def scale(self, x: Array, eps: float, name: str) -> F:
        """What a norm multiplies by: r = 1 / sqrt(s / K + eps)."""
        self.stage(f"the sum of the squares of {name}, in sixteen lanes, element i in lane i mod 16", "S1")
        total = self.lanes(x, lambda k: f"{name}[{k}]", squares=True)
        self.stage("r: one over the root of the mean square", "M1")
        r = F(1) / np.sqrt(total / F(len(x)) + F(eps))
        return self.say(r, "1.0 / sqrt({} / {} + {})", total, F(len(x)), F(eps), note="r")

    def linear(self, o: Operands, x: Array, n: int, matrix: str, bias: str, layer: int | None,
               note: Callable[[int], str]) -> F:  # fmt: skip
        """Output n of a linear map (L1), and the largest of its terms' operand as one to ask for."""
        row, b = o.matrix(matrix, layer)[n], o.weight(bias, layer) if bias else None
        self.stage(f"row {n} of {matrix}, over {len(x)} inputs, fma after fma", "L1")
        total = self.chain(x, row, lambda k: f"{note(k)} {matrix}[{n},{k}]")
        return total if b is None else self.say(total + b[n], "{} + {}", total, b[n], note=f"+ {bias}[{n}]")


def lines(stages: list[Stage], everything: bool) -> Iterator[str]:
    """The stages in print; long runs of equations folded unless everything is wanted."""
    for stage in stages:
        yield ""
        yield f"{stage.title}  ({stage.rule})"
        shown = [e for e in _folded(stage.equations, everything) if isinstance(e, Equation)]
        left = max((len(str(e.value)) for e in shown), default=0)
        right = max((len(e.expression) for e in shown if len(e.expression) <= 60), default=0)
        for equation in _folded(stage.equations, everything):
            if isinstance(equation, Equation):
                yield f"  {equation.value!s:<{left}} = {equation.expression:<{right}}   {equation.note}".rstrip()
            else:
                yield f"  ... {equation:,} more"


def _folded(equations: list[Equation], everything: bool) -> Iterator[Equation | int]:
    """The equations to print, and between them how many are left out: those that come to what the one before came to, if
    that makes the rest short; else all but the first and last three and those to keep."""
    n, left_out = len(equations), 0
    moving = [i == 0 or str(equations[i - 1].value) != str(each.value) for i, each in enumerate(equations)]
    few = sum(moving) <= SHORT
    for i, equation in enumerate(equations):
        ends = i == n - 1 if few else not 3 <= i < n - 3
        if everything or n <= SHORT or ends or (few and moving[i]) or equation.kept:
            if left_out:
                yield left_out
            yield equation
            left_out = 0
        else:
            left_out += 1
