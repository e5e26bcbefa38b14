"""torchdiffeq and torchsde: their private parts, the solver classes that they call, registration, `odeint`.

Imports: all other rooms.
Begin with `solver`; only `torchdiffeq_host` and `torchsde_host` touch the private parts of those two.
"""
