"""What a notebook shows by itself of a flow, a trace and a cache; and examples/tour.ipynb, whose outputs are what it prints.

`python tests/test_notebook.py` executes the tour and writes its outputs anew.
"""

from __future__ import annotations

import base64
import difflib
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from flows import random_flow
from models import CONFIGS, model, tokens
from test_draw import HOSTILE, inside, needs_program, overlapping
from test_readme import ROOT

import nanokv
from nanokv.cache import KVCache
from nanokv.errors import ModelNotFoundError
from nanokv.trace import Recorder, Trace, cachemap, draw, notebook
from nanokv.trace.look import Look
from nanokv.trace.scene import AGAINST, FOR

TOUR = ROOT / "examples" / "tour.ipynb"
SVG = "{http://www.w3.org/2000/svg}"


def conversation(*, texts: Any = None, level: str = "weights") -> tuple[Trace, KVCache]:
    """Two turns of others of four and three positions, then two of the model, token by token."""
    small = model(CONFIGS["llama"])
    if texts is not None:
        small.tokenizer = SimpleNamespace(piece=lambda token: texts[token % len(texts)])
    cache, ids, recorder = small.new_cache(), tokens(CONFIGS["llama"], 9), Recorder(level=level)
    small.forward(ids[:4], cache, observer=recorder)
    recorder.turn("tool")
    small.forward(ids[4:7], cache, observer=recorder)
    recorder.turn("model", sampled=True)
    for token in ids[7:]:
        small.forward([token], cache, observer=recorder)
    return recorder.trace, cache


class Elements(HTMLParser):
    """The tags and attributes of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


def picture(page: str) -> str:
    match = re.search(r'src="data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)"', page)
    assert match is not None
    return base64.b64decode(match[1]).decode()


def rows(text: str) -> list[list[str]]:
    """The cells of the rows below a table's names."""
    lines = [re.split(r"  +", line) for line in text.splitlines()]
    return lines[3:]


def test_a_trace_shows_whose_turns_it_holds_and_what_each_left_in_the_cache() -> None:
    trace, _ = conversation()
    shown = trace._repr_mimebundle_()
    assert shown["text/plain"].splitlines()[0] == repr(trace)
    taken = sum(array.nbytes for step in trace.steps for array in step.arrays.values())
    assert f"{taken / 1000:.3g} kB recorded" in shown["text/plain"].splitlines()[1]
    entry = 2 * 3 * 2 * 4 * 4  # a key and a value, layers, key/value heads, features, bytes
    turns = [["0", "user", "0", "0–3", f"{4 * entry} B"], ["1", "tool", "1", "4–6", f"{3 * entry} B"],
             ["2", "model", "2–3", "7–8", f"{2 * entry} B"]]  # fmt: skip
    assert [row[:5] for row in rows(shown["text/plain"])] == turns
    for row in turns:
        assert all(f">{cell}<" in shown["text/html"] for cell in row)


def test_a_trace_on_the_disk_shows_the_bytes_of_its_files(tmp_path: Path) -> None:
    conversation()[0].save(tmp_path / "a.nkv")
    files = sum(path.stat().st_size for path in (tmp_path / "a.nkv").glob("step-*"))
    assert f"{files / 1000:.3g} kB recorded" in Trace.load(tmp_path / "a.nkv")._repr_mimebundle_()["text/plain"]


def test_a_cache_shows_which_call_wrote_what() -> None:
    _, cache = conversation()
    shown = cache._repr_mimebundle_()
    assert shown["text/plain"].splitlines()[0] == repr(cache) and "9 of 200 positions" in repr(cache)
    ids = cache.tokens.tolist()
    spans = [("0", "0–3", ids[:4]), ("1", "4–6", ids[4:7]), ("2–3", "7–8", ids[7:])]
    expected = [[calls, positions, " ".join(map(str, some))] for calls, positions, some in spans]
    assert [[row[0], row[1], row[3]] for row in rows(shown["text/plain"])] == expected
    assert f"{9 * 192} B" not in shown["text/plain"] and "1.73 kB of keys and values" in shown["text/plain"]


