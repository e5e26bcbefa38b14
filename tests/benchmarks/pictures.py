"""The pictures: work against precision, memory and gradient error against the number of steps, and a small summary."""

import textwrap
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from report import failures

# Okabe and Ito's colours, which the colour-blind tell apart. A method has the same look in every panel; ours are solid.
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PURPLE = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#F0E442",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)
CURVES: dict[str, dict[str, Any]] = {
    "leapfrog": {"color": BLUE, "marker": "o", "linestyle": "-"},
    "ab3": {"color": SKY, "marker": "v", "linestyle": "-"},
    "ab4": {"color": GREEN, "marker": "s", "linestyle": "-"},
    "ab5": {"color": RED, "marker": "D", "linestyle": "-"},
    "abm4": {"color": PURPLE, "marker": "^", "linestyle": "-"},
    "leapfrog, compiled": {"color": BLUE, "marker": "o", "linestyle": "-", "fillstyle": "none"},
    "ab4, compiled": {"color": GREEN, "marker": "s", "linestyle": "-", "fillstyle": "none"},
    "torchdiffeq midpoint": {"color": BLUE, "marker": "x", "linestyle": "--"},
    "torchdiffeq rk4": {"color": ORANGE, "marker": "+", "linestyle": "--"},
    "torchdiffeq explicit_adams (order 4)": {"color": GREEN, "marker": "x", "linestyle": "--"},
    "torchdiffeq dopri5": {"color": BLACK, "marker": "1", "linestyle": "--"},
    "torchdyn rk4": {"color": ORANGE, "marker": "2", "linestyle": ":"},
    "TorchDiffEqPack MALI": {"color": SKY, "marker": "3", "linestyle": ":"},
    "diffrax LeapfrogMidpoint, jitted": {"color": BLUE, "marker": "*", "linestyle": "-."},
    "diffrax Tsit5, jitted": {"color": BLACK, "marker": "*", "linestyle": "-."},
}
ADAPTIVE: dict[str, dict[str, Any]] = {
    "bdf": {"color": BLUE, "marker": "o", "linestyle": "-"},
    "adams": {"color": RED, "marker": "s", "linestyle": "-"},
    "SciPy BDF": {"color": BLUE, "marker": "x", "linestyle": "--"},
    "SciPy Radau": {"color": ORANGE, "marker": "+", "linestyle": "--"},
    "SciPy LSODA": {"color": GREEN, "marker": "2", "linestyle": "--"},
    "SciPy DOP853": {"color": PURPLE, "marker": "3", "linestyle": "--"},
    "torchdiffeq dopri5": {"color": BLACK, "marker": "1", "linestyle": "--"},
    "torchdiffeq dopri8": {"color": SKY, "marker": "4", "linestyle": "--"},
    "torchdiffeq tsit5": {"color": SKY, "marker": "P", "linestyle": ":"},
    "diffrax Kvaerno5, jitted": {"color": BLACK, "marker": "*", "linestyle": "-."},
    "diffrax Tsit5, jitted": {"color": BLACK, "marker": "*", "linestyle": "-."},
    "torchdiffeq implicit_euler": {"color": BLACK, "marker": "_", "linestyle": ":"},
    "torchdiffeq implicit_midpoint": {"color": ORANGE, "marker": "<", "linestyle": ":"},
    "torchdiffeq trapezoid": {"color": GREEN, "marker": ">", "linestyle": ":"},
    "torchdiffeq sdirk2": {"color": PURPLE, "marker": "d", "linestyle": ":"},
    "torchdiffeq trbdf2": {"color": PURPLE, "marker": "h", "linestyle": ":"},
    "torchdiffeq radauIIA3": {"color": ORANGE, "marker": "^", "linestyle": ":"},
    "torchdiffeq gl4": {"color": GREEN, "marker": "v", "linestyle": ":"},
    "torchdiffeq radauIIA5": {"color": ORANGE, "marker": "p", "linestyle": ":"},
    "torchdiffeq gl6": {"color": GREEN, "marker": "X", "linestyle": ":"},
    "torchdiffeq implicit_adams": {"color": RED, "marker": "D", "linestyle": ":"},
}
UNSOLVED = "an equation of a step was not solved, as its solver warned"
MODES: dict[str, dict[str, Any]] = {
    "leapfrog, autograd": {"color": BLACK, "marker": "s", "linestyle": "-"},
    "leapfrog, reversible": {"color": BLUE, "marker": "o", "linestyle": "-"},
    "leapfrog, checkpoint": {"color": GREEN, "marker": "^", "linestyle": "-"},
    "torchdiffeq midpoint, odeint_adjoint": {"color": ORANGE, "marker": "x", "linestyle": "--"},
    "TorchDiffEqPack MALI": {"color": PURPLE, "marker": "*", "linestyle": "-."},
}
SUMMARY_PROBLEM = "Kepler, e = 0.5"
SUMMARY_CURVES = (
    "leapfrog",
    "ab4",
    "ab5",
    "leapfrog, compiled",
    "ab4, compiled",
    "torchdiffeq midpoint",
    "torchdiffeq rk4",
    "torchdiffeq explicit_adams (order 4)",
    "torchdiffeq dopri5",
    "diffrax LeapfrogMidpoint, jitted",
    "diffrax Tsit5, jitted",
)


