"""Knock out and transplant: where in the cache does a fact lie that the last token will say?

By hand first, exactly: in the induction model one entry's key decides whether it is found, its value what is said. In
SmolLM2 two texts differ in a country; keys and values of the one are put into the cache of the other, for a position and
six layers at a time, and the last token alone is computed. 0: nothing moved; 1: it says the other capital as surely as
the other text does. And as the answer forms, its rank among all tokens is taken at each layer: does a later state refine
the earlier ones?
"""

from lab import Array, Lab, Verdict, interval, main, smollm2, states, with_interval  # isort: skip
import numpy as np
from figures import Curves, Grid, figure

from nanokv import Cut, KVCache, Replace, Transformer, transplant
from nanokv.handmade import induction

THREAD = (
    "when the model is processing token N, it can check it's past internal state during token 1,...,N-1, and thus \"see\" its "
    "previous plan and reasoning, and iterate over it, rather than just repeating everything from scratch in each token's "
    "hidden state",
)
ADDS = "15 read thoughts; this changes them, entry by entry"
PAPERS = ("geva", "ma26", "belitsky", "lindsey_intro")
WINDOW = 6
CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Germany": "Berlin", "Spain": "Madrid", "Japan": "Tokyo", "Russia": "Moscow",
    "Egypt": "Cairo", "Greece": "Athens", "Ireland": "Dublin", "Cuba": "Havana", "Austria": "Vienna", "Poland": "Warsaw",
    "Norway": "Oslo", "Portugal": "Lisbon",
}  # fmt: skip


def prefilled(model: Transformer, tokens: list[int]) -> KVCache:
    cache = model.new_cache()
    model.forward(tokens[:-1], cache)
    return cache


def by_hand() -> list[list[object]]:
    """The induction model on [0 3 7 5 9 3]: what it says when the entry of position 2 in layer 1 comes from another text."""
    model, ids = induction(12, 24), [0, 3, 7, 5, 9, 3]
    own, word, before = (prefilled(model, text) for text in (ids, [0, 3, 8, 5, 9, 3], [0, 4, 7, 5, 9, 3]))
    edits = {"nothing": [], "its value, from a text with 8 there": [Replace(1, 2, v=word.values(1)[2])],
             "its key, from a text with 4 before it": [Replace(1, 2, k=before.keys(1)[2])]}  # fmt: skip
    return [[name, int(model.forward(ids[-1:], own.copy(), edits=edit)[-1].argmax())] for name, edit in edits.items()]


def moved(model: Transformer, a: list[int], b: list[int], said_a: int, said_b: int) -> tuple[Array, float, float]:
    """[windows, positions]: how far b's entries move a's answer to b's; all of the country's layers; its knock-out."""
    ours, theirs = prefilled(model, a), prefilled(model, b)

    def difference(cache: KVCache, edits: list) -> float:
        logits = model.forward(a[-1:], cache.copy(), edits=edits)[-1]
        return float(logits[said_b] - logits[said_a])

    low, high = difference(ours, []), difference(theirs, [])
    starts = range(0, 30 - WINDOW + 1, 3)
    part = [[(difference(ours, [transplant(theirs, l, pos) for l in range(s, s + WINDOW)]) - low) / (high - low)
             for pos in range(len(a) - 1)] for s in starts]
    country = int(np.flatnonzero(np.array(a) != np.array(b))[0])
    whole = (difference(ours, [transplant(theirs, l, country) for l in range(30)]) - low) / (high - low)
    cut = (difference(ours, [Cut(l, len(a) - 1, country) for l in range(30)]) - low) / (high - low)
    return np.array(part), whole, cut


def ranks(model: Transformer, tokens: list[int], answer: int) -> Array:
    """[L + 1, T]: at how many tokens' distance from the first place the answer is when the head reads each state."""
    h = states(model, tokens)
    logits = np.stack([model.ops.linear(model.norm(x, model.weights.final_norm, None), model.weights.head) for x in h])
    return (logits > logits[..., answer, None]).sum(axis=-1)


