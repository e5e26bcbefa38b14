"""What a user's model needs: parameters on the solver's grid, and whether their gradients oscillate.

Imports: nothing of the package.
Begin with `grid_parameter`; `grid_module` is a layer made of them; `oscillation` reports, by what `alternation` finds.
"""
