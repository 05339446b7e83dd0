"""Small pictures as SVG text: grids of numbers and curves with intervals. The same numbers give the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from math import floor, log10

import numpy as np

INK, FAINT, PAPER = "#1f2430", "#c9ccd3", "#ffffff"
COLOURS = ("#2f6db3", "#d1602b", "#3a8f5c", "#8a5bb0", "#b39b2f", "#777777")
FONT = "Helvetica,Arial,sans-serif"


@dataclass(frozen=True)
class Grid:
    """A table of numbers as coloured cells, row 0 at the bottom; NaN is left blank."""

    title: str
    values: np.ndarray  # [rows, columns]
    x: str  # what the columns are
    y: str
    low: float = 0.0
    high: float = 1.0
    columns: Sequence[str] = ()  # labels; none: numbers
    rows: Sequence[str] = ()
    marks: np.ndarray | None = None  # text in each cell
    legend: str = ""
    cell: int = 14


@dataclass(frozen=True)
class Curves:
    """Lines over a common axis. A line is (name, x, y) or (name, x, y, low, high), the last two an interval of y. Lines of one
    name have one colour."""

    title: str
    lines: Sequence[tuple]
    x: str
    y: str
    log_y: bool = False
    limits: tuple[float, float] | None = None  # of y
    ticks: Sequence[tuple[float, str]] = field(default=())  # of x; none: whole numbers


def figure(panels: Sequence[Grid | Curves], caption: str = "", most: int = 900) -> str:
    """The panels side by side, in rows of at most `most` points, as one SVG."""
    parts, left, top, tall, wide = [], 0, 0, 0, 0
    for panel in panels:
        body, width, height = (_grid if isinstance(panel, Grid) else _curves)(panel)
        if left and left + width > most:
            left, top, tall = 0, top + tall, 0
        parts.append(f'<g transform="translate({left},{top})">{body}</g>')
        left, tall, wide = left + width, max(tall, height), max(wide, left + width)
    height = top + tall + (26 if caption else 0)
    foot = _text(12, height - 10, caption, 12) if caption else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {height}" width="{wide}" height="{height}" '
        f'font-family="{FONT}">\n<rect width="100%" height="100%" fill="{PAPER}"/>\n' + "\n".join(parts) + f"\n{foot}</svg>\n"
    )


def _text(x: float, y: float, text: str, size: int = 11, anchor: str = "start", turn: float = 0, colour: str = INK) -> str:
    turned = f' transform="rotate({turn} {x:g} {y:g})"' if turn else ""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{colour}"{turned}>{escape(text)}</text>'


def _shade(value: float, low: float, high: float) -> str:
    """Faint to blue; below zero, if the scale goes there, faint to orange; NaN is left blank."""
    if np.isnan(value):
        return PAPER
    end = (47, 109, 179) if value >= 0 else (209, 96, 43)
    part = min(1.0, abs(value) / (high if value >= 0 or low >= 0 else -low))
    return "#" + "".join(f"{round(c0 + (c - c0) * part):02x}" for c0, c in zip((238, 240, 244), end, strict=True))


def _grid(panel: Grid) -> tuple[str, int, int]:
    rows, columns = panel.values.shape
    c, left, top = panel.cell, 58, 44
    under = 46 if not panel.columns else 18 + int(6.5 * max(map(len, panel.columns)))
    body = [_text(left, 24, panel.title, 13)]
    for i in range(rows):
        y = top + (rows - 1 - i) * c
        for j in range(columns):
            fill = _shade(float(panel.values[i, j]), panel.low, panel.high)
            body.append(f'<rect x="{left + j * c}" y="{y}" width="{c - 1}" height="{c - 1}" fill="{fill}"/>')
            if panel.marks is not None and panel.marks[i, j]:
                ink = PAPER if abs(panel.values[i, j]) > 0.6 * panel.high else INK
                body.append(_text(left + j * c + c / 2 - 0.5, y + c / 2 + 3, str(panel.marks[i, j]), 9, "middle", colour=ink))
        if panel.rows or rows <= 12 or i % 5 == 0:
            body.append(_text(left - 5, y + c / 2 + 4, panel.rows[i] if panel.rows else str(i), 10, "end"))
    bottom = top + rows * c
    for j in range(columns):
        x = left + j * c + c / 2
        if panel.columns:
            body.append(_text(x + 3, bottom + 6, panel.columns[j], 10, "end", -90))
        elif columns <= 12 or j % 5 == 0:
            body.append(_text(x, bottom + 12, str(j), 10, "middle"))
    body.append(_text(left + columns * c / 2, bottom + under - 18 if not panel.columns else bottom + under, panel.x, 11,
                      "middle"))
    body.append(_text(16, top + rows * c / 2, panel.y, 11, "middle", -90))
    if panel.legend:
        body.append(_text(left, 38, panel.legend, 10, colour="#5c6370"))
    return "\n".join(body), max(left + columns * c + 24, 30 + 7 * len(panel.title),
                                70 + int(5.2 * len(panel.legend))), bottom + under + 8


def _ticks(low: float, high: float, log: bool) -> list[tuple[float, str]]:
    if log:
        first, last = floor(log10(low)), floor(log10(high)) + 1
        every = max(1, (last - first) // 5)
        return [(float(e), f"1e{e}") for e in range(first, last + 1, every)]
    step = 10.0 ** floor(log10(max(high - low, 1e-12)))
    step = step / 5 if (high - low) / step < 2 else step / 2 if (high - low) / step < 5 else step
    ticks = np.arange(np.ceil(low / step - 1e-9), np.floor(high / step + 1e-9) + 1) * step
    return [(float(t), f"{t + 0.0:.6g}") for t in np.where(np.abs(ticks) < step / 2, 0.0, ticks)]


def _curves(panel: Curves) -> tuple[str, int, int]:
    left, top, width, height = 64, 40, 330, 220
    xs = np.concatenate([np.asarray(line[1], float) for line in panel.lines])
    ys = np.concatenate([np.asarray(part, float) for line in panel.lines for part in line[2:]])
    ys = ys[np.isfinite(ys) & ((ys > 0) | (not panel.log_y))]
    low, high = panel.limits or (float(ys.min()), float(ys.max()))
    if not panel.log_y and panel.limits is None:
        margin = 0.06 * (high - low or 1)
        low, high = low - margin, high + margin
    y_ticks = _ticks(low, high, panel.log_y)
    if panel.log_y:
        low, high = min(y_ticks[0][0], log10(low)), max(y_ticks[-1][0], log10(high))
    x_low, x_high = float(xs.min()), float(max(xs.max(), xs.min() + 1e-9))

    def at(x: float, y: float) -> tuple[float, float]:
        y = (log10(y) if y > 0 else low) if panel.log_y else y
        part = min(1.05, max(-0.05, (y - low) / (high - low)))
        return left + (x - x_low) / (x_high - x_low) * width, top + height - part * height

    body = [_text(left, 22, panel.title, 13)]
    for tick, text in y_ticks:
        y = top + height - (tick - low) / (high - low) * height
        if top - 1 <= y <= top + height + 1:
            body.append(f'<path d="M{left} {y:.1f}H{left + width}" stroke="{FAINT}" stroke-width="0.6"/>')
            body.append(_text(left - 6, y + 4, text, 10, "end"))
    for tick, text in panel.ticks or _ticks(x_low, x_high, False):
        x = at(tick, high)[0]
        body.append(_text(x, top + height + 15, text, 10, "middle"))
    names = list(dict.fromkeys(line[0] for line in panel.lines))
    for name, x, y, *interval in panel.lines:
        i = names.index(name)
        colour, dash = COLOURS[i % len(COLOURS)], ' stroke-dasharray="5 3"' if i >= len(COLOURS) else ""
        places = [at(float(a), float(b)) for a, b in zip(x, y, strict=True) if np.isfinite(b)]
        if interval:
            around = [at(float(a), float(b)) for a, b in zip(x, interval[1], strict=True)]
            around += [at(float(a), float(b)) for a, b in zip(x[::-1], interval[0][::-1], strict=True)]
            body.append(f'<path d="M{_points(around)}Z" fill="{colour}" opacity="0.18"/>')
        body.append(f'<path d="M{_points(places)}" fill="none" stroke="{colour}" stroke-width="1.8"{dash}/>')
        if len(places) <= 40:
            body += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.2" fill="{colour}"/>' for a, b in places]
        key = f'<path d="M{left} {top + height + 50 + 15 * i}h18" stroke="{colour}" stroke-width="2.4"{dash}/>'
        if key not in body:
            body += [key, _text(left + 24, top + height + 54 + 15 * i, name, 11)]
    body.append(_text(left + width / 2, top + height + 32, panel.x, 11, "middle"))
    body.append(_text(14, top + height / 2, panel.y, 11, "middle", -90))
    return "\n".join(body), left + width + 24, top + height + 60 + 15 * len(names)


def _points(places: Sequence[tuple[float, float]]) -> str:
    return "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
