"""Working memory: x = 3 ... x = 5. What is overwritten when nothing can be?

The induction model is told x is 3, later that x is 5, and asked for x. SmolLM2 is told the colour of a box, again and
again another one. The entries of the old value are hashed before and after; what moves is who is read.
"""

from lab import Lab, Verdict, interval, log_softmax, main, smollm2, with_interval  # isort: skip
import numpy as np
from figures import Curves, figure

from nanokv import Cut, KVCache, Transformer
from nanokv.handmade import induction
from nanokv.trace import Recorder

THREAD = (
    "an odd sort of \"working memory\" if you can't actually update it to reflect progress on what you are working on, or "
    "update per new information (new unexpected token having been sampled).",
)
ADDS = "04 found no entry rewritten; this asks what serves instead"
PAPERS = ("karpathy", "huang25")
COLOURS = ("red", "blue", "green", "black", "white", "gold", "yellow", "orange", "purple", "pink", "brown", "grey")


def entries(cache: KVCache, n: int) -> bytes:
    """Keys and values of the first n positions, all layers."""
    return b"".join(np.ascontiguousarray(part[:n]).tobytes() for l in range(cache.config.n_layers)
                    for part in (cache.keys(l), cache.values(l)))


def by_hand(model: Transformer) -> tuple[list[str], bool, list[int]]:
    """What the induction model answers before and after the new value, whether the old entries stayed, and whom it reads."""
    words = "let x 3 and y 7 then x"
    tokens, cache, answers, read = model.tokenizer.encode(words), model.new_cache(), [], []
    for more in (tokens, model.tokenizer.encode(words + " 5 and now x")[len(tokens) :]):
        recorder = Recorder(level="weights")
        before = entries(cache, cache.length), cache.length
        answers.append(model.tokenizer.piece(int(model.forward(more, cache, observer=recorder)[-1].argmax())))
        read.append(int(recorder.trace.steps[0].reads("weight", 1)[0, -cache.length :].argmax()))
    return answers, entries(cache, before[1]) == before[0], read


def colours(model: Transformer, random: np.random.Generator, updates: int) -> tuple[list[float], bool]:
    """Probability among all colours told of the newest and of the likeliest older one, and what cutting their reading does."""
    encode, told = model.tokenizer.encode, random.choice(COLOURS, updates + 1, replace=False)
    pieces = ["The box is " + told[0] + ".", *(f" Then somebody paints the box {colour}." for colour in told[1:])]
    cache, spans = model.new_cache(), []
    stayed = True
    for piece in pieces:
        spans.append((cache.length, cache.length + len(encode(piece))))
        before = entries(cache, cache.length), cache.length
        model.forward(encode(piece), cache)
        stayed &= entries(cache, before[1]) == before[0]
    ids, question = [encode(" " + colour)[0] for colour in told], encode(" Now the color of the box is")
    found = []
    for blind in (None, spans[-1], spans[0]):
        cuts = [] if blind is None else [Cut(l, cache.length + i, src) for l in range(30) for i in range(len(question))
                                         for src in range(max(1, blind[0]), blind[1])]
        p = np.exp(log_softmax(model.forward(question, cache.copy(), edits=cuts)[-1][ids]))
        found += [float(p[-1]), float(p[:-1].max()) if updates else 0.0]
    return found, stayed


def run(lab: Lab) -> Verdict:
    model = induction()
    answers, stayed, read = by_hand(model)
    lab.table("Induction, by hand: let x 3 and y 7 then x 5 and now x", ("asked", "answers", "its last position reads"),
              [["before x 5", answers[0], read[0]], ["after x 5", answers[1], read[1]]])  # fmt: skip
    lab.check(answers == ["3", "5"], "the answer moves from the old value to the new")
    lab.check(stayed and read[0] != read[1], "no entry of the old value changed; another is read")

    random, draws, counts = np.random.default_rng(0), lab.amount(4, 16), (1, 3) if lab.quick else (1, 2, 4, 8)
    rows, results = [], {}
    for updates in counts:
        runs = [colours(smollm2(), random, updates) for _ in range(draws)]
        stayed &= all(same for _, same in runs)
        results[updates] = np.array([found for found, _ in runs])
        newest = results[updates]
        rows.append([updates, f"{(newest[:, 0] > newest[:, 1]).mean():.0%}", *(with_interval(newest[:, i]) for i in (0, 2, 4)),
                     1 / (updates + 1)])
    lab.table(f"SmolLM2: a box is painted again and again; probability of the newest colour among those told ({draws} draws "
              "each)",
              ("times repainted", "newest is likeliest", "newest [95%]", "if its telling is not read",
              "if the first telling is not read",
              "by chance"),
              rows)  # fmt: skip
    lab.check(stayed, "no key or value of an earlier telling changed in any bit")
    one = results[1]
    lab.check(interval(one[:, 0] - one[:, 2])[1] > 0, "what makes the newest colour likely is the reading of its telling")
    means = {name: np.array([interval(results[k][:, i]) for k in counts]) for name, i in
             (("asked freely", 0), ("the newest telling not read", 2), ("the first telling not read", 4))}  # fmt: skip
    lab.draw(figure([Curves("Which colour is the box?", [*((name, counts, *m.T) for name, m in means.items()),
                     ("chance", counts, [1 / (k + 1) for k in counts])], "times repainted",
              "probability of the newest colour", limits=(0, 1))]),
             "Nothing is overwritten, the reading moves; how well depends on the model (mean and 95% interval).")  # fmt: skip
    free, without, alone = (f"{interval(one[:, i])[0]:.0%}" for i in (0, 2, 4))
    last, by_chance = results[counts[-1]][:, 0], 1 / (counts[-1] + 1)
    return Verdict(
        "right, with a condition",
        "It cannot be updated in place: of the old value's entries no bit changed, by hand and in SmolLM2. What can change is "
        "who is read, and how well that serves depends on the model: the induction model answers 3, then 5, exactly; SmolLM2 "
        f"gives the newest of two colours {free} (chance 50%), {without} if it may not read its telling, {alone} if it may "
        f"not read the older one, which still competes; after {counts[-1]} repaintings {interval(last)[0]:.0%} (chance "
        f"{by_chance:.0%}).",
        anew=f"no bit of an old value changed, so it still competes: p = {free} for the newer of two colours",
        builds=f"who is read moves: by hand from 3 to 5, exactly; SmolLM2's p falls to {without} if it may not read the newer",
    )


if __name__ == "__main__":
    main(run)
