"""What a user's model needs: parameters on the solver's grid, and whether their gradients oscillate.

Imports: nothing of the package.
Begin with `grid_parameter`; `oscillation` reports, by what `alternation` finds in numbers.
"""
