"""Denoising with one block: the loss, its isolation, and one block as plain EDM."""

import math

import pytest
import torch

from shoestring.errors import ConfigError
from shoestring.models.dit import DiT
from shoestring.models.dit_config import DiTConfig
from shoestring.objectives import denoise
from shoestring.objectives.denoise import Denoise, Draw
from shoestring.ops.noise_levels import FlowTime, LogNormal, MaskTime, partition
from shoestring.ops.preconditioning import edm_loss_ref

CONFIG = DiTConfig(blocks=2, layers=4, width=32, heads=2, size=8, patch=4, classes=3, condition=16)
EDM = Denoise(kind="edm", partition=partition(LogNormal(), 2, overlap=0.05), classes=3)
FLOW = Denoise(kind="flow", partition=partition(FlowTime(), 2), classes=3)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(count=8, seed=0):
    """Bars that stand where the label says, a little noisy."""
    labels = torch.arange(count) % 3
    images = 0.1 * torch.randn(count, 1, 8, 8, generator=generator(seed))
    for n, label in enumerate(labels.tolist()):
        images[n, 0, :, 2 * label : 2 * label + 2] += 1.0
    return images, labels


def shaken(model):
    """Weights with which noise and class are heard: at the start gates are closed."""
    draws = generator(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=draws))
    return model


def train(model, objective, block, steps, seed=0, weight_decay=0.1):
    """Losses of a block's training; the optimizer is given every parameter of the model."""
    images, labels = batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=weight_decay)
    draws, losses = generator(seed), []
    for _ in range(steps):
        draw = objective.draw(block, images, labels, draws)
        loss = objective.loss(model.block(block), images, draw)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("objective", [EDM, FLOW], ids=["edm", "flow"])
def test_other_blocks_have_no_gradient_and_do_not_move_in_ten_updates(objective):
    model = DiT.make(CONFIG, seed=0)
    images, labels = batch()
    objective.loss(
        model.block(1), images, objective.draw(1, images, labels, generator())
    ).backward()
    assert all(p.grad is None for p in model.block(2).parameters())
    assert all(p.grad is not None for p in model.block(1).parameters())
    model.zero_grad(set_to_none=True)
    before = {name: p.clone() for name, p in model.named_parameters()}
    train(model, objective, 1, 10)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) is name.startswith("blocks.1.")


def test_zeroed_gradients_would_move_them():
    """What the test above is there to see: set_to_none=False lets weight decay at idle blocks."""
    model = DiT.make(CONFIG, seed=0)
    before = model.block(2).embed.weight.clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert not torch.equal(model.block(2).embed.weight, before)


@pytest.mark.parametrize("objective", [EDM, FLOW], ids=["edm", "flow"])
@pytest.mark.parametrize("block", [1, 2])
def test_a_block_learns(objective, block):
    losses = train(DiT.make(CONFIG, seed=0), objective, block, 100)
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])


def edm_loss_is_that_of_the_twin():
    """Per sample, so that a weight that went to another sample would show."""
    images, labels = batch(6)
    draw = EDM.draw(2, images, labels, generator())
    made = []

    def net(z, noise, labels):
        made.append(torch.sin(3 * z) + noise[:, None, None, None])
        return made[-1]

    losses = EDM.losses(net, images, draw)
    twin = edm_loss_ref(made[0], images, draw.noise, draw.level, 0.5)
    torch.testing.assert_close(losses.double(), twin, rtol=1e-4, atol=1e-5)


def the_right_velocity_has_no_loss_and_leads_to_the_image():
    images, labels = batch(6)
    draw = FLOW.draw(1, images, labels, generator())

    def net(z, time, labels):
        return draw.noise - images

    assert torch.equal(FLOW.losses(net, images, draw), torch.zeros(6))
    level = draw.level.float()
    z = (1 - level)[:, None, None, None] * images + level[:, None, None, None] * draw.noise
    torch.testing.assert_close(FLOW.denoised(net, z, level), images)


def one_block_is_plain_edm_step_for_step():
    config = DiTConfig(layers=2, width=32, heads=2, size=8, patch=4, condition=16)
    law, std = LogNormal(), 0.5
    objective = Denoise(kind="edm", partition=partition(law, 1), data_std=std)
    mine, theirs = shaken(DiT.make(config, seed=0)), shaken(DiT.make(config, seed=0)).block(1)
    images, _ = batch()
    first, second = torch.optim.Adam(mine.parameters()), torch.optim.Adam(theirs.parameters())
    draws, again = generator(1), generator(1)
    for _ in range(5):
        loss = objective.loss(mine.block(1), images, objective.draw(1, images, None, draws))
        loss.backward()
        first.step()
        first.zero_grad()
        # EDM as its paper has it (table 1), with the law's ends cut off
        q = law.mass(torch.tensor([law.low, law.high]).double())
        u = torch.rand(8, generator=again, dtype=torch.float64)
        sigma = law.level(q[0] + u * (q[1] - q[0])).float().view(8, 1, 1, 1)
        noise = torch.randn(images.shape, generator=again)
        z = images + sigma * noise
        root = (sigma**2 + std**2).sqrt()
        f = theirs(z / root, sigma.flatten().log() / 4)
        denoised = std**2 / root**2 * z + sigma * std / root * f
        weight = (sigma**2 + std**2) / (sigma * std) ** 2
        other = (weight * (denoised - images).square()).mean()
        other.backward()
        second.step()
        second.zero_grad()
        assert float(loss.detach()) == pytest.approx(float(other.detach()), rel=1e-4)


