"""Rotations are orthogonal, the same everywhere, and spread every vector."""

import pytest
import torch

from shoestring.errors import ConfigError
from shoestring.ops.rotation import Rotation, rotated_ref

KINDS = ["hadamard", "dense"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [1, 3, 7, 64, 80, 96, 128, 384])
def test_a_rotation_is_its_definition_and_its_inverse_undoes_it(kind, width):
    rotation = Rotation(width, kind, seed=3)
    x = torch.randn(5, 2, width, dtype=torch.float64)
    y = rotation(x)
    torch.testing.assert_close(y, rotated_ref(rotation, x), rtol=0, atol=1e-12)
    torch.testing.assert_close(rotation.inverse(y), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("width", [320, 512, 1536])
def test_wide_ones_are_transformed_without_a_matrix(width):
    rotation = Rotation(width, seed=1)
    x = torch.randn(3, width)
    matrix = rotation.matrix(dtype=torch.float64)
    torch.testing.assert_close(rotation(x).double(), x.double() @ matrix.T, rtol=0, atol=2e-5)
    torch.testing.assert_close(rotation.inverse(rotation(x)), x, rtol=0, atol=2e-5)
    assert torch.dist(matrix @ matrix.T, torch.eye(width, dtype=torch.float64)) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_is_a_map_and_another_seed_another(kind):
    x = torch.randn(64)
    assert torch.equal(Rotation(64, kind, 5)(x), Rotation(64, kind, 5)(x))
    assert torch.equal(
        Rotation(64, kind, 5)(x.double()).float(), Rotation(64, kind, 5)(x.double()).float()
    )
    assert torch.dist(Rotation(64, kind, 5)(x), Rotation(64, kind, 6)(x)) > 1


def test_dense_rotations_are_drawn_evenly_from_all():
    # fourth moment of a coordinate on the sphere: 3 d / (d + 2), times 1 / d^2
    d = 16
    x = torch.zeros(d, dtype=torch.float64)
    x[0] = 1
    drawn = torch.stack([Rotation(d, "dense", seed)(x) for seed in range(4000)]) * d**0.5
    assert float(drawn.pow(2).mean()) == pytest.approx(1, abs=1e-9)
    assert float(drawn.pow(4).mean()) == pytest.approx(3 * d / (d + 2), rel=0.03)
    assert drawn.mean(0).abs().max() < 0.08


def test_signs_come_before_the_transform():
    # without them a constant vector would end in one coordinate
    y = Rotation(128, seed=0)(torch.ones(128) / 128**0.5)
    assert y.abs().max() < 0.5


def test_what_cannot_be_rotated_is_refused():
    with pytest.raises(ConfigError, match="rotation = 'fourier'"):
        Rotation(64, "fourier")
    with pytest.raises(ConfigError, match="width 0"):
        Rotation(0)
    with pytest.raises(ConfigError, match=r"width 63.*64"):
        Rotation(64)(torch.zeros(2, 63))
