"""Stiff problems in batches: evaluations and wall times of implicit steps, and errors of the worst sample.

diffrax's Kvaerno5 takes part where it is installed, under vmap and jitted, with the loosest tolerance at which its
largest error is no larger than that of the fixed steps. One thread each: for diffrax's set
``XLA_FLAGS="--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"``.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from peers import diffrax_batch
from report import absences, markdown, verdict
from scipy.integrate import solve_ivp
from timing import round_robin
from torch import Tensor, nn

import torchdiffeq_lmm

NODES = 200
# Of the adaptive method; atol relative to it, as diffrax's is here.
RTOL, ATOL = 1e-6, 1e-6
DTYPES = {"float64": torch.float64, "float32": torch.float32}


@dataclass(frozen=True)
class Stiff:
    """y' = field(y, p), with parameters of its own for each sample.

    Args:
        name: the problem's name.
        field: ``field(xp, y, p)`` with torch, numpy or jax.numpy for xp; components come first: y of shape (D, ...).
        parameters: of shape (S, P).
        start: y(0).
        t: the grid.
        atol: of SciPy's reference, and diffrax's relative to its rtol.
    """

    name: str
    field: Callable[[Any, Any, Any], Any]
    parameters: np.ndarray
    start: tuple[float, ...]
    t: np.ndarray
    atol: float

    def end(self, sample: int) -> np.ndarray:
        """The end of a sample, by SciPy's Radau."""
        p = self.parameters[sample]
        solution = solve_ivp(
            lambda t, y: self.field(np, y, p), (0, self.t[-1]), self.start, method="Radau", rtol=1e-9, atol=self.atol
        )
        return solution.y[:, -1]


class Func(nn.Module):
    """The field of a problem for torch, with trainable parameters; counts its evaluations."""

    def __init__(self, problem: Stiff, samples: list[int] | slice, dtype: torch.dtype) -> None:
        super().__init__()
        self.problem = problem
        self.parameters_ = nn.Parameter(torch.from_numpy(problem.parameters[samples]).to(dtype))
        self.y0 = torch.tensor(problem.start, dtype=dtype).repeat(len(self.parameters_), 1)
        self.calls = 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return torch.stack(self.problem.field(torch, y.unbind(-1), self.parameters_.unbind(-1)), -1)

    def solve(self, method: str, options: dict[str, Any] | None = None) -> Tensor:
        """The states at the end; by an adaptive method with a tolerance for every entry."""
        t = torch.from_numpy(self.problem.t).to(self.y0)
        if method == "bdf":
            adaptive = {"norm": lambda y: y.abs().max(), **(options or {})}
            ends = t[[0, -1]]
            return torchdiffeq_lmm.odeint(
                self, self.y0, ends, method=method, rtol=RTOL, atol=ATOL * RTOL, options=adaptive
            )[-1]
        return torchdiffeq_lmm.odeint(self, self.y0, t, method=method, options=options)[-1]

    @property
    def compiled(self) -> "Func":
        """The same, whose implicit equations are solved by a compiled function; it does not count."""
        return _Compiled(self.problem, slice(None), self.y0.dtype)

    def forward_only(self, method: str) -> Tensor:
        """Without a graph."""
        with torch.no_grad():
            return self.solve(method)

    def both(self, method: str) -> None:
        """With the gradient of the mean square of what is left."""
        self.solve(method).square().mean().backward()


class _Compiled(Func):
    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.stack(self.problem.field(torch, y.unbind(-1), self.parameters_.unbind(-1)), -1)

    def solve(self, method: str, options: dict[str, Any] | None = None) -> Tensor:
        return super().solve(method, {"compile": True, **(options or {})})


def logarithmic(begin: float, end: float, nodes: int) -> np.ndarray:
    """From 0, with steps in proportion to the time, from 10 ** begin to 10 ** end."""
    return np.concatenate([[0.0], np.logspace(begin, end, nodes - 1)])


def robertson(count: int, is_unlike: bool) -> Stiff:
    """Robertson's reaction, each rate spread tenfold where samples are unlike."""

    def field(xp: Any, y: Any, p: Any) -> Any:
        decay, growth, back = p[0] * y[0], p[1] * y[1] * y[1], p[2] * y[1] * y[2]
        return back - decay, decay - growth - back, growth

    spread = np.random.default_rng(1).uniform(-0.5, 0.5, (count, 3)) if is_unlike else np.zeros((count, 3))
    parameters = np.array([0.04, 3e7, 1e4]) * 10**spread
    return Stiff("Robertson", field, parameters, (1.0, 0.0, 0.0), logarithmic(-6, 2, NODES), 1e-13)


