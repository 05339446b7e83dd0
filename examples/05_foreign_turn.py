"""A foreign turn: tokens that the model did not choose, appended in one parallel chunk.

The first turn fills the cache. The second, by somebody else, is appended at once, and also token by token; then the
chunk's reading of the old cache is cut (position 0, which draws most of the attention whatever it holds, is left) to see
whether it "looks back" at all.
"""

from lab import Array, Lab, Verdict, kl, main, smollm2  # isort: skip
import time

import numpy as np
from figures import Curves, figure

from nanokv import Cut
from nanokv.trace import Recorder

THREAD = (
    "If you append tokens from another source, like in a turn base conversation, then the LLM will process all the new "
    "appended tokens in parallel while still being able to look back at it's previous internal state (and thus past "
    "reasoning/planning in latent space) from the already processed tokens, then will adjust the plan based on the new "
    "information.",
)
ADDS = "03 split one text; here the second part comes from somebody else"
PAPERS = ()
TURNS = (
    ("My sister Alice lives in Paris with her dog Rex. She paints houses for a living.",
     " What is the name of the dog of my sister? The dog's name is"),
    ("The box holds seven green apples and the bag holds two red pears.",
     " Somebody asks for a fruit that is green. We open the box and take one of the"),
    ("At noon the train to Madrid leaves from platform nine, and the train to Rome from platform four.",
     " I want to go to Madrid, so I walk to platform"),
    ("In the story a wizard called Merlin loses his silver ring in the lake.",
     " Days later a fisherman catches a fish, opens it, and finds in it a silver"),
)  # fmt: skip


def run(lab: Lab) -> Verdict:
    model = smollm2()
    encode, layers = model.tokenizer.encode, range(model.config.n_layers)
    same, effects, shares, rows = [], [], [], []
    for old_text, new_text in TURNS[: lab.amount(2, 4)]:
        old, new = encode(old_text), encode(new_text)
        first = model.new_cache()
        model.forward(old, first)
        recorder, chunk, steps = Recorder(level="weights"), first.copy(), first.copy()
        begun = time.process_time()
        at_once = model.forward(new, chunk, observer=recorder)
        middle = time.process_time()
        one_by_one = np.concatenate([model.forward([token], steps) for token in new])
        ended = time.process_time()
        keys = all(np.array_equal(chunk.keys(l), steps.keys(l)) and np.array_equal(chunk.values(l), steps.values(l))
                   for l in layers)
        same.append(np.array_equal(at_once, one_by_one) and keys)
        share = [looked_back(recorder.trace.steps[0].reads("weight", l), *recorder.trace.steps[0].pairs(l), len(old))
                 for l in layers]
        shares.append(share)
        cuts = [Cut(l, len(old) + i, src) for l in layers for i in range(len(new)) for src in range(1, len(old))]
        blind = model.forward(new, first.copy(), edits=cuts)
        said = [model.tokenizer.piece(int(logits[-1].argmax())) for logits in (at_once, blind)]
        effects.append(kl(at_once[-1], blind[-1]))
        rows.append([len(old), len(new), same[-1], f"1 against {len(new)}", (ended - middle) / (middle - begun), effects[-1],
                     *said])
    timing = "processor time, one by one / chunk"
    lab.table("SmolLM2: a turn appended as one chunk, and token by token",
              ("old tokens", "new", "same bits", "passes", timing, "KL if blind to the old", "says", "says if blind"),
              rows)  # fmt: skip
    lab.check(all(same), "one chunk and single steps leave the same cache and predictions, bit for bit")
    lab.check(min(effects) > 0.1, "a chunk that cannot read the old turn predicts something else")
    back = np.array(shares).mean(axis=0)
    lab.draw(
        figure([Curves("Looking back", [("mean of the turns", np.arange(len(back)), back)], "layer",
              "share of attention on the old turn",
              limits=(0, 1))]),
        "Of the attention that the appended tokens do not spend on position 0: how much goes to the turn before theirs.",
    )
    return Verdict(
        "right",
        "All new tokens were processed in one pass with the bits of single steps, and they look back: cut from the old turn "
        f"they predict something else (KL {min(effects):.2g} to {max(effects):.2g} nats in {len(effects)} dialogues). "
        "\"Plan\" is the thread's word: what is adjusted here is the prediction; how much the states move with surprise is "
        "measured in 14.",
        builds=f"cut from the turn before, appended tokens predict something else: KL {min(effects):.2g} nats or more",
    )


def looked_back(weights: Array, dst: Array, src: Array, n_old: int) -> float:
    """Of a layer's attention that is not on position 0, the part on the old turn; weights [H, R]."""
    total = weights.sum(axis=0)
    return float(total[(src > 0) & (src < n_old)].sum() / total[src > 0].sum())


if __name__ == "__main__":
    main(run)
