# SPDX-License-Identifier: Apache-2.0
"""Statistics of features: closed forms, symmetries and loop versions."""

import math

import numpy as np
import pytest
import torch
from messages import mentions

from hf_ssl.evaluation import alignment, alpha_req, embedding_std, lidar, rank_me, statistics, uniformity


def noise(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def test_embedding_std_is_one_for_isotropic_and_zero_for_collapsed_features() -> None:
    axes = torch.cat([torch.eye(8), -torch.eye(8)])
    assert embedding_std(axes) == pytest.approx(1.0, abs=1e-6)
    assert embedding_std(noise(4000, 64)) == pytest.approx(1.0, abs=0.01)
    assert embedding_std(torch.ones(10, 8)) == pytest.approx(0.0, abs=1e-6)
    # Lengths say nothing: rows of one direction are a collapse whatever their norm.
    assert embedding_std(torch.arange(1.0, 11.0)[:, None] * torch.ones(10, 8)) == pytest.approx(0.0, abs=1e-6)
    # Half the rows at e1, half at e2 of two dimensions: each column is 0 or 1, so its deviation is 1/2.
    assert embedding_std(torch.eye(2).repeat(5, 1)) == pytest.approx(0.5 * math.sqrt(2), abs=1e-6)


def test_rank_of_features_that_are_no_numbers_is_no_number() -> None:
    assert math.isnan(rank_me(torch.tensor([[1.0, math.nan], [0.0, 1.0]])))


def test_rank_me_closed_forms() -> None:
    assert rank_me(torch.eye(8)) == pytest.approx(8, rel=1e-4)
    assert rank_me(torch.ones(20, 8)) == pytest.approx(1, rel=1e-4)
    # Singular values 2 and 1, in shares 2/3 and 1/3.
    entropy = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    assert rank_me(torch.diag(torch.tensor([2.0, 1.0]))) == pytest.approx(math.exp(entropy), rel=1e-5)
    assert rank_me(torch.zeros(4, 4)) == 1.0


@pytest.mark.parametrize("shape", [(200, 12), (12, 200), (30, 30)])
def test_rank_me_equals_the_svd(shape: tuple[int, int]) -> None:
    features = noise(*shape) * torch.logspace(0, -5, shape[1])
    sigma = np.linalg.svd(features.double().numpy(), compute_uv=False)
    share = sigma / sigma.sum() + 1e-7
    assert rank_me(features) == pytest.approx(math.exp(-(share * np.log(share)).sum()), rel=1e-6)
    assert rank_me(features * 1000) == pytest.approx(rank_me(features), rel=1e-6)


def of_spectrum(eigenvalues: torch.Tensor, rows: int = 400) -> torch.Tensor:
    """Features whose centered Gram matrix has exactly these eigenvalues."""
    centered = noise(rows, len(eigenvalues)).double()
    axes, _ = torch.linalg.qr(centered - centered.mean(dim=0))
    turn, _ = torch.linalg.qr(noise(len(eigenvalues), len(eigenvalues), seed=1).double())
    return axes * eigenvalues.double().sqrt() @ turn + 3


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.5])
@pytest.mark.parametrize("width", [20, 150])
def test_alpha_req_of_a_power_law(alpha: float, width: int) -> None:
    features = of_spectrum(torch.arange(1.0, width + 1) ** -alpha)
    assert alpha_req(features) == pytest.approx(alpha, abs=1e-4)
    assert alpha_req(100 * features) == pytest.approx(alpha, abs=1e-4)


def test_alpha_req_equals_a_weighted_regression() -> None:
    eigenvalues = torch.rand(120, generator=torch.Generator().manual_seed(3)).sort(descending=True).values
    ranks = np.arange(4, 101)
    slope, _ = np.polyfit(np.log(ranks), np.log(eigenvalues[3:100].numpy()), 1, w=ranks**-0.5)
    assert alpha_req(of_spectrum(eigenvalues)) == pytest.approx(-slope, rel=1e-5)
    # Few images: the eigenvalues are those of the smaller matrix, and the last one is zero by centering.
    few = noise(30, 80)
    spectrum = np.linalg.eigvalsh(np.cov(few.T.numpy()))[::-1][3:29]
    slope, _ = np.polyfit(np.log(ranks[:26]), np.log(spectrum), 1, w=ranks[:26] ** -0.5)
    assert alpha_req(few) == pytest.approx(-slope, rel=1e-3)


def test_alpha_req_needs_a_spectrum() -> None:
    assert math.isnan(alpha_req(noise(500, 4)))
    assert math.isnan(alpha_req(torch.ones(50, 20)))
    assert math.isnan(alpha_req(torch.full((50, 20), math.nan)))
    assert alpha_req(of_spectrum(torch.arange(1.0, 21) ** -2.0), (1, 20)) == pytest.approx(2, abs=1e-4)


def test_lidar_closed_forms() -> None:
    """Images at +-axes and views around them: each axis has the variance ratio that its factor gives."""
    axes = torch.cat([torch.eye(4), -torch.eye(4)])
    shift = torch.cat([torch.eye(4), -torch.eye(4)])
    views = axes[:, None] + 0.1 * shift[None]
    assert lidar(views, delta=0) == pytest.approx(4, rel=1e-5)
    # Two axes with the ratios 4 and 1: shares 4/5 and 1/5.
    scaled = axes[:, None] * torch.tensor([2.0, 1, 0, 0]) + 0.1 * shift[None]
    entropy = -(4 / 5 * math.log(4 / 5) + 1 / 5 * math.log(1 / 5))
    assert lidar(scaled, delta=0) == pytest.approx(math.exp(entropy), rel=1e-4)
    # Noise of the views on the first axis takes its weight away; RankMe would not notice.
    noisy = axes[:, None] + 0.1 * shift[None] * torch.tensor([10.0, 1, 1, 1])
    shares = np.array([0.01, 1, 1, 1]) / 3.01
    assert lidar(noisy, delta=0) == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-4)