def van_der_pol(count: int) -> Stiff:
    """μ from 1 to 1000, up to t = 2: the samples with a small one turn back, the others creep."""

    def field(xp: Any, y: Any, p: Any) -> Any:
        return y[1], p[0] * (1 - y[0] * y[0]) * y[1] - y[0]

    return Stiff("van der Pol", field, np.logspace(0, 3, count)[:, None], (2.0, 0.0), logarithmic(-5, 0.3, 200), 1e-11)


def oregonator(count: int) -> Stiff:
    """Field and Noyes' model, by Hairer and Wanner; its rate, 77.27, from 60 to 90."""

    def field(xp: Any, y: Any, p: Any) -> Any:
        k = p[0]
        a, b, c = y[0], y[1], y[2]
        return k * (b + a * (1 - 8.375e-6 * a - b)), (c - (1 + a) * b) / k, 0.161 * (a - c)

    parameters = np.linspace(60, 90, count)[:, None]
    return Stiff("Oregonator", field, parameters, (1.0, 2.0, 3.0), logarithmic(-6, 0.5, 200), 1e-11)


def hires(count: int) -> Stiff:
    """High irradiance responses of photomorphogenesis, by Hairer and Wanner; the fast rate, 280, from 100 to 1000."""

    def field(xp: Any, y: Any, p: Any) -> Any:
        k = p[0]
        bound = k * y[5] * y[7] - 1.81 * y[6]
        return (
            -1.71 * y[0] + 0.43 * y[1] + 8.32 * y[2] + 0.0007,
            1.71 * y[0] - 8.75 * y[1],
            -10.03 * y[2] + 0.43 * y[3] + 0.035 * y[4],
            8.32 * y[1] + 1.71 * y[2] - 1.12 * y[3],
            -1.745 * y[4] + 0.43 * y[5] + 0.43 * y[6],
            -k * y[5] * y[7] + 0.69 * y[3] + 1.71 * y[4] - 0.43 * y[5] + 0.69 * y[6],
            bound,
            -bound,
        )

    start = (1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0057)
    # Late on, a second fast change comes, at a time of each sample's own.
    t = np.concatenate([logarithmic(-5, 0, 100), np.linspace(1, 321.8122, 401)[1:]])
    return Stiff("HIRES", field, np.logspace(2, 3, count)[:, None], start, t, 1e-12)


def largest_error(found: np.ndarray, wanted: np.ndarray) -> float:
    """Of any entry, relative; infinite where a sample is not finite."""
    error = np.abs(found / wanted - 1).max()
    return float(error) if np.isfinite(error) else np.inf


def counted(quick: bool) -> list[dict[str, Any]]:
    """Evaluations and wall times for more and more samples, side by side."""
    rows = []
    counts = (1, 16) if quick else (1, 16, 128, 1024)
    for kind in ("equal", "unlike"):
        problem = robertson(counts[-1], kind == "unlike")
        for method in ("bdf2", "bdf3"):
            for dtype in DTYPES:
                funcs = {count: Func(problem, slice(count), DTYPES[dtype]) for count in counts}
                calls: dict[str, int] = {}

                def run(count: int, way: str) -> None:
                    func = funcs[count]
                    func.calls = 0
                    (func.forward_only if way == "forward" else func.both)(method)
                    calls[f"{count} {way}"] = func.calls

                runs = {
                    f"{count} {way}": lambda count=count, way=way: run(count, way)
                    for count in counts
                    for way in ("forward", "both")
                }
                contest = round_robin(runs, rounds=1 if quick else 3, warm_up=1)
                for count in counts:
                    row: dict[str, Any] = {"samples": kind, "method": method, "dtype": dtype, "count": count}
                    for way in ("forward", "both"):
                        name = f"{count} {way}"
                        if name in contest.absent:
                            row["absent"] = contest.absent[name]
                            continue
                        row[f"{way} calls"] = calls[name]
                        row[f"{way} seconds"] = statistics.median(contest.times[name])
                    rows.append(row)
    return rows


