"""Two channels from token to token: the words, and the cache. How wide is each?

Counted: the numbers that a token leaves in the cache, against the bits of the one token that is sampled. Measured: how
surprising the words really are, and how coarsely the cached numbers can be rounded before the prediction changes. The
second narrows what the cache can be said to carry; neither is a measure of information, for the words imply the cache.
"""

from lab import Array, Lab, Verdict, documents, interval, kl, log_softmax, main, ranged, smollm2, with_interval  # isort: skip
import numpy as np
from figures import Curves, figure

from nanokv import KVCache

THREAD = (
    "they have no state/memory that is not the output.",
    "there is work to make LLMs able to carry more information forward (e.g. feedback transformers)",
)
ADDS = "11 said that the words imply the cache; this, how much wider the way through the cache is"
PAPERS = ("c2c", "oren")


def rounded(x: Array, bits: int) -> Array:
    """Each position's and head's numbers rounded to 2^bits - 1 even steps between -max and max."""
    steps = 2 ** (bits - 1) - 1
    if steps == 0:  # one bit: the sign, at the mean size
        return (np.sign(x) * np.abs(x).mean(axis=-1, keepdims=True)).astype(np.float32)
    scale = np.maximum(np.abs(x).max(axis=-1, keepdims=True), 1e-30) / steps
    return (np.rint(x / scale) * scale).astype(np.float32)


def coarse(cache: KVCache, bits: int) -> KVCache:
    """The cache with rounded keys and values of every position but 0, the sink."""
    other = KVCache(cache.config)
    with other.step(cache.length):
        for layer in range(cache.config.n_layers):
            k, v = cache.keys(layer), cache.values(layer)
            other.write(layer, 0, np.concatenate([k[:1], rounded(k[1:], bits)]), np.concatenate([v[:1], rounded(v[1:], bits)]))
        other.commit(cache.tokens, cache.last_logits)
    return other


def run(lab: Lab) -> Verdict:
    model, length = smollm2(), lab.amount(24, 64)
    c, texts, widths = model.config, documents(length)[: lab.amount(3, 32)], (1, 2, 3, 4, 6, 8)
    numbers, token_bits = 2 * c.n_layers * c.n_kv_heads * c.head_dim, float(np.log2(c.vocab_size))
    surprise, entropy, losses = [], [], []
    for text in texts:
        cache = model.new_cache()
        logs = log_softmax(model.forward(text[:-1], cache)) / np.log(2)
        surprise.append(float(-logs[np.arange(length - 1), text[1:]].mean()))
        entropy.append(float(-(np.exp2(logs) * logs).sum(axis=1).mean()))
        clean = model.forward(text[-1:], cache.copy())[-1]
        losses.append([float(kl(clean, model.forward(text[-1:], coarse(cache, bits))[-1])) for bits in widths])
    means = np.array([interval(column) for column in np.array(losses).T])
    enough = next((bits for bits, (mean, _, _) in zip(widths, means, strict=True) if mean < 0.05), widths[-1])
    lab.table("From one token to the next, in bits", ("through", "bits", "how known"),
              [["the sampled token, at most", token_bits, f"log2 of {c.vocab_size:,}"],
               ["the words of the texts, as surprising as they are", with_interval(surprise), f"measured, {len(texts)} texts"],
               ["what the model leaves open (its entropy)", with_interval(entropy), "measured"],
               ["the cache in float16, at most", 16 * numbers, f"2 x {c.n_layers} x {c.n_kv_heads} x {c.head_dim} numbers"],
               [f"the cache at {enough} bits a number", enough * numbers, "KL below 0.05 nats, measured"]])  # fmt: skip
    lab.table(f"SmolLM2: the prediction from a rounded cache ({len(texts)} texts of {length} tokens)",
              ("bits a number", "KL, nats [95%]"), [[bits, ranged(three)] for bits, three in zip(widths, means, strict=True)])
    lab.check(numbers == 11520, "a token leaves 11,520 numbers in the cache")
    lab.check(16 * numbers / token_bits > 1e4, "in float16 that is more than 10,000 times the bits of a token")
    lab.check(means[-1, 2] < 0.05 < means[0, 1], "one bit a number is too coarse, eight are enough")
    exact = model.forward(texts[0][-1:], (kept := filled(model, texts[0][:-1])).copy())[-1]
    lab.check(np.array_equal(exact, model.forward(texts[0][-1:], coarse_not_at_all(kept))[-1]),
              "the way through another cache itself changes nothing")
    lab.draw(figure([Curves("A coarser cache", [("keys and values rounded", widths, *np.maximum(means, 1e-6).T)],
                            "bits a number", "change of the prediction, nats",
                            log_y=True)]), "What rounding the cached keys and values does to the prediction (mean and 95% "
                                           "interval).")  # fmt: skip
    return Verdict(
        "right, with a condition",
        f"The output is a narrow channel ({token_bits:.1f} bits a token at most, {interval(surprise)[0]:.1f} as the texts "
        f"are) beside a cache of {16 * numbers:,} bits in float16, {16 * numbers / token_bits:,.0f} times as wide; {enough} "
        "bits a number do nearly as well. That is capacity, not information: all of it is computed from the words (11).",
        anew=f"by the words pass {token_bits:.1f} bits a token at most ({interval(surprise)[0]:.1f} as the texts are)",
        builds=f"by the cache pass up to {16 * numbers:,} bits a token, {16 * numbers / token_bits:,.0f} times as many",
    )


def filled(model: object, tokens: Array) -> KVCache:
    cache = smollm2().new_cache()
    smollm2().forward(tokens, cache)
    return cache


def coarse_not_at_all(cache: KVCache) -> KVCache:
    """Through `coarse`'s way, each number kept."""
    other = KVCache(cache.config)
    with other.step(cache.length):
        for layer in range(cache.config.n_layers):
            other.write(layer, 0, cache.keys(layer), cache.values(layer))
        other.commit(cache.tokens, cache.last_logits)
    return other


if __name__ == "__main__":
    main(run)
