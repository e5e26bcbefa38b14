"""What a method is, without any solve: coefficients, rows on a grid, stability, facts.

Imports: nothing of the package. Pure functions of numbers, and of tensors where steps carry a gradient.
Begin with `methods`, which has the formulas; `unrolling` writes them on a grid as the rows of a `recurrence`, and
`discrete_adjoint` runs the rows backwards.
"""
