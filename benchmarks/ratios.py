"""Measurements, and what is made of them: ratios within a round, and their median and range."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """One measurement of one peer."""

    round: int
    measure: str  # such as decode@16
    group: str
    peer: str
    seconds: list[float]  # of each repetition within it
    others: float = 0.0  # the share of the machine's processor time that went to anybody else meanwhile
    idle: float = 0.0  # and the part of it that went to workers that should have been idle

    @property
    def typical(self) -> float:
        """Seconds: the median of its repetitions."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Spread:
    """The median and the range of some numbers."""

    median: float
    low: float
    high: float
    n: int


def spread(values: Iterable[float]) -> Spread | None:
    """None if there are no values."""
    found = sorted(values)
    return Spread(statistics.median(found), found[0], found[-1], len(found)) if found else None


def times(samples: Sequence[Sample], measure: str, peer: str) -> list[float]:
    """Seconds of each measurement of a peer."""
    return [sample.typical for sample in samples if (sample.measure, sample.peer) == (measure, peer)]


def races(samples: Sequence[Sample], measure: str, reference: str, rival: str) -> list[float]:
    """The rival's time over the reference's, one number a round; above 1 the reference was faster.

    The reference's time is the mean of its measurements just before and just after the rival's: memory and clock of a
    machine drift over minutes, so that only neighbours compare.
    """
    found = []
    for sequence in _rounds(samples, measure):
        for i, sample in enumerate(sequence):
            if sample.peer == rival:
                beside = [next((s for s in side if s.peer == reference), None) for side in (sequence[:i][::-1], sequence[i:])]
                known = [neighbour.typical for neighbour in beside if neighbour is not None]
                if known:
                    found.append(sample.typical / statistics.mean(known))
    return found


def growth(samples: Sequence[Sample], peer: str, before: str, after: str) -> list[float]:
    """A peer's time in one measure over its time in another, one number a round."""
    found = []
    for number in sorted({sample.round for sample in samples}):
        own = [sample for sample in samples if sample.round == number]
        low, high = times(own, before, peer), times(own, after, peer)
        if low and high:
            found.append(statistics.mean(high) / statistics.mean(low))
    return found


def _rounds(samples: Sequence[Sample], measure: str) -> list[list[Sample]]:
    """The samples of a measure, in the order in which they were taken, one list for each round and group."""
    found: dict[tuple[int, str], list[Sample]] = {}
    for sample in samples:
        if sample.measure == measure:
            found.setdefault((sample.round, sample.group), []).append(sample)
    return list(found.values())
