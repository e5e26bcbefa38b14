"""A solve as one node of autograd: the driver of a piece, recorded evaluations and their vjps, the backward modes.

Imports: `schemes`, `forward`, `filters`.
Begin with `piece`, which runs the steps, and `solve_recorder`, which makes them a node of autograd; `solve_adjoint` is
its backward pass. The modes are in `stored_evaluations`, `checkpoints` and `reversal`; `backward_modes` lists them.
"""
