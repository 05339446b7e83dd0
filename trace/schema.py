"""The trace's one definition: what is stored, of what type, shape and unit, from which level on, and what it means.

The store, its checks and the tables of docs/trace.md are derived from this page. A trace is a folder NAME.nkv:

    trace.json                  ABOUT: what was recorded
    step-000000.safetensors     one forward call: the arrays of STEP
    audit-000063.safetensors    the whole cache, hashed again after that step: the arrays of AUDIT

Numbers are little-endian, arrays row-major. The letters are those of the code: T new positions of the call, L layers, H
query heads, G key/value heads, hd head dimension, D width, V vocabulary; S positions in the cache, E edits. R is the number
of reads of one layer, that is of pairs of a position and a slot that it reads, by position and then by slot.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

NAME, VERSION = "nanokv-trace", 1

LEVELS = ("writes", "weights", "vectors", "states")  # each holds what those before it hold
ROLES = ("user", "model", "system", "tool")
KINDS = ("self", "past", "chunk")  # of a read: of its own position; of a slot written in an earlier call; in this call
EDITS = ("cut", "zero_value", "replace", "add")  # kinds of interventions: those of nanokv.edits
ARCHITECTURES = ("standard", "feedback")  # whether a position reads itself, or only those before it
SITES = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
EDIT_SITES = ("pattern", "k", "v", *SITES)  # where an edit acts
AUDIT_EVERY = 64  # calls

FLOAT = "<f4"  # what floating columns are; a model that was built in float64 leaves float64, and trace.json says so


@dataclass(frozen=True)
class Stored:
    """One array of a file."""

    name: str
    dtype: str  # NumPy's
    shape: str  # in the letters above; "sum of H R": layer by layer, each [H, R]
    unit: str
    level: str
    meaning: str


# Arrays of one level lie side by side in the file and have a checksum together. The big ones come first.
STEP = tuple(
    Stored(*row)
    for row in (
        ("token_id", "<i4", "T", "token id", "writes", "the token at each new position"),
        ("text", "|u1", "bytes", "UTF-8", "writes", "the tokens' texts, one after the other"),
        ("text_end", "<i4", "T", "bytes", "writes", "where each token's text ends"),
        ("turn", "<i4", "T", "index", "writes", "the turn of the conversation, from 0"),
        ("role", "|u1", "T", "ROLES", "writes", "whose turn it is"),
        ("chunk", "<i4", "T", "index", "writes", "the how-manieth call of its turn appended the token, from 0"),
        ("sampled", "|u1", "T", "0 or 1", "writes", "1 if the token was chosen from the prediction at the position before"),
        ("write_slot", "<i4", "L", "slot", "writes", "the first slot that the call wrote; the T slots are neighbours"),
        ("k_hash", "<u8", "L T G", "hash", "writes", "FNV-1a-64 over the 32-bit words of the key, each word as one unit"),
        ("v_hash", "<u8", "L T G", "hash", "writes", "the same of the value"),
        ("k_norm", "<f4", "L T G", "of a key", "writes", "Euclidean length of the key"),
        ("v_norm", "<f4", "L T G", "of a value", "writes", "Euclidean length of the value"),
        ("read_layer", "<i4", "L", "layer", "writes", "the layer of the cache that was read"),
        ("read_kv_head", "<i4", "L H", "head", "writes", "the key/value head that each query head read"),
        ("read_first", "<i4", "L T", "slot", "writes", "the first slot that each position read"),
        ("read_stop", "<i4", "L T", "slot", "writes", "one past the last slot that it read"),
        ("edit_kind", "|u1", "E", "EDITS", "writes", "what was intervened on; edit arrays are there only if something was"),
        ("edit_site", "|u1", "E", "EDIT_SITES", "writes", "where: an attention weight, a key, a value, a state"),
        ("edit_layer", "<i4", "E", "layer", "writes", "in which layer"),
        ("edit_head", "<i4", "E", "head", "writes", "of which query head; -1: of all"),
        ("edit_pos", "<i4", "E", "position", "writes", "the position that reads, or whose entry or state was changed"),
        ("edit_src", "<i4", "E", "position", "writes", "the position read; -1 where the edit is not of an edge"),
        ("weight", "<f4", "sum of H R", "share", "weights", "attention weights; with topk, those kept of each row"),
        ("weight_src", "<i4", "sum of H R", "slot", "weights", "only with topk: the slots of the weights kept, ascending"),
        ("score", "<f4", "sum of H R", "logit", "vectors", "the scores behind them: q . k, scaled; -inf where an edge was cut"),
        ("q", "<f4", "L T H hd", "of a query", "vectors", "the queries, after RoPE"),
        ("k", "<f4", "L T G hd", "of a key", "vectors", "the keys as cached: after RoPE"),
        ("v", "<f4", "L T G hd", "of a value", "vectors", "the values as cached"),
        ("z", "<f4", "L T H hd", "of a value", "vectors", "what each head found: the values it read, by weight"),
        ("resid_pre", "<f4", "L T D", "of the stream", "states", "the stream entering the layer; of layer 0, the embedding"),
        ("attn_out", "<f4", "L T D", "of the stream", "states", "what attention adds to it, after any post-norm"),
        ("resid_mid", "<f4", "L T D", "of the stream", "states", "the stream after that"),
        ("mlp_out", "<f4", "L T D", "of the stream", "states", "what the MLP adds, after any post-norm"),
        ("resid_post", "<f4", "L T D", "of the stream", "states", "the stream leaving the layer"),
        ("final_scale", "<f4", "T'", "factor", "states", "1 / sqrt(mean square + eps) of the final norm, last T' positions"),
        ("logits", "<f4", "T' V", "logit", "states", "the logits at the last T' positions: those that the call was asked for"),
    )
)  # fmt: skip

AUDIT = tuple(
    Stored(*row)
    for row in (
        ("k_by_slot", "<u8", "S", "hash", "writes", "of each slot: the sum of its keys' hashes, modulo 2^64"),
        ("v_by_slot", "<u8", "S", "hash", "writes", "the same of its values"),
        ("k_by_head", "<u8", "L G", "hash", "writes", "of each layer and head: the sum of its keys' hashes"),
        ("v_by_head", "<u8", "L G", "hash", "writes", "the same of its values"),
    )
)  # fmt: skip

# The keys of trace.json.
ABOUT = {
    "schema": f'"{NAME}"',
    "version": f"{VERSION}; it grows when a reader of the old one would be misled",
    "level": "one of " + ", ".join(LEVELS),
    "topk": "how many weights of a row are kept; null: all",
    "dtype": 'of floating columns: "float32", or "float64" of a model that was built so',
    "architecture": "one of " + ", ".join(ARCHITECTURES),
    "config": "the model's shape: the fields of nanokv.config.Config",
    "model_hash": "SHA-256 of config and weights",
    "model_name": "what the model was loaded as",
}

# The tables that a Trace gives: their columns, and the arrays that each is made of.
TABLES = {
    "tokens": {
        "pos": "position", "token_id": "token_id", "text": "text, text_end", "turn": "turn", "role": "role", "step": "file",
        "chunk": "chunk", "sampled": "sampled",
    },
    "writes": {
        "step": "file", "layer": "row", "slot": "write_slot + row", "pos": "position", "kv_head": "row", "turn": "turn",
        "role": "role", "k_hash": "k_hash", "v_hash": "v_hash", "k_norm": "k_norm", "v_norm": "v_norm",
    },
    "reads": {
        "step": "file", "layer": "row", "head": "row", "dst": "position", "src": "read_first to read_stop", "kv_layer":
        "read_layer", "kv_head": "read_kv_head", "slot": "read_first to read_stop", "kind": "KINDS, from dst, src and start",
        "turn": "turn", "role": "role", "weight": "weight", "score": "score",
    },
    "edits": {
        "step": "file", "kind": "edit_kind", "site": "edit_site", "layer": "edit_layer", "head": "edit_head",
        "pos": "edit_pos", "src": "edit_src",
    },
}  # fmt: skip

BY_NAME = {stored.name: stored for stored in STEP}
OPTIONAL = frozenset(name for name in BY_NAME if name.startswith("edit_") or name == "weight_src")


def holds(level: str, what: str) -> bool:
    """Whether a trace of this level holds what begins at level `what`."""
    return LEVELS.index(level) >= LEVELS.index(what)


def level_of(name: str) -> str:
    """From which level on a trace holds an array."""
    return BY_NAME[name].level


def dtype_of(stored: Stored, floats: str) -> str:
    """NumPy's name of an array's type in a trace whose floating columns are `floats` (float32 or float64)."""
    return "<f8" if stored.dtype == FLOAT and floats == "float64" else stored.dtype


def sizes(shape: str, letters: Mapping[str, int]) -> tuple[int | None, ...]:
    """The dimensions that a shape's letters stand for; None for what the letters given do not say."""
    return (None,) if shape.startswith("sum") else tuple(letters.get(letter) for letter in shape.split())