def test_a_cache_knows_who_wrote_it_when_it_is_copied_saved_and_gone_on_with(tmp_path: Path) -> None:
    small = model(CONFIGS["llama"])
    cache = small.new_cache()
    for call in ([1, 2, 3], [4], [5]):
        small.forward(call, cache)
    cache.save(tmp_path / "a.cache", small)
    for other in (cache.copy(), KVCache.load(tmp_path / "a.cache", small)):
        small.forward([6, 7], other)
        assert other.wrote.tolist() == [0, 0, 0, 1, 2, 3, 3] and other.steps == 4
    assert cache.wrote.tolist() == [0, 0, 0, 1, 2]


def test_the_lengths_of_values_are_those_of_the_cache() -> None:
    _, cache = conversation()
    found = notebook.value_lengths(cache)
    assert found.shape == (3, 9)
    assert found[2, 5] == pytest.approx(np.mean([np.linalg.norm(cache.values(2)[5, g]) for g in range(2)]), rel=1e-6)


def test_what_is_empty_is_told_and_not_drawn() -> None:
    trace, cache = conversation()
    for empty in (Trace(trace.about, []), KVCache(cache.config)):
        assert empty._repr_mimebundle_() == {"text/plain": repr(empty)}


@pytest.mark.parametrize("level", ["writes", "weights", "states"])
def test_without_a_program_there_is_the_table_alone(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw, "find_program", lambda: None)
    for shown in conversation(level=level):
        page = shown._repr_mimebundle_()["text/html"]
        assert "img" not in Elements(page).tags and "<table>" in page
    assert random_flow()._repr_mimebundle_().keys() == {"text/plain"}


def test_a_picture_of_a_trace_that_begins_later_has_the_positions_of_its_tokens() -> None:
    small = model(CONFIGS["llama"])
    cache, recorder = small.new_cache(), Recorder(level="weights")
    small.forward(range(50), cache)
    small.forward(range(7), cache, observer=recorder)
    assert rows(recorder.trace._repr_mimebundle_()["text/plain"])[0][3] == "50–56"
    names = [rect.name for rect in cachemap.arrange(recorder.trace, Look()).rects]
    assert "layer0.pos50.kv" in names and "layer2.pos56.kv" in names and len(names) == 3 * 7


@needs_program
def test_no_token_can_act_in_what_a_notebook_shows() -> None:
    given = np.arange(len(HOSTILE)) % CONFIGS["llama"].vocab_size
    small = model(CONFIGS["llama"])
    small.tokenizer = SimpleNamespace(piece=lambda token: HOSTILE[token])
    small.name = '<script>alert("name")</script>]]>\0'
    recorder, cache = Recorder(level="weights"), small.new_cache()
    for token in given.tolist():  # a row of the table for each, so that each is shown
        recorder.turn("tool" if token % 2 else "user")
        small.forward([token], cache, observer=recorder)
    flow = random_flow(0, 1, 1, len(HOSTILE), texts=HOSTILE)
    for text in (*recorder.trace._repr_mimebundle_().values(), *flow._repr_mimebundle_().values()):
        text.encode()
        assert all(char.isprintable() or char in "\n\u2068\u2069" for char in text)  # those isolate what runs from the right
    for shown in (recorder.trace, cache):
        bundle = shown._repr_mimebundle_()
        page = Elements(bundle["text/html"])
        assert page.tags <= {"img", "div", "br", "table", "thead", "tbody", "tr", "th", "td"}
        assert page.attributes <= {"alt", "src", "style"}
        drawn = {element.tag for element in ElementTree.fromstring(picture(bundle["text/html"])).iter()}
        assert drawn <= {SVG + name for name in ("svg", "g", "title", "polygon", "polyline", "path", "ellipse", "text", "a")}
    assert "<script>alert" in Elements(recorder.trace._repr_mimebundle_()["text/html"]).text  # as text


def test_of_many_turns_the_first_and_the_last_are_listed() -> None:
    small = model(CONFIGS["llama"])
    recorder, cache = Recorder(level="writes"), small.new_cache()
    for i in range(50):
        recorder.turn("tool" if i % 2 else "user")
        small.forward([i, i + 1], cache, observer=recorder)
    for shown in (recorder.trace, cache):
        listed = rows(shown._repr_mimebundle_()["text/plain"])
        assert len(listed) == 21 and listed[10][0] == "…" and "30 more" in listed[10][-1]
        assert listed[9][0] == "9" and listed[11][0] == "40"