def transplanted(lab: Lab, model: Transformer, known: list[tuple[list[int], int]]) -> Array:
    """The tables of what transplants do; [windows, positions] how far they move the answer."""
    pairs = list(zip(known, known[1:] + known[:1], strict=True))[: lab.amount(2, 8)]
    found = [moved(model, list(a), list(b), said_a, said_b) for (a, said_a), (b, said_b) in pairs]
    grid, whole, cut = np.mean([part for part, _, _ in found], axis=0), [w for _, w, _ in found], [c for _, _, c in found]
    lab.table(f"SmolLM2, {len(pairs)} pairs of countries whose capital it knows: entries transplanted, six layers at a time "
              "(mean)", ("layers", *words(model, known)),
              [[f"{3 * i} to {3 * i + WINDOW - 1}", *row] for i, row in enumerate(grid)])  # fmt: skip
    lab.table("The country's entries", ("in all layers", "how far the answer moves [95%]"),
              [["transplanted", with_interval(whole)], ["not read by the last token", with_interval(cut)]])  # fmt: skip
    lab.check(np.abs(np.array(whole) - 1).max() < 1e-4,
              "with all its layers transplanted the last token says what it says in the other text")  # fmt: skip
    lab.check(grid[:, 3].max() > 0.5, "six layers of one position carry most of the answer over")
    lab.check(np.abs(grid[:, :3]).max() == 0, "entries of positions before the country move nothing, exactly")
    return grid


def words(model: Transformer, known: list[tuple[list[int], int]]) -> list[str]:
    """The words of a text but the last, the country's name left open."""
    first = [model.tokenizer.piece(token) for token in known[0][0][:-1]]
    return [*first[:3], " (country)", *first[4:]]


def refined(lab: Lab, model: Transformer, known: list[tuple[list[int], int]]) -> Array:
    """The table of the answer's rank, [facts, L + 1, T]."""
    rank = np.stack([ranks(model, list(tokens), said) for tokens, said in known[: lab.amount(3, 14)]])
    lab.table(f"Rank of the answer among 49,152 tokens, read off each state ({len(rank)} facts, median)",
              ("layer", "at the country", "at the last token"),
              [[l, *np.median(rank[:, l][:, [3, -1]], axis=0).astype(int).tolist()] for l in (0, 10, 15, 20, 25, 30)])
    lab.check(np.median(rank[:, 30, -1]) == 0 and np.median(rank[:, 15, -1]) > 10,
              "the answer is made in the upper half of the last token's stack")  # fmt: skip
    return rank


def run(lab: Lab) -> Verdict:
    rows = by_hand()
    lab.table("Induction, by hand: the entry that is read (layer 1, position 2) replaced", ("replaced", "the model says"), rows)
    lab.check([said for _, said in rows] == [7, 8, 0], "the value of an entry is what is said, its key whether it is found")

    model, encode = smollm2(), smollm2().tokenizer.encode
    facts = [(encode(f"The capital of {country} is"), encode(" " + capital)[0]) for country, capital in CAPITALS.items()
             if len(encode(" " + country)) == 1]  # fmt: skip
    known = [(text, said) for text, said in facts if model.forward(text, last_logits_only=True)[-1].argmax() == said]
    grid, rank = transplanted(lab, model, known), refined(lab, model, known)
    last, country = (np.array([interval(column) for column in np.log10(1 + rank[:, :, pos]).T]) for pos in (-1, 3))
    lines = [("at the last token", range(31), *last.T), ("at the country", range(31), *country.T)]
    windows = [f"{3 * i}–{3 * i + WINDOW - 1}" for i in range(len(grid))]
    lab.draw(figure([Grid("Transplanted: how far the answer moves", grid, "", "layers", columns=words(model, known),
                          rows=windows, cell=34, marks=np.vectorize("{:.2f}".format)(np.round(grid, 2) + 0.0)),
                     Curves("Rank of the answer", lines, "layer", "log10 of 1 + rank")]),
             "Left: where in the cache the country's capital can be changed. Right: where the answer forms (mean and 95% "
             "interval).")  # fmt: skip
    best = int(grid[:, 3].argmax())
    return Verdict(
        "right",
        f"Later tokens take ready-made results from the cache: of the country's position, layers {3 * best} to "
        f"{3 * best + WINDOW - 1} alone, put into another text, move the answer by {grid[best, 3]:.0%} of the way to that "
        "text's capital (all layers: 100%; positions before the country: exactly 0). And it is refined, not repeated: at the "
        f"last token the answer goes from rank {np.median(rank[:, 15, -1]):,.0f} at layer 15 to 0 at the top.",
        builds=f"six layers of one country's entries, put into another's text, move the answer {grid[best, 3]:.0%} of the way",
    )


if __name__ == "__main__":
    main(run)
