"""Makes every file of the suite but its texts and programs, from nanokv; nothing here is edited by hand.

    python tests/conformance/make_vectors.py             write models, cases, flags and manifest
    python tests/conformance/make_vectors.py --check     make them elsewhere and compare; exit status 1 if they differ

Expected values of the profile `close` come from float64, those of `exact` from the kernels; every bug of examples/museum
is tried on every case, and leaves its signature there. Change VERSION by CHANGES.md's rule whenever a file changes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE.parents[1]))

from making import invalid, level0, level1, level5, runs, smollm2  # noqa: E402
from making.expected import Maker  # noqa: E402
from making.models import write_models  # noqa: E402
from making.mutants import BUGS  # noqa: E402
from making.rules import unmatched  # noqa: E402

VERSION = "2.0.0"
FOLDERS = {1: "level1_ops", 2: "level2_block", 3: "level3_run", 4: "level4_trace", 5: "level5_text", "invalid": "invalid"}
LIMIT = 2 << 20  # bytes of everything that is made


def groups(folder: Path) -> Iterator[tuple[int | str, str, list[dict[str, Any]]]]:
    """(level, path, cases without expected values) of every file."""
    yield 0, "level0_index.json", level0.cases()
    made = {1: level1.FILES, **runs.LEVELS, 5: level5.FILES, "invalid": invalid.FILES}
    for level, files in made.items():
        for name, cases in files.items():
            yield level, f"{FOLDERS[level]}/{name}.json", cases()
    yield 5, f"{FOLDERS[5]}/texts.json", level5.texts(folder)


def make(folder: Path, progress: bool) -> None:
    """All files, into a folder."""
    write_models(folder / "models")
    maker, entries, ids = Maker(folder), [], []
    for level, path, cases in groups(folder):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        finished = [maker.finish(case, level) for case in cases]
        ids += [case["id"] for case in finished]
        (folder / path).write_text(_case_file(level, path, finished), encoding="utf-8")
        entries.append({"path": path, "level": level, "cases": len(finished)})
        if progress:
            print(f"{path:32} {len(finished):3} cases", file=sys.stderr)
    smollm2_cases = smollm2.cases(folder, HERE)
    path = f"{FOLDERS[3]}/smollm2.json"
    (folder / path).write_text(_case_file(3, path, smollm2_cases), encoding="utf-8")
    entries.append({"path": path, "level": 3, "cases": len(smollm2_cases)})
    idle = unmatched([*ids, *(case["id"] for case in smollm2_cases)])
    assert not idle, "SPEC.md: " + "; ".join(idle)
    assert len(set(ids)) == len(ids), "two cases have one id"
    _write_json(folder / "flags.json", {"schema": "flags_v1", "flags": _flags()})
    others = sorted(path for path in folder.rglob("*") if path.is_file() and path.relative_to(folder).parts[0] in OTHERS)
    entries += [{"path": str(path.relative_to(folder))} for path in others]
    for entry in entries:
        entry["sha256"] = hashlib.sha256((folder / entry["path"]).read_bytes()).hexdigest()
    about = {"schema": "manifest_v1", "suite": "nanokv-conformance", "version": VERSION, "levels": LEVELS, "files": entries}
    _write_json(folder / "manifest.json", about)


OTHERS = ("models", "tokenizer", "flags.json", "smollm2")
LEVELS = {
    "0": "whole numbers: which head, which slot, which pair",
    "1": "one operation at a time",
    "2": "one block, with its insides",
    "3": "whole runs, call by call",
    "4": "traces on the disk",
    "5": "choosing a token, and text",
    "invalid": "what must be refused, and as what",
}


def _case_file(level: int | str, path: str, cases: list[dict[str, Any]]) -> str:
    """One case a line, so that a difference shows as the case that differs."""
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases)
    head = {"schema": "cases_v1", "level": level, "topic": Path(path).stem}
    return json.dumps(head)[:-1] + f', "cases": [\n{lines}\n]}}\n'


def _flags() -> dict[str, Any]:
    return {
        name: {"bug": bug.bug, "fix": bug.fix, "rules": list(bug.rules), "seen": bug.seen, "bits": bug.bits}
        for name, bug in BUGS.items()
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def differences(made: Path, kept: Path) -> list[str]:
    """What differs between the files made and those kept. Decimals may differ by the last digit of a float32: float64
    arithmetic is not the same to the last bit on every machine."""
    names = {str(path.relative_to(made)) for path in made.rglob("*") if path.is_file()}
    found = []
    for name in sorted(names):
        old, new = kept / name, made / name
        if not old.is_file():
            found.append(f"{name} is missing")
        elif name.endswith(".safetensors"):
            found += [f"{name} differs"] if old.read_bytes() != new.read_bytes() else []
        elif name != "manifest.json" and not _alike(json.loads(old.read_text("utf-8")), json.loads(new.read_text("utf-8"))):
            found.append(f"{name} differs")
    manifest = json.loads((kept / "manifest.json").read_text("utf-8"))
    for entry in manifest["files"]:
        if hashlib.sha256((kept / entry["path"]).read_bytes()).hexdigest() != entry["sha256"]:
            found.append(f"{entry['path']} is not what manifest.json has the checksum of")
    if {entry["path"] for entry in manifest["files"]} | {"manifest.json"} != names:
        found.append("manifest.json does not list the files that are made")
    return found


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_alike(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_alike, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=2e-7, abs_tol=1e-12)
    return bool(a == b) and type(a) is type(b)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the files that are there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make(folder, progress=sys.stderr.isatty())
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        assert size < LIMIT, f"{size} bytes were made, {LIMIT} are allowed"
        if options.check:
            found = differences(folder, HERE)
            print("\n".join(found) if found else f"the suite is as it is made: {size} bytes")
            return 1 if found else 0
        for path in sorted(folder.iterdir()):
            target = HERE / path.name
            if target.is_dir():
                shutil.rmtree(target)
            (shutil.copytree if path.is_dir() else shutil.copy)(path, target)
        print(f"{size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
