"""The user's function as the solver sees it, with torchdiffeq's own wrappers as the reference."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torchdiffeq._impl.misc import Perturb, _PerturbFunc, _ReverseFunc, _TupleFunc

from torchdiffeq_lmm.forward.vector_field import VectorField
from torchdiffeq_lmm.hosts.torchdiffeq_host import unwrap

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.complex128]
SHAPES = [torch.Size(shape) for shape in ((), (2, 3), (0,), (4,))]
Func = Callable[..., Any]


def tensor_func(t: Tensor, y: Tensor) -> Tensor:
    return y * t - t.square()


def tuple_func(t: Tensor, y: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple((i + 1) * part * t + t for i, part in enumerate(y))


def wrapped(func: Func, backwards: bool = False, shapes: list[torch.Size] | None = None) -> _PerturbFunc:
    """`func` as torchdiffeq hands it to a solver."""
    if shapes is not None:
        func = _TupleFunc(func, shapes)
    if backwards:
        func = _ReverseFunc(func, mul=-1.0)
    return _PerturbFunc(func)


def state(dtype: torch.dtype, shapes: list[torch.Size] | None) -> Tensor:
    size = (2, 3) if shapes is None else (sum(shape.numel() for shape in shapes),)
    return torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("shapes", [None, SHAPES])
@pytest.mark.parametrize(
    ("perturb", "side", "reference"),
    [
        (False, "right", Perturb.NONE),
        (False, "left", Perturb.NONE),
        (True, "right", Perturb.NEXT),
        (True, "left", Perturb.PREV),
    ],
)
def test_agrees_with_the_wrappers(
    perturb: bool,
    side: Any,
    reference: Perturb,
    shapes: list[torch.Size] | None,
    backwards: bool,
    t_dtype: torch.dtype,
    dtype: torch.dtype,
) -> None:
    seen: list[Tensor] = []

    def func(t: Tensor, y: Any) -> Any:
        seen.append(t)
        return tensor_func(t, y) if shapes is None else tuple_func(t, y)

    host = wrapped(func, backwards, shapes)
    x = state(dtype, shapes)
    field = VectorField(unwrap(host), x, perturb)
    assert field.time_dtype is dtype.to_real()
    for t in torch.tensor([-0.7, 0.0, 0.1, 3.3], dtype=t_dtype):
        ours, theirs = field(field.user_times(t, side), x), host(t, x, perturb=reference)
        assert seen[-2].dtype is seen[-1].dtype
        assert seen[-2].shape == seen[-1].shape == ()
        assert seen[-2].item() == seen[-1].item()
        assert ours.dtype is dtype
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("perturb", [False, True])
def test_all_times_at_once(perturb: bool, backwards: bool) -> None:
    field = VectorField(unwrap(wrapped(tensor_func, backwards)), torch.zeros(2), perturb)
    times = torch.linspace(-1, 1, 9, dtype=torch.float64)
    together = field.user_times(times)
    assert together.tolist() == [field.user_times(t).item() for t in times]


def test_the_default_side_is_the_right_one() -> None:
    field = VectorField(unwrap(wrapped(tensor_func)), torch.zeros((), dtype=torch.float64), True)
    assert field.user_times(torch.ones((), dtype=torch.float64)).item() == 1 + 2**-52
    assert field.user_times(torch.ones((), dtype=torch.float64), side="left").item() == 1 - 2**-53


@pytest.mark.parametrize("perturb", [False, True])
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_times_are_differentiable(dtype: torch.dtype, backwards: bool, perturb: bool) -> None:
    field = VectorField(unwrap(wrapped(tensor_func, backwards)), torch.zeros(2, dtype=dtype), perturb)
    times = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(field.user_times(times) @ torch.tensor([1.0, 2.0, 4.0], dtype=dtype), times)
    sign = -1 if backwards else 1
    assert grad.tolist() == [sign * 1.0, sign * 2.0, sign * 4.0]


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("shapes", [None, SHAPES])
def test_gradients_agree_with_the_wrappers(shapes: list[torch.Size] | None, backwards: bool) -> None:
    host = wrapped(tensor_func if shapes is None else tuple_func, backwards, shapes)
    x = state(torch.float64, shapes).requires_grad_()
    t = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    field = VectorField(unwrap(host), x, False)
    ours = torch.autograd.grad(field(field.user_times(t), x).square().sum(), (t, x))
    theirs = torch.autograd.grad(host(t, x).square().sum(), (t, x))
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)


def test_components_keep_their_shapes() -> None:
    seen: list[Any] = []

    def func(t: Tensor, y: tuple[Tensor, ...]) -> list[Tensor]:
        seen.append(y)
        # Any iterable of tensors does.
        return [part + t for part in y]

    x = state(torch.float64, SHAPES)
    out = VectorField(unwrap(wrapped(func, shapes=SHAPES)), x, False)(torch.tensor(1.0, dtype=torch.float64), x)
    assert isinstance(seen[0], tuple)
    assert [part.shape for part in seen[0]] == SHAPES
    assert torch.equal(torch.cat([part.reshape(-1) for part in seen[0]]), x)
    assert torch.equal(out, x + 1)


def test_nested_wrappers_are_all_taken_off() -> None:
    """`odeint_adjoint` wraps twice."""
    host = _PerturbFunc(wrapped(tuple_func, True, SHAPES))
    hosted = unwrap(host)
    assert hosted.call is tuple_func
    assert hosted.reversed
    assert hosted.shapes == tuple(SHAPES)
    assert hosted.callback_step is None


# ---------------------------------------------------------------------------------------------------------- checks


def evaluate(result: Any, x: Tensor, shapes: list[torch.Size] | None = None) -> Tensor:
    field = VectorField(unwrap(wrapped(lambda t, y: result, shapes=shapes)), x, False)
    return field(torch.zeros((), dtype=x.dtype.to_real()), x)


@pytest.mark.parametrize(
    ("result", "got"), [(None, "NoneType"), (1.0, "float"), ((torch.zeros(3),), "tuple"), ([0.0] * 3, "list")]
)
def test_func_returns_no_tensor(result: Any, got: str) -> None:
    with pytest.raises(TypeError, match=rf"func returned {got}.*must return a tensor.*\(3,\)"):
        evaluate(result, torch.zeros(3))


@pytest.mark.parametrize("shape", [(), (1,), (2,), (3, 1), (1, 3), (4,), (0,)])
def test_func_returns_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"func returned .*{re.escape(str(shape))}.*state y has shape \(3,\)"):
        evaluate(torch.zeros(shape), torch.zeros(3))


@pytest.mark.parametrize("got", [torch.float32, torch.complex128, torch.int64, torch.bfloat16, torch.bool])
def test_func_returns_another_dtype(got: torch.dtype) -> None:
    with pytest.raises(TypeError, match=rf"func returned .*{got}.*state y has dtype torch.float64"):
        evaluate(torch.zeros(3, dtype=got), torch.zeros(3, dtype=torch.float64))


def test_func_returns_another_device() -> None:
    with pytest.raises(ValueError, match=r"func returned .*on device meta.*state y is on device cpu"):
        evaluate(torch.zeros(3, device="meta"), torch.zeros(3))


def test_func_returns_another_device_for_a_component() -> None:
    shapes = [torch.Size([2]), torch.Size([1])]
    with pytest.raises(ValueError, match=r"func returned, as component 1,.*on device meta.*y\[1\] is on device cpu"):
        evaluate((torch.zeros(2), torch.zeros(1, device="meta")), torch.zeros(3), shapes)


@pytest.mark.parametrize("result", [None, 1.0, 3])
def test_func_returns_no_tuple(result: Any) -> None:
    with pytest.raises(TypeError, match=rf"func returned {type(result).__name__}.*tuple of 2 tensors"):
        evaluate(result, torch.zeros(3), [torch.Size([2]), torch.Size([])])


@pytest.mark.parametrize("count", [0, 1, 3])
def test_func_returns_another_number_of_components(count: int) -> None:
    with pytest.raises(ValueError, match=rf"func returned {count} components.*tuple of 2 tensors"):
        evaluate((torch.zeros(2),) * count, torch.zeros(4), [torch.Size([2]), torch.Size([2])])


def test_func_returns_a_component_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"func returned, as component 1,.*\(4,\).*state y\[1\] has shape \(2, 2\)"):
        evaluate((torch.zeros(2), torch.zeros(4)), torch.zeros(6), [torch.Size([2]), torch.Size([2, 2])])


def test_func_returns_a_component_that_is_no_tensor() -> None:
    with pytest.raises(TypeError, match=r"func returned, as component 0, float.*tensor of shape \(\)"):
        evaluate((1.0, torch.zeros(2)), torch.zeros(3), [torch.Size([]), torch.Size([2])])


def test_func_returns_components_of_another_dtype() -> None:
    with pytest.raises(TypeError, match=r"func returned, as component 1,.*torch.float64.*torch.float32"):
        evaluate(
            (torch.zeros(2), torch.zeros(1, dtype=torch.float64)), torch.zeros(3), [torch.Size([2]), torch.Size([1])]
        )


def test_a_good_answer_passes() -> None:
    assert torch.equal(evaluate(torch.ones(3), torch.zeros(3)), torch.ones(3))
