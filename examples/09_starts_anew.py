"""Does it start anew at each token? Words and thoughts of the past, taken apart.

Twice the words of the past stay readable and only what earlier positions made of their context is taken away. The
isolated past: every earlier position may see itself, the w - 1 positions before it, and position 0; the last position
then reads these thoughtless states. D(w) is what that does to the prediction: near 0, if nothing but words counted. The
relay: a text tells a word, goes on about something else, and asks for the word, while the question cannot read the place
where it was told. What it still knows came through what the words in between, the same for every word told, thought.
"""

from lab import Array, Lab, Verdict, documents, interval, kl, main, smollm2, with_interval  # isort: skip
import numpy as np
from figures import Curves, figure

from nanokv import Cut

THREAD = (
    'I still think they "start anew at each token" because they have no state/memory that is not the output.',
    "So you cannot consider token n to be starting from scratch in terms of reasoning/planning as it can reuse what has "
    "already been planned in previous tokens.",
    'I guess this is differing interpretations of the meaning of "start anew"',
)
ADDS = "the disagreement itself, with a measure for which pictures are not needed"
PAPERS = ("c2c", "lindsey_intro", "huang25")
WORDS = (
    "red", "blue", "green", "black", "white", "gold", "silver", "north", "south", "east", "west", "cat", "dog", "horse",
    "bird", "fish", "apple", "bread", "water", "fire",
)
TOLD, ASKED = "Remember this. The secret word is", " The secret word is"
BETWEEN = ". Please keep it in mind while we walk to the market and buy some food."


def isolated(tokens: Array, window: int) -> list[Cut]:
    """Cuts by which every position but the last sees itself, window - 1 before it, and position 0."""
    return [Cut(layer, dst, src) for layer in range(30) for dst in range(len(tokens) - 1) for src in range(1, dst - window + 1)]


def relay(first: str, second: str) -> list[float]:
    """Logit differences first - second, after telling the first less after telling the second: free, question cut, and both."""
    model = smollm2()
    encode = model.tokenizer.encode
    a, b = encode(" " + first)[0], encode(" " + second)[0]
    told, between, asked = len(encode(TOLD)), len(encode(BETWEEN)), len(encode(ASKED))
    question = range(told + 1 + between, told + 1 + between + asked)
    cut_question = [Cut(layer, dst, told) for layer in range(30) for dst in question]
    cut_all = [Cut(layer, dst, told) for layer in range(30) for dst in range(told + 1, question.stop)]
    found = []
    for edits in ([], cut_question, cut_all):
        told_a, told_b = (model.forward([*encode(TOLD), word, *encode(BETWEEN), *encode(ASKED)], edits=edits,
                                        last_logits_only=True)[-1] for word in (a, b))
        found.append(float((told_a[a] - told_a[b]) - (told_b[a] - told_b[b])))
    return found


def run(lab: Lab) -> Verdict:
    model, n = smollm2(), lab.amount(20, 40)
    texts = documents(n)[: lab.amount(2, 16)]
    windows, divergences, agree, nothing = (1, 4, n) if lab.quick else (1, 2, 4, 8, 16, n), [], [], []
    for tokens in texts:
        clean = model.forward(tokens, last_logits_only=True)[-1]
        edited = [model.forward(tokens, edits=isolated(tokens, w), last_logits_only=True)[-1] for w in windows]
        divergences.append([float(kl(clean, logits)) for logits in edited])
        agree.append([logits.argmax() == clean.argmax() for logits in edited])
        alone = [Cut(layer, n - 1, src) for layer in range(30) for src in range(1, n - 1)]
        nothing.append(float(kl(clean, model.forward(tokens, edits=alone, last_logits_only=True)[-1])))
    d, same = np.array(divergences), np.array(agree)
    rows = [[w if w < n else f"{w} (all)", with_interval(d[:, i]), f"{same[:, i].mean():.0%}"] for i, w in enumerate(windows)]
    lab.table(f"SmolLM2: the last prediction when earlier positions saw w words only ({len(texts)} texts of {n} tokens)",
              ("w", "D(w), nats [95%]", "same first choice"),
              [["no past at all", with_interval(nothing), ""], *rows])  # fmt: skip
    lab.check((d[:, -1] == 0).all(), "with nothing isolated the prediction is the same, exactly")
    lab.check(interval(d[:, 0])[1] > 0.1, "taking the earlier positions' context away changes the prediction (D(1) > 0.1 nats)")

    ids = {word: model.tokenizer.encode(" " + word) for word in WORDS}
    words = [word for word in WORDS if len(ids[word]) == 1]
    pairs = list(zip(words, words[1:] + words[:1], strict=True))[: lab.amount(2, 20)]
    free, cut, control = np.array([relay(*pair) for pair in pairs]).T
    share = cut / free
    rows = [["everything", with_interval(free), "1"],
            ["not the place where it was told", with_interval(cut), with_interval(share)],
            ["the same, and the words between neither", with_interval(control), "0, exactly" if not control.any() else ""]]
    lab.table(f"SmolLM2: the relay, {len(pairs)} pairs of words told",
              ("question reads", "logit difference [95%]", "share of it [95%]"), rows)  # fmt: skip
    lab.check((control == 0).all(), "with no way left the two tellings give the same bits")
    lab.check(interval(share)[1] > 0, "identical words in between hand on what was told before them")
    means = np.array([interval(column) for column in d.T])
    lab.draw(figure([Curves("The isolated past", [("D(w)", np.log2(windows), *means.T)], "words that earlier positions saw, w",
                            "change of the prediction, nats", ticks=[(float(np.log2(w)), str(w)) for w in windows])]),
             "What the prediction loses when earlier states are made of fewer words (mean and 95% interval). With no past at "
             f"all it is {np.mean(nothing):.2g}.")  # fmt: skip
    return Verdict(
        "a matter of definition",
        "If \"anew\" means without a state that is not a function of the words, it does start anew (11). If it means that "
        "nothing thought at earlier tokens is used, it does not: with their words readable but their context gone the "
        f"prediction moves by {means[0][0]:.2g} nats (no past at all: {np.mean(nothing):.2g}), and words that are the same "
        f"whatever was told pass on {interval(share)[0]:.0%} of it, with an exact 0 as control.",
        anew=f"all earlier thoughts taken away, {same[:, 0].mean():.0%} of first choices stay the same",
        builds=f"words kept, thoughts gone: {means[0][0]:.2g} nats off; {interval(share)[0]:.0%} of a word told is passed on",
    )


if __name__ == "__main__":
    main(run)
