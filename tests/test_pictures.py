"""Every kind of picture: no token breaks it or hides in it, at a column's width its type can be read, and it is a PDF, too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from flows import Given, random_flow, random_patterns
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_draw import HOSTILE, inside, overlapping

from nanokv.errors import DrawError
from nanokv.trace import Flow, cachemap, draw, labels
from nanokv.trace.flow import EDGE, Kind
from nanokv.trace.look import POINTS, Look
from nanokv.trace.scene import AGAINST, FOR, Scene, state_id
from nanokv.trace.verify import CUT, Proof, Together

pytestmark = pytest.mark.skipif(draw.find_program() is None, reason="no program to draw with: pip install -e '.[dot]'")
SVG = "{http://www.w3.org/2000/svg}"
DRAWN = {SVG + name for name in ("svg", "g", "title", "polygon", "polyline", "path", "ellipse", "text", "a")}
TITLE = "{http://www.w3.org/1999/xlink}title"


def flow_of(texts: Sequence[str], n_layers: int = 2, top_k: int = 60) -> Flow:
    """A flow through these tokens, the last two sampled, that predicts the last one and not the first."""
    n = len(texts)
    made = random_flow(3, n_layers, 2, n, texts=texts, sampled=range(max(n - 2, 1), n)).prune(1.0, top_k=top_k)
    prediction = replace(made.prediction, text=texts[-1], against=texts[0], value=1.5)
    return replace(made, prediction=prediction)


def proven(made: Flow) -> Flow:
    """The same with a proof that the strongest edge alone turns the answer into the first token, and words at all states."""
    before, after = Together(0, 1.5, made.tokens.text[-1]), Together(1, -0.5, made.tokens.text[0])
    proof = Proof("knockout", "target", "a logit", 99, before, (after,), True, after, replace(before, n=1),
                  np.zeros(4, CUT), 0.5, True)  # fmt: skip
    words = {state_id(row, pos): (text, 0.5) for row in range(made.n_layers + 1) for pos, text in enumerate(made.tokens.text)}
    return replace(made, proof=proof, words=words)


def other(made: Flow) -> Flow:
    """The same run with every token another one."""
    half = replace(made, edges=made.edges.copy(), tokens=replace(made.tokens, text=made.tokens.text[::-1]))
    half.edges["weight"] *= np.where(np.arange(len(half.edges)) % 2, 0.5, 2)
    return half


def cached(texts: Sequence[str], n_layers: int = 2) -> Any:
    """What the picture of a cache asks of a trace."""
    trace: Any = Given(random_patterns(1, n_layers, 2, len(texts)), texts, sampled=[len(texts) - 1])
    trace.length, trace.about = len(texts), SimpleNamespace(dtype="float32")
    trace.tokens |= {"pos": np.arange(len(texts)), "step": np.zeros(len(texts), np.int32)}
    return trace


def scene(kind: str, texts: Sequence[str], n_layers: int = 2, **options: Any) -> Callable[[Look], Scene]:
    """What arranges a picture of that kind."""
    if kind == "cache":
        return lambda seen: cachemap.arrange(cached(texts, n_layers), seen)
    made = flow_of(texts, n_layers)
    if kind == "proof":
        made = proven(made)
    if kind == "difference":
        made = made.minus(other(made))
    return lambda seen: draw.scene_of(made, seen)


KINDS = {"graph": "graph", "proof": "graph", "difference": "graph", "heat": "heat", "pyramid": "pyramid", "cache": "graph"}


def svg_of(kind: str, texts: Sequence[str], n_layers: int = 2, **options: Any) -> str:
    chosen = Look(kind=KINDS[kind], **options)  # type: ignore[arg-type]
    return draw.drawn(scene(kind, texts, n_layers), "svg", chosen).decode()


def said(svg: str) -> str:
    """All that the picture says, in words and in what appears under the pointer."""
    elements = list(ElementTree.fromstring(svg).iter())
    texts = [element.text or "" for element in elements if element.tag == SVG + "text"]
    return " ".join(" ".join(texts + [element.get(TITLE, "") for element in elements]).split())


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=6, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=()), max_size=8), min_size=2, max_size=12))
@example(HOSTILE)
@example(["</title><script>alert(1)</script>", '"/><a href="javascript:alert(1)">', "]]>", "\0", "x" * 10_000, "\u202e" * 9999])
def test_no_token_can_break_a_picture_of_any_kind_and_each_is_shown(kind: str, texts: list[str]) -> None:
    svg = svg_of(kind, texts, title=texts[0] if kind == "heat" else None, caption=texts[-1])
    elements = list(ElementTree.fromstring(svg).iter())
    assert {element.tag for element in elements} <= DRAWN
    assert not any(name.endswith(("href", "onload", "onclick")) for element in elements for name in element.attrib)
    shown = texts
    if kind == "pyramid":  # shows the prediction, without the space that begins it
        shown = [texts[-1][1:] if texts[-1].startswith(" ") and texts[-1].strip() else texts[-1]]
    if kind == "difference":
        shown = [a if a == b else f"{a}|{b}" for a, b in zip(texts, reversed(texts), strict=True)]
    words = said(svg)
    for text in shown:
        assert "".join(labels.units(text)[:3]) in words


@pytest.mark.parametrize("kind", KINDS)
def test_long_tokens_have_room_in_every_kind_of_picture_at_every_width(kind: str) -> None:
    texts = ["x" * 10_000, "\U000e0041" * 60, " a", "日本語" * 9, "\u0301" * 50, "W" * 30, "\n" * 9]
    for width in (None, 40, 84, 180):
        made = scene(kind, texts)(Look(kind=KINDS[kind], width=width))  # type: ignore[arg-type]
        assert inside(made) and overlapping(made) == []


CASES = {
    "a small one": ([" the", " cat", " sat", " on", " the", " mat"], 2),
    "30 layers and 60 tokens": ([f" token{pos}" for pos in range(60)], 30),
    "long tokens": ([" antidisestablishmentarianism", "\U000e0041" * 9, "日本語日本語日本語", "\n" * 40] * 4, 6),
    "300 tokens": ([" a", " of", ","] * 100, 3),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_on_84_millimetres_no_text_is_smaller_than_6_points(kind: str, case: str) -> None:
    svg = svg_of(kind, *CASES[case], width=84, caption="A caption of some length, " + "and then more of it, " * 20)
    root = ElementTree.fromstring(svg)
    _, _, across, _ = map(float, root.attrib["viewBox"].split())
    rendered = 84 * POINTS / across  # points on paper for a unit of the picture
    assert float(root.attrib["width"].removesuffix("pt")) <= 84 * POINTS
    assert rendered * min(float(text.attrib["font-size"]) for text in root.iter(SVG + "text")) >= 6


def test_what_the_width_has_no_room_for_is_folded_or_left_out_and_the_picture_says_so() -> None:
    texts, n_layers = CASES["30 layers and 60 tokens"]
    words = said(svg_of("graph", texts, n_layers, width=84))
    assert "more do not fit this width" in words and "tokens folded" in words
    assert "A cell holds up to" in said(svg_of("heat", texts, n_layers, width=84))
    assert "A cell holds 5 positions" in said(svg_of("cache", *CASES["300 tokens"], width=84))


def test_the_legend_of_a_difference_speaks_of_two_runs() -> None:
    words = said(svg_of("difference", ["a", "b", "c", "d"]))
    for fact in ("Which edges differ between the two runs?", "in this run less in the other", "more than in the other run"):
        assert fact in words
    assert "for the answer" not in words


def test_the_legend_names_no_stroke_that_is_not_there() -> None:
    made = flow_of(["a", "b", "c", "d"])
    assert "against it" not in said(draw.drawn(lambda seen: draw.scene_of(made, seen), "svg", Look()).decode())


def test_words_from_right_to_left_stay_within_their_quotation_marks_and_before_their_number() -> None:
    assert labels.phrase("שלום") == "“\u2068שלום\u2069”"
    assert "\u2068שלום\u2069 1" in said(svg_of("heat", ["a", "שלום", "b"]))


def test_a_pdf_is_one_page_of_the_width_asked_for_and_its_text_is_text(tmp_path: Path) -> None:
    pytest.importorskip("typst", reason="needs pip install -e '.[test-pdf]'")
    pypdf = pytest.importorskip("pypdf", reason="needs pip install -e '.[test-pdf]'")
    made = flow_of([" the", " cat", " sat", "<script>"])
    path = made.render(tmp_path / "flow.pdf", width=84, caption="A caption to be found.")
    (page,) = pypdf.PdfReader(path).pages
    assert 84 * POINTS - 2 < float(page.mediabox.width) <= 84 * POINTS
    text = " ".join(page.extract_text().split())
    for words in ("A caption to be found.", "·cat", "<script>", "Measure attention"):
        assert words in text


def test_a_pdf_without_the_extra_leaves_no_file_and_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draw, "find_spec", lambda name: None)
    with pytest.raises(DrawError, match=r"pip install 'nanokv\[pdf\]'; or draw a \.svg"):
        flow_of(["a", "b"]).render(tmp_path / "flow.pdf")
    assert not list(tmp_path.iterdir())


def test_the_same_picture_is_the_same_svg() -> None:
    for kind in KINDS:
        assert svg_of(kind, ["a", "b", "c"]) == svg_of(kind, ["a", "b", "c"])


def with_mlps(made: Flow) -> Flow:
    """The same with an MLP edge in every layer at the last position, whose bars stand furthest to the right."""
    more = np.zeros(made.n_layers, EDGE)
    more["kind"], more["head"], more["layer"], more["weight"] = Kind.MLP, -1, np.arange(made.n_layers), 1
    more["dst"] = more["src"] = made.at
    influence, link = (np.concatenate([x, np.zeros(len(more))]) for x in (made.influence, made.link))
    return replace(made, edges=np.concatenate([made.edges, more]), influence=influence, link=link)


@pytest.mark.parametrize("width", [None, 40, 84, 180])
def test_nothing_that_is_drawn_leaves_the_paper(width: float | None) -> None:
    texts = [*CASES["30 layers and 60 tokens"][0], ":"]
    scenes = [scene(kind, texts, 6)(Look(kind=KINDS[kind], width=width)) for kind in KINDS]  # type: ignore[arg-type]
    for made in (*scenes, draw.scene_of(with_mlps(flow_of(texts, 6)), Look(width=width))):
        left, _, right, _ = made.paper
        ends = [(x - stroke.pen / 2, x + stroke.pen / 2) for stroke in made.strokes for x, _ in stroke.points]
        ends += [(rect.box[0], rect.box[2]) for rect in made.rects]
        ends += [(dot.at[0] - dot.size / 2, dot.at[0] + dot.size / 2) for dot in made.dots]
        assert left <= min(x for x, _ in ends) and max(x for _, x in ends) <= right


def test_in_a_heat_map_what_speaks_against_is_told_from_what_speaks_for_in_grey_too() -> None:
    made = flow_of(["a", "b", "c", "d", "e"])
    cells = draw.scene_of(made.minus(other(made)), Look(kind="heat")).rects
    wide = {color: {rect.box[2] - rect.box[0] for rect in cells if rect.color == color} for color in (FOR, AGAINST)}
    assert wide[FOR] and wide[AGAINST] and max(wide[AGAINST]) < 0.8 * min(wide[FOR])


def test_a_font_that_is_no_name_is_refused() -> None:
    with pytest.raises(DrawError, match=r"font is 'a\\x00b'"):
        Look(font="a\0b")
