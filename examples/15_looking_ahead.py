"""Looking ahead: do states hold what the model will say tokens later, and does it use that?

A linear probe (ridge) is asked for what the model will itself predict at the next token and the three after it. It must
beat what the current word alone gives: the same probe at layer 0, and a table of what mostly followed that word. Shuffled
targets show what is left by chance. A probe shows what can be read, not what is read; so thoughts are taken away, too:
one position is kept from reading its context (its word stays), and the predictions one, two and three tokens later are
compared.
"""

from lab import Array, Lab, Verdict, documents, interval, kl, main, normed, ranged, smollm2, watched  # isort: skip
from collections import Counter, defaultdict

import numpy as np
from figures import Curves, figure

from nanokv import Cut

THREAD = (
    "Sure with one forward pass you only get one token at a time, but looking at what is happening in the latent space there "
    "are clear signs of long term planning and reasoning that go beyond just the next token.",
)
ADDS = "14 took states apart; this looks for the future in them"
PAPERS = ("pal", "wu", "lindsey_bio", "dong", "plan26", "ma26", "shai")


def gathered(texts: Array, layers: list[int]) -> tuple[Array, Array, Array]:
    """States [layers, texts, T, D] as the head would see them, the last layer's, and the model's choices [texts, T]."""
    model, kept, last, choices = smollm2(), [], [], []
    for stream, logits in watched(texts):
        kept.append(normed(stream[layers]))
        last.append(model.norm(stream[-1], model.weights.final_norm, None))
        choices.append(logits.argmax(axis=1))
    return np.stack(kept, axis=1), np.stack(last), np.stack(choices)


def rows(x: Array, ahead: int) -> Array:
    """The positions that have a target, but for position 0: [texts, T, D] -> [n, D + 1], with a constant feature."""
    x = x[:, 1 : 1 - ahead or None].reshape(-1, x.shape[-1])
    return np.concatenate([x, np.ones((len(x), 1), x.dtype)], axis=1)


class Probes:
    """Probes for one distance: fitted on some texts, tested on others; right answers as bool [test texts, positions]."""

    def __init__(self, last: Array, choices: Array, texts: Array, ahead: int) -> None:
        self.fit, self.pick, self.test = np.split(np.arange(len(texts)), [int(0.6 * len(texts)), int(0.7 * len(texts))])
        self.texts, self.ahead = texts, ahead
        self.targets, self.wanted = last[:, ahead:], choices[:, ahead:]
        self.tokens = np.unique(choices)  # decoded among all tokens that the model ever chose here
        self.head = np.asarray(smollm2().ops.embed(self.tokens.astype(np.int32), smollm2().weights.head))

    def right(self, states: Array, shuffled: bool = False) -> Array:
        x, y = rows(states[self.fit], self.ahead), self.targets[self.fit].reshape(-1, self.targets.shape[-1])
        if shuffled:
            y = np.random.default_rng(0).permutation(y)
        square, cross = (x.T.astype(np.float64) @ part for part in (x, y))
        fits = [np.linalg.solve(square + strength * np.eye(len(square)), cross) for strength in (1e2, 1e3, 1e4)]
        best = max(fits, key=lambda w: self.score(states, w, self.pick).mean())
        return self.score(states, best, self.test)

    def score(self, states: Array, w: Array, part: Array) -> Array:
        wanted = self.wanted[part]
        said = (rows(states[part], self.ahead).astype(np.float32) @ w.astype(np.float32) @ self.head.T).argmax(axis=1)
        return self.tokens[said].reshape(wanted.shape) == wanted

    def table(self) -> Array:
        """What mostly was chosen that far after this word."""
        seen: dict[int, Counter] = defaultdict(Counter)
        words, wanted = self.texts[:, 1 : 1 - self.ahead or None], self.wanted
        for word, choice in zip(words[self.fit].ravel().tolist(), wanted[self.fit].ravel().tolist(), strict=True):
            seen[word][choice] += 1
            seen[-1][choice] += 1
        said = [seen[word if word in seen else -1].most_common(1)[0][0] for word in words[self.test].ravel().tolist()]
        return np.array(said).reshape(wanted[self.test].shape) == wanted[self.test]


