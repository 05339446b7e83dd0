"""A position's own part, and a slowly changing one: are states composed of both?

States of many texts are split, exactly, into a mean, a part of the position's number, a part of the text, and a rest (the
sums of squares add up: two-way analysis of variance). A part of the token is taken by the means over equal tokens. Then
slowness: how alike neighbouring positions are, and how much variance lies in directions that change slowly (slow feature
analysis, fitted on some texts and measured on others: slow is a direction in which neighbours' correlation is above 1/2).
Controls: the same positions shuffled within each text, and layer 0, which is nothing but tokens. Position 0 is left out,
and all is also measured after the norm, where no outlier can dominate.
"""

from lab import Array, Lab, Verdict, documents, interval, log_softmax, main, normed, ranged, spearman, watched  # isort: skip
import numpy as np
from figures import Curves, figure

THREAD = (
    "Presumably the internal state at any given token position must also be encoding information specific to that position, "
    "as well as this evolving/current memory... So, can this be seen in the internal embeddings - are they composed of a "
    "position-dependent part that changes a lot between positions, and an evolving memory part that is largely similar "
    "between positions only changing slowly?",
)
ADDS = "an open question of the thread: what the states that are read are made of"
PAPERS = ("song", "sun24", "sun26")
DIMENSIONS = 48  # principal directions kept
SLOW, SLOWER = 1.0, 0.5  # a mean squared step (0: frozen, 2: white) below which a direction is slow


def gathered(texts: Array, layers: list[int]) -> tuple[Array, Array]:
    """States [layers, texts, T - 1, D] without position 0, and the surprise of each token given those before it, in nats."""
    kept, surprise = [], []
    for text, (stream, logits) in zip(texts, watched(texts), strict=True):
        kept.append(stream[layers, 1:])
        surprise.append(-log_softmax(logits)[np.arange(len(text) - 1), text[1:]])
    return np.stack(kept, axis=1), np.stack(surprise)


def variance(h: Array, tokens: Array) -> tuple[float, float, float, float, float]:
    """Shares of position, text and rest of the variance of h [C, T, D], the error of their sum, and the share of the token."""
    h = h.astype(np.float64)
    mean = h.mean(axis=(0, 1))
    position, text = h.mean(axis=0) - mean, h.mean(axis=1) - mean
    rest = h - mean - position[None] - text[:, None]
    whole = ((h - mean) ** 2).sum()
    parts = np.array([len(h) * (position**2).sum(), h.shape[1] * (text**2).sum(), (rest**2).sum()]) / whole
    _, group, counts = np.unique(tokens, return_inverse=True, return_counts=True)
    sums = np.zeros((len(counts), h.shape[-1]))
    np.add.at(sums, group.ravel(), (h - mean).reshape(-1, h.shape[-1]))
    between = ((sums**2).sum(axis=1) / counts).sum() / whole
    honest = 1 - (1 - between) * (tokens.size - 1) / (tokens.size - len(counts))  # adjusted: means of few tokens fit noise
    return (*parts, abs(parts.sum() - 1), honest)


def centred(h: Array) -> Array:
    """Without mean and position part; float64."""
    return h - h.mean(axis=0, dtype=np.float64)


def slow(fit: Array, test: Array) -> tuple[float, float, float, Array]:
    """Neighbours' correlation, shares of variance in slow and slower directions, the slow ones [D, n]; of the test texts."""
    a, b = centred(fit), centred(test)
    rows = a.reshape(-1, a.shape[-1])
    values, vectors = np.linalg.eigh(rows.T @ rows / len(rows))
    white = vectors[:, -DIMENSIONS:] / np.sqrt(values[-DIMENSIONS:])  # in these the fitted texts have variance 1
    step = np.diff(a @ white, axis=1).reshape(-1, DIMENSIONS)
    directions = white @ np.linalg.eigh(step.T @ step)[1]  # from the slowest on
    y = b @ directions
    pace = (np.diff(y, axis=1) ** 2).mean(axis=(0, 1)) / (y**2).mean(axis=(0, 1))  # 0 frozen, 2 white
    bases = [np.linalg.qr(directions[:, pace < limit])[0] for limit in (SLOW, SLOWER)]
    shares = [float(((b @ basis) ** 2).sum() / (b**2).sum()) for basis in bases]
    rho = (b[:, 1:] * b[:, :-1]).sum() / (b**2).sum() * b.shape[1] / (b.shape[1] - 1)
    return float(rho), *shares, bases[0]


