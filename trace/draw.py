"""Flow -> DOT -> SVG, PNG, PDF. The only module that knows graphviz.

Every place is given, so graphviz does not lay out, it draws: `neato -n2`, with `pos` in points on nodes and as our own
Bezier curves on edges. That is the fastest way, and the only one that keeps tokens and layers in line.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import graphviz

from nanokv.errors import DrawError
from nanokv.trace import labels
from nanokv.trace.flow import Flow
from nanokv.trace.layout import arrange
from nanokv.trace.scene import INK, PAPER, Dot, Point, Scene, Stroke, Text, state_id

FORMATS = ("svg", "png", "pdf", "dot")
FONT = "Helvetica,Arial,sans-serif"
DPI, MOST_PIXELS = 144, 16000  # of a PNG; one that would be larger gets fewer dots an inch
NOTEBOOK = 60  # attention edges; a flow with more is pruned to these before a notebook shows it


@dataclass(frozen=True)
class Program:
    """A program that draws DOT."""

    path: str
    pure: bool  # graphviz-pure: no PDF, and one font of its own in PNG


def find_program() -> Program | None:
    """The system's `dot`; or else graphviz-pure, which lies beside the Python that runs, activated or not."""
    if system := shutil.which("dot"):
        return Program(system, False)
    folders = [
        str(Path(sys.executable).parent),
        sysconfig.get_path("scripts"),
        sysconfig.get_path("scripts", f"{os.name}_user"),
    ]
    for folder in (os.pathsep.join(folders), None):
        if pure := shutil.which("graphviz-pure", path=folder):
            return Program(pure, True)
    return None


def check_format(path: str | Path) -> str:
    """The format that a file's suffix names; DrawError if it names none, or there is no program to draw it."""
    suffix = Path(path).suffix[1:].lower()
    if suffix not in FORMATS:
        raise DrawError(
            f"{str(path)!r} names no format: it must end in {', '.join('.' + name for name in FORMATS[:-1])} or .dot"
        )
    if suffix != "dot":
        _program_for(suffix)
    return suffix


def _program_for(suffix: str) -> Program:
    program = find_program()
    if program is None:
        raise DrawError(
            "found no program to draw with: pip install 'nanokv[dot]', or install the system's graphviz "
            "(apt install graphviz, brew install graphviz). A .dot file needs none"
        )
    if suffix == "pdf" and program.pure:
        raise DrawError(
            "graphviz-pure writes no PDF: install the system's graphviz (apt install graphviz, brew install graphviz), "
            "or draw a .svg and print that to PDF"
        )
    return program


def render(flow: Flow, path: Path, *, title: str | None = None) -> Path:
    """Draw a flow into a file; see Flow.render."""
    suffix = check_format(path)
    if not path.parent.is_dir():
        raise DrawError(f"there is no folder {str(path.parent)!r} to put {path.name!r} into")
    data = graph(flow, title=title).source.encode() if suffix == "dot" else _draw(flow, suffix, title)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def for_notebook(flow: Flow) -> str | None:
    """The picture as SVG, of the strongest edges if there are many; None if no program can draw it."""
    if flow.crossing.sum() > NOTEBOOK:
        flow = flow.prune(1.0, top_k=NOTEBOOK)
    try:
        return _draw(flow, "svg", None).decode()
    except DrawError:
        return None


def _draw(flow: Flow, suffix: str, title: str | None) -> bytes:
    program = _program_for(suffix)
    scene = arrange(flow, basic=suffix == "png" and program.pure, title=title)
    command = [program.path, "-Kneato", "-n2", f"-T{suffix}"]
    if suffix == "png":
        left, bottom, right, top = scene.paper
        command.append(f"-Gdpi={min(DPI, int(72 * MOST_PIXELS / max(right - left, top - bottom)))}")
    try:
        done = subprocess.run(command, input=_digraph(scene).source.encode(), capture_output=True, check=False)
    except OSError as error:
        raise DrawError(f"{program.path} could not be run: {error}") from error
    if done.returncode != 0 or not done.stdout:  # it also warns, of fonts, when all is well
        said = done.stderr.decode(errors="replace").strip() or f"exit status {done.returncode}"
        raise DrawError(f"{program.path} could not draw a {suffix}: {said[:500]}")
    return done.stdout


def graph(flow: Flow, *, title: str | None = None) -> graphviz.Digraph:
    """The picture as a Digraph, to be drawn by `neato -n2`."""
    return _digraph(arrange(flow, title=title))


def _digraph(scene: Scene) -> graphviz.Digraph:
    return graphviz.Digraph("flow", engine="neato", body=list(_statements(scene)))