def draw_precision(results: dict[str, Any], path: Path) -> None:
    """Rows are evaluations and wall time, columns problems."""
    names = list(results["problems"])
    figure, panels = plt.subplots(2, len(names), figsize=(3.3 * len(names), 7.0), sharey="col", squeeze=False)
    for row, what in zip(panels, ("evaluations", "ms"), strict=True):
        for panel, name in zip(row, names, strict=True):
            _precision(panel, results["problems"][name], what, tuple(CURVES))
            panel.set_title(name if what == "evaluations" else "")
        row[0].set_ylabel("relative error at the end")
    # As wide as the panels are.
    _legend(figure, panels, columns=len(names) + 1)
    _save(figure, path, bottom=0.4 / len(names))


def draw_memory(results: dict[str, Any], path: Path) -> None:
    """Peak memory, and the two errors of the gradient."""
    figure, panels = plt.subplots(1, 3, figsize=(12.0, 4.6), squeeze=False)
    _memory(panels[0, 0], results)
    for panel, of in zip(panels[0, 1:], ("discrete gradient", "gradient of the flow"), strict=True):
        _lines(panel, results, f"error of the {of}", 1.0)
        panel.set_ylabel(f"relative error of the {of}")
    _legend(figure, panels, columns=3)
    _save(figure, path, bottom=0.12)


def draw_adaptive(results: dict[str, Any], path: Path) -> None:
    """Error against evaluations, a panel for each problem, with what has no result below it: stiff ones above."""
    names = list(results["problems"])
    columns = (len(names) + 1) // 2
    figure, panels = plt.subplots(2, columns, figsize=(3.5 * columns, 11.0), squeeze=False)
    for panel in panels.flat[len(names) :]:
        panel.set_axis_off()
    for panel, name in zip(panels.flat, names, strict=False):
        for solver, points in results["problems"][name].items():
            if points:
                x, y = ([point[key] for point in points] for key in ("evaluations", "error"))
                panel.loglog(x, y, label=solver, linewidth=1.2, markersize=5, **ADAPTIVE[solver])
                unsolved = [point for point in points if point["unsolved"]]
                x, y = ([point[key] for point in unsolved] for key in ("evaluations", "error"))
                panel.loglog(
                    x, y, label=UNSOLVED, marker="o", markersize=9, linestyle="", color="grey", fillstyle="none"
                )
        panel.set_title(name)
        panel.set_xlabel("evaluations of func\n\n" + _without_result(results, name), fontsize=7)
        panel.grid(alpha=0.3)
    for row in panels:
        row[0].set_ylabel("relative error at the end")
    if results["lacking"]:
        figure.text(0.5, 0, f"Not in this torchdiffeq: {', '.join(results['lacking'])}.", ha="center", fontsize=8)
    _legend(figure, panels, columns=6)
    _save(figure, path, bottom=0.1)


