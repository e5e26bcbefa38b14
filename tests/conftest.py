"""Settings of all tests."""

import torch

# Two workers with a thread each: with more threads than cores, each waits for the others.
torch.set_num_threads(1)
