"""The policy of the header search (Section III-C): one LSTM layer, 4B steps: I1, I2, O1, O2 of each block."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fleetfit.core.records import Block, Operation

TANH_CONSTANT = 1.10


@dataclass(frozen=True)
class Choice:
    """A child drawn from the policy: log pi(blocks), and the sum of the steps' entropies; both differentiable."""

    blocks: tuple[Block, ...]
    log_probability: Float[Tensor, ""]
    entropy: Float[Tensor, ""]


class Controller(nn.Module):
    """Autoregressive policy over block tuples.

    Block b, counted from 0, chooses each input among b + 2 and each operation among |O| (Eq. 14).
    """

    def __init__(self, num_blocks: int, operations: tuple[Operation, ...], hidden: int = 100) -> None:
        super().__init__()
        self.num_blocks = num_blocks
        self.operations = operations
        self.lstm = nn.LSTMCell(hidden, hidden)
        self.start = nn.Parameter(torch.randn(hidden) * 0.1)
        self.input_embedding = nn.Embedding(num_blocks + 1, hidden)
        self.operation_embedding = nn.Embedding(len(operations), hidden)
        self.input_logits = nn.ModuleList(nn.Linear(hidden, b + 2) for b in range(num_blocks))
        self.operation_logits = nn.Linear(hidden, len(operations))

    def sample(self, generator: torch.Generator) -> Choice:
        """Draw one child."""
        return self._walk(None, generator)

    def score(self, blocks: tuple[Block, ...]) -> Choice:
        """log pi and entropy along given blocks."""
        numbers = [
            number
            for b in blocks
            for number in (
                b.input_1,
                b.input_2,
                self.operations.index(b.operation_1),
                self.operations.index(b.operation_2),
            )
        ]
        return self._walk(iter(numbers), None)

    def _walk(self, given: Iterator[int] | None, generator: torch.Generator | None) -> Choice:
        x, state = self.start.unsqueeze(0), None
        log_probability, entropy = torch.zeros(()), torch.zeros(())
        blocks = []
        for b in range(self.num_blocks):
            chosen = []
            for step in range(4):
                state = self.lstm(x, state)
                of_input = step < 2
                logits = (self.input_logits[b] if of_input else self.operation_logits)(state[0])[0]
                log_shares = (TANH_CONSTANT * torch.tanh(logits)).log_softmax(-1)
                shares = log_shares.exp()
                if given is None:
                    number = int(torch.multinomial(shares.detach(), 1, generator=generator))
                else:
                    number = next(given)
                log_probability = log_probability + log_shares[number]
                entropy = entropy - (shares * log_shares).sum()
                embedding = self.input_embedding if of_input else self.operation_embedding
                x = embedding(torch.tensor([number]))
                chosen.append(number)
            blocks.append(
                Block(
                    input_1=chosen[0],
                    input_2=chosen[1],
                    operation_1=self.operations[chosen[2]],
                    operation_2=self.operations[chosen[3]],
                )
            )
        return Choice(tuple(blocks), log_probability, entropy)
