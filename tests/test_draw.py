"""The picture: the same bytes every time, text that cannot overlap or act, files that are whole or not there."""

from __future__ import annotations

import itertools
import os
import stat
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from flows import Given, random_flow, random_patterns
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanokv.errors import DrawError
from nanokv.trace import Flow, draw, labels
from nanokv.trace.grid import MANY
from nanokv.trace.layout import arrange
from nanokv.trace.look import WIDE, Look
from nanokv.trace.making import flow
from nanokv.trace.scene import FOR, Scene

GOLDEN = Path(__file__).parent / "data" / "flow.dot"
SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = [
    "", " ", "a b", "\n", '"', "\\", "\\N", "\\l", "a\\", "<", "<b>x</b>", "<script>alert(1)</script>", "]]>", "<!--",
    "&", "&lt;", "&#60;", "&amp;", "\0", "\x1b[31m", "\x85", "\u202e", "\u2066", "\u200b", "\ud800", "\udfff\ud800",
    "\ufffe", "\u0301", "e" + "\u0301" * 40, "שלום", "مرحبا", "日本語", "🙂", "\U000e0041", "·", "’", "x" * 10_000,
    "\n" * 10_000, "];} digraph {", "//", "#", "%s{0}$(x)`x`", "\u2028", "\xa0", "\u3164",
]  # fmt: skip

needs_program = pytest.mark.skipif(draw.find_program() is None, reason="no program to draw with: pip install -e '.[dot]'")


def small_flow() -> Flow:
    """The flow of the golden file: two layers, two heads, five tokens of which the last was sampled."""
    return random_flow(11, 2, 2, 5, texts=["The", " cat", ' "<&\\N', "\n", " sat"], sampled=(4,)).prune(0.8)


def texts_in(svg: str) -> list[str]:
    root = ElementTree.fromstring(svg)
    return [element.text or "" for element in root.iter(SVG + "text")]


def drawn(flow: Flow) -> str:
    svg = draw.for_notebook(flow)
    assert svg is not None
    return svg


def test_the_dot_of_a_small_flow_is_the_one_that_was_looked_at() -> None:
    """To accept a change, look at the picture, then: python tests/test_draw.py"""
    assert small_flow().dot().encode() == GOLDEN.read_bytes()


def test_the_same_trace_gives_the_same_bytes() -> None:
    assert small_flow().dot() == small_flow().dot()


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_visible_text_is_printable_and_not_empty(text: str) -> None:
    for basic in (False, True):
        shown = labels.visible(text, basic=basic)
        assert shown and shown.isprintable() and " " not in shown
        shown.encode()


@given(st.text(st.characters(exclude_categories=()), max_size=6), st.text(st.characters(exclude_categories=()), max_size=6))
@example("", "\\empty")
@example(" ", "·")
@example("\n", "\\n")
def test_different_texts_look_different(a: str, b: str) -> None:
    for basic in (False, True):
        assert (labels.visible(a, basic=basic) == labels.visible(b, basic=basic)) == (a == b)


def test_text_for_a_png_of_graphviz_pure_holds_only_what_its_font_has() -> None:
    assert labels.visible("naïve 日🙂", basic=True) == "naïve·\\u65e5\\U0001f642"
    assert labels.visible("naïve 日🙂") == "naïve·日🙂"


def test_long_labels_are_wrapped_and_then_cut() -> None:
    lines = labels.wrap(labels.units("x" * 100), 10, 60, 2)
    assert len(lines) == 2 and lines[-1].endswith("…")
    assert all(labels.width(line, 10) <= 60 for line in lines)
    assert labels.wrap(labels.units("short"), 10, 60, 2) == ("short",)


def test_a_word_of_two_lines_is_broken_near_its_middle() -> None:
    assert labels.balanced(labels.units("neighbourhoods"), 10, 75, 2) == ("neighbo", "urhoods")
    assert labels.balanced(labels.units("short"), 10, 75, 2) == ("short",)
    assert labels.balanced(labels.units("x" * 100), 10, 60, 2) == labels.wrap(labels.units("x" * 100), 10, 60, 2)


