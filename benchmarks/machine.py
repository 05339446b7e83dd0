"""On what it was measured: the machine, and the versions of everything that took part."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

PACKAGES = ("numpy", "numba", "llvmlite", "llama-cpp-python", "torch", "transformers", "gguf", "safetensors", "tokenizers")
ROOT = Path(__file__).resolve().parents[1]


def machine() -> dict[str, str]:
    """Processor, cores, caches, memory and system, each in a few words."""
    cpu = _fields("/proc/cpuinfo")
    model = cpu.get("model name", platform.processor() or platform.machine())
    numbers = ", ".join(f"{name} {cpu[key]}" for name, key in (("family", "cpu family"), ("model", "model")) if key in cpu)
    flags = cpu.get("flags", cpu.get("Features", "")).split()
    vectors = [flag for flag in ("avx512f", "avx512_vnni", "avx2", "fma", "asimd", "sve") if flag in flags]
    memory = int(_fields("/proc/meminfo").get("MemTotal", "0 kB").split()[0]) / 2**20
    return {
        "processor": model + (f" ({numbers})" if numbers else "") + (", a virtual machine" if "hypervisor" in flags else ""),
        "cores": str(os.cpu_count()),
        "vector instructions": " ".join(vectors) or "not known",
        "caches": ", ".join(_caches()) or "not known",
        "memory": f"{memory:.1f} GiB",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """The version of nanokv, of Python, and of each package; "not installed" where it is not."""
    found = {"nanokv": _nanokv(), "python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _nanokv() -> str:
    """The commit that is measured, which says more than a version."""
    git = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True).stdout
        changed = subprocess.run([*git, "status", "--porcelain", "nanokv", "trace"], capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "not in a git repository"
    return f"commit {commit.strip()}" + (" with changes that are not committed" if changed else "")


def _fields(path: str) -> dict[str, str]:
    """The first value of each `name : value` line of a file; {} if there is no such file."""
    found: dict[str, str] = {}
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.strip())
    return found


def _caches() -> list[str]:
    """Such as "L3 32768K"."""
    levels = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"))
    read = [tuple((level / name).read_text().strip() for name in ("level", "type", "size")) for level in levels]
    return [f"L{level} {size}" for level, kind, size in read if kind != "Instruction"]
