"""The gradient filters: what a user can ask for, what is done where, and the formula of the costate.

Imports: `schemes`. Everything is linear in cotangents that others work out.
Begin with `costate`, which says why a filter is needed and what it is; `boundary_layer` is where, before an
observation, more is needed, `grad_filter` has the options.
"""
