"""Newton's method of implicit steps by a compiled function: an iterate of all samples is one call.

What it does not solve in a few iterations is left to the iterations of `block_newton`, which take more care and more
time. So what becomes of a sample does not depend on the others here either.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from torchdiffeq_lmm.forward.implicit_equation import Equations, Flags, Rows, Tolerances
from torchdiffeq_lmm.forward.linear import noise
from torchdiffeq_lmm.forward.samples import Samples
from torchdiffeq_lmm.forward.vector_field import HostedFunction, VectorField

from .block_loop import BlockFunction
from .compile_settings import Compile
from .compiled_functions import CompiledFunctions
from .func_capture import Dependencies
from .kept_captures import dependencies_of
from .newton_iterate import Given, Iterates
from .newton_tracing import trace_newton
from .state_layout import few_components, laid_out

_MOST = 8
"""Where Newton's method converges it takes no more iterations, as a rule."""


class _Known(NamedTuple):
    """What is the same for all steps: the compiled iterate, what func depends on, and parts of `Given`."""

    run: BlockFunction
    dependencies: Dependencies
    axis: int
    rtol: Tensor
    atol: Tensor
    noise: Tensor


class CompiledNewton:
    """Solves the equations of the implicit steps of one solve.

    Args:
        settings: how to compile.
        hosted: the user's function.
        vector_field: the same with its checks.
    """

    def __init__(self, settings: Compile, hosted: HostedFunction, vector_field: VectorField) -> None:
        self._settings = settings
        self._hosted = hosted
        self._vector_field = vector_field
        self._known: _Known | None = None
        # What callbacks change of func between steps is to be seen.
        callbacks = hosted.callback_step, hosted.callback_accept_step, hosted.callback_reject_step
        self._asks_again = any(callback is not None for callback in callbacks)

    def solve(
        self, samples: Samples, tolerances: Tolerances, equations: Equations, start: Rows, skipped: Flags
    ) -> tuple[Rows, Flags]:
        """See `forward.newton_memory.FullNewton`.

        Raises:
            RuntimeError: func cannot be compiled, or does not act on the samples independently.
        """
        assert equations.time is not None
        if self._known is None or self._asks_again:
            self._known = self._made(samples, tolerances, samples.join(equations.x), equations.time)
        run, dependencies, axis, rtol, atol, numbers = self._known
        states = map(samples.join, (equations.x, equations.c, start))
        x, c, d = (laid_out(state, state.ndim, axis) for state in states)
        weight = torch.full((), equations.weight, dtype=torch.float64, device=x.device)
        given = Given(x, c, weight, rtol, atol, numbers)
        done = torch.from_numpy(skipped).to(x.device)
        nothing = torch.full_like(d, torch.nan)
        iterates = Iterates(
            d, torch.zeros_like(d), nothing, torch.full_like(d, torch.inf), done, torch.zeros_like(done)
        )
        at = equations.time.reshape(1)
        looked_up = (rows[0] for rows in dependencies.looked_up(dependencies.stacks, at, at.new_zeros(1).long()))
        rest = (equations.time, *dependencies.tensors, *looked_up)
        for _ in range(_MOST):
            *found, counts = run(*given, *iterates, *rest)
            iterates = Iterates(*found)
            self._vector_field.count_evaluation()
            self._vector_field.count_jacobian()
            left, coupled = counts.tolist()
            if coupled:
                raise RuntimeError(
                    f"compile needs a func that acts on samples independently where steps are implicit, got one in "
                    f"which others have a part in f of {coupled} of {len(skipped)} samples. Say by batch_dims in "
                    f"options how many leading dimensions count samples; or solve without compile"
                )
            if not left:
                break
        return samples.split(iterates.d), iterates.done.cpu().numpy() & ~skipped

    def _made(self, samples: Samples, tolerances: Tolerances, x: Tensor, time: Tensor) -> _Known:
        # Derivatives are taken whether the solve itself is differentiated or not.
        with torch.inference_mode(False), torch.enable_grad():
            dependencies = dependencies_of(self._hosted, self._vector_field, time, x, self._settings.dynamic)
            function = _CompiledIterate(dependencies, self._settings, samples, x, time)
            rtol, atol, numbers = (
                laid_out(samples.join(given), x.ndim, function.axis)
                if isinstance(given, Tensor)
                else torch.full((), given, dtype=x.dtype, device=x.device)
                for given in (tolerances.part_of_rtol, tolerances.part_of_atol, noise(samples.split(x), 1))
            )
            run = function.of(samples, tolerances.precision, (rtol.ndim > 0, atol.ndim > 0))
        return _Known(run, dependencies, function.axis, rtol, atol, numbers)


class _CompiledIterate(CompiledFunctions):
    def __init__(
        self, dependencies: Dependencies, settings: Compile, samples: Samples, x: Tensor, time: Tensor
    ) -> None:
        super().__init__(dependencies, settings, x, time)
        # Where components of a state are entries of its samples.
        self.axis = self._take_apart() if samples.is_matrix and few_components(x) == 1 else 0

    def of(self, samples: Samples, precision: float, of_entries: tuple[bool, bool]) -> BlockFunction:
        key = "newton", samples.shapes[1:], samples.dims, self.axis, precision, of_entries
        return self._for_any_size(
            lambda: self._made(key, lambda: trace_newton(self._func, samples, precision, of_entries, self._like))[0]
        )
