"""What is measured, of whom, and how often: the peers, and the sizes of a run.

Peers of one group race: they compute the same thing from the same weights in the same form. Each group has a reference,
nanokv, which is measured between every two of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

MEASURES = ("decode", "prefill", "fresh", "error", "recording", "drawing")
MOST_RECORDED = 32  # tokens of a recorded decode in transformers, which is slow
GRAPH = (30, 200)  # layers and positions of a large graph
GROWN_FROM, GROWN_TO = 16, 2048  # the contexts whose decode times say how time grows

# The beginning of Pride and Prejudice (1813), 100 words: what the models read, again and again where more is needed.
TEXT = """\
It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife. \
However little known the feelings or views of such a man may be on his first entering a neighbourhood, this truth is so \
well fixed in the minds of the surrounding families, that he is considered as the rightful property of some one or other \
of their daughters. “My dear Mr. Bennet,” said his lady to him one day, “have you heard that Netherfield Park is let at \
last?” Mr. Bennet replied that he had not. “But it is,” returned she.
"""


@dataclass(frozen=True)
class Plan:
    """The sizes of a run. Positions are counted in tokens."""

    rounds: int = 11
    contexts: tuple[int, ...] = (16, 256, 1024, 2048)  # positions in the cache when decoding begins
    tokens: int = 16  # decoded one by one in a measurement, whose result is their median
    prefill: int = 512  # positions of a prefill, which a measurement does once
    fresh: int = 3  # processes of each peer that are started anew, for load times and peak memory
    error_tokens: int = 64  # positions whose logits are compared with float64
    recorded_tokens: int = 256  # decoded with and without a recorder
    threads: int = 2
    drawn: int = 256  # positions of a trace that is drawn
    drawn_long: int = 1024  # of a long one, whose memory is looked at
    drawn_edges: int = 30_000  # of a graph of GRAPH states, laid out unpruned
    dot_seconds: float = 120  # that `dot` may take for the same graph
    minutes: float = 29  # nothing begins after it, and no round but the first that would not end by then

    @property
    def longest(self) -> int:
        """The most positions that any measurement reaches."""
        decoded = max(self.contexts, default=0) + self.tokens + 1
        return max(decoded, self.prefill + self.recorded_tokens, self.error_tokens, self.drawn, self.drawn_long)


QUICK = Plan(rounds=2, contexts=(16, 256), tokens=6, fresh=1, recorded_tokens=32, drawn=64, drawn_long=128, drawn_edges=10_000,
             dot_seconds=5, minutes=2.8)  # fmt: skip


@dataclass(frozen=True)
class Peer:
    """Somebody who is measured."""

    name: str
    program: str  # the class that knows it, as module.Class of benchmarks/peers
    form: str  # of the weights that it reads: a key of models.Model.paths; "": it reads none
    group: str = ""  # whom it races; "": nobody
    offers: tuple[str, ...] = ("decode", "prefill", "fresh", "error")  # the measures that it takes part in
    reference: bool = False  # whether it is what the others of its group are compared with
    extra: str = "bench"  # the extra that installs it
    settings: dict[str, Any] = field(default_factory=dict)  # further arguments of its class


def peers(kind: str) -> list[Peer]:
    """Everybody, for a model whose file keeps most of its matrices in this kind of block ("" if it is no GGUF file)."""
    nanokv, llama, hf = "nanokv_model.NanokvModel", "llama_cpp_model.LlamaCppModel", "transformers_model.TransformersModel"
    eager, usual = {"attention": "eager"}, Peer.offers
    found = [
        Peer("nanokv float32", nanokv, "file", "float32", (*usual, "recording"), True, settings={"weights": "float32"}),
        _read("float32"),
        Peer("llama.cpp F32", llama, "F32", "float32"),
        Peer("llama.cpp F32, float32 throughout", llama, "F32", offers=("error",), settings={"all_float32": True}),
        Peer("transformers", hf, "folder", "float32"),
        Peer("transformers, eager attention", hf, "folder", offers=("recording",), settings=eager),
        Peer("NumPy", nanokv, "file", "float32", settings={"ops": "numpy"}),
        Peer("flow graphs", "drawing.Drawing", "file", offers=("drawing",), extra="dot"),
    ]
    for packed in dict.fromkeys(["Q8_0", kind]):
        if packed not in ("", "F32"):
            offers = ("decode", "prefill", "fresh", *(["error"] if packed == kind else []))  # Q8_0 rounds the weights anew
            form = "file" if packed == kind else packed
            found += [
                Peer(f"nanokv {packed}", nanokv, form, packed, offers, True, settings={"weights": "packed"}),
                _read(packed),
                Peer(f"llama.cpp {packed}", llama, form, packed, offers),
            ]
    return found


def _read(group: str) -> Peer:
    return Peer(f"read {group}", "memory_read.MemoryRead", "", group, offers=("decode",))


def order(rivals: Sequence[str], reference: str | None, turn: int) -> list[str]:
    """Who is measured when: the rivals, turned by so many places, with the reference before, between and after them."""
    turned = [*rivals[turn % max(len(rivals), 1) :], *rivals[: turn % max(len(rivals), 1)]]
    if reference is None:
        return turned
    return [reference] + [name for rival in turned for name in (rival, reference)]


def chosen(everybody: Sequence[Peer], only: Sequence[str]) -> tuple[list[Peer], tuple[str, ...]]:
    """The peers and the measures that the words of --only name, a peer by any part of its name. ValueError for a stranger."""
    measures = tuple(word for word in only if word in MEASURES)
    words = [word.lower() for word in only if word not in MEASURES]
    for word in words:
        if not any(word in peer.name.lower() for peer in everybody):
            names = ", ".join([*MEASURES, *(peer.name for peer in everybody)])
            raise ValueError(f"nobody is called {word!r}; --only takes parts of these: {names}")
    kept = [peer for peer in everybody if not words or any(word in peer.name.lower() for word in words)]
    return kept, measures or MEASURES