@pytest.mark.parametrize("shape", [(60, 5, 8), (6, 20, 30)])
def test_lidar_equals_the_matrices_of_the_paper(shape: tuple[int, int, int]) -> None:
    images, _, width = shape
    views = (noise(images, width)[:, None] + 0.5 * noise(images * shape[1], width, 1).view(shape)).double()
    means = views.mean(1)
    within, between = torch.zeros(width, width).double(), torch.zeros(width, width).double()
    for image in range(images):
        between += torch.outer(means[image] - means.mean(0), means[image] - means.mean(0)) / images
        for row in views[image]:
            within += torch.outer(row - means[image], row - means[image]) / (images * shape[1])
    values, vectors = torch.linalg.eigh(within + 1e-4 * torch.eye(width))
    root = vectors @ torch.diag(values**-0.5) @ vectors.T
    share = torch.linalg.eigvalsh(root @ between @ root).clamp_min(0)
    share = share / share.sum() + 1e-7
    assert lidar(views) == pytest.approx(float((-(share * share.log()).sum()).exp()), rel=1e-4)


def test_lidar_needs_images_and_views() -> None:
    assert lidar(torch.ones(5, 3, 4)) == 1
    assert math.isnan(lidar(torch.full((5, 3, 4), math.inf)))
    for shape in ((1, 3, 4), (3, 1, 4), (3, 4)):
        with pytest.raises(ValueError, match=mentions("lidar", shape)):
            lidar(torch.ones(shape))


def test_alignment_closed_forms() -> None:
    rows = noise(50, 6)
    assert alignment(rows, 3 * rows) == pytest.approx(0, abs=1e-5)
    assert alignment(rows, -rows) == pytest.approx(4, rel=1e-5)
    east, north = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert alignment(east, north) == pytest.approx(2)
    assert alignment(east, north, alpha=1) == pytest.approx(math.sqrt(2))


def test_uniformity_closed_forms() -> None:
    assert uniformity(torch.ones(7, 5)) == pytest.approx(0, abs=1e-5)
    # Orthogonal rows: every squared distance is 2, so the log of the mean is -2 t.
    assert uniformity(torch.eye(6)) == pytest.approx(-4)
    assert uniformity(torch.eye(6), t=3) == pytest.approx(-6)
    with pytest.raises(ValueError, match=mentions("uniformity", 2, 1)):
        uniformity(torch.ones(1, 3))


def test_uniformity_equals_the_loop_over_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = noise(23, 5)
    unit = (rows / rows.norm(dim=1, keepdim=True)).double()
    pairs = [
        math.exp(-2 * float((unit[i] - unit[j]).square().sum()))
        for i in range(23)
        for j in range(23)
        if i != j
    ]
    monkeypatch.setattr(statistics, "ROW_CHUNK", 4)  # several chunks, the last one ragged
    assert uniformity(rows) == pytest.approx(math.log(sum(pairs) / len(pairs)), rel=1e-5)


@pytest.mark.parametrize("function", [alpha_req, embedding_std, rank_me, uniformity])
def test_half_precision_is_raised(function) -> None:
    rows = noise(300, 32).bfloat16()
    assert function(rows) == pytest.approx(function(rows.float()), rel=1e-6)
    assert function(rows.double()) == pytest.approx(function(rows.float()), rel=1e-4)


def test_two_collapses_are_seen() -> None:
    """Complete collapse (one point) and dimensional collapse (one plane of many dimensions)."""
    healthy, flat = noise(500, 64), noise(500, 2) @ noise(2, 64, seed=1)
    point = 1 + 1e-4 * noise(500, 64)
    assert embedding_std(point) < 0.01 < 0.9 < embedding_std(healthy)
    assert rank_me(flat) < 2.1 < 50 < rank_me(healthy)
    assert embedding_std(flat) > 0.5, (
        "the spread alone does not see a dimensional collapse: that is what the rank is for"
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_arrays_give_the_statistics_of_tensors(dtype: type) -> None:
    first, second = np.random.default_rng(0).normal(size=(2, 20, 6)).astype(dtype)
    for statistic in (alpha_req, embedding_std, rank_me, uniformity):
        assert statistic(first) == statistic(torch.from_numpy(first))
    assert alignment(first, second) == alignment(torch.from_numpy(first), torch.from_numpy(second))


@pytest.mark.parametrize("size", [1e200, 1e-200])
def test_rank_me_does_not_depend_on_the_size_of_the_features(size: float) -> None:
    rows = torch.randn(20, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert rank_me(size * rows) == pytest.approx(rank_me(rows))


@pytest.mark.parametrize("size", [1e-16, 1e-13, 1e17])
def test_directions_do_not_depend_on_the_size_of_the_features(size: float) -> None:
    features = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(statistics.unit_rows(size * features), statistics.unit_rows(features))
    assert not statistics.unit_rows(torch.zeros(2, 6)).any()