INVARIANTS = [
    edm_loss_is_that_of_the_twin,
    the_right_velocity_has_no_loss_and_leads_to_the_image,
    one_block_is_plain_edm_step_for_step,
]


@pytest.mark.parametrize("invariant", INVARIANTS, ids=lambda f: f.__name__)
def test_invariant(invariant):
    invariant()


def unscaled_input(scales):
    return scales._replace(inner=torch.ones_like(scales.inner))


def swapped_noise(scales):
    return scales._replace(noise=scales.noise.flip(0))


@pytest.mark.parametrize("bug", [unscaled_input, swapped_noise])
def test_planted_bug_of_the_scales_is_seen(monkeypatch, bug):
    real = denoise.ops.edm_scales
    monkeypatch.setattr(denoise.ops, "edm_scales", lambda *a: bug(real(*a)))
    with pytest.raises(AssertionError):
        one_block_is_plain_edm_step_for_step()


def losses_weighted_across_samples(self, net, images, draw):
    """(N,) against (N, 1): what the released code of the paper does to its weights."""
    level = draw.level.float()
    weight = denoise.ops.edm_weight(level, 0.5)
    flat = LOSSES(self, net, images, draw) / weight
    return (flat * weight[:, None]).mean(dim=1)


def losses_without_weight(self, net, images, draw):
    return LOSSES(self, net, images, draw) / denoise.ops.edm_weight(draw.level.float(), 0.5)


LOSSES = Denoise.losses


@pytest.mark.parametrize("bug", [losses_weighted_across_samples, losses_without_weight])
def test_planted_bug_of_the_weight_is_seen(monkeypatch, bug):
    monkeypatch.setattr(Denoise, "losses", bug)
    with pytest.raises(AssertionError):
        edm_loss_is_that_of_the_twin()


def test_a_changed_sample_enters_with_its_own_weight_only():
    images, labels = batch(5)
    draw = EDM.draw(1, images, labels, generator())

    def losses(z_of_two):
        def net(z, noise, labels):
            f = torch.zeros_like(z)
            f[2] = z_of_two
            return f

        return EDM.losses(net, images, draw)

    before, after = losses(0.0), losses(1.0)
    others = [0, 1, 3, 4]
    assert torch.equal(before[others], after[others])
    assert before[2] != after[2]


def test_labels_are_left_out_for_their_share_and_draws_repeat():
    images, labels = torch.zeros(4000, 1, 1, 1), torch.arange(4000) % 3
    draw = EDM.draw(1, images, labels, generator())
    assert float((draw.labels == 3).float().mean()) == pytest.approx(0.1, abs=0.02)
    kept = draw.labels != 3
    assert torch.equal(draw.labels[kept], labels[kept])
    again = EDM.draw(1, images, labels, generator())
    assert torch.equal(again.level, draw.level)
    assert torch.equal(again.noise, draw.noise)


def test_start_has_the_noise_of_the_highest_level():
    noise = torch.ones(1, 1, 2, 2)
    assert torch.equal(EDM.start(noise), 80 * noise)
    assert torch.equal(FLOW.start(noise), noise)


def test_levels_of_another_kind_are_refused():
    with pytest.raises(ConfigError, match="edm with sigma, or flow with time"):
        Denoise(kind="edm", partition=partition(FlowTime(), 2))
    with pytest.raises(ConfigError, match="edm with sigma, or flow with time"):
        Denoise(kind="flow", partition=partition(MaskTime(), 2))


def test_loss_is_finite_at_both_ends_of_sigma():
    images, _ = batch(2)
    model = DiT.make(CONFIG, seed=0)
    level = torch.tensor([0.002, 80.0], dtype=torch.float64)
    losses = EDM.losses(model.block(2), images, Draw(level, torch.randn(images.shape), None))
    assert all(map(math.isfinite, losses.tolist()))


def test_a_share_of_block_ones_draws_is_where_a_chain_begins():
    images, labels = torch.zeros(4000, 1, 2, 2), torch.zeros(4000, dtype=torch.int64)
    for kind, law, top in (("edm", LogNormal(), 80.0), ("flow", FlowTime(), 1.0)):
        parts = partition(law, 3)
        shares = []
        for block in (1, 2):
            for share in (0.0, 0.3):
                objective = Denoise(kind=kind, partition=parts, top_share=share)
                draw = objective.draw(block, images, labels, torch.Generator().manual_seed(0))
                shares.append(float((draw.level == top).double().mean()))
        assert shares == [0.0, pytest.approx(0.3, abs=0.03), 0.0, 0.0]
