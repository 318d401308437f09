"""What is wrong with the numbers of stored weights, in words that name the tensors."""

from collections.abc import Mapping

from torch import Tensor

SHOWN = 3  # of the tensors that are wrong


def not_finite(weights: Mapping[str, Tensor]) -> list[str]:
    """A description of each tensor that holds a NaN or an infinity; integers have neither."""
    wrong = []
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            nans, infinities = int(tensor.isnan().sum()), int(tensor.isinf().sum())
            held = " and ".join(f"{n} {what}" for n, what in ((nans, "NaN"), (infinities, "infinite")) if n)
            wrong.append(f"{name} holds {held} of {tensor.numel()} values")
    return wrong


def all_zero(weights: Mapping[str, Tensor]) -> list[str]:
    """Names of matrices without a number other than 0; those of RoBERTa's one type of token are published as zeros."""
    return [
        name
        for name, tensor in weights.items()
        if tensor.ndim >= 2 and name.endswith("weight") and "token_type" not in name and not bool(tensor.any())
    ]


def first_few(wrong: list[str]) -> str:
    """Some of many descriptions, and how many more there are."""
    more = f", and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
    return f"{'; '.join(wrong[:SHOWN])}{more}"