def test_a_sentence_is_broken_at_spaces_and_within_words_that_are_longer_than_a_line() -> None:
    assert labels.wrap_words("to be or not", 10, 40) == ("to be or", "not")
    lines = labels.wrap_words("a " + "x" * 50 + " b", 10, 60)
    assert "".join(lines).replace(" ", "") == "a" + "x" * 50 + "b"
    assert all(labels.width(line, 10) <= 60 for line in lines)


def test_a_title_keeps_its_words_and_shows_what_would_be_unseen() -> None:
    assert labels.sentence("What\nis\tit?") == "What is it?"
    assert labels.sentence("a\0b\u202ec\ud800") == "a\\x00b\\u202ec\\ud800"


@needs_program
def test_what_appears_under_the_pointer_shows_backslashes_as_the_picture_does() -> None:
    texts = ["\\", "\\N", "\n", "a\\l", "\\\\"]
    root = ElementTree.fromstring(drawn(random_flow(0, 1, 1, len(texts), texts=texts).prune(1.0)))
    tips = "\n".join(element.get("{http://www.w3.org/1999/xlink}title", "") for element in root.iter())
    for pos, text in enumerate(texts):
        assert f"{labels.phrase(text)} {pos}" in tips


@needs_program
@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=()), max_size=8), min_size=1, max_size=12))
@example(HOSTILE)
def test_no_token_can_break_the_picture_and_each_is_shown(texts: list[str]) -> None:
    svg = drawn(random_flow(0, 1, 1, len(texts), texts=texts).prune(1.0))
    allowed = {SVG + name for name in ("svg", "g", "title", "polygon", "polyline", "path", "ellipse", "text", "a")}
    elements = list(ElementTree.fromstring(svg).iter())
    assert {element.tag for element in elements} <= allowed
    assert not any("href" in name for element in elements for name in element.attrib)
    shown = texts_in(svg)
    for text in texts:
        first_line = labels.wrap(labels.units(text[:200]), 13, 100, 2)[0]
        assert any(line and (first_line.startswith(line.rstrip("…")) or line.startswith(first_line)) for line in shown)


@needs_program
def test_no_token_can_make_an_attribute_a_statement_or_a_state() -> None:
    texts = ['", id="x', '"] evil [label="', "\\", '\\"', "}\n evil -> evil2"]
    svg = drawn(random_flow(0, 1, 1, len(texts), texts=texts).prune(1.0))
    titles = {element.text for element in ElementTree.fromstring(svg).iter(SVG + "title")}
    assert not any((title or "").startswith("evil") for title in titles)
    ids = {element.get("id") for element in ElementTree.fromstring(svg).iter()}
    assert "x" not in ids


def overlapping(scene: Scene) -> list[tuple[str, str]]:
    boxes = [(text.box, " ".join(text.lines)) for text in scene.texts]
    return [
        (a, b)
        for ((l1, b1, r1, t1), a), ((l2, b2, r2, t2), b) in itertools.combinations(boxes, 2)
        if l1 < r2 - 0.1 and l2 < r1 - 0.1 and b1 < t2 - 0.1 and b2 < t1 - 0.1
    ]


def inside(scene: Scene) -> bool:
    """Whether all text is on the paper."""
    left, bottom, right, top = scene.paper
    boxes = [text.box for text in scene.texts]
    return all(left <= box[0] and bottom <= box[1] and box[2] <= right and box[3] <= top for box in boxes)


@pytest.mark.parametrize("n", [1, 2, 5, 14, 40, 120])
@pytest.mark.parametrize("n_layers", [2, 12, 30])
def test_no_text_overlaps_another_or_leaves_the_picture(n: int, n_layers: int) -> None:
    words = [" the", " antidisestablishmentarianism", "\u202e\u202e\u202e\u202e", ".", " a", "日本語日本語", "\n\n\n"]
    texts = [words[pos % len(words)] for pos in range(n)]
    made = random_flow(n + n_layers, n_layers, 2, n, texts=texts, sampled=tuple(range(max(n - 3, 1), n)))
    for top_k in (0, 5, 60):
        scene = arrange(made.prune(1.0, top_k=top_k))
        assert overlapping(scene) == []
        assert inside(scene)


