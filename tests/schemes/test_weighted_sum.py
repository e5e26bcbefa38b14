"""Weighted sums of tensors."""

import pytest
import torch

from torchdiffeq_lmm.schemes.weighted_sum import weighted_sum

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.complex128]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (2, 0)])
@pytest.mark.parametrize("as_tensors", [False, True])
def test_is_the_sum_in_the_dtype_of_the_tensors(shape: tuple[int, ...], dtype: torch.dtype, as_tensors: bool) -> None:
    values = (1.0, -2.0, 0.0, 0.5)
    weights = [torch.tensor(value, dtype=torch.float64) for value in values] if as_tensors else values
    tensors = [torch.full(shape, k + 1.0, dtype=dtype) for k in range(4)]
    total = weighted_sum(weights, tensors)
    # 1 - 2 * 2 + 0.5 * 4, exact in every dtype
    assert torch.equal(total, torch.full(shape, -1.0, dtype=dtype))


def test_weights_and_tensors_may_carry_gradients() -> None:
    weights = [torch.tensor(w, dtype=torch.float64, requires_grad=True) for w in (0.3, -1.2)]
    tensors = [torch.randn(3, dtype=torch.complex128, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda a, b, x, y: weighted_sum((a, 2.0, b), (x, y, y)), (*weights, *tensors))


def test_a_weight_of_zero_reads_nothing() -> None:
    nan = torch.full((2,), torch.nan)
    assert torch.equal(weighted_sum((0.0, 1.0), (nan, torch.ones(2))), torch.ones(2))


def test_as_many_weights_as_tensors() -> None:
    with pytest.raises(ValueError, match="zip"):
        weighted_sum((1.0, 2.0), (torch.ones(1),))
    with pytest.raises(ValueError, match="not the number 0"):
        weighted_sum((0.0,), (torch.ones(1),))
