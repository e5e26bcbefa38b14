"""What a report says, and what it draws."""

import builtins
from pathlib import Path
from typing import Any

import pytest

from torchdiffeq_lmm import SolveReport


def made(times: list[float], orders: list[int]) -> SolveReport:
    report = SolveReport()
    report.times.append(times[0])
    for time, order in zip(times[1:], orders, strict=True):
        report.accept(time, order)
    return report


def test_it_counts_the_steps() -> None:
    report = made([0.0, 0.5, 1.5, 3.5], [1, 2, 2])
    assert report.steps == 3
    assert report.times == [0.0, 0.5, 1.5, 3.5]
    assert report.orders == [1, 2, 2]


def test_it_reads_well() -> None:
    report = made([0.0, 0.5, 1.5, 3.5], [1, 2, 2])
    report.rejected, report.unsolved, report.evaluations, report.jacobians = 4, 2, 15, 3
    assert str(report).splitlines() == [
        "steps:       3 from t = 0 to 3.5: 1 of order 1, 2 of order 2",
        "lengths:     from 0.5 to 2",
        "rejected:    4 not accurate enough, 2 with an equation that was not solved",
        "evaluations: 15 of func, 5 per step",
        "Jacobians:   3",
    ]


def test_lengths_are_positive_in_reversed_time() -> None:
    text = str(made([1.0, 0.5, -1.5], [1, 1]))
    assert "from t = 1 to -1.5" in text
    assert "from 0.5 to 2\n" in text


def test_without_steps() -> None:
    report = SolveReport()
    assert str(report) == "no steps"
    with pytest.raises(ValueError, match="plot needs a report of a solve, got one without steps"):
        report.plot()


def test_it_forgets() -> None:
    report = made([0.0, 1.0], [1])
    report.rejected = report.unsolved = report.evaluations = report.jacobians = 7
    report.begin()
    assert vars(report) == vars(SolveReport())


def test_its_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    report = made([3.0, 2.5, 1.5, -0.5], [1, 2, 3])
    path = tmp_path / "steps.png"
    figure = report.plot(path)
    assert isinstance(figure, Figure)
    assert path.read_bytes().startswith(b"\x89PNG")
    lengths, orders = figure.axes
    assert list(lengths.lines[0].get_xdata()) == [2.5, 1.5, -0.5]
    assert list(lengths.lines[0].get_ydata()) == [0.5, 1.0, 2.0]
    assert list(orders.lines[0].get_ydata()) == [1, 2, 3]
    assert lengths.get_yscale() == "log"
    assert (lengths.get_ylabel(), orders.get_ylabel(), orders.get_xlabel()) == ("step", "order", "t")


def test_its_picture_needs_no_file() -> None:
    pytest.importorskip("matplotlib")
    assert len(made([0.0, 1.0], [1]).plot().axes) == 2


def test_its_picture_needs_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *others: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *others)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="plot needs matplotlib; install it with: pip install matplotlib"):
        made([0.0, 1.0], [1]).plot()
