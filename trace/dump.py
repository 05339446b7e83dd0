"""Dumps: numbers by id as JSON lines, from any program in any language, to be compared with a trace.

Each line is an object {"id": "layer1.pos5", "value": [0.25, -1.5]}. The value is a number, or lists of numbers in the shape
that the id has in a trace; or it is one flat list, and "shape" says the shape. Besides JSON's numbers, NaN, Infinity and
-Infinity may stand bare, as Python writes them, or as strings; a string may also hold a C99 hexadecimal float (printf's %a),
which keeps every bit. Other keys are passed over, as are empty lines. A dump may have any ids, in any order.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from nanokv.errors import FileFormatError

Array = np.ndarray


def read_dump(path: str | Path) -> Iterator[tuple[int, str, Array]]:
    """(line number, id, value as float64) of each line. FileFormatError names the first line that is none."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                given = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                _bad(path, number, f"this is no JSON ({error})")
            if not isinstance(given, dict) or not isinstance(given.get("id"), str) or "value" not in given:
                _bad(path, number, 'a line must be an object like {"id": "layer1.pos5", "value": [0.25, -1.5]}')
            yield number, given["id"], _value(path, number, given["value"], given.get("shape"))


def _bad(path: str | Path, number: int, what: str) -> NoReturn:
    raise FileFormatError(f"{path} line {number}: {what}")


def _value(path: str | Path, number: int, value: Any, shape: Any) -> Array:
    try:
        array = np.array(_numbers(value), np.float64)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        _bad(path, number, f"the value is not a number or evenly nested lists of numbers ({error})")
    if shape is None:
        return array
    if not isinstance(shape, list) or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in shape):
        _bad(path, number, f"the shape is {shape!r}; it must be a list of whole numbers")
    if array.size != np.prod(shape, dtype=object):
        _bad(path, number, f"the value has {array.size} numbers, and the shape {shape} asks for {np.prod(shape, dtype=object)}")
    return array.reshape(shape)


def _numbers(value: Any) -> Any:
    if isinstance(value, list):
        return [_numbers(each) for each in value]
    if isinstance(value, str):
        return float.fromhex(value) if "0x" in value.lower() else float(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    raise TypeError(f"{value!r} is no number")


def write_dump(path: str | Path, arrays: Iterable[tuple[str, Array]]) -> None:
    """Write ids and arrays as a dump; read back, its numbers are the same float32. What is not finite stands bare."""
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for name, array in arrays:
            values = array.reshape(-1)
            shown = ", ".join(map(_text, values)) if values.dtype == np.float32 else json.dumps(values.tolist())[1:-1]
            file.write(f'{{"id": {json.dumps(name)}, "shape": {list(array.shape)}, "value": [{shown}]}}\n')


def _text(value: np.float32) -> str:
    """The shortest decimal number that reads back as this float32."""
    return str(value) if np.isfinite(value) else json.dumps(float(value))
