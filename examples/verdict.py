"""One picture of the whole argument: every sentence, what was found of it, and what speaks for each side, with its number.

It is made of the results of the examples, and says nothing that is not in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from figures import FAINT, FONT, INK, PAPER

from nanokv.trace import labels

SOFT = "#5c6370"
COLOURS = {
    "right": "#2f6db3", "right, with a condition": "#3a8f5c", "wrong": "#c0392b", "a matter of definition": "#8a5bb0",
    "open: this is what was measured": "#b39b2f",
}  # fmt: skip
WIDTH, SIDE, MIDDLE, EDGE = 1240, 420, 340, 14  # of the picture, of a side's column, of the sentences', and the margin
SIZE, LINE = 11.5, 15.0
END = ("Both sides are measured on the same runs. They part over what \u201canew\u201d means: with no state beyond the words "
       "(so it is), or with no thought of the past in use (so it is not).")  # fmt: skip


def picture(argument: Sequence[tuple[str, str]], found: dict[str, dict[str, Any]]) -> str:
    """The argument as (sentence, numbers of the examples that try it), and what each example found, by number -> SVG."""
    body = [_text(EDGE, 34, "Does a language model start anew at each token?", 22)]
    about = f"{len(found)} programs asked models: what speaks for each side, sentence by sentence. Numbers name the programs."
    body.append(_text(EDGE, 56, about, 12, SOFT))
    left, middle, right = EDGE, EDGE + SIDE + 16, EDGE + SIDE + MIDDLE + 32
    heads = "It starts anew, or is held back", "What was said", "It builds on what it thought"
    for x, words in zip((left, middle, right), heads, strict=True):
        body.append(_text(x, 84, words, 13.5, weight="bold"))
    y = 94.0
    for sentence, numbers in argument:
        these = {number: found[number]["verdict"] for number in numbers.split()}
        body.append(f'<path d="M{EDGE} {y:g}H{WIDTH - EDGE}" stroke="{FAINT}" stroke-width="0.8"/>')
        columns = [_evidence(these, "anew", left, y), _said(sentence, these, middle, y), _evidence(these, "builds", right, y)]
        body += [part for parts, _ in columns for part in parts]
        y += max(high for _, high in columns) + 10
    body.append(f'<path d="M{EDGE} {y:g}H{WIDTH - EDGE}" stroke="{FAINT}" stroke-width="0.8"/>')
    how = "Quick runs, with few samples, on" if any(each["quick"] for each in found.values()) else "Measured on"
    foot = [END, f"{how} {next(iter(found.values()))['machine']}."]
    body += [_text(EDGE, y + 22 + i * 17, line, 12, INK if i == 0 else SOFT) for i, line in enumerate(foot)]
    height = y + 54
    size = f'viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" height="{height:g}" font-family="{FONT}"'
    paper = f'<rect width="100%" height="100%" fill="{PAPER}"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n{paper}\n' + "\n".join(body) + "\n</svg>\n"


def _evidence(verdicts: dict[str, dict[str, str]], side: str, x: float, y: float) -> tuple[list[str], float]:
    """What the examples say for a side, each beginning with its number; and how high that is."""
    parts, at = [], y + LINE
    for number, verdict in verdicts.items():
        for i, line in enumerate(labels.wrap_words(verdict[side], SIZE, SIDE - 26) if verdict[side] else []):
            if i == 0:
                parts.append(_text(x, at, number, SIZE, SOFT, weight="bold"))
            parts.append(_text(x + 24, at, line, SIZE))
            at += LINE
    return parts, at - y - LINE


def _said(sentence: str, verdicts: dict[str, dict[str, str]], x: float, y: float) -> tuple[list[str], float]:
    """The sentence, and what was found of it."""
    lines = labels.wrap_words(f"\u201c{sentence}\u201d", SIZE, MIDDLE)
    parts = [_text(x, y + LINE * (i + 1), line, SIZE) for i, line in enumerate(lines)]
    at = y + LINE * (len(lines) + 1)
    for kind in dict.fromkeys(verdict["kind"] for verdict in verdicts.values()):
        parts.append(f'<rect x="{x:g}" y="{at - 9:g}" width="10" height="10" rx="2" fill="{COLOURS[kind]}"/>')
        parts.append(_text(x + 15, at, kind, SIZE, COLOURS[kind], weight="bold"))
        at += LINE
    return parts, at - y - LINE


def _text(x: float, y: float, text: str, size: float, colour: str = INK, weight: str = "normal") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" font-weight="{weight}" fill="{colour}">{escape(text)}</text>'