def worst(quick: bool) -> list[dict[str, Any]]:
    """In single precision, the error of the worst sample of those that are looked at, and of that sample alone."""
    rows = []
    count = 16 if quick else 1024
    for problem in (van_der_pol(count), oregonator(count), hires(count)):
        looked_at = np.unique(np.linspace(0, count - 1, 4 if quick else 33).astype(int))
        wanted = {int(sample): problem.end(int(sample)) for sample in looked_at}
        for method in ("bdf2", "bdf3"):
            row: dict[str, Any] = {"problem": problem.name, "method": method, "count": count}
            func = Func(problem, slice(None), torch.float32)
            start = time.perf_counter()
            try:
                found = func.forward_only(method).double().numpy()
            except RuntimeError as error:
                rows.append({**row, "raises": str(error)[:200]})
                continue
            row["seconds"], row["calls"] = time.perf_counter() - start, func.calls
            errors = {sample: largest_error(found[sample], end) for sample, end in wanted.items()}
            alone, apart = {}, 0.0
            for sample, end in wanted.items():
                single = Func(problem, [sample], torch.float32).forward_only(method).double().numpy()[0]
                alone[sample] = largest_error(single, end)
                apart = max(apart, largest_error(found[sample], single))
            worst_one = max(errors, key=errors.__getitem__)
            ratios = [errors[sample] / max(alone[sample], 1e-7) for sample in wanted]
            rows.append(
                {
                    **row,
                    "looked at": len(wanted),
                    "finite": bool(np.isfinite(found).all()),
                    "worst": worst_one,
                    "error": errors[worst_one],
                    "alone": alone[worst_one],
                    "largest ratio": max(ratios),
                    "apart": apart,
                }
            )
    return rows


