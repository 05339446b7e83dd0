"""A Markov chain: drop the cache and keep the tokens, drop the tokens and keep the cache, and what each costs.

The next token's distribution is computed from the tokens alone and from the cache alone. Then the state is made smaller:
only the last k tokens are kept, and the loss is the divergence from the prediction by all.
"""

from lab import Array, Lab, Verdict, documents, interval, kl, main, random_model, ranged, smollm2  # isort: skip
import time

import numpy as np
from figures import Curves, figure

from nanokv import Transformer

THREAD = (
    "But ultimately its a markov-chain, so again mathematically, yes, you could just re-do the full computation all the time, "
    "and end up in the same place.",
    "It's correct to states the LLM starts anew for each token.",
)
ADDS = "10 saved the state; this asks what the state is"
PAPERS = ("oren",)


def three_ways(model: Transformer, tokens: Array, n: int) -> tuple[list[bool], list[bool], list[float]]:
    """For n greedy steps: whether dropping the cache, or the tokens, gives the same bits; and the processor time of going
    on and of starting over."""
    kept, seconds = model.new_cache(), [0.0, 0.0]
    model.forward(tokens, kept)
    text, no_cache, no_tokens = list(tokens), [], []
    for _ in range(n):
        token = int(kept.last_logits.argmax())
        text.append(token)
        wiped = kept.copy()
        wiped.tokens = np.zeros_like(wiped.tokens)  # it goes on from keys and values; which tokens made them is forgotten
        begun = time.process_time()
        logits = model.forward([token], kept)[-1]
        middle = time.process_time()
        again = model.forward(text, last_logits_only=True)[-1]
        seconds = [seconds[0] + middle - begun, seconds[1] + time.process_time() - middle]
        no_cache.append(np.array_equal(again, logits))
        no_tokens.append(np.array_equal(model.forward([token], wiped)[-1], logits))
    return no_cache, no_tokens, seconds


def run(lab: Lab) -> Verdict:
    rows = []
    for model, tokens, n in ((random_model(), np.arange(48), 8), (smollm2(), documents(48)[0], lab.amount(3, 16))):
        no_cache, no_tokens, (once, anew) = three_ways(model, tokens, n)
        forwards = sum(range(len(tokens) + 1, len(tokens) + n + 1))
        rows.append([model.name, n, all(no_cache), all(no_tokens), f"{n} against {forwards:,}", anew / once])
    lab.table("The next token's distribution from the tokens alone, and from the cache alone",
              ("model", "steps", "cache dropped: same bits", "tokens dropped: same bits",
              "token passes, kept against anew", "processor time, anew / kept"),
              rows)  # fmt: skip
    lab.check(all(row[2] for row in rows), "without the cache, from the tokens alone, the same bits come out")
    lab.check(all(row[3] for row in rows), "without the tokens, from the cache and the last token alone, the same bits come "
                                           "out")

    length = lab.amount(33, 129)
    texts, orders = documents(length)[: lab.amount(3, 24)], [k for k in (1, 2, 4, 8, 16, 32, 64) if k < length - 1]
    losses = []
    for text in texts:
        whole = smollm2().forward(text, last_logits_only=True)[-1]
        losses.append([float(kl(whole, smollm2().forward(text[-k:], last_logits_only=True)[-1])) for k in orders])
    means = np.array([interval(column) for column in np.array(losses).T])
    lab.table(f"SmolLM2: divergence of the prediction from the last k tokens from that by all {length} ({len(texts)} texts)",
              ("k", "KL, nats [95%]"), [[k, ranged(three)] for k, three in zip(orders, means, strict=True)])  # fmt: skip
    lab.check(means[0, 1] > means[-1, 2], "more tokens in the state, a smaller loss")
    lab.draw(figure([Curves("A smaller state", [("only the last k tokens kept", np.log2(orders), *means.T)], "k",
                            "change of the prediction, nats",
                            ticks=[(float(np.log2(k)), str(k)) for k in orders])]),
             "How much of the state counts: the prediction from the last k tokens, against that from all (mean and 95% "
             "interval).")  # fmt: skip
    return Verdict(
        "a matter of definition",
        "Both sides are right: from the tokens alone, and from the cache alone, come the same bits, so the cache is no state "
        "beyond the words, and the words are not needed where the cache is. What differs is work: redoing everything took "
        f"{rows[1][5]:.1f} times the processor time here, and T (T + 1) / 2 passes of a token instead of T over a text.",
        anew=f"cache dropped, words kept: the same bits at all {rows[1][1]} steps, for {rows[1][5]:.1f} times the work",
        builds=f"words dropped, cache kept: the same bits at all {rows[1][1]} steps",
    )


if __name__ == "__main__":
    main(run)
