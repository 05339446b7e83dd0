"""A tour of the museum: what each bug does to the text, the trace and the picture, and which case of the suite catches it.

python examples/museum/tour.py                            list the bugs
python examples/museum/tour.py KvHeadModuloG -o pictures  show one, and draw it beside the model as it should be
python examples/museum/tour.py --write                    write README.md anew (a few minutes; needs SmolLM2)
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
SUITE = HERE.parents[1] / "tests" / "conformance"
sys.path[:0] = [str(HERE), str(SUITE), str(HERE.parents[1])]

import run as runner  # noqa: E402
from broken import BrokenTransformer  # noqa: E402
from bugs import BITS, BLOCKS, BUGS, CHOICES, FILES, HEADS, MASKS, POSITIONS, Bug  # noqa: E402
from making.mutants import mutant  # noqa: E402
from nanokv_parts import as_json  # noqa: E402

import nanokv  # noqa: E402
from nanokv.errors import NanokvError  # noqa: E402
from nanokv.trace import Recorder, Trace  # noqa: E402
from nanokv.trace.diff import diff  # noqa: E402

ROOMS = {
    "Heads": HEADS, "Positions": POSITIONS, "Masks": MASKS, "Blocks": BLOCKS, "Files and memory": FILES,
    "Choosing, and text": CHOICES, "Bits": BITS,
}  # fmt: skip
PROMPT = [7, 33, 17, 1, 14]  # of the suite's small models
SENTENCE = "The capital of France is"
# Jane Austen, Pride and Prejudice (1813): what perplexity is measured on.
PASSAGE = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife. "
    "However little known the feelings or views of such a man may be on his first entering a neighbourhood, this truth is so "
    "well fixed in the minds of the surrounding families, that he is considered as the rightful property of some one or other "
    "of their daughters."
)
MOST = 20  # attention edges of a picture
CALLS = (24, 8)  # tokens of the passage's first calls; the others go one by one


def shown(name: str, folder: Path | None) -> list[str]:
    """What a bug does to the suite's small model, in lines; with a folder, its picture goes there, beside the right one."""
    bug = BUGS[name]
    lines = [f"{name}: {bug.bug}", f"  {bug.fix}" + (f" (seen in {bug.seen})" if bug.seen else "")]
    if name not in CHOICES and not bug.bits and name not in FILES:
        lines += of_model(bug, folder)
    return [*lines, f"  the case that catches it: {caught_by(bug)}"]


def of_model(bug: Bug, folder: Path | None) -> list[str]:
    """Text, trace and picture of a model with the bug."""
    right, wrong = recorded(bug.shown, ""), recorded(bug.shown, bug.name)
    same = ", as it should" if wrong.text == right.text else f"; it should with {right.text}"
    lines = [f"  text: {bug.shown} continues {PROMPT} with {wrong.text}{same}"]
    return [*lines, *told(lambda: of_trace(right, wrong)), *told(lambda: of_picture(bug, right, wrong, folder))]


@dataclass(frozen=True)
class Run:
    """A small model's run of the prompt and of eight more tokens."""

    text: list[int]
    model: Any
    scratch: Any  # the temporary folder with its trace

    @property
    def trace(self) -> Trace:
        return Trace.load(Path(self.scratch.name) / "run.nkv")


def recorded(folder: str, bug: str) -> Run:
    """That run, of the suite's model in this folder, with a bug."""
    model, scratch = mutant(bug)._model(str(SUITE / "models" / folder)), tempfile.TemporaryDirectory(prefix="museum-")
    cache = model.new_cache()
    with np.errstate(all="ignore"), Recorder(Path(scratch.name) / "run.nkv", level="states") as recorder:
        model.forward(PROMPT[:3], cache, observer=recorder)
        model.forward(PROMPT[3:], cache, observer=recorder)  # a chunk
        text = list(nanokv.generate(model, cache=cache, max_new_tokens=8, stop=(), observer=recorder))
    return Run(text, model, scratch)


def told(tell: Callable[[], list[str]]) -> list[str]:
    """Lines; or why there are none, for a trace that breaks laws may hold what nobody expects."""
    try:
        return tell()
    except (NanokvError, ValueError, IndexError) as error:
        return [f"  it cannot be shown: {error}"]


def of_trace(right: Run, wrong: Run) -> list[str]:
    """The laws that are broken, and the first number that differs."""
    lines = told(lambda: [f"  laws broken: {', '.join(each.law for each in wrong.trace.check()) or 'none'}"])

    def differs() -> list[str]:
        found = diff(right.trace, wrong.trace, tolerance=1e-3)
        if found.first is None:
            return ["  trace: nothing differs"]
        where, should, is_ = found.first
        return [f"  trace: first differs {where}: {is_} for {should}"]

    return [*lines, *told(differs)]


def of_picture(bug: Bug, right: Run, wrong: Run, folder: Path | None) -> list[str]:
    """How many edges of the picture are others; with a folder, both pictures are drawn there."""
    flows = {name: run.trace.flow(run.model, measure="norm", at=len(PROMPT) - 1).prune(top_k=MOST)
             for name, run in (("right", right), (bug.name, wrong))}  # fmt: skip
    edges = {name: {tuple(edge)[:5] for edge in flow.edges.tolist()} for name, flow in flows.items()}
    for name, flow in flows.items() if folder is not None else ():
        flow.render(folder / f"{name}.svg", title=bug.bug if name == bug.name else "as it should be")
    return [f"  picture: {len(edges[bug.name] - edges['right'])} of its {len(edges[bug.name])} edges are others"]


@cache
def cases() -> tuple[runner.Case, ...]:
    return tuple(runner.load_cases())


