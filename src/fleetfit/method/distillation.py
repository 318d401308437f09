"""What a sub-network is trained on: the paper's distillation loss (Eq. 9), and logits with labels (Beyond)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss


def distillation_loss(
    student_logits: Float[Tensor, "sample class"],
    teacher_logits: Float[Tensor, "sample class"],
    student_embeddings: Float[Tensor, "sample token channel"],
    teacher_embeddings: Float[Tensor, "sample token channel"],
    student_hidden: Sequence[Float[Tensor, "sample token channel"]],
    teacher_hidden: Sequence[Float[Tensor, "sample token channel"]],
    weight_logits: float,
    weight_embeddings: float,
) -> Float[Tensor, ""]:
    """lambda_1 * MSE(logits) + lambda_2 * MSE(embeddings) + MSE(hidden states), Eq. 9.

    No gradient reaches the teacher.

    Reading: each MSE is the mean over all its elements, and the hidden term the mean over pairs of layers, so that it
    does not grow with depth. Pair i is (student layer i, the teacher layer it was kept from).

    Args:
        student_logits: Of the sub-network.
        teacher_logits: Of the teacher, on the same samples.
        student_embeddings: The embedding's output.
        teacher_embeddings: The same of the teacher; the embedding does not shrink.
        student_hidden: Output of each layer of the sub-network.
        teacher_hidden: Output of the teacher's layer of the same pair.
        weight_logits: lambda_1.
        weight_embeddings: lambda_2.

    Raises:
        ValueError: no pair of layers, or a layer without its partner.
    """
    if len(student_hidden) != len(teacher_hidden) or not student_hidden:
        raise ValueError(
            "student_hidden and teacher_hidden must have equally many layers, at least 1, "
            f"got {len(student_hidden)} and {len(teacher_hidden)}"
        )
    pairs = zip(student_hidden, teacher_hidden, strict=True)
    hidden = torch.stack([mse_loss(student, teacher.detach()) for student, teacher in pairs]).mean()
    return (
        weight_logits * mse_loss(student_logits, teacher_logits.detach())
        + weight_embeddings * mse_loss(student_embeddings, teacher_embeddings.detach())
        + hidden
    )


def joint_loss(
    student_logits: Float[Tensor, "sample class"],
    teacher_logits: Float[Tensor, "sample class"],
    labels: Int[Tensor, " sample"],
    weight_logits: float,
) -> Float[Tensor, ""]:
    """lambda_1 * MSE(logits) + cross-entropy on the labels, in nats (Beyond).

    One stage with the full reference as teacher; compared with Eq. 9 in benchmarks/results. No gradient reaches the
    teacher.
    """
    return weight_logits * mse_loss(student_logits, teacher_logits.detach()) + cross_entropy(student_logits, labels)