def test_long_predictions_and_titles_have_room() -> None:
    trace = Given(random_patterns(0, 2, 1, 2), ["a", "W" * 60], level="states", logits=np.eye(50)[1])
    made = flow(trace, measure="attention")
    for title in (None, "A long title that says what this picture is about, at some length"):
        scene = arrange(made, Look(title=title))
        assert overlapping(scene) == []
        assert inside(scene)


def test_layers_and_tokens_where_nothing_happens_are_folded_and_the_picture_says_so() -> None:
    kept = random_flow(0, 30, 2, 120).prune(1.0, top_k=4)
    scene = arrange(kept)
    lines = [line for text in scene.texts for line in text.lines]
    used = {*kept.edges["src"][kept.crossing], *kept.edges["dst"][kept.crossing]}
    assert f"{min(used)}" in lines and f"{kept.at}" in lines
    assert any(line.startswith("… ") and "–" in line for line in lines)  # layers
    assert "…" in lines and any("–" in line and line[0].isdigit() for line in lines)  # tokens
    assert "layers and tokens folded" in " ".join(lines)
    left, bottom, right, top = scene.paper
    assert right - left < 1200 and top - bottom < 900


def test_short_texts_are_not_folded() -> None:
    lines = [line for text in arrange(random_flow(0, 2, 2, 8).prune(1.0, top_k=1)).texts for line in text.lines]
    assert all(f"·t{pos}" in lines for pos in range(8)) and "…" not in lines


def test_heads_that_join_the_same_states_are_drawn_beside_each_other() -> None:
    scene = arrange(random_flow(0, 1, 3, 2))
    paths = [stroke.points for stroke in scene.strokes if stroke.head and stroke.ends]
    assert len(paths) == 3 and len(set(paths)) == 3


def test_a_heavier_edge_is_wider_and_darker_and_drawn_later() -> None:
    made = random_flow(0, 2, 2, 6)
    curves = [stroke for stroke in arrange(made).strokes if stroke.head and stroke.ends]
    pens, alphas = [curve.pen for curve in curves], [curve.alpha for curve in curves]
    assert pens == sorted(pens) and alphas == sorted(alphas) and pens[0] < pens[-1]
    assert {curve.color for curve in curves} == {FOR}


def test_the_picture_names_measure_prediction_share_and_what_was_dropped() -> None:
    kept = random_flow(0, 3, 2, 6).prune(0.5)
    words = " ".join(line for text in arrange(kept).texts for line in text.lines)
    facts = ["Measure attention", f"{int(kept.crossing.sum())} of {kept.made.attention} attention edges", f"{kept.share:.0%}"]
    facts += ["What led to", "p = ", f"Not drawn: {kept.dropped.crossing} attention edges", "each head: attention weight"]
    for fact in facts:
        assert fact in words


def test_a_sink_is_shown_with_what_it_draws() -> None:
    patterns = 0.3 * random_patterns(0, 2, 2, 8)
    patterns[..., 0] += 0.7
    made = flow(Given(patterns), measure="attention")
    lines = [line for text in arrange(made.prune(0.9)).texts for line in text.lines]
    assert "sink" in lines and f"{made.sinks[0].share:.0%}" in lines
    assert "Set apart: “·t0” 0, a sink" in " ".join(lines)


def test_very_many_edges_are_drawn_without_heads_and_labels() -> None:
    made = random_flow(0, 4, 4, 24)
    assert made.crossing.sum() > MANY
    scene = arrange(made)
    assert not any(stroke.head for stroke in scene.strokes if stroke.ends)
    drawn = [path for stroke in scene.strokes if stroke.color == FOR for path in (stroke.points, *stroke.more)]
    assert made.crossing.sum() <= len(drawn) < made.crossing.sum() + 200  # bars, and a key in the legend
    assert len(scene.strokes) < made.crossing.sum() / 4
    strongest = max(stroke.pen for stroke in scene.strokes if stroke.more and stroke.color == FOR)
    assert strongest > 0.95 * WIDE.pen  # edges that are drawn together are nearly alike


