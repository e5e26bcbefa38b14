"""Making the steps: grid, vector field, stepping loop, implicit equations, linear solvers, outputs.

Imports: `schemes`. No graph of autograd is made or kept here.
Begin with `stepping`, the loop; `step_source` gives it rows and times, `step_evaluator` the slopes and the solutions of
`implicit` rows, `sde_stepping` the noise. `outputs` says what is made of its states.
"""
