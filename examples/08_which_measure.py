"""Which picture lies: what measures of attention call important, against what changes when it is taken away.

In the hand-made induction model the truth is known: of all edges exactly two carry the prediction, one by the value that it
brings, one by the key that it makes. Every measure is asked for its picture of it, pruned to 90% of the influence. In SmolLM2
the truth is what taking away does: of the ten edges that a measure puts first what they brought is taken away (their value;
the other weights stay), and the change of the difference between the right name's logit and the other's is compared with
taking ten edges by chance. Cut altogether, an edge's weight goes to the others of its row.
"""

from lab import Lab, Verdict, interval, main, smollm2, with_interval  # isort: skip
import numpy as np
from figures import Curves, figure

from nanokv import Cut, Transformer, ZeroValue
from nanokv.handmade import induction
from nanokv.trace import Flow, Recorder, Trace
from nanokv.trace.measures import MEASURES

THREAD = (
    "Well no, there is attention in the LLM which allows it to look back at it's \"internal thought\" during the previous "
    "tokens.",
    "A plan/reasoning made during the forward pass of token 0 can be looked at by subsequent",
)
ADDS = "before pictures are believed: a measure that is drawn must agree with what happens when its edges are cut"
PAPERS = ("ferrando",)
PROMPT = "When Mary and John went to the store, John gave a drink to"
CHEAP = [name for name in MEASURES if name not in ("knockout", "value-zero")]  # those that run nothing again
Edge = tuple[int, int, int, int]  # layer, head, dst, src


def first(flow: Flow, n: int) -> list[Edge]:
    """The n attention edges from one position to another that speak most for the prediction."""
    edges = flow.edges[(flow.edges["kind"] == 0) & (flow.edges["src"] < flow.edges["dst"])]
    edges = edges[np.argsort(-edges["weight"], kind="stable")[:n]]
    return [tuple(int(edge[name]) for name in ("layer", "head", "dst", "src")) for edge in edges]


def without(model: Transformer, tokens: list[int], edges: list[Edge], kind: type = Cut) -> np.ndarray:
    """The last logits when these edges are cut, or what they brought is taken away."""
    return model.forward(tokens, edits=[kind(l, dst, src, head) for l, head, dst, src in edges], last_logits_only=True)[-1]


def by_hand(lab: Lab) -> None:
    """Every measure's picture of the induction model, beside the truth."""
    model, ids, recorder = induction(12, 24), [0, 3, 7, 5, 9, 3], Recorder(level="states")
    clean = model.forward(ids, observer=recorder)[-1]
    every = [(layer, 0, dst, src) for layer in range(2) for dst in range(6) for src in range(dst)]
    true = {edge for edge in every if not np.array_equal(without(model, ids, [edge]), clean)}
    lab.check(true == {(0, 0, 2, 1), (1, 0, 5, 2)}, "of all edges between positions exactly two change the prediction when cut")
    pictures = {}
    for name in MEASURES:
        flow = recorder.trace.flow(model, measure=name, at=5).prune(0.9)
        pictures[name] = set(first(flow, len(flow.edges)))
    rows = [[name, ", ".join(f"layer {l}: {d}<-{s}" for l, _, d, s in sorted(kept)), len(true & kept), len(kept - true)]
            for name, kept in pictures.items()]  # fmt: skip
    lab.table("Hand-made induction, [0 3 7 5 9 3] -> 7: edges in the picture (true: layer 0: 2<-1, layer 1: 5<-2)",
              ("measure", "edges between positions", "true", "false"), rows)  # fmt: skip
    lab.check(pictures["knockout"] == pictures["value-zero"] == true, "what runs again finds both true edges and no other")
    lab.check(pictures["target"] == {(1, 0, 5, 2)}, "target finds the true edge that brings the answer, no false one, and not "
              "the one that works through a key")  # fmt: skip
    lab.check(all((0, 0, 5, 4) in pictures[name] for name in ("attention", "rollout", "norm")),
              "attention, rollout and norm believe in an edge that nothing reads")  # fmt: skip


