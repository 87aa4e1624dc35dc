# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from messages import mentions

from hf_ssl.losses import cosine_regression, latent_smooth_l1, latent_squared_l2, masked_patch_mse


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def slow_cosine_regression(predictions, targets):
    total = 0.0
    for p, t in zip(predictions, targets, strict=True):
        total = total + 2 - 2 * sum(p * t) / (torch.sqrt(sum(p * p)) * torch.sqrt(sum(t * t)))
    return total / len(predictions)


def test_cosine_regression_equals_its_definition():
    inputs = [randn(5, 3, seed=seed).requires_grad_() for seed in (1, 2)]
    loss, slow = cosine_regression(*inputs), slow_cosine_regression(*inputs)
    torch.testing.assert_close(loss, slow)
    torch.testing.assert_close(torch.autograd.grad(loss, inputs), torch.autograd.grad(slow, inputs))
    assert torch.autograd.gradcheck(cosine_regression, inputs)


def test_cosine_regression_has_closed_forms():
    """The loss is 0 for equal directions, 2 for a right angle and 4 for opposite ones, for any length."""
    x, y = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 0.1]])
    assert cosine_regression(x, 1e-3 * x).item() == pytest.approx(0, abs=1e-6)
    assert cosine_regression(x, y).item() == 2
    assert cosine_regression(x, -x).item() == 4
    assert cosine_regression(torch.cat([x, x]), torch.cat([-x, y])).item() == 3
    z = randn(6, 4)
    assert not torch.isclose(cosine_regression(z, z.roll(1, 0)), cosine_regression(z, z))


def test_cosine_regression_of_zeros_is_finite():
    """A projection can become 0. The loss then stays finite."""
    zeros = torch.zeros(3, 4, requires_grad=True)
    loss = cosine_regression(zeros, torch.ones(3, 4))
    loss.backward()
    assert loss.item() == 2 and zeros.grad.isfinite().all()


@pytest.mark.parametrize("shapes", [((4, 3), (4, 2)), ((4, 3), (3, 3)), ((2, 4, 3), (2, 4, 3))])
def test_cosine_regression_raises_for_other_shapes(shapes):
    with pytest.raises(ValueError, match=mentions("cosine_regression", *shapes)):
        cosine_regression(*(torch.ones(shape) for shape in shapes))


def slow_masked_patch_mse(predictions, targets, mask, normalize):
    total, masked = 0.0, 0
    for b in range(targets.shape[0]):
        for n in range(targets.shape[1]):
            if not mask[b, n]:
                continue
            patch = targets[b, n]
            if normalize:
                mean = sum(patch) / len(patch)
                variance = sum((patch - mean) ** 2) / (len(patch) - 1)
                patch = (patch - mean) / (variance + 1e-6) ** 0.5
            total = total + sum((predictions[b, n] - patch) ** 2) / len(patch)
            masked += 1
    return total / masked


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32])
def test_masked_patch_mse_equals_its_definition(normalize, kind):
    prediction, target = randn(3, 5, 4, seed=1).requires_grad_(), 5 + 2 * randn(3, 5, 4, seed=2)
    mask = torch.tensor(
        [[1, 1, 0, 1, 1], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]]
    )  # images have different numbers of masked patches
    loss = masked_patch_mse(prediction, target, mask.to(kind), normalize=normalize)
    slow = slow_masked_patch_mse(prediction, target, mask, normalize)
    torch.testing.assert_close(loss, slow)
    (gradient,) = torch.autograd.grad(loss, prediction)
    torch.testing.assert_close(gradient, *torch.autograd.grad(slow, prediction))
    assert (gradient[mask == 0] == 0).all() and (gradient[mask == 1] != 0).all()


@pytest.mark.parametrize("normalize", [False, True])
def test_masked_patch_mse_gradcheck(normalize):
    target, mask = randn(2, 3, 4, seed=2), torch.tensor([[1, 0, 1], [0, 1, 0]])
    assert torch.autograd.gradcheck(
        lambda prediction: masked_patch_mse(prediction, target, mask, normalize=normalize),
        randn(2, 3, 4, seed=1).requires_grad_(),
    )


def test_masked_patch_mse_has_closed_forms():
    """The loss of the prediction 0 for normalized patches of P values is their biased variance, (P - 1) / P.

    A constant patch is 0 after normalization.
    """
    mask = torch.ones(2, 3)
    loss = masked_patch_mse(torch.zeros(2, 3, 16), randn(2, 3, 16).float(), mask, normalize=True)
    assert loss.item() == pytest.approx(15 / 16, rel=1e-4)
    flat = torch.full((2, 3, 16), 0.5)
    assert masked_patch_mse(torch.ones(2, 3, 16), flat, mask, normalize=True).item() == 1
    assert masked_patch_mse(flat + 2, flat, mask, normalize=False).item() == 4
    assert masked_patch_mse(flat, flat, 0 * mask, normalize=False).isnan()


