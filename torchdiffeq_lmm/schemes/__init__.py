"""What a method is, without any solve: coefficients, rows on a grid, stability, facts.

Imports: nothing of the package. Pure functions of numbers, and of tensors where steps carry a gradient.
Begin with `methods`, which has the formulas; `starting_procedure` and `recurrence` write them on a grid as rows, and
`discrete_adjoint` runs the rows backwards.
"""
