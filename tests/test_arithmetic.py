"""The functions that are written out, the order that docs/arithmetic.md states, and how kernels are kept."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest

from nanokv import kernels, microkernel

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "arithmetic.md").read_text()
EXACT = {"exp": math.exp, "tanh": math.tanh, "erf": math.erf}


@numba.njit(error_model="numpy")
def _apply_exp(x, y):  # type: ignore[no-untyped-def]
    for i in range(len(x)):
        y[i] = kernels.exp(x[i])


@numba.njit(error_model="numpy")
def _apply_tanh(x, y):  # type: ignore[no-untyped-def]
    for i in range(len(x)):
        y[i] = kernels.tanh(x[i])


@numba.njit(error_model="numpy")
def _apply_erf(x, y):  # type: ignore[no-untyped-def]
    for i in range(len(x)):
        y[i] = kernels.erf(x[i])


@numba.njit(error_model="numpy")
def _apply_fma(a, b, c):  # type: ignore[no-untyped-def]
    return microkernel.fma(a, b, c)


def computed(name: str, x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float32)
    y = np.empty_like(x)
    {"exp": _apply_exp, "tanh": _apply_tanh, "erf": _apply_erf}[name](x, y)
    return y


@pytest.mark.parametrize("name, low, high, bound", [("exp", -87, 88, 0.9), ("tanh", -12, 12, 1.4), ("erf", -6, 6, 1.2)])
def test_errors_are_within_the_stated_bounds(name: str, low: float, high: float, bound: float) -> None:
    x = np.linspace(low, high, 400_001).astype(np.float32)
    x = np.concatenate([x, np.float32(10.0) ** np.linspace(-30, 0, 20_001).astype(np.float32)])
    exact = np.array([EXACT[name](float(each)) for each in x])
    units = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
    assert np.max(np.abs(computed(name, x) - exact) / units) < bound
    assert f"{bound} units" in TEXT


def test_functions_are_right_at_the_ends() -> None:
    tiny, inf, nan = np.float32(1e-42), np.float32(np.inf), np.float32(np.nan)
    assert computed("exp", [-1000, -inf, -104, 0, -0.0, tiny, 88.8, inf]).tolist() == [0, 0, 0, 1, 1, 1, inf, inf]
    assert np.isnan(computed("exp", [nan]))[0] and np.isnan(computed("tanh", [nan]))[0] and np.isnan(computed("erf", [nan]))[0]
    assert computed("tanh", [-inf, inf, 40]).tolist() == computed("erf", [-inf, inf, 40]).tolist() == [-1, 1, 1]
    for name in ("tanh", "erf"):
        values = computed(name, [0.0, -0.0])
        assert values.tolist() == [0, 0] and np.signbit(values).tolist() == [False, True]
    assert computed("tanh", [tiny])[0] == tiny
    subnormal = np.array([-90, -95, -100, -103], np.float32)
    exact = np.array([math.exp(x) for x in subnormal]).astype(np.float32)
    assert np.abs(computed("exp", subnormal).view(np.int32) - exact.view(np.int32)).max() <= 1


def test_fma_rounds_once() -> None:
    """Rounding the product first, or adding in float64, loses y; the exact sum lies just above a tie."""
    x, y = np.float32(1 + 2**-12), np.float32(2**-60)
    once = np.float32(1 + 2**-11 + 2**-23)
    twice = np.float32(np.float64(x) * np.float64(x) + np.float64(y))
    assert _apply_fma(x, x, y) == once != twice == x * x + y


def test_the_text_states_the_coefficients_that_the_kernels_use() -> None:
    source = (ROOT / "nanokv" / "kernels.py").read_text()
    section = source[source.index("# Single numbers") : source.index("# Matrix products")]
    used = {float(x) for x in re.findall(r"F\((-?\d[\d.e+-]*)\)", section)}
    stated = {float(x.replace("−", "-")) for x in re.findall(r"[−-]?\d+\.?\d*(?:e[−-]\d+)?", TEXT)}
    assert used <= stated, used - stated


def test_the_example_of_the_text_runs_and_prints_what_it_says() -> None:
    code = "\n".join(re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    part, largest, ours = done.stdout.split()
    assert float(ours) == 0.0 and 0 <= float(part) <= 1 and float(largest) < 1e-3, done.stderr


def kernel_folder(**changes: str) -> str:
    code = "from nanokv import microkernel; print(microkernel.cache_folder())"
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | changes
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True).stdout


def test_kept_kernels_are_never_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A changed source, version, flag or processor has another folder; a stale result of numba's own cache was seen."""
    import shutil

    (tmp_path / "nanokv").mkdir()
    for name in ("panels.py", "microkernel.py", "kernels.py"):
        shutil.copy(ROOT / "nanokv" / name, tmp_path / "nanokv")
    monkeypatch.setenv("NANOKV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(microkernel, "__file__", str(tmp_path / "nanokv" / "microkernel.py"))
    folders = {microkernel.cache_folder()}
    assert microkernel.cache_folder() in folders
    for name in ("panels.py", "microkernel.py", "kernels.py"):
        with open(tmp_path / "nanokv" / name, "a") as file:
            file.write("# changed\n")
        folders.add(microkernel.cache_folder())
    monkeypatch.setattr(numba, "__version__", "0.0")
    folders.add(microkernel.cache_folder())
    for name, value in (("CPU_NAME", "x86-64-v2"), ("CPU_FEATURES", "-avx512f")):
        monkeypatch.setattr(microkernel, name, value)
        folders.add(microkernel.cache_folder())
    assert len(folders) == 7


def test_where_no_folder_can_be_written_another_is_taken(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    assert "nanokv-" in kernel_folder(NANOKV_CACHE=str(blocked))


def test_without_an_openmp_library_it_works_and_says_so(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['numba.np.ufunc.omppool'] = None\n"
        "sys.path.insert(0, 'tests')\n"
        "from models import CONFIGS, model, tokens\n"
        "print(model(CONFIGS['llama']).forward(tokens(CONFIGS['llama'], 40)).sum())"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    from models import CONFIGS, model, tokens

    assert "no OpenMP library" in done.stderr
    assert done.stdout.strip() == str(model(CONFIGS["llama"]).forward(tokens(CONFIGS["llama"], 40)).sum())
