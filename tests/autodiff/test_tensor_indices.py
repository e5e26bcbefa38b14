"""Indices that are tensors, in compiled solves."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiled_solves import INSIDE, NEEDS_TORCH, REGULAR, TRACED, assert_same, compiling, solved, start
from torch import Tensor, nn

from torchdiffeq_lmm.autodiff.tensor_indices import SelectByTensor

X = torch.arange(2 * 3 * 4 * 5, dtype=torch.float64).reshape(2, 3, 4, 5)
MASK = torch.tensor([True, False, True])
INDICES: dict[str, Callable[[Tensor], Any]] = {
    "alone": lambda i: i,
    "first": lambda i: (i, 2),
    "last": lambda i: (..., i),
    "in between": lambda i: (..., i, slice(1, 3)),
    "twice": lambda i: (i, slice(None), i),
    "from the end": lambda i: (0, i - 3),
    "of few bits": lambda i: (slice(None), i.to(torch.int8)),
    "new dimensions": lambda i: (None, i, None, ..., i),
    "after a mask": lambda i: (slice(None), MASK.to(i.device), i),
    "beside a list": lambda i: (i, [0, 2], slice(None), i),
    "beside an index of rows": lambda i: (i, i.reshape(1).repeat(3), ..., 0),
    "beside True": lambda i: (True, i),
    "a row alone": lambda i: i.reshape(1),
    "none": lambda i: (0, ..., slice(None, None, 2)),
}


@pytest.mark.parametrize("name", INDICES)
def test_the_same_entries_without_a_value_read(name: str) -> None:
    i = torch.tensor(1)
    expected = X[INDICES[name](i)]
    with SelectByTensor():
        assert torch.equal(X[INDICES[name](i)], expected)
        if "mask" not in name:
            # There are no values on it.
            assert X.to("meta")[INDICES[name](i.to("meta"))].shape == expected.shape


class Rows(nn.Module):
    """Rows and entries by numbers that are made of the time, and by one made of the state."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rows = nn.Parameter(torch.randn(23, 2, dtype=torch.float64))
        self.nodes = torch.linspace(0, 1, 24, dtype=torch.float64)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        i = torch.bucketize(t, self.nodes).sub(1).clamp(0, 22)
        largest = y.detach().sum(0).argmax()
        return y.tanh() * self.rows[i] + (t - self.nodes[i]) * self.rows[..., largest].sum()


@NEEDS_TORCH
def test_rows_of_parameters_in_a_compiled_solve() -> None:
    func = Rows()
    keywords: dict[str, Any] = {"options": REGULAR}
    expected = solved(func, start(), INSIDE, "ab1", **keywords)
    assert_same(solved(func, start(), INSIDE, "ab1", compile=TRACED, **keywords), expected)
    with compiling(0):
        solved(func, start(), INSIDE, "ab1", compile=TRACED, **keywords)