def by_taking_away(lab: Lab, trace: Trace, counts: list[int]) -> tuple[float, dict[str, tuple], list[list[float]]]:
    """SmolLM2's logit difference; and its changes: for each measure without its first edges, and by chance."""
    model, tokens = smollm2(), smollm2().tokenizer.encode(PROMPT)
    mary, john = (model.tokenizer.encode(name)[0] for name in (" Mary", " John"))
    clean = without(model, tokens, [])
    whole = float(clean[mary] - clean[john])

    def change(edges: list[Edge], kind: type = ZeroValue) -> float:
        logits = without(model, tokens, edges, kind)
        return float(logits[mary] - logits[john]) - whole

    found = {}
    for name in CHEAP:
        top = first(trace.flow(model, measure=name, **aim(name)), counts[-1])
        found[name] = [change(top[:n]) for n in counts], sum(src == 0 for *_, src in top[:10]), change(top[:10], Cut)
    chance, n = np.random.default_rng(0), len(tokens)
    pool = [(l, h, d, s) for l in range(30) for h in range(9) for d in range(n) for s in range(d)]
    drawn = [[change([pool[i] for i in chance.choice(len(pool), k, replace=False)]) for _ in range(lab.amount(5, 40))]
             for k in counts]  # fmt: skip
    return whole, found, drawn


def aim(name: str) -> dict[str, str]:
    return {"token": " Mary", "against": " John"} if MEASURES[name].aimed else {}


def run(lab: Lab) -> Verdict:
    by_hand(lab)
    recorder, counts = Recorder(level="states"), [1, 3, 10] if lab.quick else [1, 2, 3, 5, 10, 20, 40]
    smollm2().forward(smollm2().tokenizer.encode(PROMPT), observer=recorder)
    whole, found, drawn = by_taking_away(lab, recorder.trace, counts)
    ten = counts.index(10)
    mean, low, _ = interval(drawn[ten])
    lab.table(f"SmolLM2: logit(Mary) - logit(John) is {whole:.2f}; its change by ten edges",
              ("the ten first by", "what they brought taken away", "cut altogether", "of them from position 0"),
              [*([name, change[ten], cut, f"{sinks} of 10"] for name, (change, sinks, cut) in found.items()),
               [f"chance ({len(drawn[ten])} draws)", with_interval(drawn[ten]), "", ""]])  # fmt: skip
    change, sinks = ({name: each[i] for name, each in found.items()} for i in (0, 1))
    lab.check(change["attention"][ten] > change["norm"][ten] + 1, "the first by attention matter less than those by norm")
    lab.check(change["target"][ten] < min(change[name][ten] for name in CHEAP if name != "target") - 1 and
              change["target"][ten] < low - 1, "the first by target matter most, and more than ten by chance")  # fmt: skip
    lines = [*((name, counts, each) for name, each in change.items()), ("chance, mean", counts, np.mean(drawn, axis=1))]
    lab.draw(figure([Curves("Take what the first edges brought", lines, "edges", "change of the logit difference")]),
             "A measure is as good as what happens without its edges. Attention's line lies under that of chance.")  # fmt: skip
    shown = recorder.trace.flow(smollm2(), measure="target", heads="merged", **aim("target"))
    lab.draw(shown.prune(0.6), "What led to Mary rather than John, by target.", "_flow")
    return Verdict(
        "right, with a condition",
        "It does look back, and two edges of the hand-made model, cut, prove it. But attention weight does not show where: a "
        f"logit difference of {whole:.1f} changes by {change['attention'][ten]:+.2f} without what the ten edges of most weight "
        f"brought ({sinks['attention']} of them from the first token), by {mean:+.2f} without ten by chance, and by "
        f"{change['target'][ten]:+.1f} without the ten that speak most for it by target.",
        anew=f"the ten edges of most attention bring nothing: {change['attention'][ten]:+.2f} of {whole:.1f} without them",
        builds=f"without the ten that speak most for the answer: {change['target'][ten]:+.1f} of {whole:.1f}",
    )


if __name__ == "__main__":
    main(run)
