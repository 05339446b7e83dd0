"""Paths: how many ways a thought can take, how long the longest is, and how deep the traffic of a real model is.

Ways are counted by dynamic programming over the states: a way from `layer0.pos{s}` to `layer{L}.pos{t}` passes each block
once, and at each block stays or moves to a later position. Wide, then, but no way is longer than L blocks, unless the top
is fed back. In SmolLM2 all reading of other positions above (or below) a layer is cut, and the change of the prediction
taken: is the depth that the pyramid grants used?
"""

from lab import Array, Lab, Verdict, documents, interval, kl, main, smollm2  # isort: skip
from itertools import combinations_with_replacement
from math import comb

import numpy as np
from figures import Curves, figure

from nanokv import Cut

THREAD = (
    "with caveat, explained at the end",
    "it only allows it to see the how the reasoning was at that depth, not how it was after a full pass",
)
ADDS = "06 had one way through a program written by hand; this counts all ways, and cuts a real model's"
PAPERS = ("janus", "mozer")


def ways(n_layers: int, distance: int) -> int:
    """Ways from layer 0 to layer L, `distance` positions further."""
    at = [1] + [0] * distance
    for _ in range(n_layers):
        at = [sum(at[: pos + 1]) for pos in range(distance + 1)]
    return at[distance]


def longest(n_layers: int, t: int, feedback: bool) -> int:
    """Blocks on the longest way that ends in the top state of position t."""
    depth = np.zeros((n_layers + 1, t + 1), int)
    for pos in range(t + 1):
        for layer in range(n_layers):
            read = depth[n_layers, :pos] if feedback else depth[layer, :pos]
            depth[layer + 1, pos] = 1 + max([depth[layer, pos], *read])
    return int(depth[n_layers, t])


def traffic(tokens: Array, first: int, last: int) -> float:
    """KL of the last prediction when positions read only themselves and position 0, but in layers first to last - 1."""
    model, n = smollm2(), len(tokens)
    cuts = [Cut(layer, dst, src) for layer in range(30) if not first <= layer < last for dst in range(n)
            for src in range(1, dst)]
    clean = model.forward(tokens, last_logits_only=True)[-1]
    return float(kl(clean, model.forward(tokens, edits=cuts, last_logits_only=True)[-1]))


def run(lab: Lab) -> Verdict:
    brute = sum(1 for way in combinations_with_replacement(range(5), 3) if way is not None)  # 3 free stops in 5 positions
    lab.check(ways(4, 4) == brute == comb(4 + 4 - 1, 3), "the count is that of listing every way (4 layers, 4 positions "
                                                         "further)")
    far = (1, 16, 64, 512)
    lab.check(all(ways(30, d) == comb(d + 29, 29) for d in far), "the count is C(D + L - 1, L - 1)")
    lab.table("Ways from one token to the prediction D tokens later", ("L", *(f"D = {d}" for d in far)),
              [[n, *(f"{ways(n, d):.2g}" for d in far)] for n in (1, 6, 30)])  # fmt: skip
    ends = (0, 1, 7, 31)
    rows = [[name, *(longest(6, t, fed) for t in ends)] for name, fed in (("standard, L = 6", False), (
              "feedback, or the sampled token in the loop", True))]
    lab.table("Blocks on the longest way that ends at position t", ("model", *(f"t = {t}" for t in ends)), rows)
    lab.check(rows[0][1:] == [6] * 4, "in the standard model no way is longer than L, however many tokens there are")
    lab.check(rows[1][1:] == [6 * (t + 1) for t in ends], "with feedback the longest is L (t + 1)")

    texts = documents(24)[: lab.amount(2, 14)]
    bounds = (0, 15, 30) if lab.quick else (0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30)
    below = np.array([[traffic(text, 0, m) for m in bounds] for text in texts])  # reading only below layer m
    above = np.array([[traffic(text, m, 30) for m in bounds] for text in texts])
    means = {name: np.array([interval(column) for column in part.T])
             for name, part in (("only below layer m", below), ("only from layer m up", above))}
    lab.table(f"SmolLM2: KL of the last prediction when positions read each other in some layers only ({len(texts)} texts of "
              "24 tokens)",
              ("m", *means), [[m, *(f"{v[i][0]:.3g} [{v[i][1]:.3g}, "
                                    f"{v[i][2]:.3g}]" for v in means.values())] for i, m in enumerate(bounds)])  # fmt: skip
    lab.check(bool((below[:, -1] == 0).all() and (above[:, 0] == 0).all()), "with nothing cut nothing changes, exactly")
    nothing = float(below[:, 0].mean())
    lab.check(nothing > 1, "with everything cut the prediction is another one")
    d = np.arange(1, 65)
    lab.draw(
        figure([Curves("Number of ways", [(f"L = {n}", d, [float(ways(n, int(i))) for i in d]) for n in (2, 6, 30)],
                       "tokens between", "ways", log_y=True),
                Curves("Where SmolLM2's traffic is", [(name, bounds, v[:, 0], v[:, 1], v[:, 2]) for name, v in means.items()],
                       "m", "KL of the last prediction, nats")]),
        "Left: many ways, none longer than L. Right: what is lost when positions read each other only below a layer, or only "
        "from it up (mean and 95% interval).",
    )  # fmt: skip
    half = bounds.index(15)
    return Verdict(
        "right",
        "Width grows without end (C(D + 29, 29) ways in 30 layers) while length stays L for every t; only feedback or a "
        "sampled token adds "
        "depth. Both halves of SmolLM2's depth carry traffic: reading in the lower 15 layers alone costs "
        f"{means['only below layer m'][half][0]:.2g} "
        f"nats, in the upper 15 alone {means['only from layer m up'][half][0]:.2g}, none at all {nothing:.2g} (what is cut is "
        "off the model's usual path, too).",
    )


if __name__ == "__main__":
    main(run)
