"""nanokv itself: on its kernels, float32 or packed, and on plain NumPy."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

import nanokv
from benchmarks.peers.base import Model, by_turns, timed


class NanokvModel(Model):
    """A nanokv model. weights: how its matrices are kept; ops: what computes, "numba" or "numpy"."""

    def __init__(self, tokens: list[int], threads: int, path: str, weights: Literal["float32", "packed"] = "float32",
                 ops: str = "numba") -> None:  # fmt: skip
        super().__init__(tokens)
        self.ops = ops
        self.model = nanokv.load(path, ops=ops, weights=weights)
        if ops == "numba":
            nanokv.set_threads(threads)

    def about(self) -> str:
        if self.ops == "numpy":
            blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
            return f"{blas['name']} {blas['version']}"
        import numba

        return f"numba's threads by {numba.threading_layer()}"

    def empty(self) -> Any:
        return self.model.new_cache()

    def append(self, cache: Any, tokens: np.ndarray, recorder: Any = None) -> int:
        return int(self.model.forward(tokens, cache, observer=recorder, last_logits_only=True)[-1].argmax())

    def keep(self, cache: Any) -> Any:
        return cache.copy()

    def restore(self, kept: Any) -> Any:
        return kept.copy()

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        return self.model.forward(tokens)

    def save_float64(self, n: int, path: str) -> None:
        """The logits at the first n tokens, every operation in float64, into a .npy file: what errors are measured from."""
        wide = self.model.weights.map(lambda array: np.asarray(array, np.float64))
        np.save(path, nanokv.Transformer(self.model.config, wide, ops="numpy").forward(self.tokens[:n]))

    def record_prefill(self, n: int) -> dict[str, float]:
        """A prefill of n recorded to disk, at level `weights`, between two without a recorder."""
        before = self.prefill(n)[0]
        with _recording("weights", self.model) as recording:
            cache = self.empty()
            recorded = timed(lambda: self.append(cache, self.tokens[:n], recording.recorder))
            after = recording.close()
        return {"plain": (before + self.prefill(n)[0]) / 2, "recorded": recorded, **after}

    def record_decode(self, context: int, n: int, first: int) -> dict[str, float]:
        """n steps from a cache of `context` positions recorded to disk, at level `weights`, and n without, by turns."""
        plain, watched = self.restore(self._kept[context]), self.restore(self._kept[context])
        with _recording("weights", self.model) as recording:
            ways = {
                "plain": lambda token: self.append(plain, token),
                "recorded": lambda token: self.append(watched, token, recording.recorder),
            }
            return {**by_turns(ways, self.tokens[context : context + n], first), **recording.close()}

    def record_levels(self, n: int) -> dict[str, float]:
        """Bytes on disk for each of n positions of one call, by level; all their logits are asked for."""
        from nanokv.trace.schema import LEVELS

        found = {}
        for level in LEVELS:
            with _recording(level, self.model) as recording:
                self.model.forward(self.tokens[:n], observer=recording.recorder)
                found[level] = recording.close()["bytes"] / n
        return found


class _Recording:
    """A recorder into a folder."""

    def __init__(self, folder: Path, level: str) -> None:
        from nanokv.trace import Recorder

        self.folder, self.recorder = folder, Recorder(folder / "run.nkv", level=level)

    def close(self) -> dict[str, float]:
        """Close the recorder: how many seconds that takes, and how many bytes were written."""
        seconds = timed(self.recorder.close)
        return {"close": seconds, "bytes": sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())}


@contextmanager
def _recording(level: str, model: Any) -> Iterator[_Recording]:
    """A recorder into a folder that is removed afterwards."""
    _ = model.fingerprint  # the hash that names the model in a trace; made once in a process, so not a part of the cost
    with tempfile.TemporaryDirectory(prefix="nanokv-benchmark-") as folder:
        yield _Recording(Path(folder), level)