@pytest.mark.parametrize("n", [1, 9, 150])
def test_the_picture_of_a_cache_has_a_cell_for_each_position_and_layer(n: int) -> None:
    small = model(CONFIGS["llama"])
    cache = small.new_cache()
    for call in (range(4), range(3), *[[0]] * (n - 7)) if n > 7 else ([0],):
        small.forward(list(call), cache)
    scene = notebook.arrange(cache, Look())
    assert overlapping(scene) == [] and inside(scene)
    texts = [line for text in scene.texts for line in text.lines]
    assert {"layer 0", "layer 2"} <= set(texts)
    if n == 9:
        assert {"call 0", "call 1", "calls 2–3"} <= set(texts)
        colors = [rect.color for rect in scene.rects]
        assert (colors.count(FOR), colors.count(AGAINST)) == (3 * 7, 3 * 2)
    assert (len(scene.rects), " 2 positions" in " ".join(texts)) == ((3 * 75, True) if n == 150 else (3 * n, False))


def test_ipython_shows_them() -> None:
    formatters = pytest.importorskip("IPython.core.formatters")
    shown = formatters.DisplayFormatter(active_types=["text/plain", "text/html", "image/svg+xml"])
    trace, cache = conversation()
    for thing in (trace, cache):
        data, _ = shown.format(thing)
        assert data == thing._repr_mimebundle_()
    flow = random_flow()
    assert shown.format(flow)[0] == flow._repr_mimebundle_()


# The tour.


def executed(path: Path) -> Any:
    """The notebook, run in a kernel of its own in an empty folder."""
    import os
    import tempfile

    import nbclient
    import nbformat

    book = nbformat.read(path, as_version=4)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(ROOT)  # the kernel is to run what is tested
    try:
        with tempfile.TemporaryDirectory() as folder:
            client = nbclient.NotebookClient(book, timeout=300, kernel_name="python3", record_timing=False,
                                             resources={"metadata": {"path": folder}})  # fmt: skip
            return client.execute()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def said(book: Any) -> list[str]:
    """What the outputs of each cell say: their text, and the words of their pictures."""
    return ["\n".join(line for output in cell.get("outputs", ()) for line in _said(output)) for cell in book["cells"]]


def _said(output: Any) -> Iterator[str]:
    if "text" in output:
        yield _joined(output["text"])
    for kind, data in sorted(output.get("data", {}).items()):
        text = _joined(data)
        if kind == "text/html" and "<img" in text:
            yield from _words(picture(text))
            text = re.sub(r"<img.*?>", "", text)
        yield from _words(text) if kind == "image/svg+xml" else [text]


def _words(svg: str) -> list[str]:
    """The words of a picture, however its lines are broken."""
    lines = [element.text or "" for element in ElementTree.fromstring(svg).iter(SVG + "text")]
    return sorted(word for line in lines for word in line.split())


def _joined(text: Any) -> str:
    return text if isinstance(text, str) else "".join(text)


@needs_program
def test_the_tour_shows_what_stands_in_it() -> None:
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    try:
        nanokv.load("smollm2-135m")
    except ModelNotFoundError as missing:
        pytest.skip(str(missing))
    committed = json.loads(TOUR.read_text(encoding="utf-8"))
    for cell, before, now in zip(committed["cells"], said(committed), said(executed(TOUR)), strict=True):
        changes = "\n".join(difflib.unified_diff(before.splitlines(), now.splitlines(), "committed", "now", lineterm="", n=1))
        assert before == now, f"{_joined(cell['source'])}\n{changes}"


def test_the_tour_is_small_and_every_cell_of_it_was_run() -> None:
    assert TOUR.stat().st_size < 400_000
    cells = json.loads(TOUR.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    shown = [kind for cell in code for output in cell["outputs"] for kind in output.get("data", ())]
    assert "image/svg+xml" in shown and "text/html" in shown
    assert not any(output["output_type"] == "error" for cell in code for output in cell["outputs"])


if __name__ == "__main__":
    import nbformat

    made = executed(TOUR)
    for cell in made["cells"]:
        cell.metadata.pop("execution", None)
    made.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
                     "language_info": {"name": "python"}}  # fmt: skip
    nbformat.write(made, TOUR)