@needs_program
def test_states_carry_their_ids_and_edges_their_numbers() -> None:
    svg = drawn(small_flow())
    ids = {element.get("id") for element in ElementTree.fromstring(svg).iter()}
    assert {"layer2.pos4", "layer0.pos4"} <= ids
    edge = small_flow().edges[small_flow().crossing][0]
    assert f"layer {edge['layer']} head {edge['head']}: " in svg and f"attention {edge['weight']:.4g}" in svg


@needs_program
@pytest.mark.parametrize(
    ("suffix", "begins"), [(".svg", b"<?xml"), (".png", b"\x89PNG\r\n"), (".dot", b"digraph"), (".SVG", b"<?xml")]
)
def test_the_suffix_says_the_format(tmp_path: Path, suffix: str, begins: bytes) -> None:
    path = tmp_path / f"flow{suffix}"
    assert small_flow().render(path) == path
    assert path.read_bytes().startswith(begins)
    assert small_flow().render(str(path)) == path
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("name", ["flow", "flow.jpg", "flow.svg.gz", ".svg", "svg"])
def test_another_suffix_is_refused_before_anything_is_drawn(tmp_path: Path, name: str) -> None:
    with pytest.raises(DrawError, match=r"names no format: it must end in \.svg, \.png, \.pdf or \.dot"):
        small_flow().render(tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DrawError, match=r"no folder .*nowhere"):
        small_flow().render(tmp_path / "nowhere" / "flow.dot")


def test_without_a_program_the_error_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw, "find_program", lambda: None)
    with pytest.raises(DrawError, match=r"pip install 'nanokv\[dot\]'.*apt install graphviz"):
        small_flow().render(tmp_path / "flow.svg")
    assert small_flow().render(tmp_path / "flow.dot").read_bytes() == GOLDEN.read_bytes()


def test_a_pdf_without_the_extra_is_refused_with_a_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw, "find_spec", lambda name: None)
    monkeypatch.setattr(draw, "find_program", lambda: draw.Program("graphviz-pure", True))
    with pytest.raises(DrawError, match=r"pip install 'nanokv\[pdf\]'; or draw a \.svg"):
        small_flow().render(tmp_path / "flow.pdf")


def script(path: Path, body: str) -> str:
    path.write_text(f"#!{sys.executable}\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.skipif(os.name != "posix", reason="the stand-in program is a script")
@pytest.mark.parametrize("body", ["import sys; sys.exit('syntax error near line 7')", "", "import os; os.abort()"])
def test_a_program_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    program = script(tmp_path / "dot", body)
    monkeypatch.setattr(draw, "find_program", lambda: draw.Program(program, False))
    path = tmp_path / "flow.svg"
    path.write_text("the old one")
    with pytest.raises(DrawError, match="could not draw a svg"):
        small_flow().render(path)
    assert path.read_text() == "the old one" and sorted(os.listdir(tmp_path)) == ["dot", "flow.svg"]


@pytest.mark.skipif(os.name != "posix", reason="the stand-in programs are scripts")
def test_the_systems_dot_is_used_before_the_one_beside_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system, beside = tmp_path / "system", tmp_path / "venv"
    system.mkdir()
    beside.mkdir()
    pure = script(beside / "graphviz-pure", "")
    monkeypatch.setattr(sys, "executable", str(beside / "python"))
    monkeypatch.setenv("PATH", str(system))  # the venv is not activated
    assert draw.find_program() == draw.Program(pure, True)
    dot = script(system / "dot", "")
    assert draw.find_program() == draw.Program(dot, False)


if __name__ == "__main__":
    GOLDEN.write_bytes(small_flow().dot().encode())
