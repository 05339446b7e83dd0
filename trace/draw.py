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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import graphviz

from nanokv.errors import DrawError
from nanokv.trace import heat, labels, layout, pyramid
from nanokv.trace.flow import Flow
from nanokv.trace.look import THEMES, Look, look
from nanokv.trace.scene import PAPER, Dot, Point, Rect, Scene, Stroke, Text, straight

Colors = Mapping[str, str]  # of a theme, by what they are for

FORMATS = ("svg", "png", "pdf", "dot")
SANS = ("Liberation Sans", "Nimbus Sans", "DejaVu Sans", "Noto Sans")
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
    if suffix == "pdf" and find_spec("typst") is None:
        raise DrawError("a PDF needs the extra pdf: pip install 'nanokv[pdf]'; or draw a .svg and print that to PDF")
    return program


def render(flow: Flow, path: Path, **options: Any) -> Path:
    """Draw a flow into a file; see Flow.render."""
    chosen = look(options)
    return render_scene(lambda seen: scene_of(flow, seen), path, chosen)


def render_scene(arranged: Callable[[Look], Scene], path: Path, chosen: Look) -> Path:
    """Draw a scene into a file: whole, or the old one stays."""
    suffix = check_format(path)
    if not path.parent.is_dir():
        raise DrawError(f"there is no folder {str(path.parent)!r} to put {path.name!r} into")
    data = drawn(arranged, suffix, chosen)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def scene_of(flow: Flow, chosen: Look) -> Scene:
    """The picture of a flow in the kind that was chosen."""
    return {"graph": layout, "heat": heat, "pyramid": pyramid}[chosen.kind].arrange(flow, chosen)


def for_notebook(flow: Flow) -> str | None:
    """The picture as SVG, of the strongest edges if there are many; None if no program can draw it."""
    if flow.crossing.sum() > NOTEBOOK:
        flow = flow.prune(1.0, top_k=NOTEBOOK)
    try:
        return drawn(lambda seen: scene_of(flow, seen), "svg", Look()).decode()
    except DrawError:
        return None


def drawn(arranged: Callable[[Look], Scene], suffix: str, chosen: Look) -> bytes:
    """The picture in the format of that suffix."""
    if suffix == "dot":
        return digraph(arranged(chosen), chosen).source.encode()
    program = _program_for(suffix)
    if suffix == "png" and program.pure:
        chosen = replace(chosen, basic=True)
    if suffix == "pdf":
        return _pdf(drawn(arranged, "svg", replace(chosen, font=_with_sans(chosen.font))))
    scene = arranged(chosen)
    command = [program.path, "-Kneato", "-n2", f"-T{suffix}"]
    if suffix == "png":
        left, bottom, right, top = scene.paper
        command.append(f"-Gdpi={min(DPI, int(72 * MOST_PIXELS / max(right - left, top - bottom)))}")
    try:
        done = subprocess.run(command, input=digraph(scene, chosen).source.encode(), capture_output=True, check=False)
    except OSError as error:
        raise DrawError(f"{program.path} could not be run: {error}") from error
    if done.returncode != 0 or not done.stdout:  # it also warns, of fonts, when all is well
        said = done.stderr.decode(errors="replace").strip() or f"exit status {done.returncode}"
        raise DrawError(f"{program.path} could not draw a {suffix}: {said[:500]}")
    return done.stdout


def _with_sans(font: str) -> str:
    """The font, or else one without serifs that typst finds, which knows no such family by itself."""
    import typst

    there = set(typst.Fonts().families())
    return ",".join([font, *(name for name in SANS if name in there)])


def _pdf(svg: bytes) -> bytes:
    """The picture on a page of its size; text stays text. Alike with any graphviz, and without the system's."""
    import typst

    page = b'#set page(width: auto, height: auto, margin: 0pt)\n#image(bytes(sys.inputs.svg), format: "svg")'
    return bytes(typst.compile(page, sys_inputs={"svg": svg.decode()}))


