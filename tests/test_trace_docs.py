"""docs/trace.md shows real output and tables made from the schema. `python tests/test_trace_docs.py` writes it anew."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import CONFIGS, model, tokens
from test_readme import CONSOLE, ROOT, prepared, run

import nanokv
from nanokv.config import Config
from nanokv.errors import ModelNotFoundError
from nanokv.trace import Recorder, Trace, laws, schema
from nanokv.trace.schema import ABOUT, AUDIT, LEVELS, STEP, TABLES, Stored

DOCS = ROOT / "docs" / "trace.md"
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
BIG = {
    "8B": Config(32, 32, 8, 128, 4096, 14336, 128256, 131072),
    "70B": Config(80, 64, 8, 128, 8192, 28672, 128256, 131072),
}
SMOLLM2 = Config(30, 9, 3, 64, 576, 1536, 49152, 8192)
MEASURED_AT = 512


def table(head: str, rows: list[tuple[str, ...]]) -> str:
    names = head.split(" | ")
    lines = [names, ["---"] * len(names), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def arrays(stored: tuple[Stored, ...]) -> str:
    rows = [(f"`{s.name}`", f"`{s.dtype}`", f"[{s.shape}]", s.unit, s.level, s.meaning) for s in stored]
    return table("array | type | shape | unit | level | meaning", rows)


def size(stored: Stored, config: Config, context: int) -> int:
    """Bytes that an array takes for one token that reads so many positions; no text, no edits."""
    c = config
    letters = {"L": c.n_layers, "H": c.n_heads, "G": c.n_kv_heads, "hd": c.head_dim, "D": c.d_model, "V": c.vocab_size,
               "T": 1, "T'": 1, "E": 0, "bytes": 0}  # fmt: skip
    if stored.shape.startswith("sum"):
        n = 0 if stored.name in schema.OPTIONAL else c.n_layers * c.n_heads * context
    else:
        n = int(np.prod([letters[letter] for letter in stored.shape.split()]))
    return n * np.dtype(stored.dtype).itemsize


def bytes_of_a_token(config: Config, level: str, context: int) -> int:
    """By the schema."""
    return sum(size(stored, config, context) for stored in STEP if schema.holds(level, stored.level))


def shown(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"


def bytes_table() -> str:
    columns = [("135M at 512", SMOLLM2, MEASURED_AT), *((f"{name} at {k}k", config, k * 1024) for k in (8, 128)
                                                        for name, config in BIG.items())]  # fmt: skip
    rows = [
        (f"`{level}`", *(shown(bytes_of_a_token(config, level, context)) for _, config, context in columns)) for level in LEVELS
    ]
    return table("level | " + " | ".join(name for name, *_ in columns), rows)


def weights_of_a_context(config: Config, n: int) -> int:
    return 4 * config.n_layers * config.n_heads * n * (n + 1) // 2


def tables() -> dict[str, str]:
    """What stands behind each mark."""
    of_tables = [(name, f"`{column}`", made) for name, columns in TABLES.items() for column, made in columns.items()]
    return {
        "about": table("key | meaning", [(f"`{name}`", meaning) for name, meaning in ABOUT.items()]),
        "step": arrays(STEP),
        "audit": arrays(AUDIT),
        "tables": table("table | column | made of", of_tables),
        "laws": table("law | level | says", [(law.name, law.level, law.says) for law in laws.LAWS]),
        "bytes": bytes_table(),
    }


def with_tables(text: str, made: dict[str, str]) -> str:
    return re.sub(r"<!-- (\w+) -->\n(\|.*\n)*", lambda m: f"<!-- {m[1]} -->\n{made[m[1]]}", text)


def ids() -> str:
    """The forms of ids, as Trace says them."""
    listed = re.findall(r"^ {8}(\w\S*.*?(?:, \w+\.\w+)? {2,}.*)$", Trace.__getitem__.__doc__ or "", re.MULTILINE)
    return "\n".join(listed) + "\n"


def printed(code: str, folder: Path | str, names: dict[str, Any] | None = None) -> str:
    """What a chapter's Python prints in that folder; names: what the snippets before it made."""
    before, output = Path.cwd(), io.StringIO()
    with contextlib.redirect_stdout(output):
        os.chdir(folder)
        try:
            exec(compile(code, "<snippet>", "exec"), {} if names is None else names)
        finally:
            os.chdir(before)
    return output.getvalue()


