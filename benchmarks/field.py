"""The peers of a run that are alive, each in its process, and those that are not, each with the reason."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.models import Model
from benchmarks.plan import Peer, Plan
from benchmarks.results import Results
from benchmarks.workers import SLOWS_OPENBLAS, PeerError, Watch, Worker

PAUSE = 0.1  # seconds between measurements, in which threads that wait for more work fall asleep
PATIENCE = 300.0  # seconds that a peer may take for one answer


class OutOfTimeError(Exception):
    """The run has lasted as long as it may."""


class Field:
    """Workers by the name of their peer. What becomes of the peers is noted in `results`."""

    def __init__(self, plan: Plan, model: Model, results: Results, scratch: Path, say: Callable[[str], None]) -> None:
        self.plan, self.model, self.results, self.scratch, self.say = plan, model, results, scratch, say
        self.deadline = time.monotonic() + 60 * plan.minutes
        self.peers: dict[str, Peer] = {}
        self.workers: dict[str, Worker] = {}
        self._n_started = 0

    def open(self, peer: Peer) -> Worker:
        """A new process that has loaded the peer. PeerError if it cannot."""
        if peer.form and peer.form not in self.model.paths:
            raise PeerError("it needs a GGUF file, which the model is not")
        settings: dict[str, Any] = {"tokens": self.model.tokens, "threads": self.plan.threads, **peer.settings}
        if peer.form:
            settings["path"] = str(self.model.paths[peer.form])
        elif peer.group in self.model.n_bytes:
            settings["n_bytes"] = self.model.n_bytes[peer.group]
        else:
            raise PeerError("there are no weights of that kind")
        self._n_started += 1
        without = SLOWS_OPENBLAS if peer.settings.get("ops") == "numpy" else ()
        worker = Worker(self.scratch / f"{self._n_started}.log", self.plan.threads, without)
        try:
            worker.loaded = worker.ask("load", {"program": peer.program, "settings": settings}, self.patience())
        except PeerError:
            worker.stop()
            raise
        return worker

    def start(self, peer: Peer, contexts: list[int]) -> None:
        """Open a peer that is to stay, with caches of so many positions."""
        with self.dropping(peer):
            self.peers[peer.name], self.workers[peer.name] = peer, self.open(peer)
            self.ask(peer, "prepare", contexts=contexts)
            self.results.about[peer.name] = self.ask(peer, "about")

    def ask(self, peer: Peer, do: str, **arguments: Any) -> Any:
        """What a running peer answers."""
        return self.workers[peer.name].ask(do, arguments, self.patience())

    def patience(self) -> float:
        """Seconds to wait for an answer. OutOfTimeError once the run has lasted as long as it may."""
        left = self.deadline - time.monotonic()
        if left < 0:
            raise OutOfTimeError
        return min(PATIENCE, left + 60)

    def running(self, measure: str) -> list[Peer]:
        """Who takes part in a measure and is alive."""
        return [peer for name, peer in self.peers.items() if name in self.workers and measure in peer.offers]

    def watch(self, peer: Peer) -> Watch:
        """After a moment of quiet, what tells later who used the processor while this peer was measured."""
        time.sleep(PAUSE)
        return Watch(self.workers[peer.name], [worker for name, worker in self.workers.items() if name != peer.name])

    @contextlib.contextmanager
    def dropping(self, peer: Peer) -> Iterator[None]:
        """A peer that fails within is stopped and noted as skipped."""
        try:
            yield
        except PeerError as error:
            hint = f" (pip install 'nanokv[{peer.extra}]')" if "No module named" in str(error) else ""
            self.results.skipped[peer.name] = f"{error}{hint}"
            self.say(f"  {peer.name} is skipped: {error}{hint}")
            if worker := self.workers.pop(peer.name, None):
                worker.stop()

    def stop(self) -> None:
        """End all processes."""
        while self.workers:
            self.workers.popitem()[1].stop()
