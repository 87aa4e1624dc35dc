# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from messages import mentions

from hf_ssl.losses import dino_center, dino_cross_entropy, soft_targets


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loss_of(student, teacher, center, student_temperature=0.2, teacher_temperature=0.1):
    return dino_cross_entropy(
        student,
        teacher,
        center,
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
    )


def slow_dino(student, teacher, center, student_temperature=0.2, teacher_temperature=0.1):
    total, terms = 0.0, 0
    for a, view in enumerate(teacher):
        for v, other in enumerate(student):
            for b in range(len(view)):
                if v == a:
                    continue
                target = torch.softmax((view[b] - center) / teacher_temperature, 0)
                logits = other[b] / student_temperature
                total = total - sum(target * (logits - torch.logsumexp(logits, 0)))
                terms += 1
    return total / terms


@pytest.mark.parametrize(("views", "assigned"), [(2, 1), (2, 2), (5, 2), (3, 3)])
@pytest.mark.parametrize("numbers", [1, 30, 10**6])
def test_equals_its_definition_in_value_and_gradient(views, assigned, numbers, monkeypatch):
    monkeypatch.setitem(soft_targets._LOGITS_PER_PART, "cpu", numbers)
    student, teacher = randn(views, 3, 4).requires_grad_(), randn(assigned, 3, 4, seed=1)
    center = randn(4, seed=2)
    loss, slow = loss_of(student, teacher, center), slow_dino(student, teacher, center)
    torch.testing.assert_close(loss, slow, rtol=1e-12, atol=1e-13)
    (gradient,) = torch.autograd.grad(3 * loss, student)
    torch.testing.assert_close(gradient, 3 * torch.autograd.grad(slow, student)[0])


def test_gradcheck():
    teacher, center = randn(2, 3, 4, seed=1), randn(4, seed=2)
    assert torch.autograd.gradcheck(
        lambda student: loss_of(student, teacher, center), randn(4, 3, 4).requires_grad_()
    )


def test_has_closed_forms():
    """The loss of a constant student is log K. That of a student equal to the teacher is the entropy."""
    center = torch.zeros(8).double()
    teacher = randn(2, 3, 8, seed=1)
    assert loss_of(torch.ones(4, 3, 8).double(), teacher, center).item() == pytest.approx(math.log(8))
    same = teacher[:1].expand(2, 3, 8)
    target = (same[0] / 0.1).softmax(-1)
    entropy = -(target * target.log()).sum(-1).mean()
    torch.testing.assert_close(loss_of(same, same, center, student_temperature=0.1), entropy)


def test_a_view_is_not_compared_with_itself():
    """The outputs of student and teacher are equal for each view but differ between views."""
    outputs = 10 * torch.eye(4)[:2, None]
    center = torch.zeros(4)
    assert loss_of(outputs, outputs, center, 1.0, 0.01).item() == pytest.approx(10, abs=1e-3)
    assert loss_of(outputs, outputs.flip(0), center, 1.0, 0.01).item() == pytest.approx(0, abs=1e-3)


def test_the_center_is_subtracted_only_from_the_teacher():
    student, teacher, center = randn(4, 3, 5), randn(2, 3, 5, seed=1), randn(5, seed=2)
    loss = loss_of(student, teacher, center)
    torch.testing.assert_close(loss_of(student, teacher - center, torch.zeros(5).double()), loss)
    torch.testing.assert_close(loss_of(student + 3, teacher + 7, center - 2), loss)  # no effect
    assert not torch.isclose(loss_of(student, teacher, -center), loss)


def test_a_center_written_after_the_loss_does_not_change_the_gradient():
    """A model updates its center before the backward pass of the loss that used the old center."""
    gradients = []
    for move in (False, True):
        student, teacher, center = randn(4, 3, 5).requires_grad_(), randn(2, 3, 5, seed=1), randn(5, seed=2)
        temperature = torch.tensor(0.1)
        loss = loss_of(student, teacher, center, teacher_temperature=temperature)
        if move:
            center.copy_(dino_center(center, teacher, momentum=0.1))
            temperature.fill_(0.5)
        gradients += torch.autograd.grad(loss, student)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_teacher_and_center_get_no_gradient():
    teacher, center = randn(2, 3, 5).requires_grad_(), randn(5).requires_grad_()
    loss_of(randn(4, 3, 5).requires_grad_(), teacher, center).backward()
    assert teacher.grad is None and center.grad is None