def caught_by(bug: Bug) -> str:
    """The first case that it breaks, by how much, and whether the runner calls it by its name."""
    port = mutant(bug.name)

    def ask(request: dict[str, Any]) -> Any:
        return json.loads(as_json({"id": request["id"], **port.answer(request)}))

    profile = "exact" if bug.bits else "close"
    for case in cases():
        if bug.name in case["flags"]:
            result = runner.run_case(case, ask, profile)
            if result.status == "fail":
                how = (
                    "in bits alone"
                    if result.rounding_only
                    else f"by {result.ratio:.1e} tolerances"
                    if np.isfinite(result.ratio)
                    else ""
                )
                return f"{case['id']}{' ' if how else ''}{how}"
    raise AssertionError(f"no case catches {bug.name}")


# What SmolLM2 makes of it


class Patient:
    """SmolLM2, whose weights all its broken copies share."""

    def __init__(self) -> None:
        self.whole = nanokv.load("smollm2-135m", ops="numpy")
        self.prompt = self.whole.tokenizer.encode(SENTENCE)
        self.passage = self.whole.tokenizer.encode(PASSAGE)

    def with_bug(self, bug: str) -> tuple[str, float]:
        """Ten more tokens after the sentence, as text, and the perplexity of the passage, whose tokens come in calls."""
        model = BrokenTransformer(self.whole.config, self.whole.weights, bug=bug, tokenizer=self.whole.tokenizer)
        with np.errstate(all="ignore"):
            made = list(nanokv.generate(model, self.prompt, cache=model.new_cache(), max_new_tokens=10, stop=()))
            cache, at, losses = model.new_cache(), 0, []
            for size in (*CALLS, *[1] * (len(self.passage) - sum(CALLS))):
                logits = model.forward(self.passage[at : at + size], cache).astype(np.float64)
                losses += self._losses(logits, self.passage[at + 1 : at + size + 1])
                at += size
        return self.whole.tokenizer.decode(made), float(np.exp(np.mean(losses)))

    @staticmethod
    def _losses(logits: np.ndarray, targets: np.ndarray) -> list[float]:
        logits = logits[: len(targets)]
        shifted = logits - logits.max(axis=1, keepdims=True)
        chosen = shifted[np.arange(len(targets)), targets] - np.log(np.exp(shifted).sum(axis=1))
        return (-chosen).tolist()


def page() -> str:
    """README.md."""
    patient = Patient()
    healthy = patient.with_bug("")
    lines = [HEAD.format(n=len(BUGS), sentence=SENTENCE, text=visible(healthy[0]), perplexity=healthy[1])]
    for room, bugs in ROOMS.items():
        lines.append(f"\n## {room}\n")
        on_model = room in ("Heads", "Positions", "Masks", "Blocks")
        lines.append("| a port in which … | |" + (" on SmolLM2 |" if on_model else "") + " caught by |")
        lines.append("|---|---|" + ("---|" if on_model else "") + "---|")
        for bug in bugs.values():
            seen = f" Seen in {bug.seen}." if bug.seen else ""
            row = f"| **{bug.name}** {bug.bug} | {bug.fix}{seen} |"
            if on_model:
                row += f" {of_patient(patient, bug, healthy)} |"
            lines.append(f"{row} `{caught_by(bug).replace(' ', '` ', 1)}{'' if ' ' in caught_by(bug) else '`'} |")
            print(lines[-1], file=sys.stderr)
    return "\n".join(lines) + "\n"


def of_patient(patient: Patient, bug: Bug, healthy: tuple[str, float]) -> str:
    if bug.shown != "llama":
        return "not of its family"
    text, perplexity = patient.with_bug(bug.name)
    if text == healthy[0] and abs(perplexity - healthy[1]) < 0.005:
        return "the same"
    said = "the same words" if text == healthy[0] else f"“{visible(text)}”"
    return f"{said}; {perplexity:.4g}" if np.isfinite(perplexity) else f"{said}; NaN"


def visible(text: str) -> str:
    """Text for a cell of a table."""
    return text.replace("\n", "⏎").replace("|", "\\|").strip() or " "


HEAD = """# The bug museum

{n} bugs that ports of language models had, or that the profile `exact` of the conformance suite must tell. Each is a switch
in a copy of the model ([broken.py](broken.py), [broken_files.py](broken_files.py), [broken_bits.py](broken_bits.py)), beside
the right line. The museum is also the suite's mutation test: each bug breaks at least one case by ten tolerances or more (or
in bits), and the case that it breaks says its name (`tests/test_museum.py`).

```sh
python examples/museum/tour.py KvHeadModuloG -o pictures    # text, trace and picture, and the case that catches it
python tests/conformance/run.py --program "python tests/conformance/nanokv_port.py --bug KvHeadModuloG"
```

On SmolLM2-135M: what it says after “{sentence}”, and its perplexity on the first two sentences of Pride and Prejudice, given
in calls of 24 and 8 tokens and then one by one. Without a bug: “{text}”; {perplexity:.4g}. Look at the second number: with
several of these bugs the text still begins well.

This page is written by `python examples/museum/tour.py --write`."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bugs", nargs="*", metavar="BUG", help="names of bugs")
    parser.add_argument("-o", "--output", type=Path, help="a folder for pictures")
    parser.add_argument("--write", action="store_true", help="write README.md anew")
    options = parser.parse_args()
    if options.write:
        (HERE / "README.md").write_text(page(), encoding="utf-8")
        return 0
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
    if unknown := [name for name in options.bugs if name not in BUGS]:
        parser.error(f"{unknown[0]} is not in the museum; without a name the tour lists its bugs")
    if not options.bugs:
        print("\n".join(f"{name:<26} {bug.bug}" for name, bug in BUGS.items()))
    for name in options.bugs:
        print("\n".join(shown(name, options.output)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
