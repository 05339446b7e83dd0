"""Level 0: whole numbers alone. Which head reads which, which slot is read, which features are a pair."""

from __future__ import annotations

from typing import Any

from making.cases import case


def cases() -> list[dict[str, Any]]:
    made = []
    for name, h, g, comment in (
        ("six_of_two", 6, 2, "h // G and h % G are wrong from the second head on"),
        ("six_of_three", 6, 3, "h // G stays inside of G, and is wrong all the same"),
        ("nine_of_three", 9, 3, "SmolLM2-135M's heads: here h // G happens to be right, h % G is not"),
        ("five_of_five", 5, 5, "each query head has its own"),
        ("four_of_one", 4, 1, "all share one"),
    ):
        made.append(case(f"kv_head/{name}", "kv_head", {"n_heads": h, "n_kv_heads": g}, comment))
    for name, start, n, window, comment in (
        ("whole_prompt", 0, 4, None, "each position reads itself and what was before"),
        ("chunk", 5, 3, None, "a chunk reads what is cached, and itself"),
        ("one_token", 9, 1, None, "the usual step of decoding"),
        ("window", 0, 7, 3, "the window counts the position itself"),
        ("window_in_a_chunk", 6, 3, 4, "rows begin at different slots"),
        ("window_of_one", 2, 2, 1, "a window of one is the position itself"),
    ):
        made.append(case(f"reads/{name}", "reads", {"start": start, "n": n, "window": window}, comment))
    for name, pairs in (("halves", "halves"), ("neighbours", "neighbours")):
        made.append(case(f"rope_pairs/{name}", "rope_pairs", {"head_dim": 8, "pairs": pairs}))
    made.append(case("offset/a_key", "offset", {"shape": [3, 7, 2, 8], "index": [2, 4, 1, 5]},
                     "layer 2, slot 4, key/value head 1, feature 5 of [L, S, G, hd]"))  # fmt: skip
    made.append(case("offset/a_weight", "offset", {"shape": [6, 20], "index": [3, 7]},
                     "output 3, input 7 of [outputs, inputs]"))  # fmt: skip
    return made
