"""Eq. 14, uniform sampling, and what is a valid cell."""

from collections import Counter
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from fleetfit.core.records import OPERATIONS, Block
from fleetfit.method.search_space import loose_ends, num_headers, sample_blocks, validate_blocks


def block(input_1, input_2):
    return Block(input_1=input_1, input_2=input_2, operation_1="conv3", operation_2="identity")


def test_number_of_headers_by_hand():
    assert num_headers(1, 7) == 4 * 49
    assert num_headers(3, 7) == (2 * 3 * 4) ** 2 * 7**6


@pytest.mark.parametrize(("num_blocks", "operations"), [(1, OPERATIONS[:3]), (2, OPERATIONS[:2])])
def test_number_of_headers_is_how_many_valid_cells_there_are(num_blocks, operations):
    inputs = range(num_blocks + 3)  # two too many, so that validation has to refuse
    blocks = [
        Block(input_1=i, input_2=j, operation_1=o, operation_2=p)
        for i, j, o, p in product(inputs, inputs, operations, operations)
    ]
    valid = 0
    for cell in product(blocks, repeat=num_blocks):
        try:
            validate_blocks(cell)
            valid += 1
        except ValueError:
            pass
    assert valid == num_headers(num_blocks, len(operations))


def test_sampling_reaches_every_cell_equally_often():
    generator = torch.Generator().manual_seed(0)
    operations = OPERATIONS[:2]
    drawn = Counter(sample_blocks(1, operations, generator) for _ in range(1600))
    assert len(drawn) == num_headers(1, 2) == 16
    assert chisquare(list(drawn.values())).pvalue > 1e-3


@given(st.integers(1, 8), st.integers(0, 2**31), st.integers(1, 7))
def test_samples_are_valid_repeatable_and_of_the_operations_asked_for(num_blocks, seed, num_operations):
    operations = OPERATIONS[-num_operations:]
    blocks = sample_blocks(num_blocks, operations, torch.Generator().manual_seed(seed))
    assert len(blocks) == num_blocks
    validate_blocks(blocks)
    assert {o for b in blocks for o in (b.operation_1, b.operation_2)} <= set(operations)
    assert blocks == sample_blocks(num_blocks, operations, torch.Generator().manual_seed(seed))
    ends = loose_ends(blocks)
    assert ends[-1] == num_blocks - 1
    for i in range(num_blocks):
        assert (i in ends) == (not any(i + 2 in (b.input_1, b.input_2) for b in blocks))


def test_later_blocks_take_earlier_ones_as_inputs():
    generator = torch.Generator().manual_seed(1)
    drawn = {b.input_1 for _ in range(200) for b in sample_blocks(3, OPERATIONS, generator)[2:]}
    assert drawn == {0, 1, 2, 3}


def test_loose_ends_by_hand():
    assert loose_ends([block(0, 1)]) == (0,)
    assert loose_ends([block(0, 1), block(2, 0), block(0, 1)]) == (1, 2)
    assert loose_ends([block(0, 1), block(2, 0), block(2, 3)]) == (2,)


def test_bad_arguments_name_rule_and_value():
    with pytest.raises(ValueError, match=r"blocks.1.input_2 must be < 3, got 3"):
        validate_blocks([block(0, 1), block(2, 3)])
    with pytest.raises(ValueError, match=r"blocks.0.input_1 must be < 2, got 2"):
        loose_ends([block(2, 0)])
    with pytest.raises(ValueError, match="blocks must have at least 1"):
        validate_blocks([])
    with pytest.raises(ValueError, match="num_blocks must be >= 1, got 0"):
        num_headers(0, 7)
    with pytest.raises(ValueError, match="num_operations must be >= 1"):
        num_headers(1, 0)
    with pytest.raises(ValueError, match="num_blocks must be >= 1"):
        sample_blocks(0, OPERATIONS, torch.Generator())
    with pytest.raises(ValueError, match="operations must have at least 1"):
        sample_blocks(1, [], torch.Generator())