def _statements(scene: Scene) -> Iterator[str]:
    """The lines of DOT: first what is common to all, then strokes, states and texts."""
    yield f'\tgraph [bgcolor="{PAPER}", outputorder=edgesfirst, pad=0, margin=0, inputscale=72]\n'
    yield f'\tnode [shape=none, margin=0, width=0, height=0, label="", tooltip=" ", fontname="{FONT}"]\n'
    yield "\tedge [arrowhead=none]\n"
    left, bottom, right, top = scene.paper
    for name, corner in (("from", (left, bottom)), ("to", (right, top))):  # they make the picture as large as the paper
        yield f'\t{name} [style=invis, shape=point, pos="{_place(corner)}!"]\n'
    states = {state_id(dot.row, dot.pos) for dot in scene.dots}
    for stroke in scene.strokes:
        yield from _stroke(stroke, states)
    for dot in scene.dots:
        yield _dot(dot)
    for number, text in enumerate(scene.texts):
        yield _text(f"text{number}", text)


def _stroke(stroke: Stroke, states: set[str]) -> Iterator[str]:
    """An edge; and its arrowhead as another one, for graphviz draws the head's outline as thick as the edge."""
    ends = stroke.ends if stroke.ends is not None and states.issuperset(stroke.ends) else ("from", "to")
    edge = f'\t"{ends[0]}" -> "{ends[1]}"' if ends[0] != "from" else "\tfrom -> to"
    style = "" if stroke.style == "solid" else f", style={stroke.style}"
    tip = f", tooltip={labels.quote(*(stroke.tip or ' ').splitlines())}" if stroke.tip or stroke.ends is None else ""
    points, head = _cut(stroke) if stroke.head else (stroke.points, ())
    alpha = f"{round(255 * stroke.alpha):02X}" if stroke.alpha < 1 else ""
    yield f'{edge} [pos="{_path(points)}", penwidth={_number(stroke.pen)}, color="{stroke.color}{alpha}"{style}{tip}]\n'
    if head:
        look = f'penwidth=0.2, color="{_on_paper(stroke.color, stroke.alpha)}"'
        place = f'pos="e,{_place(head[-1])} {_path(head[:-1])}"'
        yield f"{edge} [{place}, arrowhead=normal, arrowsize={_number(stroke.head / 10)}, {look}]\n"


def _cut(stroke: Stroke) -> tuple[tuple[Point, ...], tuple[Point, ...]]:
    """The stroke up to its head; and the head: a short curve, with its tip behind it."""
    (x0, y0), tip = stroke.points[-2:]
    length = math.hypot(tip[0] - x0, tip[1] - y0) or 1.0
    back = tuple(0.9 * stroke.head * d / length for d in (tip[0] - x0, tip[1] - y0))
    neck = tip[0] - back[0], tip[1] - back[1]
    inner = tuple((neck[0] + back[0] * t / 8, neck[1] + back[1] * t / 8) for t in range(4))
    return (*stroke.points[:-1], neck), (*inner, tip)


def _on_paper(color: str, alpha: float) -> str:
    """The opaque colour that looks as this one does on the paper: seams of a head would show otherwise."""
    channels = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(255 - (255 - channel) * alpha):02X}" for channel in channels)


def _dot(dot: Dot) -> str:
    name, size = state_id(dot.row, dot.pos), _number(max(dot.size, 2.0) / 72)
    look = f'fillcolor="{INK}", color="{PAPER}", penwidth=1' if dot.size else 'fillcolor="#FFFFFF00", penwidth=0'
    shape = f"shape=circle, width={size}, height={size}, fixedsize=true, style=filled"
    return f'\t"{name}" [id="{name}", pos="{_place(dot.at)}!", {shape}, {look}, tooltip={labels.quote(dot.tip)}]\n'


def _text(name: str, text: Text) -> str:
    left, bottom, right, top = text.box
    label, at, room = labels.quote(*text.lines), text.at, ""
    if text.left:  # to begin exactly there in any font, it stands at the left of a box of our own width
        label = f'{label[:-1]}\\l"'
        wide = 1.05 * (right - left)  # or it would be moved to the left in a font that is a little wider after all
        at = left + wide / 2, (bottom + top) / 2
        room = f", fixedsize=true, width={_number(wide / 72)}, height={_number((top - bottom) / 72)}"
    tip = f", tooltip={labels.quote(text.tip)}" if text.tip else ""
    look = f'fontsize={_number(text.size)}, fontcolor="{text.color}"'
    return f'\t{name} [pos="{_place(at)}!", label={label}, {look}{room}{tip}]\n'


def _path(points: tuple[Point, ...]) -> str:
    return " ".join(map(_place, points))


def _place(point: Point) -> str:
    return f"{_number(point[0])},{_number(point[1])}"


def _number(value: float) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".")
