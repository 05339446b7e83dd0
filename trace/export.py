"""A trace for other programs: Parquet and JSON lines (its tables), dumps (its arrays by id), networkx, bertviz.

Tables are made batch by batch, so that a trace need not fit into memory. Besides those of `schema.TABLES` there are, as far
as the level holds them: `heads` (q and z of each query head at a position), `states` (each site of the stream) and `logits`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nanokv.errors import MissingExtraError, TraceError
from nanokv.trace.dump import write_dump
from nanokv.trace.ids import AFTER_THE_LAYERS, ORDER, SITES, held
from nanokv.trace.schema import KINDS, ROLES, TABLES, holds
from nanokv.trace.schema import SITES as STREAM
from nanokv.trace.store import Trace

if TYPE_CHECKING:
    from nanokv.trace.flow import Flow

Array = np.ndarray
Batch = dict[str, Array]  # columns of as many rows; a column of vectors is [rows, n]
ROWS = 1 << 19  # in a batch, about
CODES = {"kind": KINDS, "role": ROLES}  # columns of indices into these; "site" is one into schema.SITES
LEVELS = {"tokens": "writes", "writes": "writes", "reads": "writes", "edits": "writes", "heads": "vectors", "states": "states",
          "logits": "states"}  # fmt: skip


def tables_of(trace: Trace) -> list[str]:
    """The tables that the trace's level holds."""
    return [name for name, level in LEVELS.items() if holds(trace.level, level)]


def batches(trace: Trace, table: str, rows: int = ROWS) -> Iterator[Batch]:
    """The rows of a table in batches of about so many, in the order of computation. TraceError for a table that is not held."""
    if table not in tables_of(trace):
        raise TraceError(
            f"there is no table {table!r} in a trace of level {trace.level}; there are {', '.join(tables_of(trace))}"
        )
    waiting: list[Batch] = []
    size = 0
    for batch in _PARTS[table](trace, rows):
        waiting.append(batch)
        size += len(next(iter(batch.values())))
        if size >= rows:
            yield _joined(waiting)
            waiting, size = [], 0
    if waiting:
        yield _joined(waiting)


def _check(trace: Trace, table: str) -> None:
    if table not in tables_of(trace):
        raise TraceError(
            f"there is no table {table!r} in a trace of level {trace.level}; there are {', '.join(tables_of(trace))}"
        )


