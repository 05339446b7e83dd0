"""Reads safetensors files and trace folders (trace.json and such a file for each call) with Python's own modules alone."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

FORMS = {"F64": "d", "F32": "f", "I64": "q", "I32": "i", "U64": "Q", "U32": "I", "U8": "B", "I8": "b", "I16": "h", "U16": "H"}


def read_trace(folder: Path) -> dict[str, Any]:
    """{"trace.schema": [...], ..., "step0.token_id": {"dtype", "shape", "values"}, ...}; ValueError if it is no trace."""
    if not (folder / "trace.json").is_file():
        raise ValueError(f"{folder.name} holds no trace.json")
    about = json.loads((folder / "trace.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = {f"trace.{name}": [about.get(name)] for name in ("schema", "version", "level")}
    found["trace.config"] = [json.dumps(about.get("config"), sort_keys=True)]
    files = sorted(folder.glob("step-*.safetensors"))
    found["trace.files"] = [file.name for file in files]
    for file in files:
        arrays, metadata = read_safetensors(file.read_bytes())
        step = metadata.get("step")
        found |= {f"step{step}.{name}": array for name, array in arrays.items()}
        found[f"step{step}.start"] = [int(metadata.get("start", -1))]
    return found


def expected_in(file: Path) -> dict[str, Any]:
    """The arrays of a safetensors file in the form in which a case has the outputs that it expects."""
    arrays, _ = read_safetensors(file.read_bytes())
    return {
        name: {
            "shape": array["shape"],
            "f32": array["values"],
            "hex": struct.pack(f">{len(array['values'])}f", *array["values"]).hex(),
        }
        for name, array in arrays.items()
    }


def read_safetensors(data: bytes) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Arrays by name, and the metadata."""
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    metadata, body = header.pop("__metadata__", {}), data[8 + length :]
    arrays = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        form = FORMS[entry["dtype"]]
        values = list(struct.unpack(f"<{(end - begin) // struct.calcsize('<' + form)}{form}", body[begin:end]))
        arrays[name] = {"dtype": entry["dtype"], "shape": entry["shape"], "values": values}
    return arrays, metadata
