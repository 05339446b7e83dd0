"""How a picture shall look: what it shows, its words, its width, its type, its colours."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal

from nanokv.errors import DrawError

FONT = "Helvetica,Arial,sans-serif"
POINTS = 72 / 25.4  # in a millimetre
NARROW = 480.0  # points: a picture of less width is set in smaller type
KINDS = ("graph", "heat", "pyramid")

# Blue and vermillion, of Okabe and Ito (2008), are a pair that colour-blind people tell apart. In grey they are nearly the
# same, so what speaks against ends in a bar, not in an arrowhead.
THEMES = {
    "light": {
        "for": "#0072B2", "against": "#D55E00", "ink": "#1F2328", "soft": "#5F6368", "faint": "#8A8E93", "rule": "#EFEEEA",
        "stream": "#D8D5CD", "mlp": "#8A6FA3", "paper": "#FFFFFF",
    },
    "dark": {
        "for": "#56B4E9", "against": "#F0883E", "ink": "#ECEAE6", "soft": "#B4B8BD", "faint": "#868B91", "rule": "#23272C",
        "stream": "#42474E", "mlp": "#B79BD0", "paper": "#14171A",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """Type sizes and distances, in points."""

    title: float
    facts: float
    prediction: float
    legend: float
    tiny: float  # numbers; never less than 6
    tokens: tuple[tuple[float, int, float], ...]  # to try in turn: size, longest run not folded (0: any), room for a token
    margin: float
    names: float  # where the columns begin, right of the layers' names
    column: float  # the least width of one
    row: tuple[float, float]  # the least height of one, and the greatest of an empty one
    lane: float  # clear between edges that run beside each other
    lanes: float  # the greatest height of all that run between two rows
    pen: float  # of the strongest edge


WIDE = Sizes(15, 9.5, 17, 8.5, 8, ((13, 0, 116), (13, 2, 116), (11, 2, 86), (9, 1, 72)), 16, 74, 26, (24, 40), 5, 140, 5)
SMALL = Sizes(
    10.5, 7, 12, 6.5, 6, ((8.5, 0, 60), (8.5, 2, 60), (7.5, 1, 50), (6.5, 1, 40), (6.5, 1, 27), (6.5, 1, 18)), 5, 30, 14,
    (15.5, 22), 3.5, 90, 3,
)  # fmt: skip


@dataclass(frozen=True)
class Look:
    """What a picture's maker may choose. Raises DrawError for what there is not."""

    kind: Literal["graph", "heat", "pyramid"] = "graph"
    title: str | None = None  # instead of the question that the picture answers; "" for none
    caption: str | None = None  # below the legend
    theme: Literal["light", "dark"] = "light"
    width: float | None = None  # millimetres; None: as wide as it needs
    font: str = FONT
    basic: bool = False  # whether characters that graphviz-pure's own font lacks are written out; set for its PNG

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise DrawError(f"there is no picture of kind {self.kind!r}; there are: {', '.join(KINDS)}")
        if self.theme not in THEMES:
            raise DrawError(f"there is no theme {self.theme!r}; there are: {', '.join(THEMES)}")
        if self.width is not None and not 40 <= self.width <= 2000:
            raise DrawError(f"width is {self.width!r}; it is the picture's width in millimetres, from 40 to 2000")
        if not self.font.isprintable():
            raise DrawError(f"font is {self.font!r}; it is the name of a font, or several with commas between them")

    @cached_property
    def sizes(self) -> Sizes:
        """Those for its width."""
        return SMALL if self.width is not None and self.width * POINTS < NARROW else WIDE

    @property
    def room(self) -> float:
        """The width in points, margins aside, if it was given; one less, for graphviz may add that to the picture."""
        return 0.0 if self.width is None else int(self.width * POINTS) - 1 - 2 * self.sizes.margin


def look(options: dict[str, Any]) -> Look:
    """The look of these options; DrawError names one that there is not."""
    known = {f.name for f in fields(Look)}
    if unknown := sorted(options.keys() - known):
        raise DrawError(f"there is no option {unknown[0]!r} of a picture; there are: {', '.join(sorted(known - {'basic'}))}")
    return Look(**options)