def _joined(parts: list[Batch]) -> Batch:
    return parts[0] if len(parts) == 1 else {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _tokens(trace: Trace, rows: int) -> Iterator[Batch]:
    for step in trace.steps:
        n = step.n
        columns = {"pos": np.arange(step.start, step.start + n, dtype=np.int32), "text": np.array(step.texts(), object),
                   "role": step.roles(), "step": np.full(n, step.number, np.int32),
                   "sampled": step.arrays["sampled"].astype(bool)}  # fmt: skip
        columns |= {name: step.arrays[name] for name in ("token_id", "turn", "chunk")}
        yield {name: columns[name] for name in TABLES["tokens"]}


def _writes(trace: Trace, rows: int) -> Iterator[Batch]:
    for step in trace.steps:
        l, t, g = step.arrays["k_hash"].shape
        layer, row, head = (index.reshape(-1) for index in np.indices((l, t, g), np.int32))
        columns = {"step": np.full(len(layer), step.number, np.int32), "layer": layer,
                   "slot": step.arrays["write_slot"][layer] + row, "pos": step.start + row, "kv_head": head,
                   "turn": step.arrays["turn"][row], "role": step.roles()[row]}  # fmt: skip
        columns |= {name: step.arrays[name].reshape(-1) for name in ("k_hash", "v_hash", "k_norm", "v_norm")}
        if holds(trace.level, "vectors"):
            columns |= {name: step.arrays[name].reshape(len(layer), -1) for name in ("k", "v")}
        yield columns


def _reads(trace: Trace, rows: int) -> Iterator[Batch]:
    names = [name for name in ("weight", "score") if holds(trace.level, {"weight": "weights", "score": "vectors"}[name])]
    for step in trace.steps:
        for layer in range(trace.config.n_layers):
            dst, src = step.kept_pairs(layer)
            values = {name: step.kept(name, layer) for name in names}
            heads = max(1, rows // max(1, len(dst)))  # of a long prompt, one head's reads may be several batches
            for h in range(0, len(src), heads):
                for low in range(0, len(dst), rows):
                    part = np.s_[h : h + heads, low : low + rows]
                    yield _reads_part(step, layer, h, dst[part[1]], src[part]) | {
                        name: array[part].reshape(-1) for name, array in values.items()
                    }


def _reads_part(step: Any, layer: int, h: int, dst: Array, src: Array) -> Batch:
    """The columns of neighbouring heads' reads. dst [R'], src [heads, R']."""
    n, r = src.shape
    heads, row = np.arange(h, h + n, dtype=np.int32), dst - step.start
    flat, to = src.reshape(-1), np.tile(dst, n)
    kind = np.where(flat == to, KINDS.index("self"), np.where(flat < step.start, KINDS.index("past"), KINDS.index("chunk")))
    return {
        "step": np.full(n * r, step.number, np.int32),
        "layer": np.full(n * r, layer, np.int32),
        "head": np.repeat(heads, r),
        "dst": to,
        "src": flat,
        "kv_layer": np.full(n * r, step.arrays["read_layer"][layer], np.int32),
        "kv_head": np.repeat(step.arrays["read_kv_head"][layer][heads], r),
        "slot": flat,
        "kind": kind.astype(np.uint8),
        "turn": np.tile(step.arrays["turn"][row], n),
        "role": np.tile(step.roles()[row], n),
    }


def _edits(trace: Trace, rows: int) -> Iterator[Batch]:
    yield {name: trace.edits[name] for name in TABLES["edits"]}


def _heads(trace: Trace, rows: int) -> Iterator[Batch]:
    for step in trace.steps:
        for layer in range(trace.config.n_layers):
            t, h, hd = step.arrays["q"][layer].shape
            yield _place(step, layer, np.repeat(np.arange(t), h)) | {"head": np.tile(np.arange(h, dtype=np.int32), t)} | {
                name: step.arrays[name][layer].reshape(-1, hd) for name in ("q", "z")
            }  # fmt: skip


def _states(trace: Trace, rows: int) -> Iterator[Batch]:
    for step in trace.steps:
        for layer in range(trace.config.n_layers):
            for i, site in enumerate(STREAM):
                place = _place(step, layer, np.arange(step.n))
                yield place | {"site": np.full(step.n, i, np.uint8), "value": step.arrays[site][layer]}


def _place(step: Any, layer: int, row: Array) -> Batch:
    n = len(row)
    return {"step": np.full(n, step.number, np.int32), "layer": np.full(n, layer, np.int32),
            "pos": (step.start + row).astype(np.int32)}  # fmt: skip


def _logits(trace: Trace, rows: int) -> Iterator[Batch]:
    some = max(1, rows // trace.config.vocab_size)
    for step in trace.steps:
        logits, scale = step.arrays["logits"], step.arrays["final_scale"]
        for low in range(0, len(logits), some):
            n = len(logits[low : low + some])
            pos = np.arange(n, dtype=np.int32) + step.start + step.n - len(logits) + low
            yield {"step": np.full(n, step.number, np.int32), "pos": pos, "final_scale": scale[low : low + some],
                   "logits": logits[low : low + some]}  # fmt: skip


_PARTS: dict[str, Callable[[Trace, int], Iterator[Batch]]] = {
    "tokens": _tokens, "writes": _writes, "reads": _reads, "edits": _edits, "heads": _heads, "states": _states,
    "logits": _logits,
}  # fmt: skip


# Parquet


def parquet(trace: Trace, folder: str | Path, tables: Sequence[str] | None = None) -> list[Path]:
    """Write tables into a new folder, each as NAME.parquet, compressed; returns the files.

    Vectors are lists of floats; kind, role and site are text. MissingExtraError without pyarrow.
    """
    try:
        import pyarrow as pa
        from pyarrow import parquet as pq
    except ImportError as error:
        raise MissingExtraError("writing Parquet needs pyarrow: pip install 'nanokv[parquet]'") from error
    wanted = _chosen(trace, tables)
    with _new(folder) as part:
        part.mkdir(parents=True)
        for table in wanted:
            writer = None
            for batch in batches(trace, table):
                arrow = pa.table({name: _arrow(pa, name, column) for name, column in batch.items()})
                if writer is None:
                    writer = pq.ParquetWriter(part / f"{table}.parquet", arrow.schema, compression="zstd")
                writer.write_table(arrow)
            if writer is not None:
                writer.close()
    return [Path(folder) / f"{table}.parquet" for table in wanted]


def _arrow(pa: Any, name: str, column: Array) -> Any:
    """A column as an Arrow array."""
    if names := _names_of(name, column):
        return pa.DictionaryArray.from_arrays(pa.array(column), pa.array(names))
    if column.ndim == 2:
        return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(column).reshape(-1)), column.shape[1])
    return pa.array(column.tolist(), pa.string()) if column.dtype == object else pa.array(column)


def _names_of(name: str, column: Array) -> Sequence[str]:
    """The names that a column's numbers stand for, if they do."""
    return STREAM if name == "site" and column.dtype != object else CODES.get(name, ()) if column.dtype == np.uint8 else ()


def _chosen(trace: Trace, tables: Sequence[str] | None) -> Sequence[str]:
    for table in tables or ():
        _check(trace, table)
    return tables_of(trace) if tables is None else tables


@contextmanager
def _new(path: str | Path) -> Iterator[Path]:
    """Another name to write under, renamed to the path in the end, so that what stands there is whole."""
    path = Path(path)
    if path.exists():
        raise TraceError(f"{path} is already there: give another name, or remove it first")
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        part.replace(path)
    finally:
        if part.is_dir():
            shutil.rmtree(part)
        part.unlink(missing_ok=True)


# JSON lines


def json_lines(trace: Trace, path: str | Path, tables: Sequence[str] | None = None) -> Path:
    """Write tables as JSON lines, a row an object: {"table": "reads", "step": 0, "layer": 0, ...}.

    Hashes are text, "0x...", for many readers of JSON keep 53 bits of a number. A number that is not finite is null.
    """
    wanted = _chosen(trace, tables)
    with _new(path) as part, open(part, "w", encoding="utf-8", newline="\n") as file:
        for table in wanted:
            for batch in batches(trace, table, rows=1 << 14):
                columns = [_json(name, column) for name, column in batch.items()]
                keys = [f", {json.dumps(name)}: " for name in batch]
                for row in zip(*columns, strict=True):
                    file.write(f'{{"table": "{table}"' + "".join(k + v for k, v in zip(keys, row, strict=True)) + "}\n")
    return Path(path)


def _json(name: str, column: Array) -> Iterable[str]:
    """A column as JSON, a text for each row."""
    if names := _names_of(name, column):
        column = np.array(names, object)[column]
    if column.ndim == 2:
        return [f"[{', '.join(_json(name, row))}]" for row in column]
    if column.dtype == np.uint64:
        return [f'"{value:#018x}"' for value in column.tolist()]
    if column.dtype.kind == "f":
        return [text if finite else "null" for text, finite in zip(column.astype(str), np.isfinite(column), strict=True)]
    return map(json.dumps, column.tolist())


# Arrays by id


def dump(trace: Trace, path: str | Path, sites: Sequence[str] | None = None) -> Path:
    """Write all arrays, or those of some sites, as JSON lines {"id", "shape", "value"}, for `nanokv diff` of any port."""
    wanted = [site for site in SITES if held(trace, site) and (sites is None or site in sites)]
    if unknown := sorted(set(sites or ()) - set(wanted)):
        raise TraceError(f"the trace does not hold {unknown[0]!r}; it holds {', '.join(s for s in SITES if held(trace, s))}")
    with _new(path) as part:
        write_dump(part, ((name, trace[name]) for name in _ids(trace, wanted)))
    return Path(path)


def _ids(trace: Trace, sites: Sequence[str]) -> Iterator[str]:
    """The ids of whole calls' arrays, in the order of computation."""
    for step in trace.steps:
        within = sorted((site for site in sites if site not in AFTER_THE_LAYERS), key=lambda site: ORDER[site])
        for layer in range(trace.config.n_layers):
            yield from (f"step{step.number}.layer{layer}.{site}" for site in within)
        yield from (f"step{step.number}.{site}" for site in sites if site in AFTER_THE_LAYERS)


# Graphs and pictures of others


def to_networkx(flow: Flow) -> Any:
    """A flow as a networkx.MultiDiGraph of plain numbers and texts, which every format of networkx can write.

    Nodes are the ids of states, `layer1.pos5`, with layer, pos and text; edges have kind, layer, head (-1: none, or merged),
    weight and influence, and lead the way the information goes. It is `Flow.to_networkx`, less what only a flow needs.
    MissingExtraError without networkx.
    """
    graph = flow.to_networkx()
    for _, node in graph.nodes(data=True):
        node["text"] = node.pop("token")
        _keep_only(node, ("layer", "pos", "text"))
    for _, _, edge in graph.edges(data=True):
        _keep_only(edge, ("kind", "layer", "head", "weight", "influence"))
    graph.graph.clear()
    graph.graph.update(measure=flow.measure, at=flow.at, prediction=flow.prediction.text)
    return graph


def _keep_only(attributes: dict[str, Any], names: tuple[str, ...]) -> None:
    for name in attributes.keys() - set(names):
        del attributes[name]


def to_bertviz(trace: Trace) -> tuple[list[Array], list[str]]:
    """What bertviz's head_view and model_view take: the attention of each layer, float32 [1, H, S, S], and the tokens.

    bertviz wants torch tensors: head_view([torch.from_numpy(a) for a in attention], tokens).
    """
    return [trace.pattern(layer)[None] for layer in range(trace.config.n_layers)], list(trace.tokens["text"])