def graph(flow: Flow, **options: Any) -> graphviz.Digraph:
    """The picture as a Digraph, to be drawn by `neato -n2`."""
    chosen = look(options)
    return digraph(scene_of(flow, chosen), chosen)


def digraph(scene: Scene, chosen: Look) -> graphviz.Digraph:
    """A scene as a Digraph."""
    return graphviz.Digraph("flow", engine="neato", body=list(_statements(scene, chosen)))


def _statements(scene: Scene, chosen: Look) -> Iterator[str]:
    """The lines of DOT: first what is common to all, then strokes, rectangles, states and texts."""
    colors, font = THEMES[chosen.theme], labels.quote(chosen.font)
    yield f'\tgraph [bgcolor="{colors[PAPER]}", outputorder=edgesfirst, pad=0, margin=0, inputscale=72]\n'
    yield f'\tnode [shape=none, margin=0, width=0, height=0, label="", tooltip=" ", fontname={font}]\n'
    yield "\tedge [arrowhead=none]\n"
    left, bottom, right, top = scene.paper
    for name, corner in (("from", (left, bottom)), ("to", (right, top))):  # they make the picture as large as the paper
        yield f'\t{name} [style=invis, shape=point, pos="{_place(corner)}!"]\n'
    states = {dot.name for dot in scene.dots if dot.name}
    for stroke in scene.strokes:
        yield from _stroke(stroke, states, colors)
    for number, rect in enumerate(scene.rects):
        yield _rect(rect.name or f"rect{number}", rect, colors)
    for number, dot in enumerate(scene.dots):
        yield _dot(dot.name or f"mark{number}", dot, colors)
    for number, text in enumerate(scene.texts):
        yield _text(f"text{number}", text, colors, right)


def _stroke(stroke: Stroke, states: set[str], colors: Colors) -> Iterator[str]:
    """An edge; and its arrowhead as another one, for graphviz draws the head's outline as thick as the edge."""
    ends = stroke.ends if stroke.ends is not None and states.issuperset(stroke.ends) else ("from", "to")
    edge = f'\t"{ends[0]}" -> "{ends[1]}"' if ends[0] != "from" else "\tfrom -> to"
    style = "" if stroke.style == "solid" else f", style={stroke.style}"
    tip = f", tooltip={_tip(stroke.tip)}" if stroke.tip or stroke.ends is None else ""
    points, head = _cut(stroke) if stroke.head and not stroke.bar else (stroke.points, ())
    color = colors[stroke.color]
    paths = ";".join(map(_path, (points, *stroke.more)))
    yield f'{edge} [pos="{paths}", penwidth={_number(stroke.pen)}, color="{color}{_alpha(stroke.alpha)}"{style}{tip}]\n'
    opaque = _on_paper(color, stroke.alpha, colors[PAPER]) if stroke.head else ""
    if head:
        place = f'pos="e,{_place(head[-1])} {_path(head[:-1])}"'
        yield f'{edge} [{place}, arrowhead=normal, arrowsize={_number(stroke.head / 10)}, penwidth=0.2, color="{opaque}"]\n'
    elif stroke.head and stroke.bar:
        yield f'{edge} [pos="{_path(_across(stroke))}", penwidth={_number(0.32 * stroke.head)}, color="{opaque}"]\n'


def _cut(stroke: Stroke) -> tuple[tuple[Point, ...], tuple[Point, ...]]:
    """The stroke up to its head; and the head: a short curve, with its tip behind it."""
    tip, (dx, dy) = stroke.points[-1], _direction(stroke)
    back = 0.9 * stroke.head * dx, 0.9 * stroke.head * dy
    neck = tip[0] - back[0], tip[1] - back[1]
    inner = tuple((neck[0] + back[0] * t / 8, neck[1] + back[1] * t / 8) for t in range(4))
    return (*stroke.points[:-1], neck), (*inner, tip)


