"""The light cone: exactly which states a thought can reach, and which it cannot, bit for bit.

Something is added to one state, `layer{l}.pos{s}`, and all states are compared, bit by bit, with those of a run without
it. In the standard model a change must reach its own position from that depth on, and later positions one layer above it
and higher; in the feedback model all layers of later positions; never an earlier position, nor the same depth elsewhere.
"""

from lab import Array, Lab, Verdict, documents, main, random_model, smollm2, states  # isort: skip
import numpy as np
from figures import Grid, figure

from nanokv import Add, Transformer
from nanokv.feedback import FeedbackTransformer

THREAD = (
    "Token T at layer L, can attend to a projection of the hidden states of all tokens < T at L.",
    "token_2 ──▶ h₂ᴸ ──attn──┼──▶ h₃ᴸ (refines reasoning)",
    "token N at layer L can attend to all other tokens <N but only at layer L",
)
ADDS = "01 says what is stored; this says whom it can reach"
PAPERS = ("janus",)


def changed(model: Transformer, tokens: Array, clean: Array, layer: int, pos: int) -> Array:
    """bool [L + 1, T]: the states that differ in any bit when layer{layer}.pos{pos} is changed."""
    top = layer == model.config.n_layers
    site, at = ("resid_post", layer - 1) if top else ("resid_pre", layer)
    vector = np.random.default_rng(layer).standard_normal(model.config.d_model).astype(np.float32)
    vector *= np.linalg.norm(clean[layer, pos]) / np.linalg.norm(vector)
    return (states(model, tokens, edits=[Add(site, at, pos, vector)]) != clean).any(axis=-1)


def cone(model: Transformer, n: int, layer: int, pos: int) -> Array:
    """bool [L + 1, n]: the states that it can reach."""
    l, t = np.arange(model.config.n_layers + 1)[:, None], np.arange(n)[None]
    lowest = 1 if isinstance(model, FeedbackTransformer) else layer + 1
    return ((t == pos) & (l >= layer)) | ((t > pos) & (l >= lowest))


def run(lab: Lab) -> Verdict:
    random, n = random_model(), 24
    fed = FeedbackTransformer(random.config, random.weights.map(np.asarray), name="feedback")
    rows, pictures = [], {}
    for model, tokens in ((random, np.arange(n)), (fed, np.arange(n)), (smollm2(), documents(n)[0])):
        depth, clean = model.config.n_layers, states(model, tokens)
        layers = range(depth + 1) if model is not smollm2() else range(0, depth + 1, lab.amount(15, 3))
        places = [(int(layer), pos) for layer in layers for pos in ((8,) if lab.quick else (0, 8, 20))]
        inside = outside = reached = 0
        for layer, pos in places:
            found, expected = changed(model, tokens, clean, layer, pos), cone(model, n, layer, pos)
            inside, reached = inside + int(expected.sum()), reached + int((found & expected).sum())
            outside += int((found & ~expected).sum())
            if pos == 8 and layer in (depth // 2, depth):
                pictures[model.name, layer == depth] = found
        total = len(places) * (depth + 1) * n
        rows.append([model.name, depth, len(places), total, inside, reached, outside])
    lab.table("States that differ in any bit",
              ("model", "L", "changes tried", "states compared", "in the cone", "of these changed",
              "changed outside"), rows)  # fmt: skip
    lab.check(all(row[6] == 0 for row in rows), "outside the cone no bit of any state changes")
    lab.check(all(row[5] == row[4] for row in rows), "inside the cone every state changes")
    top = pictures["smollm2-135m", True]
    lab.check(top.sum() == 1, "the top state of a position changes no other state: nobody reads it")
    depth = smollm2().config.n_layers
    grids = [("SmolLM2, from the middle", "smollm2-135m", False, 7), ("SmolLM2, from the top", "smollm2-135m", True, 7),
             ("standard, 6 layers", "random", False, 9), ("feedback, from the middle", "feedback", False, 9),
             ("feedback, from the top", "feedback", True, 9)]  # fmt: skip
    lab.draw(
        figure([Grid(title, pictures[name, end].astype(float), "position", "layer", cell=cell) for title, name, end,
                cell in grids]),
        "Blue: states that differ in at least one bit when position 8 is changed half-way up, or at the top. In the standard "
        "model a change goes up and to the right; from the top it goes nowhere. In the feedback model it reaches every layer.",
    )
    return Verdict(
        "right, with a condition",
        "Read as block inputs, the thread's arrows are exact: a state reaches later tokens one layer up and higher, and of "
        f"the {rows[2][3] - rows[2][4]:,} SmolLM2 states outside that cone {rows[2][6]} changed a bit. Read as block outputs "
        f"they are off by one: what leaves block {depth} is read by no other token (1 state changed, its own), so that a "
        "finished thought moves on only as a sampled token.",
        anew=f"what leaves block {depth} is read by no other token: 1 state changed, its own",
        builds=f"a state reaches all later tokens, a layer up: {rows[2][5]:,} of {rows[2][4]:,} changed, {rows[2][6]} others",
    )


if __name__ == "__main__":
    main(run)
