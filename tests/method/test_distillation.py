"""Eq. 9 and the joint loss."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from fleetfit.method.distillation import distillation_loss, joint_loss

G = torch.Generator().manual_seed(0)


def random(*shape):
    return torch.randn(*shape, generator=G, dtype=torch.float64)


def test_by_hand():
    loss = distillation_loss(
        student_logits=torch.tensor([[1.0, 3.0]]),
        teacher_logits=torch.tensor([[2.0, 5.0]]),  # (1 + 4) / 2 = 2.5
        student_embeddings=torch.zeros(1, 2, 1),
        teacher_embeddings=torch.tensor([[[1.0], [3.0]]]),  # (1 + 9) / 2 = 5
        student_hidden=[torch.zeros(1, 2, 1), torch.zeros(1, 2, 1)],
        teacher_hidden=[torch.full((1, 2, 1), 2.0), torch.full((1, 2, 1), 4.0)],  # (4 + 16) / 2 = 10
        weight_logits=100.0,
        weight_embeddings=1000.0,
    )
    assert float(loss) == pytest.approx(100 * 2.5 + 1000 * 5 + 10)


def test_against_numpy_with_random_tensors():
    sl, tl, se, te = random(5, 3), random(5, 3), random(5, 4, 6), random(5, 4, 6)
    sh, th = [random(5, 4, 6) for _ in range(3)], [random(5, 4, 6) for _ in range(3)]
    expected = 0.3 * np.mean((sl.numpy() - tl.numpy()) ** 2) + 0.7 * np.mean((se.numpy() - te.numpy()) ** 2)
    expected += np.mean([np.mean((s.numpy() - t.numpy()) ** 2) for s, t in zip(sh, th, strict=True)])
    assert float(distillation_loss(sl, tl, se, te, sh, th, 0.3, 0.7)) == pytest.approx(expected)


def test_zero_at_the_teacher_and_no_gradient_to_it():
    student, teacher = random(2, 3).requires_grad_(), random(2, 3).requires_grad_()
    tokens, other = random(2, 4, 5).requires_grad_(), random(2, 4, 5).requires_grad_()
    assert distillation_loss(teacher, teacher, other, other, [other], [other], 1.0, 1.0).item() == 0
    distillation_loss(student, teacher, tokens, other, [tokens], [other], 1.0, 1.0).backward()
    joint_loss(student, teacher, torch.tensor([0, 1]), 1.0).backward()
    assert teacher.grad is None
    assert other.grad is None
    assert student.grad is not None
    assert tokens.grad is not None


def test_layers_must_be_in_pairs():
    logits, tokens = random(2, 3), random(2, 4, 5)
    for student, teacher in (([tokens], []), ([], []), ([tokens], [tokens, tokens])):
        with pytest.raises(ValueError, match="equally many layers, at least 1, got"):
            distillation_loss(logits, logits, tokens, tokens, student, teacher, 1.0, 1.0)


def test_joint_loss_against_scipy():
    student, teacher, labels = random(6, 4), random(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    entropy = -log_softmax(student.numpy(), axis=1)[np.arange(6), labels.numpy()].mean()
    squares = np.mean((student.numpy() - teacher.numpy()) ** 2)
    assert float(joint_loss(student, teacher, labels, 0.25)) == pytest.approx(0.25 * squares + entropy)