def _across(stroke: Stroke) -> tuple[Point, ...]:
    """The bar at the end of a stroke that speaks against: as long as an arrowhead is wide."""
    (x, y), (dx, dy) = stroke.points[-1], _direction(stroke)
    half = 0.6 * stroke.head + 0.5 * stroke.pen
    return straight((x - dy * half, y + dx * half), (x + dy * half, y - dx * half))


def _direction(stroke: Stroke) -> Point:
    """The unit vector in which a stroke arrives."""
    (x0, y0), tip = stroke.points[-2:]
    length = math.hypot(tip[0] - x0, tip[1] - y0) or 1.0
    return (tip[0] - x0) / length, (tip[1] - y0) / length


def _on_paper(color: str, alpha: float, paper: str) -> str:
    """The opaque colour that looks as this one does on the paper: seams of a head would show otherwise."""
    channels, under = ([int(hexadecimal[i : i + 2], 16) for i in (1, 3, 5)] for hexadecimal in (color, paper))
    return "#" + "".join(f"{round(b - (b - a) * alpha):02X}" for a, b in zip(channels, under, strict=True))


def _alpha(alpha: float) -> str:
    return f"{round(255 * alpha):02X}" if alpha < 1 else ""


def _rect(name: str, rect: Rect, colors: Colors) -> str:
    left, bottom, right, top = rect.box
    size = f"width={_number((right - left) / 72)}, height={_number((top - bottom) / 72)}, fixedsize=true"
    look_of = f'shape=box, style=filled, penwidth=0, fillcolor="{_on_paper(colors[rect.color], rect.alpha, colors[PAPER])}"'
    identity = f' id="{rect.name}",' if rect.name else ""
    place, tip = _place(((left + right) / 2, (bottom + top) / 2)), _tip(rect.tip)
    return f'\t"{name}" [{identity} pos="{place}!", {size}, {look_of}, tooltip={tip}]\n'


def _dot(name: str, dot: Dot, colors: Colors) -> str:
    size = _number(max(dot.size, 2.0) / 72)
    filled = f'fillcolor="{colors[dot.color]}", color="{colors[PAPER]}", penwidth=1'
    shape = f"shape=circle, width={size}, height={size}, fixedsize=true, style=filled"
    identity = f' id="{dot.name}",' if dot.name else ""
    seen = filled if dot.size else 'fillcolor="#FFFFFF00", penwidth=0'
    return f'\t"{name}" [{identity} pos="{_place(dot.at)}!", {shape}, {seen}, tooltip={_tip(dot.tip)}]\n'


def _text(name: str, text: Text, colors: Colors, edge: float) -> str:
    """A text as a node; `edge` is the right one of the paper, beyond which it makes no room."""
    left, bottom, right, top = text.box
    label, at, room = labels.quote(*text.lines), text.at, ""
    if text.left:  # to begin exactly there in any font, it stands at the left of a box of our own width
        label = labels.quote(*text.lines, left=True)
        # Or it would be moved to the left in a font that is a little wider after all.
        wide = max(min(1.05 * (right - left), edge - left), 1.0)
        at = left + wide / 2, (bottom + top) / 2
        room = f", fixedsize=true, width={_number(wide / 72)}, height={_number((top - bottom) / 72)}"
    if text.backed:
        size = f"width={_number((right - left) / 72)}, height={_number(0.8 * (top - bottom) / 72)}"
        room = f', shape=box, fixedsize=true, {size}, style=filled, penwidth=0, fillcolor="{colors[PAPER]}"'
    tip = f", tooltip={_tip(text.tip)}" if text.tip else ""
    seen = f'fontsize={_number(text.size)}, fontcolor="{colors[text.color]}"'
    return f'\t{name} [pos="{_place(at)}!", label={label}, {seen}{room}{tip}]\n'


def _tip(text: str) -> str:
    return labels.quote(*(text or " ").splitlines(), tip=True)


def _path(points: tuple[Point, ...]) -> str:
    return " ".join(map(_place, points))


def _place(point: Point) -> str:
    return f"{_number(point[0])},{_number(point[1])}"


def _number(value: float) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".")
