"""What a picture of a flow is made of: texts, dots and strokes with their places, in points, y upwards.

A Scene is plain data. Making one draws nothing and needs no program, so tests can ask it whether two texts overlap.
`layout.py` and `captions.py` make it, `draw.py` turns it into DOT.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from nanokv.trace import labels

Point = tuple[float, float]
Box = tuple[float, float, float, float]  # left, bottom, right, top

# Colours are named by what they are for; `look.THEMES` says which they are.
FOR, AGAINST, INK, SOFT, FAINT, RULE = "for", "against", "ink", "soft", "faint", "rule"
STREAM, MLP, PAPER = "stream", "mlp", "paper"


@dataclass(frozen=True)
class Text:
    """Lines of text, centred on `at`, or beginning there if `left`."""

    at: Point
    lines: tuple[str, ...]
    size: float
    color: str
    left: bool = False
    tip: str = ""
    backed: bool = False  # whether it hides what lies under it

    @property
    def box(self) -> Box:
        """The most room that it may take."""
        wide, high = max(labels.width(line, self.size) for line in self.lines), 1.2 * self.size * len(self.lines)
        x = self.at[0] if self.left else self.at[0] - wide / 2
        return x, self.at[1] - high / 2, x + wide, self.at[1] + high / 2


@dataclass(frozen=True)
class Dot:
    """A state of the residual stream, or a mark."""

    at: Point
    size: float  # diameter; 0 for a state that nothing but the stream passes through
    tip: str = ""
    name: str = ""  # the id of the state; a mark has none
    color: str = INK


@dataclass(frozen=True)
class Rect:
    """A filled rectangle, which hides what lies under it."""

    box: Box
    color: str
    alpha: float = 1.0  # how much of its colour is mixed with the paper's
    tip: str = ""
    name: str = ""  # its id, if it has one


@dataclass(frozen=True)
class Stroke:
    """A chain of cubic Bezier curves: 3n + 1 points."""

    points: tuple[Point, ...]
    pen: float
    color: str
    alpha: float = 1.0
    style: str = "solid"  # or dashed, dotted
    head: float = 0.0  # length of the arrowhead at its end; 0: none
    bar: bool = False  # whether a bar across the end stands in the arrowhead's place
    more: tuple[tuple[Point, ...], ...] = ()  # chains that look like it: one stroke is quicker to draw than many
    ends: tuple[str, str] | None = None  # the ids of the states that it joins
    tip: str = ""


@dataclass
class Scene:
    """Everything to be drawn, strokes in the order in which they cover each other, and the edges of the paper."""

    paper: Box = (0.0, 0.0, 0.0, 0.0)
    rects: list[Rect] = field(default_factory=list)
    strokes: list[Stroke] = field(default_factory=list)
    dots: list[Dot] = field(default_factory=list)
    texts: list[Text] = field(default_factory=list)


def straight(a: Point, b: Point) -> tuple[Point, ...]:
    """A line from a to b as one Bezier curve."""
    return tuple((a[0] + (b[0] - a[0]) * t / 3, a[1] + (b[1] - a[1]) * t / 3) for t in range(4))


def state_id(row: int, pos: int) -> str:
    """The one name of a state, in traces, vectors and pictures."""
    return f"layer{row}.pos{pos}"


@dataclass(frozen=True)
class Column:
    """One token, or a run of tokens where nothing kept happens, folded."""

    first: int
    last: int
    lines: tuple[str, ...]
    width: float

    @property
    def folded(self) -> bool:
        return self.last > self.first


@dataclass(frozen=True)
class Grid:
    """The places of columns and rows."""

    columns: tuple[Column, ...]
    x: dict[int, float]  # the middle of each position's column; those of a fold share one
    y: dict[int, float]  # of each row that is shown, ascending; the last row always is
    folds: tuple[tuple[int, int, float], ...]  # first and last hidden row, and the height of the fold's middle
    base: float  # where the columns rise from their tokens
    right: float
    size: float  # of the tokens' text
    left: float  # where the first column begins
    lanes: tuple[float, ...]  # of each attention edge that is shown, the height at which it runs; () for straight ways
