"""The run itself: start everybody, take the rounds, then look at new processes one at a time."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.field import Field, OutOfTimeError
from benchmarks.models import Model
from benchmarks.plan import GRAPH, MOST_RECORDED, Peer, Plan, order
from benchmarks.ratios import Sample
from benchmarks.results import Drawn, Fresh, Recording, Results
from benchmarks.workers import first_output

PROMPT = "The capital of France is"
IMPORT = "import time; began = time.perf_counter(); import nanokv; print(time.perf_counter() - began)"


class Run:
    """One run. What it finds goes into `results`."""

    def __init__(self, plan: Plan, measures: Sequence[str], model: Model, results: Results, scratch: Path,
                 say: Callable[[str], None]) -> None:  # fmt: skip
        self.plan, self.measures, self.model, self.results, self.scratch = plan, set(measures), model, results, scratch
        self.began = time.monotonic()
        self._say = say
        self.field = Field(plan, model, results, scratch, self.say)

    def say(self, text: str) -> None:
        """Progress, with the time since the run began."""
        self._say(f"[{time.monotonic() - self.began:4.0f} s] {text}")

    def all(self, everybody: Sequence[Peer]) -> None:
        """Everything that was asked for, in order, or as much of it as there is time for."""
        asked = [peer for peer in everybody if self.measures & {*peer.offers}]
        try:
            self._together(asked)
            self.field.stop()
            if "fresh" in self.measures:
                self._fresh([peer for peer in asked if peer.name not in self.results.skipped and "fresh" in peer.offers])
            for peer in asked if "drawing" in self.measures else ():
                if "drawing" in peer.offers:
                    with self.field.dropping(peer):
                        self._drawings(peer)
        except OutOfTimeError:
            self.results.notes.append(f"Stopped after {self.plan.minutes:g} minutes, before everything was measured.")
            self.say("out of time")
        finally:
            self.field.stop()
        self.results.minutes = self._minutes()

    def _together(self, asked: Sequence[Peer]) -> None:
        """What is measured while everybody is alive."""
        for peer in (peer for peer in asked if set(peer.offers) != {"drawing"}):
            self.say(f"starting {peer.name}")
            self.field.start(peer, self._contexts(peer))
        loads = [worker.loaded for worker in self.field.workers.values()]
        if "error" in self.measures:
            self._errors()
        if self.measures & {"decode", "prefill", "recording"}:
            self._rounds(until=self.plan.minutes - self._minutes_of_fresh(loads) - self._minutes_of_drawings())

    def _contexts(self, peer: Peer) -> list[int]:
        """The caches that a peer will need."""
        decoded = self.plan.contexts if "decode" in self.measures & {*peer.offers} else ()
        recorded = (self.plan.prefill,) if "recording" in self.measures & {*peer.offers} else ()
        return sorted({*decoded, *recorded})

    def _errors(self) -> None:
        """Logits of every peer against those in float64."""
        asked = self.field.running("error")
        numpy = next((peer for peer in asked if peer.settings.get("ops") == "numpy"), None)
        if numpy is None:
            self.results.notes.append("No errors: the peer NumPy, which computes them, took no part.")
            return
        self.say("errors against float64")
        n, exact, own = self.plan.error_tokens, self.scratch / "float64.npy", self.scratch / "logits.npy"
        with self.field.dropping(numpy):
            self.field.ask(numpy, "save_float64", n=n, path=str(exact))
        first = None
        for peer in asked if exact.exists() else ():
            with self.field.dropping(peer):
                self.field.ask(peer, "save_logits", n=n, path=str(own))
                logits = np.load(own)
                first = logits if first is None else first
                self.results.errors[peer.name] = error(logits, np.load(exact)) | {"same": float(np.array_equal(first, logits))}

    def _rounds(self, until: float) -> None:
        """The rounds, as many as fit into so many minutes."""
        longest = 0.0
        for number in range(self.plan.rounds):
            before = self._minutes()
            if number > 0 and before + longest > until:
                few = f"Only {number} of {self.plan.rounds} rounds fitted into {self.plan.minutes:g} minutes."
                self.results.notes.append(few)
                return
            self.say(f"round {number + 1} of {self.plan.rounds}")
            self._round(number)
            longest = max(longest, self._minutes() - before)

    def _round(self, number: int) -> None:
        """Every measure once of every peer."""
        races: list[tuple[str, int, dict[str, int]]] = []
        if "decode" in self.measures:
            races += [("decode", context, {"context": context, "n": self.plan.tokens}) for context in self.plan.contexts]
        if "prefill" in self.measures:
            races.append(("prefill", self.plan.prefill, {"n": self.plan.prefill}))
        for turn, (do, size, arguments) in enumerate(races):
            running = self.field.running(do)
            for group in order(list(dict.fromkeys(peer.group for peer in running)), None, number):
                members = {peer.name: peer for peer in running if peer.group == group}
                reference = next((name for name, peer in members.items() if peer.reference), None)
                for name in order([name for name in members if name != reference], reference, number + turn):
                    self._sample(number, f"{do}@{size}", members[name], do, arguments)
        if "recording" in self.measures:
            for peer in self.field.running("recording"):
                self._record(number, peer)

    def _sample(self, number: int, measure: str, peer: Peer, do: str, arguments: dict[str, Any]) -> None:
        """One measurement of one peer, while the others are idle."""
        if peer.name not in self.field.workers:
            return
        watch = self.field.watch(peer)
        with self.field.dropping(peer):
            seconds = self.field.ask(peer, do, **arguments)
            self.results.samples.append(Sample(number, measure, peer.group, peer.name, seconds, *watch.shares()))

    def _record(self, number: int, peer: Peer) -> None:
        """The same with and without keeping attention weights; once, what each level of a trace takes on the disk."""
        n = self.plan.recorded_tokens if peer.reference else min(self.plan.recorded_tokens, MOST_RECORDED)
        asked = {"prefill": {"n": self.plan.prefill}, "decode": {"context": self.plan.prefill, "n": n, "first": number % 2}}
        with self.field.dropping(peer):
            for what, arguments in asked.items():
                self.field.watch(peer)
                found = self.field.ask(peer, f"record_{what}", **arguments)
                self.results.recordings.append(Recording(number, peer.name, what, **found))
            if number == 0 and peer.reference:
                self.results.levels = self.field.ask(peer, "record_levels", n=self.plan.prefill)

    def _fresh(self, asked: Sequence[Peer]) -> None:
        """New processes, one at a time: how long they take to load, and how much memory they come to need."""
        for number in range(self.plan.fresh):
            self.say(f"new processes, {number + 1} of {self.plan.fresh}")
            if any(peer.reference for peer in asked):
                self._command()
            names = order([peer.name for peer in asked], None, number)
            for peer in sorted(asked, key=lambda peer: names.index(peer.name)):
                with self.field.dropping(peer):
                    self.results.fresh.append(self._fresh_process(peer))

    def _fresh_process(self, peer: Peer) -> Fresh:
        worker = self.field.open(peer)
        try:
            loaded_bytes = worker.ask("peak_memory")
            first = worker.ask("first_steps", {"n": self.plan.prefill}, self.field.patience())
            imports, load = worker.loaded["import"], worker.loaded["load"]
            return Fresh(peer.name, imports, load, first, loaded_bytes, worker.ask("peak_memory"))
        finally:
            worker.stop()

    def _drawings(self, peer: Peer) -> None:
        """Pictures of a trace and of a large graph, as often as new processes are started; once of a long one, and dot's."""
        plan = self.plan
        for n, rounds, measures in ((plan.drawn, plan.fresh, ["target"]), (plan.drawn_long, 1, ["target", "proximity"])):
            self.say(f"pictures of {n} tokens")
            folder = str(self.scratch / f"{n}.nkv")
            self._drawn(peer, 0, "", "record", n=n, folder=folder)
            for number in range(rounds):
                for measure in measures:
                    self._drawn(peer, number, f"{measure}@{n}", "from_trace", folder=folder, measure=measure)
        self.say(f"a graph of {plan.drawn_edges} edges")
        sizes = {"n_layers": GRAPH[0], "n": GRAPH[1], "n_edges": plan.drawn_edges}
        for number in range(plan.fresh):
            self._drawn(peer, number, f"graph@{plan.drawn_edges}", "graph", **sizes, folder=str(self.scratch))
        self._drawn(peer, 0, f"dot@{plan.drawn_edges}", "layered", **sizes, most=plan.dot_seconds)

    def _drawn(self, peer: Peer, number: int, what: str, do: str, **arguments: Any) -> None:
        """One piece of work by a process of its own; `what`: what it is noted as, if at all."""
        worker = self.field.open(peer)
        try:
            self.results.about.setdefault(peer.name, worker.ask("about"))
            seconds = worker.ask(do, arguments, self.field.patience())
            if do == "layered":
                ended, seconds = seconds is not None, {"dot": self.plan.dot_seconds if seconds is None else seconds}
                self.results.drawings.append(Drawn(number, what, seconds, 0, ended))
            elif what:
                self.results.drawings.append(Drawn(number, what, seconds, worker.ask("peak_memory")))
        finally:
            worker.stop()

    def _command(self) -> None:
        """Seconds that `import nanokv` takes, and from the shell to the first token of `nanokv generate`."""
        model = str(self.model.paths["file"])
        generate = ["-m", "nanokv.cli", "generate", "--model", model, PROMPT, "--max-new-tokens", "1"]
        asked = {"first token": first_output([sys.executable, *generate], self.plan.threads)[0]}
        printed = first_output([sys.executable, "-c", IMPORT], self.plan.threads)[1]
        asked["import nanokv"] = float(printed) if printed else None
        for name, seconds in asked.items():
            if seconds is not None:
                self.results.commands.setdefault(name, []).append(seconds)

    def _minutes(self) -> float:
        return (time.monotonic() - self.began) / 60

    def _minutes_of_fresh(self, loads: Sequence[dict[str, float]]) -> float:
        """About how long the new processes will take: loading, and as long again for the rest."""
        return 2 * self.plan.fresh * sum(sum(load.values()) for load in loads) / 60 if "fresh" in self.measures else 0.0

    def _minutes_of_drawings(self) -> float:
        """About how long the pictures will take: most of it for the long trace, by `proximity`, and for dot."""
        return (self.plan.dot_seconds + self.plan.drawn_long / 8) / 60 if "drawing" in self.measures else 0.0


def error(logits: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """The largest difference and the root of the mean square of all."""
    apart = logits.astype(np.float64) - exact
    return {"max": float(np.abs(apart).max()), "rms": float(np.sqrt(np.mean(apart**2)))}
