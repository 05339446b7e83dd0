"""The options of the command `nanokv`: one function for each of its commands."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

Add = Callable[[argparse.ArgumentParser], None]


@dataclass(frozen=True)
class Command:
    """One command: what it is called, what `--help` says of it in a line and at length, and what adds its options."""

    name: str
    summary: str
    about: str
    add: tuple[Add, ...] = ()


def parser(description: str, runs: Mapping[str, Callable[[argparse.Namespace], int | None]]) -> argparse.ArgumentParser:
    """The parser of the whole command line; runs: the function that does each command, by its name."""
    whole = argparse.ArgumentParser(
        prog="nanokv", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = whole.add_subparsers(dest="command", metavar="COMMAND")
    for command in COMMANDS:
        one = commands.add_parser(command.name, help=command.summary, description=command.about)
        one.set_defaults(run=runs[command.name])
        for add in command.add:
            add(one)
    return whole


def _draw(one: argparse.ArgumentParser) -> None:
    one.add_argument("-o", "--output", required=True, type=Path, help="the picture: NAME.svg, .png, .pdf or .dot")
    _options_of_a_flow(one)
    one.add_argument("--kind", choices=("graph", "heat", "pyramid", "cache"), default="graph", help="the graph (default); who "
                     "took how much from whom; what could reach what; or what lies in the cache")  # fmt: skip
    one.add_argument("--share", type=float, default=0.9, help="keep the fewest edges that hold this share of the influence")
    one.add_argument("--most", type=int, default=30, help="draw at most so many attention edges (default: 30)")
    one.add_argument("--verify", action="store_true", help="cut the edges drawn, and others like them, and say on the "
                     "picture what that did")  # fmt: skip
    one.add_argument("--how", choices=("value-zero", "knockout"), default="value-zero", help="with --verify: take away "
                     "what the edges bring (default), or let them not be read, so that the others share it")  # fmt: skip
    one.add_argument("--words", action="store_true", help="beside each state the word that it would predict (the logit lens)")
    one.add_argument("--title", help='instead of the question that the picture answers ("": none)')
    one.add_argument("--caption", help="a sentence below it")
    one.add_argument("--theme", choices=("light", "dark"), help="its colours (default: light)")
    one.add_argument("--width", type=float, metavar="MM", help="its width in millimetres (default: as wide as it needs)")
    one.add_argument("--font", help="the font of its text (default: Helvetica)")


def _cut(one: argparse.ArgumentParser) -> None:
    _options_of_a_flow(one)
    one.add_argument("--edge", action="append", metavar="LAYER:HEAD:DST:SRC", help="an edge to cut, such as 23:3:13:9; * for "
                     "the head is all of them. May be given often")  # fmt: skip
    one.add_argument("--strongest", type=int, default=10, metavar="N", help="without --edge: cut the N strongest edges between "
                     "positions for the prediction (default: 10)")  # fmt: skip
    one.add_argument("--how", choices=("value-zero", "knockout"), default="value-zero", help="take away what they bring "
                     "(default), or let them not be read, so that the others share their weight")  # fmt: skip


def _generate(one: argparse.ArgumentParser) -> None:
    one.add_argument("--echo", action="store_true", help="print the prompt, too")


def _trace(one: argparse.ArgumentParser) -> None:
    one.add_argument("-o", "--output", required=True, type=Path, help="the folder to make, such as run.nkv")
    one.add_argument("--level", choices=("writes", "weights", "vectors", "states"), help="what is kept, each with all before "
                     "it (default: weights)")  # fmt: skip
    one.add_argument("--topk", type=int, metavar="K", help="keep only the K largest attention weights of a row")
    one.add_argument("--chat", type=Path, metavar="FILE.jsonl", help='a conversation instead of a prompt: JSON lines {"role": '
                     '"user", "text": "Hello"} (roles: user, model, system, tool); - is standard input. Each turn is one call; '
                     "the model answers if it is its turn")  # fmt: skip
    one.add_argument("--resume", action="store_true", help="with --chat: go on with the trace that is there, which holds the "
                     "beginning of the conversation")  # fmt: skip


def _check(one: argparse.ArgumentParser) -> None:
    one.add_argument("trace", type=Path, help="a folder that nanokv trace made")


def _show(one: argparse.ArgumentParser) -> None:
    one.add_argument("trace", type=Path, help="a folder that nanokv trace made")
    for name, about in (("step", "this call"), ("layer", "this layer"), ("head", "this head"), ("pos", "what this position "
                        "reads"), ("src", "who reads this position")):  # fmt: skip
        one.add_argument(f"--{name}", type=int, help=f"only {about}")
    one.add_argument("--by", choices=("read", "pos", "layer", "head"), default="read", help="the strongest reads (default), or "
                     "what each position, layer or head reads")  # fmt: skip
    one.add_argument("--most", type=int, help="tell so many of each call (default: 20; of a call of one token 5)")
    one.add_argument("--all", action="store_true", help="fold nothing: sinks, a position's own entry, the token before it")


def _why(one: argparse.ArgumentParser) -> None:
    one.add_argument("trace", type=Path, help="a folder that nanokv trace made")
    one.add_argument("id", help="the number, such as 'layer1.pos5.mlp_out[7]' or 'step0.layer1.head2.pattern[5,3]'")
    one.add_argument("--model", help="the model that was traced: its arithmetic is then told down to the weights")
    one.add_argument("--all", action="store_true", help="fold nothing: every term of every sum")


def _diff(one: argparse.ArgumentParser) -> None:
    one.add_argument("a", type=Path, help="a trace")
    one.add_argument("b", type=Path, help='another, or a file of JSON lines {"id": ..., "value": ...} by any program')
    one.add_argument("--tolerance", type=float, default=0.0, help="differences up to this count as none (default: 0)")


def _export(one: argparse.ArgumentParser) -> None:
    one.add_argument("trace", type=Path, help="a folder that nanokv trace made")
    one.add_argument("-o", "--output", required=True, type=Path, help="NAME.parquet, .jsonl or .dump")
    one.add_argument("--form", choices=("parquet", "jsonl", "dump"), help="the form, if the suffix does not say it")
    one.add_argument("--only", help="only these tables, or of a dump these sites, with commas between them")


def _options_of_a_flow(one: argparse.ArgumentParser) -> None:
    one.add_argument("--measure", help="what an edge's weight is: target (what it did for the prediction, all else held; the "
                     "default), norm, proximity, attention, rollout, value-zero or knockout")  # fmt: skip
    one.add_argument("--token", help="the predicted token to explain (default: the likeliest)")
    one.add_argument("--against", help="the token whose logit is taken from its own (default: the likeliest other one)")
    one.add_argument("--alone", action="store_true", help="take its logit alone, against no other")
    one.add_argument("--at", type=int, default=-1, help="the position whose prediction is explained (default: the last)")
    one.add_argument("--heads", choices=("apart", "merged", "summed"), default="apart", help="an edge for each head (default), "
                     "or one for all: by what they bring together, or by the sum of their weights")  # fmt: skip


def _options_of_a_run(max_new_tokens: int | None, prompt_needed: bool = True) -> Add:
    """What runs a model from a prompt has in common."""

    def add(run: argparse.ArgumentParser) -> None:
        run.add_argument("prompt", nargs=None if prompt_needed else "?", help="the text to begin with")
        run.add_argument("--model", default="induction", help="a name (see: nanokv models), a .gguf file or a Hugging Face "
                         "folder; the default is the hand-made induction model, which needs no download and knows every "
                         "word")  # fmt: skip
        run.add_argument(
            "--ops", choices=("numba", "numpy"), help="what computes: compiled kernels, or the readable NumPy operations"
        )
        run.add_argument("--max-new-tokens", type=int, metavar="N", default=max_new_tokens, help="tokens to write (default: "
                         "50; draw, and trace of a prompt: 0)")  # fmt: skip
        run.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
        run.add_argument("--top-k", type=int, metavar="K", help="draw among the K likeliest tokens")
        run.add_argument("--top-p", type=float, metavar="P", help="draw among the fewest tokens that hold probability P")
        run.add_argument("--seed", type=int, default=0, help="of the random generator (default: 0)")

    return add


COMMANDS = (
    Command(
        "draw",
        "draw what led to a prediction",
        "Which earlier tokens, through which layers, led to the prediction at the prompt's end (or at --at), and "
        "are the edges drawn the ones that count (--verify).",
        (_options_of_a_run(0), _draw),
    ),
    Command(
        "cut",
        "cut attention edges and see what follows",
        "What is predicted before and after some attention edges are cut: those given, or the strongest for the prediction.",
        (_options_of_a_run(0), _cut),
    ),
    Command(
        "generate",
        "write on from a prompt",
        "Write on, token by token.",
        (_options_of_a_run(50), _generate),
    ),
    Command(
        "trace",
        "record reads and writes of the cache",
        "Record a run into a folder NAME.nkv: trace.json and a safetensors file for each forward call.",
        (_options_of_a_run(None, prompt_needed=False), _trace),
    ),
    Command(
        "check",
        "test the laws that hold of every trace",
        "Test what must hold of every trace, whatever the model: who wrote which slot, who read it, what follows "
        "from what. Exit status 1 if a law is broken.",
        (_check,),
    ),
    Command(
        "show",
        "tell a trace in words",
        "What each call wrote and whom its positions read.",
        (_show,),
    ),
    Command(
        "why",
        "tell the arithmetic of one number",
        "One number's arithmetic, operation by operation, with its actual operands, in the order that "
        "docs/arithmetic.md states.",
        (_why,),
    ),
    Command(
        "diff",
        "find where two traces part",
        "The first number that differs, in the order of computation, and the largest difference of each site. Exit "
        "status 1 if any differs. Numbers are compared position by position, however the tokens were split into "
        "calls.",
        (_diff,),
    ),
    Command(
        "export",
        "write a trace for other programs",
        "Parquet: a folder with a file for each table. jsonl: the tables' rows as JSON lines. dump: the arrays by "
        "id, which nanokv diff reads.",
        (_export,),
    ),
    Command(
        "models",
        "list the models known by name",
        "List the models that --model knows by name.",
    ),
)