def facts() -> dict[str, str]:
    """Numbers and names that stand in the text."""
    quoted = lambda names: ", ".join(f"`{name}`" for name in names)  # noqa: E731
    eight = BIG["8B"]
    return {
        "ROLE_NAMES": quoted(schema.ROLES), "KIND_NAMES": quoted(schema.KINDS), "EDIT_NAMES": quoted(schema.EDITS),
        "SITE_NAMES": quoted(schema.EDIT_SITES), "WHOLE_8K": shown(weights_of_a_context(eight, 8192)),
        "WHOLE_128K": shown(weights_of_a_context(eight, 131072)), "TOPK_8B": shown(8 * 32 * eight.n_layers * eight.n_heads),
    }  # fmt: skip


def rewritten(text: str, folder: Path) -> str:
    for name, value in facts().items():
        text = text.replace(name, value)
    text = text.replace("```text\nPYTHON\n```", f"```text\n{printed(PYTHON.findall(text)[0], folder)}```")
    text = text.replace("```text\nIDS\n```", f"```text\n{ids()}```")
    return CONSOLE.sub(lambda match: f"```console\n{run(match[1], folder)}```", with_tables(text, tables()))


def test_the_tables_are_those_of_the_schema() -> None:
    text = DOCS.read_text()
    for name, made in tables().items():
        assert f"<!-- {name} -->\n{made}\n" in text, name
    assert f"```text\n{ids()}```" in text
    assert all(value in text for value in facts().values())


def test_the_python_of_the_chapter_prints_what_stands_there(tmp_path: Path) -> None:
    text = DOCS.read_text()
    assert f"```text\n{printed(PYTHON.findall(text)[0], tmp_path)}```" in text


def test_every_command_of_the_chapter_prints_what_stands_there(tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    try:
        nanokv.load("smollm2-135m")
    except ModelNotFoundError as missing:
        pytest.skip(str(missing))
    folder = prepared(tmp_path)
    for match in CONSOLE.finditer(DOCS.read_text()):
        assert run(match[1], folder) == match[1]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("level", LEVELS)
def test_the_bytes_of_a_token_are_those_of_the_formula(family: str, level: str, tmp_path: Path) -> None:
    measured(model(CONFIGS[family]), level, tmp_path, 30)


@pytest.mark.parametrize("level", LEVELS)
def test_the_bytes_of_a_token_of_smollm2_are_measured(level: str, tmp_path: Path) -> None:
    try:
        small = nanokv.load("smollm2-135m")
    except ModelNotFoundError as missing:
        pytest.skip(str(missing))
    assert small.config.n_layers == SMOLLM2.n_layers and small.config.vocab_size == SMOLLM2.vocab_size
    measured(small, level, tmp_path, MEASURED_AT)


def measured(small: nanokv.Transformer, level: str, folder: Path, context: int) -> None:
    """The file of a token that reads `context` positions, less its header and its text, is as long as the formula says."""
    cache, given = small.new_cache(), tokens(CONFIGS["llama"], context)
    small.forward(given[:-1], cache, last_logits_only=True)
    with Recorder(folder / "a.nkv", level=level) as recorder:
        small.forward(given[-1:], cache, observer=recorder)
    (path,) = (folder / "a.nkv").glob("step-*")
    head = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    text = len(recorder.trace.steps[0].arrays["text"])
    assert path.stat().st_size - head - text == bytes_of_a_token(small.config, level, context)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as scratch:
        DOCS.write_text(rewritten(DOCS.read_text(), prepared(Path(scratch))))
