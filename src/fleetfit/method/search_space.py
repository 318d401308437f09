"""The space of searched headers: cells of B blocks, how many there are (Eq. 14), sampling and checking them."""

import math
from collections.abc import Sequence

import torch

from fleetfit.core.records import Block, Operation


def num_headers(num_blocks: int, num_operations: int) -> int:
    """Number of cells of B blocks, prod over b = 1..B of (b+1)^2 |O|^2, Eq. 14.

    Block b chooses two inputs among b+1 and two operations. Cells that differ only in the order of a block's two sides
    are counted apart, as in the paper.

    Raises:
        ValueError: ``num_blocks`` or ``num_operations`` is below 1.
    """
    if num_blocks < 1:
        raise ValueError(f"num_blocks must be >= 1, got {num_blocks}")
    if num_operations < 1:
        raise ValueError(f"num_operations must be >= 1, got {num_operations}")
    return math.prod((b + 1) ** 2 * num_operations**2 for b in range(1, num_blocks + 1))


def sample_blocks(num_blocks: int, operations: Sequence[Operation], generator: torch.Generator) -> tuple[Block, ...]:
    """Draw one of the cells that Eq. 14 counts, each as likely.

    Raises:
        ValueError: no block or no operation.
    """
    if num_blocks < 1:
        raise ValueError(f"num_blocks must be >= 1, got {num_blocks}")
    if not operations:
        raise ValueError("operations must have at least 1 entry, got 0")

    def draw(number: int) -> int:
        return int(torch.randint(number, (), generator=generator))

    return tuple(
        Block(
            input_1=draw(block + 2),
            input_2=draw(block + 2),
            operation_1=operations[draw(len(operations))],
            operation_2=operations[draw(len(operations))],
        )
        for block in range(num_blocks)
    )


def validate_blocks(blocks: Sequence[Block]) -> None:
    """Check that every block's inputs exist before it: block b, counted from 0, chooses among 0..b+1.

    Raises:
        ValueError: no block, or an input that is not there yet.
    """
    if not blocks:
        raise ValueError("blocks must have at least 1 entry, got 0")
    for b, block in enumerate(blocks):
        for side, chosen in (("input_1", block.input_1), ("input_2", block.input_2)):
            if chosen >= b + 2:
                raise ValueError(f"blocks.{b}.{side} must be < {b + 2}, got {chosen}")


def loose_ends(blocks: Sequence[Block]) -> tuple[int, ...]:
    """Which blocks, counted from 0, no later block takes as input: the cell's output is their average.

    The last block is always one of them.

    Raises:
        ValueError: see ``validate_blocks``.
    """
    validate_blocks(blocks)
    used = {chosen - 2 for block in blocks for chosen in (block.input_1, block.input_2)}
    return tuple(b for b in range(len(blocks)) if b not in used)
