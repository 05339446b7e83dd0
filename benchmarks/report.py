"""Results -> RESULTS.md."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from benchmarks.goals import Goal, goals
from benchmarks.plan import GRAPH, GROWN_FROM, GROWN_TO, MOST_RECORDED, Peer, peers
from benchmarks.ratios import Spread, growth, races, spread, times
from benchmarks.results import Results

METHOD = """\
Each peer is a process of its own that stays alive and waits, idle, while others are measured. A round takes every measure
once of every peer; who comes first changes from round to round. nanokv is measured between every two of its rivals, and a
ratio is a rival's time over the mean of nanokv's times just before and just after it: **above 1, nanokv is faster**. Then
the median over the rounds, and in brackets the lowest and the highest. Speed of memory and clock of a machine, above all of a
virtual one, drift over minutes, so compare ratios, not milliseconds of different runs.

- *Decode*: greedy steps of one token, the largest logit searched for included; the median of {tokens} after one more.
  *Prefill*: one call with {prefill} tokens, of which the last one's logits alone are asked for.
- *read*: a sum over a float32 array of as many bytes as the weights have, with as many threads, in a process without nanokv:
  what the memory can do, so about the most that decoding can reach. (An array that fits the processor's caches is faster.)
- *llama.cpp* is called through llama-cpp-python at its lowest level, `llama_decode`, with its defaults: a cache of float16
  (nanokv's is float32), flash attention where it sees fit. Its quantised models also quantise activations; nanokv's do not.
  *float32 throughout*, in the table of errors, is a float32 cache without flash attention.
- *transformers* runs its plain forward (sdpa) with a DynamicCache, without the overhead of `generate()`.
- *NumPy* is nanokv with `ops="numpy"`, the readable operations, whose products are OpenBLAS's. In this process alone
  OPENBLAS_CORETYPE and OPENBLAS_L2_SIZE are unset: where they are set, they were chosen for another OpenBLAS, and slow it.
- The F32 and Q8_0 files were made from {model}: dequantised, and the matrices quantised anew."""


def markdown(results: Results, picture: str | None = None) -> str:
    """The whole page. picture: the file name of the plot, if there is one."""
    sections = [_head(results), _goals(results), [f"![Ratios and times]({picture})"] if picture else [], _decode(results),
                _prefill(results), _fresh(results), _errors(results), _recordings(results), _drawings(results),
                _method(results)]  # fmt: skip
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table; [] if it has no row."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return [f"| {' | '.join(header)} |", "|" + "---|" * len(header), *lines] if lines else []


def shown(found: Spread | None, digits: int = 2, scale: float = 1.0) -> str:
    """median (low–high); nothing if it was not measured."""
    if found is None:
        return ""
    median, low, high = (f"{scale * x:.{digits}f}" for x in (found.median, found.low, found.high))
    return f"{median} ({low}–{high})" if found.n > 1 else median


def _head(results: Results) -> list[str]:
    ran = max((sample.round for sample in results.samples), default=-1) + 1
    facts = [*results.machine.items(), *((name, version) for name, version in results.versions.items())]
    return [
        "# Measured",
        "",
        f"{results.model}, {results.n_weights / 1e6:.1f} million weights, {results.plan.threads} threads, one sequence; "
        f"{ran} rounds, {results.date}, {results.minutes:.0f} minutes. Made by `{results.command}`; raw numbers in "
        "[results.json](results.json).",
        *(f"\n**{note}**" for note in results.notes),
        "",
        *table(("", ""), facts),
    ]


def _goals(results: Results) -> list[str]:
    return ["## Goals", "", "Ratios of times: how many times as fast as the rival; where it says *at most*, how many times as "
            "long as.", "", *table(("what", "compared with", "goal", "measured", ""),
                                   (goal_row(goal, results) for goal in goals()))]  # fmt: skip


def goal_row(goal: Goal, results: Results) -> tuple[str, ...]:
    """What, compared with, goal, measured, and whether it is met."""
    found = goal.measured(results)
    unit = {"x": "×"}.get(goal.unit, goal.unit)
    limit = f"{'at least' if goal.at_least else 'at most'} {goal.limit:g} {unit}"
    verdict = "not measured" if found is None else "met" if goal.met(found) else "**not met**"
    return goal.what, goal.compared, limit, shown(found, 0 if goal.unit == "MB" else 2), verdict


def _everybody(results: Results, measure: str) -> Iterator[Peer]:
    """The peers that take part in a measure and were asked to."""
    for peer in peers(results.kind):
        if measure in peer.offers and (peer.name in results.about or peer.name in results.skipped):
            yield peer


def _reference(results: Results, peer: Peer) -> str:
    """The name of whom a peer races."""
    return next((each.name for each in peers(results.kind) if each.reference and each.group == peer.group), "")


def _race_cell(results: Results, measure: str, peer: Peer) -> str:
    """Milliseconds, and the ratio to the reference of the peer's group."""
    found = spread(times(results.samples, measure, peer.name))
    ratio = spread(races(results.samples, measure, _reference(results, peer), peer.name))
    if found is None:
        return ""
    digits = 2 if found.median < 0.1 else 0
    return f"{1000 * found.median:.{digits}f}" + (f"; {shown(ratio)} ×" if ratio and not peer.reference else "")


def _decode(results: Results) -> list[str]:
    contexts = results.plan.contexts
    before, after = f"decode@{GROWN_FROM}", f"decode@{GROWN_TO}"
    grows = GROWN_FROM in contexts and GROWN_TO in contexts
    rows = []
    for peer in _everybody(results, "decode"):
        cells = [_race_cell(results, f"decode@{context}", peer) for context in contexts]
        if grows:
            own_growth = spread(growth(results.samples, peer.name, before, after))
            cells.append("" if peer.name.startswith("read") else shown(own_growth))
        rows.append((peer.name, *_or_reason(results, peer.name, cells)))
    header = ["", *(f"context {context}" for context in contexts), *([f"growth {GROWN_TO}/{GROWN_FROM}"] if grows else [])]
    lines = table(header, rows)
    about = ["", "Milliseconds a token, median of the rounds; then the ratio to nanokv in the same form.", ""]
    return ["## Decode", *about, *lines] if _was_measured(results, "decode@") else []


def _was_measured(results: Results, measure: str) -> bool:
    """Whether there is any sample of a measure, or of those whose names begin so."""
    return any(sample.measure.startswith(measure) for sample in results.samples)


def _or_reason(results: Results, name: str, cells: list[str]) -> list[str]:
    """The cells; or, of a peer of whom there are none, why."""
    if name in results.skipped and not any(cells):
        return [f"skipped: {results.skipped[name]}", *[""] * (len(cells) - 1)]
    return cells


def _prefill(results: Results) -> list[str]:
    n, measure, rows = results.plan.prefill, f"prefill@{results.plan.prefill}", []
    for peer in _everybody(results, "prefill"):
        found = spread(times(results.samples, measure, peer.name))
        speed = f"{n / found.median:.0f}" if found else ""
        rows.append((peer.name, *_or_reason(results, peer.name, [_race_cell(results, measure, peer), speed])))
    lines = table(("", "ms; ratio to nanokv", "tokens a second"), rows)
    return [f"## Prefill of {n}", "", *lines] if _was_measured(results, measure) else []


def _fresh(results: Results) -> list[str]:
    rows = []
    for peer in _everybody(results, "fresh"):
        own = [each for each in results.fresh if each.peer == peer.name]
        cells = [shown(spread(each.imports for each in own)), shown(spread(each.load for each in own)),
                 shown(spread(each.first_prefill for each in own)), shown(spread(each.loaded_bytes for each in own), 0, 1e-6),
                 shown(spread(each.peak_bytes for each in own), 0, 1e-6)]  # fmt: skip
        rows.append((peer.name, *_or_reason(results, peer.name, cells)))
    if not results.fresh:
        return []
    n = results.plan.prefill
    header = ("", "imports, s", "load, s", "first prefill, s", "peak memory after load, MB", f"with {n} positions, MB")
    about = (f"A new process each time, nanokv's compiled kernels being on the disk: it loads, prefills, and decodes the last "
             f"few of {n} positions. Memory is VmHWM: the most that it had, mapped pages of files included.")  # fmt: skip
    commands = [f"\n`{name}`: {shown(spread(seconds))} s." for name, seconds in _commands(results)]
    return ["## Start and memory", "", about, "", *table(header, rows), *commands]


def _commands(results: Results) -> Iterator[tuple[str, list[float]]]:
    shown_as = {"import nanokv": "import nanokv", "first token": "nanokv generate, from the shell to the first token"}
    return ((shown_as[name], seconds) for name, seconds in results.commands.items() if seconds)


def _errors(results: Results) -> list[str]:
    if not results.errors:
        return []
    rows = []
    for peer in _everybody(results, "error"):
        found = results.errors.get(peer.name)
        cells = [f"{found['max']:.2e}", f"{found['rms']:.2e}"] if found else ["", ""]
        same = found is not None and found["same"] == 1 and peer.name != "nanokv float32"
        rows.append((peer.name, *_or_reason(results, peer.name, cells), "the same bits as nanokv float32" if same else ""))
    about = (f"Logits at {results.plan.error_tokens} positions of one text, less those that NumPy computes of the same weights "
             "in float64. Reproducible is not the same as accurate: compare the rows of nanokv and NumPy (BLAS).")  # fmt: skip
    return ["## Error against float64", "", about, "", *table(("", "largest", "root mean square", ""), rows)]


def _recordings(results: Results) -> list[str]:
    rows = []
    for peer in _everybody(results, "recording"):
        for what in ("prefill", "decode"):
            own = [each for each in results.recordings if (each.peer, each.what) == (peer.name, what)]
            cells = [shown(spread(each.plain for each in own), 0, 1e3), shown(spread(each.ratio for each in own), 3),
                     shown(spread(each.close for each in own), 0, 1e3) if any(each.close for each in own) else "",
                     shown(spread(each.bytes for each in own), 1, 1e-6)]  # fmt: skip
            rows.append((f"{peer.name}, {what}", *_or_reason(results, peer.name, cells)))
    if not results.recordings:
        return []
    header = ("", "not recorded, ms", "recorded / not recorded", "then closing the trace, ms", "MB")
    lines = ["## Recording", "", _about_recording(results), "", *table(header, rows)]
    if results.levels:
        levels = ", ".join(f"{level} {n:,.0f}" for level, n in results.levels.items())
        lines.append(f"\nBytes on disk for each position of a prefill of {results.plan.prefill}, by level: {levels}.")
    return lines


def _about_recording(results: Results) -> str:
    plan = results.plan
    return (f"A prefill of {plan.prefill}, and a decode of {plan.recorded_tokens} tokens after one (transformers: at most "
            f"{MOST_RECORDED}), with and without keeping the attention weights. nanokv records them to the disk, at level "
            "weights; transformers gives them as `output_attentions`, in memory. Closing waits for the disk.")  # fmt: skip


def _drawings(results: Results) -> list[str]:
    rows = []
    for what in dict.fromkeys(each.what for each in results.drawings):
        own = [each for each in results.drawings if each.what == what]
        name, size = what.split("@")
        words = {"graph": f"{size} edges, by us", "dot": f"{size} edges, by dot"}.get(name, f"{size} tokens, by {name}")
        parts = ", ".join(f"{part} {shown(spread(each.seconds[part] for each in own))}" for part in own[0].seconds)
        whole = shown(spread(each.whole for each in own)) if own[0].ended else f"more than {own[0].whole:g}"
        memory = shown(spread(each.peak_bytes for each in own), 0, 1e-6) if own[0].peak_bytes else ""
        rows.append((words, whole, parts if len(own[0].seconds) > 1 else "", memory))
    if not rows:
        return []
    about = (f"Each in a new process. By a measure: a trace on the disk, of level states, becomes the graph of its last "
             f"prediction, is pruned to its strongest edges, and written as SVG. Edges: a graph of {GRAPH[0]} layers and "
             f"{GRAPH[1]} positions, drawn by chance and not pruned; by us, its places are computed and graphviz only draws "
             "(`neato -n2`); by dot, graphviz's layered layout finds them. Memory is VmHWM, the model included.")  # fmt: skip
    return ["## Drawing", "", about, "", *table(("", "s", "of which", "peak memory, MB"), rows)]


def _method(results: Results) -> list[str]:
    plan = results.plan
    lines = ["## How", "", METHOD.format(tokens=plan.tokens, prefill=plan.prefill, model=results.model), ""]
    if results.samples:
        lines += [_quiet(results), ""]
    for what, said in (("", results.about), ("skipped: ", results.skipped)):
        for text in dict.fromkeys(filter(None, said.values())):
            lines.append(f"- {', '.join(name for name in said if said[name] == text)}: {what}{text}")
    return lines


def _quiet(results: Results) -> str:
    """How quiet the machine was."""
    spans = [sum(sample.seconds) for sample in results.samples]
    others, idle = (
        100 * sum(span * share for span, share in zip(spans, shares, strict=True)) / sum(spans)
        for shares in zip(*((sample.others, sample.idle) for sample in results.samples), strict=True)
    )
    return (f"While a peer was measured, everybody else together used {others:.1f}% of the machine's processor time, the "
            f"waiting workers {idle:.2f}% of it.")  # fmt: skip


def summary(results: Results) -> str:
    """The goals, for a terminal."""
    rows = [goal_row(goal, results) for goal in goals()]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join("  ".join([*map(str.ljust, row, widths), row[4]]) for row in rows)