def of_layer(states: Array, texts: Array, surprise: Array, random: np.random.Generator) -> tuple[list, float, list]:
    """What is told of a layer's states [C, T, D]; how far position, text and rest are from the whole; and for each test text
    the rank correlation of a token's surprise with how far the slow part moves at it."""
    h, half = normed(states), len(states) // 2
    *shares, error, token = variance(h, texts)
    rho, share, slower, basis = slow(h[:half], h[half:])
    mixed = np.stack([text[random.permutation(len(text))] for text in h])
    rho_mixed, share_mixed, *_ = slow(mixed[:half], mixed[half:])
    moves = np.linalg.norm(np.diff(centred(h[half:]) @ basis, axis=1), axis=-1)  # [texts, T - 1]
    linked = [spearman(a, b) for a, b in zip(moves, surprise[half:, 1:], strict=True)] if basis.shape[1] else [0.0]
    row = [*shares, token, rho, rho_mixed, share, share_mixed, slower, slow(states[:half], states[half:])[1]]
    return row, max(error, variance(states, texts)[3]), linked


def run(lab: Lab) -> Verdict:
    length, n = lab.amount(33, 97), lab.amount(14, 84)
    texts, layers = documents(length)[:n], [0, 15, 30] if lab.quick else [0, 5, 10, 15, 20, 25, 30]
    states, surprise = gathered(texts, layers)
    random = np.random.default_rng(0)
    found = [of_layer(of, texts[:, 1:], surprise, random) for of in states]
    rows = [[layer, *row] for layer, (row, _, _) in zip(layers, found, strict=True)]
    lab.table(f"SmolLM2 after the norm, {len(texts)} texts of {length} tokens: shares of the variance (by chance: position "
              f"{1 / len(texts):.1%}, text {1 / (length - 1):.1%}), and slowness",
              ("layer", "position", "text", "rest", "token (adjusted)", "neighbours' correlation", "shuffled", "slow",
               "shuffled", "correlation above 3/4", "slow, before the norm"), rows)  # fmt: skip
    lab.check(max(error for _, error, _ in found) < 1e-10, "position, text and rest add up to the whole variance (to 1e-10)")
    numbers = np.array(rows)
    lab.check(np.abs(numbers[:, 6] - numbers[:, 2]).max() < 0.1,
              "shuffled within the text, neighbours have in common what the whole text has")
    middle = 1 + int(numbers[1:, 7].argmax())
    lab.check(numbers[middle, 5] > numbers[middle, 6] + 0.05, "in their order, they have more in common")
    lab.check(numbers[middle, 5] > numbers[0, 5] + 0.05, "and more than the tokens themselves")
    lab.check(numbers[middle, 7] > max(0.01, 2 * numbers[middle, 8], 2 * numbers[0, 7]),
              "a part of the states changes slowly, more than shuffled, and more than of the tokens themselves")  # fmt: skip
    link = interval(found[middle][2])
    lab.table(f"Layer {layers[middle]}: does the slow part move more where the text surprises?",
              ("texts", "rank correlation of surprise and move, mean [95%]"), [[len(found[middle][2]), ranged(link)]])
    names = ((1, "position"), (2, "text"), (4, "token (adjusted)"), (7, "slow directions"), (8, "slow directions, shuffled"))
    lines = [(name, layers, numbers[:, column]) for column, name in names]
    pairs = [("correlation", layers, numbers[:, 5]), ("shuffled within the text", layers, numbers[:, 6])]
    lab.draw(figure([Curves("Parts of the states after the norm", lines, "layer", "share of the variance", limits=(0, 1)),
                     Curves("Neighbouring positions", pairs, "layer", "correlation")]),
             "The parts overlap (a slow direction can hold some of the text's part), so that they do not add up; position, "
             "text and rest do.")  # fmt: skip
    slowly, shuffled, words, own = (float(x) for x in (*numbers[middle, [7, 8]], numbers[0, 7], numbers[middle, 4]))
    return Verdict(
        "open: this is what was measured",
        f"Yes, both parts can be seen, but the slow one is the smaller: of the variance at layer {layers[middle]} {slowly:.0%} "
        f"changes slowly (shuffled {shuffled:.0%}, at the tokens themselves {words:.0%}), the token has {own:.0%} (layer 0: "
        f"{numbers[0, 4]:.0%}) and the position's number {numbers[middle, 1]:.0%}. The slow part's moves and the token's "
        f"surprise have rank correlation {ranged(link, '.2f')}.",
        anew=f"of the variance at layer {layers[middle]} {own:.0%} is the token's own, and {slowly:.0%} changes slowly",
        builds=f"slow are {slowly:.0%}, more than if shuffled ({shuffled:.0%}) or in the words themselves ({words:.0%})",
    )


if __name__ == "__main__":
    main(run)
