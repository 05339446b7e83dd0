"""nanokv: a decoder-only transformer from scratch that keeps an account of its memory.

    model  = nanokv.load("smollm2-135m")                  # or "induction", a .gguf file, a Hugging Face folder
    cache  = model.new_cache()
    logits = model.forward(model.tokenizer.encode("The capital of France is"), cache)
    for token in nanokv.generate(model, cache=cache, max_new_tokens=8): ...

Recording and drawing: `nanokv.trace`.
"""

from nanokv.cache import KVCache
from nanokv.config import Config, Rope
from nanokv.edits import Add, Cut, Replace, ZeroValue, transplant
from nanokv.errors import NanokvError
from nanokv.generate import generate
from nanokv.load import load
from nanokv.threads import set_threads
from nanokv.transformer import Transformer
from nanokv.weights import BlockWeights, Weights

__all__ = [
    "Add", "BlockWeights", "Config", "Cut", "KVCache", "NanokvError", "Replace", "Rope", "Transformer", "Weights",
    "ZeroValue", "generate", "load", "set_threads", "transplant",
]  # fmt: skip
