"""A solve as one node of autograd: evaluations and their vector–Jacobian products, and the backward modes.

Imports: `schemes`, `forward`, `filters`.
Begin with `solve_recorder`, and `autograd_function`, the node; `stored_evaluations`, `checkpoints`, `reversal` are how
the backward pass finds the evaluations of func again, `vjp` what it does with them.
"""
