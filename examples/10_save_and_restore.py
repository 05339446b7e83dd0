"""Save and restore: the thoughts so far in a file, and another process that goes on from them.

A text is processed and its cache saved. Another process loads the model and the file, is given no token, and continues;
its tokens, and the hash of every logit on the way, are compared with going on here, and with starting over from the text.
"""

from lab import Lab, Verdict, documents, main, random_model, smollm2  # isort: skip
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
from figures import Grid, figure

from nanokv import KVCache, Transformer, generate
from nanokv.feedback import FeedbackTransformer

THREAD = (
    "And the kv-cache makes this persistent across time, so the entire system (LLM+cache) becomes effectively able to save "
    "its state, and iterate upon it at each token, and not have to start from scratch every time.",
)
ADDS = "09 cut the past away; this carries it elsewhere"
PAPERS = ("belitsky",)
STEPS = 8


def model_of(name: str) -> Transformer:
    """The same model in every process."""
    if name == "smollm2":
        return smollm2()
    model = random_model()
    return model if name == "random" else FeedbackTransformer(model.config, model.weights.map(np.asarray))


def go_on(model: Transformer, cache: KVCache) -> list[str]:
    """Greedy tokens from the cache, each with the hash of the logits after it."""
    return [f"{token} {sha256(cache.last_logits.tobytes()).hexdigest()}"
            for token in generate(model, cache=cache, max_new_tokens=STEPS, stop=())]


def elsewhere(name: str, file: Path) -> list[str]:
    """What another process says that has the file and no token of the text."""
    command = [sys.executable, str(Path(__file__).resolve()), "--go-on", name, str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def run(lab: Lab) -> Verdict:
    rows, picture = [], None
    for name in ("random", "feedback") if lab.quick else ("random", "feedback", "smollm2"):
        model, tokens = model_of(name), documents(48)[0] if name == "smollm2" else np.arange(48)
        cache, file = model.new_cache(), lab.folder / f"{name}.cache"
        model.forward(tokens, cache)
        cache.save(file, model)
        there, here = elsewhere(name, file), go_on(model, cache.copy())
        text = tokens
        for line in here:  # start over from the text, at every token
            fresh = model.new_cache()
            text = np.append(text, int(line.split()[0]))
            model.forward(text, fresh)
            there_too = sha256(fresh.last_logits.tobytes()).hexdigest() == line.split()[1]
            if not there_too:
                break
        rows.append([name, len(tokens), file.stat().st_size / 1e6, len(here), there == here, there_too])
        picture = np.array([np.linalg.norm(cache.values(l), axis=(1, 2)) for l in range(model.config.n_layers)])
        file.unlink()
    lab.table(f"{STEPS} tokens further, from a saved cache",
              ("model", "tokens saved", "file, MB", "tokens compared", "another process: same tokens and logits",
               "started over: same logits"), rows)  # fmt: skip
    lab.check(all(row[4] for row in rows), "another process goes on from the file with the same tokens and the same bits of "
                                           "every logit")
    lab.check(all(row[5] for row in rows), "starting over from the text at every token gives the same bits, too")
    lab.draw(figure([Grid(f"What is in the file ({name})", picture[:, 1:], "position - 1", "layer",
                          high=float(picture[:, 1:].max()), cell=10)]),
             "Length of the cached values, by layer and position (position 0 left out).")  # fmt: skip
    return Verdict(
        "right",
        f"A process that never saw the text went on from the file with the same {STEPS} tokens and the same bits of every "
        "logit: model and cache are a state that can be saved. Starting over from the words gives the same bits as well, so "
        f"the saved state holds nothing that the words do not imply; it holds the work ({rows[-1][2]:.2g} MB of it for "
        f"{rows[-1][1]} tokens in the last row).",
        anew="starting over from the words gives the bits of the saved state",
        builds=f"another process went on from the file alone: {rows[-1][3]} tokens and their logits, the same bits",
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--go-on"]:
        other = model_of(sys.argv[2])
        print("\n".join(go_on(other, KVCache.load(sys.argv[3], other))))
    else:
        main(run)
