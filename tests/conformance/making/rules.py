"""Which rules of SPEC.md name which cases: the one place where a case's rules are said."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

SPEC = Path(__file__).resolve().parents[1] / "SPEC.md"


def patterns() -> dict[str, list[str]]:
    """Label -> the ids and patterns after its "Cases:", in the order of the text."""
    found = {}
    for block in re.split(r"\n(?=\*\*[A-Z]\d+\*\*)", SPEC.read_text(encoding="utf-8"))[1:]:
        label = block[2 : block.index("**", 2)]
        named = re.search(r"^Cases: (.*?)\.\n", block + "\n", re.DOTALL | re.MULTILINE)
        found[label] = re.findall(r"`([^`]+)`", named[1]) if named else []
    return found


def rules_of(id_: str) -> list[str]:
    """The labels of the rules that name a case."""
    return [label for label, named in patterns().items() if any(fnmatchcase(id_, pattern) for pattern in named)]


def unmatched(ids: Iterable[str]) -> list[str]:
    """What of SPEC.md names no case: rules without one, and patterns that nothing fits."""
    all_ids = list(ids)
    idle = [f"{label} names no case" for label, named in patterns().items() if not named]
    return idle + [
        f"{label}: no case fits {pattern}"
        for label, named in patterns().items()
        for pattern in named
        if not any(fnmatchcase(id_, pattern) for id_ in all_ids)
    ]
