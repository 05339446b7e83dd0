"""The README shows real output of real commands. `python tests/test_readme.py` writes it anew."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
CONSOLE = re.compile(r"^```console\n(.*?)^```$", re.DOTALL | re.MULTILINE)
ORDER = {
    "nanokv": """config cache ops transformer
        edits feedback generate handmade weights errors
        load families gguf_file safetensors_file tokenizer chat
        panels microkernel kernels threads cli options""",
    "trace": """schema steps recorder hashes writer files store ids
        laws laws_of_memory laws_of_numbers
        explain why telling tellers recompute arithmetic diff dump
        parts measures rollout proximity target knockout spread sinks prediction edges flow memory making
        selection paths reach difference verify cutting lens nodelink blas
        scene look grid lanes layout marks captions labels maps heat pyramid cachemap draw notebook
        export names assemble huggingface""",
}


def run(block: str, folder: Path) -> str:
    """The block with what its commands really print."""
    scripts = os.pathsep.join([str(folder / "bin"), sysconfig.get_path("scripts"), os.environ["PATH"]])
    environment = os.environ | {"PATH": scripts, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    written = []
    for line in block.splitlines():
        if line.startswith("$ "):
            done = subprocess.run(["bash", "-c", line[2:]], cwd=folder, env=environment, capture_output=True, text=True)
            written += [line, *(done.stdout + done.stderr).rstrip("\n").splitlines()]
    return "\n".join(written).replace(str(ROOT) + "/", "") + "\n"


def prepared(folder: Path) -> Path:
    """An empty folder in which `nanokv` and `python` are the ones under test."""
    (folder / "bin").mkdir()
    for name, command in (("nanokv", f'{sys.executable} -m nanokv.cli "$@"'), ("python", f'{sys.executable} "$@"')):
        (folder / "bin" / name).write_text(f"#!/bin/sh\nexec {command}\n")
        (folder / "bin" / name).chmod(0o755)
    return folder


def code_lines(path: Path) -> int:
    """Lines that are neither blank, nor a comment, nor part of a docstring."""
    tree, skipped = ast.parse(path.read_text()), set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            skipped |= set(range(body[0].lineno, (body[0].end_lineno or 0) + 1))
    lines = enumerate(path.read_text().splitlines(), 1)
    return sum(1 for i, line in lines if line.strip() and not line.strip().startswith("#") and i not in skipped)


def reading_order() -> str:
    """The table of pages with their first sentence and lines of code."""
    rows = ["| page | lines of code | |", "|---|---|---|"]
    pages = [(folder, name) for folder, names in ORDER.items() for name in names.split()]
    for folder, name in pages:
        path = ROOT / folder / f"{name}.py"
        summary = re.split(r"(?<=[.;]) |\.?\n", ast.get_docstring(ast.parse(path.read_text())) or "")[0].rstrip(".:;")
        rows.append(f"| [{folder}/{name}.py]({folder}/{name}.py) | {code_lines(path)} | {summary} |")
    return "\n".join(rows)


def rewritten(text: str, folder: Path) -> str:
    text = CONSOLE.sub(lambda match: f"```console\n{run(match[1], folder)}```", text)
    return re.sub(r"<!-- reading order -->\n(\|.*\n)*", lambda match: f"<!-- reading order -->\n{reading_order()}\n", text)


def test_every_command_in_the_readme_prints_what_stands_there(tmp_path: Path) -> None:
    folder = prepared(tmp_path)
    for match in CONSOLE.finditer(README.read_text()):
        assert run(match[1], folder) == match[1]


def test_the_reading_order_and_its_line_counts_are_right() -> None:
    assert f"<!-- reading order -->\n{reading_order()}\n" in README.read_text()


def test_the_debugger_stops_where_the_readme_says(tmp_path: Path) -> None:
    session = re.findall(r"^\(Pdb\) (.*)$", README.read_text(), re.MULTILINE)
    command = [sys.executable, "-m", "pdb", "-m", "nanokv.cli", "generate", "a b a"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    typed = "\n".join([*session, "q"])
    done = subprocess.run(command, input=typed, cwd=tmp_path, env=environment, capture_output=True, text=True)
    expected = README.read_text().partition("p k.shape, slots.first, slots.stop\n")[2].partition("\n")[0]
    assert expected in done.stdout


def test_every_page_has_its_place_in_the_reading_order() -> None:
    for folder, names in ORDER.items():
        there = {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__", "trace"}
        assert sorted(names.split()) == sorted(there)


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)[0]
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out == "sat\non\n3 (1024,)\n"
    assert (tmp_path / "cat.svg").is_file()


def test_the_glossary_names_what_the_loaders_read() -> None:
    from nanokv import families

    rows = [line.split("|")[1:-1] for line in README.read_text().splitlines() if line.startswith("| `")]
    glossary = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows if len(row) == 5}
    tables = (families.LLAMA_NAMES, families.GGUF_NAMES, None, families.GPT2_NAMES)
    checked = 0
    for names, cells in glossary.items():
        for name in re.findall(r"`(\w+)`", names):
            for cell, table in zip(cells, tables, strict=True):
                if table is not None and name in table and cell:
                    index = re.findall(r"`(\w+)`", names).index(name)
                    theirs = re.findall(r"`([\w.]+)`", cell)
                    term = theirs[min(index, len(theirs) - 1)]
                    assert term in table[name], f"{name}: {term} is not in {table[name]}"
                    checked += 1
    assert checked > 25


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        README.write_text(rewritten(README.read_text(), prepared(Path(scratch))))
