"""EDM's scales, the target and weights that belong to them, and the step between levels."""

import itertools

import pytest
import torch

from shoestring.ops import preconditioning
from shoestring.ops.noise_levels import LogNormal, partition
from shoestring.ops.preconditioning import (
    edm_loss_ref,
    edm_scales,
    euler_step_ref,
    flow_denoised,
    flow_noised,
)

STD = 0.5


def draws(count=200_000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    kind = {"generator": generator, "dtype": torch.float64}
    return STD * torch.randn(count, **kind), torch.randn(count, **kind)


def step_lands_on_the_noise_of_the_next_level():
    y, noise = (part[:32].view(2, 16) for part in draws(32))
    for blocks in (2, 3, 4):
        for steps in (blocks, blocks + 1, 20):
            grid = partition(LogNormal(), blocks).grid(steps)
            for level, following in itertools.pairwise(grid):
                at, to = torch.tensor([[level] * 2, [following] * 2], dtype=torch.float64)
                landed = preconditioning.euler_step(y + level * noise, y, at, to)
                torch.testing.assert_close(landed, y + following * noise, rtol=0, atol=1e-6)
                twin = euler_step_ref(y + level * noise, y, level, following)
                torch.testing.assert_close(landed, twin, rtol=1e-9, atol=1e-9)


def step_lands_there_for_a_flow_too():
    y, noise = (part[:32].view(2, 16) for part in draws(32))
    times = torch.tensor([1.0, 0.8, 0.3, 0.05, 0.0]).double()
    for t, s in itertools.pairwise(times):
        z = flow_noised(y, noise, t.expand(2))
        denoised = flow_denoised(noise - y, z, t.expand(2))
        torch.testing.assert_close(denoised, y)
        landed = preconditioning.euler_step(z, denoised, t.expand(2), s.expand(2))
        torch.testing.assert_close(landed, flow_noised(y, noise, s.expand(2)))


def scales_have_unit_variance_and_the_weight_undoes_c_out():
    y, noise = draws()
    for sigma in (0.002, 0.02, 0.3, 1.0, 80.0):
        at = torch.tensor([sigma]).double()
        scales = edm_scales(at, STD)
        weight = preconditioning.edm_weight(at, STD)
        torch.testing.assert_close(weight * scales.out.square(), torch.ones(1).double())
        z = y + sigma * noise
        assert float((scales.inner * z).std()) == pytest.approx(1, abs=0.01)
        target = (y - scales.skip * z) / scales.out
        assert float(target.std()) == pytest.approx(1, abs=0.01)
        got = preconditioning.edm_target(y[None], noise[None], at, STD)[0]
        torch.testing.assert_close(got, target, rtol=1e-6, atol=1e-6)
        back = preconditioning.edm_denoised(target[None], z[None], at, STD)[0]
        torch.testing.assert_close(back, y, rtol=1e-6, atol=1e-6)


def weights_are_those_of_the_sheet():
    sigmas = torch.tensor([0.002, 0.02, 0.1, 0.3, 1, 80]).double()
    got = preconditioning.edm_weight(sigmas, STD).tolist()
    assert got == pytest.approx([250_004, 2504, 104, 15.1, 5, 4.0], rel=2e-3)
    noise = edm_scales(sigmas, STD).noise
    assert noise[0] == pytest.approx(-1.554, abs=1e-3)
    assert noise[-1] == pytest.approx(1.096, abs=1e-3)


def loss_of_float32_is_that_of_the_twin():
    generator = torch.Generator().manual_seed(1)
    sigma = torch.tensor([0.002, 0.1, 1.0, 80.0])
    y, noise, f = (torch.randn(4, 3, 5, 5, generator=generator) for _ in range(3))
    target = preconditioning.edm_target(y, noise, sigma, STD)
    mine = (f - target).square().flatten(1).mean(1)
    torch.testing.assert_close(
        mine.double(), edm_loss_ref(f, y, noise, sigma, STD), rtol=1e-5, atol=0
    )


def a_sample_is_weighted_by_its_own_level_alone():
    sigma = torch.tensor([0.002, 0.1, 1.0, 80.0]).double()
    y = torch.zeros(4, 3).double()
    for n in range(4):
        z = y.clone()
        z[n] = 1.0
        mixed = preconditioning.edm_denoised(y, z, sigma, STD)
        assert torch.equal(mixed[[i for i in range(4) if i != n]], torch.zeros(3, 3).double())
        assert float(mixed[n, 0]) == float(edm_scales(sigma, STD).skip[n])
        # a batch of 4 with 4 components: where (N,) against (N, 4) would go through unseen
        square = torch.zeros(4, 4).double()
        square[n] = 1.0
        mixed = preconditioning.edm_denoised(torch.zeros_like(square), square, sigma, STD)
        assert (mixed[n] == edm_scales(sigma, STD).skip[n]).all()


INVARIANTS = [
    step_lands_on_the_noise_of_the_next_level,
    step_lands_there_for_a_flow_too,
    scales_have_unit_variance_and_the_weight_undoes_c_out,
    weights_are_those_of_the_sheet,
    loss_of_float32_is_that_of_the_twin,
    a_sample_is_weighted_by_its_own_level_alone,
]


@pytest.mark.parametrize("invariant", INVARIANTS, ids=lambda f: f.__name__)
def test_invariant(invariant):
    invariant()


def step_of_the_paper(z, denoised, level, following):
    rise = (level - following) / level
    return z + preconditioning.spread(rise, z) * (z - denoised)


def step_with_the_shares_swapped(z, denoised, level, following):
    a = preconditioning.spread(following / level, z)
    return (1 - a) * z + a * denoised


def weight_without_a_square(sigma, std):
    return (sigma.square() + std**2) / (sigma * std)


def target_of_plain_noise(y, noise, sigma, std):
    return -noise


def target_in_half(y, noise, sigma, std):
    parts = (y.half(), noise.half(), sigma.half())
    return TARGET(*parts, std).to(y.dtype)


def unspread(per_sample, like):
    return per_sample.to(like.dtype)


def mean_of_levels(per_sample, like):
    return per_sample.mean().to(like.dtype)


TARGET = preconditioning.edm_target
BUGS = [
    ("euler_step", step_of_the_paper, step_lands_on_the_noise_of_the_next_level),
    ("euler_step", step_with_the_shares_swapped, step_lands_there_for_a_flow_too),
    ("edm_weight", weight_without_a_square, weights_are_those_of_the_sheet),
    ("edm_target", target_of_plain_noise, scales_have_unit_variance_and_the_weight_undoes_c_out),
    ("edm_target", target_in_half, loss_of_float32_is_that_of_the_twin),
    ("spread", unspread, a_sample_is_weighted_by_its_own_level_alone),
    ("spread", mean_of_levels, a_sample_is_weighted_by_its_own_level_alone),
]


@pytest.mark.parametrize(("name", "bug", "invariant"), BUGS, ids=[b.__name__ for _, b, _ in BUGS])
def test_planted_bug_is_seen(monkeypatch, name, bug, invariant):
    monkeypatch.setattr(preconditioning, name, bug)
    # a wrong broadcast may also be torch's own error
    with pytest.raises((AssertionError, RuntimeError)):
        invariant()


def test_levels_that_are_not_one_a_sample_are_refused():
    with pytest.raises(ValueError, match="one level a sample"):
        preconditioning.spread(torch.ones(4, 1), torch.ones(4, 3))
    with pytest.raises(ValueError, match="one level a sample"):
        preconditioning.spread(torch.ones(3), torch.ones(4, 3))