def against_diffrax(quick: bool) -> dict[str, Any]:
    """Wall times beside diffrax at equal error, unlike Robertson samples in double precision."""
    count = 8 if quick else 1024
    problem = robertson(count, True)
    looked_at = range(0, count, max(1, count // 32))
    wanted = np.stack([problem.end(sample) for sample in looked_at])
    results: dict[str, Any] = {"count": count, "rows": [], "absent": {}}
    try:
        solve, gradient = diffrax_batch(problem.field, problem.parameters, problem.start, problem.t[-1])
    except ModuleNotFoundError as error:
        results["absent"]["diffrax Kvaerno5"] = f"{error.name} is not installed"
        return results

    @cache
    def error_at(tol: float) -> float:
        return largest_error(np.asarray(solve(tol))[list(looked_at)], wanted)

    tolerances = [10.0 ** (-n / 2) for n in range(2, 19)]
    for method in ("bdf2", "bdf3", "bdf"):
        func = Func(problem, slice(None), torch.float64)
        error = largest_error(func.forward_only(method).numpy()[list(looked_at)], wanted)
        # Of the few that are tried, the loosest that serves.
        tol = next((tol for tol in tolerances if error_at(tol) <= error), None)
        if tol is None:
            results["absent"][f"diffrax against {method}"] = f"no tolerance reaches {error:.1e}"
            continue
        compiled = func.compiled
        contest = round_robin(
            {
                "ours forward": lambda func=func, method=method: func.forward_only(method),
                "ours both": lambda func=func, method=method: func.both(method),
                "compiled forward": lambda func=compiled, method=method: func.forward_only(method),
                "compiled both": lambda func=compiled, method=method: func.both(method),
                "diffrax forward": lambda tol=tol: solve(tol),
                "diffrax both": lambda tol=tol: gradient(tol),
            },
            rounds=1 if quick else 5,
            warm_up=1,
        )
        results["absent"].update({f"{name} ({method})": why for name, why in contest.absent.items()})
        row: dict[str, Any] = {
            "method": method,
            "error": error,
            "tolerance": tol,
            "error of diffrax": error_at(tol),
        }
        for who in ("ours", "compiled"):
            of_one = {**row, "method": method if who == "ours" else f"{method}, compiled"}
            for way in ("forward", "both"):
                if {f"{who} {way}", f"diffrax {way}"} <= contest.times.keys():
                    of_one[f"ours {way}"] = contest.milliseconds(f"{who} {way}").median / 1e3
                    of_one[f"diffrax {way}"] = contest.milliseconds(f"diffrax {way}").median / 1e3
                    of_one[f"ratio {way}"] = contest.ratio(f"{who} {way}", f"diffrax {way}").median
            results["rows"].append(of_one)
    return results


def small(quick: bool) -> dict[str, Any]:
    """128 samples of van der Pol, forward."""
    func = Func(van_der_pol(128), slice(None), torch.float64)
    compiled = func.compiled
    contest = round_robin(
        {
            **{method: lambda method=method: func.forward_only(method) for method in ("bdf2", "bdf3")},
            "bdf2, compiled": lambda: compiled.forward_only("bdf2"),
            "bdf3, compiled": lambda: compiled.forward_only("bdf3"),
        },
        rounds=2 if quick else 7,
        warm_up=1,
    )
    return {"seconds": {name: statistics.median(times) for name, times in contest.times.items()}}


def measure(*, quick: bool, long: bool) -> dict[str, Any]:
    """Everything, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {
            "diffrax": against_diffrax(quick),
            "counted": counted(quick),
            "small": small(quick),
            "worst": worst(quick),
        }
    finally:
        torch.set_num_threads(threads)


def table(results: dict[str, Any]) -> str:
    """Four tables."""
    ones = {(row["samples"], row["method"], row["dtype"]): row for row in results["counted"] if row["count"] == 1}
    most = max(row["count"] for row in results["counted"])
    rows: list[tuple[object, ...]] = []
    for row in results["counted"]:
        cells: list[object] = [row["samples"], row["method"], row["dtype"], row["count"]]
        one = ones[row["samples"], row["method"], row["dtype"]]
        for way in ("forward", "both"):
            if f"{way} calls" not in row or f"{way} calls" not in one:
                cells += [row.get("absent", "-"), "-", "-"]
                continue
            ratio = row[f"{way} calls"] / one[f"{way} calls"]
            target = 1.5 if row["samples"] == "unlike" and row["count"] == most and way == "forward" else None
            cells += [row[f"{way} calls"], f"{ratio:.2f} {verdict(ratio, target)}", f"{row[f'{way} seconds']:.2f}"]
        rows.append(tuple(cells))
    header = ("Robertson samples", "method", "dtype", "number", "evaluations forward", "against 1", "s")
    parts = [markdown((*header, "evaluations both ways", "against 1", "s"), rows)]

    theirs = results["diffrax"]
    rows = [
        (
            row["method"],
            f"{row['error']:.1e}",
            f"{row['error of diffrax']:.1e} (rtol {row['tolerance']:.0e})",
            *(f"{row[key]:.2f}" if key in row else "-" for key in ("ours forward", "diffrax forward")),
            verdict_of(row, "ratio forward"),
            *(f"{row[key]:.2f}" if key in row else "-" for key in ("ours both", "diffrax both")),
            verdict_of(row, "ratio both"),
        )
        for row in theirs["rows"]
    ]
    header = (f"{theirs['count']} unlike", "error", "diffrax's", "s forward", "diffrax", "ratio")
    parts.append(markdown((*header, "s both ways", "diffrax", "ratio"), rows) + absences(theirs["absent"]))

    rows = [
        (
            row["problem"],
            row["method"],
            row["count"],
            row.get("raises") or f"{row['error']:.1e} (sample {row['worst']})",
            f"{row['alone']:.1e}" if "alone" in row else "-",
            f"{row['largest ratio']:.2g} {verdict(row['largest ratio'], 10)}" if "alone" in row else "MISSED",
            f"{row['apart']:.1e}" if "alone" in row else "-",
            row.get("calls", "-"),
            f"{row['seconds']:.2f}" if "seconds" in row else "-",
        )
        for row in results["worst"]
    ]
    header = ("float32", "method", "number", "largest error", "that sample alone", "largest ratio to alone")
    parts.append(markdown((*header, "apart from alone", "evaluations", "s"), rows))

    rows = [(name, f"{value:.2f} {verdict(value, 0.4)}") for name, value in results["small"]["seconds"].items()]
    parts.append(markdown(("van der Pol, 128 samples, 200 nodes", "s forward"), rows))
    return "\n\n".join(parts)


def verdict_of(row: dict[str, Any], key: str) -> str:
    """A ratio of wall times, which is to be at most 1."""
    return f"{row[key]:.2f} {verdict(row[key], 1.0)}" if key in row else "-"
