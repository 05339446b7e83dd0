"""The other end of worker.py: start a peer's process, ask it, and watch who else used the processor meanwhile."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TICK = os.sysconf("SC_CLK_TCK")  # the unit of /proc's processor times: so many a second
SLOWS_OPENBLAS = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")  # choices for another machine, which slow NumPy's own OpenBLAS


class PeerError(Exception):
    """A peer gave an error, or no answer in time."""


class Worker:
    """A peer's process."""

    def __init__(self, log: Path, threads: int, without: Iterable[str] = ()) -> None:
        self.log, self.loaded = log, dict[str, float]()
        with open(log, "wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "worker.py")], env=environment(os.environ, threads, without), stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=stderr, text=True, bufsize=1,
            )  # fmt: skip

    def ask(self, do: str, arguments: Mapping[str, Any] | None = None, patience: float = 60) -> Any:
        """What the peer answers. PeerError if that is an error, or nothing within `patience` seconds: then it is stopped."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            print(json.dumps({"do": do, "with": arguments or {}}), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            raise PeerError(self._last_words()) from None
        if not select.select([self.process.stdout], [], [], patience)[0]:
            self.stop()
            raise PeerError(f"no answer to {do!r} within {patience:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            raise PeerError(self._last_words())
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer["value"]

    def processor_seconds(self) -> float:
        """Processor time that the process has used so far, in all its threads."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            return 0.0
        return (int(fields[11]) + int(fields[12])) / TICK

    def stop(self) -> None:
        """End the process, by its own end of input if it listens."""
        if self.process.stdin is not None:
            with suppress(BrokenPipeError):  # a process that died has left what was written to it
                self.process.stdin.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def _last_words(self) -> str:
        self.process.wait(5)
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return f"its process ended with status {self.process.returncode}" + (f": {lines[-1][:200]}" if lines else "")


def environment(given: Mapping[str, str], threads: int, without: Iterable[str] = ()) -> dict[str, str]:
    """A worker's environment: so many threads for every library that could start some."""
    kept = {name: value for name, value in given.items() if name not in set(without)}
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
    return kept | dict.fromkeys(names, str(threads)) | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), *_given_path(given)])}


def _given_path(given: Mapping[str, str]) -> list[str]:
    return [given["PYTHONPATH"]] if given.get("PYTHONPATH") else []


class Watch:
    """Which share of the machine's processor time goes to others than the worker that is measured."""

    def __init__(self, worker: Worker, idle: Iterable[Worker]) -> None:
        self.worker, self.idle, self.cores = worker, list(idle), os.cpu_count() or 1
        self.before = self._now()

    def shares(self) -> tuple[float, float]:
        """Since the beginning: the share of everybody else, and of the idle workers among them."""
        seconds, busy, own, idle = (b - a for a, b in zip(self.before, self._now(), strict=True))
        whole = max(seconds * self.cores, 1 / TICK)
        return max(busy - own, 0.0) / whole, idle / whole

    def _now(self) -> tuple[float, float, float, float]:
        """Seconds: of the clock, and of processor time of all, of the worker, and of the idle ones."""
        ticks = [int(part) for part in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        busy = (sum(ticks) - ticks[3] - ticks[4]) / TICK  # without idle and waiting for a disk
        return time.perf_counter(), busy, self.worker.processor_seconds(), sum(w.processor_seconds() for w in self.idle)


def first_output(command: list[str], threads: int) -> tuple[float | None, str]:
    """Seconds from starting a command to the first byte that it prints, and all that it prints; None, "" if it fails."""
    began = time.perf_counter()
    env, quiet = environment(os.environ, threads), subprocess.DEVNULL
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=quiet) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        seconds = time.perf_counter() - began
        printed = first + process.stdout.read()
    return (seconds, printed.decode(errors="replace")) if process.returncode == 0 and first else (None, "")
