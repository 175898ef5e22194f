"""The distance between drawn and real images, and the eyes it is measured with."""

import pytest
import torch

from shoestring.studies.diffusion_blocks.distance import (
    frechet,
    frechet_ref,
    seen,
    trained_eyes,
)


def sampled(mean, deviations, *, count=400, seed=0):
    """Features (N, W) whose mean and covariance are exactly these."""
    x = torch.randn(
        count, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    x = x - x.mean(dim=0)
    q, _ = torch.linalg.qr(x)
    return q * (count - 1) ** 0.5 * torch.tensor(deviations) + torch.tensor(mean)


def test_two_known_normal_laws_are_as_far_apart_as_the_formula_says():
    one = sampled([0.0, 1.0, 2.0], [1.0, 2.0, 0.5])
    other = sampled([1.0, 1.0, 0.0], [3.0, 2.0, 1.0], seed=1)
    expected = (1 + 0 + 4) + (2.0**2 + 0 + 0.5**2)  # means, then deviations
    assert frechet(one, other) == pytest.approx(expected, rel=1e-9)


def test_a_rotation_of_one_law_counts():
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    one = sampled([0.0, 0.0], [1.0, 3.0])
    assert frechet(one, one @ turn) == pytest.approx(2 * (3 - 1) ** 2, rel=1e-9)


def test_it_is_its_twin_also_where_features_are_fewer_than_they_look():
    g = torch.Generator().manual_seed(2)
    mix = torch.randn(6, 6, generator=g, dtype=torch.float64)
    one = torch.randn(50, 6, generator=g, dtype=torch.float64) @ mix
    other = torch.randn(60, 6, generator=g, dtype=torch.float64).exp()
    assert frechet(one, other) == pytest.approx(frechet_ref(one, other), rel=1e-8)
    one[:, 2] = 0.0  # a feature that never speaks
    assert frechet(one, other) == pytest.approx(frechet_ref(one, other), rel=1e-5)


def test_images_are_no_distance_from_themselves():
    one = sampled([0.0, 1.0], [1.0, 2.0])
    assert frechet(one, one) == pytest.approx(0.0, abs=1e-6)


def test_the_eyes_learn_are_the_same_every_time_and_see_only_what_a_picture_shows():
    labels = torch.arange(400) % 10
    images = torch.full((400, 1, 8, 8), -1.0)
    images[torch.arange(400), 0, labels // 4 * 2, labels % 4 * 2] = 1.0
    eyes = trained_eyes(images, labels, epochs=30)
    found = seen(eyes, images)
    assert float((found.classes == labels).double().mean()) > 0.9
    assert found.features.dtype == torch.float64
    again = trained_eyes(images, labels, epochs=30)
    assert torch.equal(seen(again, images).features, found.features)
    assert torch.equal(seen(eyes, images * 5).features, found.features)
