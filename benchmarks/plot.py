"""Results -> results.svg: how many times as fast as its rivals nanokv is, and milliseconds a token as the context grows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.goals import Goal, goals
from benchmarks.plan import peers
from benchmarks.ratios import Spread, spread, times
from benchmarks.results import Results

# By program, from the palette of Okabe and Ito, which colour-blind people can tell apart.
COLOURS = {"nanokv": "#D55E00", "llama.cpp": "#0072B2", "transformers": "#009E73", "NumPy": "#CC79A7", "read": "#777777"}
DASHES = {"float32": "-", "Q8_0": "--"}  # by group; any other ":"


def plot(results: Results, path: Path) -> None:
    """Draw both pictures. ImportError if matplotlib (the extra plot) is not there."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "nanokv", "font.size": 9})
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5.5), width_ratios=(3, 2), layout="constrained")
    _ratios(left, results)
    _decode(right, results)
    figure.savefig(path, metadata={"Date": None}, facecolor="white")
    pyplot.close(figure)


def _ratios(axes: Any, results: Results) -> None:
    """One line for each race: its range, its median, and a mark at its goal."""
    races = [goal for goal in reversed(goals()) if goal.unit == "x" and goal.at_least]
    found = [(goal, measured) for goal in races if (measured := goal.measured(results))]
    for y, (goal, measured) in enumerate(found):
        _race(axes, y, goal, measured)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xticks([0.5, 0.7, 1, 1.5, 2, 3, 5, 10], ["0.5", "0.7", "1", "1.5", "2", "3", "5", "10"])
    axes.minorticks_off()
    axes.set_yticks(range(len(found)), [f"{goal.what}: {goal.compared}" for goal, _ in found])
    axes.set_title("times as fast as the rival (bar: range; black: the goal)", loc="left")
    axes.grid(axis="x", alpha=0.3)


def _race(axes: Any, y: int, goal: Goal, measured: Spread) -> None:
    colour = next((colour for name, colour in COLOURS.items() if goal.compared.startswith(name)), "black")
    axes.plot([measured.low, measured.high], [y, y], color=colour, linewidth=3, alpha=0.4, solid_capstyle="butt")
    axes.plot([measured.median], [y], "o", color=colour)
    axes.plot([goal.limit], [y], "|", color="black", markersize=12)
    axes.annotate(f"{measured.median:.2f}", (measured.median, y), (0, 5), textcoords="offset points", ha="center", fontsize=8)


def _decode(axes: Any, results: Results) -> None:
    """Milliseconds a token of every peer, by context."""
    for peer in peers(results.kind):
        points = [(context, found.median) for context in results.plan.contexts
                  if (found := spread(times(results.samples, f"decode@{context}", peer.name)))]  # fmt: skip
        if points:
            colour = next((colour for name, colour in COLOURS.items() if peer.name.startswith(name)), "black")
            x, y = zip(*points, strict=True)
            style = DASHES.get(peer.group, ":")
            axes.plot(x, [1000 * seconds for seconds in y], style, marker=".", color=colour, label=peer.name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(results.plan.contexts, [str(context) for context in results.plan.contexts])
    axes.set_xlabel("positions in the cache")
    axes.set_title("milliseconds a token", loc="left")
    low, high = axes.get_ylim()
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if low <= tick <= high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)
