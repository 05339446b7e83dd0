"""One peer in a process of its own: reads requests from its standard input, one JSON object a line, and answers likewise.

    {"do": "load", "with": {"program": "module.Class", "settings": {...}}}    once, first
    {"do": "decode", "with": {"context": 16, "n": 8}}                         any method of that class
    {"do": "peak_memory", "with": {}}
    -> {"value": ...}, or {"error": "..."}

Between requests it waits for the next one and does nothing.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> None:
    """Answer until the requests end."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints goes where its warnings go, not between the answers
    peer: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        try:
            if request["do"] == "load":
                peer, answer["value"] = load(**request["with"])
            elif request["do"] == "peak_memory":
                answer["value"] = peak_memory()
            else:
                answer["value"] = getattr(peer, request["do"])(**request["with"])
        except Exception as error:
            traceback.print_exc()
            answer = {"error": str(error) or repr(error)}
        print(json.dumps(answer), file=answers)


def load(program: str, settings: dict[str, Any]) -> tuple[Any, dict[str, float]]:
    """The peer, and the seconds that its imports took and then its model."""
    module, name = program.split(".")
    began = time.perf_counter()
    make = getattr(importlib.import_module(f"benchmarks.peers.{module}"), name)
    imported = time.perf_counter()
    peer = make(**settings)
    return peer, {"import": imported - began, "load": time.perf_counter() - imported}


def peak_memory() -> int:
    """The most memory that this process had at one time, in bytes, pages of mapped files included (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return next(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))


if __name__ == "__main__":
    main()