def _without_result(results: dict[str, Any], problem: str) -> str:
    """The solvers of a problem without results at some or all tolerances, by reason, in lines of a panel's width."""
    reasons: dict[str, list[str]] = {}
    for (solver, why), tolerances in failures(results, problem).items():
        points = results["problems"][problem][solver]
        some = f" ({len(tolerances)} of {len(tolerances) + len(points)})" if points else ""
        reasons.setdefault(why.partition(": ")[2] or why, []).append(solver.removeprefix("torchdiffeq ") + some)
    return "\n".join(textwrap.fill(f"{why[:60]}: {', '.join(solvers)}", 58) for why, solvers in reasons.items())


def draw_summary(memory: dict[str, Any], precision: dict[str, Any], path: Path) -> None:
    """Work against precision on one problem, and memory."""
    figure, panels = plt.subplots(1, 3, figsize=(11.0, 5.0), squeeze=False)
    for panel, what in zip(panels[0, :2], ("evaluations", "ms"), strict=True):
        _precision(panel, precision["problems"][SUMMARY_PROBLEM], what, SUMMARY_CURVES)
        panel.set_title(f"{SUMMARY_PROBLEM}, forward")
    panels[0, 0].set_ylabel("relative error at the end")
    _memory(panels[0, 2], memory)
    panels[0, 2].set_title("a network, forward and backward")
    _legend(figure, panels[:, :1], columns=2, x=0.34)
    _legend(figure, panels[:, 2:], columns=1, x=0.84)
    _save(figure, path, bottom=0.22)


def _precision(panel: Axes, curves: dict[str, Any], what: str, shown: tuple[str, ...]) -> None:
    for name in shown:
        points = curves.get(name)
        if points:
            x, y = ([point[key] for point in points] for key in (what, "error"))
            panel.loglog(x, y, label=name, linewidth=1.2, markersize=5, **CURVES[name])
    if what == "evaluations":
        panel.set_xticks((128, 512, 2048), ("128", "512", "2048"))
    panel.set_xlabel("evaluations of func" if what == "evaluations" else "wall time, ms")
    panel.grid(alpha=0.3)


def _memory(panel: Axes, results: dict[str, Any]) -> None:
    _lines(panel, results, "bytes", 1 / 1024)
    panel.set_ylabel("peak memory of tensors, KiB")


def _lines(panel: Axes, results: dict[str, Any], what: str, unit: float) -> None:
    for name, look in MODES.items():
        rows = results["modes"].get(name)
        if rows:
            x, y = [row["steps"] for row in rows], [row[what] * unit for row in rows]
            panel.loglog(x, y, label=name, linewidth=1.4, markersize=6, **look)
    panel.set_xlabel("steps N")
    panel.grid(alpha=0.3)


def _legend(figure: Figure, panels: Any, columns: int, x: float = 0.5) -> None:
    """One legend for some panels, below them."""
    shown: dict[str, Any] = {}
    for panel in panels.flat:
        for line, label in zip(*panel.get_legend_handles_labels(), strict=True):
            shown.setdefault(label, line)
    figure.legend(
        shown.values(),
        shown.keys(),
        loc="lower center",
        bbox_to_anchor=(x, 0),
        ncols=columns,
        fontsize=8,
        frameon=False,
    )


def _save(figure: Figure, path: Path, bottom: float) -> None:
    for panel in figure.axes:
        # Between the powers of ten the ticks have no numbers: they would overlap.
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.yaxis.set_minor_formatter(NullFormatter())
    figure.tight_layout(rect=(0, bottom, 1, 1))
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
