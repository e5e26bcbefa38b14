"""Settings and fixtures of all tests."""

import gc
from collections import Counter
from collections.abc import Iterator

import pytest

LONGEST = ("compiled", "demo", "example", "processes")
"""Words in the names of files whose tests take longest, for they compile or run programs."""

# PyTorch is imported where it is needed: the process that starts the workers imports nothing of it, as they wait.


def pytest_collection() -> None:
    """Give every worker one thread: with more threads than cores, each waits for the others."""
    import torch

    torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "one_in(count): of so many cases of a test, in a row, one is not slow")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is slow by `one_in`; and begin with what takes longest.

    One of these tests at the end would leave a worker without work.
    """
    seen: Counter[str] = Counter()
    for item in items:
        one_in = item.get_closest_marker("one_in")
        if one_in and not item.get_closest_marker("slow"):
            test = item.nodeid.partition("[")[0]
            if seen[test] % one_in.args[0]:
                item.add_marker("slow")
            seen[test] += 1
    items.sort(key=lambda item: not any(word in item.path.stem for word in LONGEST))


def pytest_collection_finish() -> None:
    """Leave all that was imported out of garbage collections: those that tests ask for take 0.2 s otherwise.

    Those that begin by themselves come less often: tracing for a compilation makes so many objects that they take a
    fifth of its time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


@pytest.fixture(scope="module")
def _quick_collections() -> None:
    """Leave all that tests of other modules have made and imported out of the garbage collections of this one."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def _method_tables() -> Iterator[None]:
    """Leave torchdiffeq's and torchsde's tables, and the package's own, as every other test expects them."""
    from torchdiffeq._impl.odeint import SOLVERS

    import torchdiffeq_lmm
    from torchdiffeq_lmm.hosts import registration

    tables = (SOLVERS, registration.ODE_SOLVERS, registration.SDE_SOLVERS)
    before = [dict(table) for table in tables]
    yield
    # torchsde's table has no other way in or out.
    torchdiffeq_lmm.unregister()
    for table, contents in zip(tables, before, strict=True):
        table.clear()
        table.update(contents)
    torchdiffeq_lmm.register()
