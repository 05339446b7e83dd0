"""Reads safetensors files and trace folders (trace.json and such a file for each call) with Python's own modules alone."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

FORMS = {"F64": "d", "F32": "f", "I64": "q", "I32": "i", "U64": "Q", "U32": "I", "U8": "B", "I8": "b", "I16": "h", "U16": "H"}


def read_trace(folder: Path) -> dict[str, Any]:
    """What a trace holds, by name: trace.schema, ..., step0.start, step0.token_id, ..., audit2.k_by_slot, ...

    ValueError if it cannot be read, or if a checksum is wrong (SPEC.md, J6).
    """
    if not (folder / "trace.json").is_file():
        raise ValueError("there is no trace.json")
    about = json.loads((folder / "trace.json").read_text(encoding="utf-8"))
    keys = ("schema", "version", "level", "dtype", "architecture")
    found: dict[str, Any] = {f"trace.{key}": [str(about.get(key))] for key in keys}
    found["trace.config"] = [json.dumps(about.get("config"), sort_keys=True)]
    found["trace.files"] = sorted(file.name for file in folder.iterdir())
    for file in sorted(folder.glob("*.safetensors")):
        data = file.read_bytes()
        arrays, metadata = read_safetensors(data)
        check_sums(file.name, data, metadata)
        kind = file.name.split("-")[0]
        name = f"{kind}{metadata.get('step')}"
        found[f"{name}.format"] = [metadata.get("format", "")]
        if kind == "step":
            found[f"{name}.start"] = [int(metadata.get("start", -1))]
            found[f"{name}.deviations"] = [metadata.get("deviations", "")]
        found |= {f"{name}.{array}": values for array, values in arrays.items()}
    return found


LEVEL_OF = {
    "weight": "weights",
    **dict.fromkeys(("score", "q", "k", "v", "z"), "vectors"),
    **dict.fromkeys(("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post", "final_scale", "logits"), "states"),
}  # the other arrays are of level writes


def check_sums(name: str, data: bytes, metadata: dict[str, str]) -> None:
    """ValueError unless every level's arrays have the checksum that the metadata says."""
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length].decode())
    places: dict[str, list[list[int]]] = {}
    for array, entry in header.items():
        if array != "__metadata__":
            places.setdefault(LEVEL_OF.get(array, "writes"), []).append(entry["data_offsets"])
    for level, offsets in places.items():
        found = checksum(b"".join(data[8 + length + begin : 8 + length + end] for begin, end in sorted(offsets)))
        if found != metadata.get(f"sum.{level}"):
            raise ValueError(f"{name}: sum.{level} is {metadata.get(f'sum.{level}')}, expected {found} of these bytes (J6)")


def checksum(data: bytes) -> str:
    """J6: CRC-32 of the sums of rows of 4096 bytes, and then of the sums of their 512 columns."""
    data += bytes(-len(data) % 4096)
    words = struct.unpack(f"<{len(data) // 8}Q", data)
    rows = [sum(words[at : at + 512]) for at in range(0, len(words), 512)]
    columns = [sum(words[i::512]) for i in range(512)]
    sums = [total % (1 << 64) for total in rows + columns]
    return f"{zlib.crc32(struct.pack(f'<{len(sums)}Q', *sums)):08x}"


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
    header = json.loads(data[8 : 8 + length].decode())
    metadata, body = header.pop("__metadata__", {}), data[8 + length :]
    arrays = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        form = FORMS[entry["dtype"]]
        values = list(struct.unpack(f"<{(end - begin) // struct.calcsize('<' + form)}{form}", body[begin:end]))
        arrays[name] = {"dtype": entry["dtype"], "shape": entry["shape"], "values": values}
    return arrays, metadata
