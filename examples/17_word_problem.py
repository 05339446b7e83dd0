"""Learning to keep a state: standard and feedback models trained on the word problem of S3, in NumPy.

06 wrote its models by hand. Here they learn: at every position, which of the six permutations of three things the moves
so far have made. Forward and backward are in training.py; the gradients are compared with finite differences first. Same
data, same number of steps, several seeds, all shown. How far does each go before it must guess (1 in 6)?
"""

from lab import Array, Lab, Verdict, main, permutation_group  # isort: skip
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
from figures import Curves, figure
from training import Shape, gradient_error, library_model, loss, train

THREAD = (
    "Its not a perfect mechanism for sure, and there is work to make LLMs able to carry more information forward (e.g. "
    "feedback transformers), but they can definitely do some of that today.",
    "is not a perfect information-passing mechanism because of how those model are trained (and something like feedback "
    "transformer would be better)",
)
ADDS = "06 with learning: not what can be written by hand, but what training finds"
PAPERS = ("fan", "liguo", "merrill24", "staircase", "brt", "fam")
TOKENS, PRODUCTS = permutation_group(3)
STEP = PRODUCTS[:, TOKENS[1:]]  # [6, 2]


def batches(seed: int, size: int, length: int) -> Iterator[tuple[Array, Array]]:
    """A beginning and `length` moves, tokens 0 to 2; the permutation after each, tokens 3 to 8."""
    random = np.random.default_rng(seed)
    while True:
        moves = random.integers(0, 2, (size, length))
        state, targets = np.zeros(size, int), np.full((size, length + 1), 3)
        for i in range(length):
            state = STEP[state, moves[:, i]]
            targets[:, i + 1] = 3 + state
        yield np.concatenate([np.zeros((size, 1), int), moves + 1], axis=1), targets


def learned(job: tuple[Shape, int, int, int]) -> tuple[Array, float]:
    """Accuracy by position on 2000 new sequences, and how far the library's logits are from the training code's choices."""
    shape, steps, length, seed = job
    params, _ = train(shape, batches(100 + seed, 64, length), steps, seed, rate=1e-2 if shape.feedback else 3e-3)
    tokens, targets = next(batches(7, 2000, length))
    _, right = loss(params, tokens, targets, shape)
    model = library_model(params, shape)
    same = np.mean([(model.forward(row).argmax(axis=1) == target)[1:].mean()
                    for row, target in zip(tokens[:20], targets[:20], strict=True)])
    return right.mean(axis=0), float(abs(same - right[:20, 1:].mean()))


def run(lab: Lab) -> Verdict:
    length, steps, seeds = lab.amount(6, 16), lab.amount(160, 700), range(lab.amount(1, 3))
    kinds = {"standard, 1 layer": (1, False), "standard, 2 layers": (2, False), "standard, 4 layers": (4, False),
             "feedback, 1 layer": (1, True)}
    if lab.quick:
        kinds = {name: kinds[name] for name in ("standard, 1 layer", "feedback, 1 layer")}
    errors = [gradient_error(Shape(2, 5, 7, 8, 2, 12, feedback=feedback)) for feedback in (False, True)]
    lab.check(max(errors) < 1e-6, f"gradients agree with finite differences in float64 ({max(errors):.0e}, standard and "
                                  "feedback)")
    jobs = [(Shape(n, length + 1, 9, feedback=fed), steps, length, seed) for n, fed in kinds.values() for seed in seeds]
    if lab.quick:
        results = list(map(learned, jobs))
    else:
        with ProcessPoolExecutor(2, get_context("spawn")) as pool:
            results = list(pool.map(learned, jobs))
    lab.check(max(apart for _, apart in results) < 1e-6, "the trained models, run by the library, answer as in training")
    curves = np.array([right for right, _ in results]).reshape(len(kinds), len(seeds), length + 1)
    reach = (curves < 0.9).argmax(axis=2) - 1  # the last position before the first that is below 90%
    reach[(curves >= 0.9).all(axis=2)] = length
    rows = [[name, *(f"{x:.1%}" for x in curves[i, :, 1:].mean(axis=1)), *reach[i].tolist(), f"{curves[i, :, -1].mean():.1%}"]
            for i, name in enumerate(kinds)]  # fmt: skip
    lab.table(f"S3 after {steps} steps of 64 sequences of {length} moves; tested on 2000 new ones",
              ("model", *(f"right, seed {s}" for s in seeds), *(f"90% up to move, seed {s}" for s in seeds),
               f"right at move {length}"), rows)  # fmt: skip
    by = dict(zip(kinds, reach, strict=True))
    lab.check(by["feedback, 1 layer"].min() > by["standard, 1 layer"].max(),
              "one layer with feedback goes further than one without, in every seed")
    if not lab.quick:
        lab.check(by["standard, 1 layer"].max() < by["standard, 2 layers"].min()
                  and by["standard, 2 layers"].max() < by["standard, 4 layers"].min(),
                  "the standard model's frontier moves with its depth, in every seed")  # fmt: skip
        lab.check(by["feedback, 1 layer"].min() == length, "the feedback model's does not stop within the length")
    lines = [(name, range(1, length + 1), curves[i, s, 1:]) for i, name in enumerate(kinds) for s in seeds]
    lab.draw(figure([Curves("Which of six permutations? A line for each seed", lines, "moves so far", "right answers",
                            limits=(0, 1))]), "Guessing is right in 1 of 6 cases.")  # fmt: skip
    deepest = list(kinds)[-2].replace(", ", " of ")
    frontier = ", ".join(f"{name.split(', ')[1]}: move {int(np.median(r))}" for name, r in by.items() if "standard" in name)
    return Verdict(
        "right, with a condition",
        f"On a task that is nothing but a state to be kept, a feedback model of one layer is right at move {length} in "
        f"{curves[-1, :, -1].mean():.0%} of cases, the {deepest} in {curves[-2, :, -1].mean():.0%}; what a standard model "
        f"gets right in 9 of 10 cases moves with its depth ({frontier}). The condition: small models, a short training and a "
        "synthetic task; and for it a feedback model gives up processing positions side by side.",
        anew=f"trained to keep a state, the {deepest} knows it after {length} moves in {curves[-2, :, -1].mean():.0%} of cases",
        builds=f"trained so, one layer with feedback knows it in {curves[-1, :, -1].mean():.0%}",
    )


if __name__ == "__main__":
    main(run)
