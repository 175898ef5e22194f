"""Denoising a class's row: what z says by itself, what a block is fed, where draws lie."""

import math

import pytest
import torch
import torch.nn.functional as F

from shoestring.errors import ConfigError
from shoestring.models.dit import DiT, unit_table
from shoestring.models.dit_config import DiTConfig
from shoestring.objectives.label_denoising import Draw, LabelDenoising, denoised, nearest_ref
from shoestring.ops.noise_levels import LogNormal, MaskTime, partition
from shoestring.ops.preconditioning import euler_step

V = 6
CONFIG = DiTConfig(blocks=2, layers=2, width=32, heads=2, size=8, patch=4, answers=V, condition=16)
TABLE = unit_table(V, V, seed=0)
OBJECTIVE = LabelDenoising(partition=partition(LogNormal(), 2), top_share=0.3)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(count=300):
    return torch.randn(count, 1, 8, 8, generator=generator(1)), torch.arange(count) % V


def at(level, count=300):
    levels = torch.full((count,), level, dtype=torch.float64)
    return Draw(levels, torch.randn(count, V, generator=generator(2)))


def an_untrained_block_reads_nothing_out_of_z():
    """ln V at the highest level, and no free lunch below it: not better than the nearest row."""
    net = DiT.make(CONFIG, seed=0, table=TABLE)
    images, labels = batch()
    top = OBJECTIVE.losses(net.block(1), images, labels, at(80.0), TABLE)
    assert float(top.detach().mean()) == pytest.approx(math.log(V), rel=0.05)
    for level in (0.2, 0.3012, 0.6):
        draw = at(level)
        found = OBJECTIVE.losses(net.block(2), images, labels, draw, TABLE).detach().mean()
        z = OBJECTIVE.noised(labels, draw, TABLE)
        known = F.nll_loss(nearest_ref(z, draw.level, TABLE), labels)
        assert float(found) > float(known)


def z_is_scaled_to_unit_variance_and_images_are_not():
    seen = []

    def net(z, noise, images):
        seen.append((z, noise, images))
        return torch.zeros(len(z), V)

    images, labels = batch(60_000)
    for level in (0.002, 0.3, 80.0):
        OBJECTIVE.losses(net, images, labels, at(level, 60_000), TABLE)
        z, noise, read = seen.pop()
        assert float(z.square().mean()) == pytest.approx(1, abs=0.02)
        assert float(noise[0]) == pytest.approx(math.log(level) / 4)
        assert read is images


def losses_are_cross_entropies_without_weight():
    images, labels = batch(5)
    draw = OBJECTIVE.draw(1, 5, V, generator())
    logits = torch.randn(5, V, generator=generator(3))
    losses = OBJECTIVE.losses(lambda z, noise, images: logits, images, labels, draw, TABLE)
    twin = [-float(logits[n].double().log_softmax(0)[labels[n]]) for n in range(5)]
    assert losses.tolist() == pytest.approx(twin, rel=1e-5)


def the_chain_of_one_who_knows_ends_at_the_row():
    """A certain answer steps onto the row's own noise; an uncertain one towards the mean row."""
    draw = at(2.0, 4)
    labels = torch.arange(4)
    z = OBJECTIVE.noised(labels, draw, TABLE)
    sure = denoised(1000 * F.one_hot(labels, V).float(), TABLE)
    landed = euler_step(z, sure, draw.level, draw.level / 4)
    wanted = OBJECTIVE.noised(labels, Draw(draw.level / 4, draw.noise), TABLE)
    torch.testing.assert_close(landed, wanted)
    torch.testing.assert_close(denoised(torch.zeros(1, V), TABLE)[0], TABLE.mean(dim=0))


def the_share_at_the_top_is_block_ones_alone():
    first = OBJECTIVE.draw(1, 20_000, V, generator())
    assert float((first.level == 80).double().mean()) == pytest.approx(0.3, abs=0.01)
    assert not bool((OBJECTIVE.draw(2, 20_000, V, generator()).level == 80).any())
    others = first.level[first.level < 80]
    assert float((others > 1).double().mean()) == pytest.approx(2 * 0.159, abs=0.01)


INVARIANTS = [
    an_untrained_block_reads_nothing_out_of_z,
    z_is_scaled_to_unit_variance_and_images_are_not,
    losses_are_cross_entropies_without_weight,
    the_chain_of_one_who_knows_ends_at_the_row,
    the_share_at_the_top_is_block_ones_alone,
]


@pytest.mark.parametrize("invariant", INVARIANTS, ids=lambda f: f.__name__)
def test_invariant(invariant):
    invariant()


def readout_of_z(self, net, z, level, images):
    """A tied readout beside the block: an untrained model is right by way of z alone."""
    return LOGITS(self, net, z, level, images) + 50 * z @ TABLE.T


def unscaled_z(self, net, z, level, images):
    return net(z, level.float().log() / 4, images)


def scaled_images(self, net, z, level, images):
    return net(z / (level.float().square() + 1 / V).sqrt()[:, None], level.float().log() / 4,
               images / 2)  # fmt: skip


def weighted(self, net, images, labels, draw, table):
    return LOSSES(self, net, images, labels, draw, table) / draw.level.square()


def argument_of_the_largest(logits, table):
    return table[logits.argmax(dim=1)]


def raw_rows(logits, table):
    return 2 * logits.softmax(dim=1) @ table


def for_every_block(self, block, count, width, generator):
    return DRAW(self, 1, count, width, generator)


LOGITS, LOSSES, DRAW = LabelDenoising.logits, LabelDenoising.losses, LabelDenoising.draw
BUGS = [
    ("logits", readout_of_z, an_untrained_block_reads_nothing_out_of_z),
    ("logits", unscaled_z, z_is_scaled_to_unit_variance_and_images_are_not),
    ("logits", scaled_images, z_is_scaled_to_unit_variance_and_images_are_not),
    ("losses", weighted, losses_are_cross_entropies_without_weight),
    ("draw", for_every_block, the_share_at_the_top_is_block_ones_alone),
]


@pytest.mark.parametrize(("name", "bug", "invariant"), BUGS, ids=[b.__name__ for _, b, _ in BUGS])
def test_planted_bug_is_seen(monkeypatch, name, bug, invariant):
    monkeypatch.setattr(LabelDenoising, name, bug)
    with pytest.raises(AssertionError):
        invariant()


@pytest.mark.parametrize("bug", [argument_of_the_largest, raw_rows])
def test_another_table_between_the_steps_is_seen(monkeypatch, bug):
    monkeypatch.setitem(globals(), "denoised", bug)
    with pytest.raises(AssertionError):
        the_chain_of_one_who_knows_ends_at_the_row()


def test_the_nearest_row_is_found_below_the_level_where_it_is_free():
    """1 / sqrt(2 ln V): well below it z alone says the class, well above it does not."""
    _, labels = batch(3000)
    free = 1 / math.sqrt(2 * math.log(V))
    right = []
    for level in (free / 4, free, 8 * free):
        draw = at(level, 3000)
        z = OBJECTIVE.noised(labels, draw, TABLE)
        answered = nearest_ref(z, draw.level, TABLE)
        assert torch.equal(answered.argmax(1), (z @ TABLE.T).argmax(1))
        right.append(float((answered.argmax(1) == labels).double().mean()))
    assert right[0] > 0.99
    assert 0.5 < right[1] < 0.9
    assert right[2] < 0.35


def test_levels_that_are_no_sigma_are_refused():
    with pytest.raises(ConfigError, match="levels of kind sigma"):
        LabelDenoising(partition=partition(MaskTime(), 2))
