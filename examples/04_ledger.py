"""A ledger of memories: which of them are rewritten, in five kinds of model.

After every step each entry of the memory is hashed, and compared with its hash of the step before. The standard model,
one with a sliding window and the feedback model keep a cache; a recurrent network has one state; and in a
masked-diffusion step every position reads every other, so that all keys and values are made anew as tokens are filled in.
"""

from lab import Array, Lab, Verdict, documents, main, random_model, smollm2  # isort: skip
from collections.abc import Iterator
from hashlib import sha256

import numpy as np
from figures import Grid, figure

from nanokv import KVCache, Transformer
from nanokv.cache import Ranges, Slots
from nanokv.feedback import FeedbackTransformer

THREAD = (
    "while past state can't be changed, the new state can",
    "it's an odd sort of \"working memory\" if you can't actually update it",
    "Where humans have a single evolving state of our memory LLMs have access to all the states of their \"memories\" across "
    "time",
    "So I don't think it's necessarily more or less similar to us than diffusion",
)
ADDS = "03 compared two ways to compute; this watches one memory as it grows"
PAPERS = ("oren", "merrill24", "dkv", "fastdllm", "dllmcache")


def hashes(cache: KVCache) -> list[list[str]]:
    """SHA-256 of each position's keys and values, [layer][position]."""
    return [[sha256(k.tobytes() + v.tobytes()).hexdigest() for k, v in zip(cache.keys(l), cache.values(l), strict=True)]
            for l in range(cache.config.n_layers)]  # fmt: skip


def cached(model: Transformer, tokens: Array) -> Iterator[list[list[str]]]:
    cache = model.new_cache()
    for i in range(len(tokens)):
        model.forward(tokens[i : i + 1], cache)
        yield hashes(cache)


class Bidirectional(KVCache):
    """A cache whose positions read all of a call's positions, the later ones too."""

    def read(self, layer: int, start: int, n: int, kv_head: Array, window: int | None = None) -> Slots:
        slots = super().read(layer, start, n, kv_head, window)
        return Slots(layer, start, kv_head, Ranges(np.zeros_like(slots.first), np.full_like(slots.stop, start + n)))


def diffusion(model: Transformer, tokens: Array) -> Iterator[list[list[str]]]:
    """Masked diffusion: all positions masked (token 0) at first, one more of them filled in at every step."""
    filled = np.zeros_like(tokens)
    for i in range(len(tokens)):
        filled[i] = tokens[i]
        cache = Bidirectional(model.config)
        model.forward(filled, cache)
        yield hashes(cache)


def recurrent(tokens: Array, d: int = 64) -> Iterator[list[list[str]]]:
    """An Elman network: h = tanh(W h + E[token]); its memory is the one vector h."""
    random, h = np.random.default_rng(0), np.zeros(d, np.float32)
    w, e = (random.standard_normal((n, d)).astype(np.float32) for n in (d, int(tokens.max()) + 1))
    for token in tokens:
        h = np.tanh(w @ h / 8 + e[token])
        yield [[sha256(h.tobytes()).hexdigest()]]


def audit(steps: Iterator[list[list[str]]]) -> tuple[int, int, Array]:
    """Old entries looked at, those that changed, and [step, position] the share of layers in which it did."""
    seen = changed = 0
    rows: list[list[float]] = []
    before: list[list[str]] = []
    for now in steps:
        rows.append([])
        for pos in range(len(before[0]) if before else 0):
            differ = [old[pos] != new[pos] for old, new in zip(before, now, strict=True)]
            seen, changed = seen + len(differ), changed + sum(differ)
            rows[-1].append(float(np.mean(differ)))
        before = now
    size = max(map(len, rows))
    return seen, changed, np.array([row + [np.nan] * (size - len(row)) for row in rows])


def run(lab: Lab) -> Verdict:
    n, small = 16, random_model()
    windowed = random_model(window=4, sliding=(True, False) * 3)
    fed = FeedbackTransformer(small.config, small.weights.map(np.asarray))
    ids, real = np.random.default_rng(0).integers(1, 97, n), documents(lab.amount(16, 64))[0]
    kinds = {  # name: steps, whether a finished thought (the top state) can enter the next step's lowest layer
        "standard (SmolLM2)": (cached(smollm2(), real), "no: L layers"),
        "sliding window": (cached(windowed, ids), "no: L layers"),
        "feedback": (cached(fed, ids), "yes"),
        "recurrent": (recurrent(ids), "yes"),
        "masked diffusion": (diffusion(small, ids), "no: L layers a step"),
    }
    found = {name: (*audit(steps), deep) for name, (steps, deep) in kinds.items()}
    rows = [[name, seen, changed, f"{changed / seen:.0%}", "overwritten" if changed else "append-only", deep]
            for name, (seen, changed, _, deep) in found.items()]  # fmt: skip
    lab.table("Entries of the memory, hashed after every step", ("model", "old entries looked at", "changed", "share", "memory",
              "unlimited depth"), rows)  # fmt: skip
    kept = [found[name][1] for name in ("standard (SmolLM2)", "sliding window", "feedback")]
    lab.check(kept == [0, 0, 0], "no cached entry ever changes, with a window or with feedback neither")
    one, many = found["recurrent"], found["masked diffusion"]
    lab.check(one[0] == one[1], "the one state of a recurrent network is overwritten at every step")
    lab.check(many[1] > 0.8 * many[0], "in a masked-diffusion step old entries are made anew")

    before, expected, surprising = (smollm2().new_cache() for _ in range(3))
    logits = smollm2().forward(real, before)[-1]
    for cache, token in ((expected, logits.argmax()), (surprising, logits.argmin())):
        smollm2().forward(np.append(real, token), cache)
    layers = zip(*map(hashes, (expected, surprising, before)), strict=True)
    same = all(a[: len(real)] == b[: len(real)] == c for a, b, c in layers)
    lab.check(same, "whether the next token is the likeliest or the least likely, nothing before it changes")
    shown = [Grid(name, found[name][2], "position", "step", cell=14) for name in ("feedback", "recurrent", "masked diffusion")]
    lab.draw(figure(shown), "Share of an old entry's layers whose hash changed in a step; faint is none, white no old entry. "
                            "Standard and sliding window look like feedback: nothing.")  # fmt: skip
    return Verdict(
        "right",
        f"Of {found['standard (SmolLM2)'][0]:,} audited entries of SmolLM2's cache {found['standard (SmolLM2)'][1]} changed, "
        "whatever token came next: past state can't be changed. Rewriting is neither what feedback adds (also append-only) "
        "nor a privilege of thinking: a recurrent state and a masked-diffusion step overwrite "
        f"({many[1] / many[0]:.0%} of entries a step, with random weights: all but "
        "those of layer 0, which see their own token alone).",
        anew="{1} of {0:,} old entries were rewritten: nothing is updated".format(*found["standard (SmolLM2)"]),
        builds=f"each of {len(real)} tokens added to every layer, and all that was there stayed to be read",
    )


if __name__ == "__main__":
    main(run)
