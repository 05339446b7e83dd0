"""Paths: how many ways a thought can take, how long the longest is, and how deep the traffic of a real model is.

A way from a token to the prediction passes each block once, and at each block stays or moves to a later position. They are
counted, exactly, by what the architecture allows, and in the recorded graph of a run: wide, then, but no way is longer than
L blocks, unless the top is fed back. In SmolLM2 all reading of other positions above (or below) a layer is cut, and the
change of the prediction taken: is the depth that the pyramid grants used?
"""

from lab import Array, Lab, Verdict, documents, interval, kl, main, random_model, ranged, smollm2  # isort: skip
from math import comb

import numpy as np
from figures import Curves, figure

from nanokv import Cut
from nanokv.feedback import FeedbackTransformer
from nanokv.trace import Recorder, paths, reach

THREAD = (
    "with caveat, explained at the end",
    "it only allows it to see the how the reasoning was at that depth, not how it was after a full pass",
)
ADDS = "06 had one way through a program written by hand; this counts all ways, and cuts a real model's"
PAPERS = ("janus", "mozer")
FAR = (1, 16, 64, 512)  # tokens between
ENDS = (0, 1, 7, 31)  # positions


def traffic(tokens: Array, kept: list[range]) -> list[float]:
    """KL of the last prediction when positions read only themselves and position 0, but in these layers: for each of them."""
    model, pairs = smollm2(), [(dst, src) for dst in range(len(tokens)) for src in range(1, dst)]
    clean, found = model.forward(tokens, last_logits_only=True)[-1], []
    for layers in kept:
        cuts = [Cut(layer, *pair) for layer in range(30) if layer not in layers for pair in pairs]
        found.append(float(kl(clean, model.forward(tokens, edits=cuts, last_logits_only=True)[-1])))
    return found


def counted(lab: Lab) -> dict[int, Array]:
    """The tables of how many ways there are and how long the longest is; and the counts by depth, the nearest token first."""
    ways = {n: paths.possible(max(FAR) + 1, [None] * n)[0, ::-1] for n in (1, 2, 6, 30)}
    lab.check(all(ways[30][d] == comb(d + 29, 29) for d in FAR), "the count is C(D + L - 1, L - 1)")
    lab.table("Ways from one token to the prediction D tokens later", ("L", *(f"D = {d}" for d in FAR)),
              [[n, *(f"{ways[n][d]:.2g}" for d in FAR)] for n in (1, 6, 30)])  # fmt: skip
    kinds = {"standard, L = 6": {}, "feedback memory": {"architecture": "feedback"},
             "the sampled token in the loop": {"sampled": range(1, 32)}}  # fmt: skip
    rows = [[name, *reach.depth(32, [None] * 6, **kind)[-1, list(ENDS)].tolist()] for name, kind in kinds.items()]
    lab.table("Blocks on the longest way that ends at position t", ("model", *(f"t = {t}" for t in ENDS)), rows)
    lab.check(rows[0][1:] == [6] * 4, "in the standard model no way is longer than L, however many tokens there are")
    lab.check(rows[1][1:] == rows[2][1:] == [6 * (t + 1) for t in ENDS], "with feedback the longest is L (t + 1)")
    return ways


def recorded(lab: Lab) -> None:
    """The same of the graphs of two runs."""
    model, n = random_model(), 12
    fed = FeedbackTransformer(model.config, model.weights.map(np.asarray))
    for one, architecture, longest in ((model, "standard", 6), (fed, "feedback", n - 1)):
        recorder = Recorder(level="weights")
        one.forward(np.arange(n), observer=recorder)
        flow = recorder.trace.flow(one, measure="attention", heads="merged")
        allowed = paths.possible(n, [None] * 6, architecture=architecture)
        same = (flow.count_ways()[: len(allowed)] == allowed).all() and len(flow.longest_way().edges) == longest
        lab.check(bool(same), f"{architecture}: the recorded graph has all ways that are allowed; the longest: {longest}")


def run(lab: Lab) -> Verdict:
    ways = counted(lab)
    recorded(lab)
    texts = documents(24)[: lab.amount(2, 14)]
    bounds = (0, 15, 30) if lab.quick else tuple(range(0, 31, 3))
    below = np.array([traffic(text, [range(m) for m in bounds]) for text in texts])  # reading only below layer m
    above = np.array([traffic(text, [range(m, 30) for m in bounds]) for text in texts])
    means = {name: np.array([interval(column) for column in part.T])
             for name, part in (("only below layer m", below), ("only from layer m up", above))}  # fmt: skip
    rows = [[m, *(ranged(part[i]) for part in means.values())] for i, m in enumerate(bounds)]
    lab.table(f"SmolLM2: KL of the last prediction when positions read each other in some layers only ({len(texts)} texts of "
              "24 tokens)", ("m", *means), rows)  # fmt: skip
    lab.check(bool((below[:, -1] == 0).all() and (above[:, 0] == 0).all()), "with nothing cut nothing changes, exactly")
    nothing = float(below[:, 0].mean())
    lab.check(nothing > 1, "with everything cut the prediction is another one")
    lines = [(f"L = {n}", np.arange(1, 65), ways[n][1:65].astype(float)) for n in (2, 6, 30)]
    lab.draw(
        figure([Curves("Number of ways", lines, "tokens between", "ways", log_y=True),
                Curves("Where SmolLM2's traffic is", [(name, bounds, v[:, 0], v[:, 1], v[:, 2]) for name, v in means.items()],
                       "m", "KL of the last prediction, nats")]),
        "Left: many ways, none longer than L. Right: what is lost when positions read each other only below a layer, or only "
        "from it up (mean and 95% interval).",
    )  # fmt: skip
    half = bounds.index(15)
    lower, upper = (means[name][half][0] for name in means)
    return Verdict(
        "right",
        "Width grows without end (C(D + 29, 29) ways in 30 layers) while length stays L for every t; only feedback or a "
        "sampled token adds depth. Both halves of SmolLM2's depth carry traffic: reading in the lower 15 layers alone costs "
        f"{lower:.2g} nats, in the upper 15 alone {upper:.2g}, none at all {nothing:.2g} (what is cut is off the model's usual "
        "path, too).",
        anew="no way is longer than the 30 blocks of the stack, however many tokens there are",
        builds=f"{ways[30][16]:.1e} ways over 16 tokens; and without any reading between them {nothing:.2g} nats are lost",
    )


if __name__ == "__main__":
    main(run)
