"""Rows in blocks of one structure: with their weights they are the rows of the solve; what fills up adds nothing."""

import pytest
import torch

from torchdiffeq_lmm.schemes.block_rows import all_weights, blocks_of, weight_indices
from torchdiffeq_lmm.schemes.methods import METHODS, MultistepMethod
from torchdiffeq_lmm.schemes.recurrence import Row
from torchdiffeq_lmm.schemes.unrolling import unroll

EXPLICIT = [method for method in METHODS if not method.is_implicit]
STEPS = torch.tensor([0.1] * 9 + [0.07] + [0.1] * 12 + [0.03], dtype=torch.float64)


def terms(row: Row) -> tuple[dict[int, float], dict[int, float]]:
    """The weights that are not 0, by lag."""
    increments, slopes = ({lag: float(w) for lag, w in of if float(w) != 0.0} for of in (row.increments, row.slopes))
    return increments, slopes


@pytest.mark.parametrize("method", EXPLICIT, ids=lambda method: method.name)
@pytest.mark.parametrize("block", [5, 8])
def test_blocks_have_the_rows_of_the_solve(method: MultistepMethod, block: int) -> None:
    recurrence = unroll(method, STEPS)
    blocks = blocks_of(method, recurrence, block)
    weights = all_weights(recurrence)
    state = 0
    for made, indices in zip(blocks, weight_indices(recurrence, blocks), strict=True):
        assert (made.first, recurrence.nodes[made.node]) == (state, state)
        rows = made.pattern.with_weights(weights[torch.tensor(indices)])
        for row, wanted in zip(rows, recurrence.rows[state:], strict=False):
            assert terms(row) == terms(wanted)
            assert row.is_node == wanted.is_node
        assert all(terms(row) == ({}, {}) for row in rows[made.rows :])
        state += made.rows
    assert state == len(recurrence.rows)
    # All but the start have one structure, so that one compilation serves them.
    assert len({made.pattern for made in blocks}) <= 2
    assert {made.pattern.steps for made in blocks[1:]} == {block}


@pytest.mark.parametrize("method", EXPLICIT, ids=lambda method: method.name)
def test_solves_of_all_lengths_have_the_same_structure(method: MultistepMethod) -> None:
    known = {made.pattern for made in blocks_of(method, unroll(method, STEPS), 5)}
    for count in (20, 27, 40):
        steps = torch.linspace(1, 2, count, dtype=torch.float64) / count
        assert {made.pattern for made in blocks_of(method, unroll(method, steps), 5)} == known


@pytest.mark.parametrize("method", EXPLICIT, ids=lambda method: method.name)
def test_a_solve_that_is_all_start_has_no_blocks(method: MultistepMethod) -> None:
    recurrence = unroll(method, STEPS[:1])
    blocks = blocks_of(method, recurrence, 5)
    assert sum(made.rows for made in blocks) in (0, len(recurrence.rows))
