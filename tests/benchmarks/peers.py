"""The peers that may be installed: torchdyn, TorchDiffEqPack and diffrax; where one is not, its import fails."""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

Func = Callable[[Tensor, Tensor], Tensor]
JittedSolve = Callable[[float], tuple[Any, Any]]


def torchdyn_solve(func: Func, y0: Tensor, horizon: float, steps: int, method: str) -> Tensor:
    """The final state by one of torchdyn's fixed-step methods."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchdyn.numerics import odeint

    times = torch.linspace(0, horizon, steps + 1, dtype=y0.dtype)
    return odeint(func, y0, times, solver=method)[1][-1]


def mali_solve(func: nn.Module, y0: Tensor, horizon: float, steps: int) -> Tensor:
    """The final state by MALI: asynchronous leapfrog, reconstructed step by step in the backward pass.

    The package keeps the time in single precision, whatever the state has.
    """
    from TorchDiffEqPack import odesolve_adjoint_sym12

    options = {"method": "fixedstep_sym12async", "h": horizon / steps, "t0": 0.0, "t1": horizon}
    return odesolve_adjoint_sym12(func, y0, options=options)


def asynchronous_leapfrog(func: Func, y0: Tensor, horizon: float, steps: int) -> Tensor:
    """MALI's formula as a plain loop, for its gradient by auto-differentiation in any precision.

    Source: Zhuang et al., *MALI* (ICLR 2021), with damping 1.
    """
    t = torch.zeros((), dtype=y0.dtype)
    half = horizon / steps / 2
    y, slope = y0, func(t, y0)
    for step in range(steps):
        middle = y + half * slope
        slope = 2 * func(t + (2 * step + 1) * half, middle) - slope
        y = middle + half * slope
    return y


def diffrax_training_step(network: nn.Sequential, y0: Tensor, steps: int) -> Callable[[], object]:
    """diffrax's LeapfrogMidpoint through Linear–Tanh–Linear from 0 to 1, jitted: the gradient of the mean square.

    Args:
        network: the layers whose weights are taken.
        y0: the initial state, of single precision.
        steps: N.
    """
    made: list[Callable[[], object]] = []

    def step() -> object:
        # At the first call, so that a missing package fails there, as any other contestant does.
        if not made:
            made.append(_jitted_training_step(network, y0, steps))
        return made[0]()

    return step


def _jitted_training_step(network: nn.Sequential, y0: Tensor, steps: int) -> Callable[[], object]:
    diffrax, jax, jnp = _diffrax()
    weights = [jnp.asarray(weight.detach().numpy()) for weight in network.parameters()]
    start = jnp.asarray(y0.detach().numpy())
    times = jnp.linspace(0, 1, steps + 1, dtype=start.dtype)

    def field(t: Any, y: Any, weights: Any) -> Any:
        first, first_bias, second, second_bias = weights
        return jnp.tanh(y @ first.T + first_bias) @ second.T + second_bias

    def loss(inputs: Any) -> Any:
        weights, start = inputs
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            diffrax.LeapfrogMidpoint(),
            times[0],
            times[-1],
            None,
            start,
            args=weights,
            stepsize_controller=diffrax.StepTo(times),
            max_steps=steps,
        )
        return jnp.square(solution.ys[-1]).mean()

    gradient = jax.jit(jax.value_and_grad(loss))
    return lambda: jax.block_until_ready(gradient((weights, start)))


def diffrax_solves(field: Callable[[Any, Any], Any], start: Any, horizon: float) -> tuple[JittedSolve, JittedSolve]:
    """diffrax's LeapfrogMidpoint and Tsit5 for one problem in double precision, jitted.

    Returns:
        From the step to the final state, once it is there, and the number of steps made; the same from the tolerance.
    """
    diffrax, jax, jnp = _diffrax()
    term = diffrax.ODETerm(lambda t, y, args: field(jnp, y))
    y0 = jnp.asarray(start)

    def end(method: Any, controller: Any, step: Any) -> tuple[Any, Any]:
        solution = diffrax.diffeqsolve(
            term, method, 0.0, horizon, step, y0, stepsize_controller=controller, max_steps=1_000_000
        )
        return solution.ys[-1], solution.stats["num_steps"]

    # Steps and tolerances are data, so that one compilation serves all of them.
    fixed = jax.jit(lambda step: end(diffrax.LeapfrogMidpoint(), diffrax.ConstantStepSize(), step))
    adaptive = jax.jit(lambda tol: end(diffrax.Tsit5(), diffrax.PIDController(rtol=tol, atol=tol), None))
    return (lambda step: jax.block_until_ready(fixed(step))), (lambda tol: jax.block_until_ready(adaptive(tol)))


MOST_STEPS = 1_000_000


@cache
def diffrax_adaptive(
    field: Callable[[Any, Any, Any], Any], start: tuple[float, ...], horizon: float, solver: str
) -> tuple[Callable[[float, float], Any], Callable[[float, float], int]]:
    """An adaptive solver of diffrax for one problem in double precision, jitted.

    Args:
        field: ``field(xp, t, y)``.
        start: y(0).
        horizon: the end.
        solver: the name of its class.

    Returns:
        From rtol and atol to the final state, once it is there, NaN after `MOST_STEPS` without it; and to how many
        evaluations a run of its own takes. In a Jacobian the field counts once, for JAX linearises it.
    """
    diffrax, jax, jnp = _diffrax()
    y0 = jnp.asarray(start, dtype=jnp.float64)

    def jitted(rate: Callable[[Any, Any], Any]) -> Callable[[float, float], Any]:
        term = diffrax.ODETerm(lambda t, y, args: rate(t, y))

        def end(rtol: Any, atol: Any) -> Any:
            controller = diffrax.PIDController(rtol=rtol, atol=atol)
            method = getattr(diffrax, solver)()
            solution = diffrax.diffeqsolve(
                term, method, 0.0, horizon, None, y0, stepsize_controller=controller, max_steps=MOST_STEPS, throw=False
            )
            return jnp.where(solution.result == diffrax.RESULTS.successful, solution.ys[-1], jnp.nan)

        made = jax.jit(end)
        return lambda rtol, atol: jax.block_until_ready(made(rtol, atol))

    count = 0

    def counted(t: Any, y: Any) -> Any:
        def increment() -> None:
            nonlocal count
            count += 1

        jax.debug.callback(increment)
        return field(jnp, t, y)

    counting = jitted(counted)

    def evaluations(rtol: float, atol: float) -> int:
        nonlocal count
        count = 0
        counting(rtol, atol)
        jax.effects_barrier()
        return count

    return jitted(lambda t, y: field(jnp, t, y)), evaluations


def diffrax_batch(
    field: Callable[[Any, Any, Any], Any], parameters: Any, start: Any, horizon: float
) -> tuple[Callable[[float], Any], Callable[[float], Any]]:
    """diffrax's Kvaerno5 for many samples by vmap, in double precision, jitted.

    Args:
        field: ``field(xp, y, p)`` of one sample, returning its components.
        parameters: of shape (S, P).
        start: y(0), of shape (D,).
        horizon: the end.

    Returns:
        From the tolerance to the final states, of shape (S, D), NaN where it did not get there; and to the gradient of
        their mean square with respect to the parameters, by diffrax's default adjoint.
    """
    diffrax, jax, jnp = _diffrax()
    term = diffrax.ODETerm(lambda t, y, p: jnp.stack(field(jnp, y, p)))
    y0, given = jnp.asarray(start, dtype=jnp.float64), jnp.asarray(parameters)

    def end(p: Any, tol: Any) -> Any:
        # As the components differ by five orders of magnitude.
        controller = diffrax.PIDController(rtol=tol, atol=1e-6 * tol)
        solution = diffrax.diffeqsolve(
            term, diffrax.Kvaerno5(), 0.0, horizon, 1e-6, y0, args=p, stepsize_controller=controller, max_steps=4096,
            throw=False,
        )  # fmt: skip
        return jnp.where(solution.result == diffrax.RESULTS.successful, solution.ys[-1], jnp.nan)

    def loss(p: Any, tol: Any) -> Any:
        return jnp.square(jax.vmap(end, (0, None))(p, tol)).mean()

    solve, gradient = jax.jit(jax.vmap(end, (0, None))), jax.jit(jax.grad(loss))
    return (
        lambda tol: jax.block_until_ready(solve(given, tol)),
        lambda tol: jax.block_until_ready(gradient(given, tol)),
    )


def _diffrax() -> tuple[Any, Any, Any]:
    import diffrax
    import jax

    jax.config.update("jax_enable_x64", True)
    return diffrax, jax, jax.numpy


def diffrax_gradient(
    field: Callable[[Any, Any, Any], Any],
    parameters: Any,
    start: Any,
    horizon: float,
    solver: str,
    accuracy: float,
    forward: bool = False,
) -> Callable[..., Any]:
    """The gradient of the mean square at the end through a solver of diffrax, jitted, with its default adjoint.

    Args:
        field: ``field(xp, y, p)``.
        parameters: p, of shape (P,).
        start: y(0), in the dtype of the solve.
        horizon: the end.
        solver: "LeapfrogMidpoint", with so many steps, or the name of an adaptive one, with a tolerance.
        accuracy: the number of steps, or rtol and atol.
        forward: whether only the end is asked for.

    Returns:
        What makes the gradient with respect to parameters and y(0), and the final state, once they are there; with
        another tolerance, if that is given.
    """
    made: list[Callable[[float], Any]] = []

    def run(tolerance: float = accuracy) -> Any:
        if not made:
            made.append(_jitted_gradient(field, parameters, start, horizon, solver, accuracy, forward))
        return made[0](tolerance)

    return run


def _jitted_gradient(
    field: Callable[[Any, Any, Any], Any],
    parameters: Any,
    start: Any,
    horizon: float,
    solver: str,
    accuracy: float,
    forward: bool,
) -> Callable[[float], Any]:
    diffrax, jax, jnp = _diffrax()
    p, y0 = jnp.asarray(parameters), jnp.asarray(start)
    if solver == "LeapfrogMidpoint":
        times = jnp.linspace(0, horizon, int(accuracy) + 1, dtype=y0.dtype)
        steps = int(accuracy)
    else:
        times, steps = None, 4096

    def end(inputs: Any, tolerance: Any) -> Any:
        p, y0 = inputs
        controller = diffrax.PIDController(rtol=tolerance, atol=tolerance) if times is None else diffrax.StepTo(times)
        term = diffrax.ODETerm(lambda t, y, p: field(jnp, y, p))
        method = getattr(diffrax, solver)()
        return diffrax.diffeqsolve(
            term, method, 0.0, horizon, None, y0, args=p, stepsize_controller=controller, max_steps=steps
        ).ys[-1]

    def loss(inputs: Any, tolerance: Any) -> Any:
        found = end(inputs, tolerance)
        return jnp.square(found).mean(), found

    jitted = jax.jit(end if forward else jax.value_and_grad(loss, has_aux=True))
    return lambda tolerance: jax.block_until_ready(jitted((p, y0), tolerance))
