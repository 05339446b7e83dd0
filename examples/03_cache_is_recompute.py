"""The cache and the recomputation: the same numbers, or only nearly, and what that depends on.

The same tokens are processed at once, in chunks, and one by one, by four kinds of arithmetic: nanokv's kernels, whose
order of operations does not depend on the number of rows; BLAS in float32 and in float64, where it does; and BLAS with
every result rounded to float16. Each split's logits are compared with those of one full prefill.
"""

from lab import Array, Lab, Verdict, documents, log_softmax, main, random_model, smollm2  # isort: skip
from types import SimpleNamespace
from typing import Any

import numpy as np
from figures import Curves, figure

from nanokv import Transformer, ops

THREAD = (
    "But mathematically KV-caching, instead of doing prefilling at every token is equivalent, sure.",
    "In other words, the \"recalculated\" plan will be exactly the same as before, just extended with new planning at the "
    "position of each newly appended token.",
)
ADDS = "02 says that a later token changes no earlier state; this, that it does not matter when a state is computed"
PAPERS = ("he", "sglang", "vllm", "chodavarapu")


def half(result: Any) -> Any:
    """The result, or each of several, rounded to float16."""
    if isinstance(result, list):
        return [half(each) for each in result]
    with np.errstate(over="ignore"):
        return result.astype(np.float16).astype(np.float32)


def in_half_precision(model: Transformer) -> Transformer:
    """The model, every operation's result rounded to float16; sums within an operation are float32."""
    rounding = ("embed", "linear", "linears", "rms_norm", "rope", "attention", "activate", "add")
    names = {name: getattr(ops, name) for name in dir(ops) if not name.startswith("_")}
    for name in rounding:
        names[name] = lambda *args, _of=names[name], **options: half(_of(*args, **options))
    made = Transformer(model.config, model.weights.map(lambda w: half(np.asarray(w))), ops="numpy", name=model.name)
    made.ops = SimpleNamespace(**names)
    return made


def split(model: Transformer, tokens: Array, sizes: list[int]) -> Array:
    """The logits [T, V] when calls take these many tokens."""
    cache, ends = model.new_cache(), np.cumsum(sizes)
    return np.concatenate([model.forward(tokens[end - size : end], cache) for size, end in zip(sizes, ends, strict=True)])


def run(lab: Lab) -> Verdict:
    n = lab.amount(12, 64)
    model, tokens = (random_model(), np.arange(n)) if lab.quick else (smollm2(), documents(n)[0])
    plain = model.weights.map(np.asarray)
    kinds = {
        "nanokv's kernels, float32": model,
        "BLAS, float64": Transformer(model.config, plain.map(lambda w: w.astype(np.float64)), ops="numpy"),
        "BLAS, float32": Transformer(model.config, plain, ops="numpy"),
        "BLAS, rounded to float16": in_half_precision(model),
    }
    plans = {"1 by 1": [1] * n, "by 7": [7] * (n // 7) + [n % 7] * (n % 7 > 0), "2 halves": [n // 2] * 2}
    rows, lines = [], []
    for kind, one in kinds.items():
        whole, results = one.forward(tokens), []
        for plan, sizes in plans.items():
            logits = split(one, tokens, sizes)
            apart = np.abs(logits.astype(np.float64) - whole)
            moved = np.abs(log_softmax(logits) - log_softmax(whole)).max()
            flips = int((logits.argmax(axis=1) != whole.argmax(axis=1)).sum())
            rows.append([kind, plan, np.array_equal(logits, whole), apart.max(), moved, f"{flips} of {n}"])
            results.append(apart.max(axis=1))
        lines.append((kind, np.arange(n), np.maximum(results[0], 1e-16)))
    lab.table(f"{model.name or 'smollm2'}: {n} tokens in parts, compared with all at once",
              ("arithmetic", "split", "same bits", "largest change of a logit", "of a log probability",
               "first choices changed"),
              rows)  # fmt: skip
    by = {kind: [row for row in rows if row[0] == kind] for kind in kinds}
    lab.check(all(row[2] for row in by["nanokv's kernels, float32"]), "with nanokv's kernels no bit depends on the split")
    lab.check(max(row[3] for row in by["BLAS, float64"]) < 1e-9, "in float64 the splits agree to 1e-9")
    worst = {kind: max(row[3] for row in by[kind]) for kind in kinds}
    lab.check(worst["BLAS, float64"] < worst["BLAS, float32"] < worst["BLAS, rounded to float16"],
              "fewer digits, more difference")
    lab.draw(
        figure([Curves("One by one, against all at once", lines, "position", "largest change of a logit", log_y=True)]),
        "How far the logits of token-by-token decoding are from those of one prefill. At 1e-16 stands an exact 0.",
    )
    flips = sum(int(row[5].split()[0]) for row in rows if row[0] != "nanokv's kernels, float32")
    half = worst["BLAS, rounded to float16"]
    return Verdict(
        "right, with a condition",
        "With nanokv's order of operations the recomputed states have the same bits, all of them, for every split. With BLAS "
        f"they agree to {worst['BLAS, float64']:.0e} in float64, {worst['BLAS, float32']:.0e} in float32 and "
        f"{half:.1g} when results are rounded to float16 (first choices that changed: {flips}): "
        "the equality is mathematics, and engineering has to earn it.",
        anew=f"dropped and computed again, in any of {len(plans)} splits of {n} tokens: the same bits",
        builds=f"an earlier plan comes back as it was, only extended; in float16 it is {half:.1g} off",
    )



if __name__ == "__main__":
    main(run)
