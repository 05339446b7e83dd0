"""Models written by hand, whose flow is known exactly, edge by edge. Nothing is trained and no number is fitted.

A model's residual stream is cut into named ranges, one meaning each; every matrix copies one range to another, so that
each can be read off its picture. Scores differ by whole multiples of GAP or not at all, and exp(-GAP) is exactly 0: an
attention weight is exactly 0 or exactly 1, in float32 and in float64.

`induction` (Elhage et al. 2021, Olsson et al. 2022): "... A B ... A" is followed by B. Two layers, one head each.
`automaton`: one block advances a finite automaton by one step, so that a stack of L blocks has advanced position t
exactly when t <= L: the pyramid. Read by `feedback.FeedbackTransformer`, one block does for every t.
"""

from __future__ import annotations

from itertools import pairwise, permutations
from typing import Any

import numpy as np

from nanokv.config import Config
from nanokv.tokenizer import WordTokenizer
from nanokv.transformer import Transformer
from nanokv.weights import BlockWeights, Weights

SURE = 30  # the logit of the predicted token, all others having 0: its probability is 1 to twelve digits
GAP = 1000  # the least difference of two scores; exp(-1000) is 0 in float32 (below -104) and in float64 (below -746)

Array = np.ndarray


def induction(
    vocab_size: int = 256, n_ctx: int = 256, dtype: type[np.floating[Any]] = np.float32, *, ops: str = "numpy"
) -> Transformer:
    """The induction head: each position looks for the last place where its own token stood, and copies what followed.

    The stream is TOK (which token am I), POS (where am I), PREV (which token came before me; written by layer 0), OUT (my
    prediction; written by layer 1). Token 0 begins every text and is what a position without a match predicts.
    """
    v, t = vocab_size, n_ctx
    tok, pos, prev, out = _ranges(v, t, v, v)
    d, hd = 3 * v + t, max(t, v + 1)
    config = Config(
        n_layers=2, n_heads=1, n_kv_heads=1, head_dim=hd, d_model=d, d_ff=0, vocab_size=v, n_ctx=t, norm="none",
        learned_positions=True, attn_scale=1.0, gated_mlp=False, activation="relu", tied_head=False,
    )  # fmt: skip
    blocks = (_previous_token(d, hd, pos, tok, prev, t, dtype), _same_token(d, hd, tok, pos, prev, out, t, dtype))
    embed, head = np.zeros((v, d), dtype), np.zeros((v, d), dtype)
    embed[:, tok] = np.eye(v)  # a token is its own name
    head[:, out] = SURE * np.eye(v)
    pos_embed = np.zeros((t, d), dtype)
    pos_embed[:, pos] = np.eye(t)
    weights = Weights(embed=embed, blocks=blocks, head=head, pos_embed=pos_embed)
    return Transformer(config, weights, tokenizer=WordTokenizer(v), ops=ops, name="induction")


def _previous_token(
    d: int, hd: int, pos: slice, value: slice, to: slice, t: int, dtype: type[np.floating[Any]]
) -> BlockWeights:
    """Attention by which position t reads position t - 1, and itself at 0, and copies its range `value` into `to`.

    A query asks for a position by its number, q = GAP e[t-1]; a key says its own, k = e[s]: the score is GAP where
    s = t - 1, and 0 elsewhere.
    """
    wq, wk, wv, wo = np.zeros((hd, d), dtype), np.zeros((hd, d), dtype), np.zeros((hd, d), dtype), np.zeros((d, hd), dtype)
    wq[:t, pos] = GAP * np.eye(t, k=1)
    wq[0, pos.start] = GAP
    wk[:t, pos] = np.eye(t)
    n = value.stop - value.start
    wv[:n, value] = np.eye(n)
    wo[to, :n] = np.eye(n)
    return BlockWeights(wq=wq, wk=wk, wv=wv, wo=wo, w_up=np.zeros((0, d), dtype), w_down=np.zeros((d, 0), dtype))


def _same_token(
    d: int, hd: int, tok: slice, pos: slice, prev: slice, out: slice, t: int, dtype: type[np.floating[Any]]
) -> BlockWeights:
    """Attention by which a position reads the last one whose PREV is its own TOK, else position 0, and copies its TOK.

    The score is match [PREV(s) = TOK(t)] + first [s = 0] + GAP s. A later match beats an earlier one by GAP; position 0
    beats everything that does not match, since first > GAP s for all s; a match beats position 0.
    """
    v = tok.stop - tok.start
    first = GAP * (t + 1)
    match = first + GAP * (t + 1)
    wq, wk, wv, wo = np.zeros((hd, d), dtype), np.zeros((hd, d), dtype), np.zeros((hd, d), dtype), np.zeros((d, hd), dtype)
    wq[:v, tok] = match * np.eye(v)
    wk[:v, prev] = np.eye(v)
    wq[v, pos] = 1  # feature v is a constant in the query, so that feature v of a key is a bias on its position
    wk[v, pos] = GAP * np.arange(t)
    wk[v, pos.start] += first
    wv[:v, tok] = np.eye(v)
    wo[out, :v] = np.eye(v)
    return BlockWeights(wq=wq, wk=wk, wv=wv, wo=wo, w_up=np.zeros((0, d), dtype), w_down=np.zeros((d, 0), dtype))


