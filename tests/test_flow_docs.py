"""docs/flow.md shows real output, tables made from the code, and pictures. `python tests/test_flow_docs.py` makes all anew."""

from __future__ import annotations

import ast
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from test_draw import needs_program
from test_readme import ROOT, prepared, run
from test_trace_docs import printed, table, with_tables

import nanokv
from nanokv.errors import ModelNotFoundError
from nanokv.trace.edges import EDGE, Kind
from nanokv.trace.measures import MEASURES

DOCS = ROOT / "docs" / "flow.md"
SVG = "{http://www.w3.org/2000/svg}"
# A snippet of Python is followed by what it prints, if it prints anything.
BLOCK = re.compile(r"^```(console|python)\n(.*?)^```\n(?:\n```text\n.*?^```\n)?", re.DOTALL | re.MULTILINE)
PICTURE = re.compile(r"^!\[.*?\]\((.*?\.svg)\)$", re.MULTILINE)


def remarks(name: str) -> dict[str, str]:
    """What trace/edges.py says of each name in the definition of that name: the comment on its line."""
    source = (ROOT / "trace" / "edges.py").read_text()
    tree = ast.parse(source)
    (node,) = (n for n in tree.body if getattr(n, "name", None) == name or _assigned(n) == name)
    lines = source.splitlines()[node.lineno - 1 : node.end_lineno]
    found = (re.match(r'\s*\(?"?(\w+)"?(?: =|,).*?# (.*)$', line) for line in lines)
    return {match[1]: match[2] for match in found if match}


def _assigned(node: ast.stmt) -> str | None:
    return node.targets[0].id if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) else None


def tables() -> dict[str, str]:
    """What stands behind each mark."""
    kinds, columns = remarks("Kind"), remarks("EDGE")
    assert [*kinds] == [kind.name for kind in Kind] and [*columns] == [*(EDGE.names or ())]
    types = {name: str(EDGE[name]) for name in columns}
    measures = [
        (f"`{name}`" + (", the default" if name == "target" else ""), measure.unit, "for and against" if measure.aimed else "",
         f"`{measure.needs}`", "yes" if measure.model else "no")
        for name, measure in MEASURES.items()
    ]  # fmt: skip
    return {
        "kinds": table("kind | what it is", [(f"`{name.lower()}`", said) for name, said in kinds.items()]),
        "columns": table("column | type | what it is", [(f"`{name}`", types[name], said) for name, said in columns.items()]),
        "measures": table("measure | an edge's weight | signed | needs a trace of level | needs the model", measures),
    }


def remade(text: str, folder: Path) -> Iterator[tuple[re.Match[str], bool, Any]]:
    """Each block, whether it needs SmolLM2, and a function that gives it as it should stand there. They must be called in
    order, for the snippets share what they name, and all that they and the commands write is in one folder."""
    names: dict[str, Any] = {}
    for match in BLOCK.finditer(text):
        kind, code = match[1], match[2]
        if kind == "console":
            yield match, "smollm2" in code, lambda code=code: f"```console\n{run(code, folder)}```\n"
        else:  # the hand-made model is called `toy` there
            yield match, "toy" not in code, lambda code=code: _python(code, printed(code, folder, names))


def _python(code: str, output: str) -> str:
    return f"```python\n{code}```\n" + (f"\n```text\n{output}```\n" if output else "")


def words(path: Path) -> list[str]:
    """The words of a picture, however its lines are broken."""
    lines = [element.text or "" for element in ElementTree.parse(path).getroot().iter(SVG + "text")]
    return sorted(word for line in lines for word in line.split())


def test_the_tables_are_those_of_the_code() -> None:
    text = DOCS.read_text()
    for name, made in tables().items():
        assert f"<!-- {name} -->\n{made}\n" in text, name


@needs_program
def test_what_the_chapter_shows_of_the_hand_made_model_is_so(tmp_path: Path) -> None:
    blocks = [(match, make) for match, big, make in remade(DOCS.read_text(), prepared(tmp_path)) if not big]
    assert len(blocks) >= 2
    for match, make in blocks:
        assert make() == match[0]


@needs_program
def test_all_that_the_chapter_shows_is_so_and_so_are_its_pictures(tmp_path: Path) -> None:
    try:
        nanokv.load("smollm2-135m")
    except ModelNotFoundError as missing:
        pytest.skip(str(missing))
    text, folder = DOCS.read_text(), prepared(tmp_path)
    for match, _, make in remade(text, folder):
        assert make() == match[0]
    pictures = PICTURE.findall(text)
    assert len(pictures) > 4
    for picture in pictures:
        assert words(folder / picture) == words(DOCS.parent / picture), picture


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as scratch:
        where, page = prepared(Path(scratch)), with_tables(DOCS.read_text(), tables())
        pieces, end = [], 0
        for block, _, made in remade(page, where):
            pieces += [page[end : block.start()], made()]
            end = block.end()
        DOCS.write_text("".join([*pieces, page[end:]]))
        for drawn in PICTURE.findall(page):
            shutil.copyfile(where / drawn, DOCS.parent / drawn)
