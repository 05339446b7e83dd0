"""What the examples share: models, texts, a report, and the command line.

An example is a program with a docstring, THREAD (the sentences of the argument that it is about, word for word), ADDS
(what it adds to the one before), PAPERS, and `run(lab)`, which measures, checks what it says with `lab.check`, and returns
a Verdict. `python 03_x.py --quick` does less of everything, in seconds; both print their evidence and draw it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import permutations
from pathlib import Path
from typing import Any

# Before NumPy is first imported: its BLAS threads and those of the kernels would wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
import numpy as np

import nanokv
from nanokv import BlockWeights, Config, Rope, Transformer, Weights
from nanokv.trace import Flow
from nanokv.transformer import Unobserved
from nanokv.weights import block_shapes, model_shapes

Array = np.ndarray
HERE = Path(__file__).parent
KINDS = ("right", "wrong", "right, with a condition", "a matter of definition", "open: this is what was measured")


class Refuted(AssertionError):  # noqa: N818 - it says what happened
    """An example did not find what it says it finds."""


@dataclass(frozen=True)
class Verdict:
    """What was found about the claim, in two sentences; and in a line each, with its numbers, what speaks for each side."""

    kind: str
    text: str
    anew: str = ""  # for "it starts anew", or against what it is said to be able to do
    builds: str = ""  # for "it builds on what it thought before"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"a verdict is one of {KINDS}, not {self.kind!r}")
        if not self.anew + self.builds:
            raise ValueError("a verdict says what speaks for one side, or for both")


@dataclass
class Lab:
    """One run of an example: how much to do, where pictures go, and what was found."""

    quick: bool
    folder: Path
    name: str
    tables: list[dict[str, Any]] = field(default_factory=list)
    pictures: list[dict[str, str]] = field(default_factory=list)
    checks: list[str] = field(default_factory=list)

    def check(self, holds: bool | np.bool_, what: str) -> None:
        """Refuted unless it holds; `what` says in words what does."""
        if not holds:
            raise Refuted(f"{self.name}: it does not hold that {what}")
        self.checks.append(what)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Print a small table and keep it for the report."""
        texts = [[shown(cell) for cell in row] for row in rows]
        self.tables.append({"title": title, "columns": list(columns), "rows": texts})
        widths = [max(len(line[i]) for line in [list(columns), *texts]) for i in range(len(columns))]
        print(f"\n{title}")
        for line in [list(columns), *texts]:
            print("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())

    def draw(self, picture: str | Flow, caption: str, suffix: str = "") -> None:
        """Keep a picture, SVG or a flow, as a file in the folder."""
        path = self.folder / f"{self.name}{suffix}.svg"
        if isinstance(picture, Flow):
            picture.render(path)
        else:
            path.write_text(picture)
        self.pictures.append({"file": path.name, "caption": caption})

    def amount(self, quick: int, full: int) -> int:
        """How many samples, layers, ... to take."""
        return quick if self.quick else full


def shown(cell: Any) -> str:
    """A cell of a table as text: three digits, whole numbers whole."""
    if isinstance(cell, bool | np.bool_):
        return "yes" if cell else "no"
    if isinstance(cell, int | np.integer):
        return f"{cell:,}"
    if isinstance(cell, float | np.floating):
        return f"{cell:.3g}" if abs(cell) < 1000 else f"{cell:,.0f}"
    return str(cell)


def run_example(module: Any, name: str, folder: Path, quick: bool) -> dict[str, Any]:
    """Run one example; what it found, as it goes into the report."""
    folder.mkdir(parents=True, exist_ok=True)
    lab, begun, busy = Lab(quick, folder, name), time.perf_counter(), processor_seconds()
    print(f"{name}: {module.__doc__.splitlines()[0]}\n  thread: {' / '.join(module.THREAD)}")
    verdict = module.run(lab)
    for what in lab.checks:
        print(f"  checked: {what}")
    seconds = {"elapsed": time.perf_counter() - begun, "processor": processor_seconds() - busy}
    print(f"\n{verdict.kind.upper()}. {verdict.text}\n\n{seconds['elapsed']:.0f} s")
    return {"name": name, "quick": quick, "tables": lab.tables, "pictures": lab.pictures, "checks": lab.checks,
            "verdict": asdict(verdict), "seconds": seconds, "machine": machine()}  # fmt: skip


def processor_seconds() -> float:
    """What this process and those that it started have used."""
    return sum(os.times()[:4])


def machine() -> str:
    """Processor, cores and Python, in words."""
    try:
        names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, Python {platform.python_version()}"


def main(run: Callable[[Lab], Verdict]) -> None:
    """The command line of an example: python NN_name.py [--quick] [--out FOLDER]."""
    module = sys.modules[run.__module__]
    name = Path(str(module.__file__)).stem
    parser = argparse.ArgumentParser(prog=f"{name}.py", description=module.__doc__)
    parser.add_argument("--quick", action="store_true", help="do less of everything, in seconds")
    parser.add_argument("--out", type=Path, default=Path("examples-out"), help="folder for the pictures and the numbers")
    arguments = parser.parse_args()
    try:
        found = run_example(module, name, arguments.out, arguments.quick)
    except Refuted as error:
        sys.exit(f"REFUTED. {error}")
    (arguments.out / f"{name}.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    print(f"{arguments.out / name}.json and .svg")


# Models


@lru_cache(maxsize=1)
def smollm2() -> Transformer:
    """SmolLM2-135M-Instruct, a real language model of 30 layers."""
    return nanokv.load("smollm2-135m")


def random_weights(config: Config, seed: int = 0) -> Weights:
    """Normal random weights: what holds for these holds for the shape of the model, not for what it learnt."""
    random = np.random.default_rng(seed)

    def array(shape: tuple[int, ...]) -> Array:
        scale = 1 if len(shape) == 1 else shape[-1] ** -0.5
        return (scale * random.standard_normal(shape) + (len(shape) == 1)).astype(np.float32)

    blocks = tuple(BlockWeights(**{name: array(size) for name, size in block_shapes(config).items()})
                   for _ in range(config.n_layers))
    rest = {name: array(size) for name, size in model_shapes(config).items()}
    if config.tied_head:
        rest["head"] = rest["embed"]
    return Weights(blocks=blocks, **rest)


def random_model(n_layers: int = 6, **options: Any) -> Transformer:
    """A small Llama with random weights, on the kernels whose bits don't depend on how tokens are split into calls."""
    config = Config(n_layers, 4, 2, 16, 64, 96, 97, 256, rope=Rope(10000.0), **options)
    return Transformer(config, random_weights(config), name="random")


class States(Unobserved):
    """An observer that keeps the residual stream, [L + 1, S, D], and nothing else."""

    def __init__(self) -> None:
        self.calls: list[list[Array]] = []

    def begin(self, step: int, tokens: Array, start: int) -> None:
        self.calls.append([])

    def state(self, site: str, layer: int, start: int, x: Array) -> None:
        if site == "resid_pre":
            self.calls[-1][layer:] = [x]
        elif site == "resid_post":
            self.calls[-1][layer + 1 :] = [x]

    @property
    def all(self) -> Array:
        return np.concatenate([np.stack(call) for call in self.calls], axis=1)


def states(model: Transformer, tokens: Sequence[int] | Array, **options: Any) -> Array:
    """The residual stream of every layer and position, [L + 1, T, D]; options go to forward."""
    watch = States()
    model.forward(tokens, observer=watch, **options)
    return watch.all


def watched(texts: Array) -> Iterator[tuple[Array, Array]]:
    """The residual stream [L + 1, T, D] and the logits [T, V] of SmolLM2 on each text."""
    for text in texts:
        watch = States()
        logits = smollm2().forward(text, observer=watch)
        yield watch.all, logits


# Texts


@lru_cache(maxsize=8)
def documents(length: int, most: int | None = None) -> Array:
    """int32 [n, length]: pieces of that many tokens of the texts in texts/, taken in turn, one from each text at a time."""
    encode = smollm2().tokenizer.encode
    texts = [" ".join(path.read_text().split()) for path in sorted((HERE / "texts").glob("*.txt"))]
    ids = [np.asarray(encode(text), np.int32) for text in texts]
    pieces = [text[i : i + length] for i in range(0, max(map(len, ids)), length) for text in ids if i + length <= len(text)]
    return np.stack(pieces[:most])


# Numbers


def log_softmax(logits: Array) -> Array:
    """Natural logarithms of probabilities, in float64."""
    x = logits.astype(np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def kl(p_logits: Array, q_logits: Array) -> Array:
    """Kullback-Leibler divergence KL(p || q) in nats, over the last axis."""
    p, q = log_softmax(p_logits), log_softmax(q_logits)
    return (np.exp(p) * (p - q)).sum(axis=-1)


def interval(samples: Sequence[float] | Array, seed: int = 0) -> tuple[float, float, float]:
    """The mean, and the ends of its 95% interval by 2000 bootstrap draws over the samples."""
    x = np.asarray(samples, np.float64)
    means = x[np.random.default_rng(seed).integers(0, len(x), (2000, len(x)))].mean(axis=1)
    return float(x.mean()), float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def with_interval(samples: Sequence[float] | Array) -> str:
    """The mean and its interval as text."""
    return ranged(interval(samples))


def ranged(three: Sequence[float] | Array, form: str = ".3g") -> str:
    """A mean and the ends of its interval as text, each in that format."""
    mean, low, high = (format(x, form) for x in three)
    return f"{mean} [{low}, {high}]"


def normed(h: Array) -> Array:
    """Each vector [..., D] divided by the root of its mean square."""
    return h / np.sqrt((h * h).mean(axis=-1, keepdims=True))


def permutation_group(n: int) -> tuple[Array, Array]:
    """The permutations of n things by number: those of the tokens 0 to 2 (nothing, the first two swapped, all turned), [3];
    and the product of any two, first the row's and then the column's, [n!, n!]."""
    perms = list(permutations(range(n)))
    index = {perm: i for i, perm in enumerate(perms)}
    tokens = [index[perm] for perm in (perms[0], (1, 0, *range(2, n)), (*range(1, n), 0))]
    return np.array(tokens), np.array([[index[tuple(a[i] for i in b)] for b in perms] for a in perms])


def spearman(x: Array, y: Array) -> float:
    """Rank correlation; equal values share their mean rank."""

    def ranks(values: Array) -> Array:
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[inverse]

    return float(np.corrcoef(ranks(x), ranks(y))[0, 1])
