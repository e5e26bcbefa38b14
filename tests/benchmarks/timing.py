"""Wall times of several contestants, side by side."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Run = Callable[[], object]


@dataclass(frozen=True)
class Spread:
    """The median of the rounds, with the quartiles on either side."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        """The quartiles of some values."""
        return cls(*(float(value) for value in np.quantile(values, (0.25, 0.5, 0.75))))


def seconds(run: Run) -> float:
    """The wall time of one run, the collector of cycles waiting."""
    gc.disable()
    try:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    finally:
        gc.enable()


def failure(run: Run) -> str | None:
    """Run it; None where that went well, else why not, in one line."""
    try:
        run()
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    except Exception as error:
        text = " ".join(str(error).split())
        return f"{type(error).__name__}: {text[:160]}"
    return None


@dataclass(frozen=True)
class Contest:
    """What a round robin has measured.

    Args:
        times: for every contestant its wall time in every round, in seconds.
        absent: for every contestant that failed, why.
    """

    times: dict[str, list[float]]
    absent: dict[str, str]

    def ratio(self, name: str, against: str) -> Spread:
        """The spread over the rounds of one contestant's time divided by another's in the same round."""
        return Spread.of([a / b for a, b in zip(self.times[name], self.times[against], strict=True)])

    def milliseconds(self, name: str) -> Spread:
        """The spread of a contestant's time."""
        return Spread.of([1e3 * value for value in self.times[name]])


def round_robin(
    contestants: dict[str, Run], *, rounds: int, at_least: float = 0.0, at_most: int = 101, warm_up: int = 2
) -> Contest:
    """Time all contestants in turn, so that whatever else the machine does falls upon all of them alike.

    Args:
        contestants: what to run, by name; one that raises an error in the warm-up is left out.
        rounds: the least number of rounds; all are run once per round.
        at_least: go on until so many seconds have passed,
        at_most: or there have been so many rounds.
        warm_up: runs of each that are not timed.
    """
    running, absent = dict(contestants), {}
    for name, run in contestants.items():
        for _ in range(warm_up):
            if name in running and (why := failure(run)) is not None:
                absent[name] = why
                del running[name]
    times: dict[str, list[float]] = {name: [] for name in running}
    # What exists by now stays: with it out of the way the collector is quick between the rounds.
    gc.freeze()
    start, done = time.perf_counter(), 0
    while running and (done < rounds or (done < at_most and time.perf_counter() - start < at_least)):
        # Another one begins every round: nobody always runs in the wake of the same neighbour.
        names = list(running)
        first = done % len(names)
        gc.collect()
        for name in names[first:] + names[:first]:
            times[name].append(seconds(running[name]))
        done += 1
    gc.unfreeze()
    return Contest(times, absent)
