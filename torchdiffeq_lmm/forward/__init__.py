"""Making the steps: grid, vector field, stepping loop, implicit equations, linear solvers, interpolation.

Imports: `schemes`. No graph of autograd is made or kept here.
Begin with `stepping`, the loop; `step_source` tells it what to do, `vector_field` and `implicit` give it slopes.
"""
