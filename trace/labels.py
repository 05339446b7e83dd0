"""Token text made fit for a picture: visible, of known width, unable to act as markup.

A model's tokens are arbitrary bytes: newlines, quotes, half characters, marks that turn the writing direction.
`visible` shows each as what it is, in the way Python writes a string (`\\n`, `\\u202e`, `\\\\`), with `·` for a space.
`quote` puts any such text into a DOT file. `width` estimates how wide it will be, so that labels can be kept apart.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

# Widths of the characters ' ' to '~' in hundredths of the font size: of each the wider one in Helvetica and DejaVu
# Sans, the two fonts that a viewer of these pictures most likely has.
_ASCII_WIDTHS = (
    32, 40, 46, 84, 64, 95, 78, 28, 39, 39, 50, 84, 32, 36, 32, 34, 64, 64, 64, 64, 64, 64, 64, 64,
    64, 64, 34, 34, 84, 84, 84, 56, 102, 68, 69, 72, 77, 67, 61, 78, 75, 29, 50, 67, 56, 86, 75, 79,
    67, 79, 72, 67, 61, 73, 68, 99, 69, 67, 69, 39, 34, 39, 84, 56, 50, 61, 63, 55, 63, 62, 35, 63,
    63, 28, 28, 58, 28, 97, 63, 61, 63, 63, 41, 52, 39, 63, 59, 82, 59, 59, 52, 64, 34, 64, 84,
)  # fmt: skip
_OTHER_WIDTHS = {"·": 32, "…": 100, "–": 64, "—": 100, "“": 52, "”": 52, "→": 100, "−": 84, "‖": 50}

# What the font inside graphviz-pure can show in a PNG; elsewhere it draws empty boxes. (Its SVG uses the viewer's fonts.)
_BASIC_RANGES = ((0x20, 0x2FF), (0x370, 0x52F), (0x5D0, 0x5EA), (0x1E00, 0x1FFF), (0x2010, 0x2027), (0x2030, 0x205E),
                 (0x20A0, 0x20BD), (0x2100, 0x214F), (0x2190, 0x2195), (0x2211, 0x2212), (0x2260, 0x2261),
                 (0x2264, 0x2265), (0xFB01, 0xFB04))  # fmt: skip

# Characters that count as printable and yet leave no mark: fillers, blanks, selectors of a glyph's variant.
_BLANKS = frozenset(
    [0x34F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0, *range(0x180B, 0x1810), *range(0xFE00, 0xFE10)]
).union(range(0xE0100, 0xE01F0))
_NAMED = {" ": "·", "\n": "\\n", "\t": "\\t", "\r": "\\r", "\\": "\\\\"} | {"·": "\\xb7"}  # the dot means a space
_MOST_MARKS = 3  # combining marks on one letter, after which they are written out: they would climb into other text


def several(n: int, one: str, many: str | None = None) -> str:
    """So many of a thing, in words: 1 edge, 2 edges."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def visible(text: str, *, basic: bool = False) -> str:
    """The text with everything shown that would be unseen or act on its surroundings. Two texts never look the same.

    `basic` also writes out what graphviz-pure's own font has no glyph for.
    """
    return "".join(units(text, basic=basic))


def units(text: str, *, basic: bool = False) -> list[str]:
    """`visible(text)` in the pieces, one a character, between which a label may be broken."""
    return list(_units(text, basic)) or ["\\empty"]


def _units(text: str, basic: bool) -> Iterator[str]:
    marks = _MOST_MARKS  # a mark at the very start has no letter to sit on, so it is written out as well
    for char in text:
        is_mark = unicodedata.category(char).startswith("M")
        marks = marks + 1 if is_mark else 0
        if char in _NAMED:
            yield _NAMED[char]
        elif char.isprintable() and ord(char) not in _BLANKS and marks <= _MOST_MARKS and not (basic and not _is_basic(char)):
            yield char
        else:
            yield _escape(ord(char))


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _is_basic(char: str) -> bool:
    return any(first <= ord(char) <= last for first, last in _BASIC_RANGES)


@lru_cache(4096)
def phrase(text: str, *, basic: bool = False, limit: int = 40) -> str:
    """A token inside a sentence: visible, at most `limit` pieces long, in quotation marks.

    """
    pieces = units(text, basic=basic)
    return f"“{isolated(''.join(pieces if len(pieces) <= limit else [*pieces[: limit - 9], '…', *pieces[-8:]]))}”"


def sentence(text: str) -> str:
    """A title or a caption: line breaks and tabs are spaces, and what else is unseen is written out."""
    return "".join(char if char.isprintable() else " " if char in "\n\t\r" else _escape(ord(char)) for char in text)


def isolated(shown: str) -> str:
    """Visible text that may stand among other words: what is written from right to left would pull those after it to its
    other side, so it is put between U+2068 and U+2069."""
    return f"\u2068{shown}\u2069" if any(unicodedata.bidirectional(char) in ("R", "AL", "AN") for char in shown) else shown


def width(text: str, size: float) -> float:
    """The most points that the text is likely to take in one line, at this font size."""
    return size / 100 * sum(map(_char_width, text))


def _char_width(char: str) -> int:
    if " " <= char <= "~":
        return _ASCII_WIDTHS[ord(char) - 32]
    if char in _OTHER_WIDTHS:
        return _OTHER_WIDTHS[char]
    if unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 110 if unicodedata.east_asian_width(char) in "WF" else 90


def wrap(pieces: Iterable[str], size: float, room: float, most_lines: int) -> tuple[str, ...]:
    """The pieces in at most `most_lines` lines of at most `room` points; if that is too little, the last ends in …."""
    lines = [""]
    for piece in pieces:
        if lines[-1] and width(lines[-1] + piece, size) > room:
            if len(lines) == most_lines:
                lines[-1] = _end_in_dots(lines[-1], size, room)
                break
            lines.append("")
        lines[-1] += piece
    return tuple(lines)


def balanced(pieces: Sequence[str], size: float, room: float, most_lines: int) -> tuple[str, ...]:
    """`wrap`, with lines about as long as each other where there are several and all has room."""
    lines = wrap(pieces, size, room, most_lines)
    whole = sum(width(piece, size) for piece in pieces)
    if len(lines) == 1 or sum(map(len, lines)) < sum(map(len, pieces)):
        return lines
    narrow = whole / len(lines)
    while narrow < room and len(wrap(pieces, size, narrow, most_lines + 1)) > len(lines):
        narrow += 0.25 * size
    return wrap(pieces, size, min(narrow, room), most_lines)


def _end_in_dots(line: str, size: float, room: float) -> str:
    while line and width(line + "…", size) > room:
        line = line[:-1]
    return line + "…"


def wrap_words(text: str, size: float, room: float) -> tuple[str, ...]:
    """A sentence in as many lines as it needs; a word is broken only if it is longer than a line."""
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and width(f"{lines[-1]} {word}", size) > room:
            lines.append("")
        first, *rest = wrap(word, size, room, len(word) + 1)
        lines[-1] = f"{lines[-1]} {first}" if lines[-1] else first
        lines += rest
    return tuple(lines)


def quote(*lines: str, left: bool = False, tip: bool = False) -> str:
    """A DOT string of these lines, centred or all at the left. Their characters all stand for themselves; `<` starts
    nothing within quotes. In a tooltip (`tip`) graphviz looks for escapes twice."""
    backslash = "\\\\" * (2 if tip else 1)
    escaped = [line.replace("&", "&amp;").replace("\\", backslash).replace('"', '\\"') for line in lines]
    return '"' + ("".join(f"{line}\\l" for line in escaped) if left else "\\n".join(escaped)) + '"'