def automaton(
    n: int = 5, n_layers: int = 8, n_ctx: int = 64, dtype: type[np.floating[Any]] = np.float32, *, ops: str = "numpy"
) -> Transformer:
    """The permutations of n things, multiplied up step by step: the token at each position is one of two generators of the
    group S_n (swap the first two; turn all), the state the product so far. With n = 5 it is S5's word problem.

    The stream is STATE (which permutation; zero while unknown), PREV (the STATE of the position before, as layer l - 1 left
    it), TOK, POS. Every block is the same one. The vocabulary is the beginning, "swap", "turn", then the states' names, which
    are what is predicted: the state after layer L.
    """
    states = list(permutations(range(n)))
    swap, turn = (1, 0, *range(2, n)), (*range(1, n), 0)
    index = {state: i for i, state in enumerate(states)}
    step = np.array([[index[tuple(state[i] for i in move)] for move in (swap, turn)] for state in states])  # [S, 2]
    s, (state, prev, tok, pos) = len(states), _ranges(len(states), len(states), 3, n_ctx)
    d, v = 2 * s + 3 + n_ctx, 3 + s
    w_up, b_up, w_down = _advance(step, state, prev, tok, d, dtype)
    config = Config(
        n_layers=n_layers, n_heads=1, n_kv_heads=1, head_dim=max(n_ctx, s), d_model=d, d_ff=len(w_up), vocab_size=v,
        n_ctx=n_ctx, norm="none", learned_positions=True, attn_scale=1.0, gated_mlp=False, activation="relu",
        mlp_bias=True, tied_head=False,
    )  # fmt: skip
    attention = _previous_token(d, config.head_dim, pos, state, prev, n_ctx, dtype)
    block = BlockWeights(
        wq=attention.wq, wk=attention.wk, wv=attention.wv, wo=attention.wo,
        w_up=w_up, b_up=b_up, w_down=w_down, b_down=np.zeros(d, dtype),
    )  # fmt: skip
    embed, head, pos_embed = np.zeros((v, d), dtype), np.zeros((v, d), dtype), np.zeros((n_ctx, d), dtype)
    embed[:3, tok] = np.eye(3)
    embed[0, state.start] = 1  # before any token the state is the identity, states[0]
    embed[3:, state] = np.eye(s)
    head[3:, state] = SURE * np.eye(s)
    pos_embed[:, pos] = np.eye(n_ctx)
    weights = Weights(embed=embed, blocks=(block,) * n_layers, head=head, pos_embed=pos_embed)
    names = ["swap", "turn", *("".join(str(i + 1) for i in state) for state in states)]
    return Transformer(config, weights, tokenizer=WordTokenizer(v, names), ops=ops, name="automaton")


def _advance(
    step: Array, state: slice, prev: slice, tok: slice, d: int, dtype: type[np.floating[Any]]
) -> tuple[Array, Array, Array]:
    """An MLP that replaces STATE by the automaton's next state: w_up [F, D], b_up [F], w_down [D, F].

    For each state i and move a, relu(PREV_i + TOK_a - 1) is 1 exactly when both hold, and adds STATE step[i, a]. The
    beginning adds states[0]. Three kinds of units erase: what STATE and PREV held is subtracted from them.
    """
    s, moves = step.shape
    f = s * moves + 1 + 2 * s
    w_up, b_up, w_down = np.zeros((f, d), dtype), np.zeros(f, dtype), np.zeros((d, f), dtype)
    i, a = np.divmod(np.arange(s * moves), moves)
    unit = np.arange(s * moves)
    w_up[unit, prev.start + i] = w_up[unit, tok.start + 1 + a] = 1
    b_up[unit] = -1
    w_down[state.start + step[i, a], unit] = 1
    w_up[s * moves, tok.start] = w_down[state.start, s * moves] = 1
    for erased, units in ((state, s * moves + 1 + np.arange(s)), (prev, s * moves + 1 + s + np.arange(s))):
        w_up[units, erased] = np.eye(s)
        w_down[erased, units] = -np.eye(s)
    return w_up, b_up, w_down


def _ranges(*lengths: int) -> list[slice]:
    ends = np.cumsum((0, *lengths)).tolist()
    return [slice(a, b) for a, b in pairwise(ends)]