def test_targets_get_no_gradient():
    target = randn(2, 3, 4).requires_grad_()
    masked_patch_mse(randn(2, 3, 4).requires_grad_(), target, torch.ones(2, 3), normalize=True).backward()
    latent_smooth_l1(randn(2, 3, 4).requires_grad_(), target).backward()
    latent_squared_l2(randn(1, 2, 3, 4).requires_grad_(), target[None]).backward()
    assert target.grad is None


@pytest.mark.parametrize(
    ("prediction", "target", "mask", "normalize", "parts"),
    [
        ((2, 3, 4), (2, 3, 5), (2, 3), True, ["(2, 3, 4)", "(2, 3, 5)"]),
        ((3, 4), (3, 4), (3,), True, ["(3, 4)"]),
        ((2, 3, 4), (2, 3, 4), (3, 2), True, ["mask", "(2, 3)", "(3, 2)"]),
        ((2, 3, 4), (2, 3, 4), (2, 3, 4), True, ["mask", "(2, 3)", "(2, 3, 4)"]),
        ((2, 3, 1), (2, 3, 1), (2, 3), True, ["patches"]),
    ],
)
def test_masked_patch_mse_raises_for_invalid_arguments(prediction, target, mask, normalize, parts):
    with pytest.raises(ValueError, match=mentions("masked_patch_mse", *parts)):
        masked_patch_mse(torch.ones(prediction), torch.ones(target), torch.ones(mask), normalize=normalize)


def slow_smooth_l1(prediction, target):
    total = 0.0
    for p, t in zip(prediction.flatten(), target.flatten(), strict=True):
        distance = abs(p - t)
        total = total + (distance**2 / 2 if distance < 1 else distance - 0.5)
    return total / prediction.numel()


def test_latent_smooth_l1_equals_its_definition():
    prediction, target = randn(2, 3, 4, seed=1).requires_grad_(), 2 * randn(2, 3, 4, seed=2)
    loss, slow = latent_smooth_l1(prediction, target), slow_smooth_l1(prediction, target)
    torch.testing.assert_close(loss, slow)
    torch.testing.assert_close(torch.autograd.grad(loss, prediction), torch.autograd.grad(slow, prediction))
    assert torch.autograd.gradcheck(lambda values: latent_smooth_l1(values, target), prediction)


def test_latent_squared_l2_equals_the_loss_of_the_paper():
    """For an image: 1 / M times the sum over blocks and their patches of the squared distance."""
    prediction, target = randn(2, 3, 4, 5, seed=1).requires_grad_(), 2 * randn(2, 3, 4, 5, seed=2)
    slow = 0.0
    for blocks, aims in zip(prediction, target, strict=True):
        for block, aim in zip(blocks, aims, strict=True):
            slow = slow + sum((p - t).norm() ** 2 for p, t in zip(block, aim, strict=True)) / 3 / 2
    loss = latent_squared_l2(prediction, target)
    torch.testing.assert_close(loss, slow)
    torch.testing.assert_close(torch.autograd.grad(loss, prediction), torch.autograd.grad(slow, prediction))
    assert torch.autograd.gradcheck(lambda values: latent_squared_l2(values, target), prediction)
    ones = torch.ones(7, 2, 3, 4)
    assert latent_squared_l2(ones, -ones).item() == 4 * 3 * 4


@pytest.mark.parametrize("shape", [(4, 3), (0, 2, 3, 4)])
def test_latent_squared_l2_raises_for_other_shapes(shape):
    with pytest.raises(ValueError, match=mentions("latent_squared_l2", shape)):
        latent_squared_l2(torch.ones(shape), torch.ones(shape))


def test_latent_smooth_l1_has_closed_forms():
    zeros = torch.zeros(1)
    for distance, expected in ((0.0, 0), (0.5, 0.125), (1.0, 0.5), (-3.0, 2.5), (1e30, 1e30)):
        assert latent_smooth_l1(zeros + distance, zeros).item() == pytest.approx(expected)


@pytest.mark.parametrize("shapes", [((4, 3), (3,)), ((4, 3), (4, 1)), ((0, 3), (0, 3))])
def test_latent_smooth_l1_raises_for_other_shapes(shapes):
    """Shapes that torch would broadcast raise an error, too."""
    with pytest.raises(ValueError, match=mentions("latent_smooth_l1", *shapes)):
        latent_smooth_l1(*(torch.ones(shape) for shape in shapes))