@pytest.mark.parametrize("scale", [1e-3, 1, 1e3])
def test_float32_is_exact_enough_for_extreme_logits(scale):
    student, teacher, center = (
        scale * randn(4, 3, 300),
        scale * randn(2, 3, 300, seed=1),
        scale * randn(300, seed=2),
    )
    single = student.float().requires_grad_()
    double = single.detach().double().requires_grad_()
    loss = loss_of(single, teacher.float(), center.float(), 0.1, 0.04)
    exact = slow_dino(double, teacher.float().double(), center.float().double(), 0.1, 0.04)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)
    gradient, expected = torch.autograd.grad(loss, single)[0], torch.autograd.grad(exact, double)[0]
    assert gradient.isfinite().all()
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-3, atol=1e-5)


def test_the_gradient_of_half_precision_is_rounded_only_once():
    """The gradient is a difference of targets, which is rounded at the end, so small targets count."""
    student, teacher = 3 * randn(4, 3, 50), randn(2, 3, 50, seed=1)
    half = student.bfloat16().requires_grad_()
    full = half.detach().float().requires_grad_()
    center = torch.zeros(50)
    for values in (half, full):
        loss_of(values, teacher.float(), center).backward()
    assert half.grad.dtype == torch.bfloat16
    torch.testing.assert_close(half.grad, full.grad.bfloat16(), rtol=0, atol=0)


def test_only_the_gradient_is_as_large_as_the_students_logits(made, monkeypatch):
    monkeypatch.setitem(soft_targets._LOGITS_PER_PART, "cpu", 6 * 50)
    student, teacher = randn(6, 20, 50).requires_grad_(), randn(2, 20, 50, seed=1)
    with made:
        loss_of(student, teacher, torch.zeros(50).double()).backward()
    large = [size for size in made.sizes if size > 2 * 6 * 50]
    assert large == [student.numel()]


@pytest.mark.parametrize(
    ("student", "teacher", "center", "temperatures", "parts"),
    [
        ((1, 2, 3), (1, 2, 3), 3, (0.1, 0.04), ["(1, 2, 3)"]),
        ((2, 2, 3), (2, 2, 4), 3, (0.1, 0.04), ["teacher", "(2, 2, 3)", "(2, 2, 4)"]),
        ((2, 2, 3), (3, 2, 3), 3, (0.1, 0.04), [2, 3]),
        ((2, 2, 3), (2, 2, 3), 1, (0.1, 0.04), [3, "(1,)"]),
        ((2, 2, 3), (2, 2, 3), 3, (0.0, 0.04), ["temperature", "0.0"]),
        ((2, 2, 3), (2, 2, 3), 3, (0.1, -0.04), ["temperature", "-0.04"]),
    ],
)
def test_raises_for_invalid_arguments(student, teacher, center, temperatures, parts):
    with pytest.raises(ValueError, match=mentions("dino_cross_entropy", *parts)):
        loss_of(torch.ones(student), torch.ones(teacher), torch.ones(center), *temperatures)


def test_the_center_moves_towards_the_mean_of_the_batch():
    center, teacher = torch.tensor([1.0, 0.0]), torch.tensor([[[2.0, 4.0]], [[4.0, 8.0]]])
    torch.testing.assert_close(dino_center(center, teacher, momentum=0.9), torch.tensor([1.2, 0.6]))
    assert center.tolist() == [1, 0], "the old center does not change"
    torch.testing.assert_close(dino_center(center, teacher, momentum=1.0), center)
    torch.testing.assert_close(dino_center(center, teacher, momentum=0.0), torch.tensor([3.0, 6.0]))
    assert not dino_center(center, teacher.requires_grad_(), momentum=0.5).requires_grad


def test_the_mean_of_the_centers_of_equal_parts_is_the_center_of_the_whole():
    center, teacher = randn(4), randn(2, 6, 4, seed=1)
    parts = [dino_center(center, part, momentum=0.9) for part in teacher.split(3, dim=1)]
    torch.testing.assert_close(sum(parts) / 2, dino_center(center, teacher, momentum=0.9))


@pytest.mark.parametrize(("center", "teacher"), [((3,), (2, 5, 4)), ((1, 1, 4), (2, 5, 4)), ((4,), (5, 4))])
def test_the_center_raises_for_other_shapes(center, teacher):
    with pytest.raises(ValueError, match=mentions("dino_center", center, teacher)):
        dino_center(torch.ones(center), torch.ones(teacher), momentum=0.9)
