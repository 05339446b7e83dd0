"""The trace's one definition: what is stored, of what type and shape, from which level on, and what it means.

The store, its checks and the documentation's table are derived from this page. A trace is a folder NAME.nkv: `trace.json`,
and one `step-000000.safetensors` for each forward call, which holds the arrays below. Numbers are little-endian, arrays
row-major, states and weights float32. The letters are those of the code: T new positions of the call, L layers, H query
heads, G key/value heads, hd head dimension, D width, V vocabulary; R is the number of reads of one layer, that is of pairs
of a position and a slot that it reads, by position and then by slot.
"""

from __future__ import annotations

from dataclasses import dataclass

NAME, VERSION = "nanokv-trace", 1

LEVELS = ("writes", "weights", "vectors", "states")  # each holds what those before it hold
ROLES = ("user", "model", "system", "tool")
KINDS = ("self", "past", "chunk")  # of a read: of its own position; of a slot written in an earlier call; in this call


@dataclass(frozen=True)
class Stored:
    """One array of a step's file."""

    name: str
    dtype: str  # NumPy's
    shape: str
    level: str
    meaning: str


STORED = tuple(
    Stored(*row)
    for row in (
        ("token_id", "<i4", "T", "writes", "the token at each new position"),
        ("text", "|u1", "bytes", "writes", "the tokens' texts, one after the other, in UTF-8"),
        ("text_end", "<i4", "T", "writes", "where each token's text ends, in bytes"),
        ("turn", "<i4", "T", "writes", "the turn of the conversation, from 0"),
        ("role", "|u1", "T", "writes", "whose turn it is: an index into ROLES"),
        ("chunk", "<i4", "T", "writes", "the how-manieth call of its turn appended the token, from 0"),
        ("sampled", "|u1", "T", "writes", "1 if the token was chosen from the prediction at the position before"),
        ("write_slot", "<i4", "L", "writes", "the first slot that the call wrote; the T slots are neighbours"),
        ("k_hash", "<u8", "L T G", "writes", "FNV-1a-64 over the 32-bit words of the key, each word as one unit"),
        ("v_hash", "<u8", "L T G", "writes", "the same of the value"),
        ("k_norm", "<f4", "L T G", "writes", "Euclidean length of the key"),
        ("v_norm", "<f4", "L T G", "writes", "Euclidean length of the value"),
        ("read_layer", "<i4", "L", "writes", "the layer of the cache that was read"),
        ("read_kv_head", "<i4", "L H", "writes", "the key/value head that each query head read"),
        ("read_first", "<i4", "L T", "writes", "the first slot that each position read"),
        ("read_stop", "<i4", "L T", "writes", "one past the last slot that it read"),
        ("weight", "<f4", "sum of H R", "weights", "attention weights, layer by layer, each [H, R]"),
        ("score", "<f4", "sum of H R", "vectors", "the scores behind them: q . k, scaled; -inf where an edge was cut"),
        ("k", "<f4", "L T G hd", "vectors", "the keys as cached: after RoPE"),
        ("v", "<f4", "L T G hd", "vectors", "the values as cached"),
        ("resid_pre", "<f4", "L T D", "states", "the residual stream entering the layer; of layer 0, the embedding"),
        ("attn_out", "<f4", "L T D", "states", "what attention adds to it, after any post-norm"),
        ("resid_mid", "<f4", "L T D", "states", "the stream after that"),
        ("mlp_out", "<f4", "L T D", "states", "what the MLP adds, after any post-norm"),
        ("resid_post", "<f4", "L T D", "states", "the stream leaving the layer"),
        ("final_scale", "<f4", "T'", "states", "1 / sqrt(mean square + eps) of the final norm, of the T' last positions"),
        ("logits", "<f4", "T' V", "states", "the logits of the T' last positions: those that the call was asked for"),
    )
)

SITES = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")


def holds(level: str, what: str) -> bool:
    """Whether a trace of this level holds what begins at level `what`."""
    return LEVELS.index(level) >= LEVELS.index(what)