def thoughtless(text: Array, pos: int) -> list[list[float]]:
    """[2, 3]: KL of the predictions 1, 2 and 3 tokens after pos when it cannot read its context, and when nobody reads it."""
    clean = smollm2().forward(text)
    kinds = ([(pos, src) for src in range(1, pos)], [(dst, pos) for dst in range(pos + 1, len(text))])
    changed = [smollm2().forward(text, edits=[Cut(layer, *edge) for layer in range(30) for edge in edges]) for edges in kinds]
    return [[float(kl(clean[pos + i], logits[pos + i])) for i in (1, 2, 3)] for logits in changed]


def run(lab: Lab) -> Verdict:
    length, n = lab.amount(33, 129), lab.amount(35, 105)
    texts, layers = documents(length)[:n], [0, 30] if lab.quick else [0, 6, 12, 18, 24, 30]
    states, last, choices = gathered(texts, layers)
    table, gains, curves = [], {}, []
    for ahead in range(1, 1 + lab.amount(2, 4)):
        probes = Probes(last, choices, texts, ahead)
        right = [probes.right(states[i]) for i in range(len(layers))]
        most, chance = probes.table(), probes.right(states[-1], shuffled=True)
        by_layer = [part.mean() for part in right]
        best = 1 + int(np.argmax(by_layer[1:]))
        baseline = max(most, right[0], key=np.mean)
        gains[ahead] = interval(right[best].mean(axis=1) - baseline.mean(axis=1))
        table.append([ahead, by_layer[0], most.mean(), chance.mean(), by_layer[best], layers[best],
                      ranged(gains[ahead], "+.3f")])  # fmt: skip
        curves.append((f"{ahead} ahead", layers, by_layer))
    lab.table(f"SmolLM2: how often a linear probe names what the model will choose ({len(most)} test texts of {length} tokens)",
              ("tokens ahead", "probe at layer 0", "table of words", "shuffled", "best probe", "at layer",
               "gain over the better of the first two [95%]"), table)  # fmt: skip
    lab.check(gains[1][1] > 0, "the next token can be read better from inner states than from the word alone")
    lab.check(table[0][3] < 0.5 * table[0][4], "with shuffled targets it cannot")

    cuts = np.array([thoughtless(text[:24], 18) for text in texts[-lab.amount(3, 20) :]])
    alone, unread = np.array([[interval(column) for column in part] for part in cuts.transpose(1, 2, 0)])
    lab.table(f"What the thought at a position does for later predictions ({len(cuts)} texts), KL in nats [95%]",
              ("taken away", "1 token later", "2", "3"),
              [["its context (the word stays)", *map(ranged, alone)],
               ["word and thought (nobody reads it)", *map(ranged, unread)]])  # fmt: skip
    lab.check(alone[0, 1] > 0, "predictions after a position use what it made of its context")
    top = max(0.7, *(max(y) for *_, y in curves))
    used = [("without its context", [1, 2, 3], *alone.T), ("not read at all", [1, 2, 3], *unread.T)]
    lab.draw(figure([Curves("What a probe can read", curves, "layer", "right answers", limits=(0, top)),
                     Curves("What is used", used, "tokens after the position", "change of the prediction, nats")]),
             "Left: layer 0 is what the word alone gives. Right: what later predictions lose without the thought of one "
             "position (mean, 95%).")  # fmt: skip
    far = max(gains)
    return Verdict(
        "right, with a condition" if gains[2][1] > 0 else "open: this is what was measured",
        f"Beyond the word itself, inner states let a linear probe name the model's choice more often by {gains[1][0]:.0%} of "
        f"cases for the next token, {ranged(gains[2], '+.1%')} two ahead and {ranged(gains[far], '+.1%')} {far} ahead: at 135 "
        "million parameters, signs of little more than the next token. And a position's thought is used by later ones (KL "
        f"{alone[0, 0]:.2g} one token on, {alone[2, 0]:.2g} three on), which is memory, not proof of a plan.",
        anew=f"two tokens ahead inner states name the choice little better: {ranged(gains[2], '+.1%')}",
        builds=f"without one position's thought: KL {alone[0, 0]:.2g} nats a token later, {alone[2, 0]:.2g} three later",
    )


if __name__ == "__main__":
    main(run)
